"""The state that training changes, and its optimiser."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from empdg_jax.config import TrainConfig
from empdg_jax.models.discriminators import (
  Discriminator,
  DiscriminatorInputs,
  Utterances,
)
from empdg_jax.models.encoder_decoder import Inputs


class TrainState(flax.struct.PyTreeNode):
  """Everything an update reads and writes.

  Attributes:
    step: Updates done, a scalar.
    params: The model's parameters.
    opt_state: Adam's moments and its own count.
  """

  step: jax.Array
  params: Any
  opt_state: optax.OptState


def learning_rate(config: TrainConfig, emb_dim: int) -> optax.Schedule:
  """Returns the schedule of Vaswani et al. (2017), §5.3.

  `factor * d ** -0.5 * min(n ** -0.5, n * warmup ** -1.5)` for the n-th update.

  Args:
    config: Factor and warm-up steps.
    emb_dim: d.

  Returns:
    A function of the number of updates done before.

  >>> rate = learning_rate(TrainConfig(), emb_dim=300)
  >>> round(float(rate(7_999)), 8)  # The 8,000th update: the highest rate.
  0.0006455
  """
  scale = config.learning_rate_factor * emb_dim**-0.5

  def schedule(count: jax.typing.ArrayLike) -> jax.Array:
    n = jnp.asarray(count, jnp.float32) + 1.0
    return scale * jnp.minimum(n**-0.5, n * config.warmup_steps**-1.5)

  return schedule


def create_optimizer(
  config: TrainConfig, emb_dim: int
) -> optax.GradientTransformation:
  """Returns Adam with the schedule of `learning_rate`."""
  return optax.adam(
    learning_rate(config, emb_dim),
    b1=config.adam_b1,
    b2=config.adam_b2,
    eps=config.adam_eps,
  )


def create_discriminator_optimizer(
  config: TrainConfig,
) -> optax.GradientTransformation:
  """Returns Adam with the discriminators' constant learning rate."""
  return optax.adam(config.discriminator_learning_rate)


def init_params(model: nn.Module, key: jax.Array) -> Any:
  """Draws a system's parameters."""
  ids = jnp.zeros((1, 2), jnp.int32)
  return model.init(key, Inputs(ids, ids, ids), ids)["params"]


def count_parameters(model: nn.Module) -> int:
  """Returns how many parameters `init_params` draws."""
  params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
  return sum(x.size for x in jax.tree.leaves(params))


def create_discriminator_state(
  discriminator: Discriminator,
  names: Sequence[str],
  optimizer: optax.GradientTransformation,
  seed: int,
) -> TrainState:
  """Draws the discriminators' parameters, by name, and starts their optimiser.

  Args:
    discriminator: The module of every discriminator.
    names: The discriminators.
    optimizer: Of all of them.
    seed: Of the parameters.

  Returns:
    The state before the first update.
  """
  word = Utterances(
    jnp.zeros((1, 1, discriminator.dim)), jnp.ones((1, 1), bool)
  )
  reading = DiscriminatorInputs(
    (word,), word, jnp.zeros((1, discriminator.dim))
  )
  keys = jax.random.split(jax.random.key(seed), len(names))
  params = {
    name: jax.jit(discriminator.init)(key, reading)["params"]
    for name, key in zip(names, keys, strict=True)
  }
  return TrainState(
    step=jnp.int32(0), params=params, opt_state=optimizer.init(params)
  )


def create_train_state(
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  seed: int,
  embeddings: np.ndarray | None = None,
) -> TrainState:
  """Draws parameters and starts the optimiser.

  Args:
    model: The system.
    optimizer: Its optimiser.
    seed: Of the parameters.
    embeddings: The word embeddings to begin with, `[V, d]`, or None to draw
      them.

  Returns:
    The state before the first update.
  """
  params = jax.jit(functools.partial(init_params, model))(jax.random.key(seed))
  if embeddings is not None:
    params["embedding"] = jnp.asarray(embeddings)
  return TrainState(
    step=jnp.int32(0), params=params, opt_state=optimizer.init(params)
  )
