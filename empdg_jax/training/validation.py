"""Metric sums of compiled steps, and validation with them."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from empdg_jax import metrics
from empdg_jax.data import pipeline
from empdg_jax.data.pipeline import Batch
from empdg_jax.data.prepare import Dataset
from empdg_jax.parallel import devices
from empdg_jax.training import responding


def sum_metrics(values: Iterable[dict[str, Any]]) -> dict[str, float]:
  """Adds up replicated metric sums of several steps, in float64."""
  totals: dict[str, float] = {}
  for step in values:
    for name, value in step.items():
      totals[name] = totals.get(name, 0.0) + float(devices.unreplicate(value))
  return totals


def average_metrics(sums: dict[str, float]) -> dict[str, float]:
  """Computes the loss, perplexities and any accuracy from a split's sums."""
  averages = {"loss": sums["loss"] / sums["examples"]}
  # The Transformer predicts no emotion, so it has no `emotion_correct`; metrics
  # of the responses' words need sums that no step computes.
  for name, metric in metrics.ranked():
    if metric.sums.keys() <= sums.keys() and not metric.types:
      averages[name] = float(metric.finish(sums))
  return averages


def selection_score(
  values: dict[str, float], metric: str, rounds: int
) -> tuple[float, bool]:
  """Returns what a checkpoint is chosen by, and whether more of it is better.

  By `metric`, which is the same for all systems:

  - `"perplexity"`, exp(sum of token losses / tokens): less is better;
  - `"perplexity_per_example"`, exp(mean over examples of their mean token
    loss): less is better;
  - `"emotion_accuracy"`, right predictions / examples: more is better;
  - `"joint"`, ln(perplexity_per_example) - emotion_accuracy: less is better. A
    point of accuracy outweighs 1% of perplexity. The accuracy is 0 in a system
    that predicts no emotion, so that its perplexity alone decides;
  - `"last"`, the number of rounds: more is better.

  Args:
    values: The averages of a validation; see `average_metrics`.
    metric: The name.
    rounds: The rounds of the phase that are done.

  >>> selection_score(
  ...   {"perplexity_per_example": 1.0, "emotion_accuracy": 0.4}, "joint", 3
  ... )
  (-0.4, False)
  """
  if metric == "last":
    return float(rounds), True
  if metric == "joint":
    loss = math.log(values["perplexity_per_example"])
    return loss - values.get("emotion_accuracy", 0.0), False
  return values[metric], metric == "emotion_accuracy"


# The metrics of responses that a validation logs.
OF_RESPONSES = (
  "distinct_1",
  "distinct_2",
  "bleu",
  "average_length",
  "repetition",
)


def score_responses(
  predict: Callable[[Batch], Any], dataset: Dataset, batch_size: int
) -> dict[str, float]:
  """Responds to the valid split; returns the metrics `OF_RESPONSES`.

  Args:
    predict: See `responding.respond`.
    dataset: The prepared data.
    batch_size: Contexts a step, over all devices.
  """
  examples = dataset.examples["valid"]
  shapes = pipeline.coarse_shapes(dataset.shapes)
  vocabulary = dataset.vocabulary
  lines = [
    {
      "response": " ".join(reply.tokens),
      "reference": " ".join(examples[reply.index].target.tokens),
    }
    for reply in responding.respond(
      predict, dataset.encoded("valid"), shapes, vocabulary, batch_size
    )
  ]
  values = metrics.text_metrics(lines, len(vocabulary))
  return {name: values[name] for name in OF_RESPONSES}


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
