"""Files of the study for Amazon Mechanical Turk and Label Studio, and back."""

import csv
import html
import io
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from empdg_jax import storage
from empdg_jax.config import InputError
from empdg_jax.web import study, study_pages
from empdg_jax.web.study import Study
from empdg_jax.web.study_potato import Answer

# Spreadsheets run a cell that begins like this as a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def cell(said: str) -> str:
  """Returns a text as a cell that no spreadsheet takes for a formula.

  >>> cell("=1+1"), cell("fine")
  ("'=1+1", 'fine')
  """
  return f"'{said}" if said.lstrip().startswith(_FORMULA) else said


def _questions(part: str) -> dict[str, tuple[str, list[str]]]:
  """Returns each question's words and values."""
  if part == "pairwise":
    return {"choice": (study_pages.question(part), list(study.CHOICES))}
  return {
    name: (f"{name.title()}: {what}", [str(point) for point in study.POINTS])
    for name, what in study.METRICS.items()
  }


def mturk_csv(content: Study, order: Sequence[str]) -> str:
  """Returns an annotator's order as MTurk's input: an item a line, as HTML."""
  file = io.StringIO()
  writer = csv.writer(file, lineterminator="\n")
  writer.writerow(("item", "text"))
  for name in order:
    writer.writerow((name, cell(study_pages.item(content.items[name]))))
  return file.getvalue()


def mturk_page(part: str) -> str:
  """Returns the page of a part for MTurk, whose inputs `read_mturk` knows."""
  rows = []
  for name, (asked, values) in _questions(part).items():
    options = "".join(
      f'<label><input type="radio" name="{name}" value="{value}" required> '
      f"{study_pages.anchored(int(value)) if part == 'rating' else value}"
      "</label> "
      for value in values
    )
    rows.append(f"<p>{html.escape(asked)}<br>{options}</p>")
  return (
    '<!DOCTYPE html>\n<html lang="en"><meta charset="utf-8">\n'
    '<script src="https://assets.crowd.aws/crowd-html-elements.js"></script>\n'
    f"<crowd-form><p>{html.escape(study_pages.CONSENT)}</p>\n"
    f"<details><summary>How to answer</summary>{study_pages.instructions(part)}"
    f"</details>\n${{text}}\n{''.join(rows)}\n"
    "<crowd-button>Submit</crowd-button></crowd-form></html>\n"
  )


def label_studio_tasks(
  content: Study, order: Sequence[str]
) -> list[dict[str, Any]]:
  """Returns an annotator's order as tasks for Label Studio."""
  return [
    {"data": {"item": name, "text": study_pages.item(content.items[name])}}
    for name in order
  ]


def label_studio_page(part: str) -> str:
  """Returns the labelling interface of a part for Label Studio."""
  rows = []
  for name, (asked, values) in _questions(part).items():
    choices = "".join(f'<Choice value="{value}"/>' for value in values)
    rows.append(
      f'  <Header value="{html.escape(asked)}"/>\n  <Choices name="{name}" '
      f'toName="text" choice="single" showInline="true" required="true">'
      f"{choices}</Choices>\n"
    )
  return (
    '<View>\n  <HyperText name="text" value="$text"/>\n'
    f"{''.join(rows)}</View>\n"
  )


def read_mturk(path: pathlib.Path) -> list[Answer]:
  """Reads the results that MTurk exports as CSV.

  Raises:
    InputError: The file is no such export.
  """
  with storage.errors(f"--file={path}: cannot read", InputError):
    rows = list(csv.DictReader(io.StringIO(storage.read_text(path), "")))
  needed = ("WorkerId", "Input.item")
  if not rows or any(name not in rows[0] for name in needed):
    raise InputError(
      f"--file={path}: expected MTurk's results with the columns WorkerId and "
      "Input.item"
    )
  found = []
  for number, row in enumerate(rows, start=2):
    # Rejected work is no answer.
    if row.get("AssignmentStatus") == "Rejected":
      continue
    answers = {
      key.removeprefix("Answer."): value
      for key, value in row.items()
      if key and key.startswith("Answer.") and value
    }
    try:
      seconds = float(row.get("WorkTimeInSeconds") or "")
    except ValueError:
      seconds = None
    where = f"{path}: line {number}"
    person, item = row["WorkerId"] or "", row["Input.item"] or ""
    found.append(Answer(person, item, answers, seconds, where))
  return found


def _chosen(annotation: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the values of a Label Studio annotation by question."""
  answers: dict[str, Any] = {}
  for result in annotation["result"]:
    value = result["value"]
    (answers[result["from_name"]],) = value.get("choices") or (
      value.get("rating"),
    )
  return answers


def read_label_studio(path: pathlib.Path) -> list[Answer]:
  """Reads the annotations that Label Studio exports as JSON.

  Raises:
    InputError: The file is no such export.
  """
  found = []
  with storage.errors(f"--file={path}: not Label Studio's JSON", InputError):
    for number, task in enumerate(json.loads(storage.read_text(path)), start=1):
      for annotation in task["annotations"]:
        if annotation.get("was_cancelled"):
          continue
        by = annotation.get("completed_by")
        person = by.get("email") or by.get("id") if isinstance(by, dict) else by
        if person is None:
          raise InputError(f"{path}: task {number}: no 'completed_by'")
        found.append(
          Answer(
            str(person),
            str(task["data"]["item"]),
            _chosen(annotation),
            annotation.get("lead_time"),
            f"{path}: task {number}",
          )
        )
  return found
