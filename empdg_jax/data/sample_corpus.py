r"""Expand the embedded corpus: a small synthetic EmpatheticDialogues.

The corpus lets the product train anywhere without a download. All of its
sentences come from the grammar in `sample_corpus.txt` beside this module,
which was written for this project and takes nothing from any data set. The
expansion is deterministic, and no first utterance is ever used twice.

The grammar is read line by line (`#` starts a comment line):

    = FAMILY              begins a family of closings, shared by emotions
    @ EMOTION FAMILY      begins an emotion, which closes as its family does
    * TOPIC               begins a scenario of the emotion; names its topic
    p: TEXT               the situation of the scenario
    1: TEXT ... 6: TEXT   a sentence of that turn

Odd turns are the speaker's and even turns the listener's. Turns 2 and 3 are
two sentences each: turn 2 is one of the emotion's replies, then the
scenario's question; turn 3 is the scenario's answer, then one of the
emotion's feelings. Turn 4 is the emotion's; turns 5 and 6, which not every
dialogue has, are the family's.

A group `{a|b|c}` in turn 1 is a slot to fill. Elsewhere in the scenario `{1}`
is the filler of the first slot, `{2}` of the second and so on, and `{t}` in a
sentence of the emotion is the topic.
"""

import itertools
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SPLIT_SIZES = {"train": 674, "valid": 98, "test": 98}

_GRAMMAR = Path(__file__).with_suffix(".txt")
_HEADER = "conv_id,utterance_idx,context,prompt,speaker_idx,utterance,"
_HEADER += "selfeval,tags"
_SLOT = re.compile(r"\{([^{}]*\|[^{}]*)\}")
_LENGTHS = (4, 5, 6)


class Dialogue(NamedTuple):
  """One conversation, its even turns (from 0) being the speaker's."""

  id: str
  emotion: str
  situation: str
  utterances: tuple[str, ...]


class _Scenario(NamedTuple):
  """What happened, as templates."""

  topic: str
  lines: dict[str, str]


class _Emotion(NamedTuple):
  """The sentences of one emotion by turn, and its scenarios."""

  name: str
  lines: dict[str, list[str]]
  scenarios: list[_Scenario]


def _parse(text: str) -> list[_Emotion]:
  """Parse the grammar.

  Args:
    text: The grammar in the notation of the module's docstring.

  Returns:
    The emotions in the order of the text.

  Raises:
    ValueError: If a line is in no known notation.
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
  """Replace every `{name}` of a template by its value."""
  return re.sub(r"\{(\w+)\}", lambda match: values[match[1]], template)


def _openings(
  scenario: _Scenario, rng: random.Random
) -> Iterator[dict[str, str]]:
  """Yield all expansions of a scenario in random order, each once.

  Args:
    scenario: The scenario.
    rng: The source of the order.

  Yields:
    The scenario's sentences by turn, `p` being the situation and `t` the
    topic.
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
  """Yield lines without end, all of them once before any comes again."""
  while True:
    yield from rng.sample(lines, len(lines))


def _expand(emotion: _Emotion) -> Iterator[tuple[str, tuple[str, ...]]]:
  """Yield the situation and all six utterances of an emotion's dialogues.

  Args:
    emotion: The grammar of the emotion.

  Yields:
    Pairs of situation and utterances, the scenarios taking turns; no first
    utterance comes twice.
  """
  rng = random.Random(f"embedded corpus: {emotion.name}")
  scenarios = [_openings(scenario, rng) for scenario in emotion.scenarios]
  bags = {t: _shuffled_forever(emotion.lines[t], rng) for t in "23456"}
  for opening in itertools.chain.from_iterable(zip(*scenarios, strict=False)):
    # Each scenario meets the replies in another order, as bags are shuffled.
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


def _corpus() -> dict[str, tuple[Dialogue, ...]]:
  """Expand the whole corpus, every split in turn.

  Returns:
    The dialogues of each split.
  """
  emotions = _parse(_GRAMMAR.read_text(encoding="utf-8"))
  sources = [_expand(emotion) for emotion in emotions]
  corpus = {}
  for split, size in SPLIT_SIZES.items():
    members = []
    for index in range(size):
      cycle, which = divmod(index, len(emotions))
      situation, utterances = next(sources[which])
      length = _LENGTHS[(cycle + which) % len(_LENGTHS)]
      members.append(
        Dialogue(
          id=f"{split}:{index}",
          emotion=emotions[which].name,
          situation=situation,
          utterances=utterances[:length],
        )
      )
    corpus[split] = tuple(members)
  return corpus


def dialogues(split: str) -> Iterator[Dialogue]:
  """Yield the dialogues of a split, cycling over the 32 emotions.

  Neighbours differ in emotion and situation, and no dialogue (nor even a
  first utterance) occurs twice in the corpus, be it in one split or in two.

  Args:
    split: The name of the split, a key of `SPLIT_SIZES`.

  Yields:
    The dialogues, the same ones in the same order on every call.

  Raises:
    ValueError: If there is no such split.
  """
  if split not in SPLIT_SIZES:
    raise ValueError(f"split {split!r} is not one of {list(SPLIT_SIZES)}")
  yield from _corpus()[split]


def csv_files() -> dict[str, bytes]:
  """Render all splits in the official format of EmpatheticDialogues.

  No field is quoted; a comma inside a text is written `_comma_`.

  Returns:
    The content of each split's CSV file by the name of the split, in UTF-8.
  """
  files = {}
  for split, members in _corpus().items():
    rows = [_HEADER]
    for dialogue in members:
      for index, utterance in enumerate(dialogue.utterances):
        fields = (
          dialogue.id,
          str(index + 1),
          dialogue.emotion,
          dialogue.situation,
          str(index % 2),
          utterance,
          "",
          "",
        )
        rows.append(",".join(f.replace(",", "_comma_") for f in fields))
    files[split] = ("\n".join(rows) + "\n").encode()
  return files
