"""Uncertainty of corpus metrics: intervals over dialogues, paired tests.

The examples of a dialogue are not independent, so whole dialogues are drawn,
left out or swapped. Every metric is a function of sums over examples and of
which types, such as n-grams, occur at all; so all replicates together cost one
matrix product for each sum and each set of types.

Means get bootstrap intervals (Efron and Tibshirani, 1993). A number of types is
no mean: a bootstrap repeats dialogues and so their n-grams, and its intervals
are far too narrow. Metrics that count types get intervals by the jackknife,
which leaves out one dialogue at a time. P-values come from permutations within
dialogues (Noreen, 1989).
"""

import dataclasses
import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import scipy.sparse
import scipy.stats

from empdg_jax import metrics

RESAMPLES = 2_000  # Replicates of a bootstrap.
# More than those: the smallest p-value is multiplied by the number of pairs.
PERMUTATIONS = 10_000
_AT_ONCE = 1_000  # Permutations in memory at a time.
# A type in so many dialogues is absent in one of 2^40 permutations: never.
_SURELY_PRESENT = 40


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


Numbers = dict[str, dict[Hashable, int]]


def summarize(
  lines: Sequence[metrics.Line],
  vocab_size: int,
  numbers: Numbers | None = None,
) -> Corpus:
  """Adds predictions up by dialogue.

  Args:
    lines: The lines of a `predictions.jsonl`.
    vocab_size: V of EAD.
    numbers: By name, the columns of types, which grow. Corpora that are
      compared with each other share them.

  Returns:
    The input of `replicate`, `jackknife` and `permute`.
  """
  numbers = {} if numbers is None else numbers
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
    columns = numbers.setdefault(name, {})
    cells = [
      (number, columns.setdefault(item, len(columns)))
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


def means_of(corpus: Corpus) -> Corpus:
  """Returns a corpus without the metrics that count types."""
  means = {n: m for n, m in corpus.metrics.items() if not m.types}
  return dataclasses.replace(corpus, metrics=means, types={})


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
  totals: dict[str, Any] = {}
  totals |= {name: counts @ values for name, values in corpus.sums.items()}
  # A type that is drawn twice is still one type. Sparse times sparse, as a
  # dense [replicates, distinct] array of bigrams would take gigabytes.
  drawn = scipy.sparse.csr_array((counts > 0).astype(float))
  totals |= {
    name: (drawn @ occurrences > 0).sum(axis=1)
    for name, occurrences in corpus.types.items()
  }
  return _finish(corpus, totals)


def _finish(corpus: Corpus, totals: dict[str, Any]) -> dict[str, np.ndarray]:
  """Returns every metric of totals, `[replicates]` by name."""
  totals = {"vocab_size": corpus.vocab_size, **totals}
  return {
    name: np.asarray(metric.finish(totals))
    for name, metric in corpus.metrics.items()
  }


def jackknife(corpus: Corpus) -> dict[str, np.ndarray]:
  """Computes every metric that counts types without one dialogue at a time.

  Returns:
    By name, `[dialogues]`.
  """
  totals: dict[str, Any] = {
    name: values.sum(axis=0) - values for name, values in corpus.sums.items()
  }
  for name, occurrences in corpus.types.items():
    present = (occurrences > 0).astype(int)
    dialogues_of_type = np.asarray(present.sum(axis=0))
    alone = present @ (dialogues_of_type == 1).astype(int)
    totals[name] = np.sum(dialogues_of_type > 0) - alone
  return _finish(_counting(corpus), totals)


def _counting(corpus: Corpus) -> Corpus:
  """Returns a corpus without the metrics that count no types."""
  counting = {n: m for n, m in corpus.metrics.items() if m.types}
  return dataclasses.replace(corpus, metrics=counting)


def jackknife_variance(corpora: Sequence[Corpus]) -> dict[str, float]:
  """Estimates the variance of every metric that counts types.

  The jackknife's estimate is too large on average, by what dialogues add
  together rather than each alone (Efron and Stein, 1981). Of a number of types
  these terms are known: a type that only dialogues i and j have is lost with
  both. So the second-order term, from the types of exactly two dialogues, is
  taken off, and the third-order one added, as in the series
  `1 - exp(-x) = x - x^2 / 2 + x^3 / 6 - ...` of rare types.

  Args:
    corpora: The predictions of a system's runs, on the same examples.

  Returns:
    By name, the variance over dialogues of the metric's mean over the runs.
  """
  without = [jackknife(corpus) for corpus in corpora]
  terms = [_shared_types(corpus) for corpus in corpora]
  variances = {}
  for name in without[0]:
    if not all(name in of_run for of_run in without):
      continue
    left_out = np.mean([w[name] for w in without], axis=0)
    count = len(left_out)
    first = (count - 1) / count * np.sum((left_out - left_out.mean()) ** 2)
    # Never less than half, should the series converge badly.
    shared = np.mean([t[name] for t in terms]) / len(corpora)
    variances[name] = float(max(first - shared, first / 2))
  return variances


def _shared_types(corpus: Corpus) -> dict[str, float]:
  """Returns the terms of higher order in `jackknife_variance`."""
  totals: dict[str, Any] = {
    name: values.sum(axis=0) for name, values in corpus.sums.items()
  }
  terms = {}
  for name, occurrences in corpus.types.items():
    columns = (occurrences > 0).tocsc()
    numbers = np.diff(columns.indptr)
    totals[name] = np.sum(numbers > 0)
    terms[name] = 0.0
    for order, sign in ((2, 1), (3, -1)):
      starts = columns.indptr[:-1][numbers == order]
      owners = columns.indices[starts[:, None] + np.arange(order)]
      _, alike = np.unique(owners, axis=0, return_counts=True)
      terms[name] += sign * float(np.sum(alike**2))
  own = _counting(corpus)
  values = _finish(own, totals)
  found = dict.fromkeys(values, 0.0)
  for name, term in terms.items():
    # How much one type more adds to each metric.
    more = _finish(own, totals | {name: totals[name] + 1})
    for metric, value in more.items():
      found[metric] += term * float(value - values[metric]) ** 2
  return found


def normal_interval(value: float, variance: float) -> tuple[float, float]:
  """Returns the 95% interval of a metric from its variance.

  >>> low, high = normal_interval(1.0, 0.25)
  >>> round(low, 3), round(high, 3)
  (0.02, 1.98)
  """
  # The standard normal distribution's 97.5th percentile.
  reach = 1.959964 * math.sqrt(variance)
  return value - reach, value + reach


def draw_swaps(dialogues: int, seed: int = 0) -> np.ndarray:
  """Draws which dialogues two systems swap in each permutation.

  Returns:
    `[PERMUTATIONS, dialogues]` bool.
  """
  rng = np.random.default_rng(seed)
  return rng.integers(0, 2, (PERMUTATIONS, dialogues), np.uint8).astype(bool)


def permute(
  one: Corpus, two: Corpus, swaps: np.ndarray
) -> dict[str, np.ndarray]:
  """Computes how two runs would differ if they had swapped some dialogues.

  Args:
    one: The first run's predictions.
    two: The second run's, of the same examples and with the same `Numbers`.
    swaps: Which dialogues they swap, `[permutations, dialogues]` bool.

  Returns:
    By name, the first run's metric minus the second's, `[permutations]`.
  """
  parts = [
    _permute(one, two, swaps[first : first + _AT_ONCE].astype(np.float32))
    for first in range(0, len(swaps), _AT_ONCE)
  ]
  return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}


