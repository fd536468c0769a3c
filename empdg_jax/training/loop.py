"""The training loop over phases, with validation, early stop and preemption."""

import contextlib
import functools
import pathlib
import signal
import time
from collections.abc import Callable

import jax

from empdg_jax.config import Config, InputError, TrainConfig
from empdg_jax.data import pipeline
from empdg_jax.data.pipeline import Shape
from empdg_jax.parallel import hosts
from empdg_jax.training import (
  calls,
  checkpoint,
  run_lock,
  session,
  terminal,
  train_log,
  validation,
  watchdog,
)
from empdg_jax.training.compiling import Compiler
from empdg_jax.training.learner import Step, Update
from empdg_jax.training.phases import MLE, Phase, phases_of


def train(config: Config, workdir: pathlib.Path) -> bool:
  """Trains a system, or resumes its training.

  Args:
    config: The run's configuration.
    workdir: The run folder.

  Returns:
    Whether training is finished; False if it was preempted (SIGTERM).

  Raises:
    KeyboardInterrupt: Ctrl-C, on a single host after the state has been saved.
    InputError: The configuration, data or folder cannot be used, and nothing
      has been written; or ten updates in a row were not finite, and the
      state before them has been saved.
    SaveError: A checkpoint could not be written or read.
  """
  lock = run_lock.RunLock(workdir, config.train.lease_seconds)
  clock = watchdog.Watchdog(workdir, config.train.stall_minutes)
  with contextlib.closing(lock), contextlib.closing(clock):
    opened = session.open_session(config, workdir, lock, clock)
    trainer = _Trainer(config, workdir, opened)
    try:
      finished = trainer.run()
    except BaseException as error:
      # With several hosts, closing waits for all of them, and the others may
      # never come: they go on training, or are lost. A disk that has failed may
      # never finish the writes that closing waits for.
      if jax.process_count() == 1 and not isinstance(error, OSError):
        opened.close()
      raise
    opened.close()
  return finished


# Updates in a row that are not finite before training gives up.
MAX_SKIPPED = 10


def _crosses(every: int, before: int, after: int) -> bool:
  """Returns whether a multiple of `every` lies in `(before, after]`.

  A round may take several updates, and may step over the multiple itself.
  """
  return before // every != after // every


def _until_due(
  config: TrainConfig, phase: Phase, progress: session.Progress
) -> Callable[[int], int]:
  """Returns where a call must end; see `CallReader`.

  It ends with the phase, and where a validation, a checkpoint or a line of
  averages is due: all of these are the same with any number of steps a call.
  """
  done_before, updates_before = progress.done, progress.updates

  def until_due(taken: int) -> int:
    done, updates = done_before + taken, updates_before + taken
    ends = [phase.total - done]
    ends += [
      n - updates % n for n in (config.log_every, config.checkpoint_every)
    ]
    if phase.eval_every:
      ends.append(phase.eval_every - done % phase.eval_every)
    # Calls are read ahead, beyond the end of the phase.
    return max(1, min(ends))

  return until_due


