"""Invented studies: systems' responses, and answers as Potato stores them."""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from empdg_jax.web import study
from empdg_jax.web.study import Plan, Source, Study

EMOTIONS = ("sad", "proud", "afraid")
SYSTEMS = ("EmpDG", "MoEL", "Transformer")


def lines_of(
  system: str, dialogues: int, turns: int = 2
) -> list[dict[str, Any]]:
  """Predictions with a text of their own for each system and example."""
  return [
    {
      "id": f"conversation:{dialogue}:{2 * turn + 1}",
      "emotion": EMOTIONS[dialogue % len(EMOTIONS)],
      "context": [f"dialogue {dialogue} , turn {turn} ."],
      "reference": f"gold {dialogue} {turn} .",
      "response": f"{system.lower()} {dialogue} {turn} .",
    }
    for dialogue in range(dialogues)
    for turn in range(turns)
  ]


def sources(
  dialogues: int = 12, systems: tuple[str, ...] = SYSTEMS, turns: int = 2
) -> list[Source]:
  """Systems that responded to the same examples."""
  return [
    Source(
      name,
      f"/runs/{name}",
      {line["id"]: line for line in lines_of(name, dialogues, turns)},
    )
    for name in systems
  ]


def small(**fields: Any) -> Study:
  """A study of three systems and six dialogues."""
  plan = Plan(**{"dialogues": 6, "controls": 0.2, **fields})
  return study.build(sources(), plan)


def write_jsonl(
  path: pathlib.Path, lines: list[dict[str, Any]]
) -> pathlib.Path:
  """Writes one JSON object a line."""
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return path


def potato_state(
  person: str, answers: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
  """The state of an annotator in the layout that Potato 2.12 writes."""
  return {
    "user_id": person,
    "instance_id_ordering": list(answers),
    "instance_id_to_label_to_value": {
      item: [
        [{"schema": schema, "name": str(value)}, str(value)]
        for schema, value in own.items()
      ]
      for item, own in answers.items()
    },
  }


def answer_in_potato(
  content: Study,
  folder: pathlib.Path,
  answer: Callable[[int, str], Mapping[str, Any]],
) -> None:
  """Answers every item of every order, as one annotator for each order."""
  for part, orders in content.orders.items():
    for number, order in enumerate(orders):
      person = f"PID-{number}"
      state = potato_state(person, {i: answer(number, i) for i in order})
      path = folder / part / "answers" / person / "user_state.json"
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(json.dumps(state))


def planted(
  content: Study, quality: Mapping[str, float], seed: int
) -> Callable[[int, str], dict[str, Any]]:
  """Annotators who rate by the systems' quality, with noise and bias.

  Returns:
    The answer of an annotator, by number, to an item.
  """
  rng = np.random.default_rng(seed)
  bias = (-0.2, 0.0, 0.2)
  # Some dialogues are harder than others, for all annotators.
  hardness: dict[tuple[str, str], float] = {}

  def felt(example: str, name: str) -> float:
    own = hardness.setdefault((example, name), float(rng.normal(0, 0.4)))
    return quality[name] + own

  def answer(annotator: int, item: str) -> dict[str, Any]:
    key = content.key["items"][item]
    example = key["example"]
    if content.items[item]["part"] == "rating":
      name = key["systems"][0] if "systems" in key else key["control"]
      draws = felt(example, name) + bias[annotator] + rng.normal(0, 0.5, 3)
      points = np.clip(np.rint(draws), 1, 5).astype(int).tolist()
      return dict(zip(study.METRICS, points, strict=True))
    one, two = key.get("systems", ("gold", "shuffled"))
    better = felt(example, one) - felt(example, two) + rng.normal(0, 0.5)
    if abs(better) < 0.3:
      return {"choice": "tie"}
    other = "right" if key["first"] == "left" else "left"
    return {"choice": key["first"] if better > 0 else other}

  return answer
