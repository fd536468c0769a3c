"""Encoding and batching; the vocabulary, vectors and configuration they use."""

import gzip
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoded import SHAPES, invented

from empdg_jax import config as config_lib
from empdg_jax import storage
from empdg_jax.config import Config, InputError
from empdg_jax.data import pipeline, vectors, vocab
from empdg_jax.data.examples import Example, Utterance
from empdg_jax.data.pipeline import Batch, BatchPlan, EncodedExample, Shape
from empdg_jax.data.prepare import Dataset
from empdg_jax.data.vocab import SPECIAL_TOKENS, Vocabulary

VOCABULARY = Vocabulary((*SPECIAL_TOKENS, "a", "b", "c", "d"))  # a is 8.


def indices(batches: Iterable[Batch]) -> list[int]:
  """The indices of batches' examples, without filling."""
  return [int(i) for b in batches for i in b.index[b.mask == 1]]


def take(iterator: Any, count: int) -> list[Batch]:
  return list(itertools.islice(iterator, count))


def assert_same(batches: Sequence[Batch], others: Sequence[Batch]) -> None:
  assert len(batches) == len(others)
  for batch, other in zip(batches, others, strict=True):
    for name, array in batch._asdict().items():
      np.testing.assert_array_equal(array, getattr(other, name), err_msg=name)


# Encoding.

CONTEXT = (
  Utterance(("a", "b"), (False, True)),
  Utterance(("c",), (True,)),
  Utterance(("z", "d"), (False, False)),
)


def encode(
  context: tuple[Utterance, ...],
  target: tuple[str, ...],
  emotion: int,
  vocabulary: Vocabulary,
  longest: Shape,
  feedback: tuple[str, ...] = (),
) -> EncodedExample:
  """Encodes an example of these parts."""
  example = Example(
    "",
    emotion,
    context,
    Utterance(target, (False,) * len(target)),
    Utterance(feedback, (False,) * len(feedback)),
  )
  return pipeline.encode(example, vocabulary, longest)


def test_special_tokens_have_the_ids_0_to_7() -> None:
  assert " ".join(SPECIAL_TOKENS) == "UNK PAD EOS SOS USR SYS CLS LAB"
  assert (vocab.UNK, vocab.PAD, vocab.EOS, vocab.SOS) == (0, 1, 2, 3)
  assert (vocab.USR, vocab.SYS, vocab.CLS, vocab.LAB) == (4, 5, 6, 7)


def test_encode() -> None:
  encoded = encode(
    CONTEXT, ("a", "y"), 3, VOCABULARY, Shape(9, 9, 9, 3), ("b", "q", "a")
  )

  assert encoded == EncodedExample(
    context=[6, 8, 9, 10, 0, 11],
    state=[6, 4, 4, 5, 4, 4],
    emotion_context=[7, 9, 10],
    target=[8, 0, 2],
    feedback=[9, 0, 8],
    emotion=3,
    words=("a", "b", "c", "z", "d"),
    emotion_words=("b", "c"),
    cut=(0, 0, 0, 0),
  )


def test_encode_without_emotional_words() -> None:
  encoded = encode(CONTEXT[2:], (), 0, VOCABULARY, Shape(9, 9, 9))

  assert encoded.emotion_context == [7]
  assert encoded.emotion_words == ()
  assert encoded.target == [2]
  assert encoded.feedback == []


def test_encode_keeps_what_just_fits() -> None:
  encoded = encode(CONTEXT, ("a", "b"), 0, VOCABULARY, Shape(6, 3, 3))

  assert encoded.cut == (0, 0, 0, 0)
  assert encoded.context == [6, 8, 9, 10, 0, 11]


def test_encode_cuts_the_oldest_of_the_context() -> None:
  encoded = encode(CONTEXT, ("a",), 0, VOCABULARY, Shape(4, 9, 9))

  assert encoded.context == [6, 10, 0, 11]
  assert encoded.state == [6, 5, 4, 4]
  assert encoded.words == ("c", "z", "d")
  assert encoded.emotion_words == ("c",)
  assert encoded.cut[0] == 2


