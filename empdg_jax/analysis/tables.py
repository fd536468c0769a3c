"""How a comparison of systems is printed: tables in five formats."""

import csv
import dataclasses
import io
import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from empdg_jax.analysis.compare import COLUMNS, Comparison, Figure, Row, Test
from empdg_jax.models import registry

FORMATS = ("terminal", "markdown", "csv", "json", "latex")
_TERMINAL_COLUMNS = 4  # Of figures in a table.
_TESTS = "Paired tests: difference (p after Holm's correction)"


def _cell(figure: Figure | None, decimals: int) -> str:
  """Returns `value [low, high] (paper)` or `value +- deviation (paper)`."""
  if figure is None:
    return "-"

  def number(value: float) -> str:
    return f"{value:.{decimals}f}"

  cell = number(figure.value)
  if figure.deviation is not None:
    cell += f" ± {number(figure.deviation)}"
  elif figure.low is not None and figure.high is not None:
    cell += f" [{number(figure.low)}, {number(figure.high)}]"
  if figure.paper is not None:
    cell += f" ({number(figure.paper)})"
  return cell


def _members(rows: Sequence[Row]) -> dict[str, list[Row]]:
  """Returns each table's systems, without what another table shows as well."""
  present = {
    title: [row for row in rows if title in registry.SYSTEMS[row.name].tables]
    for title in dict.fromkeys(
      title for spec in registry.SYSTEMS.values() for title in spec.tables
    )
  }
  members: dict[str, list[Row]] = {}
  for title, own in present.items():
    in_another = any(
      all(row in other for row in own)
      for t, other in present.items()
      if t in members or (t != title and len(other) > len(own))
    )
    if not in_another:
      members[title] = own
  return members


def _tables(comparison: Comparison) -> dict[str, list[list[str]]]:
  """Returns each table's cells, its header first, systems in columns."""
  tables = {}
  for title, rows in _members(comparison.rows).items():
    cells = [["", *(row.title for row in rows)]]
    cells += [
      [name, *(_cell(row.figures[metric], decimals) for row in rows)]
      for metric, (name, decimals) in COLUMNS.items()
    ]
    cells.append(["parameters", *(f"{row.parameters:,}" for row in rows)])
    if any(len(row.runs) > 1 for row in rows):
      cells.append(["seeds", *(str(len(row.runs)) for row in rows)])
    tables[title] = cells
  if comparison.tests:
    tables[_TESTS] = _tests_table(comparison.tests)
  return tables


def _tests_table(tests: Sequence[Test]) -> list[list[str]]:
  """Returns a row for each pair of systems, metrics in columns."""
  pairs = list(dict.fromkeys(test.systems for test in tests))
  found = {(test.systems, test.metric): test for test in tests}
  cells = [["", *(name for name, _ in COLUMNS.values())]]
  for pair in pairs:
    row = [" - ".join(pair)]
    for metric, (_, decimals) in COLUMNS.items():
      test = found.get((pair, metric))
      row.append(
        f"{test.difference:+.{decimals}f} ({test.p_corrected:.3f})"
        if test
        else "-"
      )
    cells.append(row)
  return cells


def _caption(comparison: Comparison) -> str:
  return (
    f"{comparison.split}: {comparison.examples:,} examples in "
    f"{comparison.dialogues:,} dialogues. Brackets: 95% bootstrap intervals "
    "over dialogues; ±: the standard deviation over seeds; parentheses: the "
    "paper's figure."
  )


def _as_csv(comparison: Comparison) -> str:
  file = io.StringIO()
  writer = csv.writer(file, lineterminator="\n")
  writer.writerow(
    ("system", "runs", "parameters", "metric", *_field_names(Figure))
  )
  for row in comparison.rows:
    for metric, figure in row.figures.items():
      values = dataclasses.astuple(figure) if figure else ("",) * 5
      writer.writerow(
        (row.title, len(row.runs), row.parameters, metric, *values)
      )
  return file.getvalue()


def _field_names(kind: Any) -> list[str]:
  return [field.name for field in dataclasses.fields(kind)]


def _as_markdown(comparison: Comparison) -> str:
  parts = []
  for title, (header, *body) in _tables(comparison).items():
    rows = [header, ["---"] + ["---:"] * (len(header) - 1), *body]
    parts.append(f"**{title}**\n")
    parts += [f"| {' | '.join(row)} |" for row in rows]
    parts.append("")
  parts.append(_caption(comparison))
  for case in comparison.cases:
    parts += ["", *(f"- {name}: {said}" for name, said in _said(case))]
  return "\n".join(parts) + "\n"


def _as_latex(comparison: Comparison) -> str:
  """Returns tables for LaTeX with the package booktabs."""
  parts = []
  for title, (header, *body) in _tables(comparison).items():
    parts += [
      f"% {title}",
      rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
      r"\toprule",
      " & ".join(header) + r" \\",
      r"\midrule",
      *(" & ".join(row).replace("±", r"$\pm$") + r" \\" for row in body),
      r"\bottomrule",
      r"\end{tabular}",
      "",
    ]
  parts.append("% " + _caption(comparison))
  return "\n".join(parts) + "\n"


def _said(case: dict[str, Any]) -> list[tuple[str, str]]:
  """Returns who says what in a case: the dialogue, the gold, the systems."""
  said = [
    ("listener" if i % 2 else "speaker", turn)
    for i, turn in enumerate(case["context"])
  ]
  said.append((f"gold, {case['emotion']}", case["reference"]))
  for title, reply in case["responses"].items():
    emotion = f", {reply['emotion']}" if reply["emotion"] else ""
    said.append((title + emotion, reply["response"]))
  return said


def _print(comparison: Comparison, console: Console) -> None:
  for title, cells in _tables(comparison).items():
    if title == _TESTS:  # There are many pairs; metrics go down the page.
      cells = list(map(list, zip(*cells, strict=True)))
    for first in range(1, len(cells[0]), _TERMINAL_COLUMNS):
      header, *body = [
        [row[0], *row[first : first + _TERMINAL_COLUMNS]] for row in cells
      ]
      table = Table(title=title)
      for name in header:
        table.add_column(name, justify="right" if name else "left")
      for row in body:
        # Narrow: what belongs to a figure stands below it.
        table.add_row(
          *(c.replace(" [", "\n[").replace(" (", "\n(") for c in row)
        )
      console.print(table)
  console.print(_caption(comparison), highlight=False)
  for case in comparison.cases:
    console.print()
    for name, said in _said(case):
      console.print(f"{name}: {said}", markup=False, highlight=False)


def print_comparison(
  comparison: Comparison, form: str, console: Console
) -> None:
  """Prints a comparison.

  Args:
    comparison: What `compare` returned.
    form: One of `FORMATS`.
    console: Where to print.
  """
  if form == "terminal":
    _print(comparison, console)
    return
  written = {
    "markdown": _as_markdown,
    "csv": _as_csv,
    "latex": _as_latex,
    "json": lambda c: json.dumps(dataclasses.asdict(c), indent=2) + "\n",
  }[form](comparison)
  # As it is: neither wrapped nor coloured.
  console.file.write(written)
