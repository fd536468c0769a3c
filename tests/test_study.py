"""The human evaluation without a server: protocol, answers and statistics."""

import csv
import html.parser
import io
import json
import pathlib
import shutil
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
from helpers import refused
from invented import make_run
from studies import (
  SYSTEMS,
  answer_in_potato,
  lines_of,
  planted,
  potato_state,
  small,
  sources,
  write_jsonl,
)

from empdg_jax import main
from empdg_jax.analysis import compare
from empdg_jax.config import InputError
from empdg_jax.web import (
  study,
  study_answers,
  study_pages,
  study_platforms,
  study_potato,
  study_report,
  study_statistics,
)
from empdg_jax.web.study import Plan, Study
from empdg_jax.web.study_potato import Answer

NAN = np.nan
# Krippendorff, Computing Krippendorff's alpha-reliability (2011): 4 observers,
# 12 units.
KRIPPENDORFF = np.array(
  [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, NAN, NAN, NAN],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NAN, 3],
    [NAN, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NAN],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NAN],
  ]
)
# Fleiss, Measuring nominal scale agreement among many raters (1971), in the
# textbook's table: 10 subjects, 5 categories, 14 raters.
FLEISS = (
  (0, 0, 0, 0, 14), (0, 2, 6, 4, 2), (0, 0, 3, 5, 6), (0, 3, 9, 2, 0),
  (2, 2, 8, 1, 1), (7, 7, 0, 0, 0), (3, 2, 6, 3, 0), (2, 5, 3, 2, 2),
  (6, 5, 2, 1, 0), (0, 2, 2, 3, 7),
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
  """A small study's folder."""
  study_answers.write(small(), tmp_path / "study")
  return tmp_path / "study"


@pytest.mark.parametrize(
  ("level", "alpha"),
  [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)],
)
def test_alpha_of_krippendorffs_example(level: Any, alpha: float) -> None:
  found = study_statistics.krippendorff_alpha(KRIPPENDORFF, level)
  assert found == pytest.approx(alpha, abs=5e-4)


def test_kappa_of_the_textbooks_table() -> None:
  columns = [
    [category for category, count in enumerate(row) for _ in range(count)]
    for row in FLEISS
  ]
  table = np.array(columns, float).T  # -> [raters, subjects]
  assert study_statistics.fleiss_kappa(table) == pytest.approx(0.210, abs=5e-4)


def test_agreement_that_is_undefined() -> None:
  same = np.ones((3, 4))
  lonely = np.array([[1, NAN], [NAN, 2]])
  for table in (same, lonely):
    assert study_statistics.krippendorff_alpha(table, "ordinal") is None
    assert study_statistics.fleiss_kappa(table) is None


def test_wilson_and_sign_test_by_hand() -> None:
  """Wilson's interval of 15 in 50 is .191 to .438 (R's prop.test agrees)."""
  low, high = study_statistics.wilson([1.0] * 15 + [0.0] * 35, 50)
  assert (low, high) == pytest.approx((0.1910, 0.4375), abs=1e-4)
  # Three annotators who always agree are worth one each dialogue.
  again = study_statistics.wilson([1.0] * 15 + [0.0] * 35, 150)
  assert again == pytest.approx((low, high))
  # 9 of 10 signs: 2 (10 + 1) / 1024.
  assert study_statistics.sign_test([1] * 9 + [-1, 0]) == pytest.approx(
    22 / 1024
  )
  assert study_statistics.sign_test([0, 0]) == 1.0


def test_a_mean_has_a_bootstrap_interval() -> None:
  values = list(np.random.default_rng(0).normal(3, 1, 400))
  mean, low, high = study_statistics.mean_interval(values)
  error = np.std(values) / np.sqrt(400)
  assert (low, high) == pytest.approx(
    (mean - 1.96 * error, mean + 1.96 * error), abs=0.01
  )


def test_the_one_who_disagrees_with_all_others() -> None:
  good = np.tile(np.arange(1, 6), 4).astype(float)
  table = np.stack([good, good, 6 - good])
  assert study_statistics.dissenters([(table, "ordinal")]) == [2]
  assert study_statistics.dissenters([(table[1:], "ordinal")]) == []


