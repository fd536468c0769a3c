"""What the TPU compiler says of the steps that it compiles."""

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from empdg_jax.hardware.chips import Chip

FORMATS = ("terminal", "json")


class Slice(NamedTuple):
  """A part of a TPU pod.

  Attributes:
    name: As in `v5e:4x4`.
    chip: What it is made of.
    devices: Its chips, none of which need exist.
  """

  name: str
  chip: Chip
  devices: tuple[jax.Device, ...]


@dataclasses.dataclass(frozen=True)
class Report:
  """What the compiler says of one step, a chip.

  Attributes:
    step: Its name.
    arguments: Memory of parameters, state and batch, bytes.
    outputs: Memory of what it returns beside what it updates in place, bytes.
    temporaries: Memory of intermediate values, bytes.
    code: Memory of the program, bytes.
    memory: All of these.
    memory_share: Of the chip's.
    flops: Floating-point operations; a loop's body counts once.
    bytes_accessed: Traffic to memory.
    all_reduces: How many all-reduce operations.
    bytes_reduced: All that they sum over the chips.
    all_gathers: How many all-gather operations.
    compute_seconds: The operations at the chip's published peak.
    memory_seconds: The traffic at the published bandwidth of its memory.
    all_reduce_seconds: See `all_reduce_seconds`.
    compile_seconds: On this machine.
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


_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+))\[([\d,]*)\]")


def collective_bytes(text: str, operation: str) -> list[int]:
  """Returns the bytes that each collective operation of a program gives.

  Args:
    text: A compiled program, as `compiled.as_text()`.
    operation: `"all-reduce"` or `"all-gather"`.

  Returns:
    An item for each operation.

  >>> program = "%a = (f32[2,3]{1,0}, f32[]) all-reduce(%b, %c), channel_id=1"
  >>> collective_bytes(program, "all-reduce")
  [28]
  """
  found = []
  for match in re.finditer(
    rf"= (.*?) {operation}(?:-start)?\(", text, re.MULTILINE
  ):
    size = 0
    for kind, bits, lengths in _ARRAY.findall(match[1]):
      width = 1 if kind == "pred" else int(bits) // 8
      size += width * int(np.prod([int(n) for n in lengths.split(",") if n]))
    found.append(size)
  return found


def all_reduce_seconds(size: float, chips: int, interconnect: float) -> float:
  """Returns the least time to sum arrays over chips, without any latency.

  A chip must send, and receive, `2 (n - 1) / n` times their bytes (Patarasuk
  and Yuan, 2009), here over all of its links at once.

  Args:
    size: Of the arrays, bytes.
    chips: n.
    interconnect: Of a chip's links in both directions, bytes/s.

  >>> all_reduce_seconds(1e9, chips=4, interconnect=6e9)
  0.5
  """
  return 2.0 * (chips - 1) / chips * size / (interconnect / 2.0)


def read_report(
  step: str, compiled: Any, slice_: Slice, seconds: float
) -> Report:
  """Reads what the compiler says of a step.

  Args:
    step: Its name.
    compiled: The compiled step.
    slice_: What it is compiled for.
    seconds: How long that took.
  """
  chip = slice_.chip
  memory = compiled.memory_analysis()
  cost = compiled.cost_analysis()
  text = compiled.as_text()
  flops, traffic = float(cost["flops"]), float(cost["bytes accessed"])
  reduced = collective_bytes(text, "all-reduce")
  outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
  total = (
    memory.argument_size_in_bytes
    + outputs
    + memory.temp_size_in_bytes
    + memory.generated_code_size_in_bytes
  )
  return Report(
    step,
    memory.argument_size_in_bytes,
    outputs,
    memory.temp_size_in_bytes,
    memory.generated_code_size_in_bytes,
    total,
    total / chip.memory,
    flops,
    traffic,
    len(reduced),
    sum(reduced),
    len(collective_bytes(text, "all-gather")),
    flops / chip.flops,
    traffic / chip.bandwidth,
    all_reduce_seconds(sum(reduced), len(slice_.devices), chip.interconnect),
    seconds,
  )


class Fit(NamedTuple):
  """How many examples fit a device.

  Attributes:
    rows: So many do.
    too_many: So many do not.
  """

  rows: int
  too_many: int


def print_fit(fit: Fit, slice_: Slice, form: str, console: Console) -> None:
  """Prints the largest batch; see `print_reports`."""
  batch_size = fit.rows * len(slice_.devices)
  if form == "json":
    values = {
      "topology": slice_.name,
      **fit._asdict(),
      "batch_size": batch_size,
    }
    console.file.write(json.dumps(values, indent=2) + "\n")
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
  """Prints what the compiler says.

  Args:
    reports: Of each step.
    too_large: Names of the steps that do not fit.
    topology: The slice.
    form: One of `FORMATS`.
    console: Where to print.
  """
  if form == "json":
    values = {
      "topology": topology,
      "steps": [dataclasses.asdict(report) for report in reports],
      "too_large": list(too_large),
    }
    console.file.write(json.dumps(values, indent=2) + "\n")
    return
  memory = Table(title=f"{topology}: memory of a chip, MiB")
  work = Table(
    title=f"{topology}: work of a chip, and its least time at published rates",
    caption="The body of a loop, as in sampling and decoding, is counted once.",
  )
  names = "arguments", "outputs", "temporary", "code", "share", "compiled s"
  _add_columns(memory, *names)
  _add_columns(work, "GFLOP", "ms", "memory GB", "ms", "all-reduced MB", "ms")
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
    console.print(memory)
    console.print(work)


def _add_columns(table: Table, *names: str) -> None:
  """Adds a column for the step, then columns of figures."""
  table.add_column("step")
  for name in names:
    table.add_column(name, justify="right")
