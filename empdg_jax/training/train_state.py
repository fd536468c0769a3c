"""The training state, parameters and optimisers."""

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

# The players of the adversarial game; all discriminators together are one.
GENERATOR, DISCRIMINATOR = "generator", "discriminator"


class TrainState(flax.struct.PyTreeNode):
  """Everything that an update changes.

  Attributes:
    step: The number of updates, a scalar.
    params: The parameters.
    opt_state: Adam's moments and its own number of updates.
    game: What phases 2 and 3 add to the generator's state, None in phase 1; see
      `start_game`.
  """

  # No optimiser and no functions: the state is what a checkpoint holds and what
  # a compiled step takes.

  step: jax.Array
  params: Any
  opt_state: optax.OptState
  game: dict[str, Any] | None = None

  @property
  def evaluated(self) -> Any:
    """The parameters to evaluate: the average of phase 3, if there is one."""
    return (self.game or {}).get("average", self.params)


def start_game(config: TrainConfig, params: Any) -> dict[str, Any] | None:
  """Returns what phases 2 and 3 add to the generator's state.

  Args:
    config: The options that need it.
    params: The parameters at the end of phase 1.

  Returns:
    `average`, the moving average of the parameters, with `ema_decay`; `norms`,
    those of the gradients of likelihood and signal, smoothed, `[2]`, with
    `generator_signal_share`. None without either.
  """
  game: dict[str, Any] = {}
  if config.ema_decay:
    # A copy, since a step reuses the memory of both.
    game["average"] = jax.tree.map(np.array, params)
  if config.generator_signal_share:
    game["norms"] = np.zeros(2, np.float32)
  return game or None


def learning_rate(
  config: TrainConfig, emb_dim: int, adversarial: bool = False
) -> optax.Schedule:
  """Returns the generator's learning rate.

  `"inverse_sqrt"` is the schedule of Vaswani et al. (2017), §5.3: for the n-th
  update `factor * d ** -0.5 * min(n ** -0.5, n * warmup ** -1.5)`. `"cosine"`
  is `peak * n / warmup` up to n = warmup, then `peak * (1 + cos(pi (n - warmup)
  / (mle_steps - warmup))) / 2`, and 0 after `mle_steps`.

  Args:
    config: The schedule and its numbers.
    emb_dim: d.
    adversarial: Whether it is phase 3, whose rate may be a constant.

  Returns:
    A function of the number of earlier updates.

  >>> rate = learning_rate(TrainConfig(), emb_dim=300)
  >>> round(float(rate(7_999)), 8)  # The 8,000th update: the highest rate.
  0.0006455
  """
  if adversarial and config.adversarial_learning_rate:
    return lambda _: jnp.float32(config.adversarial_learning_rate)
  # Optax counts from 0, where the one schedule would be infinite and the other
  # would waste an update.
  if config.schedule == "cosine":
    cosine = optax.warmup_cosine_decay_schedule(
      0.0, config.peak_learning_rate, config.warmup_steps, config.mle_steps
    )
    return lambda count: jnp.asarray(cosine(count + 1))
  scale = config.learning_rate_factor * emb_dim**-0.5

  def schedule(count: jax.typing.ArrayLike) -> jax.Array:
    n = jnp.asarray(count, jnp.float32) + 1.0
    return scale * jnp.minimum(n**-0.5, n * config.warmup_steps**-1.5)

  return schedule


def create_optimizer(
  config: TrainConfig, emb_dim: int, adversarial: bool = False
) -> optax.GradientTransformation:
  """Returns Adam with the schedule of `learning_rate`."""
  # A schedule even where the rate is constant: both phases share a state.
  return optax.adam(
    learning_rate(config, emb_dim, adversarial),
    b1=config.adam_b1,
    b2=config.adam_b2,
    eps=config.adam_eps,
  )


def init_params(model: nn.Module, key: jax.Array) -> Any:
  """Draws a system's parameters."""
  # No parameter's shape depends on the batch: any ids will do.
  ids = jnp.zeros((1, 2), jnp.int32)
  return model.init(key, Inputs(ids, ids, ids), ids)["params"]


def count_parameters(model: nn.Module) -> int:
  """Returns the number of parameters, without drawing them."""
  params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
  return sum(x.size for x in jax.tree.leaves(params))


def start(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
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
  return start(params, optimizer)
