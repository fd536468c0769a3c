"""The TPU compiler's reports on compiled steps."""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.table import Table

from empdg_jax.hardware import traffic
from empdg_jax.hardware.chips import Chip
from empdg_jax.training import terminal

WITHOUT_UPDATE = ("eval", "predict")  # The steps that do not train.


class Slice(NamedTuple):
  """A part of a TPU pod.

  Attributes:
    name: Its name, such as `v5e:4x4`.
    chip: The kind of its chips.
    devices: Its chips, none of which need exist.
  """

  name: str
  chip: Chip
  devices: tuple[jax.Device, ...]


# An array's type in a program: `f32[2,3]`, or `pred[8]`, a byte an element.
_ARRAY = re.compile(r"\b(?:pred|[a-z]+(\d+))\[([\d,]*)\]")


def collective_bytes(text: str, operation: str) -> list[int]:
  """Returns the size of each collective operation's result, in bytes.

  Args:
    text: A compiled program, from `compiled.as_text()`.
    operation: `"all-reduce"` or `"all-gather"`.

  >>> program = "%a = (f32[2,3]{1,0}, f32[]) all-reduce(%b, %c), channel_id=1"
  >>> collective_bytes(program, "all-reduce")
  [28]
  """
  # XLA may split an operation into a start and a done; only the start counts.
  # One operation may reduce a tuple of arrays.
  return [
    sum(
      (int(bits or 8) // 8) * math.prod(int(n) for n in lengths.split(",") if n)
      for bits, lengths in _ARRAY.findall(results)
    )
    for results in re.findall(rf"= (.*?) {operation}(?:-start)?\(", text)
  ]


def all_reduce_seconds(size: float, chips: int, interconnect: float) -> float:
  """Returns the least time to sum arrays over chips, without latency.

  A chip must send and receive `2 (n - 1) / n` times their bytes (Patarasuk and
  Yuan, 2009), here over all of its links at once.

  Args:
    size: The arrays' size, bytes.
    chips: The number of chips n.
    interconnect: A chip's links in both directions, bytes/s.

  >>> all_reduce_seconds(1e9, chips=4, interconnect=6e9)
  0.5
  """
  return 2.0 * (chips - 1) / chips * size / (interconnect / 2.0)


def read_report(
  step: str, compiled: Any, slice_: Slice, seconds: float, examples: int
) -> dict[str, Any]:
  """Reads the compiler's analyses of a step.

  Args:
    step: The step's name.
    compiled: The compiled step.
    slice_: The slice that it is compiled for.
    seconds: The time that compiling took.
    examples: The examples that a chip has in the step.

  Returns:
    A JSON value, whose figures are for one chip, except for rates:

    - step: The step's name.
    - arguments: Memory for parameters, state and batch, bytes.
    - outputs: Memory for results that are not updated in place, bytes.
    - temporaries: Memory for intermediate values, bytes.
    - code: Memory for the program, bytes.
    - memory: The sum of these.
    - memory_share: The sum's share of the chip's memory.
    - flops: Floating-point operations; a loop's body counts as often as it runs
      at most, here and below.
    - traffic: Memory traffic, bytes; a look-up counts its rows.
    - bytes_accessed: XLA's own count of it, where a look-up may count the whole
      table, and what all but the first run of each loop add to `traffic`.
    - all_reduces: The number of all-reduce operations.
    - bytes_reduced: The bytes that they sum over the chips.
    - all_gathers: The number of all-gather operations.
    - compute_seconds: Time for the operations at the published peak rate.
    - memory_seconds: Time for the traffic at the published bandwidth.
    - all_reduce_seconds: Time for the sums; see `all_reduce_seconds`.
    - least_seconds: The longest of these three, which may overlap.
    - utilisation: The share of the peak rate that the operations then take.
    - examples: Examples of a chip.
    - steps_per_second: Steps a second at the least time.
    - examples_per_second: Examples a second of the whole slice at that rate.
    - compile_seconds: Time to compile, on this machine.
  """
  chip, text = slice_.chip, compiled.as_text()
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
  parts = {
    "arguments": memory.argument_size_in_bytes,
    # Donated arguments hold the results that replace them.
    "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
    "temporaries": memory.temp_size_in_bytes,
    "code": memory.generated_code_size_in_bytes,
  }
  total = sum(parts.values())
  work, once = (traffic.count_work(text, loops) for loops in (True, False))
  # XLA counts a loop's body once. A TPU adds rows to a table in a loop over
  # them: to count the table in each of its runs would be far from the truth.
  flops = float(cost["flops"]) + work.products - once.products
  accessed = float(cost["bytes accessed"]) + work.traffic - once.traffic
  reduced = collective_bytes(text, "all-reduce")
  chips = len(slice_.devices)
  times = {
    "compute_seconds": flops / chip.flops,
    "memory_seconds": work.traffic / chip.bandwidth,
    "all_reduce_seconds": all_reduce_seconds(
      sum(reduced), chips, chip.interconnect
    ),
  }
  least = max(times.values())
  return {
    "step": step,
    **parts,
    "memory": total,
    "memory_share": total / chip.memory,
    "flops": flops,
    "traffic": work.traffic,
    "bytes_accessed": accessed,
    "all_reduces": len(reduced),
    "bytes_reduced": sum(reduced),
    "all_gathers": len(collective_bytes(text, "all-gather")),
    **times,
    "least_seconds": least,
    "utilisation": flops / chip.flops / least,
    "examples": examples,
    "steps_per_second": 1.0 / least,
    "examples_per_second": examples * chips / least,
    "compile_seconds": seconds,
  }


class Fit(NamedTuple):
  """The largest batch that fits a device, found to a 16th.

  Attributes:
    rows: A number of examples that fit.
    too_many: A larger number that do not.
  """

  rows: int
  too_many: int


def print_fit(fit: Fit, slice_: Slice, form: str, console: Console) -> None:
  """Prints the largest batch that fits; see `print_reports`."""
  batch_size = fit.rows * len(slice_.devices)
  if form == "json":
    values = {**fit._asdict(), "batch_size": batch_size}
    console.print_json(data={"topology": slice_.name, **values})
    return
  terminal.say(
    f"The largest batch that fits: {fit.rows:,} examples a device "
    f"({fit.too_many:,} do not), --config.train.batch_size={batch_size}",
    console,
  )


# Columns: the title, the report's key, its unit and the format. All tables fit
# into 80 columns.
_MEMORY = (
  ("arguments MiB", "arguments", 2**20, ",.0f"),
  ("outputs MiB", "outputs", 2**20, ",.1f"),
  ("temporary MiB", "temporaries", 2**20, ",.0f"),
  ("code MiB", "code", 2**20, ",.0f"),
  ("share", "memory_share", 1, ".1%"),
  ("compiled s", "compile_seconds", 1, ".0f"),
)
_WORK = (
  ("GFLOP", "flops", 1e9, ",.1f"),
  ("ms", "compute_seconds", 1e-3, ",.2f"),
  ("memory GB", "traffic", 1e9, ",.2f"),
  ("by XLA", "bytes_accessed", 1e9, ",.2f"),
  ("ms", "memory_seconds", 1e-3, ",.1f"),
)
_SUMS = (
  ("all-reduces", "all_reduces", 1, ".0f"),
  ("MB", "bytes_reduced", 1e6, ",.1f"),
  ("ms", "all_reduce_seconds", 1e-3, ",.2f"),
  ("steps/s", "steps_per_second", 1, ",.1f"),
)


def print_reports(
  reports: Sequence[dict[str, Any]],
  too_large: Sequence[str],
  slice_: Slice,
  epoch: int | None,
  form: str,
  console: Console,
) -> None:
  """Prints the compiler's reports.

  Args:
    reports: The result of `read_report` for each step that compiled.
    too_large: Names of the steps that do not fit.
    slice_: The slice.
    epoch: The number of training examples; None if it is not known.
    form: The format, `"terminal"` or `"json"`.
    console: The terminal.
  """
  name = slice_.name
  if form == "json":
    console.print_json(
      data={"topology": name, "steps": reports, "too_large": too_large}
    )
  elif reports:
    for report in reports:
      for line in in_words(report, len(slice_.devices), epoch):
        terminal.say(line, console)
    console.print(
      _report_table(reports, _MEMORY, title=f"{name}: memory of a chip")
    )
    console.print(
      _report_table(
        reports,
        _WORK,
        title=f"{name}: work of a chip, and its least time at published rates",
        caption="A loop counts as often as it runs at most, a look-up its "
        "rows; XLA counts the whole table.",
      )
    )
    console.print(
      _report_table(
        reports, _SUMS, title=f"{name}: sums over chips, and rate at most"
      )
    )


def in_words(
  report: dict[str, Any], chips: int, epoch: int | None
) -> list[str]:
  r"""Returns what a step needs of a slice, in lines of at most 80 columns.

  Args:
    report: The result of `read_report`.
    chips: The number of the slice's chips.
    epoch: The number of training examples; None if it is not known.

  >>> report = {
  ...   "step": "mle", "memory": 3.1 * 2**30, "memory_share": 3.1 / 16,
  ...   "least_seconds": 4e-3, "utilisation": 0.25, "examples": 32,
  ...   "examples_per_second": 8 * 32 / 4e-3,
  ... }
  >>> print(*in_words(report, 8, 20_724), sep="\n")
  mle: 256 examples, 32 a chip: 3.1 of 16 GiB a chip: fits
    at least 4.00 ms a step; model FLOPs utilisation 25%; 64,000 examples/s
    at least 0.32 s an epoch of 20,724 examples
  """
  memory, share = report["memory"] / 2**30, report["memory_share"]
  rows, rate = report["examples"], report["examples_per_second"]
  lines = [
    f"{report['step']}: {rows * chips:,} examples, {rows:,} a chip: "
    f"{memory:.1f} of {memory / share:.0f} GiB a chip: "
    f"{'fits' if share <= 1 else 'does not fit'}",
    f"  at least {1e3 * report['least_seconds']:.2f} ms a step; model FLOPs "
    f"utilisation {report['utilisation']:.0%}; {rate:,.0f} examples/s",
  ]
  if epoch and report["step"] not in WITHOUT_UPDATE:
    lines.append(
      f"  at least {epoch / rate:.2f} s an epoch of {epoch:,} examples"
    )
  return lines


def _report_table(
  reports: Sequence[dict[str, Any]],
  columns: Sequence[tuple[str, str, float, str]],
  **texts: str,
) -> Table:
  """Returns a row for each step, with `columns` as of `_MEMORY`."""
  rows = [
    (
      report["step"],
      *(f"{report[key] / unit:{form}}" for _, key, unit, form in columns),
    )
    for report in reports
  ]
  header = ("step", *(title for title, *_ in columns))
  return terminal.table(header, rows, left=["step"], **texts)
