"""Hostile input: bombs, escape sequences, absurd sizes, first mistakes."""

import contextlib
import gzip
import io
import json
import logging
import os
import pathlib
import signal
import socket
import sys
import tarfile
import time
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import rich.console
from helpers import refused
from invented import make_run

from empdg_jax import commands, main, storage
from empdg_jax import config as config_lib
from empdg_jax.analysis import compare, dataset_report, tables
from empdg_jax.config import Config, InputError
from empdg_jax.data import (
  corpora,
  empathetic_dialogues,
  lexicon,
  prepare,
  vectors,
)
from empdg_jax.data.prepare import Dataset
from empdg_jax.data.vocab import build_vocabulary
from empdg_jax.inference import predictions, respond
from empdg_jax.inference.system import Response, load_system
from empdg_jax.training import metric_writer, terminal

ROOT = pathlib.Path(__file__).resolve().parents[1]
QUICKSTART = f"--config={ROOT}/configs/quickstart.py"
DEEP = "[" * 100_000 + "]" * 100_000
EVIL = "\x1b[2J\x9b31m[red]a :smile:\x07\x7f\u202e\u2067"
SHOWN = r"\x1b[2J\x9b31m[red]a :smile:\x07\x7f\u202e\u2067"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """The export that an earlier version made."""
  folder = tmp_path_factory.mktemp("old")
  with tarfile.open(
    ROOT / "tests" / "fixtures" / "before_layout.tar.xz"
  ) as archive:
    archive.extractall(folder, filter="data")
  return folder / "export"


def console() -> tuple[rich.console.Console, io.StringIO]:
  """A terminal without colours, and what is printed on it."""
  file = io.StringIO()
  made = rich.console.Console(
    file=file, force_terminal=True, color_system=None, width=200
  )
  return made, file


# JSON and UTF-8.


@pytest.mark.parametrize(
  ("line", "says"),
  [
    (DEEP, "no JSON"),
    ('{"context": ["my job \\ud800"]}', "no form in UTF-8"),
    ('{"context": ["\\udfff"]}', "no form in UTF-8"),
    ('{"context": [1]}', "expected"),
    ('{"context": "' + "9" * 400 + '"}', "no word"),
  ],
)
def test_contexts_without_a_response(
  export: pathlib.Path, line: str, says: str
) -> None:
  responder = respond.Responder(load_system(export))
  (found,) = respond.generate(responder, [line], 1)
  assert says in found["error"]
  json.dumps(found, ensure_ascii=False).encode("utf-8")


def test_input_that_is_not_utf8(
  export: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
) -> None:
  data = io.BytesIO(b'{"context": ["my job \xff"]}\n')
  monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(data))
  monkeypatch.setattr(sys, "argv", ["empdg", "generate", f"--bundle={export}"])
  with pytest.raises(SystemExit) as exit_:
    main.run()
  assert exit_.value.code == 2
  assert "no form in UTF-8" in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.parametrize("text", [DEEP, "[]", '"\x00"'])
