"""The options of training: pools, dropout, schedules and what they refuse."""

import dataclasses
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from dialogues import KEY, MODEL, ROWS, VOCAB, make_batch, make_examples
from helpers import refused
from reference import in_float64

from empdg_jax import config as config_lib
from empdg_jax.config import Config, InputError, TrainConfig
from empdg_jax.data.pipeline import EncodedExample, shuffle_feedback
from empdg_jax.models import layers, registry
from empdg_jax.models.baselines import EmoPrepend, MoEL, Transformer
from empdg_jax.models.encoder_decoder import EncoderDecoder, Encoding, Inputs
from empdg_jax.models.generator import Generator
from empdg_jax.training import validation
from empdg_jax.training.train_state import init_params, learning_rate

PAPER = str(pathlib.Path(__file__).parents[1] / "configs" / "paper.py")
PERCEIVING = (Generator, EmoPrepend, MoEL)
BATCH = make_batch(1)
INPUTS = Inputs(BATCH.context, BATCH.state, BATCH.emotion_context)
KEYS = jax.random.split(KEY, ROWS)


def make_model(
  kind: type[EncoderDecoder], **fields: Any
) -> tuple[EncoderDecoder, Any]:
  """Returns a system without dropout but the given, and its parameters."""
  config = dataclasses.replace(MODEL.config, dropout_rate=0.0, **fields)
  # Few emotions, since MoEL has a decoder for each.
  model = kind(config, VOCAB, 4)
  shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
  return model, reference.random_params(shapes)


def encode(model: EncoderDecoder, params: Any, keys: Any = None) -> Encoding:
  encoded: Any = model.apply({"params": params}, INPUTS, keys, method="encode")
  return encoded


def logits_of(model: EncoderDecoder, params: Any, keys: Any = None) -> Any:
  return np.asarray(encode(model, params, keys).emotion_logits)


def test_attention_pool_by_hand() -> None:
  """Scores of 0 and ln 2 weight the real words by 1/3 and 2/3."""
  config = dataclasses.replace(
    MODEL.config, emb_dim=2, emotion_pooling="attention"
  )
  params = {
    "hidden": {"kernel": np.eye(2), "bias": np.zeros(2)},
    "score": {"kernel": np.array([[1.0], [0.0]])},
  }
  second = [math.atanh(math.log(2.0)), 3.0]
  words = jnp.array([[[0.0, 9.0], second, [50.0, 50.0]]])
  pooled: Any = layers.Pool(config).apply(
    {"params": params},
    jnp.ones((1, 2)),
    words,
    jnp.array([[True, True, False]]),
    None,
  )
  expected = [2 / 3 * second[0], 1 / 3 * 9.0 + 2 / 3 * 3.0]
  np.testing.assert_allclose(pooled[0], expected, rtol=1e-5)


def test_word_dropout_leaves_out_whole_words() -> None:
  """Each word but the first with its probability, by the example's own key."""
  config = dataclasses.replace(
    MODEL.config, emb_dim=4, emotion_pooling="mean", word_dropout=0.25
  )
  rows = 2_000
  words = jnp.broadcast_to(jnp.eye(4), (rows, 4, 4))
  mask = jnp.arange(4) < jnp.full((rows, 1), 3)
  keys = jax.random.split(KEY, rows)
  pool = layers.Pool(config)

  def pooled(keys: Any) -> np.ndarray:
    return np.asarray(pool.apply({}, words[:, 0], words, mask, keys))

  values = pooled(keys)
  kept = values > 0
  np.testing.assert_allclose(
    values, kept / kept.sum(axis=1, keepdims=True), rtol=1e-6
  )
  assert np.all(kept[:, 0])
  assert not np.any(kept[:, 3])
  assert kept[:, 1:3].mean(axis=0) == pytest.approx([0.75, 0.75], abs=0.04)
  np.testing.assert_array_equal(pooled(keys[::-1]), values[::-1])
  np.testing.assert_allclose(
    pooled(None), np.tile([1 / 3, 1 / 3, 1 / 3, 0.0], (rows, 1)), rtol=1e-6
  )


