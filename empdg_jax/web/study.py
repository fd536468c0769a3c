"""The protocol of the human evaluation: sampling, blinding and balance.

A study is the paper's (section 5.2): dialogues with the responses of several
systems, which annotators rate for empathy, relevance and fluency, and pairs of
responses, of which they choose the better. The systems' names are in
`key.json` alone.
"""

import dataclasses
import json
import pathlib
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from empdg_jax import storage
from empdg_jax.config import InputError
from empdg_jax.data import text

MAX_ANNOTATORS = 1000  # Each has orders of all items.
VERSION = 1
PARTS = ("rating", "pairwise")
CHOICES = ("left", "right", "tie")
# What each metric asks, in the paper's words (section 5.2).
METRICS = {
  "empathy": "Does the reply show an understanding of the speaker's feelings?",
  "relevance": "Is the reply on topic with the conversation?",
  "fluency": "Is the reply grammatical and easy to read?",
}
# The paper's anchors of the scale of 1 to 5.
ANCHORS = {1: "unacceptable", 3: "moderate", 5: "excellent"}
POINTS = (1, 2, 3, 4, 5)


@dataclasses.dataclass(frozen=True)
class Source:
  """A system's responses.

  Attributes:
    name: The system's name in reports.
    where: The run folder, export or file that they come from.
    lines: By example id, the line of a `predictions.jsonl`.
  """

  name: str
  where: str
  lines: Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Plan:
  """The size of a study.

  Attributes:
    dialogues: Dialogues to sample.
    annotators: Annotators, each of whom sees every dialogue.
    controls: Share of the items that are control items.
    seed: The seed of the sample and of all orders.
    split: The split that the dialogues come from, for the record.
  """

  dialogues: int = 100
  annotators: int = 3
  controls: float = 0.1
  seed: int = 0
  split: str = "test"


@dataclasses.dataclass(frozen=True)
class Study:
  """A study folder's content.

  Attributes:
    about: Its `study.json`: version, plan and counts.
    items: What annotators see, by item id: part, context and texts.
    orders: The item ids of each annotator in order, by part.
    key: Its `key.json`: which systems are behind each item.
  """

  about: dict[str, Any]
  items: dict[str, dict[str, Any]]
  orders: dict[str, list[list[str]]]
  key: dict[str, Any]


def dialogue_of(example: str) -> str:
  """Returns the dialogue of an example id, `conversation:DIALOGUE:TURN`.

  >>> dialogue_of("conversation:7:3"), dialogue_of("12")
  ('conversation:7', '12')
  """
  return example.rpartition(":")[0] or example


def _common(sources: Sequence[Source]) -> dict[str, list[str]]:
  """Returns the examples that all systems responded to, by dialogue.

  Raises:
    InputError: Two systems saw different texts under one id.
  """
  first, *others = sources
  common = [i for i in first.lines if all(i in o.lines for o in others)]
  for other in others:
    for example in common:
      one, two = first.lines[example], other.lines[example]
      for field in ("context", "reference"):
        if field in one and field in two and one[field] != two[field]:
          raise InputError(
            f"{first.where} and {other.where} have a different {field} for "
            f"{example!r}; give evaluations of one split and one tokenisation"
          )
  dialogues = defaultdict(list)
  for example in common:
    dialogues[dialogue_of(example)].append(example)
  return dict(dialogues)


def _field(sources: Sequence[Source], example: str, name: str) -> Any:
  """Returns a field of an example from the first system that has it."""
  found = (source.lines[example].get(name) for source in sources)
  return next((value for value in found if value), None)


