"""Responses to a split, from compiled steps to tokens."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from empdg_jax.data import pipeline, vocab
from empdg_jax.data.pipeline import Batch, EncodedExample, Shape
from empdg_jax.data.vocab import Vocabulary
from empdg_jax.parallel import devices, hosts


class Reply(NamedTuple):
  """A response to an example.

  Attributes:
    index: The example's index.
    tokens: The response, without EOS.
    emotion_probs: The probability of every emotion, `[emotions]`; None if the
      system predicts none.
  """

  index: int
  tokens: tuple[str, ...]
  emotion_probs: np.ndarray | None


def respond(
  predict: Callable[[Batch], Any],
  encoded: Sequence[EncodedExample],
  shapes: Sequence[Shape],
  vocabulary: Vocabulary,
  batch_size: int,
) -> Iterator[Reply]:
  """Yields the response to each context, batch by batch.

  Args:
    predict: Returns the sharded `steps.Prediction` of this host's rows.
    encoded: The contexts; targets are ignored.
    shapes: The padded lengths; only those of contexts count.
    vocabulary: The tokens of ids.
    batch_size: Contexts a step, over all devices.
  """
  # Without targets, examples group by their contexts alone, which takes fewer
  # shapes to compile and pads less.
  blank = [e._replace(target=[vocab.EOS], feedback=[]) for e in encoded]
  shapes = sorted({Shape(s.context, s.emotion, 1) for s in shapes})
  rows = hosts.rows(batch_size)
  for batch in pipeline.eval_batches(
    blank, shapes, batch_size=batch_size, rows=rows
  ):
    prediction = devices.unshard(predict(batch))
    shape = Shape(batch.context.shape[1], batch.emotion_context.shape[1], 1)
    # Every host needs all rows, not its own alone: metrics are of the split.
    prediction, indices, mask = devices.gather(
      (prediction, batch.index, batch.mask)
    )
    for row in np.flatnonzero(mask):
      index = int(indices[row])
      probs = prediction.emotion_probs
      tokens = response_tokens(
        prediction.tokens[row],
        prediction.copied_from[row],
        source_words(encoded[index], shape),
        vocabulary,
      )
      yield Reply(index, tokens, None if probs is None else probs[row])


def response_tokens(
  ids: np.ndarray,
  copied_from: np.ndarray,
  words: Sequence[str],
  vocabulary: Vocabulary,
) -> tuple[str, ...]:
  """Turns ids into tokens up to EOS; an UNK becomes the word it copies.

  Args:
    ids: The generated ids, `[max_steps]`.
    copied_from: The source position that an UNK copies, `[max_steps]`.
    words: The source's tokens by position, from `source_words`.
    vocabulary: The tokens of ids.

  Returns:
    The tokens.
  """
  tokens = []
  for token, position in zip(ids, copied_from, strict=True):
    # PAD ends a response too: decoding fills with it after EOS.
    if token in (vocab.EOS, vocab.PAD):
      break
    unknown = token == vocab.UNK and position >= 0
    tokens.append(words[position] if unknown else vocabulary.tokens[token])
  return tuple(tokens)


def source_words(encoded: EncodedExample, shape: Shape) -> list[str]:
  """Returns the text at each position of the decoder's source."""
  context = ["CLS", *encoded.words]
  # The emotional context begins after the padded context, whatever its length.
  context += ["PAD"] * (shape.context - len(context))
  return [*context, "LAB", *encoded.emotion_words]
