"""What training says of itself: lines, metrics, traces."""

import contextlib
import math
import pathlib
from collections.abc import Generator, Sequence
from typing import Any

import jax
import rich.console

from empdg_jax import config as config_lib
from empdg_jax.config import SaveError, TrainConfig
from empdg_jax.parallel import hosts
from empdg_jax.training import validation
from empdg_jax.training.learner import DISCRIMINATOR, GENERATOR, Sums
from empdg_jax.training.metric_writer import MetricWriter
from empdg_jax.training.profiling import Trace

_SHOWN = {
  "perplexity": "train/perplexity",
  "emotion accuracy": "train/emotion_accuracy",
  "Wasserstein": "discriminator/wasserstein",
  "slope": "discriminator/gradient_norm",
}


class TrainLog:
  """A run's lines on the console, its metrics and its trace, on one host.

  What cannot be copied to the run folder costs a warning: a log is not worth a
  run.

  Attributes:
    console: Where the lines go; quiet on the other hosts.
  """

  def __init__(self, config: TrainConfig, workdir: pathlib.Path) -> None:
    """Writes nothing yet.

    Raises:
      InputError: Nothing can be traced here; see `Trace`.
    """
    main = hosts.is_main_process()
    self.console = rich.console.Console(quiet=not main)
    self._workdir = workdir
    self._profile_steps = config.profile_steps
    self._trace = Trace(
      config_lib.profile_range(config) if main else None,
      workdir / "tensorboard",
    )
    self._writer: MetricWriter | None = None

  def open(self, step: int) -> None:
    """Opens the files, forgetting what was logged after a step."""
    self._say_missed(step, f"training goes on from step {step:,}")
    if hosts.is_main_process():
      self._writer = MetricWriter(self._workdir, step)

  def say(self, line: str) -> None:
    """Prints a line, not folded, whatever the terminal's width."""
    self.console.print(line, soft_wrap=True, highlight=False, markup=False)

  def write(self, step: int, phase: str, values: dict[str, float]) -> None:
    """Writes metrics of a step."""
    if self._writer is not None:
      self._writer.write(step, phase, values)

  def save(self) -> None:
    """Copies the files to the run folder, if it is in a bucket."""
    with self._warning():
      if self._writer is not None:
        self._writer.copy()

  def before(
    self, step: int, ahead: int
  ) -> contextlib.AbstractContextManager[Any]:
    """Traces the next steps if it is time; see `Trace.before`."""
    return self._trace.before(step, ahead)

  def after(self, step: int, result: jax.Array | None) -> None:
    """Ends the trace if it is time; see `Trace.after`."""
    with self._warning():
      self._say_traced(self._trace.after(step, result))

  def finish(self, step: int) -> None:
    """Is told of the last step, after which nothing is traced."""
    self._say_missed(math.inf, f"training has ended at step {step:,}")

  def close(self) -> None:
    """Ends the trace, and closes the files."""
    with self._warning():
      self._say_traced(self._trace.close())
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
    """Says that nothing is traced, if that is certain from a step on."""
    if self._trace.missed(step):
      self.say(
        f"Warning: config.train.profile_steps={self._profile_steps}: nothing "
        f"is traced: {why}"
      )


def average(taken: Sequence[Sums]) -> dict[str, float]:
  """Averages the metric sums of several updates; waits for the devices.

  Args:
    taken: The updates.

  Returns:
    Values by their names in `metrics.jsonl`, and under `"examples"` how many
    examples the updates took.
  """
  sums = {
    kind: validation.sum_metrics(s for k, s in taken if k == kind)
    for kind in {kind for kind, _ in taken}
  }
  values = {"examples": 0.0}
  if GENERATOR in sums:
    of_generator = sums[GENERATOR]
    examples = of_generator["examples"]
    averages = validation.average_metrics(of_generator)
    for name in ("loss", "perplexity", "emotion_accuracy"):
      if name in averages:
        values[f"train/{name}"] = averages[name]
    if "signal" in of_generator:
      judged = max(of_generator["judged"], 1.0)
      values["generator/signal"] = of_generator["signal"] / judged
      values["generator/signal_grad_norm"] = (
        of_generator["signal_grad_norm"] / examples
      )
    values["examples"] += examples
  if DISCRIMINATOR in sums:
    of_discriminators = sums[DISCRIMINATOR]
    judged = of_discriminators.pop("examples")
    for name, total in of_discriminators.items():
      values[f"discriminator/{name}"] = total / max(judged, 1.0)
    values["examples"] += judged
  return values


def not_finite(taken: Sequence[Sums]) -> tuple[int, str] | None:
  """Finds the first update of which a term is not finite.

  Args:
    taken: The updates.

  Returns:
    Its number in `taken`, and its kind and terms in words; None if all are
    finite.
  """
  for number, (kind, sums) in enumerate(taken):
    terms = [
      name
      for name, value in validation.sum_metrics([sums]).items()
      if not math.isfinite(value)
    ]
    if terms:
      return number, f"{kind} {', '.join(terms)}"
  return None


def speed(values: dict[str, float]) -> str:
  """Returns what people want to see of the speed."""
  return (
    f"{values['train/examples_per_second']:,.0f} examples/s, waiting for input "
    f"{values['train/input_wait']:.0%}"
  )


def line(step: int, values: dict[str, float], examples_left: int) -> str:
  """Returns a line for those who read a log rather than a progress bar.

  Args:
    step: The latest update.
    values: What was written to `metrics.jsonl`.
    examples_left: Until the phase's end.
  """
  minutes = examples_left / values["train/examples_per_second"] / 60
  shown = [f"{k} {values[n]:.4g}" for k, n in _SHOWN.items() if n in values]
  return (
    f"step {step:,}: {', '.join(shown)}, {speed(values)}, ETA {minutes:.0f} min"
  )
