"""EmpatheticDialogues (Rashkin et al., 2019) as a TFDS dataset.

The records are the raw conversations. Nothing here needs TensorFlow: the files
are ArrayRecord, read through `as_data_source`. Other datasets in the same CSV
format bring their own emotion labels.
"""

import bz2
import dataclasses
import gzip
import hashlib
import io
import itertools
import lzma
import operator
import os
import pathlib
import tarfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from empdg_jax import storage
from empdg_jax.config import InputError
from empdg_jax.data import sample_corpus
from empdg_jax.data.corpora import EMOTIONS, SPLITS, Conversation

OFFICIAL_URL = (
  "https://dl.fbaipublicfiles.com/parlai/empatheticdialogues/"
  "empatheticdialogues.tar.gz"
)
# How long the server of the official archive may take to answer.
_ANSWER_SECONDS = 15
_HEADER = "conv_id,utterance_idx,context,prompt,speaker_idx,utterance"


def read_csv(
  data: bytes, name: str, emotions: Sequence[str] = EMOTIONS
) -> Iterator[Conversation]:
  """Parses one split in the official format.

  Args:
    data: The file's content.
    name: The file's name in messages.
    emotions: The labels that may occur.

  Yields:
    The conversations in the file's order.

  Raises:
    InputError: A row is malformed, named by file and line, or there is none.
  """
  # No CSV reader: a field is never quoted and a stray `"` is text, so quoting
  # rules would silently swallow rows. Commas in text are written `_comma_`.
  header, *lines = data.removesuffix(b"\n").split(b"\n")
  if not header.startswith(_HEADER.encode()):
    raise InputError(f"{name}:1: expected the header '{_HEADER},selfeval,tags'")
  if not lines:
    raise InputError(
      f"{name}: the split is empty; expected rows below the header"
    )
  parsed = (
    _parse_row(line.removesuffix(b"\r"), f"{name}:{number}", emotions)
    for number, line in enumerate(lines, start=2)
  )
  for identifier, group in itertools.groupby(parsed, operator.itemgetter(0)):
    rows = list(group)
    yield Conversation(
      id=identifier,
      emotion=emotions.index(rows[0][2]),
      situation=rows[0][3],
      utterances=tuple(row[5] for row in rows),
      speakers=tuple(int(row[4]) for row in rows),
    )


def _parse_row(line: bytes, where: str, emotions: Sequence[str]) -> list[str]:
  try:
    fields = line.decode("utf-8").split(",")
  except UnicodeDecodeError as error:
    raise InputError(f"{where}: not UTF-8 text ({error.reason})") from error
  # Official valid and test rows may have a ninth field, candidate responses.
  if len(fields) not in (8, 9):
    raise InputError(f"{where}: {len(fields)} fields; expected 8")
  # Only after the split, which must not see the text's own commas.
  fields = [field.replace("_comma_", ",") for field in fields]
  if fields[2] not in emotions:
    raise InputError(
      f"{where}: unknown emotion label {fields[2]!r}; expected one of "
      + ", ".join(emotions)
    )
  if not fields[4].isdecimal() or len(fields[4]) > 9:  # An int32.
    raise InputError(f"{where}: speaker_idx {fields[4]!r} is no small number")
  if not fields[5].strip():
    raise InputError(f"{where}: the utterance is empty")
  return fields


def _open_packed(path: pathlib.Path) -> io.BufferedIOBase:
  """Opens a file that may be compressed."""
  with path.open("rb") as file:
    start = file.read(6)
  openers: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
  }
  for magic, opener in openers.items():
    if start.startswith(magic):
      return opener(path)
  return path.open("rb")


def read_source(path: pathlib.Path) -> Mapping[str, bytes]:
  """Returns the CSV file of each split in an archive or a folder.

  Raises:
    InputError: The path is neither, a split is missing, or a member of the
      archive is a link, a device or outside it.
  """
  files = {}
  with storage.errors(
    f"config.data.source: cannot read {str(path)!r}; give 'official', "
    "'sample', an archive like empatheticdialogues.tar.gz, or a folder with "
    "train.csv, valid.csv and test.csv",
    InputError,
  ):
    if path.is_dir():
      for split in SPLITS:
        if (file := path / f"{split}.csv").is_file():
          with file.open("rb") as opened:
            files[split] = storage.read_bounded(opened, str(file))
    else:
      storage.check_plain(path)
      # Unpacked as a whole, within a bound: tarfile would follow a bomb's
      # headers through any number of bytes.
      with _open_packed(path) as opened:
        unpacked = io.BytesIO(storage.read_bounded(opened, str(path)))
      with tarfile.open(fileobj=unpacked, mode="r:") as archive:
        for member in archive:
          # By name in whatever folder: re-packed archives differ in layout.
          name = pathlib.PurePosixPath(member.name)
          split = name.name.removesuffix(".csv")
          plain = member.isdir() or (member.isreg() and not member.issparse())
          if name.is_absolute() or ".." in name.parts or not plain:
            raise InputError(
              f"{path}: holds {member.name!r:.80}, which is no plain file "
              "inside the archive; pack the CSV files anew"
            )
          if split in SPLITS and (content := archive.extractfile(member)):
            files[split] = content.read()
  for split in SPLITS:
    if split not in files:
      raise InputError(f"{path}: holds no {split}.csv")
  return files


