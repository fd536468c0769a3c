"""The baselines against NumPy, loops and cases by hand."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from dialogues import ROWS, VOCAB, make_batch, make_examples
from reference import EOS, SOS, in_float64

from empdg_jax import losses
from empdg_jax.config import ModelConfig
from empdg_jax.models import registry
from empdg_jax.models.baselines import ListenersDecoder, listener_weights
from empdg_jax.models.decoder import DecoderLayer
from empdg_jax.models.encoder_decoder import EncoderDecoder, Inputs
from empdg_jax.training import steps
from empdg_jax.training.train_state import count_parameters, init_params

CONFIG = ModelConfig(
  emb_dim=16, key_value_depth=8, filter_size=12, dropout_rate=0.0
)
KEYS = jax.random.split(jax.random.key(3), ROWS)


def make_model(name: str, **fields: Any) -> tuple[EncoderDecoder, Any]:
  """Returns a system, and parameters none of which is 0 or 1."""
  config = dataclasses.replace(CONFIG, name=name, **fields)
  model = registry.create_model(config, VOCAB, 32)
  shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
  return model, jax.tree.map(jnp.asarray, reference.random_params(shapes))


def dialogues() -> tuple[Inputs, jax.Array]:
  """Returns the padded dialogues of `make_examples(1)` and their targets."""
  batch = make_batch(1)
  inputs = Inputs(batch.context, batch.state, batch.emotion_context)
  return inputs, jnp.asarray(batch.target)


@pytest.mark.parametrize("name", ["transformer", "emoprepend"])
def test_a_single_encoder_equals_the_equations(name: str) -> None:
  """Compares with the reference's encoder and decoder, in float64."""
  model, params = make_model(name)
  inputs, target = dialogues()
  outputs: Any = model.apply({"params": params}, inputs, target)
  p = in_float64(params)

  def embed(ids: Any) -> np.ndarray:
    return p["embedding"][np.array(ids, int)] * 4.0

  for row, example in enumerate(make_examples(1)[0]):
    semantic = reference.encode(
      p["encoder"], CONFIG, embed(example.context) + embed(example.state)
    )
    first = embed([SOS])
    if name == "emoprepend":
      emotion = semantic[0] @ p["emotion"]["kernel"]
      np.testing.assert_allclose(
        outputs.encoded.emotion_logits[row], emotion, rtol=1e-4, atol=1e-5
      )
      linear = p["emotion_embedding"]
      first = (emotion @ linear["kernel"] + linear["bias"])[None]
    hidden, weights = reference.decode(
      p["decoder"],
      CONFIG,
      np.concatenate([first, embed(example.target[:-1])]),
      semantic,
    )
    length = len(example.target)
    np.testing.assert_allclose(
      outputs.logits[row, :length],
      hidden @ p["vocab_projection"],
      rtol=1e-4,
      atol=1e-4,
    )
    np.testing.assert_allclose(
      outputs.attention[row, :length, : len(example.context)],
      weights,
      rtol=1e-4,
      atol=1e-5,
    )
  if name == "transformer":
    assert outputs.encoded.emotion_logits is None


@pytest.mark.parametrize("name", ["transformer", "emoprepend", "moel"])
def test_decoding_with_a_cache_equals_the_full_pass(name: str) -> None:
  model, params = make_model(name, num_layers=2)
  inputs, target = dialogues()
  variables = {"params": params}

  @jax.jit
  def full() -> Any:
    outputs: Any = model.apply(variables, inputs, target)
    return losses.log_mixture(outputs.logits, outputs.pointer)

  @jax.jit
  def decoded() -> Any:
    encoded = model.apply(variables, inputs, None, method="encode")
    cache = model.apply(variables, *target.shape, method="init_cache")

    def body(cache: Any, index: jax.Array) -> Any:
      tokens = target[:, jnp.maximum(index - 1, 0)]
      taken: Any = model.apply(
        variables, encoded, tokens, cache, index, method="decode_step"
      )
      return taken[1], taken[0]

    _, log_probs = jax.lax.scan(body, cache, jnp.arange(target.shape[1]))
    return log_probs.transpose(1, 0, 2)

  possible = [EOS, *range(8, VOCAB)]
  np.testing.assert_allclose(
    decoded()[..., possible], full()[..., possible], rtol=1e-4, atol=1e-4
  )


# MoEL.


