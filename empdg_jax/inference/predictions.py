"""Readers, writers and printers of the files of an evaluation."""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console

from empdg_jax import metrics, storage
from empdg_jax.config import InputError, SaveError
from empdg_jax.data import text, vocab
from empdg_jax.training import terminal


def print_metrics(values: dict[str, Any], console: Console) -> None:
  """Prints the content of a `metrics.json` as a table."""
  rows = [
    (name, metrics.shown(name, value))
    for name, value in values.items()
    if name not in ("model", "split", "source")
  ]
  title = f"{values['model']} on {values['split']}"
  header = "metric", "value"
  console.print(terminal.table(header, rows, title=title, left=["metric"]))


def of_other_emotions(lines: Sequence[dict[str, Any]], count: int) -> list[int]:
  """Returns the indices of at most `count` lines of different emotions."""
  first: dict[str, int] = {}
  for index, line in enumerate(lines):
    first.setdefault(line["emotion"], index)
  # Neighbours in a split may come from similar dialogues, so take every nth.
  stride = max(1, len(first) // max(1, count))
  return list(first.values())[::stride][:count]


def print_samples(path: pathlib.Path, count: int, console: Console) -> None:
  """Prints some responses of a `predictions.jsonl`, to different emotions."""
  lines = read_predictions(path)
  for line in (lines[index] for index in of_other_emotions(lines, count)):
    user = text.join_tokens(line["context"][-1].split())
    reply = text.join_tokens(line["response"].split())
    perceived = line["predicted_emotion"]
    console.print(
      terminal.text(line["emotion"], "bold"),
      terminal.text(f"(perceived {perceived})" if perceived else ""),
    )
    terminal.say(f"  user:  {user}", console)
    terminal.say(f"  reply: {reply}", console)


def vocab_size_of(path: pathlib.Path, lines: Sequence[dict[str, Any]]) -> int:
  """Returns the vocabulary size for predictions.

  Args:
    path: The path of the file. `RUN/eval/SPLIT/predictions.jsonl` belongs to a
      run.
    lines: Its lines.

  Returns:
    The size of the run's vocabulary or, outside a run, the number of distinct
    tokens in the file.
  """
  folder = storage.absolute(path).parent.parent
  vocabulary = folder.parent / "vocab.txt"
  if folder.name == "eval" and vocabulary.is_file():
    return len(vocab.load_vocabulary(vocabulary))
  texts = [line["response"] for line in lines]
  texts += [line["reference"] for line in lines if "reference" in line]
  # EAD takes the logarithm of 1 - 1 / V.
  return max(2, len({token for line in texts for token in line.split()}))


def check_writable(folder: pathlib.Path) -> None:
  """Creates the folder, and checks that files can be written there.

  Raises:
    InputError: No file can be written.
  """
  # Permissions alone do not tell: the disk may be full or mounted read-only.
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
  """Writes `predictions.jsonl`, then `metrics.json`, each atomically.

  Raises:
    SaveError: A file could not be written.
  """
  with storage.errors(f"{folder}: cannot write", SaveError):
    storage.write_text(
      folder / "predictions.jsonl",
      "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines),
    )
    storage.write_text(
      folder / "metrics.json", json.dumps(values, indent=2) + "\n"
    )


def _is_text(value: Any) -> bool:
  return isinstance(value, str)


# What the fields of a prediction may be. No number has 400 digits or is NaN,
# both of which JSON can spell; perplexity divides by the number of tokens.
_PREDICTION_FIELDS: dict[str, Callable[[Any], bool]] = {
  "id": lambda value: isinstance(value, str | int),
  "context": lambda turns: (
    isinstance(turns, list) and all(map(_is_text, turns))
  ),
  "response": _is_text,
  "reference": _is_text,
  "emotion": _is_text,
  "predicted_emotion": lambda value: value is None or _is_text(value),
  "likeliest_emotions": lambda labels: (
    labels is None or (isinstance(labels, list) and all(map(_is_text, labels)))
  ),
  "nll": lambda value: type(value) in (int, float) and abs(value) < 1e9,
  "tokens": lambda value: type(value) is int and 0 < value < 2**31,
}


def read_predictions(path: pathlib.Path) -> list[dict[str, Any]]:
  """Reads a `predictions.jsonl`.

  Raises:
    InputError: The file cannot be read or is empty, or a line is no valid
      prediction; the message gives its number.
  """
  what = f"--predictions={path}: cannot read"
  with storage.errors(what, InputError):
    rows = storage.read_text(path).splitlines()
  lines = []
  for number, row in enumerate(rows, start=1):
    with storage.errors(f"{path}:{number}: no JSON", InputError):
      line = json.loads(row)
    if not isinstance(line, dict) or "response" not in line:
      raise InputError(f"{path}:{number}: expected an object with a 'response'")
    for name, fits in _PREDICTION_FIELDS.items():
      if name in line and not fits(line[name]):
        raise InputError(
          f"{path}:{number}: {name!r} cannot be {repr(line[name])[:60]}"
        )
    # Beyond this loss for each token, a perplexity exceeds every double.
    if abs(line.get("nll", 0)) > 700 * line.get("tokens", 2**31):
      raise InputError(
        f"{path}:{number}: 'nll' cannot be {line['nll']!r}: more than 700 for "
        "each token"
      )
    lines.append(line)
  if not lines:
    raise InputError(f"{path}: holds no prediction")
  return lines
