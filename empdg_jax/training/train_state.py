"""The training state, parameters and optimisers."""

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
  """Everything that an update changes.

  Attributes:
    step: The number of updates, a scalar.
    params: The parameters.
    opt_state: Adam's moments and its own number of updates.
  """

  # No optimiser and no functions: the state is what a checkpoint holds and what
  # a compiled step takes.

  step: jax.Array
  params: Any
  opt_state: optax.OptState


def learning_rate(config: TrainConfig, emb_dim: int) -> optax.Schedule:
  """Returns the schedule of Vaswani et al. (2017), §5.3.

  `factor * d ** -0.5 * min(n ** -0.5, n * warmup ** -1.5)` for the n-th update.

  Args:
    config: The factor and the number of warm-up steps.
    emb_dim: d.

  Returns:
    A function of the number of earlier updates.

  >>> rate = learning_rate(TrainConfig(), emb_dim=300)
  >>> round(float(rate(7_999)), 8)  # The 8,000th update: the highest rate.
  0.0006455
  """
  scale = config.learning_rate_factor * emb_dim**-0.5

  def schedule(count: jax.typing.ArrayLike) -> jax.Array:
    # Optax counts from 0, where the formula would be infinite.
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
  # No parameter's shape depends on the batch: any ids will do.
  ids = jnp.zeros((1, 2), jnp.int32)
  return model.init(key, Inputs(ids, ids, ids), ids)["params"]


def count_parameters(model: nn.Module) -> int:
  """Returns the number of parameters, without drawing them."""
  params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
  return sum(x.size for x in jax.tree.leaves(params))


def _start(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
  """Returns the state before the first update."""
  return TrainState(
    step=jnp.int32(0), params=params, opt_state=optimizer.init(params)
  )


def create_discriminator_state(
  discriminator: Discriminator,
  names: Sequence[str],
  optimizer: optax.GradientTransformation,
  seed: int,
) -> TrainState:
  """Returns the state of all discriminators before the first update.

  Args:
    discriminator: The module of all discriminators.
    names: The names of the discriminators, the keys of `params`.
    optimizer: Their common optimiser.
    seed: The seed of the parameters.
  """
  word = Utterances(
    jnp.zeros((1, 1, discriminator.dim)), jnp.ones((1, 1), bool)
  )
  inputs = DiscriminatorInputs((word,), word, jnp.zeros((1, discriminator.dim)))
  keys = jax.random.split(jax.random.key(seed), len(names))
  params = {
    name: jax.jit(discriminator.init)(key, inputs)["params"]
    for name, key in zip(names, keys, strict=True)
  }
  return _start(params, optimizer)


def create_train_state(
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  seed: int,
  embeddings: np.ndarray | None = None,
) -> TrainState:
  """Returns the generator's state before the first update.

  Args:
    model: The generator.
    optimizer: Its optimiser.
    seed: The seed of the parameters.
    embeddings: The initial word embeddings, `[V, d]`, or None to draw them.
  """
  params = jax.jit(functools.partial(init_params, model))(jax.random.key(seed))
  if embeddings is not None:
    params["embedding"] = jnp.asarray(embeddings)
  return _start(params, optimizer)