def test_encode_cuts_the_oldest_emotional_words() -> None:
  encoded = encode(CONTEXT, ("a",), 0, VOCABULARY, Shape(9, 2, 9))

  assert encoded.emotion_context == [7, 10]
  assert encoded.emotion_words == ("c",)
  assert encoded.cut == (0, 1, 0, 0)


def test_encode_cuts_the_end_of_the_target() -> None:
  encoded = encode(CONTEXT, ("d", "c", "b", "a"), 0, VOCABULARY, Shape(9, 9, 3))

  assert encoded.target == [11, 10, 2]
  assert encoded.cut == (0, 0, 2, 0)


def test_encode_cuts_the_end_of_the_feedback() -> None:
  encoded = encode(
    CONTEXT, ("a",), 0, VOCABULARY, Shape(9, 9, 9, 2), ("d", "c", "b")
  )

  assert encoded.feedback == [11, 10]
  assert encoded.cut == (0, 0, 0, 1)


# Collating.


def test_collate() -> None:
  """Three examples in a batch of four, the fourth row filling."""
  encoded = [
    encode(
      CONTEXT[:n],
      ("a",) * n,
      n,
      VOCABULARY,
      Shape(9, 9, 9, 2),
      ("d",) * (n - 1),
    )
    for n in (1, 2, 3)
  ]

  batch = pipeline.collate(encoded, np.array([2, 0, 1]), Shape(6, 4, 5, 2), 4)

  np.testing.assert_array_equal(
    batch.context[:3],
    [[6, 8, 9, 10, 0, 11], [6, 8, 9, 1, 1, 1], [6, 8, 9, 10, 1, 1]],
  )
  np.testing.assert_array_equal(
    batch.state[:3],
    [[6, 4, 4, 5, 4, 4], [6, 4, 4, 1, 1, 1], [6, 4, 4, 5, 1, 1]],
  )
  np.testing.assert_array_equal(
    batch.emotion_context[:3], [[7, 9, 10, 1], [7, 9, 1, 1], [7, 9, 10, 1]]
  )
  np.testing.assert_array_equal(
    batch.target[:3], [[8, 8, 8, 2, 1], [8, 2, 1, 1, 1], [8, 8, 2, 1, 1]]
  )
  np.testing.assert_array_equal(batch.feedback[:3], [[11, 11], [1, 1], [11, 1]])
  np.testing.assert_array_equal(batch.emotion[:3], [3, 1, 2])
  np.testing.assert_array_equal(batch.mask, [1, 1, 1, 0])
  np.testing.assert_array_equal(batch.position, [0, 1, 2, 3])
  np.testing.assert_array_equal(batch.index[:3], [2, 0, 1])
  # The filling is an example of the batch, so that nothing is undefined.
  assert batch.index[3] in (0, 1, 2)
  source = [2, 0, 1].index(batch.index[3])
  np.testing.assert_array_equal(batch.context[3], batch.context[source])
  assert batch.mask.dtype == np.float32
  others = [a for name, a in batch._asdict().items() if name != "mask"]
  assert {array.dtype for array in others} == {np.dtype(np.int32)}


def test_collate_of_a_host_without_an_example() -> None:
  batch = pipeline.collate(
    invented(3), np.array([1]), SHAPES[-1], 8, slice(4, 8)
  )

  np.testing.assert_array_equal(batch.mask, [0, 0, 0, 0])
  np.testing.assert_array_equal(batch.position, [4, 5, 6, 7])
  np.testing.assert_array_equal(batch.index, [1, 1, 1, 1])


@pytest.mark.parametrize("hosts", [1, 2, 3, 8])
def test_host_rows_make_up_the_batch(hosts: int) -> None:
  rows = [
    row
    for host in range(hosts)
    for row in range(8)[pipeline.host_rows(8, host, hosts)]
  ]

  assert rows == list(range(8))


# The order of batches.


