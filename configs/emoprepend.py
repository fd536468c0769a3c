"""EmoPrepend-1 (Rashkin et al., 2019): the predicted emotion comes first.

empdg train --config=configs/emoprepend.py --workdir=runs/emoprepend
"""

from empdg_jax.config import Config


def get_config() -> Config:
  """Returns the configuration."""
  config = Config()
  config.model.name = "emoprepend"
  return config
