r"""The embedded corpus: a small synthetic EmpatheticDialogues.

With it, the product trains anywhere without a download. All sentences come from
the grammar in `sample_corpus.txt` beside this module, which was written for
this project and takes nothing from any dataset. The expansion is deterministic,
and no first utterance is used twice.

The grammar is read line by line (`#` starts a comment line):

    = FAMILY              begins a family of closings, shared by emotions
    @ EMOTION FAMILY      begins an emotion with the closings of that family
    * TOPIC               begins a scenario of the emotion and names its topic
    p: TEXT               the situation of the scenario
    1: TEXT ... 6: TEXT   a sentence for that turn

Odd turns are the speaker's and even turns the listener's. Turns 2 and 3 are
two sentences each: turn 2 is one of the emotion's responses, then the
scenario's question; turn 3 is the scenario's reaction, then one of the
emotion's feelings. Turn 4 comes from the emotion; turns 5 and 6, which not
every dialogue has, come from the family.

A group `{a|b|c}` in turn 1 is a slot to fill. Elsewhere in the scenario, `{1}`
is the filler of the first slot, `{2}` of the second and so on; in a sentence of
the emotion, `{t}` is the topic.
"""

import itertools
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SPLIT_SIZES = {"train": 674, "valid": 98, "test": 98}

_GRAMMAR = Path(__file__).with_suffix(".txt")
_HEADER = (
  "conv_id,utterance_idx,context,prompt,speaker_idx,utterance,selfeval,tags"
)
_SLOT = re.compile(r"\{([^{}]*\|[^{}]*)\}")
_LENGTHS = (4, 5, 6)


class Dialogue(NamedTuple):
  """One conversation; turns 0, 2, ... are the speaker's."""

  id: str
  emotion: str
  situation: str
  utterances: tuple[str, ...]


class _Scenario(NamedTuple):
  """A scenario's topic, and a template for each of its turns."""

  topic: str
  lines: dict[str, str]


class _Emotion(NamedTuple):
  """An emotion's sentences by turn, and its scenarios."""

  name: str
  lines: dict[str, list[str]]
  scenarios: list[_Scenario]


def _parse(text: str) -> list[_Emotion]:
  """Parses the grammar into its emotions, in the order of the text.

  Raises:
    ValueError: A line has no known notation.
  """
  families: dict[str, dict[str, list[str]]] = {}
  emotions: list[_Emotion] = []
  shared: dict[str, list[str]] = {}
  scenario: _Scenario | None = None
  for number, line in enumerate(text.splitlines(), 1):
    if not line or line.startswith("#"):
      continue
    mark, _, rest = line.partition(" ")
    if mark == "=":
      shared = families[rest] = {}
    elif mark == "@":
      name, family = rest.split()
      shared, scenario = dict(families[family]), None
      emotions.append(_Emotion(name, shared, []))
    elif mark == "*":
      scenario = _Scenario(rest, {})
      emotions[-1].scenarios.append(scenario)
    elif not re.fullmatch("[p1-6]:", mark) or '"' in rest:
      raise ValueError(f"{_GRAMMAR.name}:{number}: cannot parse {line!r}")
    elif scenario is None:
      shared.setdefault(mark[0], []).append(rest)
    else:
      scenario.lines[mark[0]] = rest
  return emotions


def _fill(template: str, values: dict[str, str]) -> str:
  """Replaces every `{name}` of a template by its value."""
  return re.sub(r"\{(\w+)\}", lambda match: values[match[1]], template)


def _openings(
  scenario: _Scenario, rng: random.Random
) -> Iterator[dict[str, str]]:
  """Yields all expansions of a scenario in random order, each once.

  Args:
    scenario: The scenario.
    rng: The generator of the order.

  Yields:
    The scenario's sentences by turn, with the situation as `p` and the topic as
    `t`.
  """
  first = scenario.lines["1"]
  slots = [group.split("|") for group in _SLOT.findall(first)]
  combinations = list(itertools.product(*slots))
  rng.shuffle(combinations)
  for fillers in combinations:
    values = {str(slot): text for slot, text in enumerate(fillers, 1)}
    between = _SLOT.split(first)[::2]
    pairs = itertools.zip_longest(between, fillers, fillvalue="")
    utterance = "".join(itertools.chain.from_iterable(pairs))
    lines = scenario.lines | {"1": utterance, "t": scenario.topic}
    yield {turn: _fill(line, values) for turn, line in lines.items()}


def _shuffled_forever(lines: list[str], rng: random.Random) -> Iterator[str]:
  """Yields lines without end, each once before any comes again."""
  while True:
    yield from rng.sample(lines, len(lines))


def _expand(emotion: _Emotion) -> Iterator[tuple[str, tuple[str, ...]]]:
  """Yields the situation and all six utterances of an emotion's dialogues.

  The scenarios take turns. No first utterance comes twice.
  """
  # A generator for each emotion: a new sentence of one emotion then leaves the
  # dialogues of all others as they were.
  # For the corpus to be the same everywhere; nothing here is secret.
  rng = random.Random(f"embedded corpus: {emotion.name}")  # nosec B311
  scenarios = [_openings(scenario, rng) for scenario in emotion.scenarios]
  bags = {t: _shuffled_forever(emotion.lines[t], rng) for t in "23456"}
  for opening in itertools.chain.from_iterable(zip(*scenarios, strict=False)):
    # The bags are shuffled, so each scenario meets the responses in another
    # order, and no response gives a scenario away.
    shared = {turn: _fill(next(bag), opening) for turn, bag in bags.items()}
    yield (
      opening["p"],
      (
        opening["1"],
        f"{shared['2']} {opening['2']}",
        f"{opening['3']} {shared['3']}",
        shared["4"],
        shared["5"],
        shared["6"],
      ),
    )


def dialogues() -> dict[str, list[Dialogue]]:
  """Returns the dialogues of each split, the same on every call.

  They cycle over the 32 emotions, so neighbours differ in emotion and situation
  and are never joined. No dialogue, nor even a first utterance, occurs twice in
  the whole corpus.
  """
  emotions = _parse(_GRAMMAR.read_text(encoding="utf-8"))
  sources = [_expand(emotion) for emotion in emotions]
  corpus = {}
  for split, size in SPLIT_SIZES.items():
    corpus[split] = []
    for index in range(size):
      cycle, which = divmod(index, len(emotions))
      situation, utterances = next(sources[which])
      # By the cycle as well, else an emotion would have a single length.
      length = _LENGTHS[(cycle + which) % len(_LENGTHS)]
      corpus[split].append(
        Dialogue(
          f"{split}:{index}",
          emotions[which].name,
          situation,
          utterances[:length],
        )
      )
  return corpus


def csv_files() -> dict[str, bytes]:
  """Returns each split's CSV file in the format of EmpatheticDialogues.

  No field is quoted; a comma inside a text is written `_comma_`.
  """
  files = {}
  for split, members in dialogues().items():
    rows = [_HEADER]
    for dialogue in members:
      situation = dialogue.situation.replace(",", "_comma_")
      for index, utterance in enumerate(dialogue.utterances):
        utterance = utterance.replace(",", "_comma_")
        rows.append(
          f"{dialogue.id},{index + 1},{dialogue.emotion},{situation},"
          f"{index % 2},{utterance},,"
        )
    files[split] = ("\n".join(rows) + "\n").encode()
  return files