def test_a_sample_is_stratified_and_seeded() -> None:
  """Of 12 dialogues in three emotions, six: two of each; one turn of each."""
  drawn = study.sample(sources(), Plan(dialogues=6))
  numbers = [int(example.split(":")[1]) for example in drawn]
  assert len(set(numbers)) == 6
  assert Counter(n % 3 for n in numbers) == {0: 2, 1: 2, 2: 2}
  assert study.sample(sources(), Plan(dialogues=6)) == drawn
  assert study.sample(sources(), Plan(dialogues=6, seed=1)) != drawn


def test_orders_are_balanced() -> None:
  """Within an annotator and across them, in both parts."""
  content = study.build(
    sources(30), Plan(dialogues=30, annotators=3, controls=0)
  )
  key = content.key["items"]
  for order in content.orders["rating"]:
    assert len(order) == len(set(order)) == 90
    for start in (0, 30, 60):
      seen = [key[item] for item in order[start : start + 30]]
      assert len({one["example"] for one in seen}) == 30
      assert Counter(one["systems"][0] for one in seen) == dict.fromkeys(
        SYSTEMS, 10
      )
  for order in content.orders["pairwise"]:
    sides = Counter(
      (key[item]["systems"][1], key[item]["first"]) for item in order
    )
    assert set(sides.values()) == {15}
  first, second, third = map(set, content.orders["pairwise"])
  assert not first & second
  assert first == third
  assert content.orders["pairwise"][0] != content.orders["pairwise"][2]


def test_names_are_in_the_key_alone(folder: pathlib.Path) -> None:
  for path in folder.rglob("*"):
    if path.is_file() and path.name != "key.json":
      said = path.read_text()
      # The invented responses hold their system's name in small letters.
      assert not any(name in said for name in SYSTEMS), path
      assert "conversation:" not in said, path
      assert "gold" not in said.replace("gold ", ""), path
  assert (folder / "key.json").stat().st_mode & 0o077 == 0


def test_identical_replies_are_one_item_and_a_tie(
  tmp_path: pathlib.Path,
) -> None:
  given = sources(4, ("EmpDG", "MoEL"), turns=1)
  for source in given:
    for line in list(source.lines.values())[:2]:
      line["response"] = "the same ."
  content = study.build(given, Plan(dialogues=4, annotators=2, controls=0))
  assert [len(order) for order in content.orders["rating"]] == [6, 6]
  assert [len(order) for order in content.orders["pairwise"]] == [2, 2]
  study_answers.write(content, tmp_path / "study")

  def answer(annotator: int, item: str) -> dict[str, Any]:
    key = content.key["items"][item]
    if content.items[item]["part"] == "pairwise":
      return {"choice": key["first"]}
    value = 5 if "EmpDG" in key["systems"] else 1
    return dict.fromkeys(study.METRICS, value)

  answer_in_potato(content, tmp_path / "study", answer)
  assert main.main(["study", "import", f"--study={tmp_path}/study"]) == 0
  report = study_report.report(tmp_path / "study")
  (pair,) = report.pairs
  assert (pair.win.value, pair.loss.value, pair.tie.value) == (50, 0, 50)
  assert (pair.judgements, pair.identical) == (8, 2)
  assert pair.p_value == 0.5  # Two dialogues of two: 2 / 4.
  # Merged replies count for both systems: 5, 5, 1, 1.
  assert report.means["MoEL"]["empathy"].value == 3
  assert report.means["EmpDG"]["empathy"].value == 5
  assert (pair.win.paper, pair.loss.paper, pair.tie.paper) == (35.7, 31.2, 33.1)
  assert report.means["EmpDG"]["fluency"].paper == 3.67


def test_controls_have_their_share() -> None:
  content = small()
  key = content.key["items"]
  for part in study.PARTS:
    order = content.orders[part][0]
    controls = [item for item in order if "control" in key[item]]
    assert len(controls) / len(order) == pytest.approx(0.2, abs=0.05), part
  golds = [k for k in key.values() if k.get("control") == "gold"]
  assert golds
  bare = sources()
  for source in bare:
    for line in source.lines.values():
      line.pop("reference")
  with pytest.raises(InputError, match="--controls=0.2: needs lines with a"):
    study.build(bare, Plan(dialogues=6, controls=0.2))


