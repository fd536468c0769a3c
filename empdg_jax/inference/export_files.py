"""The files of an export, and their checked reading; `export.py` writes them.

An export is one folder from which a system is evaluated and chatted with. It
may come from a stranger, who can compute `SHA256SUMS` as well: the sums find
damage, and every file is parsed as if it were hostile.
"""

import contextlib
import dataclasses
import hashlib
import io
import math
import pathlib
import re
from collections.abc import Generator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from empdg_jax import config as config_lib
from empdg_jax import storage
from empdg_jax.config import Config, InputError
from empdg_jax.data import corpora, pipeline, vocab
from empdg_jax.data.lexicon import HashedWords
from empdg_jax.models import registry
from empdg_jax.training import run_folder
from empdg_jax.training.run_folder import Run
from empdg_jax.training.train_state import init_params

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
_JSON, _LARGEST_HEADER, _LARGE = 2**16, 2**20, 2**22
# The largest size of each file in bytes, many times what any export has. That
# of the parameters depends on the model.
_LARGEST = {
  ABOUT: _JSON,
  CONFIG: _JSON,
  VOCABULARY: _LARGE,
  EMOTION_NAMES: _JSON,
  PARAMS: 0,
  RESPOND: 2**26,
  EMOTIONAL: _LARGE,
  LEXICON_HASHES: 2 * _LARGE,
  CARD: _LARGE,
  METRICS: _JSON,
  SUMS: _JSON,
}
REQUIRED = tuple(_LARGEST)[:-2]
# The types in `params.safetensors`, by their names in `export.json`.
_TYPES: dict[str, tuple[str, Any]] = {
  "float32": ("F32", np.float32),
  "bfloat16": ("BF16", jnp.bfloat16),
}
_ABOUT_FIELDS: dict[str, Any] = {
  "format_version": int,
  "system": str,
  "step": int | None,
  "averaged_steps": list,
  "dtype": Literal["float32", "bfloat16"],
  "context_length": int,
  "emotional_length": int,
  "max_decode_steps": int,
  "platforms": list,
  "empdg_jax": str,
  "jax": str,
}
# The largest sizes that no parameter's shape bounds.
_LARGEST_SIZES = {
  "eval.batch_size": 2**16,
  "eval.beam_size": 2**10,
  "eval.max_decode_steps": 2**12,
  "data.feedback_length": 2**12,
}
_LONGEST = 2**12  # Tokens of any part of an example.


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


@contextlib.contextmanager
def _reading(folder: pathlib.Path, name: str) -> Generator[str]:
  """Names a file in all errors that its content raises.

  Yields:
    The file's name in messages.
  """
  where = f"--bundle={folder}: {name}"
  try:
    yield where
  except Exception as error:  # Hostile content may raise anything.
    reason = storage.first_line(error).removeprefix(where).removeprefix(": ")
    raise InputError(f"{where}: {reason}; export again") from error


