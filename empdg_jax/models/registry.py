"""The systems by name."""

import flax.linen as nn

from empdg_jax.config import InputError, ModelConfig
from empdg_jax.models.generator import Generator

MODELS: dict[str, type[nn.Module]] = {"empdg_wo_d": Generator}


def create_model(config: ModelConfig, vocab_size: int) -> nn.Module:
  """Returns the system that `config.name` names.

  Raises:
    InputError: There is none of that name.
  """
  if config.name not in MODELS:
    raise InputError(
      f"config.model.name={config.name!r}: expected one of "
      + ", ".join(sorted(MODELS))
    )
  return MODELS[config.name](config, vocab_size)
