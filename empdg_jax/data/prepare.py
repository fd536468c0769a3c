"""A dataset prepared from its source: examples, vocabulary, lexicon."""

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import io
import json
import pathlib

import numpy as np
import rich.progress
import tensorflow_datasets as tfds

from empdg_jax import storage
from empdg_jax.config import TEXT_RULES, DataConfig, InputError, text_rules
from empdg_jax.data import corpora, empathetic_dialogues, examples, vocab
from empdg_jax.data import lexicon as lexicon_lib
from empdg_jax.data.corpora import Conversation, Corpus
from empdg_jax.data.examples import Dialogue, Example, Utterance
from empdg_jax.data.lexicon import Lexicon
from empdg_jax.data.pipeline import EncodedExample, Shape, encode, padded_shapes
from empdg_jax.data.vocab import Vocabulary


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A prepared dataset.

  Attributes:
    vocabulary: Tokens and their ids.
    lexicon: The emotion lexicon.
    corpus: The labels, splits, licence and rules.
    examples: The examples of each split.
    conversations: The number of conversations in each split.
    utterances: The number of their turns in each split.
    shapes: The padded lengths, ascending.
    rules: The version of the rules by which its text was read.
  """

  vocabulary: Vocabulary
  lexicon: Lexicon
  corpus: Corpus
  examples: dict[str, list[Example]]
  conversations: dict[str, int]
  utterances: dict[str, int]
  shapes: tuple[Shape, ...]
  rules: int = TEXT_RULES

  def digest(self) -> str:
    """Returns a hash of the vocabulary and of all examples, in order."""
    digest = hashlib.sha256("\n".join(self.vocabulary.tokens).encode())
    # Hosts compare it before the first step: other data on one of them would
    # be averaged into every update unseen.
    for members in self.examples.values():
      for example in members:
        digest.update(repr(example).encode())
    return digest.hexdigest()

  def encoded(self, split: str) -> list[EncodedExample]:
    """Returns a split's examples as ids."""
    return [
      encode(example, self.vocabulary, self.shapes[-1])
      for example in self.examples[split]
    ]


def emotional_table(
  vocabulary: Vocabulary, lexicon: Lexicon, rules: int = TEXT_RULES
) -> np.ndarray:
  """Marks the emotional words of a vocabulary, judged out of context.

  Generated responses need it: they exist only as ids inside a compiled step,
  where no tagger can read their sentences.

  Args:
    vocabulary: The vocabulary.
    lexicon: The emotion lexicon.
    rules: The version of the rules.

  Returns:
    A flag for each id, `[V]` bool.
  """
  return np.array(
    [
      token in vocabulary.ids
      and lexicon_lib.is_emotional([token], lexicon, rules)[0]
      for token in vocabulary.tokens
    ]
  )


def load_dataset(
  config: DataConfig,
  vocabulary: Vocabulary | None = None,
  lexicon: Lexicon | None = None,
  emotions: tuple[str, ...] | None = None,
) -> Dataset:
  """Prepares a dataset, or reads one that an earlier call has prepared.

  Args:
    config: The data settings.
    vocabulary: A run's vocabulary, to use instead of building one.
    lexicon: An export's lexicon, to use instead of reading one.
    emotions: A run's emotion labels, to use instead of reading them.

  Returns:
    The dataset.

  Raises:
    InputError: A file that the configuration names cannot be read or is
      malformed.
  """
  data_dir = storage.cache_dir() / "datasets"
  if config.data_dir:
    data_dir = storage.disk_path(config.data_dir, "config.data.data_dir")
  what = f"config.data.data_dir: cannot write {str(data_dir)!r}"
  with storage.errors(what, InputError):
    data_dir.mkdir(parents=True, exist_ok=True)
  corpus = corpora.find_corpus(config, emotions)
  if lexicon is None:
    lexicon = lexicon_lib.load_lexicon(config.lexicon)
  name, raw = _read_conversations(config, data_dir, corpus)
  dialogues = _annotate(
    raw, name, data_dir, lexicon, corpus, text_rules(config)
  )
  split_examples = {
    split: examples.build_examples(dialogues[split], config.example_set)
    for split in raw
  }
  for split, members in split_examples.items():
    if not members:
      dropped = corpus.dropped_conversations
      raise InputError(
        f"{config.source}: {split} has no example; a split needs a dialogue "
        "of at least four turns"
        + (f" besides its last {dropped} conversations" if dropped else "")
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
    rules=text_rules(config),
  )


