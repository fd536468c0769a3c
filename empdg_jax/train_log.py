"""What training says of itself: averages, warnings of losses, lines."""

import math
from collections.abc import Sequence

from empdg_jax import evaluate
from empdg_jax.players import DISCRIMINATOR, GENERATOR, Sums

_SHOWN = {
  "perplexity": "train/perplexity",
  "emotion accuracy": "train/emotion_accuracy",
  "Wasserstein": "discriminator/wasserstein",
  "slope": "discriminator/gradient_norm",
}


def average(taken: Sequence[Sums]) -> dict[str, float]:
  """Averages the metric sums of several updates; waits for the devices.

  Args:
    taken: The updates.

  Returns:
    Values by their names in `metrics.jsonl`, and under `"examples"` how many
    examples the updates took.
  """
  sums = {
    kind: evaluate.sum_metrics(s for k, s in taken if k == kind)
    for kind in {kind for kind, _ in taken}
  }
  values = {"examples": 0.0}
  if GENERATOR in sums:
    of_generator = sums[GENERATOR]
    examples = of_generator["examples"]
    averages = evaluate.average_metrics(of_generator)
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
    of_critics = sums[DISCRIMINATOR]
    judged = of_critics.pop("examples")
    for name, total in of_critics.items():
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
      for name, value in evaluate.sum_metrics([sums]).items()
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
