"""Losses, the learning rate and the metrics, against numbers by hand."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

from empdg_jax import losses, metrics
from empdg_jax.config import TrainConfig
from empdg_jax.rng import gumbel
from empdg_jax.training.train_state import create_optimizer, learning_rate

VOCAB = 12
PAD = 1
# Repeated words, and padding after the four words of the first row.
SOURCE = np.array([[6, 9, 6, 3, PAD, PAD], [3, 4, 4, 4, 11, 3]])
# Copied words, words not in the source, and padding.
TARGETS = np.array([[6, 2, 9, PAD], [4, 3, 10, 0]])


def draw(seed: int) -> dict[str, np.ndarray]:
  """Returns random logits, gates and attention, none of it to padding."""
  rng = np.random.default_rng(seed)
  weights = rng.random((2, 4, 6)) * (SOURCE != PAD)[:, None]
  return {
    "logits": rng.normal(0.0, 2.0, (2, 4, VOCAB)),
    "gate": rng.normal(0.0, 1.5, (2, 4)),
    "attention": weights / weights.sum(axis=-1, keepdims=True),
  }


@functools.partial(jax.jit, static_argnames=("pointer", "smoothing"))
def product(
  values: dict[str, Any], pointer: bool, smoothing: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns `vocabulary_loss` of logits; the projection is the identity."""
  v = {name: jnp.asarray(x, jnp.float32) for name, x in values.items()}
  copies = losses.Pointer(v["gate"], v["attention"], jnp.asarray(SOURCE))
  return losses.vocabulary_loss(
    v["logits"],
    jnp.eye(VOCAB),
    jnp.asarray(TARGETS),
    copies if pointer else None,
    jnp.ones(TARGETS.shape),
    smoothing,
  )


def expected_probs(values: dict[str, np.ndarray], row: int) -> np.ndarray:
  """Returns the reference's mixture for one row."""
  return reference.mixture(
    values["logits"][row],
    1.0 / (1.0 + np.exp(-values["gate"][row])),
    values["attention"][row],
    SOURCE[row],
  )


def test_log_mixture_equals_the_reference() -> None:
  """Repeated source words add up."""
  values = draw(0)
  pointer = losses.Pointer(
    jnp.asarray(values["gate"]), jnp.asarray(values["attention"]), SOURCE
  )
  logits = jnp.asarray(values["logits"])
  probs = np.exp(losses.log_mixture(logits, pointer))
  np.testing.assert_allclose(probs, losses.mixture(logits, pointer), rtol=1e-5)
  np.testing.assert_allclose(probs.sum(axis=-1), np.ones((2, 4)), atol=1e-5)
  for row in range(2):
    np.testing.assert_allclose(
      probs[row], expected_probs(values, row), rtol=1e-5
    )


