"""Comparing runs: intervals, tests, tables and what is refused."""

import csv
import dataclasses
import io
import json
import pathlib
from typing import Any

import numpy as np
import pytest
import scipy.stats
from invented import VOCABULARY, WORDS, make_lines, make_run

from empdg_jax import main, metrics
from empdg_jax.analysis import compare, significance, tables
from empdg_jax.data.vocab import build_vocabulary


@pytest.fixture
def folders(tmp_path: pathlib.Path) -> list[pathlib.Path]:
  """Three systems' runs."""
  return [
    make_run(tmp_path / name, name, seed)
    for seed, name in enumerate(("empdg", "moel", "transformer"), start=1)
  ]


def test_a_replicate_of_the_split_is_the_split() -> None:
  """Every metric from sums equals the metric from the lines."""
  lines = make_lines(1)
  corpus = significance.summarize(lines, len(VOCABULARY))
  dialogues = significance.dialogues_of(lines)
  once = significance.replicate(corpus, np.ones((1, 40), int))
  expected = metrics.text_metrics(lines, len(VOCABULARY))
  for name, value in once.items():
    assert value[0] == pytest.approx(expected[name], rel=1e-9), name
  # And of a part of it: the first ten dialogues, all but the first twice.
  counts = np.zeros((1, 40), int)
  counts[0, :10] = 2
  counts[0, 0] = 1
  part = [
    line
    for line, dialogue in zip(lines, dialogues, strict=True)
    for _ in range(counts[0, dialogue])
  ]
  assert len(part) > 10
  expected = metrics.text_metrics(part, len(VOCABULARY))
  for name, value in significance.replicate(corpus, counts).items():
    assert value[0] == pytest.approx(expected[name], rel=1e-9), name


def test_interval_equals_scipys_bootstrap() -> None:
  lines = make_lines(2, dialogues=300)
  dialogues = significance.dialogues_of(lines)
  correct = np.array([x["emotion"] == x["predicted_emotion"] for x in lines])
  right = np.bincount(dialogues, correct)
  sizes = np.bincount(dialogues)

  expected = scipy.stats.bootstrap(
    (right, sizes),
    lambda r, s, axis: r.sum(axis) / s.sum(axis),
    paired=True,
    vectorized=True,
    n_resamples=2_000,
    method="percentile",
    rng=np.random.default_rng(1),
  ).confidence_interval
  corpus = significance.summarize(lines, 10)
  replicates = significance.replicate(corpus, significance.draw(300))
  low, high = significance.interval(
    correct.mean(), replicates["emotion_accuracy"]
  )

  assert low == pytest.approx(expected.low, abs=0.006)
  assert high == pytest.approx(expected.high, abs=0.006)
  assert high - low > 0.05


def test_permutations_swap_whole_dialogues() -> None:
  """Every metric equals that of the lines after the swaps."""
  lines = make_lines(1), make_lines(3)
  dialogues = significance.dialogues_of(lines[0])
  swaps = np.random.default_rng(2).random((4, 40)) < 0.5
  swaps[0] = False
  swaps[1] = True
  numbers: significance.Numbers = {}
  corpora = [significance.summarize(x, 18, numbers) for x in lines]
  permuted = significance.permute(corpora[0], corpora[1], swaps)
  for number, swap in enumerate(swaps):
    pairs = zip(*lines, dialogues, strict=True)
    swapped = [(b, a) if swap[d] else (a, b) for a, b, d in pairs]
    one, two = (
      metrics.text_metrics(x, 18) for x in map(list, zip(*swapped, strict=True))
    )
    for name, values in permuted.items():
      difference = one[name] - two[name]
      assert values[number] == pytest.approx(difference, abs=1e-9), name


def test_jackknife_leaves_out_each_dialogue() -> None:
  lines = make_lines(2, dialogues=5)
  dialogues = significance.dialogues_of(lines)
  without = significance.jackknife(significance.summarize(lines, 18))
  assert {"distinct_1", "ead_2", "different_responses"} <= without.keys()
  for left_out in range(5):
    rest = [x for x, d in zip(lines, dialogues, strict=True) if d != left_out]
    expected = metrics.text_metrics(rest, 18)
    for name, values in without.items():
      assert values[left_out] == pytest.approx(expected[name])


