"""Uncertainty of corpus metrics: the bootstrap over dialogues.

A dialogue's examples are not independent, so that whole dialogues are drawn
(Efron and Tibshirani, 1993). Every metric is a function of sums over examples
and of which n-grams occur at all, so that a replicate costs two products.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse
from sacrebleu.metrics import BLEU
from sacrebleu.metrics.helpers import extract_all_word_ngrams

from empdg_jax import metrics

RESAMPLES = 2_000
_BLEU_ORDER = 4


@dataclasses.dataclass(frozen=True)
class Corpus:
  """What metrics need of a split's predictions, by dialogue.

  Attributes:
    sums: By name, of a dialogue's examples: `[dialogues]`, or
      `[dialogues, 10]` for BLEU's.
    ngrams: For n = 1 and 2 which n-grams occur in a dialogue's responses,
      `[dialogues, distinct]` of 0 and 1.
    vocab_size: V of EAD.
  """

  sums: dict[str, np.ndarray]
  ngrams: dict[int, scipy.sparse.csr_array]
  vocab_size: int


def dialogues_of(lines: Sequence[dict[str, Any]]) -> np.ndarray:
  """Returns the dialogue that each line's `id` belongs to, numbered from 0."""
  names = [line["id"].rpartition(":")[0] for line in lines]
  numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
  return np.array([numbers[name] for name in names])


def _bleu_counts(line: dict[str, Any]) -> list[int]:
  """Returns n-grams that match and all, for n = 1 .. 4, and both lengths."""
  response, length = extract_all_word_ngrams(line["response"], 1, _BLEU_ORDER)
  reference, of_reference = extract_all_word_ngrams(
    line["reference"], 1, _BLEU_ORDER
  )
  orders = range(1, _BLEU_ORDER + 1)
  matches: Counter[int] = Counter()
  for ngram, count in (response & reference).items():
    matches[len(ngram)] += count
  return [
    *(matches[n] for n in orders),
    *(max(length - n + 1, 0) for n in orders),
    length,
    of_reference,
  ]


def summarize(lines: Sequence[dict[str, Any]], vocab_size: int) -> Corpus:
  """Adds predictions up by dialogue.

  Args:
    lines: What `predictions.jsonl` holds.
    vocab_size: V of EAD.

  Returns:
    What `replicate` needs; without accuracy if no emotion was predicted.
  """
  dialogue = dialogues_of(lines)
  columns: dict[str, list[Any]] = {
    "examples": [1 for _ in lines],
    "nll": [line["nll"] for line in lines],
    "tokens": [line["tokens"] for line in lines],
    "mean_nll": [line["nll"] / line["tokens"] for line in lines],
    "length": [len(line["response"].split()) for line in lines],
    "bleu": [_bleu_counts(line) for line in lines],
  }
  if all(line["predicted_emotion"] is not None for line in lines):
    columns["correct"] = [
      line["emotion"] == line["predicted_emotion"] for line in lines
    ]
  for n in (1, 2):
    columns[f"ngrams_{n}"] = [
      len(metrics.ngrams(line["response"], n)) for line in lines
    ]
  dialogues = int(dialogue.max()) + 1
  sums = {}
  for name, column in columns.items():
    values = np.array(column, float)
    sums[name] = np.zeros((dialogues, *values.shape[1:]))
    np.add.at(sums[name], dialogue, values)
  ngrams = {}
  for n in (1, 2):
    numbers: dict[tuple[str, ...], int] = {}
    cells = {
      (number, numbers.setdefault(ngram, len(numbers)))
      for number, line in zip(dialogue.tolist(), lines, strict=True)
      for ngram in metrics.ngrams(line["response"], n)
    }
    rows, cols = np.array(sorted(cells), int).reshape(-1, 2).T
    ngrams[n] = scipy.sparse.csr_array(
      (np.ones(len(rows)), (rows, cols)),
      shape=(dialogues, max(len(numbers), 1)),
    )
  return Corpus(sums, ngrams, vocab_size)


