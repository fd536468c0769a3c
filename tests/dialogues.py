"""Random dialogues, a small generator and runs on several devices.

Shared by the tests of steps, adversarial steps and baselines.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from reference import CLS, EOS, LAB, SYS, UNK, USR, Example, pad

from empdg_jax.config import ModelConfig, TrainConfig
from empdg_jax.data.pipeline import Batch
from empdg_jax.models.generator import Generator

VOCAB = 60
ROWS = 8  # As many as the most devices.
SHAPE = (12, 6, 8)  # Context, emotional context, target.
MODEL = Generator(
  ModelConfig(
    emb_dim=16,
    key_value_depth=8,
    filter_size=12,
    feed_forward="dense",
    emotion_loss_weight=0.5,
    generation_loss_weight=2.0,
  ),
  VOCAB,
  32,
)
# An epsilon that does not blow up the last digits of small gradients.
TRAIN = TrainConfig(warmup_steps=10, adam_eps=1e-3)
KEY = jax.random.key(11)


def make_examples(seed: int) -> tuple[list[Example], np.ndarray]:
  """Returns `ROWS` random dialogues of all lengths, and their emotions."""
  rng = np.random.default_rng(seed)

  def words(least: int, most: int) -> list[int]:
    drawn = rng.integers(8, VOCAB, rng.integers(least, most + 1))
    return [int(w) if w < VOCAB - 4 else UNK for w in drawn]

  examples = []
  for _ in range(ROWS):
    context = words(2, SHAPE[0] - 1)
    middle = len(context) // 2
    state = [USR] * middle + [SYS] * (len(context) - middle)
    examples.append(
      Example(
        [CLS, *context],
        [CLS, *state],
        [LAB, *words(0, SHAPE[1] - 1)],
        [*words(1, SHAPE[2] - 1), EOS],
      )
    )
  return examples, rng.integers(0, 32, ROWS)


def make_batch(seed: int, real: int = ROWS) -> Batch:
  """Pads the dialogues of `make_examples`; only the first `real` ones count."""
  examples, emotions = make_examples(seed)
  return Batch(
    context=pad([e.context for e in examples], SHAPE[0]),
    state=pad([e.state for e in examples], SHAPE[0]),
    emotion_context=pad([e.emotion_context for e in examples], SHAPE[1]),
    target=pad([e.target for e in examples], SHAPE[2]),
    feedback=np.ones((ROWS, 1), np.int32),
    emotion=emotions.astype(np.int32),
    mask=(np.arange(ROWS) < real).astype(np.float32),
    position=np.arange(ROWS, dtype=np.int32),
    index=np.arange(ROWS, dtype=np.int32),
  )


def flat(params: Any) -> np.ndarray:
  """Returns all parameters as one float64 vector."""
  leaves = [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(params)]
  return np.concatenate(leaves)


def relative_difference(a: np.ndarray, b: np.ndarray) -> float:
  """Returns `|a - b| / |b|` in the Euclidean norm."""
  return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def run_on_devices(
  program: str, folder: Path
) -> dict[int, subprocess.Popen[str]]:
  """Starts `program FILE` on 2 and on 8 devices, each in a process.

  Args:
    program: The program.
    folder: The folder of the FILEs, named by the number of devices.

  Returns:
    The processes by their number of devices.
  """
  runs = {}
  for devices in (2, 8):
    environment = {
      **os.environ,
      "JAX_PLATFORMS": "cpu",
      "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
      "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    runs[devices] = subprocess.Popen(
      [sys.executable, program, str(folder / f"{devices}.npz")],
      env=environment,
      stderr=subprocess.PIPE,
      text=True,
    )
  return runs


def run_again_on_eight_devices(module: str, chosen: str) -> None:
  """Runs tests of a module, by pytest's `-k`, in a process with 8 devices."""
  flags = "--xla_force_host_platform_device_count=8"
  done = subprocess.run(
    [
      *(sys.executable, "-m", "pytest", "-n0", "-q", "-pno:cacheprovider"),
      *(module, "-k", chosen),
    ],
    env={**os.environ, "XLA_FLAGS": flags},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout
