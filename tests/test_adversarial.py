"""The adversarial steps of both players, and sampling.

As a program, `test_adversarial.py FILE` writes what `take_a_round` returns.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import scipy.stats
from dialogues import (
  KEY,
  MODEL,
  ROWS,
  TRAIN,
  VOCAB,
  flat,
  make_batch,
  make_examples,
  relative_difference,
  run_on_devices,
)
from reference import EOS, PAD, UNK, in_float64

from empdg_jax import decoding, losses, rng
from empdg_jax.config import TrainConfig
from empdg_jax.data.pipeline import Batch
from empdg_jax.models import adversary as adversary_lib
from empdg_jax.models import layers
from empdg_jax.models.adversary import Adversary
from empdg_jax.models.discriminators import Discriminator
from empdg_jax.models.encoder_decoder import Inputs
from empdg_jax.models.generator import Generator
from empdg_jax.parallel.devices import replicate, shard, unreplicate
from empdg_jax.training import steps
from empdg_jax.training.train_state import (
  TrainState,
  create_discriminator_state,
  create_optimizer,
  init_params,
  start_game,
)

MAX_STEPS = 6
NAMES = ("semantic", "emotional")
IS_EMOTIONAL = np.arange(VOCAB) % 3 == 0
IS_EMOTIONAL[:8] = False
DISCRIMINATOR = Discriminator(MODEL.config.emb_dim, (1, 2))
SIGNALS = ("straight_through", "expected", "teacher_forced", "constant")


def adversary(config: TrainConfig) -> Adversary:
  config = dataclasses.replace(config, sample_steps=MAX_STEPS)
  return Adversary(DISCRIMINATOR, IS_EMOTIONAL, 5, config)


def make_dialogues(seed: int, real: int = ROWS) -> Batch:
  """Returns a batch with feedback of all lengths, none in the second row."""
  rng = np.random.default_rng(seed)
  feedback = np.full((ROWS, 7), PAD, np.int32)
  for row in range(ROWS):
    length = 0 if row == 1 else int(rng.integers(1, 8))
    feedback[row, :length] = rng.integers(8, VOCAB, length)
  return make_batch(seed, real)._replace(feedback=feedback)


class Players(NamedTuple):
  """Both players: their states on one device and their compiled steps.

  Attributes:
    generator: The generator's state.
    discriminators: The discriminators' state.
    discriminator_step: The compiled `steps.discriminator_step`.
    generator_step: The compiled `steps.adversarial_generator_step`.
  """

  generator: TrainState
  discriminators: TrainState
  discriminator_step: Any
  generator_step: Any


def make_players(
  signal: str,
  model: Generator = MODEL,
  optimizer: optax.GradientTransformation | None = None,
  **fields: Any,
) -> Players:
  """Compiles the steps for a signal over the devices of this process."""
  config = dataclasses.replace(TRAIN, generator_signal=signal, **fields)
  optimizer = optimizer or create_optimizer(config, model.config.emb_dim)
  discriminator_optimizer = optax.adam(config.discriminator_learning_rate)
  params = reference.random_params(
    jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
  )
  discriminators = create_discriminator_state(
    DISCRIMINATOR, NAMES, discriminator_optimizer, 3
  )
  return Players(
    TrainState(np.int32(0), params, optimizer.init(params)),
    unreplicate(replicate(discriminators)),
    steps.compile_step(
      steps.discriminator_step,
      model=model,
      adversary=adversary(config),
      optimizer=discriminator_optimizer,
    ),
    steps.compile_step(
      steps.adversarial_generator_step,
      model=model,
      adversary=adversary(config),
      optimizer=optimizer,
    ),
  )


def play(
  step: Any, state: TrainState, other: TrainState, batch: Batch
) -> tuple[TrainState, dict[str, float]]:
  """Takes one player's step; states are those of one device."""
  state, metrics = step(
    replicate(state),
    replicate(other.params),
    shard(batch),
    replicate(KEY),
  )
  metrics = unreplicate(metrics)
  return unreplicate(state), {k: float(v) for k, v in metrics.items()}


