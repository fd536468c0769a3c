"""A second dataset in the same CSV format, with five labels of its own."""

import dataclasses
import io
import json
import pathlib
import sys
from collections.abc import Iterator

import pytest
from helpers import refused

from empdg_jax import main
from empdg_jax.config import DataConfig
from empdg_jax.data import corpora, prepare
from empdg_jax.inference import export

ROOT = pathlib.Path(__file__).resolve().parents[1]
# In no order that sorting would give, so that numbers must come from the file.
LABELS = ("gloomy", "brave", "calm", "eager", "cross")
TOPICS = ("boat", "garden", "letter", "violin", "kitten", "bridge")
SIZES = {"train": 30, "valid": 6, "test": 6}
HEADER = (
  "conv_id,utterance_idx,context,prompt,speaker_idx,utterance,selfeval,tags"
)
# One situation for all: joining by situation would make a single dialogue.
SITUATION = "It was a long_comma_ wet day."


def csv(split: str, labels: tuple[str, ...] = LABELS) -> str:
  """A split whose conversations have 4, 5 and 6 turns in turn."""
  rows = [HEADER]
  for talk in range(SIZES[split]):
    label, topic = labels[talk % len(labels)], TOPICS[talk % len(TOPICS)]
    turns = (
      f"I felt {label} about the {topic}_comma_ number {talk} of {split}.",
      f"Oh_comma_ what did the {topic} do?",
      f"It moved_comma_ and I was so {label} all day.",
      f"I hope the {topic} is fine now.",
      "Thank you_comma_ that is kind.",
      "Good luck with it.",
    )[: 4 + talk % 3]
    rows += [
      f"{split}{talk},{i + 1},{label},{SITUATION},{i % 2},{turn},,"
      for i, turn in enumerate(turns)
    ]
  return "\n".join(rows) + "\n"


def write_data(folder: pathlib.Path, labels: tuple[str, ...] = LABELS) -> None:
  folder.mkdir()
  for split in SIZES:
    (folder / f"{split}.csv").write_text(csv(split, labels))


@dataclasses.dataclass(frozen=True)
class Run:
  """The dataset, and a system trained, evaluated and exported from it."""

  data: pathlib.Path
  labels: pathlib.Path
  workdir: pathlib.Path
  exported: pathlib.Path
  data_dir: pathlib.Path

  @property
  def config(self) -> DataConfig:
    """The data settings."""
    return DataConfig(
      source=str(self.data),
      emotions=str(self.labels),
      data_dir=str(self.data_dir),
    )

  def flags(self, **changed: object) -> list[str]:
    """Flags of a tiny MoEL on the dataset, some of them changed."""
    settings = {
      "data.source": self.data,
      "data.emotions": self.labels,
      "data.data_dir": self.data_dir,
      "data.shapes": "((32,16,16),)",
      "model.emb_dim": 16,
      "model.key_value_depth": 8,
      "model.filter_size": 12,
      "train.batch_size": 8,
      "train.mle_steps": 6,
      "train.mle_eval_every": 3,
      "eval.batch_size": 8,
      "eval.max_decode_steps": 5,
    } | changed
    config = f"--config={ROOT}/configs/moel.py"
    return [config, *(f"--config.{n}={v}" for n, v in settings.items())]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
  """The run; its file of labels is deleted once everything is exported."""
  folder = tmp_path_factory.mktemp("second")
  names = ("csv", "labels.txt", "run", "export", "prepared")
  made = Run(*(folder / name for name in names))
  write_data(made.data)
  made.labels.write_text("\n".join(LABELS) + "\n")
  workdir = f"--workdir={made.workdir}"
  assert main.main(["train", *made.flags(), workdir]) == 0
  assert main.main(["evaluate", workdir, "--samples=1"]) == 0
  assert main.main(["export", workdir, f"--out={made.exported}"]) == 0
  return made


@pytest.fixture
def without_labels(run: Run) -> Iterator[Run]:
  """The run while its file of labels is gone."""
  hidden = run.labels.with_name("hidden.txt")
  run.labels.rename(hidden)
  yield run
  hidden.rename(run.labels)


def test_no_conversation_is_dropped_or_joined(run: Run) -> None:
  """By hand: 4 and 5 turns give one example, 6 turns give two."""
  dataset = prepare.load_dataset(run.config)

  assert dataset.conversations == SIZES
  assert dataset.utterances == {"train": 150, "valid": 30, "test": 30}
  sizes = {s: len(members) for s, members in dataset.examples.items()}
  assert sizes == {"train": 40, "valid": 8, "test": 8}
  assert [(e.id, LABELS[e.emotion]) for e in dataset.examples["valid"]] == [
    ("valid0:1", "gloomy"),
    ("valid1:1", "brave"),
    ("valid2:1", "calm"),
    ("valid2:3", "calm"),
    ("valid3:1", "eager"),
    ("valid4:1", "cross"),
    ("valid5:1", "gloomy"),
    ("valid5:3", "gloomy"),
  ]
  every_turn = dataclasses.replace(run.config, example_set="all_turns")
  dataset = prepare.load_dataset(every_turn)
  assert len(dataset.examples["train"]) == 10 * (2 + 2 + 3)


def test_its_numbers_are_not_those_of_other_labels(
  run: Run, tmp_path: pathlib.Path
) -> None:
  """One data folder, one file of prepared datasets, two orders of labels."""
  labels = tmp_path / "sorted.txt"
  labels.write_text("\n".join(sorted(LABELS)))
  config = dataclasses.replace(run.config, emotions=str(labels))

  first = prepare.load_dataset(run.config).examples["test"]
  second = prepare.load_dataset(config).examples["test"]

  for ours, theirs in zip(first, second, strict=True):
    assert LABELS[ours.emotion] == sorted(LABELS)[theirs.emotion]