@pytest.mark.parametrize("count", [1, 8, 30, 37])
def test_an_epoch_has_every_example_once(count: int) -> None:
  encoded = invented(count)
  per_epoch = BatchPlan(encoded, SHAPES, 8).batches_per_epoch
  batches = pipeline.train_batches(encoded, SHAPES, batch_size=8, seed=1)

  assert per_epoch == -(-count // 8)
  for _ in range(3):
    assert sorted(indices(take(batches, per_epoch))) == list(range(count))


@pytest.mark.parametrize("count", [1, 8, 30, 37])
def test_evaluation_has_every_example_once(count: int) -> None:
  batches = list(pipeline.eval_batches(invented(count), SHAPES, batch_size=8))

  assert sorted(indices(batches)) == list(range(count))
  assert all(len(batch.mask) == 8 for batch in batches)
  assert all(batch.mask.all() for batch in batches[:-1])


def test_batches_hold_their_examples_uncut() -> None:
  """Every batch has one of the configured shapes, too."""
  encoded = invented(60)
  training = pipeline.train_batches(encoded, SHAPES, batch_size=8, seed=1)
  evaluation = pipeline.eval_batches(encoded, SHAPES, batch_size=8)

  seen = set()
  for batch in (*take(training, 16), *evaluation):
    parts = (batch.context, batch.emotion_context, batch.target)
    seen.add(tuple(part.shape[1] for part in parts))
    for row, i in enumerate(batch.index):
      for part, ids in zip(
        (*parts, batch.state),
        (
          encoded[i].context,
          encoded[i].emotion_context,
          encoded[i].target,
          encoded[i].state,
        ),
        strict=True,
      ):
        padding = [vocab.PAD] * (part.shape[1] - len(ids))
        assert part[row].tolist() == [*ids, *padding]
      assert batch.emotion[row] == encoded[i].emotion
  assert len(seen) > 1
  assert seen <= {tuple(shape[:3]) for shape in SHAPES}


def test_evaluation_shapes_are_some_of_the_configured() -> None:
  """The last holds every example, so it must stay."""
  for shapes in (SHAPES, SHAPES[-1:], Config().data.shapes):
    chosen = pipeline.coarse_shapes(shapes)

    assert set(chosen) <= set(shapes)
    assert chosen[-1] == shapes[-1]


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
  plan = BatchPlan(invented(60), SHAPES, 8)

  def order(seed: int, epoch: int) -> list[int]:
    return [int(i) for _, b in plan.shuffled_epoch(seed, epoch) for i in b]

  assert order(1, 0) == order(1, 0)
  assert order(1, 5) == order(1, 5)
  assert order(1, 0) != order(1, 1)
  assert order(1, 0) != order(2, 0)
  assert order(1, 1) != order(2, 0)


def test_the_iterator_follows_the_plan() -> None:
  encoded = invented(60)
  plan = BatchPlan(encoded, SHAPES, 8)
  batches = pipeline.train_batches(encoded, SHAPES, batch_size=8, seed=1)

  planned = [
    int(i)
    for epoch in range(2)
    for _, chosen in plan.shuffled_epoch(1, epoch)
    for i in chosen
  ]
  assert indices(take(batches, 2 * plan.batches_per_epoch)) == planned


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_the_same_global_batches(hosts: int) -> None:
  encoded = invented(37)

  def training(host: int, num_hosts: int) -> list[Batch]:
    return take(
      pipeline.train_batches(
        encoded,
        SHAPES,
        batch_size=8,
        seed=1,
        rows=pipeline.host_rows(8, host, num_hosts),
      ),
      12,
    )

  def evaluation(host: int, num_hosts: int) -> list[Batch]:
    rows = pipeline.host_rows(8, host, num_hosts)
    return list(pipeline.eval_batches(encoded, SHAPES, batch_size=8, rows=rows))

  for read in (training, evaluation):
    parts = [read(host, hosts) for host in range(hosts)]
    joined = [
      Batch(*(np.concatenate(arrays) for arrays in zip(*slices, strict=True)))
      for slices in zip(*parts, strict=True)
    ]
    assert_same(joined, read(0, 1))


@pytest.mark.parametrize("before_border", [0, 1, 3])
def test_the_iterator_resumes_where_it_was(before_border: int) -> None:
  """The next batches cross an epoch's border; the state survives JSON."""
  encoded = invented(37)
  per_epoch = BatchPlan(encoded, SHAPES, 8).batches_per_epoch

  def start() -> Any:
    return pipeline.train_batches(encoded, SHAPES, batch_size=8, seed=1)

  iterator = start()
  take(iterator, 2 * per_epoch - before_border)
  state = json.loads(json.dumps(iterator.get_state()))
  expected = take(iterator, per_epoch + 2)

  resumed = start()
  resumed.set_state(state)
  assert_same(take(resumed, per_epoch + 2), expected)
  # Also an iterator that has already moved on.
  iterator.set_state(state)
  assert_same(take(iterator, 3), expected[:3])


def test_a_state_can_resume_on_another_number_of_hosts() -> None:
  encoded = invented(37)
  one = pipeline.train_batches(encoded, SHAPES, batch_size=8, seed=1)
  take(one, 7)
  state = one.get_state()
  (expected,) = take(one, 1)

  for host in range(2):
    two = pipeline.train_batches(
      encoded, SHAPES, batch_size=8, seed=1, rows=pipeline.host_rows(8, host, 2)
    )
    two.set_state(state)
    (batch,) = take(two, 1)
    np.testing.assert_array_equal(
      batch.context, expected.context[4 * host : 4 * host + 4]
    )


def test_sample_batches(sample_dataset: Dataset, config: Config) -> None:
  encoded = sample_dataset.encoded("train")
  size = config.train.batch_size

  batches = take(
    pipeline.train_batches(
      encoded, sample_dataset.shapes, batch_size=size, seed=0
    ),
    -(-len(encoded) // size),
  )

  assert sorted(indices(batches)) == list(range(len(encoded)))


def test_padding_of_the_real_data(real_dataset: Dataset) -> None:
  """With the default shapes at most 20% of targets, 30% of contexts."""
  encoded = real_dataset.encoded("train")
  per_epoch = -(-len(encoded) // 16)
  padding, total = np.zeros(2), np.zeros(2)

  for batch in itertools.islice(
    pipeline.train_batches(encoded, real_dataset.shapes, batch_size=16, seed=0),
    per_epoch,
  ):
    for part, ids in enumerate((batch.target, batch.context)):
      padding[part] += np.sum(ids == vocab.PAD)
      total[part] += ids.size

  target, context = padding / total
  assert target <= 0.2
  assert context <= 0.3


# The vocabulary.


def test_vocabulary_is_in_order_of_frequency_then_spelling() -> None:
  built = vocab.build_vocabulary([("b", "c", "c"), ("d", "c", "b", "a"), ()])

  assert built.tokens == (*SPECIAL_TOKENS, "c", "b", "a", "d")


def test_vocabulary_encodes() -> None:
  """Text cannot spell a special token."""
  assert VOCABULARY.encode(("d", "a", "x", "PAD", "EOS")) == [11, 8, 0, 0, 0]
  assert len(VOCABULARY) == 12


def test_vocabulary_comes_from_the_train_split_alone(
  sample_dataset: Dataset,
) -> None:
  words = {
    token
    for e in sample_dataset.examples["train"]
    for turn in (*e.context, e.target, e.feedback)
    for token in turn.tokens
  }

  assert set(sample_dataset.vocabulary.tokens[8:]) == words


def test_vocabulary_file(tmp_path: Path) -> None:
  path = tmp_path / "vocab.txt"
  built = Vocabulary((*SPECIAL_TOKENS, "caf\xe9", "x\x85y", "\u2028", "a"))

  path.write_text(built.to_text(), encoding="utf-8")

  assert vocab.load_vocabulary(path) == built


@pytest.mark.parametrize(
  "content",
  [b"", b"a\nb\n", "\n".join(SPECIAL_TOKENS[:7]).encode(), b"UNK\nPAD\n\xff\n"],
)
def test_bad_vocabulary_file(content: bytes, tmp_path: Path) -> None:
  path = tmp_path / "vocab.txt"
  path.write_bytes(content)

  with pytest.raises(InputError, match=r"vocab\.txt: "):
    vocab.load_vocabulary(path)


def test_missing_vocabulary_file(tmp_path: Path) -> None:
  with pytest.raises(InputError, match=r"nowhere\.txt"):
    vocab.load_vocabulary(tmp_path / "nowhere.txt")


# Word vectors.


def load_vectors(path: Path, dim: int = 4) -> tuple[np.ndarray, float]:
  rng = np.random.default_rng(0)
  return vectors.load_vectors(str(path), VOCABULARY, dim, rng)


@pytest.mark.parametrize("name", ["vectors.txt", "vectors.txt.gz"])
def test_vectors(name: str, tmp_path: Path) -> None:
  """Found words get the file's numbers, scaled; the rest small random ones."""
  path = tmp_path / name
  content = b"b 5 -6.5 7e1\nzebra 1 1 1\na .25 8 9\nUNK 40 40 40\n"
  path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)

  embeddings, coverage = load_vectors(path)

  assert embeddings.shape == (12, 4)
  assert embeddings.dtype == np.float32
  numbers = np.array([[0.25, 8, 9], [5, -6.5, 70]])
  size = np.sqrt(np.mean(numbers**2))
  np.testing.assert_allclose(
    embeddings[8:10, :3], numbers * 4**-0.5 / size, rtol=1e-6
  )
  assert coverage == 0.5
  rest = np.concatenate(
    [embeddings[8:10, 3], embeddings[[*range(8), 10, 11]].ravel()]
  )
  assert np.all(np.abs(rest) < 1)
  assert len(np.unique(rest)) == len(rest)


def test_vectors_are_the_same_for_the_same_generator(tmp_path: Path) -> None:
  path = tmp_path / "vectors.txt"
  path.write_text("a 1 2\n")

  np.testing.assert_array_equal(load_vectors(path)[0], load_vectors(path)[0])


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"a 1 2\nb 3\n", "vectors.txt:2: 1 numbers; expected 2"),
    (b"a 1 2\nb 3 4 5\n", "vectors.txt:2: 3 numbers; expected 2"),
    (b"a\nb\n", "vectors.txt:1: 0 numbers"),
    (b"a 1 2\n\nb 1 2\n", "vectors.txt:2: 0 numbers"),
    (b"a 1 2\nb 3 x\n", "vectors.txt:2: "),
    (b"a 1 2 3 4 5\n", "config.model.emb_dim=4"),
    (b"a 1 nan\n", "vectors.txt:1: "),
    (b"", "vectors.txt"),
    (b"a 1 2\nb\xff 3 4\n", "config.data.vectors"),
  ],
)
def test_bad_vectors(content: bytes, message: str, tmp_path: Path) -> None:
  path = tmp_path / "vectors.txt"
  path.write_bytes(content)

  with pytest.raises(InputError) as error:
    load_vectors(path)

  assert message in str(error.value)
  assert "\n" not in str(error.value)