def _check_connection() -> None:
  """Checks that the official archive can be reached, within a deadline.

  Raises:
    InputError: It cannot.
  """
  # TFDS would try for minutes and print a warning each time.
  failures: list[Exception] = []

  def connect() -> None:
    request = urllib.request.Request(OFFICIAL_URL, method="HEAD")
    try:
      # Our own constant, of the scheme https.
      urllib.request.urlopen(request, timeout=_ANSWER_SECONDS).close()  # nosec B310
    except urllib.error.HTTPError:
      pass  # It answered; TFDS reports what is wrong with the file.
    except OSError as error:
      failures.append(error)

  # In a thread, since no timeout bounds the search for the server's address.
  thread = threading.Thread(target=connect, daemon=True)
  thread.start()
  thread.join(_ANSWER_SECONDS)
  if thread.is_alive() or failures:
    why = storage.first_line(failures[0]) if failures else "no connection"
    raise InputError(
      f"config.data.source: cannot download the official data ({why}); fetch "
      f"{OFFICIAL_URL} elsewhere, copy it here, and give its path as "
      "--config.data.source=empatheticdialogues.tar.gz; or try 'sample'"
    )


class EmpatheticDialogues(tfds.core.GeneratorBasedBuilder):
  """The TFDS builder, with one builder config a source."""

  VERSION = tfds.core.Version("1.0.0")
  # TFDS looks for checksums.tsv here; by default it would guess the folder.
  pkg_dir_path = pathlib.Path(__file__).parent

  def __init__(
    self,
    *,
    source: str,
    data_dir: str | os.PathLike[str],
    emotions: Sequence[str] = EMOTIONS,
  ) -> None:
    """Creates the builder.

    Args:
      source: `"official"`, `"sample"`, or a path to an archive or a folder.
      data_dir: The folder for prepared datasets.
      emotions: The labels that conversations may have.

    Raises:
      InputError: The path cannot be read or lacks a split.
    """
    self._source, self._emotions = source, tuple(emotions)
    # The official files are read once they are downloaded.
    self._files: Mapping[str, bytes] | None = None
    name = "official"
    if source != "official":
      sample = source == "sample"
      self._files = (
        sample_corpus.csv_files()
        if sample
        else read_source(storage.disk_path(source, "config.data.source"))
      )
      # TFDS takes a prepared dataset of the same name for this one, so the
      # name must change with the content: a path may hold other rows tomorrow.
      digest = hashlib.sha256(b"".join(self._files[s] for s in SPLITS))
      if self._emotions != EMOTIONS:
        # Prepared records hold numbers, which mean other labels here.
        digest.update("\n".join(self._emotions).encode())
      name = f"{'sample' if sample else 'local'}-{digest.hexdigest()[:16]}"
    super().__init__(
      data_dir=data_dir,
      config=tfds.core.BuilderConfig(name=name, version=self.VERSION),
      file_format="array_record",
    )

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=(
        "Dialogues about emotional situations, "
        f"{len(self._emotions)} emotion labels."
      ),
      features=tfds.features.FeaturesDict(
        {
          "id": tfds.features.Text(),
          "emotion": tfds.features.ClassLabel(names=list(self._emotions)),
          "situation": tfds.features.Text(),
          "utterances": tfds.features.Sequence(tfds.features.Text()),
          "speakers": tfds.features.Sequence(
            tfds.features.Scalar(dtype=np.int32)
          ),
        }
      ),
      homepage="https://github.com/facebookresearch/EmpatheticDialogues",
      # The example sets drop and join conversations by their order in the file.
      disable_shuffling=True,
    )

  def _split_generators(
    self, dl_manager: tfds.download.DownloadManager
  ) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
    if self._files is None:
      # An archive kept from an earlier download has a note beside it.
      if not any(pathlib.Path(str(dl_manager.download_dir)).glob("*.INFO")):
        _check_connection()
      folder = dl_manager.download(OFFICIAL_URL)
      self._files = read_source(pathlib.Path(str(folder)))
    return {
      split: self._generate_examples(self._files[split], split)
      for split in SPLITS
    }

  def _generate_examples(
    self, data: bytes, split: str
  ) -> Iterator[tuple[int, dict[str, Any]]]:
    name = f"{self._source}: {split}.csv"
    for key, conversation in enumerate(read_csv(data, name, self._emotions)):
      yield key, dataclasses.asdict(conversation)
