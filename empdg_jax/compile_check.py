"""Compiling every step for a TPU slice ahead of time, without any TPU."""

import concurrent.futures
import dataclasses
import importlib.util
import json
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

from empdg_jax import steps, train_state
from empdg_jax.config import Config, InputError
from empdg_jax.data import pipeline
from empdg_jax.data.pipeline import Batch, Shape
from empdg_jax.models import registry
from empdg_jax.train_state import TrainState

FORMATS = ("terminal", "json")
_WITHOUT_UPDATE = ("eval", "predict")


class Chip(NamedTuple):
  """A TPU chip's published rates.

  Attributes:
    memory: HBM, bytes.
    flops: Peak, bfloat16, operations/s.
    bandwidth: Of HBM, bytes/s.
    interconnect: Of all links to other chips, both directions, bytes/s.
    layouts: The slices known to work, up to 256 chips.
    options: What the compiler needs to take a chip as one device.
  """

  memory: float
  flops: float
  bandwidth: float
  interconnect: float
  layouts: tuple[str, ...]
  options: dict[str, str] = {}  # noqa: RUF012


_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")
CHIPS = {
  "v4": Chip(
    32 * 2**30, 275e12, 1.2e12, 6e11, _CUBES, {"chip_config_name": "megacore"}
  ),
  "v5e": Chip(16 * 2**30, 197e12, 8.19e11, 4e11, _FLAT),
  "v5p": Chip(95 * 2**30, 459e12, 2.765e12, 1.2e12, _CUBES),
  "v6e": Chip(32 * 2**30, 918e12, 1.64e12, 8e11, _FLAT),
}


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
    flops: Floating-point operations.
    bytes_accessed: Traffic to memory.
    all_reduces: How many all-reduce operations.
    bytes_reduced: All that they sum over the chips.
    all_gathers: How many all-gather operations.
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
  compile_seconds: float


def known_topologies() -> str:
  """Returns the slices of `CHIPS` in a line each."""
  return "\n".join(
    f"{name}: {', '.join(chip.layouts)}" for name, chip in CHIPS.items()
  )


