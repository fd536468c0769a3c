"""The registry of metrics: a new record reaches everything that reads it."""

import io
import json
import pathlib
from typing import Any

import invented
import numpy as np
import pytest
import sacrebleu
from rich.console import Console

from empdg_jax import main, metrics
from empdg_jax.analysis import compare, significance, tables
from empdg_jax.inference import model_card, predictions
from empdg_jax.training import validation


@pytest.fixture
def folders(tmp_path: pathlib.Path) -> list[pathlib.Path]:
  """Two systems' runs."""
  return [
    invented.make_run(tmp_path / name, name, seed)
    for seed, name in enumerate(("empdg", "moel"), start=1)
  ]


def test_a_new_metric_reaches_files_tables_intervals_and_tests(
  folders: list[pathlib.Path],
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
) -> None:
  """The share of the reference's words that the response has, and types."""
  monkeypatch.setitem(
    metrics.METRICS,
    "recall",
    metrics.Metric(
      "word recall",
      3,
      ("reference",),
      {
        "recalled": lambda line: len(
          set(line["reference"].split()) & set(line["response"].split())
        ),
        "wanted": lambda line: len(set(line["reference"].split())),
      },
      lambda t: t["recalled"] / t["wanted"] + 0 * t["first_words"],
      {"first_words": lambda line: line["response"].split()[:1]},
    ),
  )
  values, wanted = [], []
  for seed in (1, 2):
    lines = invented.make_lines(seed)
    values.append(metrics.text_metrics(lines, 18)["recall"])
    pairs = [
      (set(x["reference"].split()), set(x["response"].split())) for x in lines
    ]
    recalled = sum(len(reference & response) for reference, response in pairs)
    wanted.append(recalled / sum(len(reference) for reference, _ in pairs))
  assert values == pytest.approx(wanted)
  # Where a line lacks the field, the metric is left out.
  assert "recall" not in metrics.text_metrics([{"response": "a"}], 18)

  path = folders[0] / "eval" / "test" / "predictions.jsonl"
  assert main.main(["metrics", f"--predictions={path}"]) == 0
  said = json.loads(capsys.readouterr().out)
  assert said["recall"] == values[0]
  console = Console(file=io.StringIO())
  predictions.print_metrics({"model": "m", "split": "test", **said}, console)
  assert isinstance(console.file, io.StringIO)
  assert f"{values[0]:.3f}" in console.file.getvalue()
  assert f"| recall | {values[0]:.3f} |" in model_card._metrics_text(
    {"test": said}
  )

  compared = compare.compare(folders, "test")
  figure = compared.rows[1].figures["recall"]
  assert compared.rows[1].name == "empdg"
  assert figure is not None
  assert figure.value == values[0]
  assert figure.low is not None
  assert figure.high is not None
  assert figure.low < figure.value < figure.high
  (test,) = [t for t in compared.tests if t.metric == "recall"]
  assert test.difference == pytest.approx(values[1] - values[0])
  assert 0 < test.p_value <= test.p_corrected <= 1
  cell = f"{values[0]:.3f} [{figure.low:.3f}, {figure.high:.3f}]"
  for form in ("markdown", "latex"):
    file = io.StringIO()
    tables.print_comparison(compared, form, Console(file=file))
    (row,) = [x for x in file.getvalue().splitlines() if "word recall  " in x]
    assert cell in row
    assert f"{test.difference:+.3f} ({test.p_corrected:.3f})" in file.getvalue()


def test_metrics_json_keeps_its_order() -> None:
  lines = invented.make_lines(1)
  assert list(metrics.text_metrics(lines, 18)) == [
    "examples", "perplexity", "perplexity_per_example", "emotion_accuracy",
    "distinct_1", "distinct_2", "ead_1", "ead_2", "bleu", "average_length",
    "distinct_1_at_30", "distinct_2_at_30", "repetition",
    "sentence_repetition", "different_responses", "vocab_size",
  ]  # fmt: skip


def test_repetition_and_different_responses_by_hand() -> None:
  responses = [
    "no . yes . no .",  # A sentence, but no 3-gram.
    "i see you . i see you , too",
    "oh no !",
    "oh no !",
    "",
  ]
  values = metrics.text_metrics([{"response": r} for r in responses], 18)
  assert values["repetition"] == 1 / 5
  assert values["sentence_repetition"] == 1 / 5
  assert values["different_responses"] == 4 / 5
  assert values["average_length"] == (6 + 9 + 3 + 3) / 5


def test_distinct_at_30_tokens_by_hand() -> None:
  """The 31st token, which is new, does not count."""
  response = " ".join(["a", "b"] * 15 + ["c"])
  values = metrics.text_metrics([{"response": response}], 18)
  assert values["distinct_1"] == 100 * 3 / 31
  assert values["distinct_1_at_30"] == 100 * 2 / 30
  assert values["distinct_2_at_30"] == 100 * 2 / 29
  cut = metrics.text_metrics([{"response": response[:59]}], 18)
  for n in (1, 2):
    assert cut[f"distinct_{n}"] == values[f"distinct_{n}_at_30"]


