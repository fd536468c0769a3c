"""The registry of metrics: one record for each, read by everything else."""

import dataclasses
import re
from collections import ChainMap, Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from sacrebleu.metrics import BLEU

Line = Mapping[str, Any]
Totals = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Metric:
  """The definition of a metric: sums over examples, and a function of them.

  Sums and types have names. Metrics that use the same one give it the same
  name, and it is computed once.

  Attributes:
    title: The metric's name in tables.
    decimals: The number of decimal places, wherever it is printed.
    needs: The fields of a prediction line that it needs besides `response`.
    sums: By name, an example's share of a sum, a number or an array `[k]`.
    finish: Computes the metric from totals: the sums and the numbers of
      distinct types by name, and the numbers `examples` and `vocab_size`. A
      total is a number (or `[k]`) for a corpus and `[replicates]` (or
      `[replicates, k]`) in a bootstrap.
    types: By name, the items of an example whose distinct ones are counted.
    rank: Its place in `metrics.json`; equal ranks follow the tables.
    null: Whether `metrics.json` has a null if a line lacks a field. Other
      metrics are left out.
    share_of: If the metric is the share of examples with some property, the
      name of the sum that counts them.
  """

  title: str
  decimals: int
  needs: tuple[str, ...]
  sums: dict[str, Callable[[Line], Any]]
  finish: Callable[[Totals], Any]
  types: dict[str, Callable[[Line], Iterable[Hashable]]] = dataclasses.field(
    default_factory=dict
  )
  rank: int = 3
  null: bool = False
  share_of: str = ""


def ngrams(response: str, n: int) -> list[tuple[str, ...]]:
  """Returns the n-grams of white-space tokens.

  >>> ngrams("a b a", 2)
  [('a', 'b'), ('b', 'a')]
  """
  tokens = response.split()
  return list(zip(*(tokens[i:] for i in range(n)), strict=False))


def ngram_counts(responses: Iterable[str], n: int) -> tuple[int, int]:
  """Returns the numbers of distinct and of all n-grams.

  >>> ngram_counts(["a b a b"], 2)
  (2, 3)
  """
  found = [ngram for response in responses for ngram in ngrams(response, n)]
  return len(set(found)), len(found)


def distinct_n(responses: Iterable[str], n: int) -> float:
  """Returns `100 * distinct / all` n-grams (Li et al., 2016); 0 if none.

  >>> round(distinct_n(["a b a b"], 2), 2)
  66.67
  """
  return float(_distinct(*ngram_counts(responses, n)))


def ead_n(responses: Iterable[str], n: int, vocab_size: int) -> float:
  """Returns the expectation-adjusted distinct score (Liu et al., 2022).

  `100 * N / (V * (1 - ((V - 1) / V) ** C))` with N distinct n-grams among C
  and V words in the vocabulary; 0 if there is no n-gram.

  >>> round(ead_n(["a b"], 1, vocab_size=2), 2)
  133.33
  """
  return float(_expectation_adjusted(*ngram_counts(responses, n), vocab_size))


def _distinct(distinct: Any, total: Any, *_: Any) -> Any:
  """Returns `distinct_n`, element by element."""
  return 100.0 * distinct / np.maximum(total, 1)


def _expectation_adjusted(distinct: Any, total: Any, vocab_size: int) -> Any:
  """Returns `ead_n`, element by element."""
  # A direct power would round away most digits of (V - 1) / V when V is in the
  # ten thousands; expm1 and log1p keep them.
  seen = -np.expm1(np.maximum(total, 1) * np.log1p(-1.0 / vocab_size))
  return 100.0 * distinct / (vocab_size * seen)


def _ngram_metric(
  title: str, n: int, finish: Callable[..., Any], most: int | None = None
) -> Metric:
  """Returns the metric of n-grams that `finish` computes from their counts.

  Args:
    title: The metric's name without its n.
    n: The length of the n-grams.
    finish: `_distinct` or `_expectation_adjusted`.
    most: The number of tokens after which a response is cut; None for none. A
      greedy response cut there is what decoding with fewer steps gives.
  """
  cut = "" if most is None else f"_at_{most}"
  total, distinct = f"ngrams_{n}{cut}", f"distinct_ngrams_{n}{cut}"

  def items(line: Line) -> list[tuple[str, ...]]:
    # A response has at most as many n-grams as it has tokens.
    found = ngrams(line["response"], n)
    return found if most is None else found[: max(0, most - n + 1)]

  return Metric(
    f"{title}-{n}" + ("" if most is None else f" at {most} tokens"),
    2,
    (),
    {total: lambda line: len(items(line))},
    lambda t: finish(t[distinct], t[total], t["vocab_size"]),
    {distinct: items},
  )


