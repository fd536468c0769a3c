"""The files of an export, and their checked reading; `export.py` writes them.

An export is one folder from which a system is evaluated and chatted with.
"""

import hashlib
import io
import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
from flax import traverse_util

from empdg_jax import config as config_lib
from empdg_jax import storage
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
# A flag for each id of the vocabulary: is the word emotional out of context?
# The stand-alone example has no tagger and needs nothing else.
EMOTIONAL = "lexicon.npy"
# All words of the lexicon, since words that the vocabulary lacks are emotional
# too. As hashes, because some lexicons may not be handed on.
LEXICON_HASHES = "lexicon_hashes.npy"
CARD = "README.md"
METRICS = "eval/metrics.json"
# `safetensors.numpy` saves bfloat16 but cannot load it.
_TYPES: dict[str, Any] = {"F32": np.float32, "BF16": jnp.bfloat16}
REQUIRED = (
  ABOUT, CONFIG, VOCABULARY, EMOTION_NAMES, PARAMS, RESPOND, EMOTIONAL,
  LEXICON_HASHES, CARD,
)  # fmt: skip


class Export(NamedTuple):
  """The content of an export.

  Attributes:
    run: The run that it comes from.
    params: The generator's parameters as NumPy float32, nested as the model's.
    lexicon: The run's lexicon.
    step: The number of updates before the checkpoint; None for an average.
  """

  run: Run
  params: Any
  lexicon: HashedWords
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
  what = f"--bundle={folder}: {name} cannot be read; export again"
  with storage.errors(what, InputError):
    return (folder / name).read_bytes()


def sums_text(files: Mapping[str, bytes]) -> str:
  """Returns the output of `sha256sum` for files, sorted by name.

  >>> sums_text({"a": b""})[:20]
  'e3b0c44298fc1c149afb'
  """
  return "".join(
    f"{hashlib.sha256(data).hexdigest()}  {name}\n"
    for name, data in sorted(files.items())
  )


class _Checked:
  """The files of an export, checked against SHA256SUMS as they are read."""

  def __init__(self, folder: pathlib.Path) -> None:
    """Reads SHA256SUMS, and the version of the format.

    Raises:
      InputError: The folder is no export or one of a newer format, or a file
        is missing or damaged.
    """
    require_export(folder)
    self._folder = folder
    self.digests: dict[str, str] = {}
    text = read_file(folder, SUMS).decode("utf-8", "replace")
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
      digest, two_spaces, name = line.partition("  ")
      if not two_spaces or len(digest) != 64 or not name.isprintable():
        raise self._error(f"{SUMS} is damaged in line {number}; export again")
      self.digests[name] = digest
    # Before anything else, since a newer format may have other files and other
    # fields, and what it needs is an update, not a new export.
    version = json.loads(self.read(ABOUT))["format_version"]
    if version > FORMAT_VERSION:
      raise self._error(
        f"{ABOUT} has format version {version}; this package reads up to "
        f"{FORMAT_VERSION}: update empdg-jax"
      )

  def _error(self, message: str) -> InputError:
    return InputError(f"--bundle={self._folder}: {message}")

  def read(self, name: str) -> bytes:
    """Returns a file's bytes.

    Raises:
      InputError: It is not listed, cannot be read or is damaged.
    """
    if name not in self.digests:
      raise self._error(f"{SUMS} does not list {name}; export again")
    data = read_file(self._folder, name)
    if hashlib.sha256(data).hexdigest() != self.digests[name]:
      raise self._error(
        f"{name} is not what was exported (its SHA-256 differs from {SUMS}); "
        "copy or export it again"
      )
    return data

  def read_all(self) -> dict[str, bytes]:
    """Returns every file of the export; see `read`."""
    if unknown := set(self.digests) - {*REQUIRED, METRICS}:
      raise self._error(
        f"{SUMS} lists {min(unknown)!r}, which is no file of an export; export "
        "again"
      )
    # Required files first and by name, so that a missing one is the one named.
    names = dict.fromkeys((*REQUIRED, *self.digests))
    return {name: self.read(name) for name in names}

  def config(self) -> Config:
    """Returns the configuration of the export's run."""
    text = self.read(CONFIG).decode()
    return config_lib.from_json(text, f"{self._folder}/{CONFIG}")

  def run(self) -> Run:
    """Returns the configuration, vocabulary and labels of the export's run."""
    where = f"{self._folder}/{VOCABULARY}"
    vocabulary = vocab.parse_vocabulary(self.read(VOCABULARY), where)
    config = self.config()
    # The labels come from the export: the configuration may name a file of the
    # training machine, or one whose labels have changed since.
    emotions = tuple(self.read(EMOTION_NAMES).decode().split())
    if emotions != corpora.find_corpus(config.data, emotions).emotions:
      raise self._error(
        f"{EMOTION_NAMES} names other emotions than the 32 of "
        f"{corpora.EMPATHETIC_DIALOGUES}"
      )
    return Run(self._folder, config, vocabulary, emotions)


def read_config(folder: pathlib.Path) -> Config:
  """Reads the configuration of an export's run; see `read_export`."""
  return _Checked(folder).config()


def read_run(folder: pathlib.Path) -> Run:
  """Reads an export's run without its parameters; see `read_export`."""
  return _Checked(folder).run()


def read_export(folder: pathlib.Path) -> Export:
  """Reads an export, checked against its SHA256SUMS.

  Raises:
    InputError: A file is missing, damaged or of a newer format; the message
      names it.
  """
  checked = _Checked(folder)
  files = checked.read_all()
  # Pickles, which can run any code, are refused by default.
  hashes = np.load(io.BytesIO(files[LEXICON_HASHES]))
  params = {}
  for name, entry in safetensors.deserialize(files[PARAMS]):
    flat = np.frombuffer(entry["data"], _TYPES[entry["dtype"]])
    params[name] = flat.reshape(entry["shape"]).astype(np.float32)
  step = json.loads(files[ABOUT])["step"]
  return Export(checked.run(), nested(params), HashedWords(hashes), step)


def bytes_of(array: np.ndarray) -> bytes:
  """Returns the content of an array's `.npy` file."""
  buffer = io.BytesIO()
  np.save(buffer, array, allow_pickle=False)
  return buffer.getvalue()


def named(params: Any) -> dict[str, Any]:
  """Returns parameters by name: their modules' names, joined by dots.

  >>> named({"encoder": {"norm": {"scale": 1.0}}})
  {'encoder.norm.scale': 1.0}
  """
  return traverse_util.flatten_dict(params, sep=".")


def nested(params: Mapping[str, Any]) -> Any:
  """Returns parameters nested as the model's; the inverse of `named`."""
  return traverse_util.unflatten_dict(params, sep=".")
