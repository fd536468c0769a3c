"""Pure steps `(state, batch, key) -> (state, metrics)`, and their compilation.

Metrics are sums over the global batch and their counts; divide at the end.
"""

import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from empdg_jax import decoding, losses
from empdg_jax.config import EvalConfig, ModelConfig, TrainConfig
from empdg_jax.data import vocab
from empdg_jax.data.pipeline import Array, Batch
from empdg_jax.models import adversary as adversary_lib
from empdg_jax.models.adversary import Adversary
from empdg_jax.models.encoder_decoder import EncoderDecoder, Inputs
from empdg_jax.parallel import devices as parallel
from empdg_jax.parallel.devices import psum
from empdg_jax.rng import fold_in
from empdg_jax.training.train_state import TrainState

Metrics = dict[str, jax.Array]


class Prediction(NamedTuple):
  """The responses and emotions of a batch.

  Attributes:
    tokens: The responses, EOS included, then PAD, `[B, max_steps]`.
    copied_from: The source position that an UNK copies at each token, -1 where
      the source has none, `[B, max_steps]`.
    emotion_probs: The probabilities of the emotions, `[B, emotions]`; None if
      the system predicts no emotion.
  """

  tokens: jax.Array
  copied_from: jax.Array
  emotion_probs: jax.Array | None


class Choices(NamedTuple):
  """What users choose for each response.

  Attributes:
    emotion: The emotion to respond to, -1 for the one perceived, `[B]` int32.
    temperature: The temperature of sampling, `[B]`.
    top_p: The probability of the nucleus that sampling draws from, `[B]`.
    seed: The seed of sampling, `[B]` int32.
    position: The example's position in a split or file, or the turn in a
      dialogue: examples of one seed differ in it, `[B]` int32.
  """

  emotion: Array
  temperature: Array
  top_p: Array
  seed: Array
  position: Array


def example_keys(key: jax.Array, step: jax.Array, batch: Batch) -> jax.Array:
  """Returns a key per example from seed, step and global position, `[B]`."""
  # The position in the global batch, not in this device's share: the numbers
  # drawn, and so the update, are the same on any number of devices and hosts.
  key = jax.random.fold_in(key, step)
  return jax.vmap(jax.random.fold_in, (None, 0))(key, batch.position)


def _fold_in(keys: jax.Array, purpose: bytes) -> jax.Array:
  """Returns keys for a single purpose, `[B]`."""
  return fold_in(keys, zlib.crc32(purpose))


def _inputs(batch: Batch) -> Inputs:
  return Inputs(batch.context, batch.state, batch.emotion_context)


def _teacher(
  batch: Batch, keys: jax.Array, step: jax.Array, config: ModelConfig
) -> jax.Array:
  """Returns the listener forced on each example, -1 for none, `[B]`.

  It is the gold emotion's, with a probability that falls from 1 to 1e-4, times
  `listener_teacher_ratio` (the schedule of Lin et al., 2019).
  """
  falling = jnp.exp(-step / config.listener_teacher_steps)
  ratio = config.listener_teacher_ratio * (1e-4 + (1.0 - 1e-4) * falling)
  draws = jax.vmap(jax.random.uniform)(_fold_in(keys, b"listener"))
  return jnp.where(draws < ratio, batch.emotion, -1)


