"""A comparison of evaluated runs: the paper's Tables 1 and 2, with tests."""

import dataclasses
import itertools
import json
import pathlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from empdg_jax import config as config_lib
from empdg_jax import metrics, storage
from empdg_jax.analysis import results, significance
from empdg_jax.analysis.significance import Corpus
from empdg_jax.config import Config, InputError, text_rules
from empdg_jax.data import text
from empdg_jax.inference import export_files, predictions
from empdg_jax.inference.system import create_model
from empdg_jax.models import registry
from empdg_jax.training import run_folder, train_state
from empdg_jax.training.run_folder import Run

_PROTOCOL = (
  "data.example_set",
  "data.vocab_scope",
  "eval.max_decode_steps",
  "eval.beam_size",
)
# After the title of the system that a control stands beside.
CONTROL_TITLE = ", control"
_NEEDED = ("id", "emotion", "reference", "nll", "tokens")


class _Evaluation(NamedTuple):
  """A run folder's predictions on a split."""

  run: Run
  lines: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Figure:
  """A system's figure for one metric.

  Attributes:
    value: The metric on the split, or the mean over several runs.
    low: The lower end of the 95% interval over dialogues.
    high: The upper end.
    deviation: The standard deviation over several runs.
    paper: The figure that the paper reports.
  """

  value: float
  low: float | None = None
  high: float | None = None
  deviation: float | None = None
  paper: float | None = None


@dataclasses.dataclass(frozen=True)
class Row:
  """A system: one run, or several that differ only in their seed.

  Attributes:
    name: The value of `config.model.name`.
    title: The system's name in tables.
    runs: The run folders.
    parameters: The generator's number of parameters.
    figures: The figures by metric; None where the system lacks the metric.
    seeds: What the results keep of each run; see `results.describe_run`.
    human: The mean ratings of a study by metric, if one was given.
  """

  name: str
  title: str
  runs: tuple[str, ...]
  parameters: int
  figures: dict[str, Figure | None]
  seeds: tuple[dict[str, Any], ...]
  human: dict[str, Figure] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Test:
  """A paired test of two systems on one metric.

  Attributes:
    metric: The metric's name.
    systems: The titles of the two rows.
    difference: The first system's figure minus the second's.
    p_value: The p-value of the permutation within dialogues.
    p_corrected: The p-value corrected for the number of pairs (Holm).
    runs: The number of runs of each system that were tested, all of which swap
      the same dialogues together.
  """

  metric: str
  systems: tuple[str, str]
  difference: float
  p_value: float
  p_corrected: float
  runs: int


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Systems side by side on one split.

  Attributes:
    split: The split.
    protocol: The settings that all runs share.
    examples: The number of examples.
    dialogues: The number of dialogues that they come from.
    rows: The systems.
    tests: The test of every pair of systems, metric by metric.
    cases: Some examples with every system's response.
  """

  split: str
  protocol: dict[str, Any]
  examples: int
  dialogues: int
  rows: list[Row]
  tests: list[Test]
  cases: list[dict[str, Any]]


def _read(workdir: pathlib.Path, split: str) -> _Evaluation:
  """Reads a run's evaluation.

  Raises:
    InputError: The folder is not a run, or lacks a complete evaluation of the
      split.
  """
  if run_folder.is_export(workdir):
    run, flag = export_files.read_run(workdir), "--bundle"
  else:
    run, flag = run_folder.open_run(workdir), "--workdir"
  folder = workdir / "eval" / split
  again = f"'empdg evaluate {flag}={workdir} --split={split}'"
  try:
    values = json.loads(storage.read_text(folder / "metrics.json"))
    if not isinstance(values, dict):
      raise ValueError("metrics.json holds no object")
  except (OSError, ValueError, RecursionError) as error:
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
    if not isinstance(line["id"], str):
      raise InputError(f"{path}:{number}: 'id' cannot be {line['id']!r}")
    # The Transformer predicts none, and other programs may omit the null.
    line.setdefault("predicted_emotion", None)
  if values.get("split") != split:
    raise InputError(
      f"{folder} holds an evaluation of {values.get('split')!r}, not {split!r}"
    )
  return _Evaluation(run, lines)


def _check_comparable(evaluations: Sequence[_Evaluation]) -> None:
  """Raises InputError unless all runs responded to the same examples."""
  first, *others = evaluations
  for other in others:
    pair = f"{first.run.workdir} and {other.run.workdir}"
    sets = [e.run.config.data.example_set for e in (first, other)]
    if sets[0] != sets[1]:
      raise InputError(
        f"{pair} have different example sets, {sets[0]!r} and {sets[1]!r}"
      )
    versions = [text_rules(e.run.config.data) for e in (first, other)]
    if versions[0] != versions[1]:
      raise InputError(
        f"{pair} read text by different rules, of the versions {versions[0]} "
        f"and {versions[1]}; train both with the same config.data.text_rules"
      )
    if first.run.vocabulary != other.run.vocabulary:
      raise InputError(
        f"{pair} have different vocabularies, of "
        f"{len(first.run.vocabulary):,} and {len(other.run.vocabulary):,} "
        "tokens, and so different perplexities; train both with the same "
        "config.data"
      )
    for one, two in itertools.zip_longest(first.lines, other.lines):
      if not (one and two) or any(
        one[name] != two[name] for name in ("id", "reference", "tokens")
      ):
        raise InputError(
          f"{pair} answered different examples, from {(one or two)['id']!r} on"
        )


def _groups(evaluations: Sequence[_Evaluation]) -> list[list[_Evaluation]]:
  """Groups the runs by system, in the order of the tables' columns."""
  groups: dict[tuple[str, int], list[_Evaluation]] = {}
  seen: Counter[tuple[str, int]] = Counter()
  for evaluation in evaluations:
    config = evaluation.run.config
    key = results.config_hash(config)
    # A second run with the same seed, say another checkpoint of it, is no
    # independent sample; it starts a group of its own.
    copy = seen[key, config.train.seed]
    groups.setdefault((key, copy), []).append(evaluation)
    seen[key, config.train.seed] += 1
  order = list(registry.SYSTEMS)
  by_seed = [
    sorted(group, key=lambda e: e.run.config.train.seed)
    for group in groups.values()
  ]
  return sorted(by_seed, key=lambda g: order.index(g[0].run.config.model.name))