def test_bad_compressed_vectors(tmp_path: Path) -> None:
  """Truncated, corrupted in two ways, or not compressed at all."""
  rng = np.random.default_rng(0)
  lines = [f"w{i} {rng.normal()} {rng.normal()}\n" for i in range(500)]
  good = gzip.compress("".join(lines).encode())
  path = tmp_path / "vectors.gz"

  for content in (
    good[: len(good) // 2],
    good[:10] + b"\xff" * 40 + good[50:],  # No such block type.
    good[:-8] + bytes(8),  # Another checksum.
    b"a 1 2\n",
  ):
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"config\.data\.vectors.*vectors\.gz"):
      load_vectors(path)


def test_missing_vectors(tmp_path: Path) -> None:
  with pytest.raises(InputError, match=r"config\.data\.vectors.*nowhere"):
    load_vectors(tmp_path / "nowhere.txt")


# The configuration.


def change(config: Config, name: str, value: object) -> Config:
  """Sets a field by its dotted name."""
  section, field = name.split(".")
  setattr(getattr(config, section), field, value)
  return config


def test_the_fixtures_and_the_defaults_are_valid(config: Config) -> None:
  config_lib.validate(config)
  config_lib.validate(Config())

  assert config_lib.flatten(config)["data.source"] == "sample"


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("data.source", 3),
    ("data.example_set", "some_turns"),
    ("data.vocab_scope", "test"),
    ("data.shapes", ()),
    ("data.shapes", ((24, 14),)),
    ("data.shapes", ((24, 14, 1),)),
    ("data.shapes", ((48, 24, 24), (24, 14, 16))),
    ("data.shapes", ((48, 14, 16), (24, 24, 24))),
    ("data.shapes", (24, 14, 16)),
    ("data.shapes", (("a", "b", "c"),)),
    ("data.shapes", ((24.5, 14.0, 16.0),)),
    ("model.emb_dim", 15),
    ("model.emb_dim", 16.0),
    ("model.num_layers", 0),
    ("model.key_value_depth", 9),
    ("model.norm_order", "middle"),
    ("model.feed_forward", "sparse"),
    ("model.pointer_generator", 1),
    ("model.dropout_rate", 1.0),
    ("model.dropout_rate", -0.1),
    ("model.dropout_rate", -1),
    ("model.dropout_rate", float("nan")),
    ("model.label_smoothing", 1.0),
    ("train.seed", -1),
    ("train.batch_size", 0),
    ("train.batch_size", "16"),
    ("train.batch_size", True),
    ("train.warmup_steps", -5),
    ("train.learning_rate_factor", 0),
    ("train.learning_rate_factor", float("inf")),
    ("eval.max_decode_steps", None),
    ("eval.beam_size", 0),
  ],
)
def test_validate_names_the_field(
  name: str, value: object, config: Config
) -> None:
  with pytest.raises(InputError) as error:
    config_lib.validate(change(config, name, value))

  assert f"config.{name}" in str(error.value)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("train.seed", 0),
    ("model.dropout_rate", 0),
    ("model.label_smoothing", 0.0),
    ("model.emotion_loss_weight", 0.0),
    ("data.shapes", ((24, 24, 24),)),
  ],
)
def test_validate_accepts(name: str, value: object, config: Config) -> None:
  config_lib.validate(change(config, name, value))

  assert config_lib.flatten(config)[name] == value