@pytest.fixture(scope="module")
def sampling() -> Players:
  """The players with straight-through samples, compiled once."""
  return make_players("straight_through")


# Samples.


def test_straight_through_is_a_look_up_with_a_soft_gradient() -> None:
  rng = np.random.default_rng(0)
  table = jnp.asarray(rng.normal(size=(5, 3)))
  weights = jnp.asarray(rng.uniform(size=(2, 4, 5)))
  tokens = jnp.asarray(rng.integers(0, 5, (2, 4)))
  cotangent = jnp.asarray(rng.normal(size=(2, 4, 3)))

  embedded, pull = jax.vjp(
    lambda w, t: layers.straight_through(w, tokens, t), weights, table
  )
  weights_gradient, table_gradient = pull(cotangent)

  np.testing.assert_array_equal(embedded, table[tokens])
  np.testing.assert_allclose(weights_gradient, cotangent @ table.T, rtol=1e-6)
  expected = np.zeros((5, 3))
  np.add.at(expected, np.asarray(tokens), np.asarray(cotangent))
  np.testing.assert_allclose(table_gradient, expected, rtol=1e-6)


def test_samples_follow_the_model() -> None:
  """20,000 first tokens against the model's own distribution (chi-square)."""
  draws = 20_000
  batch = make_batch(1)
  params = reference.random_params(
    jax.eval_shape(lambda: init_params(MODEL, jax.random.key(0)))
  )
  inputs = Inputs(batch.context, batch.state, batch.emotion_context)
  first = jax.tree.map(lambda x: np.repeat(x[:1], draws, axis=0), inputs)
  keys = jax.random.split(jax.random.key(2), draws)
  config = dataclasses.replace(TRAIN, sample_temperature=0.5, sample_steps=1)
  chosen = dataclasses.replace(adversary(config), config=config)

  @jax.jit
  def respond(params: Any) -> Any:
    response, _ = adversary_lib.respond(
      params, first, batch.target, keys, MODEL, chosen
    )
    return response.tokens

  counts = np.bincount(respond(params)[:, 0], minlength=VOCAB)

  out = reference.generator(
    in_float64(params),
    MODEL.config,
    make_examples(1)[0][0]._replace(target=[EOS]),
  )
  copies = [UNK] if UNK in make_examples(1)[0][0].source else []
  allowed = np.array([*copies, EOS, *range(8, VOCAB)])
  probs = out.probs[0, allowed] / out.probs[0, allowed].sum()
  assert counts.sum() == counts[allowed].sum() == draws
  assert probs.max() > 1.5 * probs.min()
  assert scipy.stats.chisquare(counts[allowed], draws * probs).pvalue > 0.001


def test_samples_follow_what_was_sampled_before() -> None:
  """A Markov chain, padding after the end, and a key per row."""
  chain = np.array(
    [[0.1, 0.2, 0.3, 0.4], [0.5, 0.0, 0.25, 0.25], [0.4, 0.4, 0.1, 0.1]]
  )
  log_chain = jnp.log(jnp.asarray(chain, jnp.float32) + 1e-30)
  draws, eos, pad = 20_000, 3, 1

  def step(x: jax.Array, cache: Any, index: Any, extra: Any) -> Any:
    # `x` ends with the token itself.
    return log_chain[x[:, -1].astype(int) % 3], cache, (index, extra)

  def embed(tokens: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.concatenate([weights, tokens[:, None]], axis=1)

  keys = jax.random.split(jax.random.key(4), draws)

  def sample(keys: jax.Array) -> Any:
    return decoding.straight_through_sample(
      step,
      embed,
      jnp.zeros((len(keys), 5)),
      (),
      keys,
      10 * jnp.arange(5),
      5,
      1.0,
      eos=eos,
      pad=pad,
    )

  tokens, embedded, records = jax.jit(sample)(keys)
  weights = embedded[..., :4]

  assert tokens.shape == (draws, 5)
  np.testing.assert_array_equal(records, [range(5), range(0, 50, 10)])
  np.testing.assert_array_equal(embedded[..., 4], tokens)
  np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)
  running = np.asarray(tokens)
  ended = np.cumsum(running == eos, axis=1) - (running == eos) > 0
  assert np.all(running[ended] == pad)
  np.testing.assert_array_equal(weights.argmax(-1)[~ended], running[~ended])
  for position in range(1, 4):
    for before in (0, 2):
      after = running[:, position][running[:, position - 1] == before]
      expected = chain[before]
      counts = np.bincount(after, minlength=4)
      assert len(after) > 500
      assert scipy.stats.chisquare(counts, len(after) * expected).pvalue > 0.001
  few, _, _ = sample(keys[5:8])
  np.testing.assert_array_equal(few, tokens[5:8])


