"""Pictures of training courses and of confused emotions."""

import json
import pathlib

import numpy as np
import pytest
from helpers import refused
from invented import make_lines, make_run

from empdg_jax import main, metrics
from empdg_jax.analysis import pictures


def _write_course(folder: pathlib.Path, phase: str) -> pathlib.Path:
  """Writes three validations, of which the second decoded nothing."""
  folder.mkdir()
  entries = [
    {"step": step, "phase": phase, "name": name, "value": value}
    for step, ppl, distinct in (
      (10, 40.0, 3.0),
      (20, 35.0, None),
      (30, 31.0, 5.0),
    )
    for name, value in (
      ("valid/perplexity_per_example", ppl),
      ("valid/distinct_2", distinct),
    )
    if value is not None
  ]
  (folder / "metrics.jsonl").write_text(
    "".join(json.dumps(entry) + "\n" for entry in entries)
  )
  return folder


def test_a_course_has_the_validations_with_both_figures(
  tmp_path: pathlib.Path,
) -> None:
  course = pictures.read_course(_write_course(tmp_path / "a", "adversarial"))

  assert course == pictures.Course(
    "a", [10, 30], [40.0, 31.0], [3.0, 5.0], [True, True]
  )
  (panel,) = pictures.training_figure([course]).axes
  line, hollow = panel.get_lines()
  np.testing.assert_array_equal(line.get_xydata(), [[40, 3], [31, 5]])
  np.testing.assert_array_equal(hollow.get_xydata(), [[40, 3], [31, 5]])
  course = pictures.read_course(_write_course(tmp_path / "b", "mle"))
  assert course.adversarial == [False, False]


def test_confusions_are_shares_of_the_gold_emotion() -> None:
  counts = {"proud": {"proud": 3, "sad": 1}, "sad": {"proud": 2}}

  panel, _ = pictures.confusion_figure(counts).axes

  np.testing.assert_array_equal(
    panel.images[0].get_array(), [[0.75, 0.25], [1, 0]]
  )
  assert [t.get_text() for t in panel.get_yticklabels()] == ["proud", "sad"]
  lines = make_lines(1)
  total = sum(sum(row.values()) for row in metrics.confusion(lines).values())
  assert total == len(lines)


def test_plot_draws_both(tmp_path: pathlib.Path) -> None:
  folder = _write_course(tmp_path / "a", "mle")
  run = make_run(tmp_path / "run", "moel", 1)
  predictions = run / "eval" / "test" / "predictions.jsonl"
  image = tmp_path / "new" / "x.y"

  assert main.main(["plot", str(folder), f"--image={image}"]) == 0
  argv = ["plot", f"--predictions={predictions}", f"--image={tmp_path}/c"]
  assert main.main(argv) == 0

  drawn = ("new/x.y.png", "new/x.y.svg", "c.png", "c.svg")
  assert all((tmp_path / name).stat().st_size > 1_000 for name in drawn)


def test_what_cannot_be_drawn(
  tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  image = f"--image={tmp_path}/x"
  assert "--image is missing" in refused(capsys, "plot", str(tmp_path))
  assert "give either run folders" in refused(capsys, "plot", image)
  said = refused(capsys, "plot", str(tmp_path), image)
  assert "no validation has both" in said
  log = tmp_path / "metrics.jsonl"
  log.write_text("[1]\n")  # Lines that are no entries are left out.
  assert "no validation has both" in refused(
    capsys, "plot", str(tmp_path), image
  )
  log.unlink()
  log.mkdir()
  said = refused(capsys, "plot", str(tmp_path), image)
  assert "metrics.jsonl: is no regular file" in said
  path = tmp_path / "p.jsonl"
  path.write_text('{"response": "a", "emotion": "sad"}\n')
  said = refused(capsys, "plot", f"--predictions={path}", image)
  assert "no 'predicted_emotion'" in said
  assert not list(tmp_path.glob("x*"))
