"""Tables of a comparison of systems, in five formats."""

import csv
import dataclasses
import io
import pathlib
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from tabulate import tabulate

from empdg_jax import config
from empdg_jax.analysis import results
from empdg_jax.analysis.compare import (
  CONTROL_TITLE,
  Comparison,
  Figure,
  Row,
  Test,
)
from empdg_jax.metrics import METRICS
from empdg_jax.models import registry
from empdg_jax.training import terminal

_TERMINAL_COLUMNS = 4  # Columns of figures in a table.
# What a reader looks for first.
_SUMMARY = (
  "emotion_accuracy",
  "perplexity_per_example",
  "distinct_1",
  "distinct_2",
  "bleu",
  "repetition",
)
_SUMMARY_CAPTION = (
  "Means over seeds, ± their standard deviation; parentheses, if any: the "
  "paper's figure. Hours are those of a run's own training; EmpDG, its control "
  "and EmpDG w/o G begin with the trained generators of EmpDG w/o D and "
  "EmoPrepend-1."
)
_TESTS = "Permutation tests: difference (p after Holm's correction)"


def cell(figure: Figure | None, decimals: int) -> str:
  """Returns `value ± deviation [low, high] (paper)`, of these what there is."""
  if figure is None:
    return "-"
  number = f"{{:.{decimals}f}}".format
  cell = number(figure.value)
  if figure.deviation is not None:
    cell += f" ± {number(figure.deviation)}"
  if figure.low is not None and figure.high is not None:
    cell += f" [{number(figure.low)}, {number(figure.high)}]"
  if figure.paper is not None:
    cell += f" ({number(figure.paper)})"
  return cell


def _members(rows: Sequence[Row]) -> dict[str, list[Row]]:
  """Returns each table's systems, without tables that another one covers."""
  present = {
    title: [row for row in rows if title in registry.SYSTEMS[row.name].tables]
    for title in dict.fromkeys(
      title for spec in registry.SYSTEMS.values() for title in spec.tables
    )
  }
  members: dict[str, list[Row]] = {}
  # Larger tables first, since only they can cover others; of two tables with
  # the same systems the first is kept, as the sort is stable.
  for title in sorted(present, key=lambda t: -len(present[t])):
    own = present[title]
    if not any(all(row in other for row in own) for other in members.values()):
      members[title] = own
  return {title: members[title] for title in present if title in members}


def _tables(comparison: Comparison) -> dict[str, list[list[str]]]:
  """Returns each table's cells, its header first, systems in columns."""
  tables = {}
  for title, rows in _members(comparison.rows).items():
    cells = [["", *(row.title for row in rows)]]
    for name, metric in METRICS.items():
      figures = (cell(row.figures[name], metric.decimals) for row in rows)
      cells.append([metric.title, *figures])
    for name in dict.fromkeys(n for row in rows for n in row.human):
      figures = (cell(row.human.get(name), 2) for row in rows)
      cells.append([name.title(), *figures])
    cells.append(["parameters", *(f"{row.parameters:,}" for row in rows)])
    if any(len(row.runs) > 1 for row in rows):
      cells.append(["seeds", *(str(len(row.runs)) for row in rows)])
    tables[title] = cells
  if comparison.tests:
    tables[_TESTS] = _tests_table(comparison.tests)
  return tables


def _tests_table(tests: Sequence[Test]) -> list[list[str]]:
  """Returns a row for each pair of systems, metrics in columns."""
  rows = {test.systems: dict.fromkeys(METRICS, "-") for test in tests}
  for test in tests:
    difference = f"{test.difference:+.{METRICS[test.metric].decimals}f}"
    rows[test.systems][test.metric] = f"{difference} ({test.p_corrected:.3f})"
  return [
    ["", *(metric.title for metric in METRICS.values())],
    *([" - ".join(pair), *row.values()] for pair, row in rows.items()),
  ]


def _caption(comparison: Comparison) -> str:
  return (
    f"{comparison.split}: {comparison.examples:,} examples in "
    f"{comparison.dialogues:,} dialogues. Brackets: 95% intervals over "
    "dialogues, by the jackknife where types are counted and else by the "
    "bootstrap; ±: the standard deviation over seeds; parentheses, if any: the "
    "paper's figure."
  )


def summary(values: dict[str, Any]) -> str:
  """Returns the main figures of results in Markdown, a row for each system.

  If EmpDG and its control are among them, a second table shows what the
  discriminators add.

  Args:
    values: The result of `results.describe`, or what a results file holds.
  """
  titles = [METRICS[name].title for name in _SUMMARY]
  rows = [["", *titles, "seeds", "hours"]]
  for title, system in values["systems"].items():
    row = [title]
    for name in _SUMMARY:
      figure = None
      if name in system["mean"]:
        figure = Figure(
          system["mean"][name],
          deviation=system["std"][name],
          paper=system["paper"].get(name),
        )
      row.append(cell(figure, METRICS[name].decimals))
    row.append(str(len(system["seeds"])))
    hours = [seed["hours"] for seed in system["seeds"]]
    known = [each for each in hours if each is not None]
    row.append(f"{sum(known) / len(known):.2f}" if known else "-")
    rows.append(row)
  parts = [_tabulated(rows, "pipe")]
  proposed = registry.SYSTEMS[registry.PROPOSED].title
  pair = [proposed, proposed + CONTROL_TITLE]
  tests = [t for t in values["tests"] if list(t["systems"]) == pair]
  if tests:
    by_metric = {test["metric"]: test for test in tests}
    effect = [["", *titles], [f"{pair[0]} - {pair[1]}"], ["corrected p"]]
    for name in _SUMMARY:
      test = by_metric[name]
      decimals = METRICS[name].decimals
      effect[1].append(f"{test['difference']:+.{decimals}f}")
      effect[2].append(f"{test['p_corrected']:.4f}")
    parts.append(_tabulated(effect, "pipe"))
  return "\n\n".join(parts) + "\n"


