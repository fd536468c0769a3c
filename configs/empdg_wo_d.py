"""EmpDG's generator trained by maximum likelihood (the paper's "w/o D").

empdg train --config=configs/empdg_wo_d.py --workdir=runs/empdg_wo_d
"""

from empdg_jax.config import Config


def get_config() -> Config:
  """Returns the configuration."""
  config = Config()
  config.model.name = "empdg_wo_d"
  return config
