"""What a long run shares with the terminal: signals and a progress bar."""

import contextlib
import signal
import types
from collections.abc import Generator

import rich.console
import rich.progress


class Interrupt:
  """Whether the user or the system has asked to stop.

  Attributes:
    number: The signal that asked, 0 for none.
  """

  number = 0

  def __call__(self, number: int, frame: types.FrameType | None) -> None:
    """Is the signal's handler."""
    del frame
    self.number = number
    if number == signal.SIGINT:  # The second Ctrl-C ends at once. Schedulers
      signal.signal(number, signal.SIG_DFL)  # may well send SIGTERM twice.


@contextlib.contextmanager
def catch_interrupts(*numbers: signal.Signals) -> Generator[Interrupt]:
  """Yields what tells of signals, the first of which is caught."""
  interrupt = Interrupt()
  previous = {number: signal.signal(number, interrupt) for number in numbers}
  try:
    yield interrupt
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)


def progress_bar(console: rich.console.Console) -> rich.progress.Progress:
  """Returns a bar with a rate and a time to go, for terminals alone."""
  return rich.progress.Progress(
    rich.progress.TextColumn("{task.description}"),
    rich.progress.BarColumn(),
    rich.progress.MofNCompleteColumn(),
    rich.progress.TextColumn("{task.fields[rate]}"),
    rich.progress.TimeElapsedColumn(),
    rich.progress.TextColumn("ETA"),
    rich.progress.TimeRemainingColumn(elapsed_when_finished=False),
    console=console,
    disable=not console.is_terminal,
  )