def test_samples_are_the_same_without_a_gradient() -> None:
  """Those of the search, which stops at the last end, and of the scan."""
  batch = make_batch(1)
  params = reference.random_params(
    jax.eval_shape(lambda: init_params(MODEL, jax.random.key(0)))
  )
  inputs = Inputs(batch.context, batch.state, batch.emotion_context)
  chosen = adversary(TRAIN)

  def respond(params: Any, seed: Any) -> Any:
    keys = jax.random.split(jax.random.key(seed), ROWS)
    return adversary_lib.respond(
      params, inputs, batch.target, keys, MODEL, chosen
    )[0]

  searched = jax.jit(respond)
  scanned = jax.jit(
    lambda params, seed: jax.vjp(lambda p: respond(p, seed), params)[0]
  )
  ends = []
  for seed in range(20):
    one, other = searched(params, seed), scanned(params, seed)
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_array_equal(one.embedded, other.embedded)
    ends += np.sum(one.tokens != PAD, axis=1).tolist()
  assert min(ends) < MAX_STEPS == max(ends)


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_samples_have_the_gradient_of_every_step(tie_embeddings: bool) -> None:
  """Compares with a plain loop that JAX differentiates itself."""
  model = Generator(
    dataclasses.replace(MODEL.config, tie_embeddings=tie_embeddings), VOCAB, 32
  )
  batch = make_batch(1)
  params = reference.random_params(
    jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
  )
  inputs = Inputs(batch.context, batch.state, batch.emotion_context)
  keys = jax.random.split(KEY, ROWS)
  config = dataclasses.replace(
    TRAIN, generator_signal="straight_through", sample_temperature=0.7
  )
  cotangent = np.random.default_rng(0).normal(
    size=(ROWS, MAX_STEPS, model.config.emb_dim)
  )

  def by_respond(params: Any) -> Any:
    response, _ = adversary_lib.respond(
      params, inputs, batch.target, keys, model, adversary(config)
    )
    return jnp.sum(response.embedded * cotangent), response.tokens

  def by_loop(params: Any) -> Any:
    variables = {"params": params}
    encoded: Any = model.apply(variables, inputs, None, method="encode")
    cache: Any = model.apply(variables, ROWS, MAX_STEPS, method="init_cache")
    x, ended = encoded.first_input, jnp.zeros(ROWS, bool)
    total, sequence = 0.0, []
    for index in range(MAX_STEPS):
      log_probs, cache, _ = model.apply(
        variables, encoded, x, cache, index, method="decode_embedded"
      )
      step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
      noisy = log_probs - jnp.log(
        jax.vmap(rng.exponential, (0, None))(step_keys, VOCAB)
      )
      tokens = jnp.where(ended, PAD, jnp.argmax(noisy, axis=-1))
      weights = jax.nn.softmax(noisy / 0.7)
      x = model.apply(variables, tokens, weights, method="embed")
      scored = model.apply(
        jax.lax.stop_gradient(variables), tokens, weights, method="embed"
      )
      total += jnp.sum(scored * cotangent[:, index])
      ended |= tokens == EOS
      sequence.append(tokens)
    return total, jnp.stack(sequence, axis=1)

  (value, tokens), gradient = jax.jit(
    jax.value_and_grad(by_respond, has_aux=True)
  )(params)
  (expected_value, expected_tokens), expected = jax.jit(
    jax.value_and_grad(by_loop, has_aux=True)
  )(params)

  np.testing.assert_array_equal(tokens, expected_tokens)
  assert float(value) == pytest.approx(float(expected_value), rel=1e-4)
  for name in params:
    assert np.linalg.norm(flat(expected[name])) > 0 or name == "emotion"
    np.testing.assert_allclose(
      flat(gradient[name]), flat(expected[name]), rtol=1e-3, atol=1e-4
    )


