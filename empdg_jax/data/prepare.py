"""From a source to a prepared dataset."""

import contextlib
import dataclasses
import gzip
import hashlib
import io
import json
import pathlib
import zlib

import numpy as np
import rich.progress
import tensorflow_datasets as tfds

from empdg_jax import storage
from empdg_jax.config import DataConfig, InputError
from empdg_jax.data import (
  corpora,
  empathetic_dialogues,
  examples,
  text,
  vocab,
)
from empdg_jax.data import lexicon as lexicon_lib
from empdg_jax.data.corpora import Corpus
from empdg_jax.data.examples import Dialogue, Example, Utterance
from empdg_jax.data.lexicon import Lexicon
from empdg_jax.data.pipeline import EncodedExample, Shape, encode, padded_shapes
from empdg_jax.data.vocab import Vocabulary

# Part of the key under which tokenised dialogues are kept: raise it when the
# rules of `text.py`, `lexicon.py` or `examples.py` change.
_RULES_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A prepared dataset.

  Attributes:
    vocabulary: Tokens and their ids.
    lexicon: The emotion lexicon.
    corpus: The dataset's labels, splits, licence and rules.
    examples: The examples of each split.
    conversations: How many conversations each split has.
    utterances: How many turns they have.
    shapes: The padded lengths, ascending.
  """

  vocabulary: Vocabulary
  lexicon: Lexicon
  corpus: Corpus
  examples: dict[str, list[Example]]
  conversations: dict[str, int]
  utterances: dict[str, int]
  shapes: tuple[Shape, ...]

  def digest(self) -> str:
    """Returns a hash of the vocabulary and of all examples, in order."""
    digest = hashlib.sha256("\n".join(self.vocabulary.tokens).encode())
    for members in self.examples.values():
      for example in members:
        digest.update(repr(example).encode())
    return digest.hexdigest()

  def encoded(self, split: str) -> list[EncodedExample]:
    """Returns a split's examples as ids."""
    return [
      encode(
        e.context,
        e.target.tokens,
        e.emotion,
        self.vocabulary,
        self.shapes[-1],
        e.feedback.tokens if e.feedback else (),
      )
      for e in self.examples[split]
    ]


def emotional_table(vocabulary: Vocabulary, lexicon: Lexicon) -> np.ndarray:
  """Tells of every word, by itself, whether it is emotional, `[V]`.

  For text that is made of ids: no tagger has seen its sentences.
  """
  return np.array(
    [
      token in vocabulary.ids and lexicon_lib.is_emotional([token], lexicon)[0]
      for token in vocabulary.tokens
    ]
  )


def load_dataset(
  config: DataConfig,
  vocabulary: Vocabulary | None = None,
  lexicon: Lexicon | None = None,
  emotions: tuple[str, ...] | None = None,
) -> Dataset:
  """Builds the dataset, or reads what an earlier call has built.

  Args:
    config: What to read and how.
    vocabulary: A run's vocabulary, to use instead of building one.
    lexicon: An export's lexicon, to use instead of reading one.
    emotions: A run's emotion labels, to use instead of reading them.

  Returns:
    The dataset.

  Raises:
    InputError: Something the config names cannot be read or is malformed.
  """
  data_dir = pathlib.Path(config.data_dir or storage.cache_dir() / "datasets")
  try:
    data_dir.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise InputError(
      f"config.data.data_dir: cannot write {str(data_dir)!r} ({error})"
    ) from error
  corpus = corpora.find_corpus(config, emotions)
  if lexicon is None:
    lexicon = lexicon_lib.load_lexicon(config.lexicon)
  if config.source != "official":  # Only a download takes long.
    tfds.disable_progress_bar()
  try:
    builder = _open_builder(config.source, data_dir, corpus)
    try:
      with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints as it goes.
        builder.download_and_prepare(
          download_config=tfds.download.DownloadConfig(
            force_checksums_validation=True
          )
        )
    except FileExistsError:  # Another process was faster.
      builder = _open_builder(config.source, data_dir, corpus)
    raw = {
      split: _read_conversations(builder, split) for split in corpus.splits
    }
  except InputError:
    raise
  except Exception as error:  # TFDS and its readers have no common class.
    raise InputError(
      f"config.data.source: {config.source!r} could not be prepared in "
      f"{data_dir} ({error})"
    ) from error
  dialogues = _annotate(
    raw, builder.builder_config.name, data_dir, lexicon, corpus
  )
  split_examples = {
    split: examples.build_examples(dialogues[split], config.example_set)
    for split in raw
  }
  for split, members in split_examples.items():
    if not members:
      raise InputError(
        f"{config.source}: {split} has no example; a split needs a dialogue "
        "of at least four turns"
        + " besides its last two conversations"
        * corpus.joins_situations
      )
  if vocabulary is None:
    scope = ("train",) if config.vocab_scope == "train" else raw
    vocabulary = vocab.build_vocabulary(
      utterance
      for split in scope
      for utterance in examples.utterances(split_examples[split])
    )
  return Dataset(
    vocabulary=vocabulary,
    lexicon=lexicon,
    corpus=corpus,
    examples=split_examples,
    conversations={split: len(members) for split, members in raw.items()},
    utterances={
      split: sum(len(c.utterances) for c in members)
      for split, members in raw.items()
    },
    shapes=padded_shapes(config),
  )


