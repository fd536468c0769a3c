"""An export: one folder from which a system is scored and talked with.

`export.py` writes it; here are its files, and how they are read and checked.
"""

import dataclasses
import hashlib
import io
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
from flax import traverse_util

from empdg_jax import config as config_lib
from empdg_jax.config import Config, InputError
from empdg_jax.data import corpora, vocab
from empdg_jax.data.lexicon import HashedWords
from empdg_jax.training import run_folder
from empdg_jax.training.run_folder import Run

FORMAT_VERSION = 1
ABOUT, SUMS = run_folder.EXPORT_FILES
CONFIG = "config.json"
VOCABULARY = "vocab.txt"
EMOTION_NAMES = "emotions.txt"
PARAMS = "params.safetensors"
RESPOND = "respond.jax"
# By the vocabulary's ids: which words are emotional, whatever their sentence.
EMOTIONAL = "lexicon.npy"
# Of all of the lexicon's words, those that the vocabulary lacks included.
LEXICON_HASHES = "lexicon_hashes.npy"
CARD = "README.md"
METRICS = "eval/metrics.json"
# The names that safetensors has for the types of parameters.
_TYPES: dict[str, Any] = {"F32": np.float32, "BF16": jnp.bfloat16}
REQUIRED = (
  ABOUT, CONFIG, VOCABULARY, EMOTION_NAMES, PARAMS, RESPOND, EMOTIONAL,
  LEXICON_HASHES, CARD,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Export:
  """What an export holds.

  Attributes:
    run: The run that it comes from.
    lexicon: The words of the run's lexicon.
    params: The generator's parameters as NumPy float32, nested as the model's.
    step: The run's updates before the checkpoint; None for an average.
  """

  run: Run
  lexicon: HashedWords
  params: Any
  step: int | None


def require_export(folder: pathlib.Path) -> None:
  """Raises InputError unless a folder is an export, whole or not."""
  if not run_folder.is_export(folder):
    raise InputError(
      f"--bundle={folder} is no export: it holds no {SUMS}; 'empdg export' "
      "makes one"
    )


def read_file(folder: pathlib.Path, name: str) -> bytes:
  """Returns a file's bytes.

  Raises:
    InputError: It cannot be read.
  """
  try:
    return (folder / name).read_bytes()
  except OSError as error:
    reason = error.strerror or error
    raise InputError(
      f"--bundle={folder}: {name} cannot be read ({reason}); export again"
    ) from error


def sums_text(files: Mapping[str, bytes]) -> str:
  """Returns what `sha256sum` prints of files, by name.

  >>> sums_text({"a": b""})[:20]
  'e3b0c44298fc1c149afb'
  """
  return "".join(
    f"{hashlib.sha256(data).hexdigest()}  {name}\n"
    for name, data in sorted(files.items())
  )


class _Checked:
  """Reads an export's files, each once, checked against SHA256SUMS."""

  def __init__(self, folder: pathlib.Path) -> None:
    """Reads SHA256SUMS, and the version of the format.

    Raises:
      InputError: The folder is no export, or one of a newer format; or naming
        the file that is missing or damaged.
    """
    require_export(folder)
    self._folder = folder
    self._files: dict[str, bytes] = {}
    self.digests: dict[str, str] = {}
    text = read_file(folder, SUMS).decode("utf-8", "replace")
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
      digest, two_spaces, name = line.partition("  ")
      if not two_spaces or len(digest) != 64 or not name.isprintable():
        raise InputError(
          f"--bundle={folder}: {SUMS} is damaged in line {number}; export again"
        )
      self.digests[name] = digest
    # First, since a newer format may have other files and other fields.
    version = json.loads(self.read(ABOUT))["format_version"]
    if version > FORMAT_VERSION:
      raise InputError(
        f"--bundle={folder}: {ABOUT} has format version {version}; this "
        f"package reads up to {FORMAT_VERSION}: update empdg-jax"
      )

  def read(self, name: str) -> bytes:
    """Returns a file's bytes.

    Raises:
      InputError: It is not listed, cannot be read or is damaged.
    """
    if name in self._files:
      return self._files[name]
    if name not in self.digests:
      raise InputError(
        f"--bundle={self._folder}: {SUMS} does not list {name}; export again"
      )
    data = read_file(self._folder, name)
    if hashlib.sha256(data).hexdigest() != self.digests[name]:
      raise InputError(
        f"--bundle={self._folder}: {name} is not what was exported (its "
        f"SHA-256 differs from {SUMS}); copy or export it again"
      )
    self._files[name] = data
    return data

  def read_all(self) -> dict[str, bytes]:
    """Returns every file of the format; see `read`."""
    if unknown := set(self.digests) - {*REQUIRED, METRICS}:
      raise InputError(
        f"--bundle={self._folder}: {SUMS} lists {min(unknown)!r}, which is no "
        "file of an export; export again"
      )
    return {
      name: self.read(name)
      for name in {**dict.fromkeys(REQUIRED), **self.digests}
    }

  def config(self) -> Config:
    """Returns the configuration of the export's run."""
    text = self.read(CONFIG).decode()
    return config_lib.from_json(text, f"{self._folder}/{CONFIG}")

  def run(self) -> Run:
    """Returns what the export tells of its run."""
    where = f"{self._folder}/{VOCABULARY}"
    vocabulary = vocab.parse_vocabulary(self.read(VOCABULARY), where)
    config = self.config()
    emotions = tuple(self.read(EMOTION_NAMES).decode().split())
    if emotions != corpora.find_corpus(config.data, emotions).emotions:
      raise InputError(
        f"--bundle={self._folder}: {EMOTION_NAMES} names other emotions than "
        "this package's"
      )
    return Run(self._folder, config, vocabulary, emotions)


def read_config(folder: pathlib.Path) -> Config:
  """Reads the configuration of an export's run; see `read_export`."""
  return _Checked(folder).config()


def read_run(folder: pathlib.Path) -> Run:
  """Reads what an export tells of its run; see `read_export`."""
  return _Checked(folder).run()


def read_export(folder: pathlib.Path) -> Export:
  """Reads an export, checked against its SHA256SUMS.

  Args:
    folder: The export.

  Returns:
    What it holds.

  Raises:
    InputError: Naming the file that is missing, damaged or too new.
  """
  checked = _Checked(folder)
  files = checked.read_all()
  return Export(
    checked.run(),
    HashedWords(array_of(files[LEXICON_HASHES])),
    nested(
      {
        name: np.frombuffer(entry["data"], _TYPES[entry["dtype"]])
        .reshape(entry["shape"])
        .astype(np.float32)
        for name, entry in safetensors.deserialize(files[PARAMS])
      }
    ),
    json.loads(files[ABOUT])["step"],
  )


def bytes_of(array: np.ndarray) -> bytes:
  """Returns an array as a `.npy` file."""
  buffer = io.BytesIO()
  np.save(buffer, array, allow_pickle=False)
  return buffer.getvalue()


def array_of(data: bytes) -> np.ndarray:
  """Reads what `bytes_of` gave."""
  return np.load(io.BytesIO(data), allow_pickle=False)


def named(params: Any) -> dict[str, Any]:
  """Returns parameters by readable names: the modules, joined by dots.

  >>> named({"encoder": {"norm": {"scale": 1.0}}})
  {'encoder.norm.scale': 1.0}
  """
  return traverse_util.flatten_dict(params, sep=".")


def nested(params: Mapping[str, Any]) -> Any:
  """Returns what `named` was given."""
  return traverse_util.unflatten_dict(params, sep=".")