def _titles(groups: Sequence[Sequence[_Evaluation]]) -> list[str]:
  """Returns the systems' titles, with the folder where two are alike."""
  names = []
  for group in groups:
    config = group[0].run.config
    name = registry.SYSTEMS[config.model.name].title
    if _is_control(config):
      name += CONTROL_TITLE
    names.append(name)
  return [
    name + (f" ({group[0].run.workdir.name})" if names.count(name) > 1 else "")
    for name, group in zip(names, groups, strict=True)
  ]


def _is_control(config: Config) -> bool:
  """Returns whether the discriminators play and do not move the generator."""
  plays = registry.find_system(config.model).discriminators
  return bool(plays) and config.train.generator_signal == "constant"


def compare(
  workdirs: Sequence[pathlib.Path], split: str, cases: int = 0
) -> Comparison:
  """Compares runs that were all evaluated on a split.

  Args:
    workdirs: The run folders or exports. Runs that differ only in their seed
      form one system; several checkpoints of one run are separate systems.
    split: The split.
    cases: The number of examples to show side by side.

  Returns:
    Figures with intervals over dialogues, and tests.

  Raises:
    InputError: A folder lacks a complete evaluation of the split, or the
      evaluations have different examples or vocabularies.
  """
  evaluations = [_read(workdir, split) for workdir in workdirs]
  _check_comparable(evaluations)
  groups = _groups(evaluations)
  titles = _titles(groups)
  lines = evaluations[0].lines
  dialogues = int(significance.dialogues_of(lines).max()) + 1
  numbers: significance.Numbers = {}
  corpora = [
    [
      significance.summarize(e.lines, len(e.run.vocabulary), numbers)
      for e in group
    ]
    for group in groups
  ]
  counts = significance.draw(dialogues)
  rows = [
    _row(title, split, group, of_runs, counts)
    for title, group, of_runs in zip(titles, groups, corpora, strict=True)
  ]
  return Comparison(
    split,
    _protocol(evaluations, split),
    len(lines),
    dialogues,
    rows,
    _tests(rows, corpora, significance.draw_swaps(dialogues)),
    _cases(titles, groups, cases),
  )


def _protocol(evaluations: Sequence[_Evaluation], split: str) -> dict[str, Any]:
  """Returns the settings that matter for figures; None where runs differ."""
  found: dict[str, Any] = {"split": split}
  values = [config_lib.flatten(e.run.config) for e in evaluations]
  for name in _PROTOCOL:
    first = values[0][name]
    alike = all(other[name] == first for other in values)
    found[name.partition(".")[2]] = first if alike else None
  rules = text_rules(evaluations[0].run.config.data)
  return {**found, "text_rules": rules}