# The discriminators' step.


def test_discriminator_step_equals_its_terms(sampling: Players) -> None:
  """The loss over examples with feedback, and Adam on its gradient."""
  batch = make_dialogues(3, real=6)
  state, metrics = play(
    sampling.discriminator_step,
    sampling.discriminators,
    sampling.generator,
    batch,
  )
  assert metrics["examples"] == 5  # Two are masked, one has no feedback.
  assert metrics["loss"] == pytest.approx(
    -2 * metrics["wasserstein"] + 2 * 0.1 * metrics["gradient_penalty"],
    rel=1e-4,
  )
  assert state.step == 1
  moved = flat(state.params) - flat(sampling.discriminators.params)
  # The first update of Adam: the learning rate wherever there is a gradient.
  assert np.abs(moved).max() == pytest.approx(1e-4, rel=1e-2)
  assert np.mean(np.abs(moved) > 0.9e-4) > 0.5


def test_examples_without_feedback_do_not_count(sampling: Players) -> None:
  batch = make_dialogues(3, real=6)
  other = make_dialogues(4)
  mixed = Batch(
    *(
      np.concatenate([a[:1], b[1:2], a[2:6], b[6:]])
      for a, b in zip(batch, other, strict=True)
    )
  )._replace(mask=batch.mask, feedback=batch.feedback)
  assert not np.array_equal(mixed.target, batch.target)

  state, metrics = play(
    sampling.discriminator_step,
    sampling.discriminators,
    sampling.generator,
    batch,
  )
  same, same_metrics = play(
    sampling.discriminator_step,
    sampling.discriminators,
    sampling.generator,
    mixed,
  )

  assert same_metrics == pytest.approx(metrics, rel=1e-5)
  np.testing.assert_allclose(
    flat(same.params), flat(state.params), rtol=0, atol=1e-7
  )


# The generator's step.


@pytest.mark.parametrize("signal", SIGNALS)
def test_signal_reaches_the_generator(signal: str) -> None:
  players = make_players(signal)
  state = players.generator
  for seed in range(3):
    state, metrics = play(
      players.generator_step,
      state,
      players.discriminators,
      make_dialogues(seed),
    )
    assert metrics["judged"] == ROWS - 1
    assert np.isfinite(metrics["signal"])
    if signal == "constant":
      assert metrics["signal_grad_norm"] == 0.0
    else:
      assert metrics["signal_grad_norm"] > 0.0


def test_a_constant_signal_leaves_maximum_likelihood_alone(
  sampling: Players,
) -> None:
  players = make_players("constant")
  p_mle_step = steps.compile_step(
    steps.mle_step,
    model=MODEL,
    optimizer=create_optimizer(TRAIN, MODEL.config.emb_dim),
  )
  batch = make_dialogues(5)
  expected, _ = p_mle_step(
    replicate(players.generator),
    shard(batch),
    replicate(KEY),
  )
  expected = flat(unreplicate(expected).params)
  start = flat(players.generator.params)

  state, _ = play(
    players.generator_step, players.generator, players.discriminators, batch
  )
  moved, _ = play(
    sampling.generator_step, sampling.generator, sampling.discriminators, batch
  )

  assert (
    relative_difference(flat(state.params) - start, expected - start) < 1e-5
  )
  assert (
    relative_difference(flat(moved.params) - start, expected - start) > 1e-3
  )


