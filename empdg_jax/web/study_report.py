"""A study's report: the human figures of the paper's Tables 1 and 3."""

import dataclasses
import pathlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from empdg_jax import storage
from empdg_jax.analysis import significance
from empdg_jax.analysis.compare import Comparison, Figure, Row
from empdg_jax.config import InputError
from empdg_jax.models import registry
from empdg_jax.web import study, study_answers, study_statistics
from empdg_jax.web.study import Study

_LINES = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Agreement:
  """How far annotators agree on one question.

  Attributes:
    alpha: Krippendorff's alpha, ordinal for ratings and nominal for choices.
    kappa: Fleiss' kappa.
    items: The items with two or more answers.
  """

  alpha: float | None
  kappa: float | None
  items: int


@dataclasses.dataclass(frozen=True)
class Pair:
  """The first system against another.

  Attributes:
    systems: The two systems.
    judgements: The number of choices, identical replies included as ties.
    identical: The dialogues with identical replies.
    win: Per cent of the choices for the first system, with its interval.
    loss: Per cent for the other system.
    tie: Per cent of ties.
    p_value: The p-value of the exact sign test over dialogues.
    p_corrected: Corrected for the number of pairs (Holm).
  """

  systems: tuple[str, str]
  judgements: int
  identical: int
  win: Figure
  loss: Figure
  tie: Figure
  p_value: float
  p_corrected: float


@dataclasses.dataclass(frozen=True)
class Annotator:
  """What one annotator did.

  Attributes:
    token: The random token.
    answers: The number of answered items.
    controls: The number of answered controls.
    failed: The number of those failed.
    seconds: The median time per item, if known.
    dissents: Whether the annotator agrees with no other.
  """

  token: str
  answers: int
  controls: int
  failed: int
  seconds: float | None
  dissents: bool


@dataclasses.dataclass(frozen=True)
class Report:
  """The report of a study.

  Attributes:
    dialogues: The number of dialogues sampled.
    means: By system and metric.
    agreement: By question.
    pairs: The first system against each other one.
    annotators: The annotators.
    sources: By system, where its responses come from.
  """

  dialogues: int
  means: dict[str, dict[str, Figure]]
  agreement: dict[str, Agreement]
  pairs: list[Pair]
  annotators: list[Annotator]
  sources: dict[str, str]


def _published(name: str) -> registry.SystemSpec | None:
  """Returns the record of the system with this title, if there is one."""
  title = name.partition(" (")[0]
  specs = registry.SYSTEMS.values()
  return next((spec for spec in specs if spec.title == title), None)


def means(content: Study, lines: _LINES) -> dict[str, dict[str, Figure]]:
  """Returns every system's mean ratings over dialogues, by metric.

  Args:
    content: The study, with its key.
    lines: The lines of its `answers.jsonl`.
  """
  values: dict[tuple[str, str], dict[str, list[int]]]
  values = defaultdict(lambda: defaultdict(list))
  for line in lines:
    key = content.key["items"][line["item"]]
    for name in key.get("systems", ()) if line["part"] == "rating" else ():
      for metric, value in line["answers"].items():
        values[name, metric][key["example"]].append(value)
  found: dict[str, dict[str, Figure]] = {}
  for name in (system["name"] for system in content.key["systems"]):
    spec = _published(name)
    paper = spec.ratings if spec else ()
    published = dict(zip(study.METRICS, paper, strict=bool(paper)))
    found[name] = {}
    for metric in study.METRICS:
      if rated := values[name, metric]:
        by_dialogue = [float(np.mean(own)) for own in rated.values()]
        figures = study_statistics.mean_interval(by_dialogue)
        found[name][metric] = Figure(*figures, paper=published.get(metric))
  return found


def _score(content: Study, line: Mapping[str, Any]) -> int:
  """Returns 1 if the first response of a pair is chosen, -1 or 0."""
  choice = line["answers"]["choice"]
  if choice == "tie":
    return 0
  return 1 if choice == content.key["items"][line["item"]]["first"] else -1


def _pairs(content: Study, lines: _LINES) -> list[Pair]:
  """Returns the comparisons in the form of the paper's Table 3."""
  first, *others = (system["name"] for system in content.key["systems"])
  votes: dict[str, dict[str, list[int]]]
  votes = {other: defaultdict(list) for other in others}
  annotators = set()
  for line in lines:
    key = content.key["items"][line["item"]]
    if line["part"] == "pairwise" and "systems" in key:
      votes[key["systems"][1]][key["example"]].append(_score(content, line))
      annotators.add(line["annotator"])
  others = [other for other in others if votes[other]]
  p_values = [
    study_statistics.sign_test([sum(own) for own in votes[other].values()])
    for other in others
  ]
  corrected = significance.holm(p_values) if p_values else []
  pairs = []
  for other, p_value, p in zip(others, p_values, corrected, strict=True):
    same = content.key["identical"][f"{first}/{other}"]
    # No one is asked about identical replies: everyone would say a tie.
    by_dialogue = list(votes[other].values())
    by_dialogue += [[0] * len(annotators) for _ in same]
    spec = _published(other)
    is_paper = (_published(first) is registry.SYSTEMS["empdg"]) and spec
    paper = spec.preferences if is_paper and spec else ()
    total = sum(map(len, by_dialogue))
    figures = []
    for index, score in enumerate((1, -1, 0)):
      shares = [own.count(score) / len(own) for own in by_dialogue]
      low, high = study_statistics.wilson(shares, total)
      figures.append(
        Figure(
          100 * sum(own.count(score) for own in by_dialogue) / total,
          100 * low,
          100 * high,
          paper=paper[index] if paper else None,
        )
      )
    win, loss, tie = figures
    pairs.append(
      Pair((first, other), total, len(same), win, loss, tie, p_value, p)
    )
  return pairs


