"""The watchdog of training, which ends a process that no longer advances."""

import contextlib
import faulthandler
import os
import pathlib
import shutil
import sys
import tempfile
import threading
from collections.abc import Generator
from typing import NoReturn

import jax

from empdg_jax import config as config_lib

_PATIENCE = 6  # Times as long a wait while steps are compiled.
# The modules whose functions the main thread is in while a step is compiled.
_COMPILING = tuple(
  os.path.join(*names)
  for names in (
    ("jax", "_src", "compiler.py"),
    ("jax", "_src", "interpreters", "mlir.py"),
    ("jax", "_src", "interpreters", "partial_eval.py"),
    ("empdg_jax", "training", "compiling.py"),
  )
)
_WRITE_SECONDS = 10  # The longest wait for the file with the stacks.


class Watchdog:
  """A clock that ends this process with status 1 unless it is reset in time.

  The main thread may hang in native code, where no exception reaches it, in a
  wait for another host, a disk or a bucket that never answers.
  """

  def __init__(self, workdir: pathlib.Path, minutes: float) -> None:
    """Starts the clock's thread; the clock itself starts with `feed`.

    Args:
      workdir: The run folder.
      minutes: The longest time between two calls of `feed`, or in a block of
        `expecting`.
    """
    self._workdir, self._seconds = workdir, 60.0 * minutes
    self._what: str | None = None  # What is waited for; None for nothing.
    self._patient, self._waited, self._elapsed = False, 0.0, 0.0
    self._closing = threading.Event()
    self._thread = threading.Thread(target=self._watch, daemon=True)
    self._thread.start()

  def feed(self, what: str | None = "an update", patient: bool = False) -> None:
    """Sets the clock to zero.

    Args:
      what: What is waited for from now on; None stops the clock.
      patient: Whether other hosts may compile, so that it takes longer.
    """
    self._what, self._patient = what, patient
    self._waited = self._elapsed = 0.0

  @contextlib.contextmanager
  def expecting(self, what: str) -> Generator[None]:
    """Gives a block the time of an update; what it waits for, in words."""
    outer = self._what, self._patient
    self.feed(what)
    try:
      yield
    finally:
      self.feed(*outer)

  def close(self) -> None:
    """Ends the clock."""
    self._closing.set()

  def _watch(self) -> None:
    tick = min(1.0, self._seconds / 10)
    # Ticks are counted, since a suspended machine's clock goes on.
    while not self._closing.wait(tick):
      what = self._what
      # The clock goes slower rather than further: what comes after a long
      # compilation still has its time.
      patient = self._patient or _compiling()
      self._waited += tick / (_PATIENCE if patient else 1)
      self._elapsed += tick
      if what is not None and self._waited > self._seconds:
        self._end(what, self._elapsed)

  def _end(self, what: str, seconds: float) -> NoReturn:
    """Writes the stacks, says one line and ends this process."""
    stacks = _write_stacks(self._workdir)
    line = (
      f"gave up after {seconds / 60:.3g} minutes without {what}: another host, "
      f"the disk or the bucket of {self._workdir} does not answer or is full; "
      f"the stacks of all threads are in {stacks}; the same command (on all "
      "hosts) resumes from the latest checkpoint"
    )
    print(f"\nempdg: {config_lib.printable(line)}", file=sys.stderr, flush=True)
    os._exit(config_lib.FAILED)


def _compiling() -> bool:
  """Returns whether the main thread traces or compiles a step."""
  frame = sys._current_frames().get(threading.main_thread().ident or 0)
  while frame is not None:
    if frame.f_code.co_filename.endswith(_COMPILING):
      return True
    frame = frame.f_back
  return False


def _write_stacks(workdir: pathlib.Path) -> pathlib.Path:
  """Writes all threads' stacks into the run folder.

  Returns:
    The file; one in a temporary folder if the run folder does not take it.
  """
  name = f"stacks-{jax.process_index()}.txt"
  local = pathlib.Path(tempfile.mkdtemp(prefix="empdg-")) / name
  with local.open("w", encoding="utf-8") as file:
    faulthandler.dump_traceback(file, all_threads=True)
  written = threading.Event()

  def copy() -> None:
    with contextlib.suppress(Exception):
      (workdir / name).write_text(local.read_text(encoding="utf-8"))
      written.set()

  # What made training hang may hang here as well.
  writer = threading.Thread(target=copy, daemon=True)
  writer.start()
  writer.join(_WRITE_SECONDS)
  if not written.is_set():
    return local
  shutil.rmtree(local.parent, ignore_errors=True)
  return workdir / name