def test_accuracy_of_the_likeliest_and_by_emotion() -> None:
  labels = ["sad", "proud", "afraid", "angry", "joyful", "lonely"]
  lines = [
    {"response": "", "emotion": gold, "predicted_emotion": "sad",
     "likeliest_emotions": labels[:5]}
    for gold in labels
  ]  # fmt: skip
  values = metrics.text_metrics(lines, 18)
  assert values["emotion_accuracy"] == 1 / 6
  assert values["top3_accuracy"] == 3 / 6
  assert values["top5_accuracy"] == 5 / 6
  by_emotion = metrics.accuracy_by_emotion(lines)
  assert by_emotion == {label: float(label == "sad") for label in labels}
  assert metrics.confusion(lines)["lonely"] == {"sad": 1}
  # Predictions of earlier versions have no ranking.
  del lines[0]["likeliest_emotions"]
  values = metrics.text_metrics(lines, 18)
  assert values["emotion_accuracy"] == 1 / 6
  assert "top3_accuracy" not in values


@pytest.mark.parametrize("count", [2, 100])
def test_bleu_is_sacrebleus(count: int) -> None:
  """Also of replicates, and where no 4-gram matches and BLEU is smoothed."""
  lines = invented.make_lines(1)[-count:]

  def expected(some: list[dict[str, Any]]) -> float:
    return sacrebleu.corpus_bleu(
      [line["response"] for line in some],
      [[line["reference"] for line in some]],
      tokenize="none",
      force=True,
    ).score

  smoothed = [
    {**lines[0], "response": "a b x", "reference": "a b y z x"},
    {**lines[0], "response": "", "reference": "a b"},
    {**lines[0], "response": "d ", "reference": "e f d"},
  ]
  for some in (lines, smoothed):
    value = metrics.text_metrics(some, 18)["bleu"]
    assert value == pytest.approx(expected(some), rel=1e-12)
    some = [{**line, "id": f"a:{i}:1"} for i, line in enumerate(some)]
    corpus = significance.summarize(some, 18)
    counts = np.random.default_rng(0).multinomial(
      len(some), [1 / len(some)] * len(some), size=5
    )
    bleu = significance.replicate(corpus, counts)["bleu"]
    for row, value in zip(counts, bleu, strict=True):
      drawn = [x for x, n in zip(some, row, strict=True) for _ in range(n)]
      assert value == pytest.approx(expected(drawn), rel=1e-12)


def test_validation_finishes_the_devices_sums_alike() -> None:
  """The sums of `steps.eval_step` give what the lines give."""
  lines = invented.make_lines(1)
  _, sums, _ = metrics.contributions(lines)
  names = ("nll", "tokens", "mean_nll", "emotion_correct", "examples")
  of_devices = {name: float(sum(sums[name])) for name in names}
  averages = validation.average_metrics({"loss": 99.0, **of_devices})
  expected = metrics.text_metrics(lines, 18)
  assert averages.pop("loss") == 99.0 / len(lines)
  assert list(averages) == [
    "perplexity", "perplexity_per_example", "emotion_accuracy",
  ]  # fmt: skip
  for name, value in averages.items():
    assert value == pytest.approx(expected[name], rel=1e-12)
  del of_devices["emotion_correct"]
  averages = validation.average_metrics({"loss": 99.0, **of_devices})
  assert "emotion_accuracy" not in averages


def test_latex_escapes_and_names_its_package(tmp_path: pathlib.Path) -> None:
  """A title with LaTeX's special characters, and seeds with their ±."""
  folders = [
    invented.make_run(tmp_path / "a_b&50%", "moel", 1),
    invented.make_run(tmp_path / "c", "moel", 2, model__listener_top_k=5),
    invented.make_run(tmp_path / "d", "empdg", 3),
    invented.make_run(tmp_path / "e", "empdg", 4),
  ]
  file = io.StringIO()
  compared = compare.compare(folders, "test")
  tables.print_comparison(compared, "latex", Console(file=file))
  code, comments = [], []
  for line in file.getvalue().splitlines():
    (comments if line.startswith("%") else code).append(line)
  assert any(r"\usepackage{booktabs}" in line for line in comments)
  written = "\n".join(code)
  assert r"MoEL (a\_b\&50\%)" in written
  assert r" $\pm$ " in written
  assert "±" not in written
  assert r"\toprule" in written


@pytest.mark.parametrize("response", ["a", ""])
def test_no_bigram_is_no_error(response: str) -> None:
  """Neither for a corpus nor in replicates, which need no reference either."""
  lines = [{"id": f"a:{i}:1", "response": response} for i in range(3)]
  corpus = significance.summarize(lines, 10)
  drawn = significance.replicate(corpus, np.ones((2, 3), int))
  values = metrics.text_metrics(lines, 10)
  assert values["distinct_2"] == values["ead_2"] == 0.0
  for name, value in drawn.items():
    np.testing.assert_allclose(value, values[name])
