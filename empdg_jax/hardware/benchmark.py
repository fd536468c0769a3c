"""Times of training steps and of decoding on this machine."""

import dataclasses
import functools
import json
import pathlib
import platform
import resource
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import track

from empdg_jax import storage
from empdg_jax.config import Config, InputError
from empdg_jax.data import pipeline
from empdg_jax.data.pipeline import Batch, EncodedExample, Shape
from empdg_jax.data.prepare import Dataset
from empdg_jax.inference.system import System
from empdg_jax.parallel.devices import replicate, shard, step_flops, unreplicate
from empdg_jax.training import terminal, train_state
from empdg_jax.training.run_folder import Run
from empdg_jax.training.train_state import (
  DISCRIMINATOR,
  GENERATOR,
  TrainState,
  count_parameters,
)
from empdg_jax.training.trainable import Trainable, assemble_for

# Large enough for the machine's peak rates: the product's 2048 rows and columns
# keep all cores busy, the streamed arrays of 128 MB each lie beyond all caches.
_MATRIX = 2048
_STREAM = 2**25
_DTYPES = "float32", "bfloat16"
_PARTS = (
  ("vocabulary", "the vocabulary's products"),
  ("optimizer", "the optimiser"),
  ("rest", "the rest"),
)


def _median_seconds(
  runs: Sequence[Callable[[], Any]], rounds: int, console: Console
) -> list[float]:
  """Times several calls.

  Args:
    runs: The calls; the first round of each compiles and is not counted.
    rounds: The number of times that each is timed.
    console: The terminal, for progress.

  Returns:
    Each call's median time.
  """
  times: list[list[float]] = [[] for _ in runs]
  for run in track(runs, "Compiling", console=console, transient=True):
    jax.block_until_ready(run())
  # Interleaved, so that noise of the machine affects all calls equally: their
  # ratios are what is reported.
  for _ in track(range(rounds), "Timing", console=console, transient=True):
    for run, seconds in zip(runs, times, strict=True):
      start = time.perf_counter()
      jax.block_until_ready(run())
      seconds.append(time.perf_counter() - start)
  # Medians, since a single pause of the machine would move a mean.
  return [statistics.median(seconds) for seconds in times]


def _matrix_product(dtype: str) -> Callable[[], jax.Array]:
  """Returns a call of a matrix product, `2 * _MATRIX ** 3` FLOP."""
  a = jnp.ones((_MATRIX, _MATRIX), dtype)
  product = jax.jit(lambda a: a @ a)
  return lambda: product(a)


def _stream() -> Callable[[], jax.Array]:
  """Returns a call of `a = a + 2 b`, which moves `3 * 4 * _STREAM` bytes."""
  a, b = jnp.ones(_STREAM), jnp.ones(_STREAM)
  # Donated, since an optimiser too updates its arrays in place.
  update = jax.jit(lambda a, b: a + 2.0 * b, donate_argnums=0)

  def run() -> jax.Array:
    nonlocal a
    a = update(a, b)
    return a

  return run


def _vocabulary_products(
  rows: int, dim: int, vocab_size: int
) -> Callable[[], Any]:
  """Returns a call of a step's three products with the vocabulary.

  The logits, and the gradients of hidden states and projection, for `rows`
  target positions in float32.
  """
  hidden, projection = jnp.ones((rows, dim)), jnp.ones((dim, vocab_size))

  @jax.jit
  def products(hidden: jax.Array, projection: jax.Array) -> Any:
    logits = hidden @ projection
    return logits @ projection.T, hidden.T @ logits

  return lambda: products(hidden, projection)


def _optimizer_update(
  optimizer: optax.GradientTransformation, params: Any
) -> Callable[[], Any]:
  """Returns a call of the optimiser's update of all parameters."""
  gradients = jax.tree.map(jnp.asarray, params)
  state = train_state.start(jax.tree.map(jnp.array, params), optimizer)

  @functools.partial(jax.jit, donate_argnums=0)
  def update(state: TrainState, gradients: Any) -> TrainState:
    updates, moments = optimizer.update(
      gradients, state.opt_state, state.params
    )
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, moments)

  def run() -> TrainState:
    nonlocal state
    state = update(state, gradients)
    return state

  return run