def _read_bounded(folder: pathlib.Path, name: str, largest: int) -> bytearray:
  """Returns a file's bytes.

  Raises:
    InputError: It cannot be read, lies elsewhere or is larger than `largest`.
  """
  what = f"--bundle={folder}: {name} cannot be read; export again"
  path = folder / name
  data = bytearray()
  with storage.errors(what, InputError):
    if not storage.in_bucket(folder):
      # A link could show any file of this machine, or wait for a device.
      if not path.resolve(strict=True).is_relative_to(folder.resolve()):
        raise ValueError("it leads out of the folder")
      if not path.is_file():
        raise ValueError("it is no plain file")
    with path.open("rb") as file:
      # Piece by piece: a size can lie, and some files never end.
      while piece := file.read(2**20):
        data += piece
        if len(data) > largest:
          raise ValueError(f"it holds more than {largest:,} bytes")
  return data


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
    text = _read_bounded(folder, SUMS, _LARGEST[SUMS]).decode(errors="replace")
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
      match = re.fullmatch("([0-9a-f]{64})  (.+)", line)
      if not match or match[2] in self.digests:
        raise self._error(f"{SUMS} is damaged in line {number}; export again")
      self.digests[match[2]] = match[1]
    # Before anything else, since a newer format may have other files and other
    # fields, and what it needs is an update, not a new export.
    with self._parsing(ABOUT) as (data, _):
      self.about = config_lib.parse_json(data.decode())
      if not isinstance(self.about, dict):
        raise ValueError("is no object")
      version = self.about.get("format_version")
      if type(version) is not int or version < 1:
        raise ValueError(f"its format_version is {version!r:.60}")
    if version > FORMAT_VERSION:
      raise self._error(
        f"{ABOUT} has format version {version}; this package reads up to "
        f"{FORMAT_VERSION}: update empdg-jax"
      )
    if missing := [name for name in REQUIRED if name not in self.digests]:
      raise self._error(f"{SUMS} does not list {missing[0]}; export again")
    if unknown := self.digests.keys() - _LARGEST.keys():
      raise self._error(
        f"{SUMS} lists {min(unknown)!r:.60}, which is no file of an export; "
        "export again"
      )

  def _error(self, message: str) -> InputError:
    return InputError(f"--bundle={self._folder}: {message}")

  def read(self, name: str, largest: int | None = None) -> bytearray:
    """Returns a file's bytes.

    Raises:
      InputError: It is not listed, cannot be read, is too large or damaged.
    """
    if name not in self.digests:
      raise self._error(f"{SUMS} does not list {name}; export again")
    data = _read_bounded(self._folder, name, largest or _LARGEST[name])
    if hashlib.sha256(data).hexdigest() != self.digests[name]:
      raise self._error(
        f"{name} is not what was exported (its SHA-256 differs from {SUMS}); "
        "copy or export it again"
      )
    return data

  @contextlib.contextmanager
  def _parsing(
    self, name: str, largest: int | None = None
  ) -> Generator[tuple[bytearray, str]]:
    """Yields a file's bytes and its name in messages; see `_reading`."""
    data = self.read(name, largest)
    with _reading(self._folder, name) as where:
      yield data, where

  def config(self) -> Config:
    """Returns the configuration of the export's run."""
    with self._parsing(CONFIG) as (data, where):
      config = config_lib.from_json(data.decode(), where)
      registry.check_size(config.model, 0)
      _check_sizes(config)
    with _reading(self._folder, ABOUT):
      _check_about(self.about, config)
    return config

  def run(self) -> Run:
    """Returns the configuration, vocabulary and labels of the export's run."""
    config = self.config()
    with self._parsing(VOCABULARY) as (data, where):
      vocabulary = vocab.parse_vocabulary(data, where)
    # The labels come from the export: the configuration may name a file of the
    # training machine, or one whose labels have changed since.
    with self._parsing(EMOTION_NAMES) as (data, where):
      emotions = corpora.parse_labels(data.decode(), where)
      if emotions != corpora.find_corpus(config.data, emotions).emotions:
        raise ValueError(
          "names other emotions than the 32 of " + corpora.EMPATHETIC_DIALOGUES
        )
    return Run(self._folder, config, vocabulary, emotions)

  def params(self, run: Run) -> Any:
    """Returns the parameters as NumPy float32, nested as the model's."""
    with _reading(self._folder, CONFIG):
      shapes = _param_shapes(run)
    elements = sum(math.prod(shape) * n for shape, n in shapes.values())
    # A folder of holes may look larger than any disk.
    memory = storage.machine_memory()
    largest = min(_LARGEST_HEADER + 4 * elements, memory // 2)
    with self._parsing(PARAMS, largest) as (data, _):
      return nested(_parse_params(data, shapes, self.about["dtype"]))

  def check_metrics(self) -> None:
    """Checks the metrics, if there are any."""
    if METRICS in self.digests:
      with self._parsing(METRICS) as (data, _):
        _check_metrics(config_lib.parse_json(data.decode()))

  def array(self, name: str, dtype: type, length: int | None) -> np.ndarray:
    """Returns the array of a `.npy` file; see `bytes_of`."""
    with self._parsing(name) as (data, _):
      stream = io.BytesIO(data)
      # Not `np.load`, which allocates whatever size a header claims.
      np.lib.format.read_magic(stream)
      shape, _, found = np.lib.format.read_array_header_1_0(stream)
      values = data[stream.tell() :]
      wanted = len(values) // np.dtype(dtype).itemsize
      if found != dtype or shape != (wanted,) or length not in (None, wanted):
        raise ValueError(f"holds {found} of shape {shape!r:.60}")
      return np.frombuffer(values, dtype)


def _check_sizes(config: Config) -> None:
  """Raises ValueError for sizes that no shape of a parameter bounds."""
  values = config_lib.flatten(config)
  sizes = [(name, values[name], most) for name, most in _LARGEST_SIZES.items()]
  sizes += [
    ("data.shapes", max(shape), _LONGEST) for shape in config.data.shapes
  ]
  for name, value, most in sizes:
    if value > most:
      raise ValueError(f"config.{name} holds {value}; at most {most:,}")


def check_config(config: Config, where: str) -> None:
  """Checks that an export of a run could be loaded.

  Args:
    config: The run's configuration.
    where: The run's name in messages.

  Raises:
    InputError: The configuration has sizes beyond those of exports.
  """
  registry.check_size(config.model, 0)
  try:
    _check_sizes(config)
  except ValueError as error:
    raise InputError(f"{where}: cannot be exported: {error}") from error


def repeated(config: Config) -> dict[str, Any]:
  """Returns the part of `export.json` that repeats the configuration."""
  longest = pipeline.padded_shapes(config.data)[-1]
  return {
    "system": config.model.name,
    "context_length": longest.context,
    "emotional_length": longest.emotion,
    "max_decode_steps": config.eval.max_decode_steps,
  }


def _check_about(about: Any, config: Config) -> None:
  """Raises ValueError unless `export.json` is one, of this configuration."""
  for name, hint in _ABOUT_FIELDS.items():
    if name not in about:
      raise ValueError(f"lacks {name!r}")
    if wanted := config_lib.expected(about[name], hint):
      raise ValueError(f"{name}={about[name]!r:.60}: expected {wanted}")
  for name, value in repeated(config).items():
    if about[name] != value:
      raise ValueError(
        f"has {name}={about[name]!r:.60}, {CONFIG} has {value!r}"
      )
  steps = [about["step"] or 0, *about["averaged_steps"]]
  if not all(type(n) is int and 0 <= n <= config_lib.MAX_INT for n in steps):
    raise ValueError("names a step that is no number of updates")


def _check_metrics(metrics: Any) -> None:
  """Raises ValueError unless a value is that of `eval/metrics.json`."""
  for split, values in metrics.items():
    if split not in corpora.SPLITS:
      raise ValueError(f"names an unknown split {split!r:.60}")
    for name, value in values.items():
      if not isinstance(value, str | int | float | None):
        raise ValueError(f"holds no figure as {name!r:.60}")


def _param_shapes(run: Run) -> dict[str, tuple[tuple[int, ...], int]]:
  """Returns the shape of every parameter and the number of layers that have it.

  Only the names of the first layer, `_0` in them, stand for all layers.
  """
  # A configuration may ask for more layers than anyone can list.
  config = dataclasses.replace(run.config.model, num_layers=1)
  model = registry.create_model(config, len(run.vocabulary), len(run.emotions))
  like = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
  layers = run.config.model.num_layers
  return {
    name: (x.shape, layers if "_0." in name else 1)
    for name, x in named(like).items()
  }


def _parse_params(
  data: bytearray,
  shapes: Mapping[str, tuple[tuple[int, ...], int]],
  dtype: str,
) -> dict[str, np.ndarray]:
  """Reads the content of `params.safetensors`.

  Args:
    data: The content.
    shapes: The result of `_param_shapes`.
    dtype: The type of the parameters, a key of `_TYPES`.

  Returns:
    The parameters by name, as float32.

  Raises:
    ValueError: The parameters are not those of the shapes, or not finite.
  """
  # Parsed here, since the header alone must rule out what does not fit, and
  # the library would copy every array first.
  at = 8 + int.from_bytes(data[:8], "little")
  if at > min(len(data), _LARGEST_HEADER):
    raise ValueError("its header is longer than any")
  header = config_lib.parse_json(data[8:at].decode())
  header.pop("__metadata__", None)
  count = sum(layers for _, layers in shapes.values())
  if len(header) != count:
    raise ValueError(
      f"holds {len(header):,} parameters; the model of {CONFIG} has {count:,}"
    )
  expected = {
    name.replace("_0.", f"_{layer}."): shape
    for name, (shape, layers) in shapes.items()
    for layer in range(layers)
  }
  code, kind = _TYPES[dtype]
  arrays, start = {}, 0
  for name in sorted(header, key=lambda name: header[name]["data_offsets"]):
    if name not in expected:
      raise ValueError(f"holds {name!r:.60}, which the model of {CONFIG} lacks")
    shape = expected[name]
    end = start + math.prod(shape) * np.dtype(kind).itemsize
    wanted = {"dtype": code, "shape": [*shape], "data_offsets": [start, end]}
    if header[name] != wanted:
      raise ValueError(f"{name} is {header[name]!r:.200}, not {wanted}")
    flat = np.frombuffer(data, kind, math.prod(shape), at + start)
    if not np.isfinite(flat).all():
      raise ValueError(f"{name} is not finite")
    arrays[name], start = flat.reshape(shape), end
  if at + start != len(data):
    raise ValueError(f"holds {len(data) - at - start:,} bytes too many")
  return {name: array.astype(np.float32) for name, array in arrays.items()}


def read_config(folder: pathlib.Path) -> Config:
  """Reads the configuration of an export's run; see `read_export`."""
  return _Checked(folder).config()


def read_run(folder: pathlib.Path) -> Run:
  """Reads an export's run without its parameters; see `read_export`."""
  return _Checked(folder).run()


def read_export(folder: pathlib.Path) -> Export:
  """Reads an export, checked against its SHA256SUMS.

  Raises:
    InputError: A file is missing, damaged, malformed or of a newer format; the
      message names it.
  """
  checked = _Checked(folder)
  # The package itself has no use for these.
  for name in (RESPOND, CARD):
    checked.read(name)
  checked.check_metrics()
  run = checked.run()
  checked.array(EMOTIONAL, np.bool_, len(run.vocabulary))
  hashes = checked.array(LEXICON_HASHES, np.uint64, None)
  params = checked.params(run)
  return Export(run, params, HashedWords(hashes), checked.about["step"])


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
