"""The paper's Tables 1 and 2 from run folders, with their uncertainty."""

import dataclasses
import itertools
import json
import pathlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from empdg_jax import metrics
from empdg_jax.analysis import significance
from empdg_jax.config import Config, InputError
from empdg_jax.data import text
from empdg_jax.inference import export_files, predictions
from empdg_jax.models import registry
from empdg_jax.training import run_folder, train_state
from empdg_jax.training.run_folder import Run

# Metrics, their titles and decimals, in the order of the columns.
COLUMNS = {
  "emotion_accuracy": ("accuracy", 4),
  "perplexity_per_example": ("perplexity, per example", 2),
  "perplexity": ("perplexity", 2),
  "distinct_1": ("Distinct-1", 2),
  "distinct_2": ("Distinct-2", 2),
  "ead_1": ("EAD-1", 2),
  "ead_2": ("EAD-2", 2),
  "bleu": ("BLEU", 2),
  "average_length": ("length", 1),
}
_NEEDED = ("id", "emotion", "reference", "nll", "tokens")


@dataclasses.dataclass(frozen=True)
class _Evaluation:
  """A run folder's predictions on a split."""

  run: Run
  lines: list[dict[str, Any]]

  @property
  def where(self) -> str:
    """The run folder, for messages."""
    return str(self.run.workdir)


@dataclasses.dataclass(frozen=True)
class Figure:
  """A metric of a system.

  Attributes:
    value: On the split; the mean if the system has several runs.
    low: The lower end of the 95% interval, of a single run.
    high: Its upper end.
    deviation: The standard deviation of several runs.
    paper: What the paper printed.
  """

  value: float
  low: float | None
  high: float | None
  deviation: float | None
  paper: float | None


@dataclasses.dataclass(frozen=True)
class Row:
  """A system: one run, or several that differ by their seed alone.

  Attributes:
    name: `config.model.name`.
    title: In tables.
    runs: The run folders.
    parameters: Of the generator.
    figures: By metric; None where the system has no such metric.
  """

  name: str
  title: str
  runs: tuple[str, ...]
  parameters: int
  figures: dict[str, Figure | None]


