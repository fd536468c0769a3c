"""The files that an evaluation writes: written, read and shown."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from empdg_jax import storage
from empdg_jax.config import InputError, SaveError
from empdg_jax.data import text, vocab


def print_metrics(values: dict[str, Any], console: Console) -> None:
  """Prints the content of a `metrics.json` as a table."""
  table = Table(title=f"{values['model']} on {values['split']}")
  table.add_column("metric")
  table.add_column("value", justify="right")
  for name, value in values.items():
    if name not in ("model", "split", "source"):
      form = "{:.4f}" if name == "emotion_accuracy" else "{:,.2f}"
      if not isinstance(value, float):
        form = "-" if value is None else "{:,}"
      table.add_row(name, form.format(value))
  console.print(table)


def of_other_emotions(lines: Sequence[dict[str, Any]], count: int) -> list[int]:
  """Returns at most `count` lines' indices, each of another emotion."""
  first: dict[str, int] = {}
  for index, line in enumerate(lines):
    first.setdefault(line["emotion"], index)
  stride = max(1, len(first) // max(1, count))  # Neighbours may be alike.
  return list(first.values())[::stride][:count]


def print_samples(path: pathlib.Path, count: int, console: Console) -> None:
  """Prints some replies of a `predictions.jsonl`, each to another emotion."""
  lines = read_predictions(path)
  for line in (lines[index] for index in of_other_emotions(lines, count)):
    user = text.join_tokens(line["context"][-1].split())
    reply = text.join_tokens(line["response"].split())
    perceived = line["predicted_emotion"]
    console.print(
      f"[bold]{line['emotion']}[/bold]"
      + (f" (perceived {perceived})" if perceived else "")
    )
    console.print(f"  user:  {user}", markup=False, highlight=False)
    console.print(f"  reply: {reply}", markup=False, highlight=False)


def vocab_size_of(path: pathlib.Path, lines: Sequence[dict[str, Any]]) -> int:
  """Returns V for predictions: of the run they lie in, else their own words.

  Args:
    path: The file; `RUN/eval/SPLIT/predictions.jsonl` lies in a run.
    lines: Its lines.

  Returns:
    The size of the run's vocabulary, or the number of distinct tokens.
  """
  folder = storage.absolute(path).parent.parent
  vocabulary = folder.parent / "vocab.txt"
  if folder.name == "eval" and vocabulary.is_file():
    return len(vocab.load_vocabulary(vocabulary))
  texts = [line["response"] for line in lines]
  texts += [line["reference"] for line in lines if "reference" in line]
  return max(2, len({token for line in texts for token in line.split()}))


def check_writable(folder: pathlib.Path) -> None:
  """Makes the folder, before there is anything to write to it.

  Raises:
    InputError: It cannot be written.
  """
  file = folder / ".writable"
  with storage.errors(f"{folder}: cannot write", InputError):
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text("")
    file.unlink()


def write_evaluation(
  folder: pathlib.Path,
  lines: Sequence[dict[str, Any]],
  values: dict[str, Any],
) -> None:
  """Writes `predictions.jsonl`, then `metrics.json`, each whole or not at all.

  Raises:
    SaveError: One could not be written.
  """
  with storage.errors(f"{folder}: cannot write", SaveError):
    with storage.atomic_path(folder / "predictions.jsonl") as path:
      path.write_text(
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines),
        encoding="utf-8",
      )
    with storage.atomic_path(folder / "metrics.json") as path:
      path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


_PREDICTION_TYPES = {
  "reference": str,
  "emotion": str,
  "predicted_emotion": str,
  "nll": int | float,
  "tokens": int,
}


def read_predictions(path: pathlib.Path) -> list[dict[str, Any]]:
  """Reads a `predictions.jsonl`.

  Raises:
    InputError: Naming the line that is no JSON object with a `response`.
  """
  what = f"--predictions={path}: cannot read"
  with storage.errors(what, InputError):
    rows = path.read_text(encoding="utf-8").splitlines()
  lines = []
  for number, row in enumerate(rows, start=1):
    try:
      line = json.loads(row)
    except ValueError as error:
      raise InputError(f"{path}:{number}: no JSON ({error})") from error
    if not isinstance(line, dict) or not isinstance(line.get("response"), str):
      raise InputError(f"{path}:{number}: expected an object with a 'response'")
    for name, kind in _PREDICTION_TYPES.items():
      value = line.get(name)
      wrong = value is not None and not isinstance(value, kind)
      if wrong or (name == "tokens" and value == 0):
        raise InputError(f"{path}:{number}: {name!r} cannot be {value!r}")
    lines.append(line)
  if not lines:
    raise InputError(f"{path}: holds no prediction")
  return lines
