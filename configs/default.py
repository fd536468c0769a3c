"""The default configuration; the other files change some of its fields."""

from empdg_jax.config import Config


def get_config() -> Config:
  """Returns the default configuration."""
  return Config()
