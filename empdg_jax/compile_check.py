"""Compiling every step for a TPU slice ahead of time, without any TPU."""

import concurrent.futures
import dataclasses
import importlib.util
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from rich.console import Console
from rich.progress import track
from rich.table import Table

from empdg_jax import parallel, steps, tpu, train_state
from empdg_jax.config import Config, InputError
from empdg_jax.data import pipeline
from empdg_jax.data.pipeline import Batch, Shape
from empdg_jax.models import registry
from empdg_jax.tpu import Chip
from empdg_jax.train_state import TrainState

FORMATS = ("terminal", "json")
_WITHOUT_UPDATE = ("eval", "predict")
# Else the compiler asks the cloud which machine this is, and wants to be the
# only one that uses its TPU.
_WITHOUT_TPU = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v4-8",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}


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


def describe_topology(name: str) -> Slice:
  """Returns a slice by its name.

  Args:
    name: As in `v5e:4x4`.

  Raises:
    InputError: There is no such slice, or the TPU compiler is not installed.
  """
  version, _, layout = name.partition(":")
  chip = tpu.CHIPS.get(version)
  if chip is None or layout not in chip.layouts:
    raise InputError(
      f"--topology={name}: expected one of " + "; ".join(tpu.known_slices())
    )
  if importlib.util.find_spec("libtpu") is None:
    raise InputError(
      "the TPU compiler is missing; install it with: pip install "
      "'empdg-jax[tpu]'"
    )
  for variable, value in _WITHOUT_TPU.items():
    os.environ.setdefault(variable, value)
  topology = topologies.get_topology_desc(name, "tpu", **dict(chip.options))
  return Slice(name, chip, tuple(topology.devices))


def _batch(shape: Shape, devices: int, per_device: int) -> Batch:
  """Returns a batch's shapes, a leading axis for devices."""

  def ids(*lengths: int) -> Any:
    return jax.ShapeDtypeStruct((devices, per_device, *lengths), jnp.int32)

  return Batch(
    context=ids(shape.context),
    state=ids(shape.context),
    emotion_context=ids(shape.emotion),
    target=ids(shape.target),
    feedback=ids(shape.feedback),
    emotion=ids(),
    mask=jax.ShapeDtypeStruct((devices, per_device), jnp.float32),
    position=ids(),
    index=ids(),
  )


def _lowerings(
  config: Config,
  vocab_size: int,
  devices: Sequence[jax.Device],
  train_rows: int,
  eval_rows: int,
) -> Iterator[tuple[str, Callable[[], Any]]]:
  """Yields each step's name and how to lower it, on the longest lengths.

  Args:
    config: Of the run.
    vocab_size: V.
    devices: The slice's.
    train_rows: Examples a device of a training step.
    eval_rows: Of evaluation.

  Yields:
    Names and functions.
  """
  model = registry.create_model(config.model, vocab_size)
  optimizer = train_state.create_optimizer(config.train, config.model.emb_dim)
  state = jax.eval_shape(
    lambda: train_state.create_train_state(model, optimizer, 0)
  )
  key = jax.eval_shape(lambda: jax.random.key(0))
  longest = pipeline.padded_shapes(config.data)[-1]
  batch = _batch(longest, len(devices), train_rows)
  eval_batch = _batch(longest, len(devices), eval_rows)

  yield (
    "mle",
    lambda: steps.compile_mle_step(model, optimizer, devices).lower(
      state, batch, key
    ),
  )
  if names := registry.critic_names(config.model):
    adversary = registry.create_adversary(config, np.zeros(vocab_size, bool))
    critics_optimizer = train_state.create_critics_optimizer(config.train)
    critics: TrainState = jax.eval_shape(
      lambda: train_state.create_critics_state(
        adversary.critic, names, critics_optimizer, 0
      )
    )
    yield (
      "discriminator",
      lambda: steps.compile_discriminator_step(
        model, adversary, critics_optimizer, devices
      ).lower(critics, state.params, batch, key),
    )
    yield (
      "adversarial generator",
      lambda: steps.compile_adversarial_generator_step(
        model, adversary, optimizer, devices
      ).lower(state, critics.params, batch, key),
    )
  yield (
    "eval",
    lambda: steps.compile_eval_step(model, devices).lower(
      state.params, eval_batch
    ),
  )
  yield (
    "predict",
    lambda: steps.compile_predict_step(model, config.eval, devices).lower(
      state.params, eval_batch
    ),
  )


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


