"""Examples as ids, and their batches: few shapes, one global order (Grain)."""

import functools
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from empdg_jax.config import DataConfig
from empdg_jax.data import vocab
from empdg_jax.data.examples import Example
from empdg_jax.data.vocab import Vocabulary

Array = Any  # NumPy's in the pipeline, JAX's inside compiled steps.


class Shape(NamedTuple):
  """The padded lengths of a batch.

  The first three decide which shape an example gets. The feedback's length is
  the same for all shapes, and 1 where nothing reads the feedback.
  """

  context: int
  emotion: int
  target: int
  feedback: int = 1


class EncodedExample(NamedTuple):
  """One example as ids.

  Attributes:
    context: `CLS x1 .. xm`, the latest tokens if some had to be cut.
    state: The dialogue state of each context token: CLS, USR or SYS.
    emotion_context: `LAB w1 .. we`.
    target: `y1 .. yn EOS`.
    feedback: The user's next turn; empty if there is none.
    emotion: The emotion label.
    words: The context's tokens as text, to copy unknown words.
    emotion_words: The emotional context's tokens as text.
    cut: The numbers of tokens cut from context, emotional context, target and
      feedback.
  """

  context: list[int]
  state: list[int]
  emotion_context: list[int]
  target: list[int]
  feedback: list[int]
  emotion: int
  words: tuple[str, ...]
  emotion_words: tuple[str, ...]
  cut: tuple[int, int, int, int]


class Batch(NamedTuple):
  """A batch of B examples padded to one `Shape` (M, E, N, F).

  Attributes:
    context: Context ids, `[B, M]` int32.
    state: Dialogue-state ids, `[B, M]` int32.
    emotion_context: Emotional context ids, `[B, E]` int32.
    target: Target ids, `[B, N]` int32.
    feedback: Feedback ids, `[B, F]` int32; all PAD where there is none.
    emotion: Emotion labels, `[B]` int32.
    mask: 1 for an example, 0 for filling, `[B]` float32.
    position: Position in the global batch, `[B]` int32.
    index: Position of the example in its split, `[B]` int32.
  """

  context: Array
  state: Array
  emotion_context: Array
  target: Array
  feedback: Array
  emotion: Array
  mask: Array
  position: Array
  index: Array


def shape_of(batch: Batch) -> Shape:
  """Returns the padded lengths of a batch."""
  parts = batch.context, batch.emotion_context, batch.target, batch.feedback
  return Shape(*(part.shape[-1] for part in parts))


def padded_shapes(config: DataConfig) -> tuple[Shape, ...]:
  """Returns the configured shapes, ascending."""
  return tuple(Shape(*s, config.feedback_length) for s in config.shapes)


def encode(
  example: Example, vocabulary: Vocabulary, longest: Shape
) -> EncodedExample:
  """Turns one example into ids, cut to the longest lengths.

  Args:
    example: The example.
    vocabulary: The ids of tokens.
    longest: The lengths that no part may exceed.

  Returns:
    The example's ids.
  """
  turns = [
    (token, vocab.SYS if turn % 2 else vocab.USR, emotional)
    for turn, utterance in enumerate(example.context)
    for token, emotional in zip(
      utterance.tokens, utterance.emotional, strict=True
    )
  ]
  # The latest turns matter most to the response, so the oldest tokens go. One
  # position of each length belongs to CLS, LAB or EOS.
  kept = turns[max(0, len(turns) - longest.context + 1) :]
  emotional = [token for token, _, flag in kept if flag]
  emotion_words = emotional[max(0, len(emotional) - longest.emotion + 1) :]
  target = example.target.tokens
  kept_target = target[: longest.target - 1]
  feedback = example.feedback.tokens if example.feedback else ()
  kept_feedback = feedback[: longest.feedback]
  words = tuple(token for token, _, _ in kept)
  return EncodedExample(
    context=[vocab.CLS, *vocabulary.encode(words)],
    state=[vocab.CLS, *(state for _, state, _ in kept)],
    emotion_context=[vocab.LAB, *vocabulary.encode(emotion_words)],
    target=[*vocabulary.encode(kept_target), vocab.EOS],
    feedback=vocabulary.encode(kept_feedback),
    emotion=example.emotion,
    words=words,
    emotion_words=tuple(emotion_words),
    cut=(
      len(turns) - len(kept),
      len(emotional) - len(emotion_words),
      len(target) - len(kept_target),
      len(feedback) - len(kept_feedback),
    ),
  )