def _read_conversations(
  config: DataConfig, data_dir: pathlib.Path, corpus: Corpus
) -> tuple[str, dict[str, list[Conversation]]]:
  """Prepares the raw dataset once, then reads it.

  Returns:
    The prepared dataset's name, and the conversations of each split.
  """
  own_labels = config.emotions != corpora.EMPATHETIC_DIALOGUES
  if own_labels and config.source in ("official", "sample"):
    raise InputError(
      f"config.data.emotions={config.emotions!r}: the source "
      f"{config.source!r} has the labels {corpora.EMPATHETIC_DIALOGUES!r}; "
      "give the path of other data as config.data.source"
    )
  if config.source != "official":  # Only a download takes long.
    tfds.disable_progress_bar()
  create_builder = functools.partial(
    empathetic_dialogues.EmpatheticDialogues,
    source=config.source,
    data_dir=data_dir,
    emotions=corpus.emotions,
  )
  what = f"config.data.source: {config.source!r} could not be prepared in"
  with storage.errors(f"{what} {data_dir}", InputError):
    builder = create_builder()
    try:
      # TFDS prints as it goes. Without this option it would accept a download
      # of which no checksum is registered.
      with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(
          download_config=tfds.download.DownloadConfig(
            force_checksums_validation=True
          )
        )
    except FileExistsError:
      # Another process was faster. Only a new builder sees what it wrote.
      builder = create_builder()
    return builder.builder_config.name, {
      split: [
        Conversation(
          id=record["id"].decode(),
          emotion=int(record["emotion"]),
          situation=record["situation"].decode(),
          utterances=tuple(u.decode() for u in record["utterances"]),
          speakers=tuple(int(s) for s in record["speakers"]),
        )
        for record in builder.as_data_source(split=split)
      ]
      for split in corpus.splits
    }


def _annotate(
  raw: dict[str, list[Conversation]],
  name: str,
  data_dir: pathlib.Path,
  lexicon: Lexicon,
  corpus: Corpus,
  rules: int,
) -> dict[str, list[Dialogue]]:
  """Joins and tokenises conversations and marks their emotional words.

  The result is kept in a file, since the real dataset takes half a minute.
  """
  # The file's name stands for all that the result depends on: the raw data, the
  # lexicon, the corpus's rules and those of the code.
  digest = hashlib.sha256(lexicon_lib.hashes_of(lexicon).tobytes())
  digest.update(
    f"{corpus.dropped_conversations} {corpus.joins_situations}".encode()
  )
  path = data_dir / "tokenized"
  path /= f"{name}-{digest.hexdigest()[:16]}-v{rules}.json.gz"
  if path.exists():
    what = f"{path}: damaged; delete it and it is made again"
    with storage.errors(what, InputError), gzip.open(path, "rb") as file:
      return {
        split: [
          Dialogue(
            name, emotion, tuple(Utterance(*map(tuple, turn)) for turn in turns)
          )
          for name, emotion, turns in dialogues
        ]
        for split, dialogues in json.load(file).items()
      }
  dialogues = {
    split: [
      Dialogue(
        joined.id,
        joined.emotion,
        tuple(examples.annotate(u, lexicon, rules) for u in joined.utterances),
      )
      for joined in rich.progress.track(
        examples.join_dialogues(conversations, corpus),
        f"Tokenising {split}",
        transient=True,
      )
    ]
    for split, conversations in raw.items()
  }
  path.parent.mkdir(exist_ok=True)
  with (
    storage.atomic_path(path) as temporary,
    gzip.open(temporary, "wt", encoding="utf-8", compresslevel=1) as file,
  ):
    json.dump(dialogues, file)  # Named tuples become lists.
  return dialogues