class _Trainer:
  """The loop in one process.

  A batch goes from `_take_round` through the learner's steps to `_log_window`;
  rounds end in `_validate` and `Session.save` where these are due.
  """

  def __init__(
    self, config: Config, workdir: pathlib.Path, opened: session.Session
  ) -> None:
    """Takes what `open_session` returns."""
    self._config, self._workdir, self.session = config, workdir, opened
    self._log, self._learner = opened.log, opened.learner
    self._progress, self._checkpoints = opened.progress, opened.checkpoints
    # The updates since the last line of averages, and when they began.
    self._window: list[Update] = []
    self._window_start = 0.0
    self._skipped_in_a_row = 0
    self._used: set[tuple[Step, Shape]] = set()

  def run(self) -> bool:
    """Runs the phases from the run's position; see `train`."""
    phases = phases_of(self._config.train, self._learner)
    names = [phase.name for phase in phases]
    for phase in phases[names.index(self._progress.phase) :]:
      if self._progress.phase != phase.name:
        self._begin(phase)
      until_due = _until_due(self._config.train, phase, self._progress)
      with (
        self.session.batches.reading(phase.steps_per_call, until_due),
        contextlib.closing(self._compile_ahead(phase)) as compiler,
      ):
        stopped_by = self._run_phase(phase, compiler)
      if stopped_by:
        # Launchers look for this line, and for the last one, on every host.
        terminal.say(
          f"Stopped and saved at step {self._progress.updates:,}. The same "
          f"command resumes: empdg train --workdir={self._workdir}"
        )
        if stopped_by == signal.SIGINT:
          raise KeyboardInterrupt
        return False
      self._say_finished(phase)
    self._log.finish(self._progress.updates)
    self.session.save_record(finished=True)
    terminal.say(f"Next: empdg evaluate --workdir={self._workdir} --split=test")
    return True

  def _begin(self, phase: Phase) -> None:
    """Goes from a finished phase to the next one."""
    progress, batches = self._progress, self.session.batches
    if progress.phase == MLE:
      # The best checkpoint may still be on its way to the disk.
      self._checkpoints.wait()
      self._learner.restore_best(self._checkpoints)
    progress.phase, progress.done = phase.name, 0
    progress.best, progress.worse = None, 0
    batches.open(phase.name, batches.state())

  def _compile_ahead(self, phase: Phase) -> Compiler:
    """Begins to compile a phase's steps for all of its padded lengths."""
    compile_step = self._learner.compile_ahead()
    batch_size = self._config.train.batch_size

    def compile_one(step: Step, shape: Shape) -> None:
      blank = pipeline.blank_batch(shape, batch_size)
      compile_step(step, calls.stack((blank,), phase.steps_per_call))

    return Compiler(
      {
        (step, shape): functools.partial(compile_one, step, shape)
        for shape in self.session.batches.shapes
        for step in dict.fromkeys(phase.steps)
        if (step, shape) not in self._used
      }
    )

  def _run_phase(self, phase: Phase, compiler: Compiler) -> int:
    """Runs a phase from the run's position.

    Args:
      phase: The phase.
      compiler: What `_compile_ahead` returned for it.

    Returns:
      0 if the phase is finished, else the signal that stopped it.
    """
    every, progress = self._config.train, self._progress
    stopped_by = 0
    # A host that stopped at its own signal would leave the others waiting in
    # their next step. JAX's preemption service takes SIGTERM on several hosts,
    # and a Ctrl-C on one of them ends them all.
    alone = jax.process_count() == 1
    caught = (signal.SIGINT, signal.SIGTERM) if alone else ()
    with (
      terminal.catch_interrupts(*caught) as interrupt,
      terminal.progress_bar(self._log.console) as bar,
    ):
      task = bar.add_task(phase.title, total=phase.total, rate="")
      self._window_start = time.perf_counter()
      # Other hosts may still compile the phase's steps.
      self.session.watchdog.feed(patient=True)
      if phase.validates_first and not progress.done and progress.best is None:
        with self.session.watchdog.expecting("a validation"):
          self._validate(phase)
        self._window_start = time.perf_counter()
      while progress.done < phase.total and progress.worse < phase.patience:
        before = progress.updates
        self._take_round(phase, compiler)
        self.session.watchdog.feed()
        after, last = progress.updates, progress.done == phase.total

        preempted = hosts.preempted(range(before + 1, after + 1))
        stopped_by = signal.SIGTERM if preempted else interrupt.number
        validated = phase.eval_every and (
          progress.done % phase.eval_every == 0 or last
        )
        saved = (
          validated
          or _crosses(every.checkpoint_every, before, after)
          or last
          or stopped_by
        )

        # Only this process holds the sums of its updates. A checkpoint's log
        # covers all of them: a run that resumes there cannot log them again.
        if saved or _crosses(every.log_every, before, after):
          values = self._log_window(phase)
          bar.update(
            task, completed=progress.done, rate=train_log.speed(values)
          )
          # In a file, a line for every window would bury the validations.
          shown = last or _crosses(10 * every.log_every, before, after)
          if shown and not self._log.console.is_terminal:
            left = (phase.total - progress.done) * len(phase.steps)
            self._log.say(
              train_log.line(after, values, left * every.batch_size)
            )
        if validated:
          with self.session.watchdog.expecting("a validation"):
            self._validate(phase)
        # Last, so that the checkpoint holds the validation's outcome: a resumed
        # run neither repeats it nor forgets how many came without a better one.
        if saved:
          self.session.save(checkpoint.LATEST)
        if stopped_by:
          break
        if validated:
          # Validation is no part of the speed of training.
          self._window_start = time.perf_counter()
      # Inside the signals' handlers: a SIGTERM while the last checkpoint is
      # still being written must not end the process.
      self._checkpoints.wait()
    return stopped_by

  def _say_finished(self, phase: Phase) -> None:
    progress = self._progress
    line = f"Finished {phase.title.lower()} at step {progress.updates:,}"
    if progress.best is not None and phase.metric != "last":
      name = phase.metric.replace("_", " ")
      line += f": best valid {name} {progress.best:.4g}"
    self._log.say(line)

  def _take_round(self, phase: Phase, compiler: Compiler) -> None:
    """Takes a round's steps, without waiting for their results.

    A call of several steps is as many rounds.
    """
    progress, learner = self._progress, self._learner
    taken: list[Update] = []
    ahead = phase.steps_per_call * len(phase.steps)
    with self._log.trace.before(progress.updates, ahead):
      for step in phase.steps:
        call = self.session.batches.next(learner.running)
        self._prepare(compiler, step, call.shape)
        taken += learner.take(step, call)
    self._window += taken
    progress.done += len(taken) // len(phase.steps)
    progress.updates += len(taken)
    self._log.after(progress.updates, learner.running)

  def _prepare(self, compiler: Compiler, step: Step, shape: Shape) -> None:
    """Waits for a step's program; says so if that takes a while."""
    program = step, shape
    if program in self._used:
      return
    self._used.add(program)
    lengths = " x ".join(map(str, shape[:3]))
    compiler.wait(
      program,
      say=lambda n: self._log.say(f"Compiling {n}, for {lengths} tokens"),
    )

  def _log_window(self, phase: Phase) -> dict[str, float]:
    """Writes the averages since the last call; waits for the devices.

    Raises:
      InputError: Too many updates in a row were skipped.
    """
    values = train_log.average(self._window)
    seconds = time.perf_counter() - self._window_start
    values["train/examples_per_second"] = values.pop("examples") / seconds
    wait = self.session.batches.wait.take()
    values["train/input_wait"] = min(1.0, wait / seconds)
    if "train/loss" in values:
      values["train/learning_rate"] = self._learner.learning_rate()
    self._log.write(self._progress.updates, phase.name, values)
    window, self._window = self._window, []
    self._report_skipped(window)
    self._window_start = time.perf_counter()
    return values

  def _report_skipped(self, window: list[Update]) -> None:
    """Names the skipped updates; raises InputError after too many in a row."""
    first = self._progress.updates - len(window) + 1
    for step, update in enumerate(window, start=first):
      if not update.sums["skipped"]:
        self._skipped_in_a_row = 0
        continue
      self._skipped_in_a_row += 1
      terms = f"{update.player} {', '.join(update.not_finite)}"
      self._log.keep(f"not_finite/{step}.json", update.to_json())
      self._log.say(
        f"Warning: step {step:,} is skipped, not finite: {terms}; examples "
        + ", ".join(map(str, update.examples))
      )
      if self._skipped_in_a_row == MAX_SKIPPED:
        # Skipped updates change nothing, so the state is still a good one.
        self.session.save(checkpoint.LATEST)
        self._checkpoints.wait()
        raise InputError(
          f"step {step:,}: not finite: {terms}, and so were the "
          f"{MAX_SKIPPED - 1} updates before; the last good state is saved in "
          f"{self._workdir}; a lower learning rate or weight of that term, in "
          "another --workdir, may help"
        )

  def _validate(self, phase: Phase) -> None:
    """Validates; saves the generator if it is the best of its phase."""
    progress = self._progress
    values = self._learner.validate(self.session.valid_batches)
    self._log.write(
      progress.updates,
      phase.name,
      {f"valid/{k}": v for k, v in values.items() if k != "loss"},
    )
    value, more = validation.selection_score(
      values, phase.metric, progress.done
    )
    best = progress.best
    better = best is None or (value > best if more else value < best)
    if better:
      # Before the save: the best checkpoint, too, counts itself as the best.
      progress.best, progress.worse = value, 0
      self.session.save(checkpoint.BEST)
    else:
      progress.worse += 1
    accuracy, distinct = map(values.get, ("emotion_accuracy", "distinct_2"))
    self._log.say(
      f"step {progress.updates:,}: valid perplexity {values['perplexity']:.2f}"
      + ("" if accuracy is None else f", emotion accuracy {accuracy:.3f}")
      + ("" if distinct is None else f", Distinct-2 {distinct:.2f}")
      + (" (best)" if better else "")
    )