def _parts(
  trainable: Trainable,
  params: Any,
  step: Callable[[], Any],
  rows: int,
  rounds: int,
  console: Console,
) -> dict[str, float]:
  """Times a step and, by themselves, its two largest parts.

  Args:
    trainable: The system.
    params: The generator's parameters.
    step: A call of the step.
    rows: The target positions of a device.
    rounds: The number of times that each is timed.
    console: The terminal, for progress.

  Returns:
    Seconds of the `step`, of the `vocabulary`'s products, of the `optimizer`,
    and of the `rest`.
  """
  vocab_size, dim = params["embedding"].shape
  calls = [
    step,
    _vocabulary_products(rows, dim, vocab_size),
    _optimizer_update(trainable.optimizer, params),
  ]
  whole, vocabulary, optimizer = _median_seconds(calls, rounds, console)
  return {
    "step": whole,
    "vocabulary": vocabulary,
    "optimizer": optimizer,
    "rest": whole - vocabulary - optimizer,
  }


def mle_step_floor(
  flops: float, parameters: int, peak: float, bandwidth: float
) -> float:
  """Returns the least time of a training step with Adam, in seconds.

  The step does its arithmetic at the peak of matrix products, then makes seven
  passes over arrays of the parameters' size: it reads parameters, gradients and
  two moments, and writes parameters and moments.

  Args:
    flops: The step's floating-point operations.
    parameters: The number of parameters.
    peak: The rate of matrix products, FLOP/s.
    bandwidth: The memory bandwidth, bytes/s.

  >>> mle_step_floor(2e9, 1_000_000, peak=1e11, bandwidth=2.8e9)
  0.03
  """
  return flops / peak + 7 * 4 * parameters / bandwidth


def _batches_by_shape(
  encoded: Sequence[EncodedExample], config: Config, shapes: Sequence[Shape]
) -> list[tuple[int, Shape, Batch]]:
  """Returns each shape with its number of batches an epoch and one of them.

  The most frequent shape comes first.
  """
  size = config.train.batch_size
  plan = pipeline.BatchPlan(encoded, shapes, size)
  epoch = plan.shuffled_epoch(config.train.seed, 0)
  counts = Counter(shape for shape, _ in epoch)
  first = {shape: index for shape, index in reversed(epoch)}
  return [
    (count, shape, pipeline.collate(encoded, first[shape], shape, size))
    for shape, count in counts.most_common()
  ]


def _advance(
  states: dict[str, Any],
  player: str,
  step: Any,
  batch: Any,
  key: Any,
  other: str | None = None,
) -> Any:
  """Runs one step of a player and keeps its new state; returns the metrics."""
  # The step donates the state, so it must be replaced, and the other player's
  # be read only now.
  frozen = () if other is None else (states[other].params,)
  states[player], sums = step(states[player], *frozen, batch, key)
  return sums


def _adversarial_steps(
  dataset: Dataset, config: Config, params: Any, batch: Any, key: Any
) -> dict[str, Callable[[], Any]]:
  """Returns calls of phases 2 and 3 on one batch, by player and signal."""
  calls: dict[str, Callable[[], Any]] = {}
  for signal in ("straight_through", "expected"):
    train = dataclasses.replace(config.train, generator_signal=signal)
    trainable = assemble_for(dataset, dataclasses.replace(config, train=train))
    # Every step donates its state, so that each signal needs its own.
    states = trainable.create_states(config.train.seed)
    states[GENERATOR] = states[GENERATOR].replace(params=params)
    states = replicate(states)
    compiled = trainable.compile_steps()
    for player, other, step in (
      (DISCRIMINATOR, GENERATOR, compiled.discriminator),
      (GENERATOR, DISCRIMINATOR, compiled.adversarial),
    ):
      calls[f"{player}, {signal}"] = functools.partial(
        _advance, states, player, step, batch, key, other
      )
  return calls


