"""Metrics of responses and their scores (DESIGN §9)."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import sacrebleu

Counts = tuple[int, int]


def ngrams(response: str, n: int) -> list[tuple[str, ...]]:
  """Returns the n-grams of white-space tokens.

  >>> ngrams("a b a", 2)
  [('a', 'b'), ('b', 'a')]
  """
  tokens = response.split()
  return list(zip(*(tokens[i:] for i in range(n)), strict=False))


def ngram_counts(responses: Iterable[str], n: int) -> Counts:
  """Returns the distinct and all n-grams of white-space tokens.

  >>> ngram_counts(["a b a b"], 2)
  (2, 3)
  """
  distinct: set[tuple[str, ...]] = set()
  total = 0
  for response in responses:
    found = ngrams(response, n)
    distinct.update(found)
    total += len(found)
  return len(distinct), total


def distinct_n(responses: Iterable[str], n: int) -> float:
  """Returns `100 * distinct / all` n-grams (Li et al., 2016); 0 if none.

  >>> round(distinct_n(["a b a b"], 2), 2)
  66.67
  """
  distinct, total = ngram_counts(responses, n)
  return 100.0 * distinct / total if total else 0.0


def ead_n(responses: Iterable[str], n: int, vocab_size: int) -> float:
  """Returns expectation-adjusted distinct (Liu et al., 2022).

  `100 * N / (V * (1 - ((V - 1) / V) ** C))` with N distinct and C all n-grams
  and V words in the vocabulary; 0 if there is no n-gram.

  >>> round(ead_n(["a b"], 1, vocab_size=2), 2)
  133.33
  """
  distinct, total = ngram_counts(responses, n)
  if not total:
    return 0.0
  return float(expectation_adjusted(distinct, total, vocab_size))


def expectation_adjusted(
  distinct: npt.ArrayLike, total: npt.ArrayLike, vocab_size: int
) -> np.ndarray:
  """Returns `ead_n` of N distinct and C all n-grams, element by element."""
  # expm1 and log1p keep the precision that V in the ten thousands would cost.
  seen = -np.expm1(np.asarray(total) * np.log1p(-1.0 / vocab_size))
  return 100.0 * np.asarray(distinct) / (vocab_size * seen)


def text_metrics(
  lines: Sequence[dict[str, Any]], vocab_size: int
) -> dict[str, Any]:
  """Computes every metric that predictions allow.

  Args:
    lines: What `predictions.jsonl` holds. `response` is required; `reference`,
      the pair `nll` and `tokens`, and the pair `emotion` and
      `predicted_emotion` add their metrics if every line has them.
    vocab_size: V of `ead_n`.

  Returns:
    Names and values; perplexities use natural logarithms and count EOS.
  """

  def have(*names: str) -> bool:
    return all(line.get(name) is not None for line in lines for name in names)

  responses = [line["response"] for line in lines]
  values: dict[str, Any] = {"examples": len(lines)}
  if have("nll", "tokens"):
    values["perplexity"] = math.exp(
      sum(line["nll"] for line in lines) / sum(line["tokens"] for line in lines)
    )
    values["perplexity_per_example"] = math.exp(
      sum(line["nll"] / line["tokens"] for line in lines) / len(lines)
    )
  values["emotion_accuracy"] = None
  if have("emotion", "predicted_emotion"):
    right = sum(line["emotion"] == line["predicted_emotion"] for line in lines)
    values["emotion_accuracy"] = right / len(lines)
  for n in (1, 2):
    values[f"distinct_{n}"] = distinct_n(responses, n)
  for n in (1, 2):
    values[f"ead_{n}"] = ead_n(responses, n, vocab_size)
  if have("reference"):
    references = [line["reference"] for line in lines]
    values["bleu"] = sacrebleu.corpus_bleu(
      responses, [references], tokenize="none", force=True
    ).score
  values["average_length"] = sum(len(r.split()) for r in responses) / len(lines)
  values["vocab_size"] = vocab_size
  return values
