"""The TPU compiler's reports on compiled steps."""

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.table import Column, Table

from empdg_jax.hardware.chips import Chip

FORMATS = ("terminal", "json")


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


@dataclasses.dataclass(frozen=True)
class Report:
  """The compiler's report on one step; all figures are for one chip.

  Attributes:
    step: The step's name.
    arguments: Memory for parameters, state and batch, bytes.
    outputs: Memory for results that are not updated in place, bytes.
    temporaries: Memory for intermediate values, bytes.
    code: Memory for the program, bytes.
    memory: The sum of these.
    memory_share: The sum's share of the chip's memory.
    flops: Floating-point operations; a loop's body counts once.
    bytes_accessed: Memory traffic, bytes.
    all_reduces: The number of all-reduce operations.
    bytes_reduced: The bytes that they sum over the chips.
    all_gathers: The number of all-gather operations.
    compute_seconds: Time for the operations at the published peak rate.
    memory_seconds: Time for the traffic at the published bandwidth.
    all_reduce_seconds: Time for the sums; see `all_reduce_seconds`.
    compile_seconds: Time to compile, on this machine.
  """

  step: str
  arguments: int
  outputs: int
  temporaries: int
  code: int
  memory: int
  memory_share: float
  flops: float
  bytes_accessed: float
  all_reduces: int
  bytes_reduced: int
  all_gathers: int
  compute_seconds: float
  memory_seconds: float
  all_reduce_seconds: float
  compile_seconds: float


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
  step: str, compiled: Any, slice_: Slice, seconds: float
) -> Report:
  """Reads the compiler's analyses of a step.

  Args:
    step: The step's name.
    compiled: The compiled step.
    slice_: The slice that it is compiled for.
    seconds: The time that compiling took.
  """
  chip = slice_.chip
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
  text = compiled.as_text()
  # Donated arguments hold the results that replace them.
  outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
  total = (
    memory.argument_size_in_bytes
    + outputs
    + memory.temp_size_in_bytes
    + memory.generated_code_size_in_bytes
  )
  reduced = collective_bytes(text, "all-reduce")
  return Report(
    step=step,
    arguments=memory.argument_size_in_bytes,
    outputs=outputs,
    temporaries=memory.temp_size_in_bytes,
    code=memory.generated_code_size_in_bytes,
    memory=total,
    memory_share=total / chip.memory,
    flops=float(cost["flops"]),
    bytes_accessed=float(cost["bytes accessed"]),
    all_reduces=len(reduced),
    bytes_reduced=sum(reduced),
    all_gathers=len(collective_bytes(text, "all-gather")),
    compute_seconds=float(cost["flops"]) / chip.flops,
    memory_seconds=float(cost["bytes accessed"]) / chip.bandwidth,
    all_reduce_seconds=all_reduce_seconds(
      sum(reduced), len(slice_.devices), chip.interconnect
    ),
    compile_seconds=seconds,
  )


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
    _print_json({"topology": slice_.name, **values}, console)
    return
  console.print(
    f"The largest batch that fits: {fit.rows:,} examples a device "
    f"({fit.too_many:,} do not), --config.train.batch_size={batch_size}",
    soft_wrap=True, highlight=False,
  )  # fmt: skip


def print_reports(
  reports: Sequence[Report],
  too_large: Sequence[str],
  topology: str,
  form: str,
  console: Console,
) -> None:
  """Prints the compiler's reports.

  Args:
    reports: A report for each step that compiled.
    too_large: Names of the steps that do not fit.
    topology: The slice's name.
    form: The format, one of `FORMATS`.
    console: The terminal.
  """
  if form == "json":
    values = {
      "topology": topology,
      "steps": [dataclasses.asdict(report) for report in reports],
      "too_large": list(too_large),
    }
    _print_json(values, console)
    return
  names = "arguments", "outputs", "temporary", "code", "share", "compiled s"
  memory = Table(
    "step",
    *(Column(name, justify="right") for name in names),
    title=f"{topology}: memory of a chip, MiB",
  )
  names = "GFLOP", "ms", "memory GB", "ms", "all-reduced MB", "ms"
  work = Table(
    "step",
    *(Column(name, justify="right") for name in names),
    title=f"{topology}: work of a chip, and its least time at published rates",
    caption="The body of a loop, as in sampling and decoding, is counted once.",
  )
  for r in reports:
    memory.add_row(
      r.step,
      f"{r.arguments / 2**20:,.0f}",
      f"{r.outputs / 2**20:,.1f}",
      f"{r.temporaries / 2**20:,.0f}",
      f"{r.code / 2**20:,.0f}",
      f"{r.memory_share:.1%}",
      f"{r.compile_seconds:.0f}",
    )
    work.add_row(
      r.step,
      f"{r.flops / 1e9:,.1f}",
      f"{1e3 * r.compute_seconds:,.2f}",
      f"{r.bytes_accessed / 1e9:,.2f}",
      f"{1e3 * r.memory_seconds:,.1f}",
      f"{r.bytes_reduced / 1e6:,.1f} in {r.all_reduces}",
      f"{1e3 * r.all_reduce_seconds:,.2f}",
    )
  if reports:
    console.print(memory, work)


def _print_json(values: dict[str, Any], console: Console) -> None:
  # Past the console, which would wrap lines at the terminal's width.
  console.file.write(json.dumps(values, indent=2) + "\n")
