"""Uncertainty of corpus metrics: the bootstrap over dialogues.

The examples of a dialogue are not independent, so whole dialogues are drawn
(Efron and Tibshirani, 1993). Every metric is a function of sums over examples
and of which types, such as n-grams, occur at all; so all replicates together
cost one matrix product for each sum and each set of types.
"""

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import scipy.sparse

from empdg_jax import metrics

RESAMPLES = 2_000


@dataclasses.dataclass(frozen=True)
class Corpus:
  """The predictions on a split, added up by dialogue.

  Attributes:
    metrics: The metrics that the predictions allow, by name.
    sums: By name, the sum over each dialogue's examples: `[dialogues]`, or
      `[dialogues, k]` of arrays.
    types: By name, how often each type occurs in each dialogue,
      `[dialogues, distinct]`.
    vocab_size: V of EAD.
  """

  metrics: dict[str, metrics.Metric]
  sums: dict[str, np.ndarray]
  types: dict[str, scipy.sparse.csr_array]
  vocab_size: int


def dialogues_of(lines: Sequence[metrics.Line]) -> np.ndarray:
  """Returns each line's dialogue, numbered from 0 by first appearance."""
  # An id is `conversation:DIALOGUE:TURN`.
  names = [line["id"].rpartition(":")[0] for line in lines]
  numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
  return np.array([numbers[name] for name in names])


def summarize(lines: Sequence[metrics.Line], vocab_size: int) -> Corpus:
  """Adds predictions up by dialogue.

  Args:
    lines: The lines of a `predictions.jsonl`.
    vocab_size: V of EAD.

  Returns:
    The input of `replicate`.
  """
  dialogue = dialogues_of(lines)

  def by_dialogue(rows: Sequence[int], columns: Sequence[int]) -> Any:
    """Returns how often a column is in a dialogue, `[dialogues, columns]`."""
    # Entries of one cell add up. The shape is explicit because there may be no
    # column at all, for instance no bigram.
    return scipy.sparse.csr_array(
      (np.ones(len(rows)), (rows, columns)),
      shape=(int(dialogue.max()) + 1, max(columns, default=0) + 1),
    )

  present, shares, items = metrics.contributions(lines)
  members = by_dialogue(dialogue.tolist(), range(len(lines)))
  types = {}
  for name, of_lines in items.items():
    numbers: dict[Hashable, int] = {}
    cells = [
      (number, numbers.setdefault(item, len(numbers)))
      for number, found in zip(dialogue.tolist(), of_lines, strict=True)
      for item in found
    ]
    types[name] = by_dialogue([d for d, _ in cells], [t for _, t in cells])
  return Corpus(
    present,
    {n: members @ np.array(column, float) for n, column in shares.items()},
    types,
    vocab_size,
  )


def draw(dialogues: int, seed: int = 0) -> np.ndarray:
  """Draws how often each dialogue occurs in each replicate.

  Args:
    dialogues: The number of dialogues, in the split and in each replicate.
    seed: The seed of the draws.

  Returns:
    `[RESAMPLES, dialogues]`.
  """
  rng = np.random.default_rng(seed)
  return rng.multinomial(
    dialogues, np.full(dialogues, 1.0 / dialogues), size=RESAMPLES
  )


def replicate(corpus: Corpus, counts: np.ndarray) -> dict[str, np.ndarray]:
  """Computes every metric of the corpus on replicates.

  Args:
    corpus: The predictions.
    counts: How often each dialogue counts, `[replicates, dialogues]`.

  Returns:
    By name, `[replicates]`.
  """
  totals: dict[str, Any] = {"vocab_size": corpus.vocab_size}
  totals |= {name: counts @ values for name, values in corpus.sums.items()}
  # A type that is drawn twice is still one type. Sparse times sparse, as a
  # dense [replicates, distinct] array of bigrams would take gigabytes.
  drawn = scipy.sparse.csr_array((counts > 0).astype(float))
  totals |= {
    name: (drawn @ occurrences > 0).sum(axis=1)
    for name, occurrences in corpus.types.items()
  }
  return {
    name: np.asarray(metric.finish(totals))
    for name, metric in corpus.metrics.items()
  }


def interval(value: float, replicates: np.ndarray) -> tuple[float, float]:
  """Returns the 95% bootstrap interval of a metric.

  The percentiles of the replicates, shifted so that their mean lies at the
  value.

  >>> interval(10.0, np.arange(101.0))
  (-37.5, 57.5)
  """
  # Unshifted, the interval of Distinct would miss the value: a replicate
  # repeats dialogues, so it has fewer distinct n-grams than the split.
  low, high = np.percentile(replicates, [2.5, 97.5]) - replicates.mean()
  return value + float(low), value + float(high)


def paired_p_value(difference: float, replicates: np.ndarray) -> float:
  """Returns the two-sided p-value of a difference between two systems.

  The paired bootstrap (Koehn, 2004): both systems on the same replicates, whose
  differences are shifted to a mean of 0, the null hypothesis.

  Args:
    difference: The difference on the split.
    replicates: The difference on every replicate, `[replicates]`.

  Returns:
    The p-value, at least `1 / (replicates + 1)`.

  >>> paired_p_value(1.0, np.array([0.5, 1.0, 1.5]))
  0.25
  """
  centred = np.abs(replicates - replicates.mean())
  beyond = int(np.sum(centred >= abs(difference)))
  # The split itself counts as a replicate, so that no p-value is 0.
  return (beyond + 1) / (len(replicates) + 1)


def holm(p_values: Sequence[float]) -> list[float]:
  """Corrects p-values for multiple testing (Holm, 1979).

  >>> holm([0.04, 0.01, 0.03])
  [0.06, 0.03, 0.06]
  """
  ascending = np.sort(p_values)
  factors = np.arange(len(ascending), 0, -1)
  # A larger p-value may not end up below a smaller one, hence the maximum.
  corrected = np.minimum(np.maximum.accumulate(factors * ascending), 1.0)
  return corrected[np.searchsorted(ascending, p_values)].tolist()
