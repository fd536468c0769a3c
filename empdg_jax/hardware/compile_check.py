"""Ahead-of-time compilation of every step for a TPU slice, without a TPU."""

import concurrent.futures
import dataclasses
import importlib.util
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from rich.console import Console
from rich.progress import track

from empdg_jax import storage
from empdg_jax.config import Config, InputError
from empdg_jax.data import corpora, pipeline
from empdg_jax.data.pipeline import Batch, Shape
from empdg_jax.hardware import chips
from empdg_jax.hardware.compile_report import (
  WITHOUT_UPDATE,
  Fit,
  Slice,
  read_report,
)
from empdg_jax.parallel.devices import check_batches
from empdg_jax.training import steps
from empdg_jax.training.train_state import DISCRIMINATOR, GENERATOR
from empdg_jax.training.trainable import assemble

# Otherwise the compiler asks the cloud which machine this is, and insists on
# being the only user of its TPU.
_WITHOUT_TPU = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v4-8",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}


class _AbstractStep(NamedTuple):
  """A step, the shapes of its arguments, and its examples a device."""

  name: str
  function: Any
  arguments: tuple[Any, ...]
  rows: int


def describe_topology(name: str) -> Slice:
  """Returns a slice by its name.

  Args:
    name: The chip and the layout, as in `v5e:4x4`, or an accelerator type, as
      in `v5litepod-16`.

  Raises:
    InputError: There is no such slice, or the TPU compiler is not installed.
  """
  name = chips.topology_of(name)
  version, _, layout = name.partition(":")
  chip, sides = chips.CHIPS.get(version), chips.sides_of(layout)
  if chip is None or not sides:
    raise InputError(
      f"--topology={name}: expected a chip and a layout, such as v5e:2x4 or "
      "v5p:2x2x4, or an accelerator type, such as v5litepod-8; the chips are "
      + ", ".join(chips.CHIPS)
    )
  # JAX's own error would name neither the package nor the extra.
  if importlib.util.find_spec("libtpu") is None:
    raise InputError(
      "the TPU compiler is missing; install it in your clone with: "
      "pip install -e '.[tpu]'"
    )
  for variable, value in _WITHOUT_TPU.items():
    os.environ.setdefault(variable, value)
  options: dict[str, Any] = dict(chip.options)
  if math.prod(sides) < 4:
    # A part of a host, whose chips are 2x2 otherwise.
    options["chips_per_host_bounds"] = (*sides, 1)[:3]
  try:
    topology = topologies.get_topology_desc(name, "tpu", **options)
  except jax.errors.JaxRuntimeError as error:
    raise InputError(
      f"--topology={name}: the compiler knows no such slice "
      f"({storage.first_line(error)})"
    ) from error
  return Slice(name, chip, tuple(topology.devices))


def _batch(shape: Shape, devices: int, per_device: int) -> Batch:
  """Returns the shapes of a sharded batch, `[devices, per_device, ...]`."""
  one = pipeline.blank_batch(shape, 1)
  # Shapes and types are those of a real batch, whatever a batch holds.
  sharded = devices, per_device
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(sharded + x.shape[1:], x.dtype), one
  )


def _abstract_steps(
  config: Config,
  vocab_size: int,
  devices: Sequence[jax.Device],
  train_rows: int,
  eval_rows: int,
) -> list[_AbstractStep]:
  """Returns every step of a system, ready to lower.

  The steps are those of training and evaluation themselves, on the longest
  lengths, whose memory is the largest.

  Args:
    config: The run's configuration.
    vocab_size: The vocabulary's size V.
    devices: The slice's chips.
    train_rows: Examples a device in training steps.
    eval_rows: Examples a device in evaluation and decoding.
  """
  emotions = corpora.find_corpus(config.data).emotions
  # Which words are emotional changes no shape, so none are marked: no data are
  # needed to compile.
  train = config.train
  if train.compute_dtype == "auto":
    # The type for the chips, not for the machine that compiles.
    train = dataclasses.replace(train, compute_dtype="bfloat16")
  trainable = assemble(
    dataclasses.replace(config, train=train),
    vocab_size,
    len(emotions),
    np.zeros(vocab_size, bool),
  )
  model = trainable.evaluator
  # No array is ever made: states and keys are shapes, like the batches.
  states = jax.eval_shape(lambda: trainable.create_states(0))
  state = states[GENERATOR]
  key = jax.eval_shape(lambda: jax.random.key(0))
  longest = pipeline.padded_shapes(config.data)[-1]
  batch = _batch(longest, len(devices), train_rows)
  eval_arguments = state.params, _batch(longest, len(devices), eval_rows)
  compiled = trainable.compile_steps(devices)
  p_eval_step = steps.compile_step(steps.eval_step, devices, model=model)
  p_predict_step = steps.compile_step(
    steps.predict_step, devices, model=model, config=config.eval
  )
  found: dict[str, Any] = {"mle": (compiled.mle, (state, batch, key))}
  if discriminators := states.get(DISCRIMINATOR):
    arguments = discriminators, state.params, batch, key
    found["discriminator"] = compiled.discriminator, arguments
    arguments = state, discriminators.params, batch, key
    found["adversarial generator"] = compiled.adversarial, arguments
  found["eval"] = p_eval_step, eval_arguments
  found["predict"] = p_predict_step, eval_arguments
  return [
    _AbstractStep(
      name,
      function,
      arguments,
      eval_rows if name in WITHOUT_UPDATE else train_rows,
    )
    for name, (function, arguments) in found.items()
  ]