def test_metrics_file_of_an_evaluation(
  text: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  run = make_run(tmp_path / "run", "moel", 1)
  (run / "eval" / "test" / "metrics.json").write_text(text)
  assert "has no evaluation of test" in refused(capsys, "compare", str(run))


# The terminal.


def test_printable() -> None:
  assert config_lib.printable(EVIL) == SHOWN
  kept = "naïve\u00a0日本 👩\u200d🚀\n\ue000"
  assert config_lib.printable(kept) == kept
  assert config_lib.printable("\udcff") == r"\udcff"


def _print_sample(tmp_path: pathlib.Path, to: rich.console.Console) -> None:
  line = {
    "context": [EVIL], "response": EVIL, "emotion": EVIL,
    "predicted_emotion": EVIL,
  }  # fmt: skip
  path = tmp_path / "p.jsonl"
  path.write_text(json.dumps(line))
  predictions.print_samples(path, 1, to)


def _print_table(tmp_path: pathlib.Path, to: rich.console.Console) -> None:
  del tmp_path
  to.print(terminal.table([EVIL, "b"], [[EVIL, "1"]]))


class _Parrot:
  """A stand-in for a responder, which repeats what the user says."""

  class system:  # noqa: N801
    emotions = (EVIL, "sad")

  def encode(self, context: list[str]) -> str:
    if "refuse" in context[-1]:
      raise InputError(EVIL)
    return context[-1]

  def respond_encoded(self, said: list[str], first: int) -> list[Response]:
    return [Response((s,), EVIL, np.array([0.75, 0.25]), 0) for s in said]

  def respond(self, context: list[str]) -> Response:
    return self.respond_encoded([self.encode(context)], 0)[0]


def _chat(text: str, to: rich.console.Console) -> None:
  parrot: Any = _Parrot()
  respond.chat(parrot, to, io.StringIO(text))


def _print_chat(tmp_path: pathlib.Path, to: rich.console.Console) -> None:
  del tmp_path
  _chat(f"{EVIL}\nrefuse\n/{EVIL}\n", to)


def _print_responses(tmp_path: pathlib.Path, to: rich.console.Console) -> None:
  path = tmp_path / "contexts.jsonl"
  path.write_text("".join(json.dumps([s]) + "\n" for s in (EVIL, "refuse")))
  system: Any = types.SimpleNamespace(config=Config())
  with (
    pytest.MonkeyPatch.context() as patch,
    contextlib.redirect_stdout(to.file),
  ):
    patch.setattr(commands, "_load_system", lambda values: (system, tmp_path))
    patch.setattr(respond, "Responder", lambda system: _Parrot())
    with pytest.raises(InputError, match="1 of 2 lines"):
      commands.generate(types.SimpleNamespace(input=str(path)))
  answered, failed = map(json.loads, to.file.getvalue().splitlines())
  assert answered["context"] == [EVIL]
  assert EVIL in failed["error"]


def _print_cases(form: str) -> Any:
  """Returns a function that prints a comparison; its folder is hostile too."""

  def show(tmp_path: pathlib.Path, to: rich.console.Console) -> None:
    runs = [make_run(tmp_path / EVIL / "1", "moel", 1)]
    runs.append(make_run(tmp_path / EVIL, "moel", 1, model__emb_dim=6))
    path = runs[0] / "eval" / "test" / "predictions.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
      line |= {"emotion": EVIL, "context": [EVIL], "response": EVIL}
    path.write_text("\n".join(map(json.dumps, lines)))
    tables.print_comparison(compare.compare(runs, "test", 1), form, to)

  return show


@pytest.mark.parametrize(
  "show",
  [
    _print_sample,
    _print_table,
    _print_chat,
    _print_responses,
    *map(_print_cases, tables.FORMATS),
  ],
)  # fmt: skip
def test_nothing_of_others_reaches_a_terminal_raw(
  show: Any, tmp_path: pathlib.Path
) -> None:
  file = io.StringIO()
  show(tmp_path, rich.console.Console(file=file, width=200))
  said = file.getvalue()
  for raw in "\x1b\x9b\x07\x7f\u202e\u2067":
    assert raw not in said
  assert "[red]a" in said
  assert ":smile:" in said


def test_an_error_spells_control_characters_out(
  capsys: pytest.CaptureFixture[str],
) -> None:
  for argv in (["metrics", f"--predictions={EVIL}"], [f"{EVIL}"]):
    line = refused(capsys, *argv)
    assert r"\x1b[2J" in line
    assert "\x1b" not in line


# Paths.


@pytest.mark.parametrize(
  ("argv", "says"),
  [
    ("train FILE --workdir=a\0b", "NUL"),
    ("prepare FILE --config.data.source=a\0b", "NUL"),
    ("train FILE --workdir=foo://x", "gs://BUCKET/FOLDER"),
    ("chat --bundle=foo://x", "gs://BUCKET/FOLDER"),
    ("metrics --predictions=foo://x", "gs://BUCKET/FOLDER"),
    ("compare foo://x", "gs://BUCKET/FOLDER"),
    ("train FILE --workdir=s3://x/y", "gs://BUCKET/FOLDER"),
    ("prepare FILE --config.data.source=foo://x", "a path on a disk"),
    ("prepare FILE --config.data.lexicon=gs://x", "a path on a disk"),
    ("prepare FILE --config.data.vectors=gs://x", "a path on a disk"),
    ("prepare FILE --config.data.data_dir=gs://x", "a path on a disk"),
    ("prepare FILE --config.data.emotions=foo://x", "gs://BUCKET/FOLDER"),
    ("generate --input=gs://x", "a path on a disk"),
    ("benchmark FILE --output=gs://x", "a path on a disk"),
  ],
)
def test_paths(
  argv: str,
  says: str,
  tmp_path: pathlib.Path,
  capsys: pytest.CaptureFixture[str],
) -> None:
  assert says in refused(capsys, *argv.replace("FILE", QUICKSTART).split(" "))
  assert {path.name for path in tmp_path.iterdir()} <= {"cache"}


# Predictions.


@pytest.mark.parametrize(
  ("fields", "says"),
  [
    (DEEP, "no JSON"),
    ('"reference": null', "'reference' cannot be None"),
    ('"nll": 1e308, "tokens": 3', "'nll' cannot be 1e+308"),
    ('"nll": 1e4, "tokens": 3', "more than 700 for each token"),
    ('"nll": NaN, "tokens": 3', "'nll' cannot be nan"),
    ('"nll": 1e999, "tokens": 3', "'nll' cannot be inf"),
    ('"nll": true, "tokens": 3', "'nll' cannot be True"),
    ('"nll": ' + "9" * 400, "'nll' cannot be 9999"),
    ('"nll": ' + "9" * 5000, "no JSON"),
    ('"tokens": ' + "9" * 400, "'tokens' cannot be 9999"),
    ('"tokens": -1', "'tokens' cannot be -1"),
    ('"context": 3', "'context' cannot be 3"),
    ('"context": [3]', r"'context' cannot be [3]"),
    ('"id": {}', "'id' cannot be {}"),
  ],
)
def test_predictions(
  fields: str,
  says: str,
  tmp_path: pathlib.Path,
  capsys: pytest.CaptureFixture[str],
) -> None:
  path = tmp_path / "p.jsonl"
  path.write_text('{"response": "a b", ' + fields + "}\n")
  if fields == DEEP:
    path.write_text(DEEP)
  line = refused(capsys, "metrics", f"--predictions={path}")
  assert says in line
  assert len(line) < 400


@pytest.mark.parametrize("fields", [{"id": 3}, {"context": "no list"}])
def test_cases_that_are_no_text(
  fields: dict[str, Any],
  tmp_path: pathlib.Path,
  capsys: pytest.CaptureFixture[str],
) -> None:
  run = make_run(tmp_path / "run", "moel", 1)
  path = run / "eval" / "test" / "predictions.jsonl"
  first, *others = path.read_text().splitlines()
  path.write_text("\n".join([json.dumps(json.loads(first) | fields), *others]))
  (name,) = fields
  said = refused(capsys, "compare", str(run), "--cases=1")
  assert f"predictions.jsonl:1: {name!r} cannot be" in said


# Sizes.


@pytest.mark.parametrize(
  ("argv", "says"),
  [
    ("evaluate --samples=2147483648", "--samples=2147483648: expected a numb"),
    ("metrics --vocab_size=99999999999999999999", "--vocab_size=9999"),
    ("prepare FILE --config.train.seed=2147483648", "train.seed=2147483648: "),
    (
      "prepare FILE --config.train.seed=" + "9" * 400,
      "expected a number from",
    ),
    (
      "prepare FILE --config.train.profile_steps=1:" + "9" * 5000,
      "expected two",
    ),
    ("prepare FILE --config.data.shapes=" + "(" * 10_000, "expected a tuple"),
    ("prepare FILE --config.model.emb_dim=1000000000", "this machine has"),
    ("prepare FILE --config.model.num_layers=1000000000", "this machine has"),
    ("train FILE --workdir=x --config.train.batch_size=2000000000", "GiB"),
    ("prepare FILE --config.eval.beam_size=2000000000", "this machine has"),
    ("prepare FILE --config.data.shapes=((900000000,2,2),)", "GiB"),
    ("prepare FILE --config.data.feedback_length=2000000000", "GiB"),
  ],
)
def test_sizes(
  argv: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
  start = time.monotonic()
  assert says in refused(capsys, *argv.replace("FILE", QUICKSTART).split())
  assert time.monotonic() - start < 10


def test_a_vocabulary_too_large_for_the_model(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  from empdg_jax.models import registry

  monkeypatch.setattr(storage.os, "sysconf", lambda name: 2**10)
  with pytest.raises(InputError, match="10,000,000 words: needs more than 11"):
    registry.check_size(Config().model, 10_000_000)


# Files without an end.


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
  """A bound that bombs of a test can pass."""
  monkeypatch.setattr(storage, "_MOST_BYTES", 2**20)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
  "name", ["lexicon", "emotions", "input", "predictions"]
)
@pytest.mark.parametrize(
  ("file", "says"),
  [("/dev/zero", "is no regular file"), ("large", "holds more than 1 GiB")],
)
def test_devices_and_large_files(
  name: str, file: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
  pathlib.Path("large").write_bytes(bytes(2**21))
  if name == "input":
    said = refused(capsys, "generate", f"--input={file}")
  elif name == "predictions":
    said = refused(capsys, "metrics", f"--predictions={file}")
  else:
    read = {"lexicon": lexicon.load_lexicon, "emotions": corpora.read_labels}
    with pytest.raises(InputError) as error:
      read[name](file)
    said = str(error.value)
  assert f"{file}: {says}" in said


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz", "w"])
@pytest.mark.parametrize("name", ["train.csv", "other"])
def test_archives_that_unpack_to_too_much(
  mode: Any, name: str, tmp_path: pathlib.Path
) -> None:
  path = tmp_path / "bomb"
  with tarfile.open(path, mode) as archive:
    member = tarfile.TarInfo(name)
    member.size = 2**22
    archive.addfile(member, io.BytesIO(bytes(2**22)))
  with pytest.raises(InputError, match="bomb: holds more than 1 GiB"):
    empathetic_dialogues.read_source(path)


def test_a_split_that_is_too_large(small: None, tmp_path: pathlib.Path) -> None:
  (tmp_path / "train.csv").write_bytes(bytes(2**21))
  with pytest.raises(InputError, match="train.csv: holds more than 1 GiB"):
    empathetic_dialogues.read_source(tmp_path)
  with pytest.raises(InputError, match="/dev/zero: is no regular file"):
    empathetic_dialogues.read_source(pathlib.Path("/dev/zero"))


@pytest.mark.parametrize(
  ("name", "kind"),
  [
    ("../train.csv", tarfile.REGTYPE),
    ("a/../train.csv", tarfile.REGTYPE),
    ("/train.csv", tarfile.REGTYPE),
    ("train.csv", tarfile.SYMTYPE),
    ("train.csv", tarfile.LNKTYPE),
    ("train.csv", tarfile.CHRTYPE),
    ("train.csv", tarfile.FIFOTYPE),
    ("../folder", tarfile.DIRTYPE),
    ("/elsewhere", tarfile.SYMTYPE),
  ],
)
def test_members_that_are_no_plain_files_inside(
  name: str, kind: bytes, tmp_path: pathlib.Path
) -> None:
  """Refused by name, even beside all splits."""
  path = tmp_path / "evil.tar"
  with tarfile.open(path, "w") as archive:
    for split in corpora.SPLITS:
      archive.addfile(tarfile.TarInfo(f"{split}.csv"))
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "valid.csv"
    archive.addfile(member)
  with pytest.raises(InputError, match="no plain file inside") as error:
    empathetic_dialogues.read_source(path)
  assert f"evil.tar: holds {name!r}, " in str(error.value)


def test_folders_and_other_files_of_an_archive(tmp_path: pathlib.Path) -> None:
  """A folder is no split; macOS adds files whose names begin with `._`."""
  path = tmp_path / "data.tar"
  with tarfile.open(path, "w") as archive:
    folder = tarfile.TarInfo("data/train.csv")
    folder.type = tarfile.DIRTYPE
    archive.addfile(folder)
    for name in ("._train.csv", "./data/valid.csv", "data/test.csv", "README"):
      archive.addfile(tarfile.TarInfo(name))
  with pytest.raises(InputError, match=r"data.tar: holds no train.csv"):
    empathetic_dialogues.read_source(path)


@pytest.mark.parametrize("name", ["bomb.gz", "long.gz"])
def test_vectors_without_an_end(
  name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  (tmp_path / "bomb.gz").write_bytes(gzip.compress(b"a 1 2\n" * 2**20))
  (tmp_path / "long.gz").write_bytes(gzip.compress(b"a" * 2**21))
  bounded_lines = storage.bounded_lines
  monkeypatch.setattr(
    storage,
    "bounded_lines",
    lambda f, w, most: bounded_lines(f, w, most / 2**10),
  )
  with pytest.raises(InputError, match=r"holds a line|unpacks to more"):
    vectors.load_vectors(
      name, build_vocabulary([["a"]]), 4, np.random.default_rng(0)
    )


# First contact.


@pytest.mark.parametrize(
  "command", ["prepare", "train", "benchmark", "compile-check"]
)
def test_a_wrong_system_is_refused_before_the_data_are_read(
  command: str,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
) -> None:
  monkeypatch.delattr(prepare, "load_dataset")
  argv = [command, QUICKSTART, "--config.model.name=gpt"]
  if command == "train":
    argv.append("--workdir=x")
  said = refused(capsys, *argv)
  assert "config.model.name='gpt': expected one of emoprepend," in said


def test_no_network(
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
) -> None:
  with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]
  url = f"http://127.0.0.1:{port}/empatheticdialogues.tar.gz"
  monkeypatch.setenv("NO_PROXY", "127.0.0.1")
  monkeypatch.setattr(empathetic_dialogues, "OFFICIAL_URL", url)
  start = time.monotonic()
  said = refused(
    capsys, "prepare", f"--config={ROOT}/configs/empdg_wo_d.py",
    f"--config.data.data_dir={tmp_path}/data",
  )  # fmt: skip
  assert time.monotonic() - start < 20
  assert f"fetch {url}" in said
  assert "--config.data.source=empatheticdialogues.tar.gz" in said


def test_evaluate_names_an_unknown_field(
  tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  run = make_run(tmp_path / "run", "moel", 1)
  said = refused(capsys, "evaluate", f"--workdir={run}", "--config.eval.beam=4")
  assert "--config.eval.beam: no such field; did you mean" in said
  assert "--config.eval.beam_size?" in said


def test_chat_explains_itself() -> None:
  to, file = console()
  lines = "\n \n/help\n/new\n/rest\nhello\n/quit\nunread\n"
  file_lines = io.StringIO(lines)
  parrot: Any = _Parrot()
  respond.chat(parrot, to, file_lines)
  said = file.getvalue()
  assert said.count("(nothing said; /help explains") == 2
  assert "(Write what happened to you" in said
  assert "(a new dialogue)" in said
  assert "(no command '/rest'; /help explains" in said
  assert "empdg> hello" in said
  assert file_lines.read() == "unread\n"


def test_chat_says_at_once_that_it_loads(
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
) -> None:
  """Before the configuration is read, whose modules import JAX."""
  run = make_run(tmp_path / "run", "moel", 1)

  def load(values: Any) -> None:
    assert "Loading" in capsys.readouterr().out
    raise InputError("loaded")

  monkeypatch.setattr(commands, "stored_config", load)
  assert "loaded" in refused(capsys, "chat", f"--workdir={run}")


def test_the_report_fits_into_60_columns(
  sample_dataset: Dataset, sample_config: Config
) -> None:
  file = io.StringIO()
  to = rich.console.Console(file=file, width=60)
  dataset_report.print_report(sample_dataset, sample_config, to)
  said = file.getvalue()
  assert "…" not in said
  for head in ("context", "emotion", "target", "batches", "padding"):
    assert head in said.rpartition("Padded lengths")[2]


# Names and files.


@pytest.fixture
def _soon() -> Iterator[None]:
  """Fails a test that blocks, as at a pipe that nobody writes."""

  def stop(*args: object) -> None:
    raise AssertionError("blocked for 60 s")

  previous = signal.signal(signal.SIGALRM, stop)
  signal.alarm(60)
  yield
  signal.alarm(0)
  signal.signal(signal.SIGALRM, previous)


@pytest.mark.usefixtures("_soon")
@pytest.mark.parametrize(
  "argv",
  [
    ("prepare", QUICKSTART, "--config.data.source=pipe"),
    ("prepare", QUICKSTART, "--config.data.lexicon=pipe"),
    ("prepare", QUICKSTART, "--config.data.emotions=pipe"),
    ("prepare", "--config=pipe"),
    ("metrics", "--predictions=pipe"),
    ("generate", "--input=pipe"),
    ("evaluate", "--workdir=pipe"),
    ("evaluate", "--bundle=pipe"),
    ("compare", "pipe"),
  ],
  ids=lambda argv: argv[0] + argv[-1].partition("=")[0],
)
def test_pipes_are_no_files(
  argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
  os.mkfifo("pipe")
  assert "pipe" in refused(capsys, *argv)


@pytest.mark.usefixtures("_soon")
def test_vectors_from_a_pipe() -> None:
  os.mkfifo("pipe")
  with pytest.raises(InputError, match="pipe: is no regular file"):
    vectors.load_vectors(
      "pipe", build_vocabulary([["a"]]), 2, np.random.default_rng(0)
    )


@pytest.mark.usefixtures("_soon")
@pytest.mark.parametrize(
  "name", ["config.json", "vocab.txt", "metrics.jsonl", "emotions.txt"]
)
@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_pipes_in_a_run_folder(
  name: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
  run = make_run(pathlib.Path("run"), "moel", 1)
  if name == "emotions.txt":
    fields = json.loads((run / "config.json").read_text())
    fields["data"]["emotions"] = "labels.txt"
    (run / "config.json").write_text(json.dumps(fields))
  (run / name).unlink(missing_ok=True)
  os.mkfifo(run / name) if kind == "pipe" else (run / name).mkdir()
  command = "checkpoints" if name == "metrics.jsonl" else "compare"
  argv = ["--workdir=run"] if command == "checkpoints" else ["run"]
  assert name in refused(capsys, command, *argv) or name == "config.json"


@pytest.mark.parametrize("length", [300, 5000])
@pytest.mark.parametrize(
  "argv",
  [
    ("evaluate", "--bundle="),
    ("evaluate", "--workdir="),
    ("checkpoints", "--workdir="),
    ("train", QUICKSTART, "--workdir="),
    ("train", "--config="),
    ("compare", "--dir="),
    ("metrics", "--predictions="),
    ("generate", "--input="),
    ("export", "--workdir=run", "--out="),
    ("prepare", QUICKSTART, "--config.data.source="),
    ("prepare", QUICKSTART, "--config.data.lexicon="),
    ("prepare", QUICKSTART, "--config.data.emotions="),
    ("prepare", QUICKSTART, "--config.data.data_dir="),
    ("benchmark", QUICKSTART, "--output="),
  ],
  ids=lambda argv: argv[0] + argv[-1],
)
def test_names_that_no_disk_can_hold(
  argv: tuple[str, ...], length: int, capsys: pytest.CaptureFixture[str]
) -> None:
  make_run(pathlib.Path("run"), "moel", 1)
  line = refused(capsys, *argv[:-1], argv[-1] + "a" * length)
  assert len(line) < 600


def test_a_long_way_to_a_file(capsys: pytest.CaptureFixture[str]) -> None:
  """The folder's name just fits, those of its files do not."""
  line = refused(capsys, "checkpoints", "--workdir=" + "a/" * 2046)
  assert "too long" in line


@pytest.mark.parametrize(
  "name", ["__init__", "os", "empdg_jax.configs.empdg", "../configs/empdg", "."]
)
def test_modules_are_no_configurations(
  name: str, capsys: pytest.CaptureFixture[str]
) -> None:
  line = refused(capsys, "prepare", f"--config={name}")
  assert f"--config={name}: no such file; give a path, or one of" in line


def entry(step: int, value: float = 2.5) -> str:
  line = {"step": step, "phase": "mle", "name": "valid/perplexity"}
  return json.dumps({**line, "value": value})


@pytest.mark.parametrize(
  "damage",
  [
    b"garbage", b"\xff\xfe\x80", b"\0\0\0", b"null", b"[]", b"3", b'"text"',
    b'{"step": 2}', b'{"step": "2", "name": "valid/x", "value": 1}',
    b'{"step": 2, "name": ["valid/x"], "value": 1}',
    b'{"step": 2, "name": "valid/x", "value": "1"}',
    b'{"step": 2, "name": "valid/x", "value": null}',
    b'{"step": 2, "name": "valid/x", "value": 1' + b"0" * 400 + b"}",
    b'{"step": true, "name": "valid/x", "value": 1}',
    b"[" * 100_000, entry(2).encode()[:-9],
  ],
  ids=range(16),
)  # fmt: skip
def test_damaged_lines_of_metrics_are_left_out(damage: bytes) -> None:
  """A torn last line, as of a killed run, and damage in the middle."""
  path = pathlib.Path("metrics.jsonl")
  path.write_bytes(
    b"\n".join([entry(1).encode(), damage, entry(3).encode(), damage])
  )
  whole = [json.loads(entry(1)), json.loads(entry(3))]
  assert list(metric_writer.read_metrics(path)) == whole
  writer = metric_writer.MetricWriter(path.absolute().parent, 2, "mle")
  writer.write(3, "mle", {"valid/perplexity": 2.5})
  writer.close()
  assert list(metric_writer.read_metrics(path)) == whole
  assert len(path.read_bytes().splitlines()) == 2


# Memory.


@pytest.mark.parametrize(
  ("groups", "files", "limits"),
  [
    ("0::/\n", {"memory.max": "4096\n"}, [4096]),
    ("0::/a/b\n", {"a/memory.max": "8192", "a/b/memory.max": "max"}, [8192]),
    # In a container, the folder shows the group itself.
    ("0::/docker/1\n", {"memory.max": "4096"}, [4096]),
    (
      "4:memory:/job\n3:cpu:/job\n0::/\n",
      {
        "memory/job/memory.limit_in_bytes": "1024",
        "memory/memory.limit_in_bytes": "9223372036854771712",
      },
      [1024, 9223372036854771712],
    ),
    ("garbage", {}, []),
  ],
)
def test_limits_of_containers(
  groups: str,
  files: dict[str, str],
  limits: list[int],
  tmp_path: pathlib.Path,
) -> None:
  (tmp_path / "cgroup").write_text(groups)
  for name, text in files.items():
    path = tmp_path / "sys" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  found = storage._container_limits(tmp_path / "cgroup", tmp_path / "sys")
  assert found == limits


def test_memory_is_the_least_limit(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(storage, "_container_limits", lambda: [2**62, 2**20])
  assert storage.machine_memory() == 2**20
  with pytest.raises(InputError, match="sizes: needs more than"):
    storage.check_fits("sizes", 2**19)


def test_clients_of_buckets_are_quiet(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  client = logging.getLogger("gcsfs")
  monkeypatch.setattr(client, "level", logging.WARNING)
  monkeypatch.setattr(sys, "argv", ["empdg", "--version"])
  with pytest.raises(SystemExit):
    main.run()
  assert not logging.getLogger("gcsfs.retry").isEnabledFor(logging.CRITICAL)
