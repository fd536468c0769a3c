"""A system assembled for training: modules, optimisers, states and steps."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from empdg_jax.config import Config
from empdg_jax.data import prepare
from empdg_jax.data.prepare import Dataset
from empdg_jax.models import registry
from empdg_jax.models.adversary import Adversary
from empdg_jax.models.encoder_decoder import EncoderDecoder
from empdg_jax.training import precision, steps, train_state
from empdg_jax.training.train_state import DISCRIMINATOR, GENERATOR, TrainState


class TrainSteps(NamedTuple):
  """The compiled steps of the three phases.

  Attributes:
    mle: See `steps.mle_step`, or `steps.mle_steps` for several steps a call.
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
    optimizer: The generator's optimiser in phase 1.
    adversarial_optimizer: The same in phase 3, with the rate of that phase.
    discriminators: The names of the discriminators, empty for a system without
      phases 2 and 3.
    adversary: The discriminators' module and the way they read responses, None
      without discriminators.
    discriminator_optimizer: The one optimiser of all discriminators.
  """

  generator: EncoderDecoder
  optimizer: optax.GradientTransformation
  adversarial_optimizer: optax.GradientTransformation
  discriminators: tuple[str, ...]
  adversary: Adversary | None
  discriminator_optimizer: optax.GradientTransformation

  @property
  def evaluator(self) -> EncoderDecoder:
    """The generator in float32, as evaluation computes."""
    return self.generator.clone(dtype=jnp.float32)

  def create_states(
    self, seed: int, embeddings: np.ndarray | None = None
  ) -> dict[str, TrainState]:
    """Draws the states before the first update.

    Args:
      seed: The seed of the parameters.
      embeddings: The initial word embeddings, `[V, d]`, or None to draw them.

    Returns:
      The states by player: `GENERATOR`, and `DISCRIMINATOR` if the system has
      discriminators.
    """
    key = jax.random.key(seed)
    draw = functools.partial(train_state.init_params, self.generator)
    params = jax.jit(draw)(key)
    if embeddings is not None:
      params["embedding"] = jnp.asarray(embeddings)
    states = {GENERATOR: train_state.start(params, self.optimizer)}
    if self.adversary is not None:
      states[DISCRIMINATOR] = train_state.create_discriminator_state(
        self.adversary.discriminator,
        self.discriminators,
        self.discriminator_optimizer,
        seed,
      )
    return states

  def compile_steps(
    self, devices: Sequence[jax.Device] | None = None, steps_per_call: int = 1
  ) -> TrainSteps:
    """Returns the steps for the given devices, all devices for None.

    JAX compiles a step at its first batch of each shape.

    Args:
      devices: The devices.
      steps_per_call: The steps of maximum likelihood in a call.
    """
    compile_step = functools.partial(
      steps.compile_step, devices=devices, model=self.generator
    )
    mle = compile_step(
      steps.mle_step if steps_per_call == 1 else steps.mle_steps,
      optimizer=self.optimizer,
    )
    if self.adversary is None:
      return TrainSteps(mle)
    compile_step = functools.partial(compile_step, adversary=self.adversary)
    return TrainSteps(
      mle,
      compile_step(
        steps.discriminator_step, optimizer=self.discriminator_optimizer
      ),
      compile_step(
        steps.adversarial_generator_step, optimizer=self.adversarial_optimizer
      ),
    )


def assemble_for(dataset: Dataset, config: Config) -> Trainable:
  """Builds the system of a configuration for a dataset; see `assemble`."""
  return assemble(
    config,
    len(dataset.vocabulary),
    len(dataset.corpus.emotions),
    prepare.emotional_table(dataset.vocabulary, dataset.lexicon, dataset.rules),
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
  dtype = precision.compute_dtype(config.train)
  generator = registry.create_model(
    config.model, vocab_size, num_emotions, dtype
  )
  names = registry.chosen_discriminators(config)
  registry.check_selection(config)
  create_optimizer = functools.partial(
    train_state.create_optimizer, config.train, config.model.emb_dim
  )
  return Trainable(
    generator,
    create_optimizer(),
    create_optimizer(adversarial=True),
    names,
    registry.create_adversary(config, is_emotional) if names else None,
    optax.adam(config.train.discriminator_learning_rate),
  )
