"""A system assembled for training: modules, optimisers, states and steps."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from empdg_jax.config import Config
from empdg_jax.models import registry
from empdg_jax.models.adversary import Adversary
from empdg_jax.models.encoder_decoder import EncoderDecoder
from empdg_jax.training import steps, train_state
from empdg_jax.training.train_state import TrainState


class TrainSteps(NamedTuple):
  """The compiled steps of the three phases.

  Attributes:
    mle: See `steps.mle_step`.
    discriminator: See `steps.discriminator_step`; None without discriminators.
    adversarial: See `steps.adversarial_generator_step`; None likewise.
  """

  mle: Any
  discriminator: Any = None
  adversarial: Any = None


@dataclasses.dataclass(frozen=True)
class Trainable:
  """The modules and optimisers that training a system needs.

  Attributes:
    generator: The module that responds.
    optimizer: The generator's optimiser.
    discriminators: The names of the discriminators, empty for a system without
      phases 2 and 3.
    adversary: The discriminators' module and the way they read responses, None
      without discriminators.
    discriminator_optimizer: The one optimiser of all discriminators.
  """

  generator: EncoderDecoder
  optimizer: optax.GradientTransformation
  discriminators: tuple[str, ...]
  adversary: Adversary | None
  discriminator_optimizer: optax.GradientTransformation

  def create_states(
    self, seed: int, embeddings: np.ndarray | None = None
  ) -> tuple[TrainState, TrainState | None]:
    """Draws the states before the first update.

    Args:
      seed: The seed of the parameters.
      embeddings: The initial word embeddings, `[V, d]`, or None to draw them.

    Returns:
      The states of the generator and of the discriminators, None without
      discriminators.
    """
    generator = train_state.create_train_state(
      self.generator, self.optimizer, seed, embeddings
    )
    if self.adversary is None:
      return generator, None
    return generator, train_state.create_discriminator_state(
      self.adversary.discriminator,
      self.discriminators,
      self.discriminator_optimizer,
      seed,
    )

  def compile_steps(
    self, devices: Sequence[jax.Device] | None = None
  ) -> TrainSteps:
    """Returns the steps for the given devices, all devices for None.

    JAX compiles a step at its first batch of each shape.
    """
    mle = steps.compile_mle_step(self.generator, self.optimizer, devices)
    if self.adversary is None:
      return TrainSteps(mle)
    return TrainSteps(
      mle,
      steps.compile_discriminator_step(
        self.generator, self.adversary, self.discriminator_optimizer, devices
      ),
      steps.compile_adversarial_generator_step(
        self.generator, self.adversary, self.optimizer, devices
      ),
    )


def assemble(
  config: Config, vocab_size: int, num_emotions: int, is_emotional: np.ndarray
) -> Trainable:
  """Builds a system's generator, discriminators and optimisers.

  Args:
    config: The run's configuration.
    vocab_size: V.
    num_emotions: The number of emotion labels.
    is_emotional: The words that the emotional discriminator reads, `[V]`
      booleans.

  Raises:
    InputError: There is no such system, or it cannot have these sizes.
  """
  generator = registry.create_model(config.model, vocab_size, num_emotions)
  names = registry.find_system(config.model).discriminators
  return Trainable(
    generator,
    train_state.create_optimizer(config.train, config.model.emb_dim),
    names,
    registry.create_adversary(config, is_emotional) if names else None,
    train_state.create_discriminator_optimizer(config.train),
  )