def _tables(
  content: Study, lines: _LINES, tokens: Sequence[str]
) -> dict[str, tuple[np.ndarray, study_statistics.Level]]:
  """Returns answers by question, `[annotators, items]`, and their level."""
  cells: dict[str, dict[tuple[str, str], dict[str, int]]]
  cells = defaultdict(lambda: defaultdict(dict))
  for line in lines:
    key = content.key["items"][line["item"]]
    if "systems" not in key:
      continue
    # Both sides of a pair are one item.
    names = (key["example"], "/".join(key["systems"]))
    answers = line["answers"]
    if line["part"] == "pairwise":
      answers = {"choice": _score(content, line)}
    for question, value in answers.items():
      cells[question][names][line["annotator"]] = value
  return {
    question: (
      np.array(
        [[own.get(t, np.nan) for own in items.values()] for t in tokens],
        float,
      ),
      "nominal" if question == "choice" else "ordinal",
    )
    for question, items in cells.items()
  }


def _controls(content: Study, lines: _LINES) -> tuple[int, int]:
  """Returns how many controls one annotator answered, and failed.

  A pair is failed unless the gold response is chosen; two ratings, unless the
  gold response is rated as more relevant than the one of another dialogue.
  """
  answered = failed = 0
  rated: dict[int, dict[str, int]] = defaultdict(dict)
  for line in lines:
    key = content.key["items"][line["item"]]
    if "control" in key and line["part"] == "pairwise":
      answered += 1
      failed += _score(content, line) != 1
    elif "control" in key:
      rated[key["pair"]][key["control"]] = line["answers"]["relevance"]
  for roles in rated.values():
    if len(roles) == 2:
      answered += 1
      failed += roles["gold"] <= roles["shuffled"]
  return answered, failed


def _annotators(
  content: Study,
  lines: _LINES,
  tokens: Sequence[str],
  tables: Mapping[str, tuple[np.ndarray, study_statistics.Level]],
) -> list[Annotator]:
  """Returns what each annotator did."""
  dissent = study_statistics.dissenters(list(tables.values()))
  found = []
  for number, token in enumerate(tokens):
    own = [line for line in lines if line["annotator"] == token]
    times = [line["seconds"] for line in own if line.get("seconds") is not None]
    found.append(
      Annotator(
        token,
        len(own),
        *_controls(content, own),
        float(np.median(times)) if times else None,
        number in dissent,
      )
    )
  return found


def report(folder: pathlib.Path) -> Report:
  """Computes the report of a study.

  Args:
    folder: The study folder; of its files of answers, `answers.jsonl` alone is
      read.

  Raises:
    InputError: It is no study, or has no answers.
  """
  content = study.read(folder, unblinded=True)
  lines = study_answers.read(folder)
  if not lines:
    raise InputError(
      f"--study={folder}: no answers; run 'empdg study import' first"
    )
  for line in lines:
    if line["item"] not in content.key["items"]:
      raise InputError(
        f"{folder}: answers to the unknown item {line['item']!r}"
      )
  tokens = sorted({line["annotator"] for line in lines})
  tables = _tables(content, lines, tokens)
  agreement = {
    question: Agreement(
      study_statistics.krippendorff_alpha(table, level),
      study_statistics.fleiss_kappa(table),
      int(((~np.isnan(table)).sum(axis=0) > 1).sum()),
    )
    for question, (table, level) in tables.items()
  }
  return Report(
    content.about["dialogues"],
    means(content, lines),
    agreement,
    _pairs(content, lines),
    _annotators(content, lines, tokens, tables),
    {s["name"]: s["source"] for s in content.key["systems"]},
  )


def beside(comparison: Comparison, human: Report) -> Comparison:
  """Returns a comparison of runs with the human figures of a study.

  Raises:
    InputError: The study has none of the systems.
  """

  def figures(row: Row) -> dict[str, Figure]:
    paths = [str(storage.absolute(pathlib.Path(run))) for run in row.runs]
    for name, means in human.means.items():
      if human.sources[name] in paths or name == row.title:
        return means
    return {}

  rows = [dataclasses.replace(r, human=figures(r)) for r in comparison.rows]
  if not any(row.human for row in rows):
    raise InputError(
      "--study: its systems are " + ", ".join(human.means) + ", none of these"
    )
  return dataclasses.replace(comparison, rows=rows)