def test_rules_are_the_corpus_own(tmp_path: pathlib.Path) -> None:
  """A file with the 32 labels is another dataset, which drops nothing."""
  write_data(tmp_path / "csv", corpora.EMOTIONS)
  (tmp_path / "labels.txt").write_text(corpora.to_text(corpora.EMOTIONS))
  config = DataConfig(
    source=str(tmp_path / "csv"), data_dir=str(tmp_path / "prepared")
  )
  own = dataclasses.replace(config, emotions=str(tmp_path / "labels.txt"))

  # Of valid, 4 conversations of 4, 4, 6 and 4 paired turns become one.
  assert len(prepare.load_dataset(config).examples["valid"]) == 8
  ids = [e.id for e in prepare.load_dataset(config).examples["valid"]]
  assert ids == [f"valid3:{turn}" for turn in range(1, 16, 2)]
  assert len(prepare.load_dataset(own).examples["valid"]) == 8
  ids = [e.id for e in prepare.load_dataset(own).examples["valid"]]
  assert ids[0] == "valid0:1"


def test_an_unknown_label_is_refused(
  run: Run, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  write_data(tmp_path / "csv")
  path = tmp_path / "csv" / "valid.csv"
  path.write_text(path.read_text() + f"v9,1,proud,{SITUATION},0,Hi,,\n")

  flags = run.flags(**{"data.source": tmp_path / "csv"})
  said = refused(capsys, "prepare", *flags)

  # The header and the 30 utterances come before it.
  assert f"{tmp_path / 'csv'}: valid.csv:32: unknown emotion label" in said
  assert "'proud'; expected one of gloomy, brave, calm, eager, cross" in said


def test_evaluated_from_the_export(
  without_labels: Run, tmp_path: pathlib.Path
) -> None:
  """The export's figures are the run's, though the file of labels is gone."""
  run = without_labels
  for flag in (f"--bundle={run.exported}", f"--workdir={run.workdir}"):
    out = tmp_path / flag[2:8]
    argv = ["evaluate", flag, f"--out={out}", "--samples=1"]
    assert main.main(argv) == 0
    for name in ("predictions.jsonl", "metrics.json"):
      ours = run.workdir / "eval" / "test" / name
      assert (out / name).read_bytes() == ours.read_bytes()
  rows = (out / "predictions.jsonl").read_text().splitlines()
  lines = [json.loads(row) for row in rows]
  assert {line["emotion"] for line in lines} == set(LABELS)
  assert {line["predicted_emotion"] for line in lines} <= set(LABELS)
  assert len(lines) == 8


def test_the_export_names_its_labels(run: Run) -> None:
  assert (run.exported / "emotions.txt").read_text().split() == list(LABELS)
  card = (run.exported / "README.md").read_text()
  assert "5, in `emotions.txt`" in card
  assert "CC BY-NC" not in card


def test_responses_name_one_of_its_emotions(
  without_labels: Run,
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
) -> None:
  bundle = f"--bundle={without_labels.exported}"
  (tmp_path / "in").write_text('["I felt cross about the kitten."]\n')
  capsys.readouterr()
  assert main.main(["generate", bundle, f"--input={tmp_path / 'in'}"]) == 0
  response = json.loads(capsys.readouterr().out)
  assert response["emotion"] in LABELS
  assert response["emotion_probability"] >= 0.2
  monkeypatch.setattr(sys, "stdin", io.StringIO("I felt calm.\n"))
  assert main.main(["chat", bundle]) == 0
  line = capsys.readouterr().out.partition("perceived: ")[2].splitlines()[0]
  assert {part.split()[0] for part in line.split(", ")} <= set(LABELS)
  loaded = export.load(without_labels.exported).respond(["I felt calm."])
  assert loaded.emotions is not None
  assert loaded.emotions.shape == (5,)


def test_the_number_of_emotions_needs_no_data(tmp_path: pathlib.Path) -> None:
  """As `compile-check` finds it, on a machine without the data."""
  labels = tmp_path / "labels.txt"
  labels.write_text("\n".join(LABELS))
  config = DataConfig(source="/nowhere", emotions=str(labels))

  corpus = corpora.find_corpus(config)

  assert corpus.emotions == LABELS
  assert not corpus.joins_situations
  assert corpus.dropped_conversations == 0
  labels.unlink()
  # A run's or an export's labels are never read again from that path.
  assert corpora.find_corpus(config, LABELS) == corpus


@pytest.mark.parametrize("source", ["sample", "official"])
def test_labels_of_other_data_are_refused(
  run: Run, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
  said = refused(capsys, "prepare", *run.flags(**{"data.source": source}))
  assert "config.data.emotions=" in said
  assert f"{source!r} has the labels 'empathetic_dialogues'" in said


@pytest.mark.parametrize(
  ("content", "says"),
  [
    (None, "cannot read; give 'empathetic_dialogues' or a file"),
    ("calm\n\ncross\n", "line 2: '' is no label"),
    ("calm\nvery cross\n", "line 2: 'very cross' is no label"),
    ("calm\ncross,\n", "line 2: 'cross,' is no label"),
    ("calm\ncross\ncalm\n", "a label occurs twice"),
    ("calm\n", "expected at least 2 labels"),
    ("", "expected at least 2 labels"),
  ],
)
def test_bad_files_of_labels(
  run: Run,
  tmp_path: pathlib.Path,
  capsys: pytest.CaptureFixture[str],
  content: str | None,
  says: str,
) -> None:
  path = tmp_path / "labels.txt"
  if content is not None:
    path.write_text(content)
  said = refused(capsys, "prepare", *run.flags(**{"data.emotions": path}))
  assert f"config.data.emotions={str(path)!r}" in said
  assert says in said
