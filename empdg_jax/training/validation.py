"""Metric sums of compiled steps, and validation with them."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from empdg_jax.data.pipeline import Batch
from empdg_jax.parallel import devices


def sum_metrics(values: Iterable[dict[str, Any]]) -> dict[str, float]:
  """Adds up replicated metric sums of several steps, in float64."""
  totals: dict[str, float] = {}
  for step in values:
    for name, value in step.items():
      totals[name] = totals.get(name, 0.0) + float(devices.unreplicate(value))
  return totals


def average_metrics(sums: dict[str, float]) -> dict[str, float]:
  """Divides sums by their counts: loss, perplexities, accuracy if any."""
  averages = {
    "loss": sums["loss"] / sums["examples"],
    "perplexity": float(np.exp(sums["nll"] / sums["tokens"])),
    "perplexity_per_example": float(
      np.exp(sums["mean_nll"] / sums["examples"])
    ),
  }
  if "emotion_correct" in sums:
    averages["emotion_accuracy"] = sums["emotion_correct"] / sums["examples"]
  return averages


def validate(
  p_eval_step: Callable[..., Any], params: Any, batches: Sequence[Batch]
) -> dict[str, float]:
  """Scores a split with teacher forcing.

  Args:
    p_eval_step: The compiled `steps.eval_step`.
    params: Replicated parameters.
    batches: The split's batches.

  Returns:
    See `average_metrics`.
  """
  sums = [p_eval_step(params, devices.shard(batch))[0] for batch in batches]
  return average_metrics(sum_metrics(sums))
