"""Training: maximum likelihood with validation, early stop and resumption."""

import contextlib
import dataclasses
import json
import pathlib
import signal
import time
import types
from collections.abc import Generator
from typing import Any

import jax
import numpy as np
import rich.console
import rich.progress
from tensorboardX import SummaryWriter

from empdg_jax import checkpoint, evaluate, parallel, steps
from empdg_jax import config as config_lib
from empdg_jax.config import Config, InputError
from empdg_jax.data import pipeline, prepare, vectors
from empdg_jax.models import registry
from empdg_jax.train_state import (
  create_optimizer,
  create_train_state,
  learning_rate,
)


@dataclasses.dataclass
class Progress:
  """Where training stands; saved with every checkpoint as JSON.

  Attributes:
    phase: The phase's name in `metrics.jsonl`.
    best: The best validation perplexity so far.
    worse: Validations in a row without a better one.
    data: The state of the iterator over training batches.
  """

  phase: str = "mle"
  best: float | None = None
  worse: int = 0
  data: Any = None


class MetricWriter:
  """Writes `metrics.jsonl` and TensorBoard events."""

  def __init__(self, workdir: pathlib.Path, resumed_step: int) -> None:
    """Opens both, forgetting what was logged after `resumed_step`."""
    path = workdir / "metrics.jsonl"
    kept = []
    if path.exists():
      for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        with contextlib.suppress(ValueError):  # The cut-off line of a kill.
          if json.loads(line)["step"] <= resumed_step:
            kept.append(line)
    with config_lib.atomic_path(path) as temporary:
      temporary.write_text("".join(kept), encoding="utf-8")
    self._file = path.open("a", encoding="utf-8")
    self._board = SummaryWriter(
      str(workdir / "tensorboard"), purge_step=resumed_step + 1
    )

  def write(self, step: int, phase: str, values: dict[str, float]) -> None:
    """Writes values of one step by their names."""
    for name, value in values.items():
      line = {"step": step, "phase": phase, "name": name, "value": value}
      self._file.write(json.dumps(line) + "\n")
      self._board.add_scalar(name, value, step)
    self._file.flush()

  def close(self) -> None:
    """Closes both files."""
    self._file.close()
    self._board.close()


class _Interrupt:
  """Whether the user or the system has asked to stop."""

  requested = False

  def __call__(self, number: int, frame: types.FrameType | None) -> None:
    del frame
    self.requested = True
    signal.signal(number, signal.SIG_DFL)  # The second time it ends at once.


@contextlib.contextmanager
def _catch_interrupts() -> Generator[_Interrupt]:
  interrupt = _Interrupt()
  previous = {
    number: signal.signal(number, interrupt)
    for number in (signal.SIGINT, signal.SIGTERM)
  }
  try:
    yield interrupt
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)


def _progress_bar(console: rich.console.Console) -> rich.progress.Progress:
  return rich.progress.Progress(
    rich.progress.TextColumn("{task.description}"),
    rich.progress.BarColumn(),
    rich.progress.MofNCompleteColumn(),
    rich.progress.TextColumn("{task.fields[rate]}"),
    rich.progress.TimeElapsedColumn(),
    rich.progress.TextColumn("ETA"),
    rich.progress.TimeRemainingColumn(elapsed_when_finished=False),
    console=console,
    disable=not console.is_terminal,
  )


def train(config: Config, workdir: pathlib.Path) -> bool:
  """Trains a system by maximum likelihood, or goes on where it was stopped.

  Args:
    config: The run's configuration.
    workdir: The run folder.

  Returns:
    Whether training came to its end, and was not interrupted.

  Raises:
    InputError: Something given is wrong; nothing has been written then.
  """
  devices = jax.device_count()
  for name in ("train", "eval"):
    if getattr(config, name).batch_size % devices:
      raise InputError(
        f"config.{name}.batch_size={getattr(config, name).batch_size} does not "
        f"divide among {devices} devices"
      )
  checkpoint.check_same_config(workdir, config)
  console = rich.console.Console()
  dataset = prepare.load_dataset(config.data)
  model = registry.create_model(config.model, len(dataset.vocabulary))
  optimizer = create_optimizer(config.train, config.model.emb_dim)
  embeddings = None
  if config.data.vectors:
    embeddings, coverage = vectors.load_vectors(
      config.data.vectors,
      dataset.vocabulary,
      config.model.emb_dim,
      np.random.default_rng(config.train.seed),
    )
    console.print(f"Word vectors for {coverage:.1%} of the vocabulary")
  checkpoint.write_run(workdir, config, dataset.vocabulary)

  # Resuming, in this order:
  # 1. the state a new run would begin with, which gives the shapes;
  # 2. over it the latest checkpoint, if there is one;
  # 3. the batches, at the position saved with that checkpoint;
  # 4. the logs, without what was logged after that checkpoint.
  state = create_train_state(model, optimizer, config.train.seed, embeddings)
  checkpoints = checkpoint.Checkpoints(workdir, create=True)
  progress = Progress()
  if checkpoints.step(checkpoint.LATEST) is not None:
    state, saved = checkpoints.restore(checkpoint.LATEST, state)
    progress = Progress(**saved)
    console.print(f"Resuming {workdir} at step {int(state.step):,}")
  batches = pipeline.train_batches(
    dataset.encoded("train"),
    dataset.shapes,
    batch_size=config.train.batch_size,
    seed=config.train.seed,
    host=jax.process_index(),
    num_hosts=jax.process_count(),
  )
  if progress.data is not None:
    batches.set_state(progress.data)
  writer = MetricWriter(workdir, int(state.step))
  try:
    return _Trainer(
      config, workdir, console, dataset, model, optimizer, checkpoints, writer
    ).run_mle(state, batches, progress)
  finally:
    checkpoints.close()
    writer.close()


