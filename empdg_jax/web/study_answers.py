"""The study's folder: written once, then answers from any platform."""

import contextlib
import json
import pathlib
import secrets
import shutil
from collections import Counter
from collections.abc import Generator, Sequence
from typing import Any

from empdg_jax import storage
from empdg_jax.config import InputError, SaveError
from empdg_jax.web import study, study_platforms, study_potato
from empdg_jax.web.study import Study
from empdg_jax.web.study_potato import Answer

ANSWERS = "answers.jsonl"
# Platform ids are a person's; this file links them to the random tokens.
PEOPLE = "people.json"
PLATFORMS = ("potato", "mturk", "label_studio")


def _dumped(value: Any) -> str:
  return json.dumps(value, indent=1) + "\n"


def _files(content: Study) -> dict[str, str]:
  """Returns all files of a study folder by name."""
  files = {
    "study.json": _dumped(content.about),
    "items.json": _dumped(content.items),
    "orders.json": _dumped(content.orders),
    "key.json": _dumped(content.key),
  }
  for part in study.PARTS:
    for name, value in study_potato.files(content, part).items():
      files[f"{part}/{name}"] = _dumped(value)
    files[f"mturk/{part}.html"] = study_platforms.mturk_page(part)
    files[f"label_studio/{part}.xml"] = study_platforms.label_studio_page(part)
    # A file for each annotator, as each sees an order and sides of its own.
    for number, order in enumerate(content.orders[part], start=1):
      tasks = study_platforms.label_studio_tasks(content, order)
      files |= {
        f"mturk/{part}-{number}.csv": study_platforms.mturk_csv(content, order),
        f"label_studio/{part}-{number}.json": _dumped(tasks),
      }
  return files


@contextlib.contextmanager
def _temporary(folder: pathlib.Path) -> Generator[pathlib.Path]:
  """Yields a folder beside `folder` that is renamed to it in the end."""
  made = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
  try:
    yield made
    made.rename(folder)
  finally:
    shutil.rmtree(made, ignore_errors=True)


def write(content: Study, folder: pathlib.Path) -> None:
  """Writes a study folder, as a whole or not at all.

  Raises:
    InputError: The folder exists or cannot be written.
  """
  if folder.exists():
    raise InputError(f"--out={folder}: exists already; give a new folder")
  with (
    storage.errors(f"--out={folder}: cannot write", InputError),
    _temporary(storage.absolute(folder)) as made,
  ):
    for name, text in _files(content).items():
      storage.write_text(made / name, text)
    for private in ("key.json", *(f"{p}/links.json" for p in study.PARTS)):
      (made / private).chmod(0o600)


def _value(question: str, value: Any, where: str) -> Any:
  """Returns a checked answer.

  Raises:
    InputError: It is out of range.
  """
  if question == "choice":
    if value in study.CHOICES:
      return value
    wanted = ", ".join(study.CHOICES)
  else:
    if str(value).strip() in map(str, study.POINTS):
      return int(value)
    wanted = "1 to 5"
  raise InputError(f"{where}: {question} is {value!r:.60}; expected {wanted}")


def _checked(
  content: Study, found: Sequence[Answer], platform: str
) -> tuple[list[tuple[str, dict[str, Any]]], int]:
  """Checks answers item by item.

  Returns:
    The complete answers with the persons' ids, and the number of others.

  Raises:
    InputError: An item is unknown, an answer out of range or given twice.
  """
  complete, partial = [], 0
  seen: Counter[tuple[str, str]] = Counter()
  for person, item, answers, seconds, where in found:
    if item not in content.items:
      raise InputError(f"{where}: the item {item!r:.60} is not in this study")
    seen[person, item] += 1
    if seen[person, item] > 1:
      raise InputError(f"{where}: a second answer to the item {item}")
    part = content.items[item]["part"]
    asked = ("choice",) if part == "pairwise" else tuple(study.METRICS)
    given = {q: _value(q, answers[q], where) for q in asked if q in answers}
    if len(given) < len(asked):
      partial += 1
      continue
    line = {"item": item, "part": part, "answers": given, "seconds": seconds}
    complete.append((person, {**line, "platform": platform}))
  return complete, partial


def read(folder: pathlib.Path) -> list[dict[str, Any]]:
  """Reads a study's `answers.jsonl`; no answers if there is none.

  Raises:
    InputError: The file is damaged.
  """
  path = folder / ANSWERS
  if not path.exists():
    return []
  lines = []
  with storage.errors(f"{path}: damaged", InputError):
    for row in storage.read_text(path).splitlines():
      line = json.loads(row)
      if not {"item", "part", "answers", "annotator"} <= set(line):
        raise ValueError("a line lacks a field")
      lines.append(line)
  return lines


def read_platform(
  folder: pathlib.Path, platform: str, file: pathlib.Path | None
) -> list[Answer]:
  """Reads a platform's answers.

  Args:
    folder: The study folder, which has Potato's.
    platform: One of `PLATFORMS`.
    file: The export of another platform.

  Raises:
    InputError: They cannot be read.
  """
  if platform == "potato":
    if file:
      raise InputError(f"--file={file}: Potato's answers are in the folder")
    return [
      answer
      for part in study.PARTS
      for answer in study_potato.read_answers(folder / part)
    ]
  if not file:
    raise InputError(f"--file is missing; give the export of {platform}")
  if platform == "mturk":
    return study_platforms.read_mturk(file)
  return study_platforms.read_label_studio(file)


def add(
  content: Study,
  folder: pathlib.Path,
  found: Sequence[Answer],
  platform: str,
) -> tuple[int, int]:
  """Adds a platform's answers to `answers.jsonl`, under random tokens.

  Potato's answers replace those of an earlier import; those of other platforms
  are added.

  Returns:
    The number of answers added, and of incomplete ones left out.

  Raises:
    InputError: An answer is wrong; nothing is written.
    SaveError: A file could not be written.
  """
  complete, partial = _checked(content, found, platform)
  people: dict[str, str] = {}
  if (folder / PEOPLE).exists():
    with storage.errors(f"{folder / PEOPLE}: damaged", InputError):
      people = dict(json.loads(storage.read_text(folder / PEOPLE)))
  kept = [
    line
    for line in read(folder)
    if line.get("platform") != "potato" or platform != "potato"
  ]
  known = {(line["annotator"], line["item"]) for line in kept}
  for person, line in complete:
    name = f"{platform}:{person}"
    line["annotator"] = people.setdefault(name, f"a{secrets.token_hex(4)}")
    if (line["annotator"], line["item"]) in known:
      raise InputError(
        f"--file: the answer of {line['annotator']} to {line['item']} was "
        "imported before"
      )
    kept.append(line)
  # In the order of tokens and items, which says nothing of who came when.
  kept.sort(key=lambda line: (line["annotator"], line["item"]))
  with storage.errors(f"{folder}: cannot write", SaveError):
    storage.write_text(folder / PEOPLE, _dumped(people))
    (folder / PEOPLE).chmod(0o600)
    rows = [json.dumps(line) + "\n" for line in kept]
    storage.write_text(folder / ANSWERS, "".join(rows))
  return len(complete), partial
