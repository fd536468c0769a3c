"""The demo's behaviour: dialogues of people with several systems at once."""

import asyncio
import dataclasses
import random
from collections.abc import Sequence
from typing import NamedTuple

from empdg_jax.config import InputError
from empdg_jax.data.examples import Utterance
from empdg_jax.inference.respond import Responder
from empdg_jax.models import registry
from empdg_jax.web import demo_html
from empdg_jax.web.demo_replies import (
  DECODINGS,
  PERCEIVED,
  Replies,
  Reply,
  Settings,
)

MOST_CHARACTERS = 1_000  # Of one turn.
_MOST_TURNS = 100
AS_PERCEIVED = "as perceived"


class Turn(NamedTuple):
  """What a person said, and each system's reply.

  Attributes:
    said: The text.
    read: The text as each system read it.
    replies: Each system's reply.
  """

  said: str
  read: tuple[Utterance, ...]
  replies: tuple[Reply, ...]


@dataclasses.dataclass(frozen=True)
class Dialogue:
  """One person's dialogue, with all systems at once.

  Attributes:
    order: The systems in the order of their columns, shuffled.
    named: Whether the systems' names are shown.
    turns: The turns so far.
  """

  order: tuple[int, ...]
  named: bool
  turns: tuple[Turn, ...] = ()

  def context(self, system: int, said: str) -> list[str]:
    """Returns a system's own dialogue and what is said next."""
    context = []
    for turn in self.turns:
      context += [turn.said, turn.replies[system].response.text]
    return [*context, said]


def check_systems(
  responders: Sequence[Responder], names: Sequence[str]
) -> None:
  """Raises InputError unless systems can be shown side by side."""
  labels = responders[0].system.emotions
  for responder, name in zip(responders, names, strict=True):
    if responder.system.emotions != labels:
      raise InputError(
        f"{name}: its emotion labels differ from those of {names[0]}; show "
        "systems of one dataset side by side"
      )


def titles(responders: Sequence[Responder], names: Sequence[str]) -> list[str]:
  """Returns the systems' names, with their folders where two are alike."""
  found = [
    registry.SYSTEMS[responder.system.config.model.name].title
    for responder in responders
  ]
  if len(set(found)) == len(found):
    return found
  return [f"{title} ({name})" for title, name in zip(found, names, strict=True)]


class Demo:
  """The page's behaviour, without its looks.

  Attributes:
    replies: The systems.
    titles: Their names.
    labels: The emotion labels.
  """

  def __init__(self, replies: Replies, titles: Sequence[str]) -> None:
    """Keeps no dialogue: each stays with its page.

    Args:
      replies: The systems.
      titles: Their names.
    """
    self.replies = replies
    self.titles = tuple(titles)
    self.labels = replies.responders[0].system.emotions

  def new_dialogue(self) -> Dialogue:
    """Returns an empty dialogue; several systems are shuffled and nameless."""
    count = len(self.titles)
    order = tuple(random.SystemRandom().sample(range(count), count))
    return Dialogue(order, named=count == 1)

  def settings(
    self,
    decoding: str,
    temperature: float,
    top_p: float,
    seed: float,
    length: float,
    emotion: str,
  ) -> Settings:
    """Returns the settings of the page's controls.

    Raises:
      InputError: A control holds what the page does not offer.
    """
    # Whoever speaks to the server without the page may send anything.
    labels = [AS_PERCEIVED, *self.labels]
    numbers = temperature, top_p, seed, length
    if not all(type(n) in (int, float) for n in numbers):
      raise InputError("seed: expected a whole number of at least 0")
    if decoding not in DECODINGS or emotion not in labels:
      raise InputError("unknown decoding or emotion; load the page again")
    if not (0 < temperature <= 10 and 0 < top_p <= 1 and 1 <= length <= 1_000):
      raise InputError("temperature, top-p or length: out of range")
    if not 0 <= seed < 2**31 or seed != int(seed):
      raise InputError("seed: expected a whole number of at least 0")
    chosen = labels.index(emotion) + PERCEIVED
    return Settings(
      decoding, float(temperature), float(top_p), int(seed), int(length), chosen
    )

  async def say(
    self, dialogue: Dialogue, said: str, settings: Settings
  ) -> Dialogue:
    """Returns the dialogue with one more turn of all systems.

    Raises:
      InputError: Nothing is said, or a system cannot respond.
    """
    if not isinstance(said, str) or not said.strip():
      raise InputError("nothing said; write what happened to you")
    if len(said) > MOST_CHARACTERS:
      raise InputError(f"too long: at most {MOST_CHARACTERS:,} characters")
    if len(dialogue.turns) >= _MOST_TURNS:
      raise InputError(f"{_MOST_TURNS} turns are enough; begin a new dialogue")
    futures = [
      self.replies.ask(system, dialogue.context(system, said), settings)
      for system in range(len(self.titles))
    ]
    replies = await asyncio.gather(*map(asyncio.wrap_future, futures))
    read = tuple(r.annotate(said) for r in self.replies.responders)
    turn = Turn(said, read, tuple(replies))
    return dataclasses.replace(dialogue, turns=(*dialogue.turns, turn))

  def name(self, dialogue: Dialogue, column: int) -> str:
    """Returns the name by which a column's system is shown."""
    hidden = f"System {'ABC'[column]}"
    return self.titles[dialogue.order[column]] if dialogue.named else hidden

  def panels(self, dialogue: Dialogue) -> list[str]:
    """Returns the HTML of each column."""
    return [
      demo_html.dialogue(
        self.name(dialogue, column),
        [turn.read[system] for turn in dialogue.turns],
        [turn.replies[system] for turn in dialogue.turns],
        self.labels,
      )
      for column, system in enumerate(dialogue.order)
    ]

  def attention(self, dialogue: Dialogue, turn: int) -> str:
    """Returns the HTML of the attention of all replies of a turn.

    Args:
      dialogue: The dialogue.
      turn: The turn's number, from 1.

    Raises:
      InputError: There is no such turn.
    """
    if turn not in range(1, len(dialogue.turns) + 1):
      raise InputError("no such turn; say something first")
    replies = dialogue.turns[turn - 1].replies
    return "".join(
      demo_html.attention(
        self.name(dialogue, column),
        self.replies.attend(system, replies[system]),
      )
      for column, system in enumerate(dialogue.order)
    )
