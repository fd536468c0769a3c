"""EmoPrepend-1 with a semantic discriminator (the paper's "w/o G").

empdg train --config=configs/empdg_wo_g.py --workdir=runs/empdg_wo_g

To begin at phase 2 with the generator of another run, add
--config.train.mle_checkpoint=runs/emoprepend.
"""

from empdg_jax.config import Config


def get_config() -> Config:
  """Returns the configuration."""
  config = Config()
  config.model.name = "empdg_wo_g"
  return config