def check(
  config: Config, vocab_size: int, slice_: Slice, console: Console
) -> tuple[list[Report], list[str]]:
  """Compiles every step of a system for a slice, on its longest lengths.

  Args:
    config: Of the run; its batch sizes are of the whole slice.
    vocab_size: V.
    slice_: The slice.
    console: Shows progress.

  Returns:
    A report for each step that compiles, and the names of those that do not
    fit, of which the compiler may refuse some.

  Raises:
    InputError: A batch does not divide among the chips.
  """
  rows = parallel.check_batches(config, len(slice_.devices))
  lowerings = list(_lowerings(config, vocab_size, slice_.devices, *rows))
  found = track(
    _compile_all(lowerings, slice_),
    f"Compiling for {slice_.name}",
    total=len(lowerings),
    console=console,
    transient=True,
  )
  reports, too_large = [], []
  for (name, _), report in zip(lowerings, found, strict=True):
    if report is not None:
      reports.append(report)
    if report is None or report.memory_share > 1.0:
      too_large.append(name)
  return reports, too_large


class Fit(NamedTuple):
  """How many examples fit a device.

  Attributes:
    rows: So many do.
    too_many: So many do not.
  """

  rows: int
  too_many: int


def find_batch(
  config: Config, vocab_size: int, slice_: Slice, console: Console
) -> Fit:
  """Finds the largest batch whose training steps all fit.

  Args:
    config: Of the run; the search begins with its batch.
    vocab_size: V.
    slice_: The slice.
    console: Shows each size as it is tried.

  Returns:
    See `largest_that_fits`.

  Raises:
    InputError: Not even one example a chip fits.
  """

  def share(rows: int) -> float:
    lowerings = [
      step
      for step in _lowerings(config, vocab_size, slice_.devices, rows, rows)
      if step[0] not in _WITHOUT_UPDATE
    ]
    with console.status(f"Compiling for {rows:,} examples a device"):
      reports = list(_compile_all(lowerings, slice_))
    most = max(math.inf if r is None else r.memory_share for r in reports)
    needs = f"{most:.0%} of the memory" if most < math.inf else "too many"
    console.print(f"{rows:,} examples a device: {needs}")
    return most

  start = max(1, config.train.batch_size // len(slice_.devices))
  fit = largest_that_fits(share, start)
  if not fit.rows:
    raise InputError(
      f"--topology={slice_.name}: not even one example a chip fits"
    )
  return fit


def largest_that_fits(share: Callable[[int], float], start: int) -> Fit:
  """Finds where a share of the memory that grows with the batch passes 1.

  It grows about linearly: each number but the first two is where the line
  through the latest two would pass 1.

  Args:
    share: Returns it for a number of rows; infinite if it is not known.
    start: The number to begin with.

  Returns:
    Two numbers of rows, at most a 32nd apart.

  >>> largest_that_fits(lambda rows: 0.1 + rows / 500, start=32)
  Fit(rows=450, too_many=464)
  """
  points: list[tuple[int, float]] = []
  fits, too_many = 0, 2**24
  rows = start
  while True:
    found = share(rows)
    fits, too_many = (rows, too_many) if found <= 1 else (fits, rows)
    gap = max(1, fits // 32)
    if too_many - fits <= gap:
      return Fit(fits, too_many)
    if found < math.inf:
      points = [*points[-1:], (rows, found)]
    rows = 2 * fits if found <= 1 else (fits + too_many) // 2
    if len(points) == 2:
      (x, y), (other_x, other_y) = points
      slope = (other_y - y) / (other_x - x)
      if slope > 0:
        rows = int(x + (1 - y) / slope)
    rows = min(max(rows, fits + gap), too_many - gap)


def _compile_all(
  lowerings: Sequence[tuple[str, Callable[[], Any]]], slice_: Slice
) -> Iterator[Report | None]:
  """Yields each step's report; see `_report`."""
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    yield from pool.map(
      lambda step: _report(step[0], step[1], slice_), lowerings
    )


def _report(
  name: str, lower: Callable[[], Any], slice_: Slice
) -> Report | None:
  """Compiles a step and reads what the compiler says of it.

  Returns:
    None if it says that the step does not fit: it keeps a little of the chip's
    memory for itself, so what hardly fits is refused as well.
  """
  chip = slice_.chip
  start = time.perf_counter()
  try:
    compiled = lower().compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return None
  seconds = time.perf_counter() - start
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
    name,
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
