"""The mixture of empathetic listeners (Lin et al., 2019).

empdg train --config=configs/moel.py --workdir=runs/moel
"""

from empdg_jax.config import Config


def get_config() -> Config:
  """Returns the configuration."""
  config = Config()
  config.model.name = "moel"
  return config