def test_report_of_a_failed_control(folder: pathlib.Path) -> None:
  content = study.read(folder, unblinded=True)

  def answer(annotator: int, item: str) -> dict[str, Any]:
    key = content.key["items"][item]
    # The last annotator prefers responses to other dialogues.
    fits = (key.get("control") != "shuffled") != (annotator == 2)
    if content.items[item]["part"] == "pairwise":
      other = "right" if key["first"] == "left" else "left"
      return {"choice": key["first"] if fits else other}
    return dict.fromkeys(study.METRICS, 5 if fits else 2)

  answer_in_potato(content, folder, answer)
  found = study_potato.read_answers(folder / "rating")
  found += study_potato.read_answers(folder / "pairwise")
  study_answers.add(content, folder, found, "potato")
  people = json.loads((folder / "people.json").read_text())
  report = study_report.report(folder)
  failed = {one.token: (one.controls, one.failed) for one in report.annotators}
  controls = failed[people["potato:PID-0"]][0]
  assert controls >= 4
  assert failed[people["potato:PID-0"]] == (controls, 0)
  assert failed[people["potato:PID-2"]] == (controls, controls)
  dissenters = {one.token for one in report.annotators if one.dissents}
  assert dissenters == {people["potato:PID-2"]}


def test_report_by_hand(folder: pathlib.Path) -> None:
  """Means, agreement and time of answers that are counted on fingers."""
  content = study.read(folder, unblinded=True)
  key = content.key["items"]
  examples = sorted({one["example"] for one in key.values()})
  base = {"EmpDG": 4, "MoEL": 3, "Transformer": 2}

  def answer(annotator: int, item: str) -> dict[str, Any]:
    if content.items[item]["part"] == "pairwise":
      return {"choice": "tie"}
    own = key[item]
    value = base.get(own.get("systems", ["gold"])[0], 5)
    odd = examples.index(own["example"]) % 2
    return {"empathy": value, "relevance": value - odd, "fluency": 5}

  answer_in_potato(content, folder, answer)
  history = folder / "rating" / "answers" / "PID-0" / "annotation_history.jsonl"
  history.write_text(
    "".join(
      json.dumps({"instance_id": item, "timestamp": f"2026-01-01T00:00:{s:02}"})
      + "\n"
      for s, item in zip((0, 10, 14), content.orders["rating"][0], strict=False)
    )
    + '{"cut'
  )
  assert main.main(["study", "import", f"--study={folder}"]) == 0
  report = study_report.report(folder)
  empathy = report.means["EmpDG"]["empathy"]
  assert (empathy.value, empathy.low, empathy.high) == (4, 4, 4)
  assert report.means["EmpDG"]["relevance"].value == 3.5
  assert report.means["Transformer"]["relevance"].value == 1.5
  assert report.agreement["empathy"].alpha == 1
  assert report.agreement["empathy"].kappa == pytest.approx(1)
  assert report.agreement["empathy"].items == 18
  assert report.agreement["fluency"].alpha is None
  assert all(pair.tie.value == 100 for pair in report.pairs)
  assert sorted(a.seconds for a in report.annotators if a.seconds) == [7]


def test_pairs_by_hand(tmp_path: pathlib.Path) -> None:
  """Wilson's intervals as of R's prop.test, and Holm's correction."""
  folder = tmp_path / "study"
  study_answers.write(small(controls=0), folder)
  content = study.read(folder, unblinded=True)
  key = content.key["items"]
  lost = min(one["example"] for one in key.values())

  def answer(annotator: int, item: str) -> dict[str, Any]:
    if content.items[item]["part"] == "rating":
      return dict.fromkeys(study.METRICS, 3)
    # The first system beats MoEL in all six dialogues, Transformer in five.
    own = key[item]
    wins = own["systems"][1] == "MoEL" or own["example"] != lost
    other = "right" if own["first"] == "left" else "left"
    return {"choice": own["first"] if wins else other}

  answer_in_potato(content, folder, answer)
  assert main.main(["study", "import", f"--study={folder}"]) == 0
  moel, transformer = study_report.report(folder).pairs
  assert moel.judgements == transformer.judgements == 18
  assert (moel.win.value, moel.loss.value, moel.tie.value) == (100, 0, 0)
  # Judgements that all agree cannot tell that they depend on each other: those
  # are 18 of 18, and 18 / (18 + 1.96^2). The others are worth 5 of 6.
  for figure, low, high in (
    (moel.win, 82.4, 100),
    (moel.loss, 0, 17.6),
    (transformer.win, 43.6, 97.0),
    (transformer.loss, 3.0, 56.4),
  ):
    assert (figure.low, figure.high) == pytest.approx((low, high), abs=0.05)
  # Of six signs: 2 / 64 and 2 (1 + 6) / 64; the smaller one counts twice.
  assert (moel.p_value, moel.p_corrected) == (2 / 64, 4 / 64)
  assert (transformer.p_value, transformer.p_corrected) == (14 / 64, 14 / 64)


