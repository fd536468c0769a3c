"""What `empdg prepare` prints about a dataset."""

from collections import Counter

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
  """Measures one training epoch's padding.

  Args:
    encoded: The examples.
    shapes: The padded lengths.
    batch_size: Examples in a batch.
    seed: Of the order.

  Returns:
    By shape, the number of batches and the shares of padding among context
    and among target tokens; under `Shape(0, 0, 0)` those of the whole epoch.
  """
  plan = BatchPlan(encoded, shapes, batch_size)
  real: Counter[tuple[Shape, str]] = Counter()
  batches: Counter[Shape] = Counter()
  total = Shape(0, 0, 0)
  padded: Counter[tuple[Shape, str]] = Counter()
  for shape, index in plan.shuffled_epoch(seed, 0):
    for key in (shape, total):
      batches[key] += 1
      real[key, "context"] += sum(len(encoded[i].context) for i in index)
      real[key, "target"] += sum(len(encoded[i].target) for i in index)
      padded[key, "context"] += batch_size * shape.context
      padded[key, "target"] += batch_size * shape.target
  return {
    shape: (
      batches[shape],
      1 - real[shape, "context"] / padded[shape, "context"],
      1 - real[shape, "target"] / padded[shape, "target"],
    )
    for shape in (*(s for s in shapes if s in batches), total)
  }


def _split_table(
  dataset: Dataset, encoded: dict[str, list[EncodedExample]]
) -> Table:
  splits = dataset.corpus.splits
  table = Table("", *splits, title="Dataset")
  for column in table.columns[1:]:
    column.justify = "right"

  def row(name: str, values: list[str]) -> None:
    table.add_row(name, *values)

  def mean(split: str, part: str) -> float:
    return float(np.mean([len(getattr(e, part)) for e in encoded[split]]))

  def unknown(split: str) -> float:
    ids = [i for e in encoded[split] for i in (*e.context[1:], *e.target[:-1])]
    return ids.count(UNK) / len(ids)

  def cut(split: str, part: int) -> int:
    return sum(e.cut[part] for e in encoded[split])

  row("conversations", [f"{dataset.conversations[s]:,}" for s in splits])
  row("utterances", [f"{dataset.utterances[s]:,}" for s in splits])
  row("examples", [f"{len(dataset.examples[s]):,}" for s in splits])
  for name, part in (
    ("context tokens, mean", "context"),
    ("emotional words, mean", "emotion_context"),
    ("target tokens, mean", "target"),
  ):
    row(name, [f"{mean(s, part) - 1:.1f}" for s in splits])
  row("unknown tokens (UNK)", [f"{unknown(s):.2%}" for s in splits])
  for part, name in enumerate(("context", "emotional", "target", "feedback")):
    row(f"{name} tokens cut", [f"{cut(s, part):,}" for s in splits])
  return table


def print_report(dataset: Dataset, config: Config, console: Console) -> None:
  """Prints counts, lengths, balance, coverage, cuts and padding.

  Args:
    dataset: The prepared dataset.
    config: What it was prepared with.
    console: Where to print.
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
  table = Table(
    "context", "emotional", "target", "batches", "context padding",
    "target padding",
    title=f"Padded lengths, an epoch in batches of {batch_size}",
  )  # fmt: skip
  for column in table.columns:
    column.justify = "right"
  *rows, (_, overall) = waste.items()
  for shape, (batches, context, target) in rows:
    table.add_row(
      *(str(n) for n in shape),
      f"{batches:,}",
      f"{context:.0%}",
      f"{target:.0%}",
    )
  table.add_section()
  table.add_row(
    "", "", "all", f"{overall[0]:,}", f"{overall[1]:.1%}", f"{overall[2]:.1%}"
  )
  console.print(table)
