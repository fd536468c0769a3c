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
  # The paper's values are the defaults. With its penalty weight of 0.1 the
  # critics' slope had not settled after 1,000 steps (19 and rising); what
  # worked best on the real dataset, see the README:
  # config.train.gradient_penalty_weight = 10.0
  # config.train.generator_signal_weight = 0.1
  return config
