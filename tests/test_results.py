"""The results in the repository, and what the README shows of them."""

import json
import pathlib
from typing import Any

import pytest

from empdg_jax.analysis import tables

ROOT = pathlib.Path(__file__).parents[1]


def _results(name: str) -> dict[str, Any]:
  values: dict[str, Any] = json.loads(
    (ROOT / "results" / f"{name}.json").read_text()
  )
  return values


def test_the_readme_shows_the_results() -> None:
  values = _results("paper")
  summary = tables.summary(values)
  assert summary in (ROOT / "README.md").read_text()
  assert (ROOT / "results" / "paper.md").read_text().startswith(summary)


@pytest.mark.parametrize(("name", "systems"), [("paper", 7), ("all_turns", 2)])
def test_every_run_says_where_it_comes_from(name: str, systems: int) -> None:
  values = _results(name)
  assert len(values["systems"]) == systems
  for system in values["systems"].values():
    for seed in system["seeds"]:
      # A commit alone: nothing was changed beside it, or resumed with another.
      assert len(seed["commit"]) == 40
      assert "core" in seed["hardware"]
      assert seed["hours"] > 0
      assert seed["compute_dtype"] == "bfloat16"
      assert {"valid", "test"} <= seed.keys()


def test_the_readme_shows_the_figures_beside_later_papers() -> None:
  values = _results("all_turns")
  readme = (ROOT / "README.md").read_text()
  assert list(values["systems"]) == ["EmpDG", "EmpDG w/o D"]
  for title, system in values["systems"].items():
    mean = system["mean"]
    assert (
      f"| {title}, ours | {mean['perplexity_per_example']:.2f} "
      f"| {mean['distinct_1']:.2f} | {mean['distinct_2']:.2f} "
      f"| {mean['emotion_accuracy']:.3f} |"
    ) in readme
    assert system["paper"] == {}
