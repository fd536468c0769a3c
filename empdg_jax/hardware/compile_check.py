"""Compiling every step for a TPU slice ahead of time, without any TPU."""

import concurrent.futures
import importlib.util
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from rich.console import Console
from rich.progress import track

from empdg_jax.config import Config, InputError
from empdg_jax.data import corpora, pipeline
from empdg_jax.data.pipeline import Batch, Shape
from empdg_jax.hardware import chips
from empdg_jax.hardware.compile_report import Fit, Report, Slice, read_report
from empdg_jax.parallel.devices import check_batches
from empdg_jax.training import steps
from empdg_jax.training.trainable import assemble

_WITHOUT_UPDATE = ("eval", "predict")
# Else the compiler asks the cloud which machine this is, and wants to be the
# only one that uses its TPU.
_WITHOUT_TPU = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v4-8",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}


def describe_topology(name: str) -> Slice:
  """Returns a slice by its name.

  Args:
    name: As in `v5e:4x4`.

  Raises:
    InputError: There is no such slice, or the TPU compiler is not installed.
  """
  version, _, layout = name.partition(":")
  chip = chips.CHIPS.get(version)
  if chip is None or layout not in chip.layouts:
    raise InputError(
      f"--topology={name}: expected one of " + "; ".join(chips.known_slices())
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
  emotions = corpora.find_corpus(config.data).emotions
  trainable = assemble(
    config, vocab_size, len(emotions), np.zeros(vocab_size, bool)
  )
  model = trainable.generator
  state, discriminators = jax.eval_shape(lambda: trainable.create_states(0))
  train_steps = trainable.compile_steps(devices)
  key = jax.eval_shape(lambda: jax.random.key(0))
  longest = pipeline.padded_shapes(config.data)[-1]
  batch = _batch(longest, len(devices), train_rows)
  eval_batch = _batch(longest, len(devices), eval_rows)

  yield "mle", lambda: train_steps.mle.lower(state, batch, key)
  if discriminators is not None:
    yield (
      "discriminator",
      lambda: train_steps.discriminator.lower(
        discriminators, state.params, batch, key
      ),
    )
    yield (
      "adversarial generator",
      lambda: train_steps.adversarial.lower(
        state, discriminators.params, batch, key
      ),
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
  rows = check_batches(config, len(slice_.devices))
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
    start = time.perf_counter()
    with console.status(f"Compiling for {rows:,} examples a device"):
      reports = list(_compile_all(lowerings, slice_))
    most = max(math.inf if r is None else r.memory_share for r in reports)
    needs = f"{most:.0%} of the memory" if most < math.inf else "too many"
    console.print(
      f"{rows:,} examples a device: {needs} ({time.perf_counter() - start:.0f} "
      "s to compile)"
    )
    return most

  configured = max(1, config.train.batch_size // len(slice_.devices))
  fit = largest_that_fits(share, configured)
  if not fit.rows:
    raise InputError(
      f"--topology={slice_.name}: not even one example a chip fits"
    )
  return fit


def largest_that_fits(share: Callable[[int], float], start: int) -> Fit:
  """Finds where a share of the memory that grows with the batch passes 1.

  It grows about linearly: where the line through the latest two numbers passes
  1 is the next, if that lies between what fits and what does not; else it is
  halfway, or twice as many.

  Args:
    share: Returns it for a number of rows; infinite if it is not known.
    start: The number to begin with.

  Returns:
    Two numbers of rows, at most a 16th apart: what hardly fits takes minutes to
    compile.

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
    gap = max(1, fits // 16)
    if too_many - fits <= gap:
      return Fit(fits, too_many)
    if found < math.inf:
      points = [*points[-1:], (rows, found)]
    rows = 2 * fits if too_many == most else (fits + too_many) // 2
    if len(points) == 2:
      (x, y), (other_x, other_y) = points
      slope = (other_y - y) / (other_x - x)
      line = int(x + (1 - y) / slope) if slope > 0 else fits
      if fits < line < too_many:
        rows = line
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
  start = time.perf_counter()
  try:
    compiled = lower().compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return None
  seconds = time.perf_counter() - start
  return read_report(name, compiled, slice_, seconds)
