"""Profiling of a run: a trace of some steps, and the wait for batches."""

import importlib.util
import pathlib
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax

from empdg_jax import storage
from empdg_jax.config import InputError


class Trace:
  """A trace of a range of steps, for TensorBoard's profiler and XProf."""

  def __init__(
    self, steps: tuple[int, int] | None, logdir: pathlib.Path
  ) -> None:
    """Checks that this machine can trace; begins nothing yet.

    Args:
      steps: The first step of the trace and the first one after it; None for
        no trace.
      logdir: TensorBoard's folder; the trace goes into its `plugins/profile`.

    Raises:
      InputError: JAX's profiler would crash on this machine.
    """
    # The profiler asks an installed `libtpu` for a TPU, and ends the process if
    # there is none.
    if (
      steps
      and importlib.util.find_spec("libtpu")
      and jax.default_backend() != "tpu"
      and not jax.config.values["jax_platforms"]
    ):
      raise InputError(
        "config.train.profile_steps: libtpu is installed, but there is no TPU; "
        f"set JAX_PLATFORMS={jax.default_backend()}"
      )
    self._begin, self._end = steps or (0, 0)
    self._began = steps is None
    self._logdir = logdir
    self._folder: tempfile.TemporaryDirectory[str] | None = None

  def missed(self, step: float) -> bool:
    """Returns, once, whether a trace not begun by `step` never will be."""
    missed = not self._began and step >= self._end
    self._began |= missed
    return missed

  def before(
    self, step: int, ahead: int = 1
  ) -> jax.profiler.StepTraceAnnotation:
    """Begins the trace if it is due.

    Args:
      step: The number of steps done.
      ahead: The number of steps about to be taken together.

    Returns:
      A context for taking them, which marks their time in the trace.
    """
    # A round may begin before the range and still overlap it.
    due = step < self._end and step + ahead > self._begin
    if due and not self._began:
      self._began = True
      # The profiler writes to disks only; a run folder may be in a bucket.
      self._folder = tempfile.TemporaryDirectory()
      jax.profiler.start_trace(self._folder.name)
    return jax.profiler.StepTraceAnnotation("train", step_num=step)

  def after(self, step: int, result: Any) -> pathlib.Path | None:
    """Ends the trace if it is due.

    Args:
      step: The number of steps done.
      result: An array of the latest step.

    Returns:
      The trace's folder if this call ended it, else None.
    """
    if self._folder is None or step < self._end:
      return None
    # Steps return before the devices have computed them.
    jax.block_until_ready(result)
    return self.close()

  def close(self) -> pathlib.Path | None:
    """Ends a trace in progress; returns its folder, None if there is none."""
    if self._folder is None:
      return None
    folder, self._folder = self._folder, None
    with folder:
      jax.profiler.stop_trace()
      copies = storage.copy_files(pathlib.Path(folder.name), self._logdir)
      return copies[0].parent if copies else None


class InputWait:
  """A clock of the devices' wait for batches that does not itself wait."""

  def __init__(self) -> None:
    """Starts at 0 s."""
    self._seconds = 0.0

  def next(self, batches: Iterator[Any], running: Any) -> Any:
    """Returns the next batch.

    Args:
      batches: The input pipeline.
      running: An array of the latest step, None before the first.
    """
    start = time.perf_counter()
    batch = next(batches)
    # If the latest step is done by now, the devices are idle, for at most the
    # time that this batch took. An upper bound, but blocking for an exact one
    # would make them idle.
    if running is None or running.is_ready():
      self._seconds += time.perf_counter() - start
    return batch

  def take(self) -> float:
    """Returns the seconds waited since the last call."""
    seconds, self._seconds = self._seconds, 0.0
    return seconds