def _mle_loss(
  params: Any,
  batch: Batch,
  inputs: Inputs,
  keys: jax.Array | None,
  model: EncoderDecoder,
  label_smoothing: float,
  weights: jax.Array,
) -> tuple[jax.Array, Metrics]:
  """Returns the weighted sum of the losses `Lg` (eq. 15) of the examples.

  A system that predicts no emotion has neither the emotion loss nor accuracy.

  Args:
    params: The generator's parameters.
    batch: The examples.
    inputs: Their contexts.
    keys: The dropout keys, `[B]`, or None for evaluation.
    model: The system.
    label_smoothing: The probability spread over the vocabulary.
    weights: The weights of the examples, `[B]`; those of weight 0 have no
      metrics.

  Returns:
    The sum, and the metrics of each example, `[B]`.
  """
  outputs: Any = model.apply({"params": params}, inputs, batch.target, keys)
  is_token = (batch.target != vocab.PAD).astype(jnp.float32)
  total, loss, nll = losses.vocabulary_loss(
    outputs.hidden,
    outputs.projection,
    batch.target,
    outputs.pointer,
    model.config.generation_loss_weight * weights[:, None] * is_token,
    label_smoothing,
  )
  tokens = jnp.sum(is_token, axis=-1)
  nll = jnp.sum(nll * is_token, axis=-1)
  example_loss = model.config.generation_loss_weight * jnp.sum(
    loss * is_token, axis=-1
  )
  metrics = {
    "nll": nll,
    "tokens": tokens,
    "mean_nll": nll / tokens,
    "examples": jnp.ones_like(tokens),
  }
  emotion_logits = outputs.encoded.emotion_logits
  if emotion_logits is not None:
    emotion_loss = optax.losses.softmax_cross_entropy_with_integer_labels(
      emotion_logits, batch.emotion
    )  # Eq. 9.
    emotion_loss *= model.config.emotion_loss_weight
    total += jnp.sum(emotion_loss * weights)
    example_loss += emotion_loss
    predicted = jnp.argmax(emotion_logits, axis=-1)
    metrics["emotion_correct"] = (predicted == batch.emotion).astype(
      jnp.float32
    )
  return total, {"loss": example_loss, **metrics}


def _global_sums(values: Metrics, mask: jax.Array) -> Metrics:
  return psum(
    {name: jnp.sum(value, where=mask > 0) for name, value in values.items()}
  )


def _update(
  state: TrainState,
  grads: Any,
  optimizer: optax.GradientTransformation,
  sums: Metrics,
  *terms: jax.Array,
) -> tuple[TrainState, Metrics]:
  """Returns the next state and the metric sums with those of the update.

  An update whose gradient or terms are not finite is skipped: parameters and
  optimiser stay as they are.

  Args:
    state: The state.
    grads: The gradient over the whole batch.
    optimizer: The optimiser.
    sums: The metric sums, of which `loss` must be finite.
    *terms: Further scalars that must be finite.
  """
  norm = optax.tree.norm(grads)
  # An infinite loss may have a finite gradient, and the other way round.
  good = jnp.isfinite(sum(terms, sums["loss"] + norm))

  def move() -> tuple[Any, Any]:
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    return optax.apply_updates(state.params, updates), opt_state

  # A single NaN would stay in Adam's moments for good. A gradient of 0 is no
  # cure, since Adam would still move by its momentum. The step counts all the
  # same, so that the next one draws other random numbers.
  params, opt_state = jax.lax.cond(
    good, move, lambda: (state.params, state.opt_state)
  )
  sums |= {
    # Like the other sums, it will be divided by the number of examples.
    "grad_norm": norm * sums["examples"],
    "skipped": 1.0 - good,
  }
  state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
  return state, sums


def _mle_gradient(
  state: TrainState, batch: Batch, keys: jax.Array, model: EncoderDecoder
) -> tuple[Any, Metrics]:
  """Returns the gradient of the mean `Lg` and the metric sums."""
  # Each device divides by the count of the whole batch, and the gradients are
  # summed. The mean of the devices' means would give more weight to an example
  # whose device holds masked rows.
  weights = batch.mask / psum(jnp.sum(batch.mask))
  config = model.config
  listener = _teacher(batch, keys, state.step, config)
  inputs = _inputs(batch)._replace(listener=listener)

  def loss_fn(params: Any) -> tuple[jax.Array, Metrics]:
    return _mle_loss(
      params, batch, inputs, keys, model, config.label_smoothing, weights
    )

  grads, values = jax.grad(loss_fn, has_aux=True)(state.params)
  return psum(grads), _global_sums(values, batch.mask)


def mle_step(
  state: TrainState,
  batch: Batch,
  key: jax.Array,
  *,
  model: EncoderDecoder,
  optimizer: optax.GradientTransformation,
) -> tuple[TrainState, Metrics]:
  """Takes one step of maximum likelihood (paper §4.3, eq. 15).

  Args:
    state: The generator's state.
    batch: This device's examples of the global batch.
    key: The run's root key.
    model: The system.
    optimizer: The generator's optimiser.

  Returns:
    The next state and the metric sums. An update whose loss or gradient is not
    finite is skipped.
  """
  keys = example_keys(key, state.step, batch)
  del key
  grads, sums = _mle_gradient(state, batch, keys, model)
  return _update(state, grads, optimizer, sums)


