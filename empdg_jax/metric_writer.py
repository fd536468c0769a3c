"""Metrics of a run as they come: `metrics.jsonl` and TensorBoard events."""

import contextlib
import json
import pathlib

from tensorboardX import SummaryWriter

from empdg_jax import config as config_lib


class MetricWriter:
  """Writes `metrics.jsonl` and TensorBoard events."""

  def __init__(self, workdir: pathlib.Path, resumed_step: int) -> None:
    """Opens both, forgetting what was logged after `resumed_step`."""
    path = workdir / "metrics.jsonl"
    kept = []
    if path.exists():
      for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        with contextlib.suppress(ValueError):  # The cut-off line of a kill.
          if json.loads(line)["step"] <= resumed_step:
            kept.append(line)
    with config_lib.atomic_path(path) as temporary:
      temporary.write_text("".join(kept), encoding="utf-8")
    self._file = path.open("a", encoding="utf-8")
    self._board = SummaryWriter(
      str(workdir / "tensorboard"), purge_step=resumed_step + 1
    )

  def write(self, step: int, phase: str, values: dict[str, float]) -> None:
    """Writes values of one step by their names."""
    for name, value in values.items():
      line = {"step": step, "phase": phase, "name": name, "value": value}
      self._file.write(json.dumps(line) + "\n")
      self._board.add_scalar(name, value, step)
    self._file.flush()

  def close(self) -> None:
    """Closes both files."""
    self._file.close()
    self._board.close()
