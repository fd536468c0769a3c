"""The discriminators against a NumPy transcription of eqs. 16-19."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from empdg_jax.losses import gradient_penalty
from empdg_jax.models.adversary import discriminator_losses
from empdg_jax.models.discriminators import (
  Discriminator,
  DiscriminatorInputs,
  Utterances,
  pick,
)

DIM = 6
DISCRIMINATOR = Discriminator(DIM, (1, 2, 3))
# The lengths of generated response, gold response and feedback by example.
LENGTHS = ((4, 2, 3), (1, 5, 1), (3, 3, 5), (2, 1, 2))
ROWS = len(LENGTHS)


def sigmoid(x: np.ndarray) -> np.ndarray:
  return 1.0 / (1.0 + np.exp(-x))


def lstm(params: Any, words: np.ndarray) -> np.ndarray:
  """Returns the hidden states of one utterance `[length, d]`."""
  hidden, cell = np.zeros(DIM), np.zeros(DIM)
  states = []
  for word in words:
    gates = (
      word @ params["input"]["kernel"]
      + params["input"]["bias"]
      + hidden @ params["recurrent"]
    )
    i, f, g, o = np.split(gates, 4)
    cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
    hidden = sigmoid(o) * np.tanh(cell)
    states.append(hidden)
  return np.array(states)


def score(
  params: Any, states: np.ndarray, interaction: np.ndarray
) -> np.ndarray:
  """Returns D of eq. 17 for the states `[length, d]` of one response."""
  pooled = []
  for number, width in enumerate(DISCRIMINATOR.kernel_widths):
    layer = params[f"convolutions_{number}"]
    padded = np.concatenate([states, np.zeros((width - 1, DIM))])
    windows = np.array(
      [padded[t : t + width].ravel() for t in range(len(states))]
    )
    features = np.maximum(windows @ layer["kernel"] + layer["bias"], 0.0)
    pooled.append(features.max(axis=0))
  hidden = np.maximum(np.concatenate(pooled) + interaction, 0.0)
  out = params["output"]
  return (hidden @ out["kernel"] + out["bias"])[0]


def gradient(function: Any, x: np.ndarray, step: float) -> np.ndarray:
  """Returns a gradient by central finite differences."""
  result = np.zeros_like(x)
  for index in np.ndindex(*x.shape):
    there, back = x.copy(), x.copy()
    there[index] += step
    back[index] -= step
    result[index] = (function(there) - function(back)) / (2 * step)
  return result


def transcribed(
  params: Any, dialogue: "Dialogue", weight: float
) -> dict[str, float]:
  """Returns the loss and the terms of one dialogue (eqs. 16-19)."""
  generated, gold, feedback = (
    lstm(params["lstm"], words) for words in dialogue.utterances
  )
  interaction = feedback[-1] + dialogue.context
  gold_score = score(params, gold, interaction)
  generated_score = score(params, generated, interaction)
  length = max(len(generated), len(gold))

  def stretch(states: np.ndarray) -> np.ndarray:
    return np.pad(states, ((0, length - len(states)), (0, 0)))

  between = dialogue.alpha * stretch(generated) + (
    1 - dialogue.alpha
  ) * stretch(gold)
  slope = gradient(lambda x: score(params, x, interaction), between, 1e-6)
  norm = np.sqrt(np.sum(slope**2))
  penalty = (norm - 1.0) ** 2
  return {
    "loss": generated_score - gold_score + weight * penalty,
    "wasserstein": gold_score - generated_score,
    "gradient_penalty": penalty,
    "gradient_norm": norm,
  }


class Dialogue:
  """Random utterances of given lengths, `[length, d]` each."""

  def __init__(self, seed: int, lengths: tuple[int, ...]) -> None:
    rng = np.random.default_rng(seed)
    self.utterances = [rng.normal(size=(n, DIM)) for n in lengths]
    self.context = rng.normal(size=DIM)
    self.alpha = rng.uniform()


DIALOGUES = [Dialogue(seed, lengths) for seed, lengths in enumerate(LENGTHS)]


def make_inputs(
  dialogues: list[Dialogue], lengths: tuple[int, int, int]
) -> tuple[DiscriminatorInputs, jax.Array]:
  """Pads dialogues to lengths, with values that are not zero."""
  padded = []
  for kind, length in enumerate(lengths):
    features = np.full((len(dialogues), length, DIM), 7.0, np.float32)
    mask = np.zeros((len(dialogues), length), bool)
    for row, dialogue in enumerate(dialogues):
      words = dialogue.utterances[kind]
      features[row, : len(words)] = words
      mask[row, : len(words)] = True
    padded.append(Utterances(jnp.asarray(features), jnp.asarray(mask)))
  context = jnp.asarray(np.array([d.context for d in dialogues], np.float32))
  generated, gold, feedback = padded
  alpha = jnp.asarray(np.array([d.alpha for d in dialogues], np.float32))
  return DiscriminatorInputs((generated, gold), feedback, context), alpha


@functools.partial(jax.jit, static_argnums=3)
def terms_and_gradients(
  params: Any, given: DiscriminatorInputs, alpha: jax.Array, weight: float
) -> tuple[dict[str, jax.Array], Any]:
  """Returns all terms and the gradient of the loss of each example."""

  def of_row(params: Any, row: jax.Array) -> tuple[jax.Array, Any]:
    terms = discriminator_losses(DISCRIMINATOR, params, given, alpha, weight)
    return terms["loss"][row], terms

  rows = jnp.arange(len(alpha))
  grads, terms = jax.vmap(
    jax.grad(of_row, has_aux=True), in_axes=(None, 0), out_axes=(0, None)
  )(params, rows)
  return terms, grads


@pytest.fixture(scope="module")
def params() -> Any:
  """Random parameters, none of them at a neutral value."""
  given, _ = make_inputs(DIALOGUES, (4, 5, 5))
  shapes = jax.eval_shape(DISCRIMINATOR.init, jax.random.key(0), given)[
    "params"
  ]
  rng = np.random.default_rng(5)
  return jax.tree.map(
    lambda s: rng.normal(0.0, 0.6, s.shape).astype(np.float32), shapes
  )


def in_float64(tree: Any) -> Any:
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def test_terms_equal_the_transcription(params: Any) -> None:
  given, alpha = make_inputs(DIALOGUES, (4, 5, 5))
  terms, _ = terms_and_gradients(params, given, alpha, 0.3)
  assert len(jax.tree.leaves(params)) == 3 + 2 * 3 + 2

  for row, dialogue in enumerate(DIALOGUES):
    expected = transcribed(in_float64(params), dialogue, 0.3)
    assert expected["gradient_norm"] > 0.1  # There is something to compare.
    for name, value in expected.items():
      assert terms[name][row] == pytest.approx(value, rel=1e-4, abs=1e-4), name


def test_penalty_is_differentiated_a_second_time(params: Any) -> None:
  """The penalty's gradient equals finite differences of the penalty."""
  given, alpha = make_inputs(DIALOGUES, (4, 5, 5))

  def penalty(params: Any) -> jax.Array:
    return jnp.sum(
      discriminator_losses(DISCRIMINATOR, params, given, alpha, 1.0)[
        "gradient_penalty"
      ]
    )

  grads = jax.jit(jax.grad(penalty))(params)
  exact = in_float64(params)

  def numeric(path: tuple[str, ...]) -> np.ndarray:
    def replaced(value: np.ndarray) -> Any:
      tree = jax.tree.map(lambda x: x, exact)
      node = tree
      for key in path[:-1]:
        node = node[key]
      node[path[-1]] = value
      return tree

    node = exact
    for key in path:
      node = node[key]
    return gradient(
      lambda value: sum(
        transcribed(replaced(value), d, 1.0)["gradient_penalty"]
        for d in DIALOGUES
      ),
      node,
      1e-4,
    )

  for path in (("output", "kernel"), ("convolutions_1", "kernel")):
    expected = numeric(path)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(
      grads[path[0]][path[1]], expected, rtol=1e-3, atol=1e-3
    )