def mle_steps(
  state: TrainState,
  batches: Batch,
  count: jax.Array,
  key: jax.Array,
  *,
  model: EncoderDecoder,
  optimizer: optax.GradientTransformation,
) -> tuple[TrainState, Metrics]:
  """Takes several steps of maximum likelihood in one call.

  Args:
    state: The generator's state.
    batches: This device's examples of N batches of one shape, `[N, B, ...]`.
    count: The number of batches to use, at most N; the others are filling.
    key: The run's root key.
    model: The system.
    optimizer: The generator's optimiser.

  Returns:
    The state after the last step, and the metric sums of each step, `[N]`, 0
    for filling; see `mle_step`.
  """

  def step(index: Any, state: TrainState) -> tuple[TrainState, Metrics]:
    batch = jax.tree.map(lambda x: x[index], batches)
    return mle_step(state, batch, key, model=model, optimizer=optimizer)

  def body(index: jax.Array, carry: tuple[TrainState, Metrics]) -> Any:
    state, sums = carry
    state, its = step(index, state)
    return state, {name: sums[name].at[index].set(its[name]) for name in sums}

  rows = batches.mask.shape[0]
  sums = {
    name: jnp.zeros((rows, *x.shape), x.dtype)
    for name, x in jax.eval_shape(step, 0, state)[1].items()
  }
  # Its length is no constant, so that a shorter call needs no other program.
  return jax.lax.fori_loop(0, count, body, (state, sums))


def _judged(batch: Batch) -> tuple[jax.Array, jax.Array]:
  """Returns 1 for examples with feedback, else 0, `[B]`, and their number."""
  judged = batch.mask * (batch.feedback[:, 0] != vocab.PAD)
  # A batch without any has a loss of 0, not of 0 / 0.
  return judged, jnp.maximum(psum(jnp.sum(judged)), 1.0)


def discriminator_step(
  state: TrainState,
  generator_params: Any,
  batch: Batch,
  key: jax.Array,
  *,
  model: EncoderDecoder,
  adversary: Adversary,
  optimizer: optax.GradientTransformation,
) -> tuple[TrainState, Metrics]:
  """Takes one step of the discriminators (eqs. 18-19); the generator is frozen.

  Args:
    state: The discriminators' state.
    generator_params: The generator's parameters.
    batch: This device's examples; those without feedback do not count.
    key: The run's root key.
    model: The generator.
    adversary: The discriminators and their options.
    optimizer: The discriminators' optimiser.

  Returns:
    The next state and the metric sums, which are averages over discriminators
    except for the loss. An update whose loss or gradient is not finite is
    skipped.
  """
  # Both players count their steps from 0; without this they would draw the same
  # random numbers.
  key = jax.random.fold_in(key, zlib.crc32(b"discriminators"))
  keys = example_keys(key, state.step, batch)
  del key
  # Outside `loss_fn`, since none of it depends on the discriminators.
  response, encoded = adversary_lib.respond(
    generator_params, _inputs(batch), batch.target, keys, model, adversary
  )
  gold = adversary_lib.embed_words(generator_params, batch.target, model)
  feedback = adversary_lib.embed_words(generator_params, batch.feedback, model)
  inputs = adversary_lib.discriminator_inputs(
    state.params, encoded, (response, gold), feedback, adversary
  )
  judged, count = _judged(batch)

  def loss_fn(params: Any) -> tuple[jax.Array, Metrics]:
    values: Metrics = {"examples": jnp.ones_like(judged)}
    for name, its_inputs in inputs.items():
      terms = adversary_lib.discriminator_losses(
        adversary.discriminator,
        params[name],
        its_inputs,
        jax.vmap(jax.random.uniform)(_fold_in(keys, name.encode())),
        adversary.config.gradient_penalty_weight,
        adversary.config.gradient_penalty_at,
      )
      # The discriminators share an optimiser, so their losses add up; the other
      # terms are only logged.
      for term, value in terms.items():
        share = 1.0 if term == "loss" else 1.0 / len(inputs)
        values[term] = values.get(term, 0.0) + share * value
    return jnp.sum(values["loss"] * judged) / count, values

  grads, values = jax.grad(loss_fn, has_aux=True)(state.params)
  return _update(state, psum(grads), optimizer, _global_sums(values, judged))