def collate(
  encoded: Sequence[EncodedExample],
  index: np.ndarray,
  shape: Shape,
  batch_size: int,
  rows: slice = slice(None),
) -> Batch:
  """Pads examples to one shape.

  Args:
    encoded: All examples of the split.
    index: The examples of the global batch, at most `batch_size`.
    shape: The padded lengths.
    batch_size: The global batch size B.
    rows: The rows of the global batch that this host needs.

  Returns:
    This host's rows of the batch. Rows without an example have mask 0.
  """
  position = np.arange(batch_size, dtype=np.int32)[rows]
  mask = (position < len(index)).astype(np.float32)
  # Filling repeats examples: a row of PAD alone would be a softmax over
  # nothing, and its NaN would survive the mask (0 * NaN).
  index = np.resize(index, batch_size).astype(np.int32)[rows]
  chosen = [encoded[i] for i in index]

  def pad(sequences: Iterator[list[int]], length: int) -> np.ndarray:
    array = np.full((len(chosen), length), vocab.PAD, np.int32)
    for row, ids in zip(array, sequences, strict=True):
      row[: len(ids)] = ids
    return array

  return Batch(
    context=pad((e.context for e in chosen), shape.context),
    state=pad((e.state for e in chosen), shape.context),
    emotion_context=pad((e.emotion_context for e in chosen), shape.emotion),
    target=pad((e.target for e in chosen), shape.target),
    feedback=pad((e.feedback for e in chosen), shape.feedback),
    emotion=np.array([e.emotion for e in chosen], np.int32),
    mask=mask,
    position=position,
    index=index,
  )


def blank_batch(shape: Shape, batch_size: int) -> Batch:
  """Returns a batch of nothing but filling, which is enough to compile for."""
  nothing = EncodedExample([], [], [], [], [], 0, (), (), (0, 0, 0, 0))
  return collate([nothing], np.zeros(1, int), shape, batch_size)


class BatchPlan:
  """The order of global batches: a function of seed and epoch alone."""

  def __init__(
    self,
    encoded: Sequence[EncodedExample],
    shapes: Sequence[Shape],
    batch_size: int,
  ) -> None:
    """Assigns every example to the cheapest shape that holds it.

    Args:
      encoded: The examples.
      shapes: The padded lengths; the last one holds every example.
      batch_size: Examples in a global batch.
    """
    self._shapes = tuple(shapes)
    self._batch_size = batch_size
    lengths = np.array(
      [(len(e.context), len(e.emotion_context), len(e.target)) for e in encoded]
    )
    # XLA compiles a step for each shape, so batches take one of a few lengths.
    # Shapes ascend in cost, and an example goes to the first that fits.
    longest = np.array([shape[:3] for shape in shapes])
    self._fits = np.all(lengths[:, None] <= longest, axis=-1)
    # -> [examples, shapes]

  @property
  def batches_per_epoch(self) -> int:
    """The number of batches in an epoch, the same in every epoch."""
    # `epoch` fills all batches but the last, whatever the order.
    return -(-len(self._fits) // self._batch_size)

  def epoch(self, order: np.ndarray) -> list[tuple[Shape, np.ndarray]]:
    """Cuts the examples, taken in `order`, into batches of one shape.

    Args:
      order: Indices of the examples.

    Returns:
      The shape and the examples of each batch, the shapes in ascending order.
    """
    batches = []
    first = self._fits[order].argmax(axis=1)
    pools = [list(order[first == s]) for s in range(len(self._shapes))]
    for s, (shape, pool) in enumerate(zip(self._shapes, pools, strict=True)):
      last = s + 1 == len(self._shapes)
      full = len(pool) if last else len(pool) - len(pool) % self._batch_size
      batches += [
        (shape, np.array(pool[start : min(start + self._batch_size, full)]))
        for start in range(0, full, self._batch_size)
      ]
      # The rest moves on to the next shape that holds it: padding a few
      # examples further is cheaper than a partly filled batch of each shape.
      for example in pool[full:]:
        pools[s + 1 + self._fits[example, s + 1 :].argmax()].append(example)
    return batches

  def shuffled_epoch(
    self, seed: int, epoch: int, batches_per_run: int = 1
  ) -> list[tuple[Shape, np.ndarray]]:
    """Returns an epoch's batches: the examples shuffled, the shapes mixed.

    The batches of each shape are spread evenly over the epoch.

    Args:
      seed: The seed of the order.
      epoch: The number of the epoch.
      batches_per_run: The number of batches of one shape that stay neighbours;
        a shape's last run may be shorter.
    """
    rng = np.random.default_rng((seed, epoch))
    batches = self.epoch(rng.permutation(len(self._fits)))
    runs = [
      run
      for _, of_shape in itertools.groupby(batches, key=lambda batch: batch[0])
      for run in _runs(list(of_shape), batches_per_run)
    ]
    # Long stretches of short responses, then of long ones, would drag the model
    # back and forth. So the k-th of a shape's n runs gets a random time within
    # the k-th of n equal stretches, and the times give the order.
    counts = Counter(run[0][0] for run in runs)
    seen: Counter[Shape] = Counter()
    times = []
    for (shape, _), *_ in runs:
      times.append((seen[shape] + rng.random()) / counts[shape])
      seen[shape] += 1
    order = np.argsort(times, kind="stable")
    return [batch for i in order for batch in runs[i]]


def _runs(batches: list[Any], length: int) -> list[list[Any]]:
  """Cuts batches into runs of a length; the last may be shorter."""
  return [
    batches[start : start + length] for start in range(0, len(batches), length)
  ]


def host_rows(batch_size: int, host: int, num_hosts: int) -> slice:
  """Returns the rows of a global batch that one host reads."""
  return slice(
    batch_size * host // num_hosts, batch_size * (host + 1) // num_hosts
  )


def shuffle_feedback(
  encoded: Sequence[EncodedExample], seed: int
) -> list[EncodedExample]:
  """Gives each example with feedback that of another one, by a permutation."""
  having = [i for i, example in enumerate(encoded) if example.feedback]
  order = np.random.default_rng(seed).permutation(having)
  # A rotation of the random order: none keeps its own.
  others = dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))
  return [
    example._replace(feedback=encoded[others[i]].feedback)
    if i in others
    else example
    for i, example in enumerate(encoded)
  ]


