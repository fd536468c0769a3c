"""The dataset builder, on invented rows in the official format."""

import functools
import gzip
import hashlib
import http.server
import io
import socket
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tensorflow_datasets.core.download import checksums, downloader

from empdg_jax.config import Config, DataConfig, InputError
from empdg_jax.data import empathetic_dialogues, prepare
from empdg_jax.data.corpora import EMOTIONS, SPLITS
from empdg_jax.data.empathetic_dialogues import (
  EmpatheticDialogues,
)
from empdg_jax.data.prepare import Dataset

HEADER = (
  "conv_id,utterance_idx,context,prompt,speaker_idx,utterance,selfeval,tags"
)
SIZES = {"train": 6, "valid": 4, "test": 3}


def rows(split: str, talk: int) -> list[str]:
  """The rows of one invented conversation of four turns."""
  turns = (
    f"I saw a fox_comma_ number {talk} of {split}",
    'Oh_comma_ a "fox? Was it red_comma_ or grey?',
    "It's grey_comma_ and shy.",
    "What a morning!",
  )
  return [
    f"{split}{talk},{i + 1},{EMOTIONS[talk]},A fox_comma_ my {talk}th,"
    f"{i % 2 + 7},{turn},5|5|5_1|1|1,"
    # The official files' valid and test rows may have one field more.
    + (",<hi there>" if split == "test" else "")
    for i, turn in enumerate(turns)
  ]


def csv(split: str) -> str:
  """An invented split."""
  lines = [row for talk in range(SIZES[split]) for row in rows(split, talk)]
  return "\n".join([HEADER, *lines]) + "\n"


def csv_files(**replaced: str | bytes | None) -> dict[str, bytes]:
  """All splits, some of them replaced, or left out if None."""
  contents = {split: csv(split) for split in SPLITS} | replaced
  return {
    split: content.encode() if isinstance(content, str) else content
    for split, content in contents.items()
    if content is not None
  }


def write_archive(path: Path, files: dict[str, bytes]) -> Path:
  """Writes an archive as the official one is laid out."""
  with tarfile.open(path, "w:gz") as archive:
    for split, content in files.items():
      member = tarfile.TarInfo(f"empatheticdialogues/{split}.csv")
      member.size = len(content)
      archive.addfile(member, io.BytesIO(content))
  return path


def write_folder(path: Path, files: dict[str, bytes]) -> Path:
  """Writes a folder of CSV files."""
  path.mkdir()
  for split, content in files.items():
    (path / f"{split}.csv").write_bytes(content)
  return path


def load(source: Path | str, data_dir: Path) -> Dataset:
  """Prepares a source with a lexicon of one word."""
  lexicon = data_dir.parent / "lexicon.txt"
  lexicon.write_text("fox\n")
  return prepare.load_dataset(
    DataConfig(source=str(source), data_dir=str(data_dir), lexicon=str(lexicon))
  )


def load_error(source: Path | str, data_dir: Path) -> str:
  """Returns the one line that refuses a source."""
  with pytest.raises(InputError) as error:
    load(source, data_dir)
  assert "\n" not in str(error.value)
  return str(error.value)


def prepared_files(data_dir: Path) -> list[Path]:
  """The files that a later call could take for a prepared dataset."""
  folders = (data_dir / "empathetic_dialogues", data_dir / "tokenized")
  return [p for f in folders for p in f.rglob("*") if p.is_file()]