# The smoothed norms are averages over about 20 updates.
_NORM_DECAY = 0.95


def _weigh(
  game: dict[str, Any] | None,
  likelihood: jax.Array,
  signal: jax.Array,
  config: TrainConfig,
) -> tuple[jax.Array, dict[str, Any] | None]:
  """Returns the weight of the signal, and the state with both norms added.

  Args:
    game: See `train_state.start_game`; without it the norms are not smoothed.
    likelihood: The norm of the gradient of the likelihood.
    signal: The norm of the gradient of the signal.
    config: The share of the likelihood's norm, or the weight itself.
  """
  if not config.generator_signal_share:
    return jnp.float32(config.generator_signal_weight), game
  norms = now = jnp.stack([likelihood, signal])
  if game:
    # Both start from 0, which cancels in their ratio. The update of a norm that
    # is not finite is skipped, and must not stay in the average.
    moved = _NORM_DECAY * game["norms"] + (1.0 - _NORM_DECAY) * now
    norms = jnp.where(jnp.all(jnp.isfinite(now)), moved, game["norms"])
    game = game | {"norms": norms}
  # A signal of "constant" has no gradient.
  weight = (
    config.generator_signal_share * norms[0] / jnp.maximum(norms[1], 1e-20)
  )
  return jnp.where(norms[1] > 0, weight, 0.0), game


def adversarial_generator_step(
  state: TrainState,
  discriminator_params: Any,
  batch: Batch,
  key: jax.Array,
  *,
  model: EncoderDecoder,
  adversary: Adversary,
  optimizer: optax.GradientTransformation,
) -> tuple[TrainState, Metrics]:
  """Takes one step of `Lg - Dsem(dN) - Demo(dN)` (paper §4.2, §4.3).

  Every step keeps the likelihood `Lg`: this is the paper's teacher forcing.

  Args:
    state: The generator's state.
    discriminator_params: The discriminators' parameters.
    batch: This device's examples; discriminators skip those without feedback.
    key: The run's root key.
    model: The generator.
    adversary: The discriminators and their options.
    optimizer: The generator's optimiser.

  Returns:
    The next state and the metric sums. An update whose loss, signal or gradient
    is not finite is skipped.
  """
  keys = example_keys(key, state.step, batch)
  del key
  grads, sums = _mle_gradient(state, batch, keys, model)
  judged, count = _judged(batch)

  def signal_fn(params: Any) -> tuple[jax.Array, jax.Array]:
    response, encoded = adversary_lib.respond(
      params, _inputs(batch), batch.target, keys, model, adversary
    )
    feedback = adversary_lib.embed_words(params, batch.feedback, model)
    inputs = adversary_lib.discriminator_inputs(
      discriminator_params, encoded, (response,), feedback, adversary
    )
    scores: Any = sum(
      adversary.discriminator.apply(
        {"params": discriminator_params[name]}, its_inputs
      )[0]
      for name, its_inputs in inputs.items()
    )
    return jnp.sum(scores * judged) / count, scores

  # Two gradients rather than one of the sum, because the norm of the signal's
  # gradient is a metric.
  signal_grads, scores = jax.grad(signal_fn, has_aux=True)(state.params)
  signal_grads = psum(signal_grads)
  norm = optax.tree.norm(signal_grads)
  weight, game = _weigh(
    state.game, optax.tree.norm(grads), norm, adversary.config
  )
  grads = jax.tree.map(lambda g, s: g - weight * s, grads, signal_grads)
  sums |= {
    "signal": psum(jnp.sum(scores, where=judged > 0)),
    "judged": psum(jnp.sum(judged)),
    # Like the other sums, it will be divided by the number of examples.
    "signal_grad_norm": norm * sums["examples"],
    "signal_weight": weight * sums["examples"],
  }
  state = state.replace(game=game)
  state, sums = _update(state, grads, optimizer, sums, sums["signal"])
  if game and "average" in game:
    average = optax.incremental_update(
      state.params, game["average"], 1.0 - adversary.config.ema_decay
    )
    state = state.replace(game=game | {"average": average})
  return state, sums