def test_the_penalty_may_stand_at_the_words(params: Any) -> None:
  """The slope of the whole discriminator between the embedded responses."""
  given, alpha = make_inputs(DIALOGUES, (5, 5, 5))
  terms = discriminator_losses(
    DISCRIMINATOR, params, given, alpha, 0.3, at="words"
  )
  at_states = discriminator_losses(DISCRIMINATOR, params, given, alpha, 0.3)
  generated, gold = given.responses
  mask = generated.mask | gold.mask
  weight = alpha[:, None, None]
  between = weight * generated.features + (1 - weight) * gold.features

  def score(features: jax.Array) -> jax.Array:
    inputs = given._replace(responses=(Utterances(features, mask),))
    scores: Any = DISCRIMINATOR.apply({"params": params}, inputs)
    return jnp.sum(scores[0])

  slopes = np.asarray(jax.grad(score)(between), np.float64)
  norms = np.sqrt(np.sum(slopes**2, axis=(1, 2)))
  np.testing.assert_allclose(terms["gradient_norm"], norms, rtol=1e-4)
  penalty = (norms - 1.0) ** 2
  np.testing.assert_allclose(
    terms["loss"], 0.3 * penalty - terms["wasserstein"], rtol=1e-3
  )
  np.testing.assert_array_equal(terms["wasserstein"], at_states["wasserstein"])
  assert np.all(np.abs(norms - at_states["gradient_norm"]) > 1e-3)