@dataclasses.dataclass(frozen=True)
class Test:
  """A paired test of two systems on one metric.

  Attributes:
    metric: The metric.
    systems: The two rows' titles.
    difference: The first one's figure minus the second one's.
    p_value: Of the paired bootstrap.
    p_corrected: Corrected for the number of pairs (Holm).
  """

  metric: str
  systems: tuple[str, str]
  difference: float
  p_value: float
  p_corrected: float


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Systems side by side on one split.

  Attributes:
    split: The split.
    examples: How many examples it has.
    dialogues: In how many dialogues.
    rows: The systems.
    tests: Every pair of them, metric by metric.
    cases: Replies side by side.
  """

  split: str
  examples: int
  dialogues: int
  rows: list[Row]
  tests: list[Test]
  cases: list[dict[str, Any]]


def _read(workdir: pathlib.Path, split: str) -> _Evaluation:
  """Reads a run's evaluation.

  Raises:
    InputError: The folder is no run's, or has no whole evaluation of the split.
  """
  if run_folder.is_export(workdir):
    run, flag = export_files.read_run(workdir), "--bundle"
  else:
    run, flag = run_folder.open_run(workdir), "--workdir"
  folder = workdir / "eval" / split
  again = f"'empdg evaluate {flag}={workdir} --split={split}'"
  try:
    values = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    if not isinstance(values, dict):
      raise ValueError("metrics.json holds no object")
  except (OSError, ValueError) as error:
    raise InputError(
      f"{workdir} has no evaluation of {split} ({error}); run {again}"
    ) from error
  path = folder / "predictions.jsonl"
  lines = predictions.read_predictions(path)
  if len(lines) != values.get("examples"):
    raise InputError(
      f"{path} holds {len(lines):,} predictions of {values.get('examples')}; "
      f"run {again} again"
    )
  for number, line in enumerate(lines, start=1):
    for name in _NEEDED:
      if line.get(name) is None:
        raise InputError(f"{path}:{number}: no {name!r}; run {again} again")
    line.setdefault("predicted_emotion", None)
  if values.get("split") != split:
    raise InputError(
      f"{folder} holds an evaluation of {values.get('split')!r}, not {split!r}"
    )
  return _Evaluation(run, lines)


def _check_comparable(evaluations: Sequence[_Evaluation]) -> None:
  """Raises InputError unless all answered the same examples."""
  first = evaluations[0]
  for other in evaluations[1:]:
    sets = [e.run.config.data.example_set for e in (first, other)]
    if sets[0] != sets[1]:
      raise InputError(
        f"{first.where} and {other.where} have different example sets, "
        f"{sets[0]!r} and {sets[1]!r}"
      )
    if first.run.vocabulary != other.run.vocabulary:
      raise InputError(
        f"{first.where} and {other.where} have different vocabularies, of "
        f"{len(first.run.vocabulary):,} and {len(other.run.vocabulary):,} "
        "tokens, and so different perplexities; train both with the same "
        "config.data"
      )
    for one, two in itertools.zip_longest(first.lines, other.lines):
      same = (
        one
        and two
        and all(
          one[name] == two[name] for name in ("id", "reference", "tokens")
        )
      )
      if not same:
        raise InputError(
          f"{first.where} and {other.where} answered different examples, from "
          f"{(one or two)['id']!r} on"
        )


def _system_key(config: Config) -> str:
  """Returns what runs of one system share: all but the seed."""
  train = dataclasses.replace(
    config.train,
    seed=0,
    mle_checkpoint="",
    profile_steps="",
    keep_checkpoints=1,
  )
  return repr(dataclasses.replace(config, train=train))


def _groups(evaluations: Sequence[_Evaluation]) -> list[list[_Evaluation]]:
  """Puts runs of one system together, each seed once in a group."""
  groups: dict[tuple[str, int], list[_Evaluation]] = {}
  seen: Counter[tuple[str, int]] = Counter()
  for evaluation in evaluations:
    config = evaluation.run.config
    key = _system_key(config)
    seed = config.train.seed
    groups.setdefault((key, seen[key, seed]), []).append(evaluation)
    seen[key, seed] += 1
  return list(groups.values())


def _titles(groups: Sequence[Sequence[_Evaluation]]) -> list[str]:
  """Returns a title for each system, with its folder where two are alike."""
  names = [group[0].run.config.model.name for group in groups]
  return [
    registry.SYSTEMS[name].title
    + (f" ({group[0].run.workdir.name})" if names.count(name) > 1 else "")
    for name, group in zip(names, groups, strict=True)
  ]


def compare(
  workdirs: Sequence[pathlib.Path], split: str, cases: int = 0
) -> Comparison:
  """Compares runs on a split that all have been evaluated on.

  Args:
    workdirs: The run folders or exports; those that differ by their seed alone
      are one system. Several of one run, of other checkpoints, are several.
    split: The split.
    cases: How many examples to show side by side.

  Returns:
    Figures with intervals over dialogues, and tests.

  Raises:
    InputError: A folder has no whole evaluation of the split, or they are of
      different examples or vocabularies.
  """
  evaluations = [_read(workdir, split) for workdir in workdirs]
  _check_comparable(evaluations)
  order = list(registry.SYSTEMS)
  groups = sorted(
    _groups(evaluations),
    key=lambda g: order.index(g[0].run.config.model.name),
  )
  lines = evaluations[0].lines
  dialogues = int(significance.dialogues_of(lines).max()) + 1
  counts = significance.draw(dialogues)
  titles = _titles(groups)
  rows, replicates = [], []
  for title, group in zip(titles, groups, strict=True):
    row, of_row = _row(title, group, counts)
    rows.append(row)
    replicates.append(of_row)
  return Comparison(
    split,
    len(lines),
    dialogues,
    rows,
    _tests(rows, replicates),
    _cases(titles, groups, cases),
  )


def _row(
  title: str, group: Sequence[_Evaluation], counts: np.ndarray
) -> tuple[Row, dict[str, np.ndarray]]:
  """Returns a system's figures, and the same on every replicate."""
  vocab_size = len(group[0].run.vocabulary)
  name = group[0].run.config.model.name
  values = [metrics.text_metrics(e.lines, vocab_size) for e in group]
  of_runs = [
    significance.replicate(significance.summarize(e.lines, vocab_size), counts)
    for e in group
  ]
  figures: dict[str, Figure | None] = {}
  replicates = {}
  for metric in COLUMNS:
    if metric not in of_runs[0]:
      figures[metric] = None
      continue
    replicates[metric] = np.mean([r[metric] for r in of_runs], axis=0)
    of_metric = [v[metric] for v in values]
    value = float(np.mean(of_metric))
    low = high = deviation = None
    if len(group) == 1:
      low, high = significance.interval(value, replicates[metric])
    else:
      deviation = float(np.std(of_metric, ddof=1))
    paper = registry.SYSTEMS[name].paper.get(metric)
    figures[metric] = Figure(value, low, high, deviation, paper)
  runs = tuple(e.where for e in group)
  run = group[0].run
  model = registry.create_model(run.config.model, vocab_size, len(run.emotions))
  parameters = train_state.count_parameters(model)
  return Row(name, title, runs, parameters, figures), replicates


def _tests(
  rows: Sequence[Row], replicates: Sequence[dict[str, np.ndarray]]
) -> list[Test]:
  """Tests every pair of systems, each metric's pairs as one family."""
  tests = []
  for metric in COLUMNS:
    pairs, differences, p_values = [], [], []
    for i, j in itertools.combinations(range(len(rows)), 2):
      one, two = rows[i].figures[metric], rows[j].figures[metric]
      if one is not None and two is not None:
        pairs.append((rows[i].title, rows[j].title))
        differences.append(one.value - two.value)
        p_values.append(
          significance.paired_p_value(
            one.value - two.value, replicates[i][metric] - replicates[j][metric]
          )
        )
    if pairs:
      corrected = significance.holm(p_values)
      tests += map(
        Test,
        itertools.repeat(metric),
        pairs,
        differences,
        p_values,
        corrected,
      )
  return tests


def _cases(
  titles: Sequence[str], groups: Sequence[Sequence[_Evaluation]], count: int
) -> list[dict[str, Any]]:
  """Returns the replies to some examples, each of another emotion."""
  lines = groups[0][0].lines

  def readable(tokens: str) -> str:
    return text.join_tokens(tokens.split())

  cases = []
  for index in predictions.of_other_emotions(lines, count):
    line = lines[index]
    cases.append(
      {
        "id": line["id"],
        "emotion": line["emotion"],
        "context": [readable(turn) for turn in line["context"]],
        "reference": readable(line["reference"]),
        "responses": {
          title: {
            "response": readable(group[0].lines[index]["response"]),
            "emotion": group[0].lines[index]["predicted_emotion"],
          }
          for title, group in zip(titles, groups, strict=True)
        },
      }
    )
  return cases
