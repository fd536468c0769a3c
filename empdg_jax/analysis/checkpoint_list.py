"""The list of a run's checkpoints that `empdg checkpoints` prints."""

import dataclasses
import pathlib
from collections import defaultdict

from etils import epath
from rich.console import Console

from empdg_jax.config import InputError
from empdg_jax.metrics import shown
from empdg_jax.training import run_folder, terminal
from empdg_jax.training.checkpoint import Checkpoints, Selected
from empdg_jax.training.metric_writer import read_metrics


@dataclasses.dataclass(frozen=True)
class Listed:
  """A checkpoint.

  Attributes:
    step: The number of updates before it.
    kind: `latest`, or `best` for the best of its phase.
    phase: The training phase, or `damaged`.
    bytes: The size on the disk or in the bucket.
    metrics: The metrics of the validation at that step, empty without one.
  """

  step: int
  kind: str
  phase: str
  bytes: int
  metrics: dict[str, float]


def _size(path: epath.Path) -> int:
  """Returns the size in bytes of a file, or of all files below a folder."""
  if path.is_dir():
    return sum(map(_size, path.iterdir()))
  return path.stat().length


def _validations(workdir: pathlib.Path) -> dict[int, dict[str, float]]:
  """Returns the metrics of every validation by its step."""
  found: dict[int, dict[str, float]] = defaultdict(dict)
  for entry in read_metrics(workdir / "metrics.jsonl"):
    source, _, name = entry["name"].partition("/")
    if source == "valid":
      found[entry["step"]][name] = entry["value"]
  return found


def _phase(checkpoints: Checkpoints, one: Selected) -> str:
  """Returns a checkpoint's phase, or `damaged`, so that the rest is listed."""
  try:
    return checkpoints.restore_progress(one.kind, one.step)["phase"]
  except InputError:
    return "damaged"


def list_checkpoints(workdir: pathlib.Path) -> list[Listed]:
  """Returns a run's checkpoints in the order of their steps.

  Args:
    workdir: The run folder.

  Returns:
    The checkpoints, with the best one after the latest of the same step.

  Raises:
    InputError: The folder is not a run.
  """
  # Only for its error; Orbax finds no checkpoint in any other folder.
  run_folder.read_config(workdir)
  checkpoints = Checkpoints(workdir)
  validations = _validations(workdir)
  listed = [
    Listed(
      one.step,
      one.kind,
      _phase(checkpoints, one),
      _size(epath.Path(checkpoints.folder(one))),
      validations.get(one.step, {}),
    )
    for one in checkpoints.all()
  ]
  checkpoints.close()
  return sorted(listed, key=lambda one: one.step)


def print_checkpoints(
  listed: list[Listed], form: str, console: Console
) -> None:
  """Prints checkpoints.

  Args:
    listed: The checkpoints.
    form: `"terminal"` or `"json"`.
    console: The console to print on.
  """
  if form == "json":
    values = [dataclasses.asdict(one) for one in listed]
    console.print_json(data=values, ensure_ascii=True)
    return
  header = "step", "kind", "phase", "MiB", "perplexity", "emotion accuracy"
  rows = [
    (
      f"{one.step:,}",
      one.kind,
      one.phase,
      f"{one.bytes / 2**20:,.1f}",
      *(
        shown(name, one.metrics[name]) if name in one.metrics else ""
        for name in ("perplexity", "emotion_accuracy")
      ),
    )
    for one in listed
  ]
  console.print(terminal.table(header, rows, left=["kind", "phase"]))