def test_a_flat_discriminator_has_finite_gradients(params: Any) -> None:
  flat = {**params, "output": jax.tree.map(np.zeros_like, params["output"])}
  given, alpha = make_inputs(DIALOGUES, (4, 5, 5))

  terms, grads = terms_and_gradients(flat, given, alpha, 10.0)

  np.testing.assert_allclose(terms["gradient_norm"], 0.0, atol=1e-12)
  np.testing.assert_allclose(terms["gradient_penalty"], 1.0)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize(
  "lengths", [(9, 5, 5), (4, 9, 5), (4, 5, 9), (11, 10, 12)]
)
def test_padding_reaches_nothing(
  params: Any, lengths: tuple[int, int, int]
) -> None:
  expected = terms_and_gradients(
    params, *make_inputs(DIALOGUES, (4, 5, 5)), 10.0
  )
  padded = terms_and_gradients(params, *make_inputs(DIALOGUES, lengths), 10.0)
  for a, b in zip(
    jax.tree.leaves(padded), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_other_examples_reach_nothing(params: Any) -> None:
  others = [Dialogue(90 + seed, (4, 5, 5)) for seed in range(3)]
  expected = terms_and_gradients(
    params, *make_inputs(DIALOGUES, (4, 5, 5)), 10.0
  )
  together = terms_and_gradients(
    params, *make_inputs([*DIALOGUES, *others], (4, 5, 5)), 10.0
  )
  for a, b in zip(
    jax.tree.leaves(together), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(a[:ROWS], b, rtol=1e-6, atol=1e-6)


def test_no_gradient_flows_into_the_context(params: Any) -> None:
  given, _ = make_inputs(DIALOGUES, (4, 5, 5))

  def total(context: jax.Array) -> jax.Array:
    scores: Any = DISCRIMINATOR.apply(
      {"params": params}, given._replace(context=context)
    )
    return jnp.sum(scores[0])

  assert not np.any(jax.grad(total)(given.context))


def test_a_trained_discriminator_measures_a_known_distance() -> None:
  """A cloud and its copy moved by 1 have the Wasserstein distance 1."""
  rows, length, dim, steps = 64, 3, 12, 1_000
  rng = np.random.default_rng(0)
  shift = rng.normal(size=(length, dim)).astype(np.float32)
  shift /= np.linalg.norm(shift)
  generated = rng.normal(0.0, 0.1, (rows, length, dim)).astype(np.float32)
  gold = generated[::-1] + shift
  discriminator = Discriminator(dim, (1, 2, 3))
  mask, interaction = jnp.ones((rows, length), bool), jnp.zeros((rows, dim))
  cloud = Utterances(jnp.asarray(generated), mask)
  params = discriminator.init(
    jax.random.key(0), DiscriminatorInputs((cloud,), cloud, interaction)
  )["params"]
  optimizer = optax.adam(3e-3, b1=0.5)

  def loss(params: Any, alpha: jax.Array) -> tuple[jax.Array, Any]:
    def score(features: jax.Array) -> Any:
      return discriminator.apply(
        {"params": params},
        Utterances(features, mask),
        interaction,
        method="score",
      )

    penalty, norm = gradient_penalty(score, cloud.features, gold, alpha)
    wasserstein = jnp.mean(score(gold) - score(cloud.features))
    return 10.0 * jnp.mean(penalty) - wasserstein, (wasserstein, norm.mean())

  def update(carry: Any, key: jax.Array) -> tuple[Any, Any]:
    params, opt_state = carry
    alpha = jax.random.uniform(key, (rows,))
    grads, values = jax.grad(loss, has_aux=True)(params, alpha)
    updates, opt_state = optimizer.update(grads, opt_state)
    return (optax.apply_updates(params, updates), opt_state), values

  keys = jax.random.split(jax.random.key(1), steps)
  _, (distances, norms) = jax.jit(lambda c: jax.lax.scan(update, c, keys))(
    (params, optimizer.init(params))
  )

  assert abs(distances[0]) < 0.5
  assert float(distances[-100:].mean()) == pytest.approx(1.0, abs=0.15)
  assert float(norms[-100:].mean()) == pytest.approx(1.0, abs=0.1)


def test_pick_moves_words_to_the_front() -> None:
  features = jnp.arange(1.0, 9.0).reshape(2, 4, 1)
  mask = jnp.array([[True] * 4, [True, True, False, False]])
  chosen = jnp.array([[False, True, False, True], [False] * 4])

  words = pick(Utterances(features, mask), chosen, 3)

  np.testing.assert_array_equal(
    words.features[..., 0], [[2.0, 4.0, 0.0], [0.0] * 3]
  )
  np.testing.assert_array_equal(
    words.mask, [[True, True, False], [True, False, False]]
  )

  def total(x: jax.Array) -> jax.Array:
    weights = jnp.array([10.0, 1.0, 0.0])[:, None]
    return jnp.sum(weights * pick(Utterances(x, mask), chosen, 3).features)

  np.testing.assert_array_equal(
    jax.grad(total)(features)[..., 0], [[0.0, 10.0, 0.0, 1.0], [0.0] * 4]
  )
