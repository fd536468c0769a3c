"""Training in three phases, with validation, early stop and resumption."""

import dataclasses
import math
import pathlib
import signal
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import rich.console

from empdg_jax import config as config_lib
from empdg_jax import storage
from empdg_jax.config import Config, InputError
from empdg_jax.data import pipeline, prepare, vectors
from empdg_jax.models import registry
from empdg_jax.parallel import devices, hosts
from empdg_jax.training import (
  checkpoint,
  run_folder,
  terminal,
  train_log,
  train_state,
)
from empdg_jax.training.learner import Learner, Sums
from empdg_jax.training.profiling import InputWait
from empdg_jax.training.train_log import TrainLog

MLE, DISCRIMINATOR, ADVERSARIAL = "mle", "discriminator", "adversarial"


@dataclasses.dataclass
class Progress:
  """Where training stands; saved with every checkpoint as JSON.

  Attributes:
    phase: The phase's name in `metrics.jsonl`.
    done: Its steps, or rounds, that are done.
    updates: Of generator and discriminators in the whole run: the step of its
      logs.
    best: The best validation so far in this phase.
    worse: Validations in a row without a better one.
    data: The state of the iterator over training batches.
  """

  phase: str = MLE
  done: int = 0
  updates: int = 0
  best: float | None = None
  worse: int = 0
  data: Any = None


@dataclasses.dataclass(frozen=True)
class _Phase:
  """One of the three phases.

  Attributes:
    name: In `metrics.jsonl`.
    title: For people.
    total: Its steps, or rounds, at most.
    updates: Of generator and discriminators, in each of them.
    run: Takes one of them and returns the sums of its updates.
    eval_every: Steps, or rounds, between validations; 0 for none.
    patience: Validations without a better one before it stops.
    metric: What it keeps the best of.
  """

  name: str
  title: str
  total: int
  updates: int
  run: Callable[[], list[Sums]]
  eval_every: int = 0
  patience: int = 1
  metric: str = "perplexity"


def train(config: Config, workdir: pathlib.Path) -> bool:
  """Trains a system, or goes on where it was stopped.

  Args:
    config: The run's configuration.
    workdir: The run folder.

  Returns:
    Whether training came to its end, and was not preempted (SIGTERM).

  Raises:
    KeyboardInterrupt: Ctrl-C, on a single host after the state has been saved.
    InputError: Something given is wrong, and nothing has been written; or the
      loss is not finite, and the state before that has been saved.
    SaveError: A checkpoint could not be written or read.
  """
  trainer = _Trainer(config, workdir)
  try:
    finished = trainer.run()
  except BaseException:
    if jax.process_count() == 1:  # Others would be waited for in vain.
      trainer.close()
    raise
  trainer.close()
  return finished


