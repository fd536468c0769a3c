"""EmpDG: the generator with both interactive critics, in three phases.

empdg train --config=configs/empdg.py --workdir=runs/empdg

It begins at phase 2 with the generator of another run, if one is given:
--config.train.mle_checkpoint=runs/empdg_wo_d.
"""

from empdg_jax.config import Config


def get_config() -> Config:
  """Returns the configuration."""
  config = Config()
  config.model.name = "empdg"
  return config
