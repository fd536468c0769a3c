"""What this machine makes of the training step and of decoding."""

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
from rich.console import Console
from rich.progress import track
from rich.table import Table

from empdg_jax import storage
from empdg_jax.config import Config, InputError
from empdg_jax.data import pipeline, prepare
from empdg_jax.data.pipeline import Batch, EncodedExample, Shape
from empdg_jax.data.prepare import Dataset
from empdg_jax.inference.system import System
from empdg_jax.parallel.devices import replicate, shard, step_flops, unreplicate
from empdg_jax.training.run_folder import Run
from empdg_jax.training.train_state import count_parameters
from empdg_jax.training.trainable import Trainable, assemble

_MATRIX = 2048  # Rows and columns of the matrix product.
_STREAM = 2**25  # Elements of the streamed arrays: 128 MB each, beyond caches.


def _median_seconds(
  runs: Sequence[Callable[[], Any]], rounds: int, console: Console
) -> list[float]:
  """Times several calls in turn, so that all meet the machine's same moods.

  Args:
    runs: The calls; the first round of each compiles and is not counted.
    rounds: How often each is timed.
    console: Shows progress.

  Returns:
    Each call's median time.
  """
  times: list[list[float]] = [[] for _ in runs]
  for run in track(runs, "Compiling", console=console, transient=True):
    jax.block_until_ready(run())
  for _ in track(range(rounds), "Timing", console=console, transient=True):
    for run, seconds in zip(runs, times, strict=True):
      start = time.perf_counter()
      jax.block_until_ready(run())
      seconds.append(time.perf_counter() - start)
  return [statistics.median(seconds) for seconds in times]


def _matrix_product() -> Callable[[], jax.Array]:
  """Returns a float32 matrix product of `2 * _MATRIX ** 3` operations."""
  a = jnp.ones((_MATRIX, _MATRIX))
  product = jax.jit(lambda a: a @ a)
  return lambda: product(a)


def _stream() -> Callable[[], jax.Array]:
  """Returns `a = a + 2 b`, which moves `3 * 4 * _STREAM` bytes."""
  a, b = jnp.ones(_STREAM), jnp.ones(_STREAM)
  update = jax.jit(lambda a, b: a + 2.0 * b, donate_argnums=0)

  def run() -> jax.Array:
    nonlocal a
    a = update(a, b)
    return a

  return run


def mle_step_floor(
  flops: float, parameters: int, peak: float, bandwidth: float
) -> float:
  """Returns the least time that a step of Adam could take, in seconds.

  Its arithmetic at the peak of matrix products, then seven passes over arrays
  of the parameters' size: parameters, gradients and two moments are read,
  parameters and moments written.

  Args:
    flops: Floating-point operations of the step.
    parameters: How many.
    peak: FLOP/s.
    bandwidth: Bytes/s.

  >>> mle_step_floor(2e9, 1_000_000, peak=1e11, bandwidth=2.8e9)
  0.03
  """
  return flops / peak + 7 * 4 * parameters / bandwidth


def _batches_by_shape(
  encoded: Sequence[EncodedExample], config: Config, shapes: Sequence[Shape]
) -> list[tuple[int, Shape, Batch]]:
  """Returns for each shape its batches in an epoch and one of them."""
  plan = pipeline.BatchPlan(encoded, shapes, config.train.batch_size)
  epoch = plan.shuffled_epoch(config.train.seed, 0)
  counts = Counter(shape for shape, _ in epoch)
  first = {shape: index for shape, index in reversed(epoch)}
  return [
    (
      count,
      shape,
      pipeline.collate(encoded, first[shape], shape, config.train.batch_size),
    )
    for shape, count in counts.most_common()
  ]


def _assemble(dataset: Dataset, config: Config) -> Trainable:
  """Builds the system that a configuration names for a dataset."""
  return assemble(
    config,
    len(dataset.vocabulary),
    len(dataset.corpus.emotions),
    prepare.emotional_table(dataset.vocabulary, dataset.lexicon),
  )


def _adversarial_steps(
  dataset: Dataset, config: Config, params: Any, batch: Any, key: Any
) -> dict[str, Callable[[], Any]]:
  """Returns calls of phases 2 and 3 on one batch, by player and signal."""
  calls: dict[str, Callable[[], Any]] = {}
  for signal in ("straight_through", "expected"):
    train = dataclasses.replace(config.train, generator_signal=signal)
    trainable = _assemble(dataset, dataclasses.replace(config, train=train))
    generator, discriminators = trainable.create_states(config.train.seed)
    # Every step donates its state, so that each signal needs its own.
    states = replicate(
      {
        "generator": generator.replace(params=params),
        "discriminator": discriminators,
      }
    )
    steps_by_player = trainable.compile_steps()

    def call(
      player: str, other: str, step: Any, states: dict[str, Any] = states
    ) -> Any:
      states[player], sums = step(
        states[player], states[other].params, batch, key
      )
      return sums

    for player, other, step in (
      ("discriminator", "generator", steps_by_player.discriminator),
      ("generator", "discriminator", steps_by_player.adversarial),
    ):
      calls[f"{player}, {signal}"] = functools.partial(
        call, player, other, step
      )
  return calls


def _peak_memory() -> int:
  """Returns the most memory that this process has had, in bytes."""
  kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return kibibytes * (1 if platform.system() == "Darwin" else 1024)