class _Trainer:
  """One process's view of a run in progress."""

  def __init__(
    self,
    config: Config,
    workdir: pathlib.Path,
    console: rich.console.Console,
    dataset: prepare.Dataset,
    model: Any,
    optimizer: Any,
    checkpoints: checkpoint.Checkpoints,
    writer: MetricWriter,
  ) -> None:
    self._config = config
    self._workdir = workdir
    self._console = console
    self._checkpoints = checkpoints
    self._writer = writer
    self._learning_rate = learning_rate(config.train, config.model.emb_dim)
    self._key = parallel.replicate(jax.random.key(config.train.seed))
    self._p_mle_step = steps.compile_mle_step(model, optimizer)
    self._p_eval_step = steps.compile_eval_step(model)
    self._valid_batches = list(
      pipeline.eval_batches(
        dataset.encoded("valid"),
        pipeline.eval_shapes(dataset.shapes),
        batch_size=config.eval.batch_size,
        host=jax.process_index(),
        num_hosts=jax.process_count(),
      )
    )

  def run_mle(self, state: Any, batches: Any, progress: Progress) -> bool:
    """Runs phase 1 from `state` on; returns whether it came to its end."""
    train = self._config.train
    step, finished = int(state.step), False
    state = parallel.replicate(state)
    pending: list[Any] = []
    logged_at = time.perf_counter()
    with (
      _catch_interrupts() as interrupt,
      _progress_bar(self._console) as bar,
    ):
      task = bar.add_task("Training", total=train.mle_steps, rate="")
      while step < train.mle_steps and progress.worse < train.mle_patience:
        batch = parallel.shard(next(batches))
        state, sums = self._p_mle_step(state, batch, self._key)
        pending.append(sums)
        step += 1
        last = step == train.mle_steps
        if step % train.log_every == 0 or last:
          values, logged_at = self._log(
            step, progress.phase, pending, logged_at
          )
          pending = []
          rate = values["train/examples_per_second"]
          bar.update(task, completed=step, rate=f"{rate:,.0f} examples/s")
          if (
            not self._console.is_terminal and step % (10 * train.log_every) == 0
          ):
            self._print_log(step, values)
        validated = step % train.mle_eval_every == 0 or last
        if validated:
          self._validate(state, step, batches, progress)
        if (
          validated or step % train.checkpoint_every == 0 or interrupt.requested
        ):
          self._save(checkpoint.LATEST, state, batches, progress)
        if interrupt.requested:
          break
        if validated:
          logged_at = time.perf_counter()
      else:
        finished = True
    self._checkpoints.wait()
    if finished:
      self._console.print(
        f"Finished at step {step:,}: best valid perplexity {progress.best:.2f}."
        f" Next: empdg evaluate --workdir={self._workdir} --split=test"
      )
    else:
      self._console.print(
        f"Stopped and saved at step {step:,}. The same command resumes: "
        f"empdg train --workdir={self._workdir}"
      )
    return finished

  def _log(
    self, step: int, phase: str, pending: list[Any], since: float
  ) -> tuple[dict[str, float], float]:
    sums = evaluate.sum_metrics(pending)  # Waits for the devices.
    now = time.perf_counter()
    averages = evaluate.average_metrics(sums)
    values = {
      "train/loss": averages["loss"],
      "train/perplexity": averages["perplexity"],
      "train/emotion_accuracy": averages["emotion_accuracy"],
      "train/learning_rate": np.asarray(self._learning_rate(step - 1)).item(),
      "train/examples_per_second": sums["examples"] / (now - since),
    }
    self._writer.write(step, phase, values)
    return values, now

  def _print_log(self, step: int, values: dict[str, float]) -> None:
    rate = values["train/examples_per_second"]
    left = (self._config.train.mle_steps - step) * self._config.train.batch_size
    self._console.print(
      f"step {step:,}: perplexity {values['train/perplexity']:.2f}, emotion "
      f"accuracy {values['train/emotion_accuracy']:.3f}, {rate:,.0f} "
      f"examples/s, ETA {left / rate / 60:.0f} min",
      highlight=False,
    )

  def _validate(
    self, state: Any, step: int, batches: Any, progress: Progress
  ) -> None:
    values = evaluate.validate(
      self._p_eval_step, state.params, self._valid_batches
    )
    self._writer.write(
      step,
      progress.phase,
      {
        f"valid/{name}": values[name]
        for name in ("perplexity", "perplexity_per_example", "emotion_accuracy")
      },
    )
    better = progress.best is None or values["perplexity"] < progress.best
    if better:
      progress.best, progress.worse = values["perplexity"], 0
      self._save(checkpoint.BEST, state, batches, progress)
    else:
      progress.worse += 1
    self._console.print(
      f"step {step:,}: valid perplexity {values['perplexity']:.2f}, emotion "
      f"accuracy {values['emotion_accuracy']:.3f}"
      + (" (best)" if better else ""),
      highlight=False,
    )

  def _save(
    self, kind: str, state: Any, batches: Any, progress: Progress
  ) -> None:
    progress.data = batches.get_state()
    self._checkpoints.save(
      kind, parallel.unreplicate(state), dataclasses.asdict(progress)
    )
