"""Tables of a study's report, in four formats."""

import dataclasses

from rich.console import Console
from tabulate import tabulate

from empdg_jax import config
from empdg_jax.analysis import tables
from empdg_jax.training import terminal
from empdg_jax.web import study
from empdg_jax.web.study_report import Report

_CAPTION = (
  "Brackets: 95% intervals, by bootstrap over dialogues for means and by "
  "Wilson's method for shares; parentheses: the paper's figure; p: exact sign "
  "test over dialogues, corrected by Holm's method."
)


def _number(value: float | None, decimals: int = 2) -> str:
  return "-" if value is None else f"{value:.{decimals}f}"


def _tables(report: Report) -> dict[str, list[list[str]]]:
  """Returns each table's cells, its header first."""
  made = {
    f"Ratings of {report.dialogues} dialogues": [
      ["", *map(str.title, study.METRICS)],
      *(
        [name, *(tables.cell(own.get(metric), 2) for metric in study.METRICS)]
        for name, own in report.means.items()
      ),
    ],
    "Agreement": [
      ["", "Krippendorff's alpha", "Fleiss' kappa", "items"],
      *(
        [question.title(), _number(a.alpha, 3), _number(a.kappa, 3)]
        + [str(a.items)]
        for question, a in report.agreement.items()
      ),
    ],
    "Comparisons, per cent": [
      ["", "Win", "Loss", "Tie", "p", "judgements", "identical"],
      *(
        [" vs ".join(pair.systems)]
        + [tables.cell(f, 1) for f in (pair.win, pair.loss, pair.tie)]
        + [_number(pair.p_corrected, 3), str(pair.judgements)]
        + [str(pair.identical)]
        for pair in report.pairs
      ),
    ],
    "Annotators": [
      ["", "answers", "failed controls", "seconds an item", "agrees"],
      *(
        [a.token, str(a.answers), f"{a.failed} of {a.controls}"]
        + [_number(a.seconds, 1), "with nobody" if a.dissents else "yes"]
        for a in report.annotators
      ),
    ],
  }
  return {title: cells for title, cells in made.items() if len(cells) > 1}


def _tabulated(cells: list[list[str]], form: str) -> str:
  return tabulate(cells[1:], cells[0], form, disable_numparse=True)


def _as_markdown(report: Report) -> str:
  parts = []
  for title, cells in _tables(report).items():
    # A bar in a name would end its cell.
    safe = [[cell.replace("|", r"\|") for cell in row] for row in cells]
    parts += [f"**{title}**", "", _tabulated(safe, "pipe"), ""]
  return "\n".join([*parts, _CAPTION]) + "\n"


def _as_latex(report: Report) -> str:
  parts = [r"% The tables need \usepackage{booktabs}.", ""]
  for title, cells in _tables(report).items():
    parts += [f"% {title}", _tabulated(cells, "latex_booktabs"), ""]
  return "\n".join([*parts, "% " + _CAPTION]) + "\n"


def print_report(report: Report, form: str, console: Console) -> None:
  """Prints a report.

  Args:
    report: The report.
    form: `terminal`, `markdown`, `latex` or `json`.
    console: The console to print on.
  """
  if form == "json":
    console.print_json(data=dataclasses.asdict(report), ensure_ascii=True)
  elif form == "terminal":
    for title, cells in _tables(report).items():
      header, *body = cells
      rows = [
        [cell.replace(" [", "\n[").replace(" (", "\n(") for cell in row]
        for row in body
      ]
      console.print(terminal.table(header, rows, title=title, left=[""]))
    console.print(_CAPTION, highlight=False)
  else:
    write = _as_markdown if form == "markdown" else _as_latex
    console.file.write(config.printable(write(report)))