class _Trainer:
  """One process's view of a run in progress."""

  def __init__(self, config: Config, workdir: pathlib.Path) -> None:
    """Begins a run, or resumes it."""
    self._config, self._workdir = config, workdir
    self._input = InputWait()
    self._progress = Progress()
    self._learning_rate = train_state.learning_rate(
      config.train, config.model.emb_dim
    )

    # In this order:
    # 1. what every host can refuse before it waits for another;
    with hosts.refusing_together():
      self._log = TrainLog(config.train, workdir)
      dataset = self._load_dataset()
      embeddings = self._word_vectors(dataset)
      other_run = self._other_run(dataset)
    hosts.check_same(lambda: config_lib.to_json(config), "configurations")
    hosts.check_same(dataset.digest, "data")
    hosts.check_shared(workdir, "workdir")
    # 2. the states of a new run, which also give the shapes, and over them
    # another run's generator, if one is given;
    self._learner = Learner(config, dataset, embeddings)
    self._log.say(
      f"{config.model.name}: {self._learner.parameters:,} parameters, on "
      f"{devices.describe_devices()}"
    )
    if other_run:
      self._learner.take_over(other_run)
      self._progress.phase = DISCRIMINATOR
    # 3. the run folder, and over the states its latest checkpoint, if any;
    with hosts.refusing_together():
      if hosts.is_main_process():
        run_folder.write_run(
          workdir, config, dataset.vocabulary, dataset.corpus.emotions
        )
    self._checkpoints = checkpoint.Checkpoints(
      workdir, create=True, keep=config.train.keep_checkpoints
    )
    if self._checkpoints.step(checkpoint.LATEST) is not None:
      self._learner.restore(self._checkpoints)
      self._progress = Progress(
        **self._checkpoints.restore_progress(checkpoint.LATEST)
      )
      self._log.say(f"Resuming {workdir} at step {self._progress.updates:,}")
    # 4. the batches, at the position saved with that checkpoint;
    self._train_set = dataset.encoded("train")
    self._shapes = dataset.shapes
    self._batches = self._open_batches()
    # 5. the logs, without what was logged after that checkpoint.
    self._log.open(self._progress.updates)

    self._valid_batches = list(
      pipeline.eval_batches(
        dataset.encoded("valid"),
        pipeline.coarse_shapes(dataset.shapes),
        batch_size=config.eval.batch_size,
        host=jax.process_index(),
        num_hosts=jax.process_count(),
      )
    )
    self._learner.start()

  def _load_dataset(self) -> prepare.Dataset:
    """Checks what is given before the data, and loads them."""
    config = self._config
    devices.check_batches(config, jax.device_count())
    if (
      config.train.mle_checkpoint
      and not registry.find_system(config.model).discriminators
    ):
      raise InputError(
        f"config.train.mle_checkpoint: {config.model.name} has no phase after "
        "maximum likelihood to begin with; use a system with discriminators, "
        "or ''"
      )
    run_folder.check_same_config(self._workdir, config)
    return prepare.load_dataset(config.data)

  def _other_run(self, dataset: prepare.Dataset) -> pathlib.Path | None:
    """Returns the run whose generator this one takes, if any, checked."""
    folder = self._config.train.mle_checkpoint
    if not folder:
      return None
    path = storage.run_path(folder, "config.train.mle_checkpoint")
    run_folder.check_same_generator(
      path, self._config, dataset.vocabulary, dataset.corpus.emotions
    )
    return path

  def _open_batches(self) -> Any:
    """Returns the iterator over the phase's batches, where training stands.

    Phases 2 and 3 pad to fewer shapes: their steps take long to compile, and
    most of their time does not depend on the padding.
    """
    mle = self._progress.phase == MLE
    batches = pipeline.train_batches(
      self._train_set,
      self._shapes if mle else pipeline.coarse_shapes(self._shapes),
      batch_size=self._config.train.batch_size,
      seed=self._config.train.seed,
      host=jax.process_index(),
      num_hosts=jax.process_count(),
    )
    if self._progress.data is not None:
      batches.set_state(self._progress.data)
    return batches

  def _word_vectors(self, dataset: prepare.Dataset) -> np.ndarray | None:
    config = self._config
    if not config.data.vectors or config.train.mle_checkpoint:
      return None
    embeddings, coverage = vectors.load_vectors(
      config.data.vectors,
      dataset.vocabulary,
      config.model.emb_dim,
      np.random.default_rng(config.train.seed),
    )
    self._log.say(f"Word vectors for {coverage:.1%} of the vocabulary")
    return embeddings

  def close(self) -> None:
    """Waits for what is being written."""
    self._log.close()
    self._checkpoints.close()

  def _phases(self) -> list[_Phase]:
    train = self._config.train
    phases = [
      _Phase(
        MLE,
        "Training",
        total=train.mle_steps,
        updates=1,
        run=self._mle_step,
        eval_every=train.mle_eval_every,
        patience=train.mle_patience,
      )
    ]
    if self._learner.has_discriminators:
      phases += [
        _Phase(
          DISCRIMINATOR,
          "Training the discriminators",
          total=train.discriminator_steps,
          updates=1,
          run=self._discriminator_step,
        ),
        _Phase(
          ADVERSARIAL,
          "Adversarial rounds",
          total=train.adversarial_rounds,
          updates=train.d_steps + train.g_steps,
          run=self._adversarial_round,
          eval_every=train.adversarial_eval_every,
          patience=train.adversarial_patience,
          metric=train.selection_metric,
        ),
      ]
    return phases

  def _next_batch(self) -> pipeline.Batch:
    return self._input.next(self._batches, self._learner.running)

  def _mle_step(self) -> list[Sums]:
    return [self._learner.mle_step(self._next_batch())]

  def _discriminator_step(self) -> list[Sums]:
    return [self._learner.discriminator_step(self._next_batch())]

  def _adversarial_round(self) -> list[Sums]:
    """Takes `d_steps` discriminator steps, then `g_steps` generator steps."""
    train, learner = self._config.train, self._learner
    steps = [learner.discriminator_step] * train.d_steps
    steps += [learner.adversarial_generator_step] * train.g_steps
    return [step(self._next_batch()) for step in steps]

  def run(self) -> bool:
    """Runs the phases from where training stands to the last one's end.

    Returns:
      Whether it came there, and was not preempted.

    Raises:
      KeyboardInterrupt: Ctrl-C, after the state has been saved.
    """
    phases = self._phases()
    names = [phase.name for phase in phases]
    for phase in phases[names.index(self._progress.phase) :]:
      if self._progress.phase != phase.name:
        self._begin(phase)
      stopped_by = self._run_phase(phase)
      if stopped_by:
        self._say_last(
          f"Stopped and saved at step {self._progress.updates:,}. The same "
          f"command resumes: empdg train --workdir={self._workdir}"
        )
        if stopped_by == signal.SIGINT:
          raise KeyboardInterrupt
        return False
    self._log.finish(self._progress.updates)
    self._say_last(
      f"Next: empdg evaluate --workdir={self._workdir} --split=test"
    )
    return True

  def _say_last(self, line: str) -> None:
    """Says on every host whether training is finished: launchers look for it.

    The line is not folded, whatever the terminal's width.
    """
    console = rich.console.Console()
    console.print(line, soft_wrap=True, highlight=False, markup=False)

  def _begin(self, phase: _Phase) -> None:
    """Goes from a finished phase to the next one, with its best generator."""
    if self._progress.phase == MLE:
      self._checkpoints.wait()
      self._learner.restore_best(self._checkpoints)
    self._progress.phase, self._progress.done = phase.name, 0
    self._progress.best, self._progress.worse = None, 0
    self._progress.data = self._batches.get_state()
    self._batches = self._open_batches()

  def _run_phase(self, phase: _Phase) -> int:
    """Runs a phase from where it stands.

    Returns:
      0 if it came to its end, else the signal that stopped it.
    """
    train, progress = self._config.train, self._progress
    # Several hosts must stop together; JAX takes care of that at SIGTERM.
    alone = jax.process_count() == 1
    caught = (signal.SIGINT, signal.SIGTERM) if alone else ()
    stopped_by = 0
    pending: list[Sums] = []
    logged_at = time.perf_counter()
    with (
      terminal.catch_interrupts(*caught) as interrupt,
      terminal.progress_bar(self._log.console) as bar,
    ):
      task = bar.add_task(phase.title, total=phase.total, rate="")
      while progress.done < phase.total and progress.worse < phase.patience:
        before = progress.updates
        with self._log.before(before, phase.updates):
          pending += phase.run()
        progress.done += 1
        progress.updates += phase.updates
        self._log.after(progress.updates, self._learner.running)
        last = progress.done == phase.total

        def due(every: int, before: int = before, last: bool = last) -> bool:
          return before // every != progress.updates // every or last

        stopped_by = interrupt.number
        if hosts.preempted(range(before + 1, progress.updates + 1)):
          stopped_by = signal.SIGTERM
        validated = phase.eval_every and (
          progress.done % phase.eval_every == 0 or last
        )
        saved = validated or due(train.checkpoint_every) or stopped_by
        # A checkpoint's log holds all updates before it: nobody else has them.
        if due(train.log_every) or saved:
          values = self._write_averages(phase, pending, logged_at)
          logged_at, pending = time.perf_counter(), []
          bar.update(
            task, completed=progress.done, rate=train_log.speed(values)
          )
          if not self._log.console.is_terminal and due(10 * train.log_every):
            left = (phase.total - progress.done) * phase.updates
            self._log.say(
              train_log.line(progress.updates, values, left * train.batch_size)
            )
        if validated:
          self._validate(phase)
        if saved:
          self._save(checkpoint.LATEST)
        if stopped_by:
          break
        if validated:
          logged_at = time.perf_counter()
      self._checkpoints.wait()
    if not stopped_by:
      line = f"Finished {phase.title.lower()} at step {progress.updates:,}"
      if progress.best is not None:
        name = phase.metric.replace("_", " ")
        line += f": best valid {name} {progress.best:.4g}"
      self._log.say(line)
    return stopped_by

  def _write_averages(
    self, phase: _Phase, taken: list[Sums], since: float
  ) -> dict[str, float]:
    """Writes the averages since the last time; waits for the devices.

    Raises:
      InputError: A loss is not finite. Such a step has no gradient, so the
        state is still a good one, and is saved.
    """
    values = train_log.average(taken)
    seconds = time.perf_counter() - since
    if not all(map(math.isfinite, values.values())):
      self._give_up(taken)
    values["train/examples_per_second"] = values.pop("examples") / seconds
    values["train/input_wait"] = min(1.0, self._input.take() / seconds)
    if "train/loss" in values:
      rate = self._learning_rate(self._learner.generator_steps - 1)
      values["train/learning_rate"] = np.asarray(rate).item()
    self._log.write(self._progress.updates, phase.name, values)
    return values

  def _give_up(self, taken: list[Sums]) -> None:
    """Saves, and raises InputError of the first update that is not finite."""
    found = train_log.not_finite(taken)
    if found is None:  # Only the exponential of a finite loss overflowed.
      return
    self._save(checkpoint.LATEST)
    self._checkpoints.wait()
    number, terms = found
    step = self._progress.updates - len(taken) + 1 + number
    raise InputError(
      f"step {step:,}: not finite: {terms}; the last good state is saved in "
      f"{self._workdir}; a lower learning rate or weight of that term, in "
      "another --workdir, may help"
    )

  def _validate(self, phase: _Phase) -> None:
    progress = self._progress
    values = self._learner.validate(self._valid_batches)
    self._log.write(
      progress.updates,
      phase.name,
      {f"valid/{k}": v for k, v in values.items() if k != "loss"},
    )
    value = values[phase.metric]
    higher_is_better = phase.metric == "emotion_accuracy"
    better = progress.best is None or (
      value > progress.best if higher_is_better else value < progress.best
    )
    if better:
      progress.best, progress.worse = value, 0
      self._save(checkpoint.BEST)
    else:
      progress.worse += 1
    accuracy = values.get("emotion_accuracy")
    self._log.say(
      f"step {progress.updates:,}: valid perplexity {values['perplexity']:.2f}"
      + ("" if accuracy is None else f", emotion accuracy {accuracy:.3f}")
      + (" (best)" if better else "")
    )

  def _save(self, kind: str) -> None:
    self._log.save()
    self._progress.data = self._batches.get_state()
    self._learner.save(
      self._checkpoints,
      kind,
      self._progress.updates,
      dataclasses.asdict(self._progress),
    )