def test_log_mixture_by_hand() -> None:
  """Half generated from four equally likely words, half copied."""
  pointer = losses.Pointer(
    jnp.zeros((1, 1)), jnp.array([[[0.25, 0.25, 0.5]]]), jnp.array([[2, 2, 0]])
  )
  log_probs = losses.log_mixture(jnp.zeros((1, 1, 4)), pointer)
  np.testing.assert_allclose(
    np.exp(log_probs[0, 0]), [0.375, 0.125, 0.375, 0.125], rtol=1e-6
  )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_vocabulary_loss_with_pointer(smoothing: float) -> None:
  """Compares with the reference's whole distribution, in float64."""
  values = draw(1)
  _, loss, nll = product(values, True, smoothing)
  for row in range(2):
    probs = expected_probs(values, row)
    np.testing.assert_allclose(
      loss[row],
      reference.smoothed_losses(probs, TARGETS[row], smoothing),
      rtol=1e-5,
    )
    np.testing.assert_allclose(
      nll[row], -np.log(probs[np.arange(4), TARGETS[row]]), rtol=1e-5
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_vocabulary_loss_without_pointer(smoothing: float) -> None:
  """The softmax alone."""
  values = draw(2)
  _, loss, nll = product(values, False, smoothing)
  for row in range(2):
    probs = np.stack([reference.softmax(x) for x in values["logits"][row]])
    np.testing.assert_allclose(
      loss[row],
      reference.smoothed_losses(probs, TARGETS[row], smoothing),
      rtol=1e-5,
    )
    np.testing.assert_allclose(
      nll[row], -np.log(probs[np.arange(4), TARGETS[row]]), rtol=1e-5
    )


def test_smoothed_loss_by_hand() -> None:
  """Probabilities 1/2, 1/4, 1/4 with s = 0.3: the target expects 0.8."""
  logits = jnp.log(jnp.array([[[0.5, 0.25, 0.25]]]))
  total, loss, nll = losses.vocabulary_loss(
    logits, jnp.eye(3), jnp.array([[0]]), None, jnp.full((1, 1), 5.0), 0.3
  )
  assert float(nll[0, 0]) == pytest.approx(math.log(2), rel=1e-6)
  # 0.8 ln 2 + 0.1 ln 4 + 0.1 ln 4
  assert float(loss[0, 0]) == pytest.approx(1.2 * math.log(2), rel=1e-6)
  assert float(total) == pytest.approx(6.0 * math.log(2), rel=1e-6)


class Task(NamedTuple):
  """Rows enough for several blocks of the loss, the last of them padding."""

  values: dict[str, jax.Array]
  targets: jax.Array
  source: jax.Array
  weights: jax.Array


@pytest.fixture(scope="module")
def task() -> Task:
  """Random hidden states, a projection of 50 words, and a pointer."""
  rng = np.random.default_rng(3)
  shape, dim, vocab, length = (9, 30), 8, 50, 7
  targets = rng.integers(0, vocab, shape)
  source = rng.integers(0, vocab, (len(targets), length))
  targets[:, 1] = source[:, 4] = source[:, 2]  # Copied, and repeated.
  weights = rng.random(shape)
  weights[:, 12:] = 0.0  # 108 rows of 270 count: two blocks of three.
  values = {
    "hidden": rng.normal(0.0, 1.0, (*shape, dim)),
    "kernel": rng.normal(0.0, 0.5, (dim, vocab)),
    "gate": rng.normal(0.0, 1.5, shape),
    "attention": rng.dirichlet(np.ones(length), shape),
  }
  arrays = {name: jnp.asarray(x, jnp.float32) for name, x in values.items()}
  return Task(
    arrays, jnp.asarray(targets), jnp.asarray(source), jnp.asarray(weights)
  )


def total_loss(
  values: dict[str, jax.Array], task: Task, pointer: bool, smoothing: float
) -> jax.Array:
  """Returns the weighted sum of the losses, block by block."""
  copies = losses.Pointer(values["gate"], values["attention"], task.source)
  return losses.vocabulary_loss(
    values["hidden"],
    values["kernel"],
    task.targets,
    copies if pointer else None,
    task.weights,
    smoothing,
  )[0]


def direct_loss(
  values: dict[str, jax.Array], task: Task, pointer: bool, smoothing: float
) -> jax.Array:
  """Returns the same from the whole `log_mixture`."""
  copies = losses.Pointer(values["gate"], values["attention"], task.source)
  log_probs = losses.log_mixture(
    values["hidden"] @ values["kernel"], copies if pointer else None
  )
  vocab = log_probs.shape[-1]
  wanted = (1.0 - smoothing) * jax.nn.one_hot(task.targets, vocab)
  loss = -jnp.sum((wanted + smoothing / vocab) * log_probs, axis=-1)
  return jnp.sum(loss * task.weights)


@pytest.mark.parametrize("pointer", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradients_equal_the_direct_ones(
  task: Task, pointer: bool, smoothing: float
) -> None:
  """With respect to hidden states, projection, gate and attention."""

  def differentiate(function: Any) -> Any:
    loss = functools.partial(
      function, task=task, pointer=pointer, smoothing=smoothing
    )
    # Twice the loss: the rule must scale by the gradient that it is given.
    return jax.jit(jax.value_and_grad(lambda values: 2.0 * loss(values)))(
      task.values
    )

  actual, wanted = differentiate(total_loss), differentiate(direct_loss)
  np.testing.assert_allclose(actual[0], wanted[0], rtol=1e-5)
  for name, gradient in wanted[1].items():
    scale = max(float(jnp.max(jnp.abs(gradient))), 1e-30)
    np.testing.assert_allclose(
      actual[1][name], gradient, atol=1e-5 * scale, err_msg=name
    )
  # What has no weight has no gradient.
  assert not np.any(actual[1]["hidden"][:, 12:])


def test_bfloat16_factors_give_float32_sums(task: Task) -> None:
  """The hidden states' type is the products'; the losses stay close."""
  hidden = task.values["hidden"].astype(jnp.bfloat16)
  values = {**task.values, "hidden": hidden}
  actual, gradient = jax.jit(
    jax.value_and_grad(lambda v: total_loss(v, task, True, 0.1))
  )(values)
  wanted = total_loss(task.values, task, True, 0.1)
  assert actual.dtype == jnp.float32
  assert abs(float(actual / wanted) - 1.0) < 5e-3
  assert gradient["hidden"].dtype == jnp.bfloat16
  assert gradient["kernel"].dtype == jnp.float32


@pytest.mark.parametrize("pointer", [True, False])
@pytest.mark.parametrize("count", [0, 3, 8, 9, 22, 30])
@pytest.mark.parametrize("noisy", [False, True])
def test_likeliest_is_the_argmax(
  task: Task, pointer: bool, count: int, noisy: bool
) -> None:
  """Of `log_mixture` without the excluded tokens, in the rows that count."""
  rows = 30  # Of the first dialogues, a row each.
  hidden = task.values["hidden"].reshape(-1, 8)[:rows]
  copies = losses.Pointer(
    task.values["gate"].reshape(-1)[:rows],
    task.values["attention"].reshape(-1, 7)[:rows],
    jnp.repeat(task.source, rows, axis=0)[:rows],
  )
  whole = losses.Pointer(
    copies.gate[:, None], copies.attention[:, None], copies.source
  )
  log_probs = losses.log_mixture(
    (hidden @ task.values["kernel"])[:, None], whole if pointer else None
  )[:, 0]
  excluded = jnp.arange(rows)[:, None] % 3 != jnp.arange(20)[None] % 3
  wanted = log_probs.at[:, :20].add(jnp.where(excluded, -1e9, 0.0))
  active = jnp.zeros(rows, bool).at[jnp.arange(count) * 7 % rows].set(True)
  assert jnp.sum(active) == count
  keys = jax.random.split(jax.random.key(2), rows) if noisy else None
  if keys is not None:
    wanted += gumbel(keys, wanted.shape[1])
  found = jax.jit(losses.likeliest)(
    hidden,
    task.values["kernel"],
    copies if pointer else None,
    excluded,
    active,
    keys,
  )
  assert set(np.asarray(wanted.argmax(-1))) & set(np.asarray(task.source[0]))
  np.testing.assert_array_equal(found[active], wanted.argmax(axis=-1)[active])


def test_blocks_hold_the_only_logits(task: Task) -> None:
  """No array of all tokens by all words exists in the compiled program."""
  compiled = jax.jit(jax.grad(lambda v: total_loss(v, task, True, 0.1)))
  text = compiled.lower(task.values).compile().as_text()
  assert "f32[136,50]" in text  # A block's logits: the search finds arrays.
  # The last are the rows filled up to two blocks.
  for shape in ("[9,30,50]", "[270,50]", "[272,50]"):
    assert shape not in text


def test_gradient_equals_a_difference_quotient() -> None:
  """The slope of the loss, by the reference in float64."""
  values, step = draw(4), 1e-5

  def loss(v: dict[str, np.ndarray]) -> float:
    return sum(
      reference.smoothed_losses(expected_probs(v, row), TARGETS[row], 0.1).sum()
      for row in range(2)
    )

  grads = jax.grad(lambda v: product(v, True, 0.1)[0])(
    {name: jnp.asarray(x, jnp.float32) for name, x in values.items()}
  )
  for name, place in (
    ("logits", (0, 1, 3)),
    ("logits", (1, 0, 4)),
    ("gate", (0, 0)),
    ("gate", (1, 2)),
    ("attention", (0, 0, 2)),
    ("attention", (1, 1, 5)),
  ):
    sides = []
    for sign in (1.0, -1.0):
      moved = {key: x.copy() for key, x in values.items()}
      moved[name][place] += sign * step
      sides.append(loss(moved))
    slope = (sides[0] - sides[1]) / (2 * step)
    assert float(grads[name][place]) == pytest.approx(slope, rel=1e-3, abs=1e-4)


def test_extreme_values_stay_finite() -> None:
  """A saturated gate, one-hot attention and a certain softmax."""
  attention = np.zeros((2, 4, 6))
  attention[:, :, 0] = 1.0
  gate = np.array([[60.0, -60.0, 60.0, -60.0]] * 2)
  logits = np.zeros((2, 4, VOCAB))
  logits[:, :, 5] = 80.0
  values = {"logits": logits, "gate": gate, "attention": attention}
  values = {name: jnp.asarray(x, jnp.float32) for name, x in values.items()}
  loss, grads = jax.value_and_grad(lambda v: product(v, True, 0.1)[0])(values)
  assert np.isfinite(loss)
  assert all(np.all(np.isfinite(g)) for g in grads.values())


@pytest.mark.parametrize(
  ("update", "rate"),
  [
    # scale = 300 ** -0.5 = 0.0577350
    (1, 8.0687153e-08),  # scale * 8000 ** -1.5: the first update is not 0.
    (4_000, 3.2274861e-04),  # Half of the highest.
    (8_000, 6.4549722e-04),  # scale / sqrt(8000)
    (32_000, 3.2274861e-04),  # scale / sqrt(32000)
  ],
)
def test_learning_rate_by_hand(update: int, rate: float) -> None:
  """Warm-up, peak and decay with the paper's sizes."""
  schedule = learning_rate(TrainConfig(), emb_dim=300)
  assert float(schedule(update - 1)) == pytest.approx(rate, rel=1e-5)


def test_learning_rate_factor() -> None:
  """The factor scales the rate; the peak is at the end of the warm-up."""
  config = TrainConfig(learning_rate_factor=3.0, warmup_steps=4)
  schedule = learning_rate(config, emb_dim=100)
  rates = [float(schedule(jnp.int32(n))) for n in range(6)]
  assert rates[3] == pytest.approx(3.0 * 0.1 * 0.5, rel=1e-6)
  assert max(rates) == rates[3]
  assert rates[0] == pytest.approx(rates[3] / 4, rel=1e-6)


def test_optimizer_is_adam() -> None:
  """Two updates by hand: the moments, their correction, the schedule."""
  config = TrainConfig(warmup_steps=2, adam_b1=0.5, adam_b2=0.75, adam_eps=0.5)
  optimizer = create_optimizer(config, emb_dim=4)
  param = jnp.array(1.0)
  state = optimizer.init(param)
  rates = (0.5 / 2**1.5, 0.5 / 2**0.5)
  # Gradients 2 and -1: moments 1, then 0; squares 1, then 1.
  steps = (
    (1.0 / 0.5) / (math.sqrt(1.0 / 0.25) + 0.5),
    (0.0 / 0.75) / (math.sqrt(1.0 / 0.4375) + 0.5),
  )
  wanted = 1.0
  for grad, rate, step in zip((2.0, -1.0), rates, steps, strict=True):
    update, state = optimizer.update(jnp.array(grad), state, param)
    param = optax.apply_updates(param, update)
    wanted -= rate * step
    assert float(param) == pytest.approx(wanted, rel=1e-6)


RESPONSES = ["i am so sorry", "i am glad", "", "sorry"]


@pytest.mark.parametrize(
  ("n", "distinct", "total"), [(1, 5, 8), (2, 4, 5), (3, 3, 3), (4, 1, 1)]
)
def test_distinct_by_hand(n: int, distinct: int, total: int) -> None:
  """Counts over all responses, but no n-gram across two responses."""
  assert metrics.ngram_counts(RESPONSES, n) == (distinct, total)
  assert metrics.distinct_n(RESPONSES, n) == pytest.approx(
    100 * distinct / total
  )


def test_expectation_adjusted_distinct_by_hand() -> None:
  """N = 5, C = 8 and N = 4, C = 5 with V = 10."""
  assert metrics.ead_n(RESPONSES, 1, 10) == pytest.approx(
    100 * 5 / (10 * (1 - 0.9**8)), rel=1e-9
  )
  assert metrics.ead_n(RESPONSES, 2, 10) == pytest.approx(
    100 * 4 / (10 * (1 - 0.9**5)), rel=1e-9
  )
  # In a huge vocabulary chance repeats no word: the plain share.
  assert metrics.ead_n(RESPONSES, 1, 10**9) == pytest.approx(62.5, rel=1e-6)


def test_distinct_of_nothing() -> None:
  """Without n-grams nothing divides by zero."""
  assert metrics.distinct_n(["one"], 2) == 0.0
  assert metrics.ead_n(["one"], 2, 10) == 0.0


def test_text_metrics_of_responses_alone() -> None:
  """All metrics of responses; the emotion accuracy is null."""
  values = metrics.text_metrics([{"response": r} for r in RESPONSES], 10)
  assert values == {
    "examples": 4,
    "emotion_accuracy": None,
    "distinct_1": pytest.approx(62.5),
    "distinct_2": pytest.approx(80.0),
    "ead_1": pytest.approx(500 / (10 * (1 - 0.9**8))),
    "ead_2": pytest.approx(400 / (10 * (1 - 0.9**5))),
    "average_length": 2.0,
    "different_responses": 1.0,
    "distinct_1_at_30": pytest.approx(62.5),
    "distinct_2_at_30": pytest.approx(80.0),
    "repetition": 0.0,
    "sentence_repetition": 0.0,
    "vocab_size": 10,
  }


def test_perplexity_protocols_by_hand() -> None:
  """Over tokens, and the published mean over examples."""
  lines = [
    {"response": "a", "nll": 2.0, "tokens": 2},
    {"response": "b", "nll": 6.0, "tokens": 3},
  ]
  values = metrics.text_metrics(lines, 10)
  assert values["perplexity"] == pytest.approx(math.exp(8 / 5))
  assert values["perplexity_per_example"] == pytest.approx(math.exp(1.5))
  del lines[1]["nll"]
  assert "perplexity" not in metrics.text_metrics(lines, 10)


def test_emotion_accuracy_by_hand() -> None:
  """A fraction if every line has both emotions, null otherwise."""
  lines: list[dict[str, Any]] = [
    {"response": "a", "emotion": "sad", "predicted_emotion": p}
    for p in ("sad", "angry", "sad", "proud")
  ]
  assert metrics.text_metrics(lines, 10)["emotion_accuracy"] == 0.5
  lines[0]["predicted_emotion"] = None
  assert metrics.text_metrics(lines, 10)["emotion_accuracy"] is None


def test_bleu_by_hand() -> None:
  """100 for identical text; tokens stay whole, so "don't." is one."""
  text = ["i am so sorry don't.", "that is great news , really"]
  lines = [{"response": t, "reference": t} for t in text]
  assert metrics.text_metrics(lines, 10)["bleu"] == pytest.approx(100.0)
  # Precisions 4/5, 3/4, 2/3, 1/2; the reference is a token longer.
  lines = [{"response": "a b c d e", "reference": "a b c d don't. f"}]
  expected = 100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25 * math.exp(-1 / 5)
  assert metrics.text_metrics(lines, 10)["bleu"] == pytest.approx(expected)