def check(
  config: Config, vocab_size: int, slice_: Slice, console: Console
) -> tuple[list[dict[str, Any]], list[str]]:
  """Compiles every step of a system for a slice, on its longest lengths.

  Args:
    config: The run's configuration; its batch sizes are of the whole slice.
    vocab_size: The vocabulary's size V.
    slice_: The slice.
    console: The terminal, for progress.

  Returns:
    A report for each step that compiles, and the names of the steps that do not
    fit; the compiler refuses some of them.

  Raises:
    InputError: A batch does not divide among the chips.
  """
  rows = check_batches(config, len(slice_.devices))
  checked = _abstract_steps(config, vocab_size, slice_.devices, *rows)
  found = track(
    _compile_all(checked, slice_),
    f"Compiling for {slice_.name}",
    total=len(checked),
    console=console,
    transient=True,
  )
  reports = {s.name: r for s, r in zip(checked, found, strict=True)}
  too_large = [
    name for name, r in reports.items() if not r or r["memory_share"] > 1.0
  ]
  return [report for report in reports.values() if report], too_large


def find_batch(
  config: Config, vocab_size: int, slice_: Slice, console: Console
) -> Fit:
  """Finds the largest batch whose training steps all fit.

  Args:
    config: The run's configuration; the search begins with its batch.
    vocab_size: The vocabulary's size V.
    slice_: The slice.
    console: The terminal, for each size as it is tried.

  Returns:
    The result of `largest_that_fits`.

  Raises:
    InputError: Not even one example a chip fits.
  """

  def share(rows: int) -> float:
    every = _abstract_steps(config, vocab_size, slice_.devices, rows, rows)
    tried = [step for step in every if step.name not in WITHOUT_UPDATE]
    start = time.perf_counter()
    with console.status(f"Compiling for {rows:,} examples a device"):
      reports = list(_compile_all(tried, slice_))
    most = max(r["memory_share"] if r else math.inf for r in reports)
    needs = f"{most:.0%} of the memory" if most < math.inf else "too many"
    console.print(
      f"{rows:,} examples a device: {needs} ({time.perf_counter() - start:.0f} "
      "s to compile)"
    )
    return most

  # A batch of fewer examples than chips is a start all the same.
  configured = max(1, config.train.batch_size // len(slice_.devices))
  fit = largest_that_fits(share, configured)
  if not fit.rows:
    raise InputError(
      f"--topology={slice_.name}: not even one example a chip fits"
    )
  return fit


def largest_that_fits(share: Callable[[int], float], start: int) -> Fit:
  """Finds where a share of memory that grows with the batch passes 1.

  Args:
    share: Returns the share for a number of rows; infinite if unknown.
    start: The number of rows to begin with.

  Returns:
    Two numbers of rows, at most a 16th apart: one that fits and one that does
    not.

  >>> largest_that_fits(lambda rows: 0.1 + rows / 500, start=32)
  Fit(rows=450, too_many=478)
  """
  points: list[tuple[int, float]] = []
  most = 2**24
  fits, too_many = 0, most
  rows = start
  while True:
    found = share(rows)
    fits, too_many = (rows, too_many) if found <= 1 else (fits, rows)
    # A 16th is near enough: what hardly fits takes minutes to compile.
    gap = max(1, fits // 16)
    if too_many - fits <= gap:
      return Fit(fits, too_many)
    if found < math.inf:
      points = [*points[-1:], (rows, found)]
    # Bisection, or doubling until something does not fit.
    rows = 2 * fits if too_many == most else (fits + too_many) // 2
    # Memory grows about linearly, so a secant step is closer, if its line
    # through the latest two points is of any use: a refused size has no share,
    # and where memory comes in tiles two sizes may have the same.
    if len(points) == 2:
      (x, y), (other_x, other_y) = points
      slope = (other_y - y) / (other_x - x)
      line = int(x + (1 - y) / slope) if slope > 0 else fits
      if fits < line < too_many:
        rows = line
    # At least a gap from both ends, else the last steps would creep.
    rows = min(max(rows, fits + gap), too_many - gap)


def _compile_all(
  abstract_steps: Sequence[_AbstractStep], slice_: Slice
) -> Iterator[dict[str, Any] | None]:
  """Yields each step's report, None if the compiler says that it does not fit.

  Steps compile side by side: the compiler releases Python's lock.
  """
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    yield from pool.map(lambda step: _report(step, slice_), abstract_steps)


def _report(step: _AbstractStep, slice_: Slice) -> dict[str, Any] | None:
  start = time.perf_counter()
  # The compiler keeps a little of the chip's memory for itself, so it refuses
  # what hardly fits as well.
  try:
    compiled = step.function.lower(*step.arguments).compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return None
  seconds = time.perf_counter() - start
  return read_report(step.name, compiled, slice_, seconds, step.rows)
