"""The report on a dataset that `empdg prepare` prints."""

from collections import Counter

import numpy as np
from rich.console import Console
from rich.table import Table

from empdg_jax.config import Config
from empdg_jax.data import vectors
from empdg_jax.data.pipeline import BatchPlan, EncodedExample, Shape
from empdg_jax.data.prepare import Dataset
from empdg_jax.data.vocab import SPECIAL_TOKENS, UNK
from empdg_jax.training import terminal


def padding_waste(
  encoded: list[EncodedExample],
  shapes: tuple[Shape, ...],
  batch_size: int,
  seed: int,
) -> dict[Shape, tuple[int, float, float]]:
  """Measures the padding in one epoch of training.

  Args:
    encoded: The examples.
    shapes: The padded lengths.
    batch_size: The number of examples in a batch.
    seed: The seed of the order.

  Returns:
    By shape, the number of batches and the shares of padding among context
    and among target tokens; under `Shape(0, 0, 0)` those of the whole epoch.
  """
  plan = BatchPlan(encoded, shapes, batch_size)
  total = Shape(0, 0, 0)
  # Batches, then real and padded tokens of contexts and of targets.
  sums = {shape: np.zeros(5, int) for shape in (*shapes, total)}
  for shape, index in plan.shuffled_epoch(seed, 0):
    # The filling rows of a last batch are padding, too: all rows count.
    sizes = [
      1,
      sum(len(encoded[i].context) for i in index),
      batch_size * shape.context,
      sum(len(encoded[i].target) for i in index),
      batch_size * shape.target,
    ]
    sums[shape] += sizes
    sums[total] += sizes
  return {
    shape: (int(batches), 1 - context / padded, 1 - target / padded_target)
    for shape, (batches, context, padded, target, padded_target) in sums.items()
    if batches
  }


def _split_table(
  dataset: Dataset, encoded: dict[str, list[EncodedExample]]
) -> Table:
  columns = [_split_column(dataset, s, e) for s, e in encoded.items()]
  rows = [(name, *(column[name] for column in columns)) for name in columns[0]]
  return terminal.table(("", *encoded), rows, title="Dataset", left=[""])


def _split_column(
  dataset: Dataset, split: str, encoded: list[EncodedExample]
) -> dict[str, str]:
  """Returns the figures of a split by their names."""
  lengths = [(e.context, e.emotion_context, e.target) for e in encoded]
  # Every part has one special token: CLS, LAB or EOS.
  means = np.mean([[len(part) - 1 for part in parts] for parts in lengths], 0)
  ids = [i for e in encoded for i in (*e.context[1:], *e.target[:-1])]
  cut = np.sum([e.cut for e in encoded], 0)
  return {
    "conversations": f"{dataset.conversations[split]:,}",
    "utterances": f"{dataset.utterances[split]:,}",
    "examples": f"{len(dataset.examples[split]):,}",
    "context tokens, mean": f"{means[0]:.1f}",
    "emotional words, mean": f"{means[1]:.1f}",
    "target tokens, mean": f"{means[2]:.1f}",
    "unknown tokens (UNK)": f"{ids.count(UNK) / len(ids):.2%}",
    "context tokens cut": f"{cut[0]:,}",
    "emotional tokens cut": f"{cut[1]:,}",
    "target tokens cut": f"{cut[2]:,}",
    "feedback tokens cut": f"{cut[3]:,}",
  }


def _padding_table(
  waste: dict[Shape, tuple[int, float, float]], batch_size: int
) -> Table:
  *shapes, (_, (all_batches, all_context, all_target)) = waste.items()
  rows = [
    # Without the feedback's length, which is the same for all shapes.
    (*map(str, lengths), f"{batches:,}", f"{context:.0%}", f"{target:.0%}")
    for (*lengths, _), (batches, context, target) in shapes
  ]
  header = "context,emotion,target,batches,context padding,target padding"
  title = f"Padded lengths, an epoch in batches of {batch_size}"
  table = terminal.table(header.split(","), rows, title=title)
  table.add_section()
  table.add_row(
    "", "", "all", f"{all_batches:,}", f"{all_context:.1%}", f"{all_target:.1%}"
  )
  return table


def print_report(dataset: Dataset, config: Config, console: Console) -> None:
  """Prints counts, lengths, balance, coverage, truncation and padding.

  Args:
    dataset: The prepared dataset.
    config: The configuration that it was prepared with.
    console: The console to print on.
  """
  splits, emotions = dataset.corpus.splits, dataset.corpus.emotions
  encoded = {split: dataset.encoded(split) for split in splits}
  console.print(_split_table(dataset, encoded))

  counts = Counter(e.emotion for e in encoded["train"])
  shares = [
    f"{emotions[e]} {n / len(encoded['train']):.1%}"
    for e, n in counts.most_common()
  ]
  console.print(
    terminal.text(
      f"Emotions in train, {len(shares)} of {len(emotions)}: from {shares[0]} "
      f"to {shares[-1]}"
    )
  )
  words = len(dataset.vocabulary) - len(SPECIAL_TOKENS)
  console.print(
    f"Vocabulary ({config.data.vocab_scope}): {words:,} words; lexicon: "
    f"{len(dataset.lexicon):,} words"
  )
  if config.data.vectors:
    _, coverage = vectors.load_vectors(
      config.data.vectors,
      dataset.vocabulary,
      config.model.emb_dim,
      np.random.default_rng(config.train.seed),
    )
    console.print(f"Word vectors: {coverage:.1%} of the vocabulary")
  else:
    console.print("Word vectors: none (config.data.vectors is empty)")

  batch_size = config.train.batch_size
  waste = padding_waste(
    encoded["train"], dataset.shapes, batch_size, config.train.seed
  )
  console.print(_padding_table(waste, batch_size))
