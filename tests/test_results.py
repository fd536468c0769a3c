"""The results in the repository, and what the README shows of them."""

import json
import pathlib

from empdg_jax.analysis import tables

ROOT = pathlib.Path(__file__).parents[1]


def test_the_readme_shows_the_results() -> None:
  values = json.loads((ROOT / "results" / "paper.json").read_text())
  summary = tables.summary(values)
  assert summary in (ROOT / "README.md").read_text()
  assert (ROOT / "results" / "paper.md").read_text().startswith(summary)


def test_every_run_says_where_it_comes_from() -> None:
  values = json.loads((ROOT / "results" / "paper.json").read_text())
  assert len(values["systems"]) == 7
  for system in values["systems"].values():
    for seed in system["seeds"]:
      # A commit alone: nothing was changed beside it, or resumed with another.
      assert len(seed["commit"]) == 40
      assert "core" in seed["hardware"]
      assert seed["hours"] > 0
      assert seed["compute_dtype"] == "bfloat16"
      assert {"valid", "test"} <= seed.keys()


def test_the_readme_shows_the_figures_beside_later_papers() -> None:
  values = json.loads((ROOT / "results" / "all_turns.json").read_text())
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
