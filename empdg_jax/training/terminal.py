"""The terminal: signals, whole lines, tables and a progress bar."""

import contextlib
import signal
import types
from collections.abc import Generator, Iterable, Sequence

import rich.console
import rich.progress
import rich.table
import rich.text

from empdg_jax.config import printable


class Interrupt:
  """A signal handler that records the request to stop.

  Attributes:
    number: The signal received, 0 for none.
  """

  number = 0

  def __call__(self, number: int, frame: types.FrameType | None) -> None:
    """Handles a signal."""
    del frame
    self.number = number
    # A second Ctrl-C ends the process at once. A second SIGTERM does not:
    # schedulers may well send two.
    if number == signal.SIGINT:
      signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def catch_interrupts(*numbers: signal.Signals) -> Generator[Interrupt]:
  """Catches these signals; yields an `Interrupt` that records them."""
  interrupt = Interrupt()
  previous = {number: signal.signal(number, interrupt) for number in numbers}
  try:
    yield interrupt
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)


def text(said: str, style: str = "") -> rich.text.Text:
  """Returns a text of others, in which nothing is markup, emoji or control."""
  return rich.text.Text(printable(said), style)


def say(
  line: str, console: rich.console.Console | None = None, style: str = ""
) -> None:
  """Prints a line in one piece and as it is, whatever the terminal's width."""
  # Programs look for lines; paths may hold what looks like markup or an emoji.
  (console or rich.console.Console()).print(
    text(line.replace("\n", " "), style), soft_wrap=True, highlight=False
  )


def table(
  header: Sequence[str],
  rows: Iterable[Iterable[str]],
  *,
  title: str | None = None,
  caption: str | None = None,
  left: Sequence[str] = (),
) -> rich.table.Table:
  """Returns a table of figures, which are aligned on the right.

  Args:
    header: The names of the columns.
    rows: The cells, row by row.
    title: The text above the table.
    caption: The text below the table.
    left: The names of the columns of text, which are aligned on the left.
  """
  made = rich.table.Table(title=title, caption=caption)
  for name in header:
    made.add_column(text(name), justify="left" if name in left else "right")
  for row in rows:
    made.add_row(*map(text, row))
  return made


def progress_bar(
  console: rich.console.Console, *, transient: bool = False
) -> rich.progress.Progress:
  """Returns a bar with rate and remaining time, shown on terminals only."""
  return rich.progress.Progress(
    rich.progress.TextColumn("{task.description}"),
    rich.progress.BarColumn(),
    rich.progress.MofNCompleteColumn(),
    rich.progress.TextColumn("{task.fields[rate]}"),
    rich.progress.TimeElapsedColumn(),
    rich.progress.TextColumn("ETA"),
    rich.progress.TimeRemainingColumn(elapsed_when_finished=False),
    console=console,
    transient=transient,
    disable=not console.is_terminal,
  )
