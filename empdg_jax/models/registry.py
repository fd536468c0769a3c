"""The systems by name."""

from typing import NamedTuple

import numpy as np

from empdg_jax.config import Config, InputError, ModelConfig
from empdg_jax.models.adversary import Adversary
from empdg_jax.models.baselines import EmoPrepend, MoEL, Transformer
from empdg_jax.models.discriminators import Critic
from empdg_jax.models.encoder_decoder import EncoderDecoder
from empdg_jax.models.generator import Generator


class System(NamedTuple):
  """What a system is made of.

  Attributes:
    generator: The module that responds.
    critics: The critics it is trained against, if any, in this order.
  """

  generator: type[EncoderDecoder]
  critics: tuple[str, ...] = ()


MODELS: dict[str, System] = {
  "transformer": System(Transformer),
  "emoprepend": System(EmoPrepend),
  "moel": System(MoEL),
  "empdg_wo_g": System(EmoPrepend, ("semantic",)),
  "empdg_wo_d": System(Generator),
  "empdg": System(Generator, ("semantic", "emotional")),
}


def _system(config: ModelConfig) -> System:
  if config.name not in MODELS:
    raise InputError(
      f"config.model.name={config.name!r}: expected one of "
      + ", ".join(sorted(MODELS))
    )
  return MODELS[config.name]


def create_model(config: ModelConfig, vocab_size: int) -> EncoderDecoder:
  """Returns the generator of the system that `config.name` names.

  Raises:
    InputError: There is none of that name.
  """
  return _system(config).generator(config, vocab_size)


def critic_names(config: ModelConfig) -> tuple[str, ...]:
  """Returns the names of the system's critics; none is without phases 2, 3."""
  return _system(config).critics


def same_generator(one: ModelConfig, other: ModelConfig) -> bool:
  """Returns whether two systems have the same module as their generator."""
  return _system(one).generator is _system(other).generator


def create_adversary(config: Config, is_emotional: np.ndarray) -> Adversary:
  """Returns what phases 2 and 3 add to the system.

  Args:
    config: The run's configuration.
    is_emotional: Which words the emotional critic reads, `[V]` booleans.

  Raises:
    InputError: d cannot be shared out among the convolutions.
  """
  model = config.model
  if model.emb_dim % len(model.kernel_widths):
    raise InputError(
      f"config.model.kernel_widths={model.kernel_widths}: their number must "
      f"divide config.model.emb_dim={model.emb_dim}"
    )
  return Adversary(
    Critic(model.emb_dim, model.kernel_widths),
    is_emotional,
    model.max_emotional_words,
    config.train,
  )