def describe_topology(name: str) -> tuple[Chip, list[jax.Device]]:
  """Returns a slice's chip and devices, none of which need exist.

  Args:
    name: As in `v5e:4x4`.

  Raises:
    InputError: There is no such slice, or the TPU compiler is not installed.
  """
  version, _, layout = name.partition(":")
  if version not in CHIPS or layout not in CHIPS[version].layouts:
    raise InputError(
      f"--topology={name}: expected one of "
      + "; ".join(known_topologies().splitlines())
    )
  if importlib.util.find_spec("libtpu") is None:
    raise InputError(
      "the TPU compiler is missing; install it with: pip install "
      "'empdg-jax[tpu]'"
    )
  # Else it asks the cloud which machine this is.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  chip = CHIPS[version]
  topology = topologies.get_topology_desc(name, "tpu", **chip.options)
  return chip, list(topology.devices)


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
) -> Iterator[tuple[str, Callable[[], Any]]]:
  """Yields each step's name and how to lower it, on the longest lengths.

  Args:
    config: Of the run.
    vocab_size: V.
    devices: The slice's.
    train_rows: Examples a device of a training step.

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
  eval_rows = -(-config.eval.batch_size // len(devices))
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


def _for_slice(
  config: Config, vocab_size: int, topology: str, batch_size: int
) -> tuple[Chip, list[tuple[str, Callable[[], Any]]]]:
  """Returns the chip, and each step's name and how to lower it.

  Raises:
    InputError: The slice is unknown, or the batch does not divide among it.
  """
  chip, devices = describe_topology(topology)
  count = len(devices)
  per_device, rest = divmod(batch_size, count)
  if rest:
    nearest = max(1, round(batch_size / count)) * count
    raise InputError(
      f"config.train.batch_size={batch_size} does not divide among {count} "
      f"devices; the nearest that does is {nearest}"
    )
  return chip, list(_lowerings(config, vocab_size, devices, per_device))


def check(
  config: Config, vocab_size: int, topology: str, console: Console
) -> list[Report]:
  """Compiles every step of a system for a slice, on its longest lengths.

  Args:
    config: Of the run; its batch sizes are of the whole slice.
    vocab_size: V.
    topology: The slice.
    console: Shows progress.

  Returns:
    A report for each step.

  Raises:
    InputError: The slice is unknown, or the batch does not divide among its
      chips.
  """
  chip, lowerings = _for_slice(
    config, vocab_size, topology, config.train.batch_size
  )
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    reports = pool.map(lambda step: _report(step[0], step[1], chip), lowerings)
    return list(
      track(
        reports,
        f"Compiling for {topology}",
        total=len(lowerings),
        console=console,
        transient=True,
      )
    )


def find_batch(
  config: Config, vocab_size: int, topology: str, console: Console
) -> int:
  """Returns the largest power of two of examples a device that fits.

  Args:
    config: Of the run.
    vocab_size: V.
    topology: The slice.
    console: Shows each size as it is tried.

  Returns:
    Examples a device, of the training step that needs the most memory.

  Raises:
    InputError: The slice is unknown, or not even one example fits.
  """
  chip, devices = describe_topology(topology)
  fits = 0
  for per_device in (2**n for n in range(15)):
    lowerings = [
      (name, lower)
      for name, lower in _lowerings(config, vocab_size, devices, per_device)
      if name not in _WITHOUT_UPDATE
    ]
    name, lower = lowerings[-1]  # The last one needs what the others need.
    with console.status(f"Compiling for {per_device} examples a device"):
      try:
        report = _report(name, lower, chip)
      except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
          raise
        break
    console.print(
      f"{per_device} examples a device: {report.memory_share:.0%} of the memory"
    )
    if report.memory_share > 1.0:
      break
    fits = per_device
  if not fits:
    raise InputError(f"--topology={topology}: not even one example a chip fits")
  return fits


def _report(name: str, lower: Callable[[], Any], chip: Chip) -> Report:
  """Compiles a step and reads what the compiler says of it."""
  start = time.perf_counter()
  compiled = lower().compile()
  seconds = time.perf_counter() - start
  memory = compiled.memory_analysis()
  cost = compiled.cost_analysis()
  text = compiled.as_text()
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
    float(cost["flops"]),
    float(cost["bytes accessed"]),
    len(reduced),
    sum(reduced),
    len(collective_bytes(text, "all-gather")),
    seconds,
  )


def print_reports(
  reports: Sequence[Report], topology: str, form: str, console: Console
) -> None:
  """Prints what the compiler says.

  Args:
    reports: Of each step.
    topology: The slice.
    form: One of `FORMATS`.
    console: Where to print.
  """
  if form == "json":
    values = {
      "topology": topology,
      "steps": [dataclasses.asdict(report) for report in reports],
    }
    console.file.write(json.dumps(values, indent=2) + "\n")
    return
  table = Table(title=f"{topology}, a chip")
  for column in (
    "step", "arguments MiB", "outputs MiB", "temporary MiB", "code MiB",
    "of memory", "GFLOP", "GB moved", "all-reduced MB", "compiled s",
  ):  # fmt: skip
    table.add_column(column, justify="left" if column == "step" else "right")
  for report in reports:
    table.add_row(
      report.step,
      *(
        f"{size / 2**20:,.1f}"
        for size in (
          report.arguments, report.outputs, report.temporaries, report.code
        )
      ),
      f"{report.memory_share:.1%}",
      f"{report.flops / 1e9:,.1f}",
      f"{report.bytes_accessed / 1e9:,.2f}",
      f"{report.bytes_reduced / 1e6:,.1f} in {report.all_reduces}",
      f"{report.compile_seconds:.0f}",
    )  # fmt: skip
  console.print(table)
