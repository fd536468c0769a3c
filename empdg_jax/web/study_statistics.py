"""Statistics of the human evaluation: agreement, intervals and tests."""

import contextlib
import functools
import math
import statistics
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np
import scipy.stats

from empdg_jax.analysis import significance
from empdg_jax.config import InputError

_INSTALL = "in a clone: pip install -e '.[study]'"


Level = Literal["nominal", "ordinal", "interval"]


def krippendorff_alpha(table: np.ndarray, level: Level) -> float | None:
  """Returns Krippendorff's alpha (2011).

  Args:
    table: Values by annotator and item, `[annotators, items]`; NaN for none.
    level: `"nominal"`, `"ordinal"` or `"interval"`.

  Returns:
    Alpha, or None where it is undefined: no two annotators share an item, or
    all values are the same.

  Raises:
    InputError: The extra `study` is not installed.
  """
  try:
    import krippendorff
  except ImportError as error:
    raise InputError(f"krippendorff is not installed; {_INSTALL}") from error

  with contextlib.suppress(ValueError), warnings.catch_warnings():
    warnings.simplefilter("ignore")
    alpha = krippendorff.alpha(table, level_of_measurement=level)
    return float(alpha) if math.isfinite(alpha) else None
  return None


def fleiss_kappa(table: np.ndarray) -> float | None:
  """Returns Fleiss' kappa (1971) over the items with the most annotators.

  Args:
    table: As of `krippendorff_alpha`.

  Returns:
    Kappa, or None where it is undefined.

  Raises:
    InputError: The extra `study` is not installed.
  """
  try:
    from statsmodels.stats import inter_rater
  except ImportError as error:
    raise InputError(f"statsmodels is not installed; {_INSTALL}") from error

  # It is defined for equally many annotators of each item.
  present = (~np.isnan(table)).sum(axis=0)
  most = int(present.max(initial=0))
  if most < 2:
    return None
  values = np.unique(table[~np.isnan(table)])
  whole = table[:, present == most]
  counts = np.stack([(whole == value).sum(axis=0) for value in values], axis=1)
  if len(values) < 2 or (counts.sum(axis=0) > 0).sum() < 2:
    return None
  return float(inter_rater.fleiss_kappa(counts))


@functools.lru_cache(maxsize=4)
def _draw(dialogues: int) -> np.ndarray:
  # Every system's and metric's mean is over as many dialogues.
  return significance.draw(dialogues)


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
  """Returns the mean over dialogues and its 95% bootstrap interval.

  Args:
    values: One value for each dialogue, `[dialogues]`.
  """
  array = np.array(values)
  counts = _draw(len(array))
  mean = float(array.mean())
  return (mean, *significance.interval(mean, counts @ array / len(array)))


def wilson(shares: Sequence[float], judgements: int) -> tuple[float, float]:
  """Returns Wilson's 95% interval (1927) of a share.

  The judgements of one dialogue depend on each other, so the interval is that
  of as many independent ones as they are worth (Kish's design effect).

  Args:
    shares: The share in each dialogue, `[dialogues]`.
    judgements: The number of judgements of all dialogues.

  >>> [round(end, 4) for end in wilson([1.0] * 8 + [0.0] * 2, 10)]
  [0.4902, 0.9433]
  """
  share, dialogues = float(np.mean(shares)), len(shares)
  independent = share * (1 - share) / judgements
  effective = float(judgements)
  if dialogues > 1 and independent > 0:
    # Divided by the number itself, so that single judgements are worth one.
    variance = float(np.var(shares)) / dialogues
    effective /= max(1.0, variance / independent)
  z = statistics.NormalDist().inv_cdf(0.975)
  centre = share + z**2 / (2 * effective)
  half = z * math.sqrt(
    share * (1 - share) / effective + z**2 / (4 * effective**2)
  )
  scale = 1 + z**2 / effective
  return (centre - half) / scale, (centre + half) / scale


def sign_test(differences: Sequence[float]) -> float:
  """Returns the two-sided p-value of the exact sign test; zeros are dropped.

  >>> sign_test([1] * 8 + [-1] * 2 + [0] * 5)
  0.109375
  """
  signs = np.sign(differences)
  wins, losses = int((signs > 0).sum()), int((signs < 0).sum())
  if wins + losses == 0:
    return 1.0
  return float(scipy.stats.binomtest(wins, wins + losses).pvalue)


def dissenters(tables: Sequence[tuple[np.ndarray, Level]]) -> list[int]:
  """Returns the annotators who agree with no other better than by chance.

  Args:
    tables: Tables of the same annotators with their level, as of
      `krippendorff_alpha`.

  Returns:
    The rows of those whose alpha with every other is 0 or less. Two annotators
    who disagree say nothing of which of them does.
  """
  annotators = max((len(table) for table, _ in tables), default=0)
  if annotators < 3:
    return []
  disagreed: Counter[int] = Counter()
  compared: Counter[int] = Counter()
  for one in range(annotators):
    for two in range(annotators):
      alphas = [
        alpha
        for table, level in tables
        if one != two
        and (alpha := krippendorff_alpha(table[[one, two]], level)) is not None
      ]
      if alphas:
        compared[one] += 1
        disagreed[one] += float(np.mean(alphas)) <= 0
  return [n for n in range(annotators) if 1 < compared[n] == disagreed[n]]
