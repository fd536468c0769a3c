"""The report on a dataset that `empdg prepare` prints."""

from collections import Counter
from collections.abc import Callable
from functools import partial

import numpy as np
from rich.console import Console
from rich.table import Table

from empdg_jax.config import Config
from empdg_jax.data import vectors
from empdg_jax.data.pipeline import BatchPlan, EncodedExample, Shape
from empdg_jax.data.prepare import Dataset
from empdg_jax.data.vocab import SPECIAL_TOKENS, UNK


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
  splits = dataset.corpus.splits
  table = Table("", *splits, title="Dataset")
  for column in table.columns[1:]:
    column.justify = "right"

  def row(name: str, cell: Callable[[str], str]) -> None:
    table.add_row(name, *map(cell, splits))

  def mean(part: str, split: str) -> str:
    # Every part has one special token: CLS, LAB or EOS.
    lengths = [len(getattr(e, part)) - 1 for e in encoded[split]]
    return f"{np.mean(lengths):.1f}"

  def unknown(split: str) -> str:
    ids = [i for e in encoded[split] for i in (*e.context[1:], *e.target[:-1])]
    return f"{ids.count(UNK) / len(ids):.2%}"

  def cut(part: int, split: str) -> str:
    return f"{sum(e.cut[part] for e in encoded[split]):,}"

  row("conversations", lambda split: f"{dataset.conversations[split]:,}")
  row("utterances", lambda split: f"{dataset.utterances[split]:,}")
  row("examples", lambda split: f"{len(dataset.examples[split]):,}")
  row("context tokens, mean", partial(mean, "context"))
  row("emotional words, mean", partial(mean, "emotion_context"))
  row("target tokens, mean", partial(mean, "target"))
  row("unknown tokens (UNK)", unknown)
  for part, name in enumerate(("context", "emotional", "target", "feedback")):
    row(f"{name} tokens cut", partial(cut, part))
  return table


def _padding_table(
  waste: dict[Shape, tuple[int, float, float]], batch_size: int
) -> Table:
  table = Table(
    "context", "emotional", "target", "batches", "context padding",
    "target padding",
    title=f"Padded lengths, an epoch in batches of {batch_size}",
  )  # fmt: skip
  for column in table.columns:
    column.justify = "right"
  *rows, (_, (all_batches, all_context, all_target)) = waste.items()
  for (*lengths, _), (batches, context, target) in rows:
    # Without the feedback's length, which is the same for all shapes.
    table.add_row(
      *map(str, lengths), f"{batches:,}", f"{context:.0%}", f"{target:.0%}"
    )
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
    f"Emotions in train, {len(shares)} of {len(emotions)}: from {shares[0]} to "
    f"{shares[-1]}"
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
