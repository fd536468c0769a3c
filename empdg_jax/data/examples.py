"""Dialogues and examples of the two published example sets."""

import dataclasses
from collections.abc import Container, Iterable, Sequence
from typing import NamedTuple

from empdg_jax.config import TEXT_RULES
from empdg_jax.data import lexicon as lexicon_lib
from empdg_jax.data import text
from empdg_jax.data.corpora import Conversation, Corpus


class Utterance(NamedTuple):
  """One turn: its tokens and which of them are emotional words."""

  tokens: tuple[str, ...]
  emotional: tuple[bool, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
  """A response to learn.

  Attributes:
    id: `conv_id:turn`, the target's turn counted from 0.
    emotion: The dialogue's emotion label.
    context: The turns before the target; the speaker begins.
    target: The listener's response.
    feedback: The speaker's next turn, if there is one.
  """

  id: str
  emotion: int
  context: tuple[Utterance, ...]
  target: Utterance
  feedback: Utterance | None


class Dialogue(NamedTuple):
  """A preprocessed dialogue: the speaker begins, turns come in pairs."""

  id: str
  emotion: int
  turns: tuple[Utterance, ...]


def join_dialogues(
  conversations: Sequence[Conversation], corpus: Corpus
) -> list[Conversation]:
  """Turns a split's conversations into dialogues.

  Every conversation loses a trailing speaker turn, to which there is no
  response, and its `"` characters. EmpatheticDialogues loses the last two
  conversations of each split as well, and neighbours with the same situation
  become one dialogue with the last one's emotion.

  Args:
    conversations: All conversations of the split, in the order of the file.
    corpus: The dataset's rules for dropping and joining.

  Returns:
    The dialogues, in that order.
  """
  dialogues: list[Conversation] = []
  # The field's preprocessing dropped and joined in this way, and only so do
  # the example sets get their published sizes.
  kept = max(0, len(conversations) - corpus.dropped_conversations)
  for conversation in conversations[:kept]:
    paired = len(conversation.utterances) // 2 * 2
    turns = tuple(u.replace('"', "") for u in conversation.utterances[:paired])
    speakers = conversation.speakers[:paired]
    if (
      corpus.joins_situations
      and dialogues
      and dialogues[-1].situation == conversation.situation
    ):
      last = dialogues.pop()
      turns, speakers = last.utterances + turns, last.speakers + speakers
    dialogues.append(
      dataclasses.replace(conversation, utterances=turns, speakers=speakers)
    )
  return dialogues


def annotate(
  utterance: str, lexicon: Container[str], rules: int = TEXT_RULES
) -> Utterance:
  """Tokenises an utterance and marks its emotional words.

  Args:
    utterance: The text of one turn.
    lexicon: The words of an emotion lexicon.
    rules: The version of the rules of both.
  """
  tokens = text.tokenize(utterance, rules)
  flags = lexicon_lib.is_emotional(tokens, lexicon, rules)
  return Utterance(tuple(tokens), tuple(flags))


def build_examples(
  dialogues: Iterable[Dialogue], example_set: str
) -> list[Example]:
  """Builds the examples of one split.

  Args:
    dialogues: The split's dialogues.
    example_set: `"empdg"`: every listener turn followed by a speaker turn (its
      feedback) and one more listener turn (20,724 / 2,972 / 2,713 examples).
      `"all_turns"`: every listener turn (40,250 / 5,734 / 5,255).

  Returns:
    The examples, in the order of the dialogues and their turns.
  """
  needed = {"empdg": 2, "all_turns": 0}[example_set]
  return [
    Example(
      id=f"{name}:{turn}",
      emotion=emotion,
      context=turns[:turn],
      target=turns[turn],
      feedback=turns[turn + 1] if turn + 1 < len(turns) else None,
    )
    for name, emotion, turns in dialogues
    for turn in range(1, len(turns) - needed, 2)
  ]


def utterances(examples: Sequence[Example]) -> Iterable[Sequence[str]]:
  """Yields the tokens of every distinct turn of the examples."""
  seen = set()
  for example in examples:
    for utterance in (*example.context, example.target, example.feedback):
      # By identity: examples of one dialogue share their turns, while equal
      # turns of two dialogues both count in the vocabulary's frequencies.
      if utterance is not None and id(utterance) not in seen:
        seen.add(id(utterance))
        yield utterance.tokens
