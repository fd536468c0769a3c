"""Times checkpoints with and without their checksums, in turn.

python benchmarks/checkpoint_cost.py

Saves and restores the whole of EmpDG, with its optimisers, to and from the disk
itself, as after a restart. Without checksums, none is computed or compared; the
file for them is written all the same.
"""

import argparse
import contextlib
import os
import pathlib
import tempfile
import time
import unittest.mock
from collections.abc import Mapping

import jax
import numpy as np

from empdg_jax.config import Config
from empdg_jax.training import checkpoint
from empdg_jax.training.train_state import TrainState
from empdg_jax.training.trainable import assemble

KINDS = ("save", "restore")


def _flags() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  add = parser.add_argument
  add("--rounds", type=int, default=20, help="turns of each")
  add("--vocab_size", type=int, default=20_100)
  add("--emb_dim", type=int, default=300)
  add("--folder", default=None, help="where to write, on the disk to measure")
  return parser


def _states(vocab_size: int, emb_dim: int) -> dict[str, TrainState]:
  """Draws states; the zeros that training begins with would compress."""
  config = Config()
  config.model.name = "empdg"
  config.model.emb_dim = emb_dim
  system = assemble(config, vocab_size, 32, np.ones(vocab_size, bool))
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: np.asarray(100 * rng.standard_normal(leaf.shape), leaf.dtype),
    jax.eval_shape(lambda: system.create_states(0)),
  )


def _times(
  folder: pathlib.Path, states: Mapping[str, TrainState]
) -> tuple[float, float]:
  """Returns the seconds of a save, until it is on the disk, and a restore."""
  checkpoints = checkpoint.Checkpoints(folder, create=True)
  with contextlib.closing(checkpoints):
    start = time.perf_counter()
    checkpoints.save(checkpoint.LATEST, 1, states, {"phase": "mle"})
    checkpoints.wait()
    _empty_page_cache(folder)
    saved = time.perf_counter()
    checkpoints.resume(states)
    return saved - start, time.perf_counter() - saved


def _empty_page_cache(folder: pathlib.Path) -> None:
  """Writes all files of a folder to the disk, to be read from there."""
  for path in folder.rglob("*"):
    if path.is_file():
      with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
  """Measures and prints."""
  args = _flags().parse_args()
  states = _states(args.vocab_size, args.emb_dim)
  without = unittest.mock.patch.object(
    checkpoint, "_checksums", return_value={}
  )
  found: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
  for number in range(args.rounds + 1):
    # Each goes first in half of the rounds; the first round warms both up.
    for checked in (number % 2 == 0, number % 2 == 1):
      with (
        tempfile.TemporaryDirectory(dir=args.folder) as folder,
        contextlib.nullcontext() if checked else without,
      ):
        taken = _times(pathlib.Path(folder), states)
      if number:
        found[checked].append(taken)
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(states))
  print(f"{size / 1e6:,.1f} MB, medians of {args.rounds} rounds")
  for index, kind in enumerate(KINDS):
    with_sums, bare = (
      np.array([taken[index] for taken in found[checked]])
      for checked in (True, False)
    )
    # Disks are noisy: only times of the same round are compared.
    more = np.median(with_sums - bare)
    print(
      f"{kind:8} {np.median(bare):.3f} s without checksums, "
      f"{1e3 * more:+.0f} ms with them: {more / np.median(bare):+.1%}"
    )


if __name__ == "__main__":
  main()
