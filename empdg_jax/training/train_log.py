"""The log of training: lines on the console, metrics and traces."""

import contextlib
import math
import pathlib
from collections import Counter
from collections.abc import Generator, Sequence

import jax
import rich.console

from empdg_jax import config as config_lib
from empdg_jax import storage
from empdg_jax.config import SaveError, TrainConfig
from empdg_jax.parallel import hosts
from empdg_jax.training import terminal, validation
from empdg_jax.training.learner import Update
from empdg_jax.training.metric_writer import MetricWriter
from empdg_jax.training.profiling import Trace
from empdg_jax.training.train_state import DISCRIMINATOR, GENERATOR

_SHOWN = {
  "perplexity": "train/perplexity",
  "emotion accuracy": "train/emotion_accuracy",
  "Wasserstein": "discriminator/wasserstein",
  "slope": "discriminator/gradient_norm",
}


class TrainLog:
  """A run's lines on the console, its metrics and its trace.

  All hosts call it, and the first one writes. A failed copy to the run folder
  only warns: a lost log must not end a run.

  Attributes:
    console: The console that lines go to; quiet on the other hosts.
    trace: The trace; `after` and `close` end it.
  """

  def __init__(self, config: TrainConfig, workdir: pathlib.Path) -> None:
    """Checks the range to trace; writes nothing yet.

    Raises:
      InputError: Tracing is impossible on this machine; see `Trace`.
    """
    main = hosts.is_main_process()
    self.console = rich.console.Console(quiet=not main)
    self._workdir = workdir
    self._profile_steps = config.profile_steps
    self.trace = Trace(
      config_lib.profile_range(config) if main else None,
      workdir / "tensorboard",
    )
    self._writer: MetricWriter | None = None

  def open(self, step: int, phase: str) -> None:
    """Opens the files and drops the metrics logged after a phase's step."""
    self._say_missed(step, f"training goes on from step {step:,}")
    if hosts.is_main_process():
      self._writer = MetricWriter(self._workdir, step, phase)

  def say(self, line: str) -> None:
    """Prints a line; see `terminal.say`."""
    terminal.say(line, self.console)

  def write(self, step: int, phase: str, values: dict[str, float]) -> None:
    """Writes a step's metrics."""
    if self._writer is not None:
      self._writer.write(step, phase, values)

  def keep(self, name: str, text: str) -> None:
    """Writes a file into the run folder."""
    if hosts.is_main_process():
      path = self._workdir / name
      with self._warning(), storage.errors(f"cannot write {path}", SaveError):
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.write_text(path, text)

  def save(self) -> None:
    """Copies the metrics to the run folder, if it is in a bucket."""
    with self._warning():
      if self._writer is not None:
        self._writer.copy()

  def after(self, step: int, result: jax.Array | None) -> None:
    """Ends the trace if it is due; see `Trace.after`."""
    with self._warning():
      self._say_traced(self.trace.after(step, result))

  def finish(self, step: int) -> None:
    """Marks the end of training, after which nothing is traced."""
    self._say_missed(math.inf, f"training has ended at step {step:,}")

  def close(self) -> None:
    """Ends the trace and closes the files."""
    # Apart, so that a trace that cannot be copied still leaves the metrics.
    with self._warning():
      self._say_traced(self.trace.close())
    with self._warning():
      if self._writer is not None:
        self._writer.close()

  @contextlib.contextmanager
  def _warning(self) -> Generator[None]:
    try:
      yield
    except SaveError as error:
      self.say(f"Warning: {error}")

  def _say_traced(self, folder: pathlib.Path | None) -> None:
    if folder is not None:
      self.say(
        f"Profile in {folder}. To look at it: pip install xprof, then "
        f"xprof --logdir={self._workdir / 'tensorboard'}"
      )

  def _say_missed(self, step: float, why: str) -> None:
    """Warns, once, if a trace not begun by `step` never will be."""
    if self.trace.missed(step):
      self.say(
        f"Warning: config.train.profile_steps={self._profile_steps}: nothing "
        f"is traced: {why}"
      )


def average(taken: Sequence[Update]) -> dict[str, float]:
  """Averages the metric sums of several updates; waits for the devices.

  Args:
    taken: The updates.

  Returns:
    Values by their names in `metrics.jsonl`, of the updates that were not
    skipped; and the number of examples of all under `"examples"`.
  """
  sums = [(u.player, u.sums) for u in taken]

  def summed(player: str) -> dict[str, float]:
    totals: Counter[str] = Counter()
    for its_player, values in sums:
      if its_player == player and not values["skipped"]:
        totals.update(values)
    return dict(totals)

  values = {"examples": sum(values["examples"] for _, values in sums)}
  if number := sum(values["skipped"] for _, values in sums):
    values["train/skipped_updates"] = number
  if generator := summed(GENERATOR):
    examples = generator["examples"]
    averages = validation.average_metrics(generator)
    shown = ("loss", "perplexity", "emotion_accuracy")
    values |= {f"train/{n}": averages[n] for n in shown if n in averages}
    values["train/gradient_norm"] = generator["grad_norm"] / examples
    if "signal" in generator:
      # Only examples with feedback are judged; a batch may have none.
      judged = max(generator["judged"], 1.0)
      values["generator/signal"] = generator["signal"] / judged
      values["generator/signal_grad_norm"] = (
        generator["signal_grad_norm"] / examples
      )
      values["generator/signal_weight"] = generator["signal_weight"] / examples
  if discriminators := summed(DISCRIMINATOR):
    judged = discriminators.pop("examples")
    values |= {
      f"discriminator/{name}": total / max(judged, 1.0)
      for name, total in discriminators.items()
      if name != "skipped"
    }
  return values


def speed(values: dict[str, float]) -> str:
  """Returns the speed and the wait for input in words."""
  return (
    f"{values['train/examples_per_second']:,.0f} examples/s, waiting for input "
    f"{values['train/input_wait']:.0%}"
  )


def line(step: int, values: dict[str, float], examples_left: int) -> str:
  """Returns a line of averages for a log file, which has no progress bar.

  Args:
    step: The number of updates so far.
    values: The values written to `metrics.jsonl`.
    examples_left: The number of examples until the phase's end.
  """
  minutes = examples_left / values["train/examples_per_second"] / 60
  shown = [f"{k} {values[n]:.4g}" for k, n in _SHOWN.items() if n in values]
  return (
    f"step {step:,}: {', '.join(shown)}, {speed(values)}, ETA {minutes:.0f} min"
  )