def _as_csv(comparison: Comparison) -> str:
  file = io.StringIO()
  fields = [field.name for field in dataclasses.fields(Figure)]
  writer = csv.writer(file, lineterminator="\n")
  writer.writerow(("system", "runs", "parameters", "metric", *fields))
  for row in comparison.rows:
    for metric, figure in (row.figures | row.human).items():
      values = dataclasses.astuple(figure) if figure else ("",) * len(fields)
      writer.writerow(
        (row.title, len(row.runs), row.parameters, metric, *values)
      )
  return file.getvalue()


def _tabulated(cells: list[list[str]], form: str) -> str:
  """Returns a table in one of tabulate's formats, figures to the right."""
  align = ("left", *["right"] * (len(cells[0]) - 1))
  # Parsed as numbers, cells would lose their last zeros and their sign.
  return tabulate(
    cells[1:], cells[0], form, colalign=align, disable_numparse=True
  )


def _as_markdown(comparison: Comparison) -> str:
  parts = []
  for title, cells in _tables(comparison).items():
    parts += [f"**{title}**", "", _tabulated(cells, "pipe"), ""]
  parts.append(_caption(comparison))
  for case in comparison.cases:
    parts += ["", *(f"- {name}: {said}" for name, said in _said(case))]
  return "\n".join(parts) + "\n"


def _as_latex(comparison: Comparison) -> str:
  parts = [r"% The tables need \usepackage{booktabs}.", ""]
  for title, cells in _tables(comparison).items():
    table = _tabulated(cells, "latex_booktabs")
    # After tabulate, which would escape the dollars. The character by itself
    # needs an encoding that older LaTeX does not load.
    parts += [f"% {title}", table.replace("±", r"$\pm$"), ""]
  parts.append("% " + _caption(comparison))
  return "\n".join(parts) + "\n"


def _said(case: dict[str, Any]) -> list[tuple[str, str]]:
  """Returns a case's speakers and texts: dialogue, reference, responses."""
  said = [
    ("listener" if i % 2 else "speaker", turn)
    for i, turn in enumerate(case["context"])
  ]
  said.append((f"gold, {case['emotion']}", case["reference"]))
  for title, own in case["responses"].items():
    emotion = f", {own['emotion']}" if own["emotion"] else ""
    said.append((title + emotion, own["response"]))
  return said


def _print(comparison: Comparison, console: Console) -> None:
  for title, cells in _tables(comparison).items():
    # Pairs of systems may be many, so the tests' columns become rows here.
    if title == _TESTS:
      cells = list(map(list, zip(*cells, strict=True)))
    for first in range(1, len(cells[0]), _TERMINAL_COLUMNS):
      header, *body = [
        [row[0], *row[first : first + _TERMINAL_COLUMNS]] for row in cells
      ]
      # The interval and the paper's figure go below, to keep columns narrow.
      rows = [
        [cell.replace(" [", "\n[").replace(" (", "\n(") for cell in row]
        for row in body
      ]
      console.print(terminal.table(header, rows, title=title, left=[""]))
  console.print(_caption(comparison), highlight=False)
  for case in comparison.cases:
    console.print()
    for name, said in _said(case):
      terminal.say(f"{name}: {said}", console)


_WRITERS = {"markdown": _as_markdown, "csv": _as_csv, "latex": _as_latex}
FORMATS = ("terminal", "json", *_WRITERS)


def write_results(comparison: Comparison, stem: pathlib.Path) -> None:
  """Writes a comparison as `STEM.json` and `STEM.md`, without its cases.

  Raises:
    InputError: A file cannot be written.
  """
  values = results.describe(comparison)
  table = _as_markdown(dataclasses.replace(comparison, cases=[]))
  text = "\n".join((summary(values), _SUMMARY_CAPTION, "", table))
  results.write(stem, values, config.printable(text))


def print_comparison(
  comparison: Comparison, form: str, console: Console
) -> None:
  """Prints a comparison.

  Args:
    comparison: The result of `compare`.
    form: One of `FORMATS`.
    console: The console to print on.
  """
  if form == "terminal":
    _print(comparison, console)
  elif form == "json":
    console.print_json(data=dataclasses.asdict(comparison), ensure_ascii=True)
  else:
    # The console itself would wrap and colour it.
    console.file.write(config.printable(_WRITERS[form](comparison)))
