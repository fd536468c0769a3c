"""Pictures of training and of the perceived emotions, and their files."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from empdg_jax import metrics, storage
from empdg_jax.config import InputError
from empdg_jax.training.metric_writer import read_metrics
from empdg_jax.training.phases import ADVERSARIAL

_X, _Y = "valid/perplexity_per_example", "valid/distinct_2"


class Course(NamedTuple):
  """A run's validations.

  Attributes:
    label: The run's name in the legend.
    steps: The updates before each validation.
    perplexity: The perplexity per example.
    distinct: Distinct-2 of the responses.
    adversarial: Whether a validation is of phase 3.
  """

  label: str
  steps: list[int]
  perplexity: list[float]
  distinct: list[float]
  adversarial: list[bool]


def read_course(workdir: pathlib.Path) -> Course:
  """Reads the validations of a run that have both figures.

  Raises:
    InputError: No validation has both.
  """
  found: dict[tuple[int, str], dict[str, float]] = {}
  path = workdir / "metrics.jsonl"
  for entry in read_metrics(path):
    place = entry["step"], str(entry.get("phase"))
    found.setdefault(place, {})[entry["name"]] = float(entry["value"])
  whole = {p: v for p, v in sorted(found.items()) if {_X, _Y} <= v.keys()}
  if not whole:
    raise InputError(
      f"{path}: no validation has both {_X} and {_Y}; nothing to draw"
    )
  return Course(
    workdir.name,
    [step for step, _ in whole],
    [values[_X] for values in whole.values()],
    [values[_Y] for values in whole.values()],
    [phase == ADVERSARIAL for _, phase in whole],
  )


def training_figure(courses: Sequence[Course]) -> Figure:
  """Draws perplexity against Distinct-2 through training, a line a run."""
  figure = Figure(figsize=(7, 5), layout="constrained")
  panel = figure.subplots()
  for course in courses:
    (line,) = panel.plot(
      course.perplexity, course.distinct, marker=".", label=course.label
    )
    # Hollow markers: validations of adversarial training.
    players = [i for i, is_theirs in enumerate(course.adversarial) if is_theirs]
    panel.plot(
      [course.perplexity[i] for i in players],
      [course.distinct[i] for i in players],
      "o",
      color=line.get_color(),
      fillstyle="none",
    )
    panel.annotate(
      f"{course.steps[-1]:,}",
      (course.perplexity[-1], course.distinct[-1]),
      fontsize="x-small",
    )
  panel.set_xlabel("perplexity per example (valid)")
  panel.set_ylabel("Distinct-2 (valid)")
  panel.legend(fontsize="small")
  return figure


def confusion_figure(counts: Mapping[str, Mapping[str, int]]) -> Figure:
  """Draws how often each gold emotion is perceived as which.

  Args:
    counts: The result of `metrics.confusion`.
  """
  labels = sorted({*counts, *(p for row in counts.values() for p in row)})
  table = np.array(
    [[counts.get(gold, {}).get(p, 0) for p in labels] for gold in labels], float
  )
  # Rows sum to 1, so that frequent emotions do not outshine the others.
  table /= np.maximum(table.sum(axis=1, keepdims=True), 1)
  side = 2.5 + 0.22 * len(labels)
  figure = Figure(figsize=(side + 0.8, side), layout="constrained")
  panel = figure.subplots()
  image = panel.imshow(table, vmin=0.0, vmax=1.0, cmap="Blues")
  panel.set_xticks(range(len(labels)), labels, rotation=90, fontsize="small")
  panel.set_yticks(range(len(labels)), labels, fontsize="small")
  panel.set_xlabel("perceived emotion")
  panel.set_ylabel("gold emotion")
  figure.colorbar(image, ax=panel, label="share of the gold emotion's examples")
  return figure


def confusion_of(lines: Sequence[Mapping[str, Any]], where: str) -> Figure:
  """Draws the confusion matrix of predictions.

  Raises:
    InputError: They lack emotions.
  """
  for line in lines:
    for name in ("emotion", "predicted_emotion"):
      if line.get(name) is None:
        raise InputError(
          f"{where}: no {name!r}; the system perceives none, or 'empdg "
          "evaluate' has not written the file"
        )
  return confusion_figure(metrics.confusion(lines))


def save(figure: Figure, stem: pathlib.Path) -> list[pathlib.Path]:
  """Writes a figure as `STEM.png` and `STEM.svg`.

  Returns:
    The two paths.

  Raises:
    InputError: The pictures cannot be written.
  """
  paths = [storage.with_ending(stem, kind) for kind in ("png", "svg")]
  with storage.errors(f"--image={stem}: cannot write", InputError):
    stem.parent.mkdir(parents=True, exist_ok=True)
    for path in paths:
      with storage.atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=150)
  return paths
