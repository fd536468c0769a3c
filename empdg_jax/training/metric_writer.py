"""Metrics of a run as they come: `metrics.jsonl` and TensorBoard events."""

import contextlib
import json
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from tensorboardX import SummaryWriter

from empdg_jax import storage


def read_metrics(path: pathlib.Path) -> Iterator[dict[str, Any]]:
  """Yields the entries of a `metrics.jsonl`, if it is there.

  Without the cut-off line that a killed run may have left.
  """
  if path.exists():
    for line in path.read_text(encoding="utf-8").splitlines():
      with contextlib.suppress(ValueError):
        yield json.loads(line)


class MetricWriter:
  """Writes `metrics.jsonl` and TensorBoard events.

  A bucket's files cannot grow: there both are kept in a temporary folder and
  copied as a whole with every checkpoint. What comes after it is forgotten by
  a run that resumes anyway.
  """

  def __init__(self, workdir: pathlib.Path, resumed_step: int) -> None:
    """Opens both, forgetting what was logged after `resumed_step`."""
    self._workdir = workdir
    self._scratch = None
    folder = workdir
    if storage.in_bucket(workdir):
      self._scratch = tempfile.TemporaryDirectory()
      folder = pathlib.Path(self._scratch.name)
    kept = [
      json.dumps(entry) + "\n"
      for entry in read_metrics(workdir / "metrics.jsonl")
      if entry["step"] <= resumed_step
    ]
    with storage.atomic_path(folder / "metrics.jsonl") as temporary:
      temporary.write_text("".join(kept), encoding="utf-8")
    self._file = (folder / "metrics.jsonl").open("a", encoding="utf-8")
    self._board = SummaryWriter(
      str(folder / "tensorboard"), purge_step=resumed_step + 1
    )

  def write(self, step: int, phase: str, values: dict[str, float]) -> None:
    """Writes values of one step by their names."""
    for name, value in values.items():
      line = {"step": step, "phase": phase, "name": name, "value": value}
      self._file.write(json.dumps(line) + "\n")
      self._board.add_scalar(name, value, step)
    self._file.flush()

  def copy(self) -> None:
    """Copies both to the run folder, if it is in a bucket.

    Raises:
      SaveError: It cannot be written.
    """
    if self._scratch is None:
      return
    self._board.flush()
    storage.copy_files(pathlib.Path(self._scratch.name), self._workdir)

  def close(self) -> None:
    """Closes both files, and copies them; see `copy`."""
    self._board.close()
    self._file.close()
    try:
      self.copy()
    finally:
      if self._scratch is not None:
        self._scratch.cleanup()