def sample(sources: Sequence[Source], plan: Plan) -> list[str]:
  """Samples examples of different dialogues, stratified by emotion.

  Every emotion gets its share of the common dialogues, by largest remainders.

  Returns:
    `plan.dialogues` example ids, in random order.

  Raises:
    InputError: The systems have fewer dialogues in common.
  """
  dialogues = _common(sources)
  if len(dialogues) < plan.dialogues:
    raise InputError(
      f"--dialogues={plan.dialogues}: the systems have only "
      f"{len(dialogues)} dialogues in common"
    )
  rng = random.Random(plan.seed)
  strata = defaultdict(list)
  for examples in dialogues.values():
    example = rng.choice(examples)
    strata[_field(sources, example, "emotion") or ""].append(example)
  share = plan.dialogues / len(dialogues)
  quota = {name: int(share * len(found)) for name, found in strata.items()}
  # Shuffled first, as equal remainders would favour the first emotions.
  rest = rng.sample(sorted(strata), len(strata))
  rest.sort(key=lambda name: quota[name] - share * len(strata[name]))
  for name in rest[: plan.dialogues - sum(quota.values())]:
    quota[name] += 1
  drawn = [
    example
    for name in sorted(strata)
    for example in rng.sample(strata[name], quota[name])
  ]
  rng.shuffle(drawn)
  return drawn


def _readable(tokens: str) -> str:
  return text.join_tokens(tokens.split())


class _Builder:
  """The items of a study, as they are made."""

  def __init__(self, sources: Sequence[Source], plan: Plan) -> None:
    self.sources, self.plan = sources, plan
    self.rng = random.Random(plan.seed + 1)
    self.drawn = sample(sources, plan)
    self.items: dict[str, dict[str, Any]] = {}
    self.key: dict[str, dict[str, Any]] = {}

  def add(self, example: str, shown: Mapping[str, str], **key: Any) -> str:
    """Adds an item and returns its id, which says nothing about it."""
    item = f"{self.rng.getrandbits(48):012x}"
    context = _field(self.sources, example, "context") or []
    part = "rating" if "reply" in shown else "pairwise"
    self.items[item] = {
      "part": part,
      "context": [_readable(turn) for turn in context],
      **{name: _readable(said) for name, said in shown.items()},
    }
    self.key[item] = {"example": example, **key}
    return item

  def replies(self, example: str) -> list[str]:
    """Returns every system's response to an example."""
    return [source.lines[example]["response"] for source in self.sources]

  def controlled(self, count: int) -> list[tuple[str, str, str]]:
    """Returns examples, their gold responses and those of other dialogues.

    Raises:
      InputError: Too few examples have a gold response.
    """
    golds = {e: _field(self.sources, e, "reference") for e in self.drawn}
    having = [e for e, gold in golds.items() if gold]
    if count and len(set(golds[e] for e in having)) < 2:
      raise InputError(
        f"--controls={self.plan.controls}: needs lines with a 'reference', the "
        "gold response; give them, or --controls=0"
      )
    chosen = self.rng.sample(having, min(count, len(having)))
    return [
      (
        example,
        golds[example],
        self.rng.choice([g for e, g in golds.items() if g and
                         g != golds[example]]),
      )
      for example in chosen
    ]  # fmt: skip

  def count_controls(self, items: int) -> int:
    """Returns the number of control items that make up their share."""
    rate = self.plan.controls
    return round(items * rate / (1 - rate)) if rate else 0

  def rating(self) -> list[list[str]]:
    """Adds the rating items; returns every annotator's order.

    In each pass over the dialogues an annotator sees one response to each, of
    systems in turn (a Latin square over passes and annotators).
    """
    own: dict[tuple[str, int], str] = {}
    for example in self.drawn:
      replies = self.replies(example)
      for number, reply in enumerate(replies):
        same = [i for i, other in enumerate(replies) if other == reply]
        if same[0] == number:  # Identical responses are one item.
          names = [self.sources[i].name for i in same]
          item = self.add(example, {"reply": reply}, systems=names)
          own.update({(example, i): item for i in same})
    count = self.count_controls(len(set(own.values()))) / 2
    controls = []
    for number, (example, gold, other) in enumerate(
      self.controlled(round(count + 0.49))
    ):
      for role, reply in (("gold", gold), ("shuffled", other)):
        controls.append(
          self.add(example, {"reply": reply}, control=role, pair=number)
        )
    total = len(self.sources)
    orders = []
    for annotator in range(self.plan.annotators):
      order: list[str] = []
      for turn in range(total):
        cells = list(enumerate(self.drawn))
        self.rng.shuffle(cells)
        order += [
          own[example, (index + turn + annotator) % total]
          for index, example in cells
        ]
      orders.append(self.spread(list(dict.fromkeys(order)), controls))
    return orders

  def pairwise(self) -> list[list[str]]:
    """Adds both sides of every pair; returns every annotator's order.

    An annotator sees the first system on the left in half of the dialogues, and
    the next annotator sees the sides swapped.
    """
    pairs: list[tuple[str, str]] = []
    first, *others = self.sources
    for number, other in enumerate(others):
      shown = [
        (e, first.lines[e]["response"], other.lines[e]["response"])
        for e in self.drawn
        if first.lines[e]["response"] != other.lines[e]["response"]
      ]
      pairs += [
        self.sides(e, (a, b), swap=(index + number) % 2 == 1,
                   systems=[first.name, other.name])
        for index, (e, a, b) in enumerate(shown)
      ]  # fmt: skip
    controls = [
      self.sides(e, (gold, other), swap=index % 2 == 1, control="gold")
      for index, (e, gold, other) in enumerate(
        self.controlled(self.count_controls(len(pairs)))
      )
    ]
    orders = []
    for annotator in range(self.plan.annotators):
      order = [sides[annotator % 2] for sides in pairs]
      self.rng.shuffle(order)
      orders.append(self.spread(order, [s[annotator % 2] for s in controls]))
    return orders

  def sides(
    self, example: str, replies: tuple[str, str], *, swap: bool, **key: Any
  ) -> tuple[str, str]:
    """Adds a pair with its first response on the left, and on the right."""
    one, two = replies
    made = [
      self.add(example, {"left": one, "right": two}, first="left", **key),
      self.add(example, {"left": two, "right": one}, first="right", **key),
    ]
    return (made[1], made[0]) if swap else (made[0], made[1])

  def spread(self, order: list[str], controls: Sequence[str]) -> list[str]:
    """Returns an order with the controls at random places."""
    for item in controls:
      order.insert(self.rng.randrange(len(order) + 1), item)
    return order


