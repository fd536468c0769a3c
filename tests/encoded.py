"""Encoded examples of all lengths, and shapes for them."""

import numpy as np

from empdg_jax.data import vocab
from empdg_jax.data.pipeline import EncodedExample, Shape

SHAPES = (Shape(8, 4, 4), Shape(16, 6, 8), Shape(24, 10, 12))


def invented(count: int) -> list[EncodedExample]:
  """Encoded examples of all lengths; their ids identify them."""
  rng = np.random.default_rng(count)
  encoded = []
  for i in range(count):
    context, emotion, target = (
      int(rng.integers(2, n + 1)) for n in SHAPES[-1][:3]
    )
    encoded.append(
      EncodedExample(
        context=[vocab.CLS, *[100 + i] * (context - 1)],
        state=[vocab.CLS, *[vocab.USR] * (context - 1)],
        emotion_context=[vocab.LAB, *[200 + i] * (emotion - 1)],
        target=[*[300 + i] * (target - 1), vocab.EOS],
        feedback=[],
        emotion=i % 32,
        words=(f"w{i}",) * (context - 1),
        emotion_words=(f"e{i}",) * (emotion - 1),
        cut=(0, 0, 0, 0),
      )
    )
  return encoded