@pytest.mark.parametrize("kind", PERCEIVING)
def test_pools_replace_the_first_outputs(kind: type[EncoderDecoder]) -> None:
  """Eq. 7 of the embedded words' means; nothing else changes."""
  model, params = make_model(kind, emotion_pooling="mean")
  first, its_params = make_model(kind)
  assert jax.tree.structure(params) == jax.tree.structure(its_params)
  encoded, before = encode(model, params), encode(first, params)
  np.testing.assert_array_equal(encoded.semantic, before.semantic)
  np.testing.assert_array_equal(encoded.source, before.source)
  assert not np.allclose(encoded.emotion_logits, before.emotion_logits)

  exact = in_float64(params)
  for row, example in enumerate(make_examples(1)[0]):
    contexts = [example.context]
    if kind is Generator:
      contexts = [example.emotion_context, example.context]
    means = [exact["embedding"][ids].mean(axis=0) * 4.0 for ids in contexts]
    np.testing.assert_allclose(
      encoded.emotion_logits[row],
      np.concatenate(means) @ exact["emotion"]["kernel"],
      rtol=1e-4,
      atol=1e-5,
    )


@pytest.mark.parametrize("kind", [*PERCEIVING, Transformer])
def test_attention_alone_has_parameters(kind: type[EncoderDecoder]) -> None:
  _, params = make_model(kind, emotion_pooling="attention", word_dropout=0.2)
  _, without = make_model(kind)
  pools = {"semantic_pool", "emotional_pool"} if kind is Generator else {"pool"}
  if kind is Transformer:
    pools = set()
  assert params.keys() - without.keys() == pools
  for pool in pools:
    assert params[pool]["hidden"]["kernel"].shape == (16, 16)
    assert params[pool]["score"]["kernel"].shape == (16, 1)


@pytest.mark.parametrize("kind", PERCEIVING)
def test_emotion_dropout_drops_the_classifiers_input(
  kind: type[EncoderDecoder],
) -> None:
  model, params = make_model(kind, emotion_dropout=0.5)
  dropped = logits_of(model, params, KEYS)
  kept = logits_of(model, params)
  assert np.all(np.abs(dropped - kept).max(axis=1) > 1e-3)
  np.testing.assert_array_equal(
    encode(model, params, KEYS).semantic, encode(model, params).semantic
  )


def test_word_dropout_leaves_the_likelihood_alone() -> None:
  """The encoders keep the words that the pool loses."""
  model, params = make_model(
    Generator, emotion_pooling="mean", word_dropout=0.5
  )
  dropped, kept = encode(model, params, KEYS), encode(model, params)
  assert not np.allclose(dropped.emotion_logits, kept.emotion_logits)
  jax.tree.map(np.testing.assert_array_equal, dropped.memory, kept.memory)


@pytest.mark.parametrize(
  ("update", "rate"),
  [
    (1, 0.001),
    (2, 0.002),
    (4, 0.004),
    (6, 0.004 * (1 + math.cos(math.pi / 3)) / 2),
    (7, 0.002),
    (10, 0.0),
    (11, 0.0),
  ],
)
def test_cosine_by_hand(update: int, rate: float) -> None:
  config = TrainConfig(
    schedule="cosine", peak_learning_rate=0.004, warmup_steps=4, mle_steps=10
  )
  schedule = learning_rate(config, emb_dim=300)
  assert float(schedule(update - 1)) == pytest.approx(rate, abs=1e-9)


def test_phase_3_may_have_a_constant_rate() -> None:
  config = TrainConfig(adversarial_learning_rate=2e-4)
  rates = [learning_rate(config, 300, adversarial=a) for a in (False, True)]
  assert float(rates[1](0)) == float(rates[1](9_000)) == pytest.approx(2e-4)
  assert float(rates[0](7_999)) == pytest.approx(6.455e-4, rel=1e-3)
  went_on = learning_rate(TrainConfig(), 300, adversarial=True)
  assert float(went_on(123)) == float(rates[0](123))


