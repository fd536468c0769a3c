"""Pure steps: `(state, batch, key) -> (state, metrics)`, and their compilation.

Metrics are sums over the global batch with their counts; divide at the end.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from empdg_jax import decoding, losses
from empdg_jax.config import EvalConfig, ModelConfig
from empdg_jax.data import vocab
from empdg_jax.data.pipeline import Batch
from empdg_jax.models.generator import Inputs
from empdg_jax.parallel import compile_step, psum
from empdg_jax.train_state import TrainState

Metrics = dict[str, jax.Array]


class Prediction(NamedTuple):
  """What `predict_step` gives for each example.

  Attributes:
    tokens: The response, EOS included, then PAD, `[B, max_steps]`.
    copied_from: For each token the source position that an UNK copies, -1
      where there is none, `[B, max_steps]`.
    emotion_probs: `[B, 32]`.
  """

  tokens: jax.Array
  copied_from: jax.Array
  emotion_probs: jax.Array


def example_keys(key: jax.Array, step: jax.Array, batch: Batch) -> jax.Array:
  """Returns a key for each example: of (seed, step, global position), `[B]`."""
  key = jax.random.fold_in(key, step)
  return jax.vmap(jax.random.fold_in, (None, 0))(key, batch.position)


def _inputs(batch: Batch) -> Inputs:
  return Inputs(batch.context, batch.state, batch.emotion_context)


def _mle_loss(
  params: Any,
  batch: Batch,
  keys: jax.Array | None,
  model: nn.Module,
  label_smoothing: float,
) -> tuple[jax.Array, Metrics]:
  """Returns each example's `Lg` (eq. 15), `[B]`, and the metric sums."""
  outputs: Any = model.apply(
    {"params": params}, _inputs(batch), batch.target, keys
  )
  emotion_logits, logits, pointer = outputs
  loss, nll = losses.token_losses(
    logits, batch.target, pointer, label_smoothing
  )
  is_token = (batch.target != vocab.PAD).astype(loss.dtype)
  tokens = jnp.sum(is_token, axis=-1)
  nll = jnp.sum(nll * is_token, axis=-1)
  config: ModelConfig = model.config  # Every system has one.
  emotion_loss = losses.emotion_nll(emotion_logits, batch.emotion)
  example_loss = (
    config.emotion_loss_weight * emotion_loss
    + config.generation_loss_weight * jnp.sum(loss * is_token, axis=-1)
  )
  correct = (jnp.argmax(emotion_logits, axis=-1) == batch.emotion).astype(
    loss.dtype
  )
  return example_loss, {
    "loss": example_loss,
    "nll": nll,
    "tokens": tokens,
    "mean_nll": nll / tokens,
    "emotion_correct": correct,
    "examples": jnp.ones_like(tokens),
  }


def _global_sums(values: Metrics, mask: jax.Array) -> Metrics:
  return psum(
    {name: jnp.sum(value, where=mask > 0) for name, value in values.items()}
  )


def mle_step(
  state: TrainState,
  batch: Batch,
  key: jax.Array,
  *,
  model: nn.Module,
  optimizer: optax.GradientTransformation,
) -> tuple[TrainState, Metrics]:
  """Takes one step of maximum likelihood (paper §4.3, eq. 15).

  Args:
    state: The state; its memory is reused when donated.
    batch: This device's examples of the global batch.
    key: The run's root key.
    model: The system.
    optimizer: Its optimiser.

  Returns:
    The next state, and sums over the global batch.
  """
  keys = example_keys(key, state.step, batch)
  del key
  count = psum(jnp.sum(batch.mask))

  def loss_fn(params: Any) -> tuple[jax.Array, Metrics]:
    loss, values = _mle_loss(
      params, batch, keys, model, model.config.label_smoothing
    )
    return jnp.sum(loss * batch.mask) / count, values

  grads, values = jax.grad(loss_fn, has_aux=True)(state.params)
  grads = psum(grads)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  state = TrainState(
    step=state.step + 1,
    params=optax.apply_updates(state.params, updates),
    opt_state=opt_state,
  )
  return state, _global_sums(values, batch.mask)


def eval_step(
  params: Any, batch: Batch, *, model: nn.Module
) -> tuple[Metrics, Metrics]:
  """Scores targets with teacher forcing, without dropout or smoothing.

  Args:
    params: The model's parameters.
    batch: This device's examples.
    model: The system.

  Returns:
    Sums over the global batch, and each example's values `[B]`.
  """
  _, values = _mle_loss(params, batch, None, model, 0.0)
  return _global_sums(values, batch.mask), values


def predict_step(
  params: Any, batch: Batch, *, model: nn.Module, config: EvalConfig
) -> Prediction:
  """Reads contexts and writes responses.

  Args:
    params: The model's parameters.
    batch: This device's examples; targets are not looked at.
    model: The system.
    config: Greedy or beam search, and its limits.

  Returns:
    Responses and emotions.
  """
  variables = {"params": params}
  rows, steps, beams = (
    len(batch.mask),
    config.max_decode_steps,
    config.beam_size,
  )
  encoded: Any = model.apply(variables, _inputs(batch), None, method="encode")
  emotion_probs = jax.nn.softmax(encoded.emotion_logits)
  encoded = jax.tree.map(lambda x: jnp.repeat(x, beams, axis=0), encoded)
  cache = model.apply(variables, rows * beams, steps, method="init_cache")

  def step(tokens: jax.Array, cache: Any, index: jax.Array) -> Any:
    return model.apply(
      variables, encoded, tokens, cache, index, method="decode_step"
    )

  if beams == 1:
    tokens, cache = decoding.greedy_search(
      step, cache, rows, steps, eos=vocab.EOS, pad=vocab.PAD
    )
  else:
    tokens, _, cache = decoding.beam_search(
      step,
      cache,
      rows,
      steps,
      beams,
      config.length_penalty,
      eos=vocab.EOS,
      pad=vocab.PAD,
    )
  return Prediction(tokens, cache.copied_from, emotion_probs)


def compile_mle_step(
  model: nn.Module, optimizer: optax.GradientTransformation
) -> Any:
  """Returns `mle_step` for all devices; it donates its state."""
  return compile_step(
    functools.partial(mle_step, model=model, optimizer=optimizer),
    in_axes=(None, 0, None),
    out_axes=(None, None),
    donate_state=True,
  )


def compile_eval_step(model: nn.Module) -> Any:
  """Returns `eval_step` for all devices."""
  return compile_step(
    functools.partial(eval_step, model=model),
    in_axes=(None, 0),
    out_axes=(None, 0),
  )


def compile_predict_step(model: nn.Module, config: EvalConfig) -> Any:
  """Returns `predict_step` for all devices."""
  return compile_step(
    functools.partial(predict_step, model=model, config=config),
    in_axes=(None, 0),
    out_axes=0,
  )
