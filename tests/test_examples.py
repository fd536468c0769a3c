"""Examples of invented conversations, by hand, and the published sizes."""

import dataclasses

import pytest

from empdg_jax.config import DataConfig
from empdg_jax.data import examples, prepare, text
from empdg_jax.data.corpora import Conversation, find_corpus
from empdg_jax.data.examples import Dialogue, Utterance


def talk(number: int, turns: int, situation: str = "") -> Conversation:
  """An invented conversation; its emotion is its number."""
  return Conversation(
    f"talk{number}",
    number,
    situation or f"situation {number}",
    tuple(f"talk {number} turn {turn}" for turn in range(turns)),
    tuple(turn % 2 for turn in range(turns)),
  )


def dialogue(turns: int) -> Dialogue:
  """A dialogue whose turns are the words `t0`, `t1`, ..."""
  return Dialogue(
    "talk", 3, tuple(Utterance((f"t{t}",), (False,)) for t in range(turns))
  )


# Two more, since the last two conversations of a split are dropped.
CORPUS = find_corpus(DataConfig())
DROPPED = [talk(30, 4), talk(31, 4)]


def test_drops_the_last_two_conversations() -> None:
  joined = examples.join_dialogues([talk(i, 4) for i in range(5)], CORPUS)

  assert [d.id for d in joined] == ["talk0", "talk1", "talk2"]
  assert examples.join_dialogues(DROPPED, CORPUS) == []
  assert examples.join_dialogues([], CORPUS) == []


@pytest.mark.parametrize(
  ("turns", "kept"), [(1, 0), (2, 2), (3, 2), (4, 4), (5, 4), (6, 6)]
)
def test_drops_a_trailing_speaker_turn(turns: int, kept: int) -> None:
  conversation = talk(0, turns)

  (joined,) = examples.join_dialogues([conversation, *DROPPED], CORPUS)

  assert joined.utterances == conversation.utterances[:kept]


def test_joins_neighbours_with_the_same_situation() -> None:
  """Each loses its own trailing turn; the last one's emotion stays."""
  joined = examples.join_dialogues(
    [
      talk(0, 5, "lost keys"),
      talk(1, 4, "lost keys"),
      talk(2, 2, "lost keys"),
      talk(3, 4, "new bike"),
      talk(4, 4, "lost keys"),
      *DROPPED,
    ],
    CORPUS,
  )

  assert [d.emotion for d in joined] == [2, 3, 4]
  assert [d.id for d in joined] == ["talk2", "talk3", "talk4"]
  assert joined[0].utterances == (
    *talk(0, 4).utterances,
    *talk(1, 4).utterances,
    *talk(2, 2).utterances,
  )
  assert joined[0].speakers == (0, 1) * 5
  assert joined[2].utterances == talk(4, 4).utterances


def test_situations_join_only_when_identical() -> None:
  joined = examples.join_dialogues(
    [talk(0, 4, "lost keys"), talk(1, 4, "Lost keys"), *DROPPED], CORPUS
  )

  assert len(joined) == 2


def test_deletes_quotes() -> None:
  said = ('he said "no" to me', 'oh"', '"', "ok")
  conversation = Conversation("talk", 0, "a dispute", said, (0, 1, 0, 1))

  (joined,) = examples.join_dialogues([conversation, *DROPPED], CORPUS)

  assert joined.utterances == ("he said no to me", "oh", "", "ok")


def test_annotate() -> None:
  utterance = examples.annotate(
    "I'm at the STORM.", text.Tokenizer(), frozenset({"storm", "at"})
  )

  assert utterance.tokens == ("i", "am", "at", "the", "storm", ".")
  assert utterance.emotional == (False, False, False, False, True, False)
  empty = examples.annotate("", text.Tokenizer(), frozenset({"storm"}))
  assert empty == Utterance((), ())


@pytest.mark.parametrize(
  ("turns", "targets"),
  [(0, []), (2, []), (4, [1]), (6, [1, 3]), (8, [1, 3, 5])],
)
def test_empdg_needs_feedback_and_one_more_listener_turn(
  turns: int, targets: list[int]
) -> None:
  talked = dialogue(turns)

  built = examples.build_examples([talked], "empdg")

  assert [e.id for e in built] == [f"talk:{target}" for target in targets]
  for example, target in zip(built, targets, strict=True):
    assert example.context == talked.turns[:target]
    assert example.target == talked.turns[target]
    assert example.feedback == talked.turns[target + 1]
    assert example.emotion == 3


@pytest.mark.parametrize(
  ("turns", "targets"), [(0, []), (2, [1]), (4, [1, 3]), (6, [1, 3, 5])]
)
def test_all_turns_takes_every_listener_turn(
  turns: int, targets: list[int]
) -> None:
  """Only the last one lacks feedback."""
  talked = dialogue(turns)

  built = examples.build_examples([talked], "all_turns")

  assert [e.id for e in built] == [f"talk:{target}" for target in targets]
  for example, target in zip(built, targets, strict=True):
    assert example.context == talked.turns[:target]
    assert example.target == talked.turns[target]
    if target == turns - 1:
      assert example.feedback is None
    else:
      assert example.feedback == talked.turns[target + 1]


def test_utterances_yields_each_turn_once() -> None:
  """Prefixes of one dialogue share turns; words are not counted twice."""
  built = examples.build_examples([dialogue(6), dialogue(4)], "all_turns")

  words = [token for tokens in examples.utterances(built) for token in tokens]

  assert sorted(words) == sorted(
    [*(f"t{t}" for t in range(6)), *(f"t{t}" for t in range(4))]
  )


def test_real_counts_of_conversations(real_dataset: prepare.Dataset) -> None:
  assert real_dataset.conversations == {
    "train": 19_533,
    "valid": 2_770,
    "test": 2_547,
  }
  assert real_dataset.utterances == {
    "train": 84_169,
    "valid": 12_078,
    "test": 10_973,
  }


def test_real_counts_of_empdg(real_dataset: prepare.Dataset) -> None:
  sizes = {s: len(members) for s, members in real_dataset.examples.items()}

  assert sizes == {"train": 20_724, "valid": 2_972, "test": 2_713}
  for members in real_dataset.examples.values():
    assert all(len(e.context) % 2 == 1 for e in members)
    assert all(e.feedback is not None for e in members)


def test_real_counts_of_all_turns(
  real_dataset: prepare.Dataset, real_data_config: DataConfig
) -> None:
  """The second preparation reads what the first one kept."""
  config = dataclasses.replace(real_data_config, example_set="all_turns")

  dataset = prepare.load_dataset(config)

  sizes = {s: len(members) for s, members in dataset.examples.items()}
  assert sizes == {"train": 40_250, "valid": 5_734, "test": 5_255}
  kept = {e.id: e for e in dataset.examples["valid"]}
  assert all(kept[e.id] == e for e in real_dataset.examples["valid"])