def test_the_variance_of_a_number_of_types_by_hand() -> None:
  """Four dialogues: the jackknife's variance, less the shared types' part."""
  responses = ["a x", "a b", "b c", "c d"]
  lines = [{"id": f"c:{i}:1", "response": r} for i, r in enumerate(responses)]
  variance = significance.jackknife_variance(
    [significance.summarize(lines, 18)]
  )["distinct_1"]
  # Alone are x, nothing, nothing and d; a, b and c are of two dialogues each,
  # of different ones, and a type more adds 100 / 8.
  without = np.array([400, 500, 500, 400]) / 6
  first = 3 / 4 * np.sum((without - without.mean()) ** 2)
  assert first / 2 > first - 3 * (100 / 8) ** 2
  assert variance == pytest.approx(first / 2)
  lines = [
    {"id": f"c:{i}:1", "response": r * 9}
    for i, r in enumerate(["p q ", "p r ", "s t ", "u u "] * 5)
  ]
  lines = [
    {**x, "response": f"{x['response']} w{i}" if i % 3 else "w"}
    for i, x in enumerate(lines)
  ]
  corpus = significance.summarize(lines, 18)
  without = significance.jackknife(corpus)["different_responses"]
  first = 19 / 20 * np.sum((without - without.mean()) ** 2)
  assert significance.jackknife_variance([corpus])[
    "different_responses"
  ] == pytest.approx(first)  # Every reply but "w" is of one dialogue.


def test_accuracy_has_mcnemars_exact_test() -> None:
  """30 examples right only in one run, 15 only in the other: scipy's."""
  differences = [1] * 30 + [-1] * 15 + [0] * 40
  expected = scipy.stats.binomtest(15, 45).pvalue
  assert significance.exact_p_value(differences) == pytest.approx(expected)
  # Sums of several examples and runs, against all 2 ** 10 swaps.
  differences = np.array([3, -1, 2, 2, 0, 1, -2, 1, 1, 3])
  signs = 1 - 2 * ((np.arange(1024)[:, None] >> np.arange(10)) & 1)
  expected = np.mean(np.abs(signs @ differences) >= differences.sum())
  assert significance.exact_p_value(differences) == pytest.approx(expected)


def test_runs_of_a_system_swap_together(tmp_path: pathlib.Path) -> None:
  """Copies of a run under other seeds add nothing to its evidence."""
  p_values = []
  for count in (1, 3):
    folders = []
    for name, lines in (("moel", 1), ("empdg", 2)):
      for seed in range(count):
        folder = make_run(tmp_path / f"{count}{name}{seed}", name, seed)
        written = "".join(json.dumps(x) + "\n" for x in make_lines(lines))
        (folder / "eval/test/predictions.jsonl").write_text(written)
        folders.append(folder)
    tests = compare.compare(folders, "test").tests
    assert {t.runs for t in tests} == {count}
    p_values.append({t.metric: t.p_value for t in tests})
  assert p_values[0] == pytest.approx(p_values[1])


