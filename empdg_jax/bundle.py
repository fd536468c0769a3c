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
from empdg_jax.data import vocab
from empdg_jax.data.empathetic_dialogues import EMOTIONS
from empdg_jax.data.lexicon import HashedWords
from empdg_jax.data.vocab import Vocabulary

FORMAT_VERSION = 1
ABOUT = "export.json"
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
SUMS = "SHA256SUMS"
# The names that safetensors has for the types of parameters.
_TYPES: dict[str, Any] = {"F32": np.float32, "BF16": jnp.bfloat16}
REQUIRED = (
  ABOUT, CONFIG, VOCABULARY, EMOTION_NAMES, PARAMS, RESPOND, EMOTIONAL,
  LEXICON_HASHES, CARD,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Bundle:
  """What an export holds.

  Attributes:
    config: Of the run that it comes from.
    vocabulary: That run's.
    lexicon: The words of the run's lexicon.
    params: The generator's parameters as NumPy float32, nested as the model's.
    step: The run's updates before the checkpoint; None for an average.
  """

  config: Config
  vocabulary: Vocabulary
  lexicon: HashedWords
  params: Any
  step: int | None


def is_bundle(folder: pathlib.Path) -> bool:
  """Returns whether a folder is an export, whole or not."""
  return (folder / SUMS).exists() or (folder / ABOUT).exists()


def require_bundle(folder: pathlib.Path) -> None:
  """Raises InputError unless a folder is an export, whole or not."""
  if not is_bundle(folder):
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


def _check(folder: pathlib.Path) -> dict[str, bytes]:
  """Reads all of an export's files and checks what they hold.

  Raises:
    InputError: Naming the file that is missing, damaged or too new.
  """
  require_bundle(folder)
  expected = {}
  for number, line in enumerate(
    read_file(folder, SUMS).decode("utf-8", "replace").splitlines(), start=1
  ):
    digest, two_spaces, name = line.partition("  ")
    if not two_spaces or len(digest) != 64:
      raise InputError(
        f"--bundle={folder}: {SUMS} is damaged in line {number}; export again"
      )
    expected[name] = digest

  def checked(name: str) -> bytes:
    if name not in expected:
      raise InputError(
        f"--bundle={folder}: {SUMS} does not list {name}; export again"
      )
    data = read_file(folder, name)
    if hashlib.sha256(data).hexdigest() != expected[name]:
      raise InputError(
        f"--bundle={folder}: {name} is not what was exported (its SHA-256 "
        f"differs from {SUMS}); copy or export it again"
      )
    return data

  # First, since a newer format may have other files.
  version = json.loads(checked(ABOUT))["format_version"]
  if version > FORMAT_VERSION:
    raise InputError(
      f"--bundle={folder}: {ABOUT} has format version {version}; this package "
      f"reads up to {FORMAT_VERSION}: update empdg-jax"
    )
  return {name: checked(name) for name in dict.fromkeys([*REQUIRED, *expected])}


def open_bundle(folder: pathlib.Path) -> Bundle:
  """Reads an export, checked against its SHA256SUMS.

  Args:
    folder: The export.

  Returns:
    What it holds.

  Raises:
    InputError: Naming the file that is missing, damaged or too new.
  """
  files = _check(folder)
  if files[EMOTION_NAMES].decode().split() != list(EMOTIONS):
    raise InputError(
      f"--bundle={folder}: {EMOTION_NAMES} names other emotions than this "
      "package's"
    )
  return Bundle(
    config_lib.from_json(files[CONFIG].decode(), f"{folder}/{CONFIG}"),
    vocab.parse_vocabulary(files[VOCABULARY], f"{folder}/{VOCABULARY}"),
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


def read_config(folder: pathlib.Path) -> Config:
  """Reads the configuration of an export's run alone, unchecked."""
  text = read_file(folder, CONFIG).decode("utf-8", "replace")
  return config_lib.from_json(text, f"{folder}/{CONFIG}")


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
