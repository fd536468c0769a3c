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
NOT_OF_THE_RUN = (
  "train.steps_per_call",
  "train.validation_responses",
  "train.profile_steps",
  "train.keep_checkpoints",
  "train.lease_seconds",
  "train.stall_minutes",
  "train.heartbeat_seconds",
)

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
  "emotion_pooling",
)

EMOTIONS_FILE = "emotions.txt"
# Either marks a folder as an export, even one that was copied in part.
EXPORT_FILES = "export.json", "SHA256SUMS"


def is_export(folder: pathlib.Path) -> bool:
  """Returns whether a folder is an export rather than a run folder."""
  return any((folder / name).exists() for name in EXPORT_FILES)


@dataclasses.dataclass(frozen=True)
class Run:
  """The contents of a run folder besides its checkpoints and logs."""

  workdir: pathlib.Path
  config: Config
  vocabulary: Vocabulary
  emotions: tuple[str, ...]


def write_run(run: Run) -> None:
  """Starts a run folder, or checks that an existing one is of the same run.

  Raises:
    InputError: The folder cannot be written, or holds another run.
  """
  workdir, config = run.workdir, run.config
  check_same_config(workdir, config)
  with storage.errors(f"--workdir={workdir}: cannot write", InputError):
    workdir.mkdir(parents=True, exist_ok=True)
    kept = {"vocab.txt": ("the data", run.vocabulary.to_text())}
    if config.data.emotions != corpora.EMPATHETIC_DIALOGUES:
      # Parameters know a label by its index alone. The user's file of labels
      # may change, so that the run keeps its own copy.
      labels = corpora.to_text(run.emotions)
      kept[EMOTIONS_FILE] = "config.data.emotions", labels
    for name, (source, text) in kept.items():
      path = workdir / name
      if not path.exists():
        storage.write_text(path, text)
      elif path.read_bytes() != text.encode():
        raise InputError(
          f"{path} differs from {source}, which must have changed; use another "
          "--workdir"
        )
    # Last, since this file marks the folder as a run folder.
    storage.write_text(workdir / "config.json", config_lib.to_json(config))


def check_same_config(workdir: pathlib.Path, config: Config) -> None:
  """Raises InputError if `workdir` holds a run with another configuration."""
  if not (workdir / "config.json").exists():
    if (workdir / "checkpoints").exists():
      raise InputError(
        f"--workdir={workdir} holds checkpoints but no config.json to say "
        "which run they belong to; use another --workdir"
      )
    return
  theirs, ours = (
    config_lib.flatten(with_text_rules(one, workdir))
    for one in (read_config(workdir), config)
  )
  different = [
    name
    for name in ours
    if ours[name] != theirs[name] and name not in NOT_OF_THE_RUN
  ]
  if different:
    name = different[0]
    raise InputError(
      f"--workdir={workdir} holds a run with config.{name}={theirs[name]!r}, "
      f"not {ours[name]!r}"
      + (f" ({len(different)} fields differ)" if len(different) > 1 else "")
      + "; use another --workdir, or that run's configuration"
    )


def with_text_rules(config: Config, workdir: pathlib.Path) -> Config:
  """Returns a configuration that names its version of the rules of text.

  Args:
    config: The configuration of a training.
    workdir: Its folder. The version is that of the run that it holds, if any.

  Raises:
    InputError: The folder holds a malformed configuration.
  """
  rules = config.data.text_rules
  if not rules:
    rules = config_lib.TEXT_RULES
    if (workdir / "config.json").exists():
      rules = config_lib.text_rules(read_config(workdir).data)
  data = dataclasses.replace(config.data, text_rules=rules)
  return dataclasses.replace(config, data=data)


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
  what = f"--workdir={workdir} is no run folder; 'empdg train' makes one"
  with storage.errors(what, InputError):
    text = storage.read_text(path)
  return config_lib.from_json(text, str(path))


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


def check_same_generator(run: Run, workdir: pathlib.Path) -> None:
  """Checks that a run can take the generator of another run.

  Args:
    run: The run.
    workdir: The other run's folder.

  Raises:
    InputError: There is no such run, or its vocabulary, emotion labels or
      generator differ from this run's.
  """
  where = f"config.train.mle_checkpoint={str(workdir)!r}"
  other = open_run(workdir)
  rules = [config_lib.text_rules(r.config.data) for r in (other, run)]
  if rules[0] != rules[1]:
    raise InputError(
      f"{where}: that run reads text by version {rules[0]} of the rules, this "
      f"one by version {rules[1]}; both need the same config.data.text_rules"
    )
  if other.vocabulary != run.vocabulary:
    raise InputError(
      f"{where}: its vocabulary of {len(other.vocabulary):,} tokens is not "
      f"this run's of {len(run.vocabulary):,}; both need the same config.data"
    )
  if other.emotions != run.emotions:
    raise InputError(
      f"{where}: that run has other emotion labels; both need the same "
      "config.data.emotions"
    )
  theirs, ours = other.config.model, run.config.model
  systems = registry.find_system(theirs), registry.find_system(ours)
  if systems[0].generator is not systems[1].generator:
    raise InputError(
      f"{where}: that run has config.model.name={theirs.name!r}, whose "
      f"generator is not that of {ours.name!r}"
    )
  for name in _GENERATOR_FIELDS:
    there, here = getattr(theirs, name), getattr(ours, name)
    if there != here:
      raise InputError(
        f"{where}: that run has config.model.{name}={there!r}, this one "
        f"{here!r}"
      )
