"""The results of runs as files: what a repository or a paper keeps of them."""

import dataclasses
import functools
import hashlib
import json
import pathlib
from typing import Any

from empdg_jax import config as config_lib
from empdg_jax import metrics, storage
from empdg_jax.config import Config, InputError
from empdg_jax.data.corpora import SPLITS
from empdg_jax.training import record, run_folder

# What a run's record says of its training, None where it has none.
_RECORDED = ("commit", "compute_dtype", "updates", "hardware", "hours")
# Fields that do not make another system: the seed, paths, and what no update
# depends on.
_LEFT_OUT = (
  "data.data_dir",
  "train.seed",
  "train.mle_checkpoint",
  *run_folder.NOT_OF_THE_RUN,
)
_NAMES = ("", "official", "sample", "nrclex", "empathetic_dialogues")
_FILES = ("data.source", "data.emotions", "data.lexicon", "data.vectors")


@functools.lru_cache
def _sha256(name: str) -> str:
  """Returns the SHA-256 of a file, or of a folder's files; else the name."""
  if name in _NAMES:
    return name
  path = pathlib.Path(name)
  files = sorted(path.glob("*.csv")) if path.is_dir() else [path]
  digest = hashlib.sha256()
  for file in files:
    if not file.is_file():
      # A name such as "nrclex", or a file of another machine.
      return name
    with file.open("rb") as stream:
      while piece := stream.read(2**20):
        digest.update(piece)
  return digest.hexdigest()


def config_hash(config: Config) -> str:
  """Returns the hash that runs of one system share, whatever their seed.

  The SHA-256 of the configuration without the seed, paths of runs and fields on
  which no update depends, each data file replaced by its own SHA-256. A file
  that this machine lacks counts by its path.
  """
  values = config_lib.flatten(config)
  values["data.text_rules"] = config_lib.text_rules(config.data)
  for name in _FILES:
    values[name] = _sha256(values[name])
  kept = {n: v for n, v in values.items() if n not in _LEFT_OUT}
  return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def describe_run(
  folder: pathlib.Path, config: Config, split: str, values: dict[str, Any]
) -> dict[str, Any]:
  """Returns a run's entry in the results.

  Args:
    folder: The run folder or export.
    config: The run's configuration.
    split: The split that is compared.
    values: The run's metrics on it; those of other splits are read.

  Returns:
    The seed, the metrics of every split that was evaluated, the configuration's
    hash, and what `record.json` says of the training; no text of the data.

  Raises:
    InputError: A file of the run is damaged.
  """
  entry: dict[str, Any] = {"seed": config.train.seed}
  updates = None
  for name in SPLITS:
    read = storage.read_object(folder / "eval" / name / "metrics.json")
    if name == split:
      entry[name], updates = values, read.get("step")
    elif read:
      entry[name] = {n: read[n] for n in metrics.METRICS if n in read}
  recorded = storage.read_object(folder / record.RECORD)
  entry["config_hash"] = config_hash(config)
  entry |= {name: recorded.get(name) for name in _RECORDED}
  if entry["updates"] is None:
    entry["updates"] = updates
  return entry


def describe(comparison: Any) -> dict[str, Any]:
  """Returns the content of a results file.

  Args:
    comparison: The result of `compare.compare`.
  """
  systems = {}
  for row in comparison.rows:
    figures = {n: f for n, f in row.figures.items() if f is not None}
    systems[row.title] = {
      "name": row.name,
      "parameters": row.parameters,
      "seeds": list(row.seeds),
      "mean": {name: figure.value for name, figure in figures.items()},
      "std": {name: figure.deviation for name, figure in figures.items()},
      "interval": {n: [f.low, f.high] for n, f in figures.items()},
      "paper": {n: f.paper for n, f in figures.items() if f.paper is not None},
    }
  return {
    "protocol": comparison.protocol,
    "commit": record.program_commit(),
    "systems": systems,
    "tests": [dataclasses.asdict(test) for test in comparison.tests],
  }


def write(stem: pathlib.Path, values: dict[str, Any], table: str) -> None:
  """Writes `STEM.json` and `STEM.md`.

  Args:
    stem: The files' path without their endings.
    values: The result of `describe`.
    table: The tables for people, in Markdown.

  Raises:
    InputError: A file cannot be written.
  """
  with storage.errors(f"--results={stem}: cannot write", InputError):
    stem.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(values, indent=2) + "\n"
    storage.write_text(storage.with_ending(stem, "json"), text)
    storage.write_text(storage.with_ending(stem, "md"), table)
