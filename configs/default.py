"""The default of every field; the other files state their differences."""

from empdg_jax.config import Config


def get_config() -> Config:
  """Returns the default configuration."""
  return Config()