def test_a_share_holds_the_signals_norm_and_weights_are_averaged() -> None:
  """By hand from the gradients of the likelihood and of the signal."""
  batch, rates = make_dialogues(5), optax.sgd(1.0)
  start: Any = None
  moved = []
  for weight in (1e-9, 1.0):
    players = make_players(
      "expected", optimizer=rates, generator_signal_weight=weight
    )
    start = players.generator
    state, metrics = play(
      players.generator_step, start, players.discriminators, batch
    )
    moved.append(flat(state.params) - flat(start.params))
    assert metrics["signal_weight"] == pytest.approx(weight * ROWS)
  likelihood, signal = moved[0], moved[1] - moved[0]

  config = dataclasses.replace(TRAIN, generator_signal_share=0.3, ema_decay=0.9)
  players = make_players(
    "expected",
    optimizer=rates,
    generator_signal_share=0.3,
    ema_decay=0.9,
  )
  state, metrics = play(
    players.generator_step,
    start.replace(game=start_game(config, start.params)),
    players.discriminators,
    batch,
  )
  weight = 0.3 * np.linalg.norm(likelihood) / np.linalg.norm(signal)
  assert metrics["signal_weight"] == pytest.approx(weight * ROWS, rel=1e-3)
  expected = likelihood + weight * signal
  actual = flat(state.params) - flat(start.params)
  assert relative_difference(actual, expected) < 1e-3
  average = flat(state.game["average"]) - flat(start.params)
  assert relative_difference(average, 0.1 * actual) < 1e-3
  norms = [np.linalg.norm(likelihood), np.linalg.norm(signal)]
  np.testing.assert_allclose(state.game["norms"], 0.05 * np.array(norms), 1e-3)


def test_smoothed_norms_by_hand() -> None:
  config = dataclasses.replace(TRAIN, generator_signal_share=0.3)
  game: Any = {"norms": jnp.zeros(2)}
  weight, game = steps._weigh(game, jnp.float32(2), jnp.float32(4), config)
  assert float(weight) == pytest.approx(0.15)
  weight, game = steps._weigh(game, jnp.float32(4), jnp.float32(1), config)
  assert float(weight) == pytest.approx(0.3 * 0.295 / 0.24)
  _, after = steps._weigh(game, jnp.float32(1), jnp.float32(np.inf), config)
  np.testing.assert_array_equal(after["norms"], game["norms"])
  weight, _ = steps._weigh(None, jnp.float32(2), jnp.float32(0), config)
  assert float(weight) == 0.0


@pytest.mark.parametrize("signal", ["expected", "teacher_forced"])
def test_a_likely_pad_hides_no_position(signal: str) -> None:
  """Discriminators see a response as long as the gold one."""
  batch = make_dialogues(5)
  params = dict(make_players(signal).generator.params)
  decoder = dict(params["decoder"])
  decoder["norm"] = {
    **decoder["norm"], "bias": decoder["norm"]["bias"] + 10.0
  }  # fmt: skip
  projection = params["vocab_projection"].copy()
  projection[:, PAD] = 10.0
  params |= {"decoder": decoder, "vocab_projection": projection}
  params["gate"] = {**params["gate"], "bias": np.full(1, 1e4, np.float32)}
  inputs = Inputs(batch.context, batch.state, batch.emotion_context)
  keys = jax.random.split(KEY, ROWS)
  outputs: Any = MODEL.apply({"params": params}, inputs, batch.target, keys)
  probs = losses.mixture(outputs.logits, outputs.pointer)
  assert np.all(np.argmax(probs, axis=-1) == PAD)

  config = dataclasses.replace(TRAIN, generator_signal=signal)
  response, _ = adversary_lib.respond(
    params, inputs, batch.target, keys, MODEL, adversary(config)
  )
  np.testing.assert_array_equal(response.tokens == PAD, batch.target == PAD)


