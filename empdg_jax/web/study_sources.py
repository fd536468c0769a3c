"""Systems' responses for a study: evaluated runs, exports and plain files."""

import json
import pathlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

from empdg_jax import storage
from empdg_jax.config import InputError
from empdg_jax.inference import export_files, predictions
from empdg_jax.models import registry
from empdg_jax.training import run_folder
from empdg_jax.web.study import Source


def _lines(path: pathlib.Path) -> dict[str, dict[str, Any]]:
  """Returns a file's lines by id.

  Raises:
    InputError: A line has no context or an id of its own.
  """
  lines: dict[str, dict[str, Any]] = {}
  read = predictions.read_predictions(path)
  for number, line in enumerate(read, start=1):
    for name in ("id", "context"):
      if name not in line:
        raise InputError(f"{path}:{number}: no {name!r}, which a study needs")
    if str(line["id"]) in lines:
      raise InputError(f"{path}:{number}: the id {line['id']!r} occurs twice")
    lines[str(line["id"])] = line
  return lines


def _read(path: pathlib.Path, split: str) -> Source:
  """Reads one system's responses."""
  if path.suffix == ".jsonl":
    return Source(path.stem, str(storage.absolute(path)), _lines(path))
  if run_folder.is_export(path):
    config = export_files.read_config(path)
  else:
    config = run_folder.read_config(path)
  evaluation = path / "eval" / split
  with storage.errors(
    f"{path} has no evaluation of {split}; run 'empdg evaluate' first",
    InputError,
  ):
    found = json.loads(storage.read_text(evaluation / "metrics.json"))["split"]
  if found != split:
    raise InputError(f"{evaluation} holds an evaluation of {found!r}")
  title = registry.find_system(config.model).title
  where = str(storage.absolute(path))
  return Source(title, where, _lines(evaluation / "predictions.jsonl"))


def read(paths: Sequence[pathlib.Path], split: str) -> list[Source]:
  """Reads the systems' responses.

  Args:
    paths: Run folders and exports with an evaluation, or `*.jsonl` files in the
      format of `predictions.jsonl`, named like their system.
    split: The split of the runs.

  Raises:
    InputError: Something is missing or malformed.
  """
  sources = [_read(path, split) for path in paths]
  counts = Counter(source.name for source in sources)
  return [
    Source(f"{s.name} ({path.name})", s.where, s.lines)
    if counts[s.name] > 1
    else s
    for path, s in zip(paths, sources, strict=True)
  ]
