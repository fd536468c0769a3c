"""From conversations to examples, in the two published example sets."""

import dataclasses
from collections.abc import Container, Iterable, Sequence
from typing import Protocol

from empdg_jax.data import lexicon as lexicon_lib
from empdg_jax.data import text
from empdg_jax.data.corpora import Corpus


class Conversation(Protocol):
  """What is needed of a recorded conversation."""

  @property
  def id(self) -> str:
    """The conversation's name."""
    ...

  @property
  def emotion(self) -> int:
    """Its emotion label."""
    ...

  @property
  def situation(self) -> str:
    """What the speaker wrote of the situation."""
    ...

  @property
  def utterances(self) -> tuple[str, ...]:
    """Its turns."""
    ...


@dataclasses.dataclass(frozen=True, slots=True)
class Utterance:
  """One turn: its tokens and which of them are emotional words."""

  tokens: tuple[str, ...]
  emotional: tuple[bool, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
  """A response to learn.

  Attributes:
    id: `conv_id:turn`, the turn of the target counted from 0.
    emotion: The dialogue's emotion label.
    context: The turns before the target; the speaker's come first.
    target: The listener's response.
    feedback: The speaker's next turn, if there is one.
  """

  id: str
  emotion: int
  context: tuple[Utterance, ...]
  target: Utterance
  feedback: Utterance | None


@dataclasses.dataclass(frozen=True, slots=True)
class Dialogue:
  """A dialogue of the field's preprocessing, speaker first, turns paired."""

  id: str
  emotion: int
  turns: tuple[Utterance, ...]


@dataclasses.dataclass
class RawDialogue:
  """The same before tokenisation."""

  id: str
  emotion: int
  situation: str
  utterances: list[str]


def join_dialogues(
  conversations: Sequence[Conversation], corpus: Corpus
) -> list[RawDialogue]:
  """Turns a split's conversations into dialogues.

  Every conversation loses a trailing speaker turn, which nobody answers, and
  its `"` characters. The published sizes of EmpatheticDialogues depend on how
  the field's preprocessing read the files, so its corpus asks for the same: the
  last two conversations of a split are dropped, and neighbours with the same
  situation are joined and take the last one's emotion.

  Args:
    conversations: All conversations of the split, in the order of the file.
    corpus: Says what else the published example sets drop and join.

  Returns:
    The dialogues, in that order.
  """
  dialogues: list[RawDialogue] = []
  kept = len(conversations) - corpus.dropped_conversations
  for conversation in conversations[: max(0, kept)]:
    paired = len(conversation.utterances) // 2 * 2
    turns = [u.replace('"', "") for u in conversation.utterances[:paired]]
    last = dialogues[-1] if dialogues and corpus.joins_situations else None
    if last is not None and last.situation == conversation.situation:
      last.id, last.emotion = conversation.id, conversation.emotion
      last.utterances += turns
    else:
      dialogues.append(
        RawDialogue(
          conversation.id, conversation.emotion, conversation.situation, turns
        )
      )
  return dialogues


def annotate(
  utterance: str, tokenizer: text.Tokenizer, lexicon: Container[str]
) -> Utterance:
  """Tokenises an utterance and marks its emotional words."""
  tokens = tokenizer(utterance)
  return Utterance(
    tuple(tokens), tuple(lexicon_lib.is_emotional(tokens, lexicon))
  )


def build_examples(
  dialogues: Iterable[Dialogue], example_set: str
) -> list[Example]:
  """Builds the examples of one split.

  Args:
    dialogues: The split's dialogues.
    example_set: `"empdg"`: every listener turn that both a speaker turn (its
      feedback) and one more listener turn follow (20,724 / 2,972 / 2,713
      examples). `"all_turns"`: every listener turn (40,250 / 5,734 / 5,255).

  Returns:
    The examples, in the order of the dialogues and their turns.
  """
  needed = {"empdg": 2, "all_turns": 0}[example_set]
  examples = []
  for dialogue in dialogues:
    turns = dialogue.turns
    for turn in range(1, len(turns) - needed, 2):
      examples.append(
        Example(
          id=f"{dialogue.id}:{turn}",
          emotion=dialogue.emotion,
          context=turns[:turn],
          target=turns[turn],
          feedback=turns[turn + 1] if turn + 1 < len(turns) else None,
        )
      )
  return examples


def utterances(examples: Iterable[Example]) -> Iterable[Sequence[str]]:
  """Yields the tokens of every distinct utterance of the examples."""
  seen: dict[int, Utterance] = {}
  for example in examples:
    for utterance in (*example.context, example.target, example.feedback):
      if utterance is not None and id(utterance) not in seen:
        seen[id(utterance)] = utterance
        yield utterance.tokens