def _drawn_pool(dialogues: int) -> list[list[dict[str, Any]]]:
  """Draws dialogues whose words, word pairs and replies follow Zipf's law."""
  rng = np.random.default_rng(0)

  def zipf(count: int, power: float) -> np.ndarray:
    chances = 1 / np.arange(1, count + 1) ** power
    return chances / chances.sum()

  names = np.array([*map(str, range(2_000))])
  names[3] = "."
  first = zipf(2_000, 1.4)
  followers = rng.choice(2_000, (2_000, 60), p=first)
  ranks = zipf(60, 1.5)

  def reply() -> list[str]:
    words = [int(rng.choice(2_000, p=first))]
    for rank in rng.choice(60, int(rng.integers(5, 16)), p=ranks):
      words.append(int(followers[words[-1], rank]))
    return names[words].tolist()

  stock = [reply() for _ in range(200)]
  pool = []
  for dialogue in range(dialogues):
    lines = []
    shared = rng.normal()  # What the examples of a dialogue have in common.
    for turn in range(int(rng.integers(1, 3))):
      response = reply()
      if rng.random() < 0.4:
        response = stock[int(200 * rng.random() ** 3)]
      elif rng.random() < 0.2:
        response = [*response[:4], ".", *response[:4], "."]
      kept = int(rng.integers(1, 6))
      reference = response[:kept] + reply()
      tokens = len(reference) + 1
      felt = shared + rng.normal()
      lines.append(
        {
          "id": f"c:{dialogue}:{turn}",
          "response": " ".join(response),
          "reference": " ".join(reference),
          "emotion": "sad",
          "predicted_emotion": "sad" if felt > 0 else "proud",
          "likeliest_emotions": ["sad"] * (felt > -1),
          "nll": float(tokens * (3 + 0.3 * shared + 0.3 * rng.normal())),
          "tokens": tokens,
        }
      )
    pool.append(lines)
  return pool