def test_two_processes_may_prepare_at_once(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Another process finishes while this one is about to."""
  builder = prepare.empathetic_dialogues.EmpatheticDialogues
  download_and_prepare = builder.download_and_prepare
  archive = write_archive(tmp_path / "dialogues.tar.gz", csv_files())

  def be_late(late: object, **kwargs: object) -> None:
    other = builder(source=str(archive), data_dir=tmp_path / "data")
    download_and_prepare(other, **kwargs)
    raise FileExistsError("destination already exists")

  monkeypatch.setattr(builder, "download_and_prepare", be_late)
  assert load(archive, tmp_path / "data").conversations["train"] > 0


@pytest.fixture
def archive(tmp_path: Path) -> Path:
  return write_archive(tmp_path / "dialogues.tar.gz", csv_files())


@pytest.fixture
def builder(archive: Path, tmp_path: Path) -> EmpatheticDialogues:
  built = EmpatheticDialogues(source=str(archive), data_dir=tmp_path / "data")
  built.download_and_prepare()
  return built


def test_splits_and_counts(builder: EmpatheticDialogues) -> None:
  sizes = {s: info.num_examples for s, info in builder.info.splits.items()}

  assert sizes == SIZES


def test_features(builder: EmpatheticDialogues) -> None:
  assert set(builder.info.features) == {
    *("id", "emotion", "situation", "utterances", "speakers")
  }
  assert builder.info.features["emotion"].names == list(EMOTIONS)
  assert len(EMOTIONS) == 32
  assert list(EMOTIONS) == sorted(set(EMOTIONS))


def test_records_are_in_the_order_of_the_file(
  builder: EmpatheticDialogues,
) -> None:
  for split in SPLITS:
    records = list(builder.as_data_source(split=split))

    assert [r["id"].decode() for r in records] == [
      f"{split}{talk}" for talk in range(SIZES[split])
    ]


def test_a_record_holds_the_rows_text(builder: EmpatheticDialogues) -> None:
  """Commas come back, stray quotes are text, a ninth field is ignored."""
  for split in SPLITS:
    record = builder.as_data_source(split=split)[2]

    assert int(record["emotion"]) == 2
    assert record["situation"].decode() == "A fox, my 2th"
    assert [u.decode() for u in record["utterances"]] == [
      f"I saw a fox, number 2 of {split}",
      'Oh, a "fox? Was it red, or grey?',
      "It's grey, and shy.",
      "What a morning!",
    ]
    assert [int(s) for s in record["speakers"]] == [7, 8, 7, 8]


def test_is_built_once(
  archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  first = load(archive, tmp_path / "data")

  def generate(*args: object) -> None:
    raise AssertionError("generated again")

  monkeypatch.setattr(EmpatheticDialogues, "_generate_examples", generate)
  second = load(archive, tmp_path / "data")

  assert second.examples == first.examples
  assert second.vocabulary == first.vocabulary


def test_changed_content_is_built_anew(archive: Path, tmp_path: Path) -> None:
  """The same path with other rows is another dataset."""
  load(archive, tmp_path / "data")

  changed = csv("train").replace("and shy.", "and bold.")
  write_archive(archive, csv_files(train=changed))
  dataset = load(archive, tmp_path / "data")

  assert "bold" in dataset.vocabulary.tokens
  assert "shy" not in dataset.vocabulary.tokens


def test_folder_and_archive_are_the_same_dataset(
  archive: Path, tmp_path: Path
) -> None:
  folder = write_folder(tmp_path / "csv", csv_files())

  from_archive = load(archive, tmp_path / "a")
  from_folder = load(folder, tmp_path / "b")

  assert from_folder.examples == from_archive.examples
  assert from_folder.conversations == from_archive.conversations == SIZES
  assert from_folder.utterances == {s: 4 * n for s, n in SIZES.items()}


def test_line_ends_of_windows(tmp_path: Path) -> None:
  files = {s: c.replace(b"\n", b"\r\n") for s, c in csv_files().items()}

  dataset = load(write_folder(tmp_path / "csv", files), tmp_path / "data")

  assert dataset.conversations == SIZES
  assert all("\r" not in t for t in dataset.vocabulary.tokens)


def test_sample(config: Config) -> None:
  builder = EmpatheticDialogues(source="sample", data_dir=config.data.data_dir)
  builder.download_and_prepare()

  assert {s: i.num_examples for s, i in builder.info.splits.items()} == {
    "train": 674,
    "valid": 98,
    "test": 98,
  }


ROW = "fox9,1,joyful,A fox,0,"
LINE = 2 + 4 * SIZES["valid"]  # Of a row added at the end of valid.csv.


@pytest.mark.parametrize(
  ("content", "where", "what"),
  [
    (csv("valid") + "fox9,1,joyful,A fox,0\n", f":{LINE}:", "5 fields"),
    (csv("valid") + "\n" + ROW + "Hi,,\n", f":{LINE}:", "1 fields"),
    (csv("valid") + ROW + "Hi,,,,\n", f":{LINE}:", "10 fields"),
    (
      csv("valid") + "fox9,1,Glad,A fox,0,Hi,,\n",
      f":{LINE}:",
      "unknown emotion label 'Glad'",
    ),
    (csv("valid") + ROW + ",,\n", f":{LINE}:", "utterance is empty"),
    (csv("valid") + ROW + "  ,,\n", f":{LINE}:", "utterance is empty"),
    (
      csv("valid") + "fox9,1,joyful,A fox,me,Hi,,\n",
      f":{LINE}:",
      "speaker_idx 'me'",
    ),
    (
      csv("valid") + "fox9,1,joyful,A fox,99999999999,Hi,,\n",
      f":{LINE}:",
      "speaker_idx",
    ),
    (
      csv("valid").encode() + ROW.encode() + b"Caf\xe9,,\n",
      f":{LINE}:",
      "not UTF-8",
    ),
    (HEADER + "\n", "", "empty"),
    (HEADER, "", "empty"),
    ("", "", "header"),
    (csv("valid").removeprefix(HEADER + "\n"), ":1:", "header"),
  ],
)
def test_bad_rows(
  content: str | bytes, where: str, what: str, tmp_path: Path
) -> None:
  """The message names file and line; a corrected source then works."""
  path = tmp_path / "dialogues.tar.gz"
  write_archive(path, csv_files(valid=content))

  message = load_error(path, tmp_path / "data")

  assert f"{path}: valid.csv{where}" in message
  assert what in message
  assert prepared_files(tmp_path / "data") == []
  write_archive(path, csv_files())
  assert load(path, tmp_path / "data").conversations == SIZES


@pytest.mark.parametrize("write", [write_archive, write_folder])
@pytest.mark.parametrize("split", SPLITS)
def test_missing_split(
  write: Callable[[Path, dict[str, bytes]], Path], split: str, tmp_path: Path
) -> None:
  path = write(tmp_path / "dialogues", csv_files(**{split: None}))

  message = load_error(path, tmp_path / "data")

  assert f"{path}: holds no {split}.csv" in message


def test_missing_path(tmp_path: Path) -> None:
  path = tmp_path / "nowhere.tar.gz"

  message = load_error(path, tmp_path / "data")

  assert str(path) in message
  assert "config.data.source" in message
  assert "'sample'" in message


@pytest.mark.parametrize(
  "content", [b"", b"Dear fox,\n", b"\x1f\x8b\x08", b"PK\x03\x04" + b"\0" * 600]
)
def test_path_that_is_no_archive(content: bytes, tmp_path: Path) -> None:
  path = tmp_path / "letter.txt"
  path.write_bytes(content)

  message = load_error(path, tmp_path / "data")

  assert str(path) in message


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9])
def test_truncated_archive(share: float, tmp_path: Path) -> None:
  path = write_archive(tmp_path / "dialogues.tar.gz", csv_files())
  content = path.read_bytes()
  path.write_bytes(content[: int(len(content) * share)])

  message = load_error(path, tmp_path / "data")

  assert str(path) in message
  assert prepared_files(tmp_path / "data") == []
  path.write_bytes(content)
  assert load(path, tmp_path / "data").conversations == SIZES


def test_corrupted_archive(tmp_path: Path) -> None:
  """The first split's file is damaged where reading has already begun."""
  path = tmp_path / "dialogues.tar.gz"
  long = csv("train") + "\n".join(rows("train", 31) * 5_000) + "\n"
  write_archive(path, csv_files(train=long))
  content = gzip.decompress(path.read_bytes())
  good = gzip.compress(content[600_000:])
  damaged = good[:10] + b"\xff" * 40 + good[50:]  # No such block type.
  path.write_bytes(gzip.compress(content[:600_000], 0) + damaged)

  message = load_error(path, tmp_path / "data")

  assert str(path) in message
  assert prepared_files(tmp_path / "data") == []


def test_damaged_tokenized_file_is_named(archive: Path, tmp_path: Path) -> None:
  load(archive, tmp_path / "data")
  (kept,) = (tmp_path / "data" / "tokenized").iterdir()
  kept.write_bytes(kept.read_bytes()[:100])

  message = load_error(archive, tmp_path / "data")

  assert str(kept) in message


@pytest.mark.parametrize("name", ["train.array_record*", "dataset_info.json"])
@pytest.mark.parametrize("left", [None, 100])
def test_damaged_dataset_is_named(
  name: str, left: int | None, archive: Path, tmp_path: Path
) -> None:
  """One of its files is gone, or only its beginning is left."""
  load(archive, tmp_path / "data")
  (path,) = (tmp_path / "data").rglob(f"*{name}")
  content = path.read_bytes()
  path.unlink()
  if left is not None:
    path.write_bytes(content[:left])

  message = load_error(archive, tmp_path / "data")

  assert str(tmp_path / "data") in message


def test_split_too_small_for_an_example(tmp_path: Path) -> None:
  """Its last two conversations are dropped, so nothing is left of two."""
  content = "\n".join([HEADER, *rows("valid", 0), *rows("valid", 1)]) + "\n"
  path = write_archive(tmp_path / "few.tar.gz", csv_files(valid=content))

  message = load_error(path, tmp_path / "data")

  assert f"{path}: valid has no example" in message


def test_interrupted_build_leaves_nothing(
  archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  read_csv = empathetic_dialogues.read_csv

  def interrupted(
    data: bytes, name: str, emotions: tuple[str, ...]
  ) -> Iterator[object]:
    yield next(read_csv(data, name, emotions))
    if "test" in name:
      raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(empathetic_dialogues, "read_csv", interrupted)
    with pytest.raises(KeyboardInterrupt):
      load(archive, tmp_path / "data")

  assert prepared_files(tmp_path / "data") == []
  assert load(archive, tmp_path / "data").conversations == SIZES


def test_interrupted_tokenisation_leaves_nothing(
  archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  def interrupted(dialogues: object, file: object) -> None:
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(prepare.json, "dump", interrupted)
    with pytest.raises(KeyboardInterrupt):
      load(archive, tmp_path / "data")

  assert list((tmp_path / "data" / "tokenized").iterdir()) == []
  assert load(archive, tmp_path / "data").conversations == SIZES


def test_unwritable_data_dir(archive: Path, tmp_path: Path) -> None:
  (tmp_path / "data").write_text("a file, no folder")

  message = load_error(archive, tmp_path / "data")

  assert "config.data.data_dir" in message


def test_official_checksum_is_registered() -> None:
  module = Path(empathetic_dialogues.__file__)
  registered = checksums.load_url_infos(module.with_name("checksums.tsv"))

  assert EmpatheticDialogues.url_infos == registered
  assert list(registered) == [empathetic_dialogues.OFFICIAL_URL]
  assert empathetic_dialogues.OFFICIAL_URL == (
    "https://dl.fbaipublicfiles.com/parlai/empatheticdialogues/"
    "empatheticdialogues.tar.gz"
  )
  info = registered[empathetic_dialogues.OFFICIAL_URL]
  assert info.size == 28_022_709
  assert info.checksum == (
    "56f234d77b7dd1f005fd365bb17769cfe346c3c84295b69bc069c8ccb83be03d"
  )


class QuietHandler(http.server.SimpleHTTPRequestHandler):
  """Serves files without logging requests."""

  def log_message(self, format: str, *args: object) -> None:
    pass


@pytest.fixture
def official(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
  """An invented official archive on a server of this machine.

  Its right checksum is registered in place of the official one's.
  """
  folder = tmp_path / "server"
  folder.mkdir()
  path = write_archive(folder / "empatheticdialogues.tar.gz", csv_files())
  content = path.read_bytes()
  server = http.server.ThreadingHTTPServer(
    ("127.0.0.1", 0), functools.partial(QuietHandler, directory=str(folder))
  )
  url = f"http://127.0.0.1:{server.server_port}/{path.name}"
  digest = hashlib.sha256(content).hexdigest()
  registered = tmp_path / "checksums.tsv"
  registered.write_text(f"{url}\t{len(content)}\t{digest}\t{path.name}\n")
  monkeypatch.setenv("NO_PROXY", "127.0.0.1")
  monkeypatch.setattr(empathetic_dialogues, "OFFICIAL_URL", url)
  monkeypatch.setattr(
    EmpatheticDialogues, "url_infos", checksums.load_url_infos(registered)
  )
  thread = threading.Thread(target=server.serve_forever, args=(0.05,))
  thread.start()
  yield path
  server.shutdown()
  thread.join()
  server.server_close()


def test_official_is_downloaded_once(official: Path, tmp_path: Path) -> None:
  first = load("official", tmp_path / "data")
  official.unlink()
  second = load("official", tmp_path / "data")

  assert first.conversations == SIZES
  assert second.examples == first.examples


def test_official_with_another_checksum_is_refused(
  official: Path, tmp_path: Path
) -> None:
  """One changed word, then the right archive again."""
  right = official.read_bytes()
  changed = csv("train").replace("morning", "evening")
  write_archive(official, csv_files(train=changed))

  message = load_error("official", tmp_path / "data")

  assert "checksum" in message
  assert empathetic_dialogues.OFFICIAL_URL in message
  assert prepared_files(tmp_path / "data") == []
  official.write_bytes(right)
  assert load("official", tmp_path / "data").conversations == SIZES


def test_official_that_is_not_there(official: Path, tmp_path: Path) -> None:
  official.unlink()

  message = load_error("official", tmp_path / "data")

  assert "config.data.source" in message
  assert prepared_files(tmp_path / "data") == []


def test_official_without_a_connection(
  official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), QuietHandler) as free:
    port = free.server_port
  url = f"http://127.0.0.1:{port}/{official.name}"
  monkeypatch.setattr(downloader, "MAX_RETRIES", 0)
  monkeypatch.setattr(empathetic_dialogues, "OFFICIAL_URL", url)

  message = load_error("official", tmp_path / "data")

  assert "config.data.source" in message
  assert prepared_files(tmp_path / "data") == []


@pytest.mark.parametrize("silent", ["server", "name server"])
def test_official_without_an_answer(
  silent: str,
  official: Path,
  tmp_path: Path,
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """Refused in time, whether it is the archive's server that is silent."""
  del official
  assert empathetic_dialogues._ANSWER_SECONDS <= 15
  monkeypatch.setattr(empathetic_dialogues, "_ANSWER_SECONDS", 0.5)
  ended = threading.Event()

  def look_up(*args: object, **kwargs: object) -> None:
    ended.wait(60)
    raise OSError("too late")

  with socket.create_server(("127.0.0.1", 0)) as server:
    url = f"http://127.0.0.1:{server.getsockname()[1]}/archive.tar.gz"
    monkeypatch.setattr(empathetic_dialogues, "OFFICIAL_URL", url)
    if silent == "name server":
      monkeypatch.setattr(socket, "getaddrinfo", look_up)
    began = time.monotonic()
    message = load_error("official", tmp_path / "data")
    ended.set()
  assert time.monotonic() - began < 10
  assert f"fetch {url} elsewhere, copy it here" in message
  assert prepared_files(tmp_path / "data") == []