def _share(
  title: str,
  needs: tuple[str, ...],
  name: str,
  fits: Callable[[Line], bool],
  **settings: Any,
) -> Metric:
  """Returns the share of examples that fit, in [0, 1]."""
  return Metric(
    title,
    4,
    needs,
    {name: fits},
    lambda t: t[name] / t["examples"],
    share_of=name,
    **settings,
  )


def repeats_trigram(response: str) -> bool:
  """Returns whether some 3-gram of a response occurs twice.

  >>> repeats_trigram("i am so sorry i am so"), repeats_trigram("so so so")
  (True, False)
  """
  found = ngrams(response, 3)
  return len(set(found)) < len(found)


def repeats_sentence(response: str) -> bool:
  """Returns whether some sentence of a response occurs twice.

  >>> repeats_sentence("oh no ! i see . oh no ."), repeats_sentence("no . oh !")
  (True, False)
  """
  found = [s.strip() for s in re.split(r"(?:^| )[.!?]+(?= |$)", response)]
  found = [sentence for sentence in found if sentence]
  return len(set(found)) < len(found)


def _is_among(first: int) -> Callable[[Line], bool]:
  """Returns a check that the label is among the likeliest ones."""
  return lambda line: line["emotion"] in line["likeliest_emotions"][:first]


def confusion(lines: Sequence[Line]) -> dict[str, dict[str, int]]:
  """Counts the predicted emotions of each gold emotion.

  Args:
    lines: Predictions with `emotion` and `predicted_emotion`.

  Returns:
    By gold label and predicted label, both in alphabetical order, the number of
    examples; zeros are left out.

  >>> confusion([{"emotion": "sad", "predicted_emotion": "proud"}])
  {'sad': {'proud': 1}}
  """
  pairs = Counter((x["emotion"], x["predicted_emotion"]) for x in lines)
  found: dict[str, dict[str, int]] = {}
  for (gold, predicted), count in sorted(pairs.items()):
    found.setdefault(gold, {})[predicted] = count
  return found


def accuracy_by_emotion(lines: Sequence[Line]) -> dict[str, float]:
  """Returns the share of each gold label's examples that it is predicted for.

  >>> accuracy_by_emotion([{"emotion": "sad", "predicted_emotion": "proud"}])
  {'sad': 0.0}
  """
  return {
    gold: predicted.get(gold, 0) / sum(predicted.values())
    for gold, predicted in confusion(lines).items()
  }


def _bleu_counts(line: Line) -> np.ndarray:
  """Returns an example's counts for BLEU.

  Returns:
    `[10]`: the matching and all n-grams for n = 1 .. 4, and the lengths of the
    response and the reference.
  """
  # Responses are tokenised already, which `force` makes sacrebleu accept.
  score = BLEU(tokenize="none", force=True).corpus_score(
    [line["response"]], [[line["reference"]]]
  )
  return np.array([*score.counts, *score.totals, score.sys_len, score.ref_len])


def _bleu(counts: npt.ArrayLike) -> np.ndarray:
  """Returns corpus BLEU of summed counts, `[..., 10]` -> `[...]`."""
  # sacrebleu's `compute_bleu` with the smoothing of its `corpus_bleu`, for all
  # replicates at once: a call for each would take most of a comparison's time.
  counts = np.asarray(counts, float)
  found, total = counts[..., :4], counts[..., 4:8]
  length, wanted = counts[..., 8], counts[..., 9]
  halvings = 2.0 ** np.cumsum(found == 0, axis=-1)
  precisions = np.where(found > 0, found, 1 / halvings) / np.maximum(total, 1)
  score = 100 * np.exp(np.log(precisions).mean(axis=-1))
  shortness = np.exp(np.minimum(0.0, 1 - wanted / np.maximum(length, 1)))
  return np.where((found[..., 0] > 0) & (total[..., 3] > 0), score, 0.0) * (
    shortness
  )


