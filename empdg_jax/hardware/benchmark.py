"""Times of training steps and of decoding on this machine."""

import dataclasses
import functools
import itertools
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

from empdg_jax import config as config_lib
from empdg_jax import losses, storage
from empdg_jax.config import Config, InputError
from empdg_jax.data import pipeline
from empdg_jax.data.pipeline import Batch, EncodedExample, Shape
from empdg_jax.data.prepare import Dataset
from empdg_jax.inference.system import System
from empdg_jax.parallel.devices import replicate, shard, step_flops, unreplicate
from empdg_jax.training import precision, terminal, train_state
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
_PARTS = {
  "step": "ms",
  "vocabulary": "vocabulary's loss",
  "optimizer": "optimiser",
  "rest": "rest",
}


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
  # With a float32 result, as the steps multiply: on a CPU, rounding it to
  # bfloat16 takes longer than the product.
  multiply = jax.jit(losses.product)
  return lambda: multiply(a, a)


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


def _vocabulary_loss(
  rows: int, dim: int, vocab_size: int, dtype: str
) -> Callable[[], Any]:
  """Returns a call of a step's loss of the vocabulary, with its gradients.

  Three products with the vocabulary and the softmax of `rows` target positions,
  as `losses.vocabulary_loss` computes them without a pointer.
  """
  hidden = jnp.ones((1, rows, dim), dtype)
  projection = jnp.ones((dim, vocab_size))
  targets, weights = jnp.zeros((1, rows), int), jnp.ones((1, rows))

  def loss(hidden: jax.Array, projection: jax.Array) -> jax.Array:
    return losses.vocabulary_loss(
      hidden, projection, targets, None, weights, 0.0
    )[0]

  gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))
  return lambda: gradients(hidden, projection)


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


@dataclasses.dataclass(frozen=True)
class _Training:
  """A system on the devices, ready for its first steps.

  Attributes:
    config: Its configuration, with the type of its computation resolved.
    trainable: The system.
    params: A copy of the generator's parameters on the host.
    states: The players' states, which the calls replace.
    key: The key of the steps' randomness, on every device.
    step: The compiled step of maximum likelihood.
  """

  config: Config
  trainable: Trainable
  params: Any
  states: dict[str, Any]
  key: Any
  step: Any

  @property
  def dtype(self) -> str:
    """The type in which it computes."""
    return self.config.train.compute_dtype

  def call(self, batch: Any) -> Callable[[], Any]:
    """Returns a call of the step of maximum likelihood on a batch."""
    return functools.partial(
      _advance, self.states, GENERATOR, self.step, batch, self.key
    )

  def floor(self, batch: Any, peak: float, bandwidth: float) -> dict[str, Any]:
    """Returns a step's `flops`, on all devices, and its `floor_seconds`."""
    lowered = self.step.lower(self.states[GENERATOR], batch, self.key)
    flops = step_flops(lowered.compile())
    parameters = count_parameters(self.trainable.generator)
    return {
      "flops": flops * jax.local_device_count(),
      "floor_seconds": mle_step_floor(flops, parameters, peak, bandwidth),
    }


def _start(dataset: Dataset, config: Config, dtype: str = "auto") -> _Training:
  """Starts a training; "auto" is the configuration's own type, resolved."""
  if dtype == "auto":
    dtype = precision.resolve(config.train)
  config = config_lib.with_fields(config, {"train.compute_dtype": dtype})
  trainable = assemble_for(dataset, config)
  initial = trainable.create_states(config.train.seed)[GENERATOR]
  # A copy on this host, since the first step donates the state's buffers.
  params = unreplicate(replicate(initial.params))
  return _Training(
    config,
    trainable,
    params,
    {GENERATOR: replicate(initial)},
    replicate(jax.random.key(config.train.seed)),
    trainable.compile_steps().mle,
  )