def test_json_round_trip(config: Config) -> None:
  config.data.source = 'a "quoted" caf\xe9'

  text = config_lib.to_json(config)

  assert config_lib.from_json(text, "config.json") == config
  assert config_lib.from_json(config_lib.to_json(Config()), "x") == Config()


@pytest.mark.parametrize(
  ("path", "value", "message"),
  [
    (("train", "batchsize"), 3, "batchsize"),
    (("training",), {}, "training"),
    (("data",), None, "config.json"),
    (("data",), "abc", "config.json"),
    (("data", "shapes"), 3, "shapes"),
    (("data", "shapes"), [["a", "b", "c"]], "config.data.shapes"),
    (("train", "batch_size"), "16", "config.train.batch_size"),
    (("model", "norm_order"), "middle", "config.model.norm_order"),
  ],
)
def test_from_json_refuses(
  path: tuple[str, ...], value: object, message: str, config: Config
) -> None:
  values = json.loads(config_lib.to_json(config))
  *sections, field = path
  (values[sections[0]] if sections else values)[field] = value

  with pytest.raises(InputError) as error:
    config_lib.from_json(json.dumps(values), "config.json")

  assert message in str(error.value)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "3", "{}"])
def test_from_json_refuses_other_text(text: str) -> None:
  with pytest.raises(InputError, match=r"run1/config\.json"):
    config_lib.from_json(text, "run1/config.json")


def test_atomic_path_replaces_on_success(tmp_path: Path) -> None:
  path = tmp_path / "notes.txt"
  path.write_text("old")

  with storage.atomic_path(path) as temporary:
    temporary.write_text("new")
    assert path.read_text() == "old"

  assert path.read_text() == "new"
  assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("old", [None, "old"])
def test_atomic_path_leaves_nothing_of_a_failure(
  old: str | None, tmp_path: Path
) -> None:
  path = tmp_path / "notes.txt"
  if old is not None:
    path.write_text(old)

  def write_half() -> None:
    with storage.atomic_path(path) as temporary:
      temporary.write_text("half")
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    write_half()

  assert [p.read_text() for p in tmp_path.iterdir()] == [old] * bool(old)