@pytest.mark.parametrize("name", ["krippendorff", "statsmodels"])
def test_a_report_without_its_extra(
  folder: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
  name: str,
) -> None:
  content = study.read(folder, unblinded=True)
  answer_in_potato(content, folder, planted(content, _QUALITY, 0))
  argv = ["study", "import", f"--study={folder}"]
  assert main.main(argv) == 0
  for module in (name, f"{name}.stats"):  # Which may be imported already.
    monkeypatch.setitem(sys.modules, module, None)
  said = refused(capsys, "study", "report", f"--study={folder}")
  assert said == (
    f"empdg: {name} is not installed; in a clone: pip install -e '.[study]'"
  )


def test_ids_of_people_become_tokens(
  folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  content = study.read(folder, unblinded=True)
  answer = planted(content, _QUALITY, 0)
  answer_in_potato(content, folder, answer)
  for _ in range(2):  # A second import replaces the first, with its tokens.
    assert main.main(["study", "import", f"--study={folder}"]) == 0
  text = (folder / "answers.jsonl").read_text()
  assert "PID" not in text
  items = sum(len(o) for orders in content.orders.values() for o in orders)
  assert len(text.splitlines()) == items
  assert (folder / "people.json").stat().st_mode & 0o077 == 0
  read: list[str] = []
  original = pathlib.Path.open

  def spied(path: pathlib.Path, *args: Any, **kwargs: Any) -> Any:
    read.append(path.name)
    return original(path, *args, **kwargs)

  monkeypatch.setattr(pathlib.Path, "open", spied)
  study_report.report(folder)
  assert "answers.jsonl" in read
  assert "people.json" not in read


_QUALITY = {
  "EmpDG": 3.6,
  "MoEL": 3.3,
  "Transformer": 2.8,
  "gold": 4.5,
  "shuffled": 1.5,
}


@pytest.mark.parametrize(
  ("seeds", "least"), [(3, 2), pytest.param(100, 90, marks=pytest.mark.slow)]
)
def test_a_simulated_study_recovers_what_was_planted(
  tmp_path: pathlib.Path, seeds: int, least: int
) -> None:
  """Three annotators, 100 dialogues, 100 seeds: order and coverage."""
  given = sources(100, turns=1)
  ordered = 0
  covered: Counter[str] = Counter()
  truth = _true_means()
  for seed in range(seeds):
    content = study.build(given, Plan(seed=seed, controls=0.05))
    folder = tmp_path / str(seed)
    study_answers.write(content, folder)
    answer_in_potato(content, folder, planted(content, _QUALITY, seed))
    found = [
      a
      for part in study.PARTS
      for a in study_potato.read_answers(folder / part)
    ]
    study_answers.add(content, folder, found, "potato")
    report = study_report.report(folder)
    shutil.rmtree(folder)
    figures = [report.means[name]["empathy"] for name in SYSTEMS]
    ordered += figures[0].value > figures[1].value > figures[2].value
    assert [pair.systems[1] for pair in report.pairs] == [*SYSTEMS[1:]]
    assert all(pair.win.value > pair.loss.value for pair in report.pairs)
    for name, figure in zip(SYSTEMS, figures, strict=True):
      assert figure.low is not None
      assert figure.high is not None
      covered[name] += figure.low <= truth[name] <= figure.high
  assert ordered == seeds
  assert min(covered.values()) >= least, covered


def _true_means() -> dict[str, float]:
  """The expected rating: the planted quality, after rounding to the scale."""
  rng = np.random.default_rng(1)
  size = 400_000
  noise = rng.normal(0, np.hypot(0.4, 0.5), size)
  bias = rng.choice((-0.2, 0.0, 0.2), size)
  return {
    name: float(np.clip(np.rint(_QUALITY[name] + noise + bias), 1, 5).mean())
    for name in SYSTEMS
  }


def test_texts_are_escaped(tmp_path: pathlib.Path) -> None:
  """`<script>` stays text for Potato, MTurk and Label Studio."""
  evil = "<script>alert(1)</script> & ${text} {{7*7}}"
  given = sources(4, ("EmpDG", "MoEL"), turns=1)
  for source in given:
    for line in source.lines.values():
      line["response"] += f" {evil}"
      line["context"][0] += evil
  content = study.build(given, Plan(dialogues=4, controls=0))
  study_answers.write(content, tmp_path / "study")

  class Tags(html.parser.HTMLParser):
    names: set[str] = set()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
      self.names.add(tag)

  parser = Tags()
  for shown in json.loads(
    (tmp_path / "study" / "rating" / "items.json").read_text()
  ):
    assert "&lt;script&gt;" in shown["text"]
    parser.feed(shown["text"])
  for row in csv.DictReader((tmp_path / "study/mturk/rating-1.csv").open()):
    parser.feed(row["text"])
  for task in json.loads(
    (tmp_path / "study/label_studio/pairwise-2.json").read_text()
  ):
    parser.feed(task["data"]["text"])
  assert parser.names == {"p", "b", "blockquote"}
  assert study_pages.escape("a\x1b[2J\n<b>") == "a\\x1b[2J &lt;b&gt;"


@pytest.mark.parametrize(
  "said", ["=1+1", "+1", "-1", "@SUM(A1)", " =1", "\t=1"]
)
def test_cells_are_no_formulas(said: str) -> None:
  assert study_platforms.cell(said) == "'" + said


def test_the_csv_of_mturk_has_no_formulas(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """Whatever an item's page begins with."""
  content = small()
  monkeypatch.setattr(study_pages, "item", lambda shown: f"={shown['part']}")
  order = content.orders["rating"][0]
  rows = csv.DictReader(io.StringIO(study_platforms.mturk_csv(content, order)))
  assert {row["text"] for row in rows} == {"'=rating"}


def test_mturk_and_label_studio_come_back(folder: pathlib.Path) -> None:
  content = study.read(folder, unblinded=True)
  rated, paired = (content.orders[part][0] for part in study.PARTS)
  file = io.StringIO()
  fields = ["WorkerId", "AssignmentStatus", "WorkTimeInSeconds", "Input.item"]
  fields += [f"Answer.{metric}" for metric in study.METRICS]
  writer = csv.writer(file)
  writer.writerow(fields)
  writer.writerow(["W1", "Approved", "12", rated[0], "5", "4", "3"])
  writer.writerow(["W2", "Rejected", "1", rated[0], "1", "1", "1"])
  writer.writerow(["W3", "Submitted", "", rated[0], "5", "", "3"])
  (folder.parent / "batch.csv").write_text(file.getvalue())
  command = ["study", "import", f"--study={folder}"]
  given = [f"--file={folder.parent}/batch.csv", "--platform=mturk"]
  assert main.main([*command, *given]) == 0
  tasks = [
    {
      "data": {"item": paired[0]},
      "annotations": [
        {
          "completed_by": {"email": "a@b.c"},
          "lead_time": 3.5,
          "result": [{"from_name": "choice", "value": {"choices": ["tie"]}}],
        }
      ],
    }
  ]
  (folder.parent / "ls.json").write_text(json.dumps(tasks))
  given = [f"--file={folder.parent}/ls.json", "--platform=label_studio"]
  assert main.main([*command, *given]) == 0
  lines = study_answers.read(folder)
  by = {line["platform"]: line for line in lines}
  assert len(lines) == 2
  assert by["mturk"]["answers"] == {
    "empathy": 5, "relevance": 4, "fluency": 3,
  }  # fmt: skip
  assert by["mturk"]["seconds"] == 12
  assert by["label_studio"]["answers"] == {"choice": "tie"}
  text = (folder / "answers.jsonl").read_text()
  assert "W1" not in text
  assert "a@b" not in text


def test_mturks_page_asks_for_what_the_import_reads() -> None:
  for part in study.PARTS:
    page = study_platforms.mturk_page(part)
    asked = study.METRICS if part == "rating" else ("choice",)
    assert all(f'name="{name}"' in page for name in asked)
    assert "${text}" in page


def test_create_takes_runs_and_files(
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
) -> None:
  runs = [
    make_run(tmp_path / name, name, seed)
    for seed, name in enumerate(("empdg", "moel"), start=1)
  ]
  out = tmp_path / "study"
  argv = ["study", "create", *map(str, runs), f"--out={out}", "--dialogues=8"]
  assert main.main(argv) == 0
  said = capsys.readouterr().out
  assert "Next: empdg study serve" in said
  systems = json.loads((out / "key.json").read_text())["systems"]
  assert [one["name"] for one in systems] == ["EmpDG", "MoEL"]

  content = study.read(out, unblinded=True)
  quality = {**_QUALITY, "MoEL": 1.5}
  answer_in_potato(content, out, planted(content, quality, 0))
  assert main.main(["study", "import", f"--study={out}"]) == 0
  for form in ("terminal", "markdown", "latex", "json"):
    capsys.readouterr()
    assert (
      main.main(["study", "report", f"--study={out}", f"--format={form}"]) == 0
    )
    said = capsys.readouterr().out
    assert "EmpDG" in said
    assert "3.58" in said  # The paper's empathy.
  # Compared once; the formats differ in what they print.
  compared = compare.compare(runs, "test", 0)
  monkeypatch.setattr(compare, "compare", lambda *_: compared)
  for form in ("terminal", "markdown", "latex", "json", "csv"):
    argv = ["compare", *map(str, runs), f"--study={out}", f"--format={form}"]
    assert main.main(argv) == 0
    assert "empathy" in capsys.readouterr().out.lower(), form
  theirs = write_jsonl(tmp_path / "theirs.jsonl", lines_of("other", 12))
  line = refused(
    capsys, "study", "create", str(runs[0]), str(theirs), f"--out={out}2"
  )
  assert "have a different context for 'conversation:0:1'" in line
  assert not (tmp_path / "study2").exists()


def _write(path: pathlib.Path, content: Any) -> None:
  path.write_text(json.dumps(content))


def test_bad_input_of_create(
  tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  one = write_jsonl(tmp_path / "one.jsonl", lines_of("one", 5))
  two = write_jsonl(tmp_path / "two.jsonl", lines_of("two", 5))
  bare = write_jsonl(tmp_path / "bare.jsonl", [{"response": "x"}])
  twice = write_jsonl(tmp_path / "twice.jsonl", lines_of("one", 2) * 2)
  out = f"--out={tmp_path}/study"
  (tmp_path / "there").mkdir()
  run = make_run(tmp_path / "run", "empdg", 1)
  for argv, says in (
    ((), "no system is given"),
    ((one, two), "--out is missing"),
    ((one, out), "needs two or more different systems"),
    ((one, two, out), "--dialogues=100: the systems have only 5 dialogues in"),
    ((one, two, out, "--dialogues=0"), "expected at least 1"),
    ((one, two, out, "--controls=0.9"), "--controls=0.9: expected 0 to 0.5"),
    ((one, two, out, "--controls=x"), "--controls=x: expected a number"),
    ((one, bare, out), "bare.jsonl:1: no 'id', which a study needs"),
    ((one, twice, out), "the id 'conversation:0:1' occurs twice"),
    ((one, tmp_path / "no.jsonl", out), "no.jsonl: cannot read"),
    ((one, run, out, "--split=valid"), "has no evaluation of valid"),
    ((one, two, f"--out={tmp_path}/there", "--dialogues=2"), "exists already"),
  ):
    assert says in refused(capsys, "study", "create", *map(str, argv)), says
    assert not (tmp_path / "study").exists()


def test_bad_input_of_an_import(
  folder: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  content = study.read(folder, unblinded=True)
  rated, paired = (content.orders[part][0][0] for part in study.PARTS)
  ratings = dict.fromkeys(study.METRICS, 3)

  def import_(*found: Answer) -> str:
    with pytest.raises(InputError) as refusal:
      study_answers.add(content, folder, found, "mturk")
    assert not (folder / "answers.jsonl").exists()
    return str(refusal.value)

  good = Answer("p", rated, ratings, None, "f: 2")
  for found, says in (
    (good._replace(item="x"), "f: 2: the item 'x' is not in this study"),
    (
      good._replace(answers={**ratings, "empathy": 6}),
      "f: 2: empathy is 6; expected 1 to 5",
    ),
    (
      good._replace(item=paired, answers={"choice": "both"}),
      "f: 2: choice is 'both'; expected left, right, tie",
    ),
  ):
    assert import_(good._replace(person="q"), found) == says
  assert import_(good, good) == f"f: 2: a second answer to the item {rated}"
  study_answers.add(content, folder, [good], "mturk")
  with pytest.raises(InputError, match="was imported before"):
    study_answers.add(content, folder, [good], "mturk")
  path = folder / "rating" / "answers" / "p" / "user_state.json"
  path.parent.mkdir(parents=True)
  path.write_text("{")
  before = (folder / "answers.jsonl").read_text()
  line = refused(capsys, "study", "import", f"--study={folder}")
  assert "user_state.json: not Potato's answers" in line
  state = potato_state("p", {rated: ratings})
  twice = state["instance_id_to_label_to_value"][rated]
  twice.append([{"schema": "empathy", "name": "1"}, "1"])
  _write(path, state)
  line = refused(capsys, "study", "import", f"--study={folder}")
  assert "two answers to 'empathy'" in line
  for argv, says in (
    (["--platform=mturk"], "--file is missing"),
    (["--file=x"], "Potato's answers are in the folder"),
    (["--platform=mturk", f"--file={path}"], "expected MTurk's results"),
    (["--platform=label_studio", f"--file={path}"], "not Label Studio's JSON"),
    (["--platform=lable_studio"], "expected one of potato, mturk, label_"),
  ):
    argv = ["study", "import", f"--study={folder}", *argv]
    assert says in refused(capsys, *argv)
  assert (folder / "answers.jsonl").read_text() == before


def test_bad_study_folders(
  folder: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  for name in ("serve", "import", "report"):
    assert "--study is missing" in refused(capsys, "study", name)
    line = refused(capsys, "study", name, f"--study={folder.parent}")
    assert "not a study folder" in line
  assert "no answers" in refused(capsys, "study", "report", f"--study={folder}")
  about = json.loads((folder / "study.json").read_text())
  _write(folder / "study.json", {**about, "version": 2})
  for name in ("serve", "import", "report"):
    line = refused(capsys, "study", name, f"--study={folder}")
    assert "a study of version 2; this program reads version 1" in line


def _fake_potato(folder: pathlib.Path, version: str) -> None:
  """A program named potato whose environment has this version of it."""
  python = folder / "python"
  python.write_text(f"#!/bin/sh\necho {version}\n")
  (folder / "potato").write_text(f"#!{python}\n")
  for path in (python, folder / "potato"):
    path.chmod(0o755)


def test_bad_input_of_serve(
  folder: pathlib.Path,
  capsys: pytest.CaptureFixture[str],
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  monkeypatch.setattr(sys, "executable", str(folder.parent / "python"))
  monkeypatch.setenv("PATH", str(folder.parent))
  argv = ("study", "serve", f"--study={folder}")
  before = sorted(path.name for path in folder.rglob("*"))
  assert "Potato is not installed; in a clone: pip install -e '.[study]'" in (
    refused(capsys, *argv)
  )
  _fake_potato(folder.parent, "3.0.1")
  assert "is Potato 3.0.1; studies need version 2" in refused(capsys, *argv)
  _fake_potato(folder.parent, "2.99")
  import socket

  with socket.socket() as taken:
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    port = taken.getsockname()[1]
    line = refused(capsys, *argv, f"--port={port}")
  assert f"--port={port}: cannot listen on 127.0.0.1" in line
  assert sorted(path.name for path in folder.rglob("*")) == before


@pytest.mark.parametrize(
  ("argv", "says"),
  [
    ("study crate", "unknown command 'empdg study crate'; did you mean 'empdg "
     "study create'?"),
    ("study x", "expected one of create, serve, import, report"),
    ("stdy", "unknown command 'stdy'; did you mean 'study'?"),
    ("study report --fromat=json", "did you mean --format?"),
  ],
)  # fmt: skip
def test_mistyped_commands(
  capsys: pytest.CaptureFixture[str], argv: str, says: str
) -> None:
  assert says in refused(capsys, *argv.split())


@pytest.mark.parametrize("argv", ["study", "study --help", "study create -h"])
def test_help(capsys: pytest.CaptureFixture[str], argv: str) -> None:
  with pytest.raises(SystemExit) as exit_:
    main.main(argv.split())
  assert exit_.value.code == 0
  said = capsys.readouterr().out
  wanted = "Examples:" if "create" in argv else "import"
  assert wanted in said


def test_a_study_is_read_as_it_was_written(folder: pathlib.Path) -> None:
  content: Study = study.read(folder, unblinded=True)
  assert content == small()


def test_too_many_annotators() -> None:
  plan = Plan(dialogues=6, annotators=2**31 - 1)
  with pytest.raises(InputError, match="at most 1,000"):
    study.build(sources(), plan)