def _permute(
  one: Corpus, two: Corpus, swaps: np.ndarray
) -> dict[str, np.ndarray]:
  """Returns what `permute` does; `swaps` is float32."""
  first, second = {}, {}
  exact = swaps.astype(float)
  for name, own in one.sums.items():
    if name in two.sums:
      moved = exact @ (two.sums[name] - own)
      first[name] = own.sum(axis=0) + moved
      second[name] = two.sums[name].sum(axis=0) - moved
  for name, own in one.types.items():
    if name in two.types:
      first[name], second[name] = _count_types(own, two.types[name], swaps)
  found = _finish(_both(one, two), first), _finish(_both(one, two), second)
  return {name: found[0][name] - found[1][name] for name in found[0]}


def _both(one: Corpus, two: Corpus) -> Corpus:
  """Returns the first corpus with the metrics that the second has as well."""
  shared = {n: m for n, m in one.metrics.items() if n in two.metrics}
  return dataclasses.replace(one, metrics=shared)


def _count_types(
  one: scipy.sparse.csr_array, two: scipy.sparse.csr_array, swaps: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns both runs' numbers of types after swaps, `[permutations]` each."""
  width = max(one.shape[1], two.shape[1])
  present = []
  for run in (one, two):
    own = (run > 0).astype(np.float32)
    parts = own.data, own.indices, own.indptr
    present.append(scipy.sparse.csr_array(parts, shape=(own.shape[0], width)))
  own, other = present
  dialogues = np.asarray(own.sum(axis=0) + other.sum(axis=0))
  # Types of many dialogues are always there, and so are those that both runs
  # have in one dialogue: whoever gets it has the type.
  shared = np.asarray(own.multiply(other).sum(axis=0)) > 0
  surely = shared | (dialogues > _SURELY_PRESENT)
  rare = ~surely & (dialogues > 0)
  own, other = own.tocsc()[:, rare], other.tocsc()[:, rare]
  # How often the first run has each type; the second has all other times.
  times = (swaps @ (other - own)) + np.asarray(own.sum(axis=0))
  always = int(surely.sum())
  return (
    always + np.sum(times > 0.5, axis=1),
    always + np.sum(times < dialogues[rare] - 0.5, axis=1),
  )


def permutation_p_value(difference: float, permuted: np.ndarray) -> float:
  """Returns the two-sided p-value of a difference between two systems.

  Args:
    difference: The difference on the split.
    permuted: The difference in every permutation, `[permutations]`.

  Returns:
    The p-value, at least `1 / (permutations + 1)`.

  >>> permutation_p_value(1.0, np.array([0.5, -1.0, 0.0]))
  0.5
  """
  # Equal differences may be apart by rounding.
  least = abs(difference) * (1 - 1e-9)
  # The split itself counts as a permutation, so that no p-value is 0.
  return (int(np.sum(np.abs(permuted) >= least)) + 1) / (len(permuted) + 1)


def exact_p_value(differences: Sequence[int] | np.ndarray) -> float:
  """Returns the two-sided p-value of all permutations within dialogues.

  With one example a dialogue and one run a system this is McNemar's exact test
  (1947).

  Args:
    differences: In each dialogue, how many more examples of the first system
      have a property than of the second, `[dialogues]` whole numbers.

  >>> round(exact_p_value([1, 1, 1, -1, 0]), 9)  # McNemar: 2 * 5 / 16.
  0.625
  >>> round(exact_p_value([2, 1]), 9)  # The sums are 3, 1, -1 and -3.
  0.5
  """
  sizes = np.abs(np.asarray(differences, int))
  # The distribution of the number of points that go to the first system.
  chances = np.ones(1)
  for size, count in enumerate(np.bincount(sizes)):
    if size and count:
      steps = np.zeros(size * count + 1)
      steps[::size] = scipy.stats.binom.pmf(np.arange(count + 1), count, 0.5)
      chances = np.convolve(chances, steps)
  sums = 2 * np.arange(len(chances)) - sizes.sum()
  least = abs(int(np.sum(differences)))
  return min(1.0, float(chances[np.abs(sums) >= least].sum()))


def compare_runs(
  pairs: Sequence[tuple[Corpus, Corpus]], swaps: np.ndarray
) -> dict[str, tuple[float, float]]:
  """Tests two systems, all of whose runs swap the same dialogues together.

  Args:
    pairs: The runs of both systems, one of each in a pair.
    swaps: The result of `draw_swaps`.

  Returns:
    By metric, the mean difference between the runs of a pair, and its p-value:
    exact for shares of examples.
  """
  none = np.zeros((1, swaps.shape[1]), bool)
  drawn = [permute(*pair, np.concatenate([none, swaps])) for pair in pairs]
  results = {}
  for name in drawn[0]:
    if not all(name in of_pair for of_pair in drawn):
      continue
    difference, *permuted = np.mean([d[name] for d in drawn], axis=0)
    share = pairs[0][0].metrics[name].share_of
    if share:
      more = sum(one.sums[share] - two.sums[share] for one, two in pairs)
      p_value = exact_p_value(np.asarray(more))
    else:
      p_value = permutation_p_value(float(difference), np.array(permuted))
    results[name] = float(difference), p_value
  return results


def interval(value: float, replicates: np.ndarray) -> tuple[float, float]:
  """Returns the 95% bootstrap interval of a metric.

  The percentiles of the replicates, shifted so that their mean lies at the
  value.

  >>> interval(10.0, np.arange(101.0))
  (-37.5, 57.5)
  """
  # Shifted, since functions of means, such as perplexity, are biased.
  low, high = np.percentile(replicates, [2.5, 97.5]) - replicates.mean()
  return value + float(low), value + float(high)


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