def train_batches(
  encoded: Sequence[EncodedExample],
  shapes: Sequence[Shape],
  *,
  batch_size: int,
  seed: int,
  rows: slice = slice(None),
  batches_per_run: int = 1,
) -> grain.DatasetIterator:
  """Returns an endless, checkpointable iterator over training batches.

  Args:
    encoded: The examples.
    shapes: The padded lengths; the last holds every example.
    batch_size: The global batch size.
    seed: The seed of the order.
    rows: The rows of each global batch that this host needs.
    batches_per_run: See `BatchPlan.shuffled_epoch`.

  Returns:
    An iterator of `Batch`. `get_state` gives its position, a JSON value that
    does not depend on the hosts.
  """
  plan = BatchPlan(encoded, shapes, batch_size)
  # Two epochs: at the border, prefetching reads the next one while the last
  # batches of this one are still asked for.
  ordered = functools.lru_cache(2)(plan.shuffled_epoch)

  def batch_at(step: int) -> Batch:
    epoch, position = divmod(step, plan.batches_per_epoch)
    shape, index = ordered(seed, epoch, batches_per_run)[position]
    return collate(encoded, index, shape, batch_size, rows)

  # Grain needs a length; no run lasts a million epochs.
  dataset = grain.MapDataset.range(plan.batches_per_epoch * 1_000_000)
  return iter(
    dataset.map(batch_at).to_iter_dataset(
      # A single thread: collating is cheap, and more would compete with XLA's.
      grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)
    )
  )


def coarse_shapes(shapes: Sequence[Shape]) -> tuple[Shape, ...]:
  """Returns every third shape, the longest among them.

  Steps that are few or take long to compile use these: all but maximum
  likelihood's.
  """
  # From the end, because the last shape alone holds every example.
  return tuple(shapes[::-3][::-1])


def eval_batches(
  encoded: Sequence[EncodedExample],
  shapes: Sequence[Shape],
  *,
  batch_size: int,
  rows: slice = slice(None),
) -> Iterator[Batch]:
  """Yields batches that hold every example once; filling has mask 0."""
  plan = BatchPlan(encoded, shapes, batch_size)
  for shape, index in plan.epoch(np.arange(len(encoded))):
    yield collate(encoded, index, shape, batch_size, rows)