def draw(dialogues: int, seed: int = 0) -> np.ndarray:
  """Draws how often each dialogue is in each replicate.

  Args:
    dialogues: How many there are, and how many a replicate has.
    seed: Of the draws.

  Returns:
    `[RESAMPLES, dialogues]`.
  """
  rng = np.random.default_rng(seed)
  return rng.multinomial(
    dialogues, np.full(dialogues, 1.0 / dialogues), size=RESAMPLES
  )


def replicate(corpus: Corpus, counts: np.ndarray) -> dict[str, np.ndarray]:
  """Computes every metric of `metrics.text_metrics` on replicates.

  Args:
    corpus: The predictions.
    counts: How often each dialogue counts, `[replicates, dialogues]`.

  Returns:
    By name, `[replicates]`; without accuracy if no emotion was predicted.
  """
  sums = {name: counts @ values for name, values in corpus.sums.items()}
  values = {
    "perplexity": np.exp(sums["nll"] / sums["tokens"]),
    "perplexity_per_example": np.exp(sums["mean_nll"] / sums["examples"]),
    "average_length": sums["length"] / sums["examples"],
    "bleu": np.array([_bleu(row) for row in sums["bleu"].astype(int)]),
  }
  if "correct" in sums:
    values["emotion_accuracy"] = sums["correct"] / sums["examples"]
  drawn = scipy.sparse.csr_array((counts > 0).astype(float))
  for n, incidence in corpus.ngrams.items():
    distinct = (drawn @ incidence > 0).sum(axis=1)
    total = np.maximum(sums[f"ngrams_{n}"], 1.0)
    values[f"distinct_{n}"] = 100.0 * distinct / total
    values[f"ead_{n}"] = metrics.expectation_adjusted(
      distinct, total, corpus.vocab_size
    )
  return values


def _bleu(counts: np.ndarray) -> float:
  row = counts.tolist()
  correct, total = row[:_BLEU_ORDER], row[_BLEU_ORDER : 2 * _BLEU_ORDER]
  return BLEU.compute_bleu(correct, total, row[-2], row[-1]).score


def interval(value: float, replicates: np.ndarray) -> tuple[float, float]:
  """Returns the 95% bootstrap interval of a metric.

  The percentiles of the replicates, moved so that their mean lies at the
  value: a replicate repeats dialogues and so has fewer distinct n-grams than
  as many different dialogues would have.

  >>> interval(10.0, np.arange(101.0))
  (-37.5, 57.5)
  """
  low, high = np.percentile(replicates, [2.5, 97.5]) - replicates.mean()
  return value + float(low), value + float(high)


def paired_p_value(difference: float, replicates: np.ndarray) -> float:
  """Returns how likely so large a difference is if there is none.

  The paired bootstrap (Koehn, 2004): both systems on the same replicates, whose
  differences are moved to 0.

  Args:
    difference: Of the two systems on the split.
    replicates: The same on every replicate.

  Returns:
    The two-sided p-value, at least `1 / (replicates + 1)`.

  >>> paired_p_value(1.0, np.array([0.5, 1.0, 1.5]))
  0.25
  """
  centred = np.abs(replicates - replicates.mean())
  beyond = int(np.sum(centred >= abs(difference)))
  return (beyond + 1) / (len(replicates) + 1)


def holm(p_values: Sequence[float]) -> list[float]:
  """Corrects p-values for how many they are (Holm, 1979).

  >>> holm([0.04, 0.01, 0.03])
  [0.06, 0.03, 0.06]
  """
  ascending = np.sort(p_values)
  factors = np.arange(len(ascending), 0, -1)
  corrected = np.minimum(np.maximum.accumulate(factors * ascending), 1.0)
  return corrected[np.searchsorted(ascending, p_values)].tolist()