def _time_decoding(
  dataset: Dataset, config: Config, params: Any, console: Console
) -> dict[str, Any]:
  """Times greedy decoding of the valid split."""
  labels = dataset.corpus.emotions
  run = Run(pathlib.Path(), config, dataset.vocabulary, labels)
  system = System(run, params)
  valid = dataset.encoded("valid")
  console.print("Compiling the decoding step", style="dim")
  # The first pass compiles every shape and is not counted.
  list(system.respond(valid, config.eval.batch_size))
  start = time.perf_counter()
  responses = list(system.respond(valid, config.eval.batch_size))
  seconds = time.perf_counter() - start
  return {
    "responses": len(responses),
    "seconds": seconds,
    "responses_per_second": len(responses) / seconds,
    "mean_tokens": float(np.mean([len(r.tokens) for _, r in responses])),
  }


def _peak_memory() -> int:
  """Returns this process's peak memory so far, in bytes."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  # Linux counts in KiB, macOS in bytes.
  return peak * (1 if platform.system() == "Darwin" else 1024)


def benchmark(
  dataset: Dataset,
  config: Config,
  console: Console,
  rounds: int = 20,
) -> dict[str, Any]:
  """Times training steps by shape, adversarial steps, and greedy decoding.

  Args:
    dataset: The dataset, for its shapes.
    config: The system's configuration.
    console: The terminal, for progress.
    rounds: Timed steps a shape.

  Returns:
    A JSON value; times are medians in seconds.
  """
  trainable = assemble_for(dataset, config)
  parameters = count_parameters(trainable.generator)
  initial = trainable.create_states(config.train.seed)[GENERATOR]
  # A copy on this host, since the first step donates the state's buffers.
  params = unreplicate(replicate(initial.params))
  states = {"generator": replicate(initial)}
  key = replicate(jax.random.key(config.train.seed))
  p_mle_step = trainable.compile_steps().mle
  by_shape = _batches_by_shape(dataset.encoded("train"), config, dataset.shapes)
  batches = [shard(batch) for _, _, batch in by_shape]
  steps = [
    functools.partial(_advance, states, "generator", p_mle_step, batch, key)
    for batch in batches
  ]
  products = [_matrix_product(dtype) for dtype in _DTYPES]
  product, low, stream, *seconds = _median_seconds(
    [*products, _stream(), *steps], rounds, console
  )
  peak, bandwidth = 2 * _MATRIX**3 / product, 3 * 4 * _STREAM / stream
  low_peak = 2 * _MATRIX**3 / low
  # Before the steps below, which hold more states than training ever does.
  training_memory = _peak_memory()
  adversarial = {}
  if trainable.adversary is not None:
    calls = _adversarial_steps(dataset, config, params, batches[0], key)
    mle, *others = _median_seconds([steps[0], *calls.values()], rounds, console)
    adversarial = {
      name: {"step_seconds": s, "times_mle_step": s / mle}
      for name, s in zip(calls, others, strict=True)
    }
  devices = jax.local_device_count()
  rows = config.train.batch_size // devices * by_shape[0][1].target
  parts = _parts(trainable, params, steps[0], rows, rounds, console)
  shapes = []
  timed = zip(by_shape, batches, seconds, strict=True)
  for (count, shape, _), batch, s in timed:
    lowered = p_mle_step.lower(states["generator"], batch, key)
    flops = step_flops(lowered.compile())
    floor, low_floor = (
      mle_step_floor(flops, parameters, p, bandwidth) for p in (peak, low_peak)
    )
    shapes.append(
      {
        "context": shape.context,
        "emotion": shape.emotion,
        "target": shape.target,
        "batches_per_epoch": count,
        "step_seconds": s,
        "examples_per_second": config.train.batch_size / s,
        "flops": flops * devices,
        "flops_per_second": flops * devices / s,
        "floor_seconds": floor,
        "bfloat16_floor_seconds": low_floor,
        "times_floor": s / floor,
      }
    )
  # Frees Adam's state, which decoding does not have.
  states.clear()
  return {
    "device": jax.devices()[0].device_kind,
    "devices": devices,
    "model": config.model.name,
    "parameters": parameters,
    "vocab_size": len(dataset.vocabulary),
    "batch_size": config.train.batch_size,
    "matmul_flops_per_second": peak,
    "matmul_bfloat16_flops_per_second": low_peak,
    "stream_bytes_per_second": bandwidth,
    "mle_step": shapes,
    "mle_step_parts": parts,
    "epoch_seconds": sum(
      s["step_seconds"] * s["batches_per_epoch"] for s in shapes
    ),
    "adversarial_steps": adversarial,
    "greedy_decoding": _time_decoding(dataset, config, params, console),
    "training_peak_memory_bytes": training_memory,
    "peak_memory_bytes": _peak_memory(),
  }


def print_benchmark(values: dict[str, Any], console: Console) -> None:
  """Prints the values of `benchmark`."""
  console.print(
    f"{values['devices']} x {values['device']}; {values['model']}, "
    f"{values['parameters']:,} parameters; matrix product "
    f"{values['matmul_flops_per_second'] / 1e9:.0f} GFLOP/s (bfloat16 "
    f"{values['matmul_bfloat16_flops_per_second'] / 1e9:.0f}), stream "
    f"{values['stream_bytes_per_second'] / 1e9:.1f} GB/s",
    highlight=False,
  )
  header = (
    "context,target,batches,ms,examples/s,GFLOP/s,floor ms,x floor,bfloat16 "
    "floor ms"
  )
  rows = [
    (
      str(shape["context"]),
      str(shape["target"]),
      f"{shape['batches_per_epoch']:,}",
      f"{1e3 * shape['step_seconds']:.0f}",
      f"{shape['examples_per_second']:.0f}",
      f"{shape['flops_per_second'] / 1e9:.0f}",
      f"{1e3 * shape['floor_seconds']:.0f}",
      f"{shape['times_floor']:.2f}",
      f"{1e3 * shape['bfloat16_floor_seconds']:.0f}",
    )
    for shape in values["mle_step"]
  ]
  title = f"MLE step, batches of {values['batch_size']}"
  console.print(terminal.table(header.split(","), rows, title=title))
  parts = values["mle_step_parts"]
  console.print(
    "The most frequent shape's step: "
    + ", ".join(
      f"{title} {1e3 * parts[name]:.0f} ms ({parts[name] / parts['step']:.0%})"
      for name, title in _PARTS
    ),
    highlight=False,
  )
  if adversarial := values["adversarial_steps"]:
    header = "step", "ms", "x MLE step"
    rows = [
      (name, f"{1e3 * s['step_seconds']:.0f}", f"{s['times_mle_step']:.2f}")
      for name, s in adversarial.items()
    ]
    title = "Adversarial steps on the most frequent shape"
    console.print(terminal.table(header, rows, title=title, left=["step"]))
  greedy = values["greedy_decoding"]
  console.print(
    f"An epoch: {values['epoch_seconds'] / 60:.1f} min. Greedy decoding: "
    f"{greedy['responses']:,} responses in {greedy['seconds']:.1f} s, "
    f"{greedy['responses_per_second']:.0f} a second. Peak memory: training "
    f"{values['training_peak_memory_bytes'] / 2**30:.2f} GiB, in all "
    f"{values['peak_memory_bytes'] / 2**30:.2f} GiB",
    highlight=False,
  )


def write_benchmark(values: dict[str, Any], path: pathlib.Path) -> None:
  """Writes the values as JSON.

  Raises:
    InputError: The file cannot be written.
  """
  with storage.errors(f"--output={path}: cannot write", InputError):
    storage.write_text(path, json.dumps(values, indent=2) + "\n")
