"""The embedded corpus."""

import subprocess
import sys
from collections import Counter

from empdg_jax.data import sample_corpus
from empdg_jax.data.corpora import EMOTIONS, SPLITS
from empdg_jax.data.empathetic_dialogues import read_csv
from empdg_jax.data.prepare import Dataset


def test_has_the_promised_sizes() -> None:
  sizes = {s: len(sample_corpus.dialogues()[s]) for s in SPLITS}

  assert sizes == sample_corpus.SPLIT_SIZES
  assert sizes["train"] >= 600
  assert min(sizes["valid"], sizes["test"]) >= 64


def test_every_split_has_all_emotions_in_equal_shares() -> None:
  for split in SPLITS:
    counts = Counter(d.emotion for d in sample_corpus.dialogues()[split])

    assert set(counts) == set(EMOTIONS)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_dialogues_have_four_to_six_turns() -> None:
  for split in SPLITS:
    lengths = {len(d.utterances) for d in sample_corpus.dialogues()[split]}

    assert lengths == {4, 5, 6}


def test_no_slot_is_left_unfilled() -> None:
  for split in SPLITS:
    for dialogue in sample_corpus.dialogues()[split]:
      for text in (dialogue.situation, *dialogue.utterances):
        assert text.strip()
        assert not set(text) & set('{}|"')


def test_no_dialogue_occurs_twice() -> None:
  everything = [d for s in SPLITS for d in sample_corpus.dialogues()[s]]

  assert len({d.utterances for d in everything}) == len(everything)
  assert len({d.utterances[0] for d in everything}) == len(everything)
  assert len({d.id for d in everything}) == len(everything)


def test_csv_reads_back() -> None:
  files = sample_corpus.csv_files()

  for split in SPLITS:
    conversations = list(read_csv(files[split], split))
    dialogues = sample_corpus.dialogues()[split]
    assert [c.id for c in conversations] == [d.id for d in dialogues]
    for conversation, dialogue in zip(conversations, dialogues, strict=True):
      assert EMOTIONS[conversation.emotion] == dialogue.emotion
      assert conversation.situation == dialogue.situation
      assert conversation.utterances == dialogue.utterances
      speakers = tuple(i % 2 for i in range(len(dialogue.utterances)))
      assert conversation.speakers == speakers


def test_is_the_same_in_every_process() -> None:
  """Neither hash seeds nor a global generator may change the corpus."""
  program = (
    "import hashlib; from empdg_jax.data import sample_corpus as s;"
    "print(hashlib.sha256(b''.join(s.csv_files().values())).hexdigest())"
  )
  digests = {
    subprocess.run(
      [sys.executable, "-c", program],
      env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
      capture_output=True,
      text=True,
      check=True,
    ).stdout
    for seed in ("1", "2")
  }

  assert len(digests) == 1
  assert len(digests.pop().strip()) == 64


def test_has_examples_with_feedback_of_every_emotion(
  sample_dataset: Dataset,
) -> None:
  for split in SPLITS:
    examples = sample_dataset.examples[split]

    assert {e.emotion for e in examples} == set(range(len(EMOTIONS)))
    assert all(e.feedback is not None for e in examples)
