"""The run folder: its files, and checks that they belong to one run."""

import dataclasses
import pathlib

from empdg_jax import config as config_lib
from empdg_jax import storage
from empdg_jax.config import Config, InputError
from empdg_jax.data import corpora, vocab
from empdg_jax.data.vocab import Vocabulary
from empdg_jax.models import registry

# Fields that a resumed run may change, since no update depends on them.
_NOT_OF_THE_RUN = ("train.profile_steps", "train.keep_checkpoints")

# Fields that give a generator's parameters their meaning. Equal shapes do not
# suffice: the same arrays compute something else with another norm order.
_GENERATOR_FIELDS = (
  "emb_dim",
  "num_layers",
  "num_heads",
  "key_value_depth",
  "filter_size",
  "norm_order",
  "feed_forward",
  "pointer_generator",
  "tie_embeddings",
)

EMOTIONS_FILE = "emotions.txt"
# Either marks a folder as an export, even one that was copied in part.
EXPORT_FILES = "export.json", "SHA256SUMS"


def is_export(folder: pathlib.Path) -> bool:
  """Returns whether a folder is an export rather than a run folder."""
  return any((folder / name).exists() for name in EXPORT_FILES)


def write_run(
  workdir: pathlib.Path,
  config: Config,
  vocabulary: Vocabulary,
  emotions: tuple[str, ...],
) -> None:
  """Starts a run folder, or checks that an existing one is of the same run.

  Args:
    workdir: The run folder.
    config: The run's configuration.
    vocabulary: The run's vocabulary.
    emotions: The run's emotion labels.

  Raises:
    InputError: The folder cannot be written, or holds another run.
  """
  check_same_config(workdir, config)
  with storage.errors(f"--workdir={workdir}: cannot write", InputError):
    workdir.mkdir(parents=True, exist_ok=True)
    if not (workdir / "vocab.txt").exists():
      with storage.atomic_path(workdir / "vocab.txt") as path:
        vocabulary.save(path)
    elif vocab.load_vocabulary(workdir / "vocab.txt") != vocabulary:
      raise InputError(
        f"{workdir}/vocab.txt differs from the data's vocabulary: the data "
        "have changed; use another --workdir"
      )
    if config.data.emotions != corpora.EMPATHETIC_DIALOGUES:
      # Parameters know a label by its index alone. The user's file of labels
      # may change, so that the run keeps its own copy.
      labels = workdir / EMOTIONS_FILE
      if not labels.exists():
        with storage.atomic_path(labels) as path:
          path.write_text(corpora.to_text(emotions), encoding="utf-8")
      elif corpora.read_labels(str(labels)) != emotions:
        raise InputError(
          f"{labels} differs from config.data.emotions: the labels have "
          "changed; use another --workdir"
        )
    # Last, since this file marks the folder as a run folder.
    with storage.atomic_path(workdir / "config.json") as path:
      path.write_text(config_lib.to_json(config), encoding="utf-8")


def check_same_config(workdir: pathlib.Path, config: Config) -> None:
  """Raises InputError if `workdir` holds a run with another configuration."""
  if not (workdir / "config.json").exists():
    if (workdir / "checkpoints").exists():
      raise InputError(
        f"--workdir={workdir} holds checkpoints but no config.json to say "
        "which run they belong to; use another --workdir"
      )
    return
  theirs = config_lib.flatten(read_config(workdir))
  ours = config_lib.flatten(config)
  different = [
    name
    for name in ours
    if ours[name] != theirs[name] and name not in _NOT_OF_THE_RUN
  ]
  if different:
    name = different[0]
    raise InputError(
      f"--workdir={workdir} holds a run with config.{name}={theirs[name]!r}, "
      f"not {ours[name]!r}"
      + (f" ({len(different)} fields differ)" if len(different) > 1 else "")
      + "; use another --workdir, or that run's configuration"
    )


def read_config(workdir: pathlib.Path) -> Config:
  """Reads a run folder's configuration.

  Raises:
    InputError: The folder is no run folder, or its configuration is malformed.
  """
  if is_export(workdir):
    raise InputError(
      f"--workdir={workdir} is an export, not a run folder; to use it, give it "
      f"as --bundle={workdir}"
    )
  path = workdir / "config.json"
  try:
    text = path.read_text(encoding="utf-8")
  except OSError as error:
    reason = error.strerror or error
    raise InputError(
      f"--workdir={workdir} is no run folder ({reason}: config.json); 'empdg "
      "train' makes one"
    ) from error
  return config_lib.from_json(text, str(path))


@dataclasses.dataclass(frozen=True)
class Run:
  """The contents of a run folder besides its checkpoints and logs."""

  workdir: pathlib.Path
  config: Config
  vocabulary: Vocabulary
  emotions: tuple[str, ...]


def open_run(workdir: pathlib.Path) -> Run:
  """Reads a run folder.

  Raises:
    InputError: The folder is no run folder, or a file in it is malformed.
  """
  config = read_config(workdir)
  labels = workdir / EMOTIONS_FILE
  emotions = corpora.read_labels(str(labels)) if labels.exists() else None
  return Run(
    workdir,
    config,
    vocab.load_vocabulary(workdir / "vocab.txt"),
    corpora.find_corpus(config.data, emotions).emotions,
  )


def check_same_generator(
  workdir: pathlib.Path,
  config: Config,
  vocabulary: Vocabulary,
  emotions: tuple[str, ...],
) -> None:
  """Checks that this run can take the generator of another run.

  Args:
    workdir: The other run's folder.
    config: This run's configuration.
    vocabulary: This run's vocabulary.
    emotions: This run's emotion labels.

  Raises:
    InputError: There is no such run, or its vocabulary, emotion labels or
      generator differ from this run's.
  """
  where = f"config.train.mle_checkpoint={str(workdir)!r}"
  run = open_run(workdir)
  if run.vocabulary != vocabulary:
    raise InputError(
      f"{where}: its vocabulary of {len(run.vocabulary):,} tokens is not this "
      f"run's of {len(vocabulary):,}; both need the same config.data"
    )
  if run.emotions != emotions:
    raise InputError(
      f"{where}: that run has other emotion labels; both need the same "
      "config.data.emotions"
    )
  theirs, ours = map(registry.find_system, (run.config.model, config.model))
  if theirs.generator is not ours.generator:
    raise InputError(
      f"{where}: that run has config.model.name={run.config.model.name!r}, "
      f"whose generator is not that of {config.model.name!r}"
    )
  for name in _GENERATOR_FIELDS:
    there, here = getattr(run.config.model, name), getattr(config.model, name)
    if there != here:
      raise InputError(
        f"{where}: that run has config.model.{name}={there!r}, this one "
        f"{here!r}"
      )