def _open_builder(
  source: str, data_dir: pathlib.Path, corpus: Corpus
) -> empathetic_dialogues.EmpatheticDialogues:
  return empathetic_dialogues.EmpatheticDialogues(
    source=source, data_dir=data_dir, emotions=corpus.emotions
  )


def _read_conversations(
  builder: empathetic_dialogues.EmpatheticDialogues, split: str
) -> list[empathetic_dialogues.Conversation]:
  return [
    empathetic_dialogues.Conversation(
      id=record["id"].decode(),
      emotion=int(record["emotion"]),
      situation=record["situation"].decode(),
      utterances=tuple(u.decode() for u in record["utterances"]),
      speakers=tuple(int(s) for s in record["speakers"]),
    )
    for record in builder.as_data_source(split=split)
  ]


def _annotate(
  raw: dict[str, list[empathetic_dialogues.Conversation]],
  name: str,
  data_dir: pathlib.Path,
  lexicon: Lexicon,
  corpus: Corpus,
) -> dict[str, list[Dialogue]]:
  """Tokenises the dialogues and marks emotional words, once for each lexicon.

  This takes half a minute on the real dataset, so the result is kept in a
  file beside it, named by the dataset, the lexicon and the rules.
  """
  hashes = lexicon_lib.hashes_of(lexicon)
  digest = hashlib.sha256(hashes.tobytes()).hexdigest()[:16]
  path = data_dir / "tokenized" / f"{name}-{digest}-v{_RULES_VERSION}.json.gz"
  if path.exists():
    try:
      with gzip.open(path, "rt", encoding="utf-8") as file:
        return {
          split: [_from_json(d) for d in dialogues]
          for split, dialogues in json.load(file).items()
        }
    except (OSError, EOFError, ValueError, zlib.error) as error:
      raise InputError(
        f"{path}: damaged ({error}); delete it and it is made again"
      ) from error
  joined = {s: examples.join_dialogues(c, corpus) for s, c in raw.items()}
  tokenizer = text.Tokenizer()
  dialogues: dict[str, list[Dialogue]] = {}
  for split, members in joined.items():
    dialogues[split] = [
      Dialogue(
        dialogue.id,
        dialogue.emotion,
        tuple(
          examples.annotate(u, tokenizer, lexicon) for u in dialogue.utterances
        ),
      )
      for dialogue in rich.progress.track(
        members, f"Tokenising {split}", transient=True
      )
    ]
  path.parent.mkdir(exist_ok=True)
  with (
    storage.atomic_path(path) as temporary,
    gzip.open(temporary, "wt", encoding="utf-8", compresslevel=1) as file,
  ):
    json.dump(
      {s: [_to_json(d) for d in members] for s, members in dialogues.items()},
      file,
    )
  return dialogues


def _to_json(dialogue: Dialogue) -> list[object]:
  turns = [
    [" ".join(turn.tokens), "".join("01"[flag] for flag in turn.emotional)]
    for turn in dialogue.turns
  ]
  return [dialogue.id, dialogue.emotion, turns]


def _from_json(value: list) -> Dialogue:
  identifier, emotion, turns = value
  return Dialogue(
    identifier,
    emotion,
    tuple(
      Utterance(
        tuple(tokens.split(" ")) if tokens else (),
        tuple(flag == "1" for flag in flags),
      )
      for tokens, flags in turns
    ),
  )