def benchmark(
  dataset: Dataset,
  config: Config,
  console: Console,
  rounds: int = 20,
) -> dict[str, Any]:
  """Measures the training step by shape, and greedy decoding.

  Args:
    dataset: Whose shapes to use.
    config: Of the system.
    console: Shows progress.
    rounds: Timed steps a shape.

  Returns:
    A JSON value; times are medians in seconds.
  """
  trainable = _assemble(dataset, config)
  parameters = count_parameters(trainable.generator)
  initial, _ = trainable.create_states(config.train.seed)
  params = unreplicate(replicate(initial.params))
  state = replicate(initial)
  key = replicate(jax.random.key(config.train.seed))
  p_mle_step = trainable.compile_steps().mle
  by_shape = _batches_by_shape(dataset.encoded("train"), config, dataset.shapes)

  def step(batch: Batch) -> Any:
    nonlocal state
    state, sums = p_mle_step(state, batch, key)
    return state, sums

  batches = [shard(batch) for _, _, batch in by_shape]
  product_seconds, stream_seconds, *step_seconds = _median_seconds(
    [
      _matrix_product(),
      _stream(),
      *(functools.partial(step, batch) for batch in batches),
    ],
    rounds,
    console,
  )
  memory = _peak_memory()
  adversarial = {}
  if trainable.adversary is not None:
    calls = _adversarial_steps(dataset, config, params, batches[0], key)
    mle_seconds, *seconds = _median_seconds(
      [functools.partial(step, batches[0]), *calls.values()],
      rounds,
      console,
    )
    adversarial = {
      name: {"step_seconds": s, "times_mle_step": s / mle_seconds}
      for name, s in zip(calls, seconds, strict=True)
    }
  peak = 2 * _MATRIX**3 / product_seconds
  bandwidth = 3 * 4 * _STREAM / stream_seconds
  devices = jax.local_device_count()
  shapes = []
  for (count, shape, _), batch, seconds in zip(
    by_shape, batches, step_seconds, strict=True
  ):
    compiled = p_mle_step.lower(state, batch, key).compile()
    flops = step_flops(compiled)
    floor = mle_step_floor(flops, parameters, peak, bandwidth)
    shapes.append(
      {
        "context": shape.context,
        "emotion": shape.emotion,
        "target": shape.target,
        "batches_per_epoch": count,
        "step_seconds": seconds,
        "examples_per_second": config.train.batch_size / seconds,
        "flops": flops * devices,
        "flops_per_second": flops * devices / seconds,
        "floor_seconds": floor,
        "times_floor": seconds / floor,
      }
    )
  del state

  system = System(
    Run(pathlib.Path(), config, dataset.vocabulary, dataset.corpus.emotions),
    params,
  )
  valid = dataset.encoded("valid")
  batch_size = config.eval.batch_size
  console.print("Compiling the decoding step", style="dim")
  list(system.respond(valid, batch_size))  # Compiles.
  start = time.perf_counter()
  responses = list(system.respond(valid, batch_size))
  decoding = time.perf_counter() - start
  return {
    "device": jax.devices()[0].device_kind,
    "devices": devices,
    "model": config.model.name,
    "parameters": parameters,
    "vocab_size": len(dataset.vocabulary),
    "batch_size": config.train.batch_size,
    "matmul_flops_per_second": peak,
    "stream_bytes_per_second": bandwidth,
    "mle_step": shapes,
    "epoch_seconds": sum(
      s["step_seconds"] * s["batches_per_epoch"] for s in shapes
    ),
    "adversarial_steps": adversarial,
    "greedy_decoding": {
      "responses": len(responses),
      "seconds": decoding,
      "responses_per_second": len(responses) / decoding,
      "mean_tokens": float(np.mean([len(r.tokens) for _, r in responses])),
    },
    "training_peak_memory_bytes": memory,
    "peak_memory_bytes": _peak_memory(),
  }


def print_benchmark(values: dict[str, Any], console: Console) -> None:
  """Prints what `benchmark` returned."""
  console.print(
    f"{values['devices']} x {values['device']}; {values['model']}, "
    f"{values['parameters']:,} parameters; matrix product "
    f"{values['matmul_flops_per_second'] / 1e9:.0f} GFLOP/s, stream "
    f"{values['stream_bytes_per_second'] / 1e9:.1f} GB/s",
    highlight=False,
  )
  table = Table(title=f"MLE step, batches of {values['batch_size']}")
  for column in (
    "context", "target", "batches", "ms", "examples/s", "GFLOP/s", "floor ms",
    "x floor",
  ):  # fmt: skip
    table.add_column(column, justify="right")
  for shape in values["mle_step"]:
    table.add_row(
      str(shape["context"]),
      str(shape["target"]),
      f"{shape['batches_per_epoch']:,}",
      f"{1e3 * shape['step_seconds']:.0f}",
      f"{shape['examples_per_second']:.0f}",
      f"{shape['flops_per_second'] / 1e9:.0f}",
      f"{1e3 * shape['floor_seconds']:.0f}",
      f"{shape['times_floor']:.2f}",
    )
  console.print(table)
  if values["adversarial_steps"]:
    table = Table(title="Adversarial steps on the most frequent shape")
    for column in ("step", "ms", "x MLE step"):
      table.add_column(column, justify="left" if column == "step" else "right")
    for name, step in values["adversarial_steps"].items():
      table.add_row(
        name,
        f"{1e3 * step['step_seconds']:.0f}",
        f"{step['times_mle_step']:.2f}",
      )
    console.print(table)
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
    path.parent.mkdir(parents=True, exist_ok=True)
    with storage.atomic_path(path) as temporary:
      temporary.write_text(json.dumps(values, indent=2) + "\n")