def _renamed(dialogues: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
  """Returns the dialogues' lines, numbered from 0."""
  return [
    {**line, "id": f"c:{number}:{turn}"}
    for number, lines in enumerate(dialogues)
    for turn, line in enumerate(lines)
  ]


@pytest.fixture(scope="module")
def pool() -> list[list[dict[str, Any]]]:
  """Many dialogues of one system; this takes about 20 seconds."""
  return _drawn_pool(160_000)


@pytest.mark.slow
def test_intervals_cover_as_often_as_they_say(
  pool: list[list[dict[str, Any]]],
) -> None:
  """1,000 disjoint samples, each with its 95% intervals of their mean."""
  size, count = 160, 1_000
  counts, numbers = significance.draw(size), {}
  figures: dict[str, list[float]] = {name: [] for name in metrics.METRICS}
  ends: dict[str, list[tuple[float, float]]] = {n: [] for n in metrics.METRICS}
  for first in range(0, size * count, size):
    lines = _renamed(pool[first : first + size])
    corpus = significance.summarize(lines, 2_000, numbers)
    values = significance.replicate(corpus, np.ones((1, size), int))
    drawn = significance.replicate(significance.means_of(corpus), counts)
    variances = significance.jackknife_variance([corpus])
    for name, metric in metrics.METRICS.items():
      value = float(values[name][0])
      figures[name].append(value)
      ends[name].append(
        significance.normal_interval(value, variances[name])
        if metric.types
        else significance.interval(value, drawn[name])
      )
  covered = {
    name: np.mean(
      [low <= np.mean(figures[name]) <= high for low, high in pairs]
    )
    for name, pairs in ends.items()
  }
  assert min(covered.values()) >= 0.93, covered
  assert max(covered.values()) <= 0.97, covered


@pytest.mark.slow
def test_tests_reject_a_true_null_as_often_as_they_say(
  pool: list[list[dict[str, Any]]],
) -> None:
  """2,000 pairs of samples that are alike, all tests at .05.

  In a pair, dialogues of both are exchangeable, as under the null hypothesis.
  """
  size, count = 40, 2_000
  swaps, numbers = significance.draw_swaps(size)[:999], {}
  p_values: dict[str, list[float]] = {name: [] for name in metrics.METRICS}
  for first in range(0, 2 * size * count, 2 * size):
    parts = pool[first : first + size], pool[first + size : first + 2 * size]
    pair = [
      significance.summarize(_renamed(part), 2_000, numbers) for part in parts
    ]
    for name, (_, p) in significance.compare_runs(
      [(pair[0], pair[1])], swaps
    ).items():
      p_values[name].append(p)
  rejected = {n: np.mean(np.less(p, 0.05)) for n, p in p_values.items()}
  assert max(rejected.values()) <= 0.065, rejected
  for name, metric in metrics.METRICS.items():
    # Exact tests of shares are discrete, and so may reject less often.
    assert metric.share_of or rejected[name] >= 0.035, (name, rejected)


def test_interval_of_distinct_lies_around_the_figure() -> None:
  """A replicate holds about 1 - 1/e of the dialogues, some repeatedly."""
  lines = [
    {**line, "response": f"a{i} b{i}"} for i, line in enumerate(make_lines(1))
  ]
  dialogues = significance.dialogues_of(lines)
  corpus = significance.summarize(lines, 10)
  counts = significance.draw(int(dialogues.max()) + 1)
  drawn = significance.replicate(corpus, counts)["distinct_2"]
  assert metrics.distinct_n([x["response"] for x in lines], 2) == 100.0
  assert drawn.mean() == pytest.approx(100 * (1 - np.exp(-1)), abs=1.0)
  low, high = significance.interval(100.0, drawn)
  assert low < 100.0 < high


def test_comparison_equals_a_direct_computation(
  folders: list[pathlib.Path],
) -> None:
  """Figures, intervals, p-values and their correction, once more by hand."""
  compared = compare.compare(folders, "test")
  assert [row.title for row in compared.rows] == [
    "Transformer", "MoEL", "EmpDG",
  ]  # fmt: skip
  rng = np.random.default_rng(0)
  counts = rng.multinomial(40, np.full(40, 1 / 40), size=2_000)
  p_values, perplexities, sums = [], [], []
  for seed in (3, 2, 1):
    lines = make_lines(seed)
    dialogues = significance.dialogues_of(lines)
    nll = np.bincount(dialogues, [x["nll"] for x in lines])
    tokens = np.bincount(dialogues, [x["tokens"] for x in lines])
    perplexities.append(np.exp(nll.sum() / tokens.sum()))
    sums.append((nll, tokens))
  for row, value, (nll, tokens) in zip(
    compared.rows, perplexities, sums, strict=True
  ):
    drawn = np.exp((counts @ nll) / (counts @ tokens))
    figure = row.figures["perplexity"]
    assert figure is not None
    assert figure.value == pytest.approx(value, rel=1e-9)
    low, high = np.percentile(drawn, [2.5, 97.5]) - drawn.mean() + value
    assert (figure.low, figure.high) == pytest.approx((low, high), rel=1e-9)
    assert figure.paper is None
  for i, j in ((0, 1), (0, 2), (1, 2)):
    difference = perplexities[i] - perplexities[j]
    (one, tokens), (two, _) = sums[i], sums[j]
    swaps = np.random.default_rng(0).integers(0, 2, (10_000, 40), np.uint8)
    drawn = np.exp((one.sum() + swaps @ (two - one)) / tokens.sum())
    drawn -= np.exp((two.sum() + swaps @ (one - two)) / tokens.sum())
    beyond = np.abs(drawn) >= abs(difference)
    p_values.append((beyond.sum() + 1) / 10_001)
  # Holm: the smallest times 3, the next times 2, the largest; never falling.
  order = np.argsort(p_values)
  corrected, highest = np.zeros(3), 0.0
  for factor, index in zip((3, 2, 1), order, strict=True):
    highest = max(highest, min(1.0, factor * p_values[index]))
    corrected[index] = highest
  tests = [t for t in compared.tests if t.metric == "perplexity"]
  assert [t.p_value for t in tests] == pytest.approx(p_values)
  assert [t.p_corrected for t in tests] == pytest.approx(corrected)
  assert min(p_values) < 0.05  # The seeds' losses do differ.


def test_a_transformer_has_no_accuracy(folders: list[pathlib.Path]) -> None:
  compared = compare.compare(folders, "test")
  rows = {row.name: row for row in compared.rows}
  assert rows["transformer"].figures["emotion_accuracy"] is None
  assert rows["moel"].figures["emotion_accuracy"] is not None
  pairs = {t.systems for t in compared.tests if t.metric == "emotion_accuracy"}
  assert pairs == {("MoEL", "EmpDG")}


def test_seeds_are_pooled(tmp_path: pathlib.Path) -> None:
  folders = [make_run(tmp_path / str(seed), "moel", seed) for seed in (1, 2, 3)]
  folders.append(make_run(tmp_path / "other", "empdg", 4))
  compared = compare.compare(folders, "test")
  moel, empdg = compared.rows
  assert len(moel.runs) == 3
  values = [
    metrics.text_metrics(make_lines(seed), len(VOCABULARY))
    for seed in (1, 2, 3)
  ]
  for name, figure in moel.figures.items():
    of_name = [v.get(name) for v in values]
    if None in of_name:  # Invented predictions have no ranking.
      assert figure is None
      continue
    assert figure is not None
    assert figure.value == pytest.approx(np.mean(of_name))
    assert figure.deviation == pytest.approx(np.std(of_name, ddof=1))
    assert figure.low is not None
    assert figure.low <= figure.value <= (figure.high or 0.0)
  assert empdg.figures["bleu"].deviation is None
  # A run with another setting is a system of its own.
  folders[1] = make_run(tmp_path / "top", "moel", 2, model__listener_top_k=5)
  titles = [row.title for row in compare.compare(folders, "test").rows]
  assert titles == ["MoEL (1)", "MoEL (top)", "EmpDG"]


@pytest.mark.parametrize(
  ("models", "tables"),
  [
    (("moel", "empdg"), ["Table 1"]),
    (("empdg_wo_d", "empdg"), ["Table 2"]),
    (("empdg",), ["Table 1"]),
    (("moel", "empdg_wo_d", "empdg"), ["Table 1", "Table 2"]),
  ],
)
def test_a_table_is_shown_if_no_other_holds_its_systems(
  tmp_path: pathlib.Path,
  models: tuple[str, ...],
  tables: list[str],
  capsys: pytest.CaptureFixture[str],
) -> None:
  folders = [make_run(tmp_path / m, m, i) for i, m in enumerate(models)]
  argv = ["compare", *map(str, folders), "--format=markdown"]
  assert main.main(argv) == 0
  said = capsys.readouterr().out
  assert [t for t in ("Table 1", "Table 2") if t in said] == tables


def test_results_for_a_repository(
  tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  """Runs of other machines, with the same data elsewhere, form one row."""
  folders = []
  for seed in (1, 2):
    lexicon = tmp_path / f"words{seed}.txt"
    lexicon.write_text("storm\n")
    folders.append(
      make_run(
        tmp_path / str(seed),
        "moel",
        seed,
        data__lexicon=str(lexicon),
        train__mle_checkpoint=f"somewhere/{seed}",
      )
    )
  record = {"commit": "abc", "hardware": "2 cores", "hours": 1.5}
  (folders[0] / "record.json").write_text(json.dumps(record))
  valid = {"split": "valid", "perplexity": 9.5, "bleu": 2.0, "source": "x"}
  (folders[1] / "eval/valid").mkdir()
  (folders[1] / "eval/valid/metrics.json").write_text(json.dumps(valid))
  folders.append(make_run(tmp_path / "other", "empdg", 3))
  stem = tmp_path / "results" / "paper.v1"
  argv = ["compare", *map(str, folders), f"--results={stem}", "--cases=1"]
  assert main.main(argv) == 0
  text = (stem.parent / "paper.v1.json").read_text()
  values = json.loads(text)
  assert values["protocol"] == {
    "split": "test", "example_set": "empdg", "vocab_scope": "train",
    "max_decode_steps": 30, "beam_size": 1, "text_rules": 2,
  }  # fmt: skip
  assert list(values["systems"]) == ["MoEL", "EmpDG"]
  moel = values["systems"]["MoEL"]
  first, second = moel["seeds"]
  assert (first["seed"], second["seed"]) == (1, 2)
  assert first["config_hash"] == second["config_hash"]
  assert (first["commit"], first["hours"]) == ("abc", 1.5)
  assert second["commit"] is None
  assert second["valid"] == {"perplexity": 9.5, "bleu": 2.0}
  expected = metrics.text_metrics(make_lines(1), len(VOCABULARY))
  assert first["test"]["distinct_2"] == expected["distinct_2"]
  by_emotion = metrics.accuracy_by_emotion(make_lines(1))
  assert first["test"]["accuracy_by_emotion"] == by_emotion
  both = [seed["test"]["perplexity"] for seed in moel["seeds"]]
  assert moel["mean"]["perplexity"] == pytest.approx(np.mean(both))
  assert moel["std"]["perplexity"] == pytest.approx(np.std(both, ddof=1))
  assert {t["metric"] for t in values["tests"]} == expected.keys() - {
    "examples", "vocab_size",
  }  # fmt: skip
  # No text of the dataset: neither contexts nor responses nor references.
  table = (stem.parent / "paper.v1.md").read_text()
  for line in make_lines(1):
    for name in ("reference", "response"):
      assert not line[name] or f'"{line[name]}"' not in text
  assert "speaker" not in table
  assert "| perplexity" in table
  # Another lexicon is another system.
  other = tmp_path / "words3.txt"
  other.write_text("calm\n")
  folders.append(make_run(tmp_path / "4", "moel", 4, data__lexicon=str(other)))
  assert len(compare.compare(folders, "test").rows) == 3
  (folders[0] / "record.json").write_text("[]")
  assert "record.json: damaged" in _refused(capsys, *folders)
  (folders[0] / "record.json").unlink()
  (tmp_path / "file").write_text("")
  said = _refused(capsys, *folders, f"--results={tmp_path}/file/paper")
  assert "cannot write" in said


def test_the_papers_figures_are_of_its_examples(tmp_path: pathlib.Path) -> None:
  """They stand beside no run on other examples."""
  for examples, expected in (("empdg", 6.94), ("all_turns", None)):
    folder = make_run(
      tmp_path / examples, "empdg", 1, data__example_set=examples
    )
    (row,) = compare.compare([folder], "test").rows
    figure = row.figures["distinct_2"]
    assert figure is not None
    assert figure.paper == expected


def test_the_summary_sets_ours_beside_the_papers(
  tmp_path: pathlib.Path,
) -> None:
  """Main figures, hours, and what the discriminators add to the control."""
  folders = [
    make_run(tmp_path / f"{signal}{seed}", "empdg", seed, **fields)
    for seed in (1, 2)
    for signal, fields in (
      ("ours", {}),
      ("control", {"train__generator_signal": "constant"}),
    )
  ]
  for folder, hours in zip(folders, (0.5, 1.0, 1.0, 1.0), strict=True):
    (folder / "record.json").write_text(json.dumps({"hours": hours}))
  stem = tmp_path / "paper"
  tables.write_results(compare.compare(folders, "test"), stem)
  values = json.loads((tmp_path / "paper.json").read_text())
  ours, control = values["systems"].values()
  assert ours["paper"]["distinct_2"] == 6.94
  assert control["paper"] == {}
  text = tables.summary(values)
  assert (tmp_path / "paper.md").read_text().startswith(text)
  header, _, first, second = text.splitlines()[:4]
  assert header.split("|")[-2].strip() == "hours"
  cells = [cell.strip() for cell in first.split("|")]
  mean, std = ours["mean"]["distinct_2"], ours["std"]["distinct_2"]
  assert (cells[1], *cells[-3:-1]) == ("EmpDG", "2", "0.75")
  assert f"{mean:.2f} ± {std:.2f} (6.94)" in cells
  assert second.split("|")[1].strip() == "EmpDG, control"
  effect, p_value = text.splitlines()[-2:]
  difference = mean - control["mean"]["distinct_2"]
  assert f" {difference:+.2f} " in effect
  (test,) = (t for t in values["tests"] if t["metric"] == "bleu")
  assert f" {test['p_corrected']:.4f} " in p_value


@pytest.mark.parametrize("form", tables.FORMATS)
def test_formats(
  folders: list[pathlib.Path],
  tmp_path: pathlib.Path,
  form: str,
  capsys: pytest.CaptureFixture[str],
) -> None:
  folders = [*folders, make_run(tmp_path / "ablation", "empdg_wo_d", 4)]
  argv = ["compare", *map(str, folders), f"--format={form}", "--cases=2"]
  assert main.main(argv) == 0
  said = capsys.readouterr().out
  compared = compare.compare(folders, "test", cases=2)
  accuracy = compared.rows[1].figures["emotion_accuracy"]
  assert accuracy is not None
  if form == "json":
    assert json.loads(said)["rows"][1]["figures"][
      "emotion_accuracy"
    ] == dataclasses.asdict(accuracy)
    assert len(json.loads(said)["cases"]) == 2
  elif form == "csv":
    rows = list(csv.DictReader(io.StringIO(said)))
    (row,) = [
      row
      for row in rows
      if (row["system"], row["metric"]) == ("MoEL", "emotion_accuracy")
    ]
    assert float(row["value"]) == accuracy.value
    assert float(row["paper"]) == 0.32
  else:
    assert f"{accuracy.value:.4f}" in said
    assert "(0.3200)" in said
    assert "Table 1" in said
    assert "Table 2" in said
  if form == "latex":
    assert said.count(r"\begin{tabular}") == said.count(r"\end{tabular}") == 3
    body = [line for line in said.splitlines() if line.endswith(r"\\")]
    assert all(line.count("&") in (2, 3, len(metrics.METRICS)) for line in body)
  if form in ("markdown", "terminal"):
    reply = make_lines(1)[0]["response"]
    assert f"EmpDG, {make_lines(1)[0]['predicted_emotion']}: {reply}" in said


def _refused(capsys: pytest.CaptureFixture[str], *argv: Any) -> str:
  assert main.main(["compare", *map(str, argv)]) == 2
  (line,) = capsys.readouterr().err.strip().splitlines()
  return line


def test_refuses_what_cannot_be_compared(
  folders: list[pathlib.Path],
  tmp_path: pathlib.Path,
  capsys: pytest.CaptureFixture[str],
) -> None:
  first = folders[0]
  assert "no run folder is given" in _refused(capsys)
  (tmp_path / "empty").mkdir()
  assert "is no run folder" in _refused(capsys, first, tmp_path / "empty")
  said = _refused(capsys, first, "--split=valid")
  assert "no evaluation of valid" in said
  assert f"empdg evaluate --workdir={first} --split=valid" in said
  assert "--split=tset" in _refused(capsys, first, "--split=tset")
  assert "--format=pdf" in _refused(capsys, first, "--format=pdf")

  turns = make_run(tmp_path / "turns", "moel", 1, data__example_set="all_turns")
  assert "example sets, 'empdg' and 'all_turns'" in _refused(
    capsys, first, turns
  )
  rules = make_run(tmp_path / "rules", "moel", 1, data__text_rules=1)
  assert "rules, of the versions 2 and 1" in _refused(capsys, first, rules)
  words = make_run(tmp_path / "words", "moel", 1)
  fewer = build_vocabulary([WORDS[:5]])
  (words / "vocab.txt").write_text(fewer.to_text())
  assert "different vocabularies, of 18 and 13" in _refused(
    capsys, first, words
  )

  predictions = folders[1] / "eval" / "test" / "predictions.jsonl"
  whole = predictions.read_text()
  lines = whole.splitlines(keepends=True)
  predictions.write_text("".join(lines[:-1]))
  assert f"{len(lines) - 1} predictions of {len(lines)}" in _refused(
    capsys, *folders
  )
  predictions.write_text(whole[:-20])
  assert f"predictions.jsonl:{len(lines)}: no JSON" in _refused(
    capsys, *folders
  )
  predictions.write_text(whole.replace('"reference"', '"gold"', 1))
  assert "predictions.jsonl:1: no 'reference'" in _refused(capsys, *folders)
  predictions.write_text("".join([lines[1], lines[0], *lines[2:]]))
  assert "different examples" in _refused(capsys, *folders)