def test_teacher_forced_samples_follow_the_model() -> None:
  """Tokens by chi-square; their embeddings; the soft weights' gradient."""
  draws, position = 4_000, 1
  batch = make_batch(1)
  params = reference.random_params(
    jax.eval_shape(lambda: init_params(MODEL, jax.random.key(0)))
  )
  row = next(i for i in range(ROWS) if batch.target[i, position] != PAD)
  repeat = [row] * draws
  inputs = Inputs(
    batch.context[repeat], batch.state[repeat], batch.emotion_context[repeat]
  )
  still = MODEL.clone(
    config=dataclasses.replace(MODEL.config, dropout_rate=0.0)
  )
  config = dataclasses.replace(
    TRAIN, generator_signal="teacher_forced", sample_temperature=0.5
  )
  keys = jax.random.split(jax.random.key(2), draws)
  target = batch.target[repeat][:, : position + 1]
  cotangent = np.random.default_rng(0).normal(size=16)

  @jax.jit
  def respond(params: Any) -> Any:
    response, _ = adversary_lib.respond(
      params, inputs, target, keys, still, adversary(config)
    )
    total = jnp.sum(response.embedded[:, position] @ cotangent) / draws
    return total, response

  (_, response), gradient = jax.value_and_grad(respond, has_aux=True)(params)
  tokens = np.asarray(response.tokens)
  np.testing.assert_allclose(
    response.embedded, 4.0 * params["embedding"][tokens], rtol=1e-6
  )
  example = make_examples(1)[0][row]
  out = reference.generator(
    in_float64(params),
    still.config,
    example._replace(target=example.target[: position + 1]),
  )
  copies = [UNK] if UNK in example.source else []
  allowed = np.array([*copies, EOS, *range(8, VOCAB)])
  probs = out.probs[position, allowed] / out.probs[position, allowed].sum()
  counts = np.bincount(tokens[:, position], minlength=VOCAB)[allowed]
  assert counts.sum() == draws
  assert scipy.stats.chisquare(counts, draws * probs).pvalue > 0.001
  # The signal reaches what chose the tokens, and not the embedding table as
  # the discriminators read it.
  assert np.linalg.norm(flat(gradient["vocab_projection"])) > 1e-4
  assert np.linalg.norm(flat(gradient["semantic_encoder"])) > 1e-6


@pytest.mark.parametrize(
  "signal", ["straight_through", "expected", "teacher_forced"]
)
def test_the_signal_alone_raises_the_score(signal: str) -> None:
  """One step on the signal raises the scores under the same noise."""
  alone = Generator(
    dataclasses.replace(
      MODEL.config,
      emotion_loss_weight=0.0,
      generation_loss_weight=0.0,
      dropout_rate=0.0,
    ),
    VOCAB,
    32,
  )
  players = make_players(signal, alone, optax.sgd(1.0))
  # Small embeddings, for which a discriminator is nearly linear.
  params = dict(players.generator.params)
  params["embedding"] = 0.1 * params["embedding"]
  generator = players.generator.replace(params=params)
  rises = []
  for seed in range(24):
    batch = make_dialogues(seed)
    after, before_metrics = play(
      players.generator_step, generator, players.discriminators, batch
    )
    again = after.replace(step=np.int32(0))  # The same keys.
    _, after_metrics = play(
      players.generator_step, again, players.discriminators, batch
    )
    rises.append(after_metrics["signal"] - before_metrics["signal"])
  # Samples change by whole words, so not every batch has to gain.
  assert np.mean(rises) > 0.02
  assert np.mean(np.array(rises) > 0.0) > 0.7


@pytest.mark.parametrize("signal", SIGNALS)
def test_odd_responses_and_feedback_give_finite_steps(signal: str) -> None:
  """No emotional word, feedback of one token, EOS at once."""
  players = make_players(signal)
  plain = 8  # The first word, not emotional.
  target = np.full((ROWS, 8), PAD, np.int32)
  target[:, 0] = EOS
  feedback = np.full((ROWS, 7), PAD, np.int32)
  feedback[:, 0] = plain
  assert not IS_EMOTIONAL[plain]
  batch = make_batch(0)._replace(target=target, feedback=feedback)
  # A generator that prefers to end at once.
  params = jax.tree.map(np.copy, players.generator.params)
  params["vocab_projection"][:, EOS] *= 1e3
  generator = players.generator.replace(params=params)

  discriminators, discriminator_metrics = play(
    players.discriminator_step, players.discriminators, generator, batch
  )
  state, generator_metrics = play(
    players.generator_step, generator, discriminators, batch
  )

  assert all(
    map(
      np.isfinite,
      (*discriminator_metrics.values(), *generator_metrics.values()),
    )
  )
  assert np.isfinite(flat(discriminators.params)).all()
  assert np.isfinite(flat(state.params)).all()