def _by_dtype(
  trainings: Sequence[_Training],
  floors: dict[str, dict[str, float]],
  batch: Any,
  rounds: int,
  console: Console,
) -> dict[str, dict[str, float]]:
  """Times a step and, by themselves, its two largest parts, in each type.

  Args:
    trainings: The same system in each type.
    floors: The result of `_Training.floor` in each type.
    batch: The batch.
    rounds: The number of times that each is timed.
    console: The terminal, for progress.

  Returns:
    By type, seconds of the `step`, of the `vocabulary`'s loss, of the
    `optimizer`, of the `rest`, and of the floor.
  """
  calls: list[Callable[[], Any]] = []
  for training in trainings:
    vocab_size, dim = training.params["embedding"].shape
    rows = batch.target[0].size
    calls += [
      training.call(batch),
      _vocabulary_loss(rows, dim, vocab_size, training.dtype),
      _optimizer_update(training.trainable.optimizer, training.params),
    ]
  seconds = iter(_median_seconds(calls, rounds, console))
  found = {}
  for training in trainings:
    whole, vocabulary, optimizer = itertools.islice(seconds, 3)
    floor = floors[training.dtype]
    found[training.dtype] = {
      "step": whole,
      "vocabulary": vocabulary,
      "optimizer": optimizer,
      "rest": whole - vocabulary - optimizer,
      **floor,
      "times_floor": whole / floor["floor_seconds"],
    }
  return found


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
  dataset: Dataset, training: _Training, batch: Any
) -> dict[str, Callable[[], Any]]:
  """Returns calls of phases 2 and 3 on one batch, by player and signal."""
  calls: dict[str, Callable[[], Any]] = {}
  config = training.config
  for signal in ("straight_through", "expected"):
    train = dataclasses.replace(config.train, generator_signal=signal)
    trainable = assemble_for(dataset, dataclasses.replace(config, train=train))
    game = _game(trainable, training, batch)
    calls |= {f"{player}, {signal}": call for player, call in game.items()}
  return calls


def _game(
  trainable: Trainable, training: _Training, batch: Any
) -> dict[str, Callable[[], Any]]:
  """Returns calls of phases 2 and 3 on one batch, by player."""
  config, key = training.config.train, training.key
  # Every step donates its state, so that each game needs its own.
  states = trainable.create_states(config.seed)
  generator = states[GENERATOR].replace(params=training.params)
  game = train_state.start_game(config, training.params)
  states = replicate(states | {GENERATOR: generator.replace(game=game)})
  compiled = trainable.compile_steps()
  return {
    player: functools.partial(_advance, states, player, step, batch, key, other)
    for player, other, step in (
      (DISCRIMINATOR, GENERATOR, compiled.discriminator),
      (GENERATOR, DISCRIMINATOR, compiled.adversarial),
    )
  }


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
  training = _start(dataset, config)
  by_shape = _batches_by_shape(dataset.encoded("train"), config, dataset.shapes)
  batches = [shard(batch) for _, _, batch in by_shape]
  steps = [training.call(batch) for batch in batches]
  products = [_matrix_product(dtype) for dtype in _DTYPES]
  *found, stream = _median_seconds([*products, _stream()], rounds, console)
  peaks = {
    dtype: 2 * _MATRIX**3 / seconds
    for dtype, seconds in zip(_DTYPES, found, strict=True)
  }
  bandwidth = 3 * 4 * _STREAM / stream
  seconds = _median_seconds(steps, rounds, console)
  # Before the steps below, which hold more states than training ever does.
  training_memory = _peak_memory()
  adversarial = {}
  if training.trainable.adversary is not None:
    calls = _adversarial_steps(dataset, training, batches[0])
    mle, *others = _median_seconds([steps[0], *calls.values()], rounds, console)
    adversarial = {
      name: {"step_seconds": s, "times_mle_step": s / mle}
      for name, s in zip(calls, others, strict=True)
    }
    calls.clear()  # Frees the games' states.
  least_times = [
    training.floor(batch, peaks[training.dtype], bandwidth) for batch in batches
  ]
  shapes = []
  for (count, shape, _), least, s in zip(
    by_shape, least_times, seconds, strict=True
  ):
    shapes.append(
      {
        "context": shape.context,
        "emotion": shape.emotion,
        "target": shape.target,
        "batches_per_epoch": count,
        "step_seconds": s,
        "examples_per_second": config.train.batch_size / s,
        **least,
        "flops_per_second": least["flops"] / s,
        "times_floor": s / least["floor_seconds"],
      }
    )
  (other,) = set(_DTYPES) - {training.dtype}
  second = _start(dataset, config, other)
  floors = {
    training.dtype: least_times[0],
    other: second.floor(batches[0], peaks[other], bandwidth),
  }
  trainings = [training, second]
  trainings.sort(key=lambda each: _DTYPES.index(each.dtype))
  by_dtype = _by_dtype(trainings, floors, batches[0], rounds, console)
  # Frees Adam's state, which decoding does not have.
  for each in trainings:
    each.states.clear()
  return {
    "device": jax.devices()[0].device_kind,
    "devices": jax.local_device_count(),
    "model": config.model.name,
    "parameters": count_parameters(training.trainable.generator),
    "compute_dtype": training.dtype,
    "vocab_size": len(dataset.vocabulary),
    "batch_size": config.train.batch_size,
    "matmul_flops_per_second": peaks,
    "stream_bytes_per_second": bandwidth,
    "mle_step": shapes,
    "mle_step_by_dtype": by_dtype,
    "epoch_seconds": sum(
      s["step_seconds"] * s["batches_per_epoch"] for s in shapes
    ),
    "adversarial_steps": adversarial,
    "greedy_decoding": _time_decoding(
      dataset, config, training.params, console
    ),
    "training_peak_memory_bytes": training_memory,
    "peak_memory_bytes": _peak_memory(),
  }