def _row(
  title: str,
  split: str,
  group: Sequence[_Evaluation],
  corpora: Sequence[Corpus],
  counts: np.ndarray,
) -> Row:
  """Returns a system's figures.

  Args:
    title: The system's name in tables.
    split: The split.
    group: Its runs.
    corpora: Their predictions, added up by dialogue.
    counts: The result of `significance.draw`.
  """
  run, config = group[0].run, group[0].run.config
  # The paper has no such control, and scores no other examples.
  in_paper = config.data.example_set == "empdg" and not _is_control(config)
  published = registry.find_system(config.model).paper if in_paper else {}
  values = [metrics.text_metrics(e.lines, len(run.vocabulary)) for e in group]
  drawn = [
    significance.replicate(significance.means_of(corpus), counts)
    for corpus in corpora
  ]
  variances = significance.jackknife_variance(corpora)
  figures: dict[str, Figure | None] = dict.fromkeys(metrics.METRICS)
  for name, metric in metrics.METRICS.items():
    if not all(name in corpus.metrics for corpus in corpora):
      continue
    of_metric = [v[name] for v in values]
    value = float(np.mean(of_metric))
    # Of the mean over runs: a dialogue is drawn or left out of all of them.
    if metric.types:
      ends = significance.normal_interval(value, variances[name])
    else:
      ends = significance.interval(
        value, np.mean([d[name] for d in drawn], axis=0)
      )
    spread = float(np.std(of_metric, ddof=1)) if len(group) > 1 else None
    figures[name] = Figure(value, *ends, spread, published.get(name))
  return Row(
    run.config.model.name,
    title,
    tuple(str(e.run.workdir) for e in group),
    train_state.count_parameters(create_model(run)),
    figures,
    tuple(
      _seed(e, split, of_run) for e, of_run in zip(group, values, strict=True)
    ),
  )


def _seed(
  evaluation: _Evaluation, split: str, values: dict[str, Any]
) -> dict[str, Any]:
  """Returns what the results keep of a run with these metrics."""
  kept = {name: values[name] for name in metrics.METRICS if name in values}
  lines = evaluation.lines
  if all(line["predicted_emotion"] is not None for line in lines):
    kept["accuracy_by_emotion"] = metrics.accuracy_by_emotion(lines)
  run = evaluation.run
  return results.describe_run(run.workdir, run.config, split, kept)


def _tests(
  rows: Sequence[Row], corpora: Sequence[Sequence[Corpus]], swaps: np.ndarray
) -> list[Test]:
  """Tests every pair of systems, each metric's pairs as one family."""
  families: dict[str, list[Test]] = {name: [] for name in metrics.METRICS}
  systems = zip(rows, corpora, strict=True)
  for (one, first), (two, second) in itertools.combinations(systems, 2):
    # A run swaps with one run of the other system.
    pairs = list(zip(first, second, strict=False))
    tested = significance.compare_runs(pairs, swaps)
    for name, (difference, p_value) in tested.items():
      found = name, (one.title, two.title), difference, p_value
      families[name].append(Test(*found, p_value, len(pairs)))
  tests = []
  for family in families.values():
    corrected = significance.holm([test.p_value for test in family])
    tests += [
      dataclasses.replace(test, p_corrected=p_corrected)
      for test, p_corrected in zip(family, corrected, strict=True)
    ]
  return tests


def _cases(
  titles: Sequence[str], groups: Sequence[Sequence[_Evaluation]], count: int
) -> list[dict[str, Any]]:
  """Returns every system's response to some examples of different emotions."""
  # A system with several seeds is shown by its first.
  of_system = {t: g[0].lines for t, g in zip(titles, groups, strict=True)}
  lines = groups[0][0].lines

  def readable(tokens: str) -> str:
    return text.join_tokens(tokens.split())

  return [
    {
      "id": lines[index]["id"],
      "emotion": lines[index]["emotion"],
      "context": [readable(turn) for turn in lines[index].get("context", [])],
      "reference": readable(lines[index]["reference"]),
      "responses": {
        title: {
          "response": readable(own[index]["response"]),
          "emotion": own[index]["predicted_emotion"],
        }
        for title, own in of_system.items()
      },
    }
    for index in predictions.of_other_emotions(lines, count)
  ]