# Tables show metrics in this order. Validation during training sums `nll`,
# `tokens`, `mean_nll`, `emotion_correct` and `examples` on the devices, under
# these names, and finishes them with the same functions.
METRICS: dict[str, Metric] = {
  "emotion_accuracy": _share(
    "accuracy",
    ("emotion", "predicted_emotion"),
    "emotion_correct",
    lambda x: x["emotion"] == x["predicted_emotion"],
    rank=2,
    null=True,
  ),
  # The published protocol: every example counts alike, however long.
  "perplexity_per_example": Metric(
    "perplexity, per example",
    2,
    ("nll", "tokens"),
    {"mean_nll": lambda line: line["nll"] / line["tokens"]},
    lambda t: np.exp(t["mean_nll"] / t["examples"]),
    rank=1,
  ),
  "perplexity": Metric(
    "perplexity",
    2,
    ("nll", "tokens"),
    {"nll": itemgetter("nll"), "tokens": itemgetter("tokens")},
    lambda t: np.exp(t["nll"] / t["tokens"]),
    rank=0,
  ),
  "distinct_1": _ngram_metric("Distinct", 1, _distinct),
  "distinct_2": _ngram_metric("Distinct", 2, _distinct),
  "ead_1": _ngram_metric("EAD", 1, _expectation_adjusted),
  "ead_2": _ngram_metric("EAD", 2, _expectation_adjusted),
  "bleu": Metric(
    "BLEU",
    2,
    ("reference",),
    {"bleu": _bleu_counts},
    lambda t: _bleu(t["bleu"]),
  ),
  "average_length": Metric(
    "length",
    1,
    (),
    {"words": lambda line: len(line["response"].split())},
    lambda t: t["words"] / t["examples"],
  ),
  # The published figures of EmpDG are of replies cut at different lengths.
  "distinct_1_at_30": _ngram_metric("Distinct", 1, _distinct, 30),
  "distinct_2_at_30": _ngram_metric("Distinct", 2, _distinct, 30),
  "repetition": _share(
    "repeated 3-gram",
    (),
    "repeated_trigram",
    lambda line: repeats_trigram(line["response"]),
  ),
  "sentence_repetition": _share(
    "repeated sentence",
    (),
    "repeated_sentence",
    lambda line: repeats_sentence(line["response"]),
  ),
  "different_responses": Metric(
    "different responses",
    4,
    (),
    {},
    lambda t: t["distinct_responses"] / np.maximum(t["examples"], 1),
    {"distinct_responses": lambda line: [line["response"]]},
  ),
  "top3_accuracy": _share(
    "accuracy, top 3",
    ("emotion", "likeliest_emotions"),
    "emotion_in_top3",
    _is_among(3),
  ),
  "top5_accuracy": _share(
    "accuracy, top 5",
    ("emotion", "likeliest_emotions"),
    "emotion_in_top5",
    _is_among(5),
  ),
}


def ranked() -> list[tuple[str, Metric]]:
  """Returns all metrics with their names, in the order of `metrics.json`."""
  return sorted(METRICS.items(), key=lambda item: item[1].rank)


class Contributions(NamedTuple):
  """The parts of a corpus from which its metrics are computed.

  Attributes:
    metrics: The metrics whose fields no line lacks, by name.
    sums: By name, each line's share of a sum; `examples` is always there.
    types: By name, each line's types.
  """

  metrics: dict[str, Metric]
  sums: dict[str, list[Any]]
  types: dict[str, list[Iterable[Hashable]]]


def contributions(lines: Sequence[Line]) -> Contributions:
  """Evaluates each line's part in every metric that the lines allow."""
  metrics = {
    name: metric
    for name, metric in METRICS.items()
    if all(line.get(key) is not None for line in lines for key in metric.needs)
  }
  # Chained by name, a sum that several metrics share is evaluated once.
  sums = ChainMap(*(metric.sums for metric in metrics.values()))
  types = ChainMap(*(metric.types for metric in metrics.values()))
  shares = {name: list(map(share, lines)) for name, share in sums.items()}
  return Contributions(
    metrics,
    {"examples": [1] * len(lines), **shares},
    {name: list(map(items, lines)) for name, items in types.items()},
  )


def text_metrics(lines: Sequence[Line], vocab_size: int) -> dict[str, Any]:
  """Computes every metric that predictions allow.

  Args:
    lines: The lines of a `predictions.jsonl`. `response` is required; a metric
      is computed if every line has the other fields that it needs.
    vocab_size: V of `ead_n`.

  Returns:
    Names and values, in the order of `metrics.json`.
  """
  metrics, sums, types = contributions(lines)
  totals: dict[str, Any] = {"vocab_size": vocab_size}
  totals |= {name: sum(shares) for name, shares in sums.items()}
  totals |= {name: len(set().union(*found)) for name, found in types.items()}
  values: dict[str, Any] = {"examples": len(lines)}
  for name, metric in ranked():
    if name in metrics:
      values[name] = float(metric.finish(totals))
    elif metric.null:
      values[name] = None
  return {**values, "vocab_size": vocab_size}


def shown(name: str, value: Any) -> str:
  """Returns an entry of `metrics.json` as people read it.

  >>> shown("bleu", 20.0), shown("examples", 1000), shown("bleu", None)
  ('20.00', '1,000', '-')
  """
  if isinstance(value, float):
    decimals = METRICS[name].decimals if name in METRICS else 2
    return f"{value:,.{decimals}f}"
  return "-" if value is None else f"{value:,}"