def step_seconds(
  dataset: Dataset, config: Config, console: Console, rounds: int = 5
) -> dict[str, float]:
  """Times a system's steps at the most frequent padded length.

  Args:
    dataset: The dataset, for its shapes.
    config: The system's configuration.
    console: The terminal, for progress.
    rounds: Timed calls of each step.

  Returns:
    The median times of a step of maximum likelihood (`"mle"`) and, for a system
    with discriminators, of theirs (`"discriminator"`) and of the generator in
    phase 3 (`"generator"`), in seconds.
  """
  training = _start(dataset, config)
  encoded = dataset.encoded("train")
  batch = shard(_batches_by_shape(encoded, config, dataset.shapes)[0][2])
  calls = {"mle": training.call(batch)}
  if training.trainable.adversary is not None:
    calls |= _game(training.trainable, training, batch)
  seconds = _median_seconds(list(calls.values()), rounds, console)
  return dict(zip(calls, seconds, strict=True))


def print_benchmark(values: dict[str, Any], console: Console) -> None:
  """Prints the values of `benchmark`."""
  console.print(
    f"{values['devices']} x {values['device']}; {values['model']}, "
    f"{values['parameters']:,} parameters; matrix product "
    f"{values['matmul_flops_per_second']['float32'] / 1e9:.0f} GFLOP/s "
    f"(bfloat16 {values['matmul_flops_per_second']['bfloat16'] / 1e9:.0f}), "
    f"stream {values['stream_bytes_per_second'] / 1e9:.1f} GB/s",
    highlight=False,
  )
  header = "context,target,batches,ms,examples/s,GFLOP/s,floor ms,x floor"
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
    )
    for shape in values["mle_step"]
  ]
  title = (
    f"MLE step in {values['compute_dtype']}, batches of {values['batch_size']}"
  )
  console.print(terminal.table(header.split(","), rows, title=title))
  rows = [
    (
      dtype,
      *(f"{1e3 * parts[name]:.0f}" for name in _PARTS),
      f"{1e3 * parts['floor_seconds']:.0f}",
      f"{parts['times_floor']:.2f}",
    )
    for dtype, parts in values["mle_step_by_dtype"].items()
  ]
  header = ["", *_PARTS.values(), "floor ms", "x floor"]
  title = "MLE step on the most frequent shape, in both types"
  console.print(terminal.table(header, rows, title=title, left=[""]))
  if adversarial := values["adversarial_steps"]:
    header = "step", "ms", "x MLE step"
    rows = [
      (name, f"{1e3 * s['step_seconds']:.0f}", f"{s['times_mle_step']:.2f}")
      for name, s in adversarial.items()
    ]
    title = (
      f"Adversarial steps in {values['compute_dtype']}, the most frequent shape"
    )
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