def test_joint_selection_by_hand() -> None:
  """ln 30 - .35; a point of accuracy for less than 1% of perplexity."""
  values = {"perplexity_per_example": 30.0, "emotion_accuracy": 0.35}
  score, more = validation.selection_score(values, "joint", 0)
  assert not more
  assert score == pytest.approx(3.401197 - 0.35, abs=1e-6)
  traded = {"perplexity_per_example": 30.2, "emotion_accuracy": 0.36}
  assert validation.selection_score(traded, "joint", 0)[0] < score
  del values["emotion_accuracy"]
  alone, _ = validation.selection_score(values, "joint", 0)
  assert alone == pytest.approx(3.401197, abs=1e-6)
  assert validation.selection_score(values, "last", 7) == (7.0, True)


def test_shuffled_feedback_is_a_permutation_without_fixed_points() -> None:
  empty = EncodedExample([6], [6], [7], [2], [], 0, (), (), (0, 0, 0, 0))
  examples = [
    empty._replace(feedback=[] if i % 4 == 0 else [i]) for i in range(21)
  ]
  shuffled = shuffle_feedback(examples, seed=3)
  for i, example in enumerate(shuffled):
    assert bool(example.feedback) == bool(i % 4)
    assert example.feedback != [i]
  assert sorted(e.feedback for e in shuffled) == sorted(
    e.feedback for e in examples
  )
  assert shuffle_feedback(examples, seed=3) == shuffled
  assert shuffle_feedback(examples, seed=4) != shuffled


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"model.emotion_pooling": "max"}, "one of first, mean, attention"),
    ({"model.emotion_dropout": 1.0}, "less than 1"),
    ({"model.word_dropout": 0.2}, "emotion_pooling=first, which pools no"),
    ({"train.schedule": "step"}, "one of inverse_sqrt, cosine"),
    (
      {"train.schedule": "cosine", "train.mle_steps": 50},
      "warmup_steps=50: expected less than config.train.mle_steps=50",
    ),
    ({"train.ema_decay": 1.0}, "less than 1"),
    ({"train.peak_learning_rate": 0.0}, "more than 0"),
    ({"train.adversarial_learning_rate": -1.0}, "more than 0"),
    ({"train.generator_signal_share": -0.1}, "more than 0"),
    ({"train.gradient_penalty_at": "logits"}, "one of states, words"),
    ({"train.discriminators": "both"}, "one of all, semantic, emotional"),
    ({"train.feedback": "none"}, "one of own, shuffled"),
    ({"train.mle_selection_metric": "bleu"}, "joint, last"),
  ],
)
def test_refuses_fields(
  config: Config, fields: dict[str, Any], message: str
) -> None:
  for field, value in fields.items():
    section, name = field.split(".")
    setattr(getattr(config, section), name, value)
  with pytest.raises(InputError, match=message):
    config_lib.validate(config)


def test_refuses_what_a_system_lacks(config: Config) -> None:
  config.model.name, config.train.discriminators = "empdg_wo_g", "emotional"
  with pytest.raises(InputError, match="empdg_wo_g has only semantic"):
    registry.chosen_discriminators(config)
  config.model.name = "empdg"
  assert registry.chosen_discriminators(config) == ("emotional",)
  config.train.mle_selection_metric = "emotion_accuracy"
  registry.check_selection(config)
  config.model.name = "transformer"
  with pytest.raises(InputError, match="mle_selection_metric.*no emotion"):
    registry.check_selection(config)


def test_a_cosine_needs_a_rate_for_phase_3(
  tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
  line = refused(
    capsys,
    "train",
    f"--config={PAPER}",
    "--config.data.source=sample",
    "--config.model.emb_dim=12",
    "--config.train.adversarial_learning_rate=0",
    f"--workdir={tmp_path / 'run'}",
  )
  assert "adversarial_learning_rate=0.0: expected more than 0" in line
  assert not (tmp_path / "run").exists()


def test_the_papers_protocol_is_the_same_for_all_systems() -> None:
  configs = [config_lib.from_file(f"{PAPER}:{n}") for n in registry.SYSTEMS]
  for name, config in zip(registry.SYSTEMS, configs, strict=True):
    config_lib.validate(config)
    assert config.model.name == name
    config.model.name = "empdg"
  assert all(config == config_lib.from_file(PAPER) for config in configs)
  assert configs[0].data.vocab_scope == "all"
  assert configs[0].eval.max_decode_steps == 50