def build(sources: Sequence[Source], plan: Plan) -> Study:
  """Builds a study.

  Raises:
    InputError: The plan or the systems' responses do not allow it.
  """
  names = [source.name for source in sources]
  if len(set(names)) < 2 or len(set(names)) < len(names):
    raise InputError(
      f"a study needs two or more different systems; given: {', '.join(names)}"
    )
  if not 0 <= plan.controls <= 0.5:
    raise InputError(f"--controls={plan.controls}: expected 0 to 0.5")
  if plan.dialogues < 1 or plan.annotators < 1:
    raise InputError("--dialogues and --annotators: expected at least 1")
  if plan.annotators > MAX_ANNOTATORS:
    raise InputError(
      f"--annotators={plan.annotators}: expected at most {MAX_ANNOTATORS:,}"
    )
  builder = _Builder(sources, plan)
  orders = {"rating": builder.rating(), "pairwise": builder.pairwise()}
  identical = {
    f"{names[0]}/{other.name}": [
      example
      for example in builder.drawn
      if builder.sources[0].lines[example]["response"]
      == other.lines[example]["response"]
    ]
    for other in sources[1:]
  }
  about = {"version": VERSION, **dataclasses.asdict(plan)}
  key = {
    "version": VERSION,
    "systems": [{"name": s.name, "source": s.where} for s in sources],
    "identical": identical,
    "items": builder.key,
  }
  return Study(about, builder.items, orders, key)


def read(folder: pathlib.Path, *, unblinded: bool = False) -> Study:
  """Reads a study folder.

  Args:
    folder: The folder that `empdg study create` wrote.
    unblinded: Whether to read `key.json`.

  Raises:
    InputError: The folder is no study, or of another version.
  """
  names = ["study.json", "items.json", "orders.json"]
  names += ["key.json"] if unblinded else []
  with storage.errors(f"--study={folder}: not a study folder", InputError):
    contents = [json.loads(storage.read_text(folder / n)) for n in names]
    if not all(isinstance(content, dict) for content in contents):
      raise ValueError("a file holds no object")
  about = contents[0]
  if about.get("version") != VERSION:
    raise InputError(
      f"--study={folder}: a study of version {about.get('version')!r:.40}; "
      f"this program reads version {VERSION}"
    )
  return Study(*contents, *([] if unblinded else [{}]))
