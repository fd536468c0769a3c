"""What a run's time goes to: a trace of some steps, and waits for batches."""

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
    """Begins nothing yet.

    Args:
      steps: It begins with the first and ends before the second; None: never.
      logdir: TensorBoard's folder; the trace goes into its `plugins/profile`.

    Raises:
      InputError: JAX's profiler would crash: it asks `libtpu`, where that is
        installed, for a TPU that there is not.
    """
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
    """Returns, once, whether it has not begun and from a step on never will."""
    missed = not self._began and step >= self._end
    self._began |= missed
    return missed

  def before(
    self, step: int, ahead: int = 1
  ) -> jax.profiler.StepTraceAnnotation:
    """Begins the trace if it is time.

    Args:
      step: Counts what is done.
      ahead: How many steps are taken at once.

    Returns:
      The context in which to take them, by which their time is told.
    """
    due = step < self._end and step + ahead > self._begin
    if due and not self._began:
      self._began = True
      self._folder = tempfile.TemporaryDirectory()
      jax.profiler.start_trace(self._folder.name)
    return jax.profiler.StepTraceAnnotation("train", step_num=step)

  def after(self, step: int, result: Any) -> pathlib.Path | None:
    """Ends the trace if it is time.

    Args:
      step: Counts what is done.
      result: Of the latest step; the trace waits for it.

    Returns:
      The trace's folder, if it has ended now.
    """
    if self._folder is None or step < self._end:
      return None
    jax.block_until_ready(result)
    return self.close()

  def close(self) -> pathlib.Path | None:
    """Ends the trace if it still goes on; returns its folder."""
    if self._folder is None:
      return None
    folder, self._folder = self._folder, None
    with folder:
      jax.profiler.stop_trace()
      copies = storage.copy_files(pathlib.Path(folder.name), self._logdir)
      return copies[0].parent if copies else None


class InputWait:
  """Measures how long the devices wait for batches, without waiting itself."""

  def __init__(self) -> None:
    """Begins at 0 s."""
    self._seconds = 0.0

  def next(self, batches: Iterator[Any], running: Any) -> Any:
    """Returns the next batch.

    Args:
      batches: The input pipeline.
      running: An array that the latest step gives, None if there is none. If it
        has been computed when the batch is there, the devices have waited: at
        most since the batch was asked for.
    """
    start = time.perf_counter()
    batch = next(batches)
    if running is None or running.is_ready():
      self._seconds += time.perf_counter() - start
    return batch

  def take(self) -> float:
    """Returns the seconds since the last call."""
    seconds, self._seconds = self._seconds, 0.0
    return seconds
