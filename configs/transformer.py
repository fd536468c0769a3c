"""The Transformer of Vaswani et al. (2017), which predicts no emotion.

empdg train --config=configs/transformer.py --workdir=runs/transformer
"""

from empdg_jax.config import Config


def get_config() -> Config:
  """Returns the configuration."""
  config = Config()
  config.model.name = "transformer"
  return config
