"""The metrics of a run in `metrics.jsonl` and TensorBoard events."""

import json
import pathlib
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from tensorboardX import event_file_writer, summary
from tensorboardX.proto import event_pb2

from empdg_jax import config as config_lib
from empdg_jax import storage
from empdg_jax.config import InputError

_PROTO: Any = event_pb2  # Its classes are made when it is imported.
_FLUSH_SECONDS = 30  # How often TensorBoard sees new events.


def read_metrics(path: pathlib.Path) -> Iterator[dict[str, Any]]:
  """Yields the entries of a `metrics.jsonl`, none if there is no such file.

  Lines that are no entries are left out: a killed run may leave one that is cut
  off, and a damaged log is no reason to refuse a run.

  Raises:
    InputError: It is no regular file, or cannot be read.
  """
  if not path.exists():
    return
  with storage.errors(f"{path}: cannot read", InputError):
    storage.check_plain(path)
    data = path.read_bytes()
  for line in data.split(b"\n"):
    try:
      entry = json.loads(line)
    except (ValueError, RecursionError):
      continue
    if _is_entry(entry):
      yield entry


def _is_entry(value: Any) -> bool:
  """Returns whether a JSON value is what `MetricWriter.write` wrote."""
  return (
    isinstance(value, dict)
    and type(value.get("step")) is int
    and isinstance(value.get("name"), str)
    # JSON can spell integers beyond every float.
    and type(number := value.get("value")) in (int, float)
    and not (type(number) is int and abs(number) > config_lib.MAX_INT)
  )


class MetricWriter:
  """Writes `metrics.jsonl` and TensorBoard events.

  Files in a bucket cannot grow. For a run there, both grow in a temporary
  folder and are copied whole with every checkpoint; a run that resumes drops
  later lines anyway.
  """

  def __init__(
    self, workdir: pathlib.Path, resumed_step: int, phase: str
  ) -> None:
    """Opens both, dropping metrics logged after `resumed_step` of a phase."""
    self._workdir = workdir
    in_bucket = storage.in_bucket(workdir)
    self._scratch = tempfile.TemporaryDirectory() if in_bucket else None
    folder = pathlib.Path(self._scratch.name) if self._scratch else workdir
    kept = [
      json.dumps(entry) + "\n"
      for entry in read_metrics(workdir / "metrics.jsonl")
      # The next phase may have begun with a validation at the same step.
      if entry["step"] < resumed_step
      or (entry["step"] == resumed_step and entry.get("phase") == phase)
    ]
    with storage.atomic_path(folder / "metrics.jsonl") as temporary:
      temporary.write_text("".join(kept), encoding="utf-8")
    self._file = (folder / "metrics.jsonl").open("a", encoding="utf-8")
    board = folder / "tensorboard"
    board.mkdir(exist_ok=True)
    # Without the thread of its `SummaryWriter`: on a full disk, that thread
    # ends with a traceback, and the next call would wait for it for ever.
    self._events = event_file_writer.EventsWriter(str(board / "events"))
    # It drops what an earlier session has written after this step.
    session = _PROTO.SessionLog(status=_PROTO.SessionLog.START)
    self._add_event(resumed_step + 1, session_log=session)
    self._flush_events()

  def _add_event(self, step: int, **what: Any) -> None:
    """Writes what TensorBoard shows, or drops, at a step."""
    event = _PROTO.Event(wall_time=time.time(), step=step, **what)
    self._events.write_event(event)

  def _flush_events(self) -> None:
    """Makes events visible to TensorBoard."""
    self._events.flush()
    self._flushed = time.monotonic()

  def write(self, step: int, phase: str, values: dict[str, float]) -> None:
    """Writes one step's values, given by their names."""
    for name, value in values.items():
      line = {"step": step, "phase": phase, "name": name, "value": value}
      self._file.write(json.dumps(line) + "\n")
      self._add_event(step, summary=summary.scalar(name, value))
    # A run that is killed keeps every line.
    self._file.flush()
    if time.monotonic() - self._flushed > _FLUSH_SECONDS:
      self._flush_events()

  def copy(self) -> None:
    """Copies both to the run folder, if it is in a bucket.

    Raises:
      SaveError: The bucket cannot be written.
    """
    if self._scratch:
      self._flush_events()
      self._copy_files()

  def _copy_files(self) -> None:
    """Copies what both have written to the disk; see `copy`."""
    if self._scratch:
      storage.copy_files(pathlib.Path(self._scratch.name), self._workdir)

  def close(self) -> None:
    """Closes both files, and copies them; see `copy`."""
    self._events.close()
    self._file.close()
    try:
      self._copy_files()
    finally:
      if self._scratch:
        self._scratch.cleanup()