def test_a_loss_that_is_not_finite_changes_nothing_to_nan() -> None:
  players = make_players("expected", gradient_penalty_weight=float("inf"))
  discriminators, metrics = play(
    players.discriminator_step,
    players.discriminators,
    players.generator,
    make_dialogues(0),
  )
  assert not np.isfinite(metrics["loss"])
  assert metrics["skipped"] > 0
  np.testing.assert_array_equal(
    flat(discriminators.params), flat(players.discriminators.params)
  )


def test_expected_embeddings_are_means(sampling: Players) -> None:
  """Teacher-forced distributions times the scaled embeddings."""
  batch = make_dialogues(6)
  config = dataclasses.replace(TRAIN, generator_signal="expected")
  inputs = Inputs(batch.context, batch.state, batch.emotion_context)
  params = sampling.generator.params
  keys = jax.random.split(KEY, ROWS)

  response, _ = jax.jit(
    lambda params: adversary_lib.respond(
      params, inputs, batch.target, keys, MODEL, adversary(config)
    )
  )(params)
  outputs: Any = MODEL.apply({"params": params}, inputs, batch.target, keys)
  probs = np.asarray(losses.mixture(outputs.logits, outputs.pointer))

  np.testing.assert_allclose(
    response.embedded, probs @ params["embedding"] * 4.0, rtol=1e-4, atol=1e-5
  )
  real = batch.target != PAD
  np.testing.assert_array_equal(response.tokens != PAD, real)
  # The likeliest token that a response may hold.
  unknown = np.any(batch.context == UNK, axis=-1)
  unknown |= np.any(batch.emotion_context == UNK, axis=-1)
  possible = np.array(probs)
  possible[..., [n for n in range(8) if n not in (UNK, EOS)]] = 0.0
  possible[~unknown, :, UNK] = 0.0
  np.testing.assert_array_equal(
    response.tokens[real], possible.argmax(-1)[real]
  )


# Devices.


def take_a_round(players: Players) -> dict[str, Any]:
  """Takes a discriminator step and two generator steps, with masked rows."""
  discriminators, discriminator_metrics = play(
    players.discriminator_step,
    players.discriminators,
    players.generator,
    make_dialogues(0, real=ROWS - 1),
  )
  generator, generator_metrics = players.generator, {}
  for seed in (1, 2):
    generator, generator_metrics = play(
      players.generator_step,
      generator,
      discriminators,
      make_dialogues(seed, real=ROWS - 1),
    )
  return {
    "devices": jax.local_device_count(),
    "discriminators": flat(discriminators.params)
    - flat(players.discriminators.params),
    "generator": flat(generator.params) - flat(players.generator.params),
    **{f"discriminators/{k}": v for k, v in discriminator_metrics.items()},
    **{f"generator/{k}": v for k, v in generator_metrics.items()},
  }


@pytest.mark.slow
def test_any_number_of_devices_gives_the_same_round(
  sampling: Players, tmp_path: Path
) -> None:
  """A round here, on 2 and on 8 devices, in a process each."""
  runs = run_on_devices(__file__, tmp_path)
  one = take_a_round(sampling)
  for devices, run in runs.items():
    _, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    other = np.load(tmp_path / f"{devices}.npz")
    assert other["devices"] == devices
    for name in ("discriminators", "generator"):
      assert np.linalg.norm(one[name]) > 0
      assert relative_difference(other[name], one[name]) <= 1e-5
    for name, value in one.items():
      if "/" in name:
        assert other[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


if __name__ == "__main__":
  jax.config.update("jax_disable_most_optimizations", True)
  np.savez(sys.argv[1], **take_a_round(make_players("straight_through")))