def eval_step(
  params: Any, batch: Batch, *, model: EncoderDecoder
) -> tuple[Metrics, Metrics]:
  """Scores targets with teacher forcing, without dropout or smoothing.

  Args:
    params: The model's parameters.
    batch: This device's examples.
    model: The system.

  Returns:
    The metric sums, and the metrics of each example `[B]`.
  """
  _, values = _mle_loss(
    params, batch, _inputs(batch), None, model, 0.0, batch.mask
  )
  return _global_sums(values, batch.mask), values


def predict_step(
  params: Any, batch: Batch, *, model: EncoderDecoder, config: EvalConfig
) -> Prediction:
  """Responds to contexts.

  Args:
    params: The model's parameters.
    batch: This device's examples; only their contexts are used.
    model: The system.
    config: Greedy search, beam search or sampling, and its limits.
  """
  choices = None
  if config.temperature:
    like = batch.index
    choices = Choices(
      jnp.full_like(like, -1),
      jnp.full(like.shape, config.temperature),
      jnp.full(like.shape, config.top_p),
      jnp.full_like(like, config.sampling_seed),
      batch.index,
    )
  return choose_step(params, batch, choices, model=model, config=config)


def choose_step(
  params: Any,
  batch: Batch,
  choices: Choices | None,
  *,
  model: EncoderDecoder,
  config: EvalConfig,
) -> Prediction:
  """Responds to contexts as their users chose.

  Args:
    params: The model's parameters.
    batch: This device's examples; only their contexts are used.
    choices: The choices for each example; None for none.
    model: The system.
    config: Greedy search, beam search or, if its temperature is not 0,
      sampling; `choices` has the temperatures that count.
  """
  variables = {"params": params}
  rows, beams = batch.context.shape[0], config.beam_size
  steps = config.max_decode_steps
  inputs = _inputs(batch)
  if choices is not None:
    inputs = inputs._replace(emotion=choices.emotion)
  encoded: Any = model.apply(variables, inputs, None, method="encode")
  # As a tree, so that the None of a system without emotions stays None.
  emotion_probs = jax.tree.map(jax.nn.softmax, encoded.emotion_logits)
  # Contexts are encoded once; the hypotheses of a row share copies.
  encoded = jax.tree.map(lambda x: jnp.repeat(x, beams, axis=0), encoded)
  cache = model.apply(variables, rows * beams, steps, method="init_cache")

  def step(tokens: jax.Array, cache: Any, index: jax.Array) -> Any:
    return model.apply(
      variables, encoded, tokens, cache, index, method="decode_step"
    )

  def choose(*of_step: Any) -> Any:
    return model.apply(variables, encoded, *of_step, method="choose_token")

  ids = {"eos": vocab.EOS, "pad": vocab.PAD}
  if choices is not None and config.temperature:
    # From seed and position alone: the same words on any number of devices.
    keys = jax.vmap(jax.random.key)(choices.seed)
    keys = jax.vmap(jax.random.fold_in)(keys, choices.position)
    drawn = choices.temperature, choices.top_p
    tokens, cache = decoding.sample_search(
      step, cache, keys, *drawn, steps, **ids
    )
  elif beams == 1:
    tokens, cache = decoding.greedy_search(choose, cache, rows, steps, **ids)
  else:
    tokens, _, cache = decoding.beam_search(
      step, cache, rows, steps, beams, config.length_penalty, **ids
    )
  return Prediction(tokens, cache.copied_from, emotion_probs)


# The axes of each step's arguments and results, and whether it donates its
# state: the next state overwrites the given one in memory, so that a device
# never holds two copies of parameters and moments. Callers must not read the
# state that they passed.
_PLAYER = (None, None, 0, None), (None, None), True
_AXES: dict[Callable[..., Any], tuple[Any, Any, bool]] = {
  mle_step: ((None, 0, None), (None, None), True),
  mle_steps: ((None, 0, None, None), (None, None), True),
  discriminator_step: _PLAYER,
  adversarial_generator_step: _PLAYER,
  eval_step: ((None, 0), (None, 0), False),
  predict_step: ((None, 0), 0, False),
  choose_step: ((None, 0, 0), 0, False),
}


def compile_step(
  step: Callable[..., Any],
  devices: Sequence[jax.Device] | None = None,
  **static: Any,
) -> Any:
  """Compiles a step of this module.

  Args:
    step: The step.
    devices: The devices to compile for; None for all.
    **static: The step's keyword arguments, such as its model.
  """
  return parallel.compile_step(
    functools.partial(step, **static), *_AXES[step], devices
  )