def test_listeners_equal_a_loop() -> None:
  """34 decoder layers, one after another, and any mixture of them."""
  decoder, layer = ListenersDecoder(CONFIG, 32), DecoderLayer(CONFIG)
  rng = np.random.default_rng(1)
  x, memory = rng.normal(size=(2, 2, 5, 16)).astype(np.float32)
  mask = np.arange(5) < np.array([[5], [3]])
  mixed = rng.dirichlet(np.ones(32), 2).astype(np.float32)

  def whole(module: ListenersDecoder, weights: Any) -> Any:
    return module(x, module.project_memory(memory, mask, weights), None)

  params = reference.random_params(
    jax.eval_shape(lambda: decoder.init(KEYS[0], mixed, method=whole))["params"]
  )
  run = jax.jit(lambda w: decoder.apply({"params": params}, w, method=whole))

  @jax.jit
  def one(layer_params: Any, y: jax.Array) -> Any:
    variables = {"params": layer_params}
    projected = layer.apply(variables, memory, method="keys_values")
    return layer.apply(variables, y, projected, mask, None)

  y = x + reference.positions(5, 16).astype(np.float32)
  shared, _ = one(params["shared"], y)
  outputs = [
    one(jax.tree.map(lambda p, i=i: p[i], params["listeners"]), y)[0]
    for i in range(32)
  ]
  alone = np.eye(32, dtype=np.float32)[[7, 7]]
  for weights in (mixed, alone):
    total = shared + sum(
      weights[:, i, None, None] * outputs[i] for i in range(32)
    )
    if weights is alone:
      np.testing.assert_allclose(total, shared + outputs[7], rtol=1e-6)
    expected, expected_attention = one(params["meta_0"], total)
    expected = [
      reference.layer_norm(params["norm"], np.asarray(y)) for y in expected
    ]
    output, attention = run(weights)
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(attention, expected_attention, atol=1e-6)


def test_listeners_drop_features_of_their_own() -> None:
  model, params = make_model("moel", dropout_rate=0.5)
  layers = params["decoder"]["listeners"]
  # All listeners alike, so that only their dropout differs.
  params["decoder"]["listeners"] = jax.tree.map(
    lambda p: jnp.broadcast_to(p[:1], p.shape), layers
  )
  inputs, target = dialogues()

  @jax.jit
  def logits(listener: jax.Array, keys: jax.Array | None) -> jax.Array:
    forced = inputs._replace(listener=listener)
    return model.apply({"params": params}, forced, target, keys).logits

  first, second = jnp.zeros(ROWS, int), jnp.ones(ROWS, int)
  np.testing.assert_allclose(
    logits(first, None), logits(second, None), rtol=1e-5, atol=1e-5
  )
  difference = jnp.abs(logits(first, KEYS) - logits(second, KEYS))
  assert jnp.all(jnp.max(difference, axis=(1, 2)) > 0.1)


def test_the_gold_listener_may_be_forced() -> None:
  model, params = make_model("moel")
  inputs, _ = dialogues()
  variables = {"params": params}
  free: Any = model.apply(variables, inputs, None, method="encode")
  taught: Any = model.apply(
    variables,
    inputs._replace(listener=jnp.array([9] + [-1] * (ROWS - 1))),
    None,
    method="encode",
  )
  np.testing.assert_array_equal(taught.memory.weights[0], np.eye(32)[9])
  np.testing.assert_array_equal(
    taught.memory.weights[1], free.memory.weights[1]
  )
  np.testing.assert_allclose(
    free.memory.weights, jax.nn.softmax(free.emotion_logits), rtol=1e-6
  )


@pytest.mark.parametrize(
  ("ratio", "step", "share"),
  [(1.0, 0, 1.0), (1.0, 10_000, 0.3679), (0.5, 10_000, 0.1839), (0.0, 0, 0.0)],
)
def test_the_gold_listener_is_forced_less_and_less(
  ratio: float, step: int, share: float
) -> None:
  """Lin et al.'s schedule, e^(-t / 10,000)."""
  count = 10_000
  batch = make_batch(0)._replace(emotion=jnp.arange(count) % 32)
  keys = jax.random.split(jax.random.key(0), count)
  config = dataclasses.replace(CONFIG, listener_teacher_ratio=ratio)
  listener = np.asarray(steps._teacher(batch, keys, jnp.int32(step), config))
  taught = listener >= 0
  np.testing.assert_array_equal(listener[taught], batch.emotion[taught])
  assert taught.mean() == pytest.approx(share, abs=0.015)


def test_listener_weights() -> None:
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 32)))
  everyone = listener_weights(logits, 0)
  np.testing.assert_allclose(everyone, jax.nn.softmax(logits))
  np.testing.assert_allclose(listener_weights(logits, 32), everyone)
  some = np.asarray(listener_weights(logits, 5))
  np.testing.assert_allclose(some.sum(-1), 1.0, rtol=1e-6)
  for row in range(3):
    best = np.argsort(np.asarray(logits[row]))[-5:]
    assert set(np.flatnonzero(some[row])) == set(best)
    np.testing.assert_allclose(
      some[row, best],
      everyone[row, best] / everyone[row, best].sum(),
      rtol=1e-5,
    )


def test_parameters_are_counted() -> None:
  """Two vocabulary matrices, and 32 listeners as large as a decoder layer."""
  model, params = make_model("moel")
  of = {name: count_leaves(params[name]) for name in params}
  assert of["embedding"] == of["vocab_projection"] == VOCAB * 16
  decoder = params["decoder"]
  assert count_leaves(decoder["listeners"]) == 32 * count_leaves(
    decoder["shared"]
  )
  assert count_parameters(model) == sum(of.values())


def count_leaves(tree: Any) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(tree))
