"""A small EmpDG on the embedded corpus: three phases in minutes on a laptop.

empdg train --config=configs/quickstart.py --workdir=runs/quickstart
"""

from empdg_jax.config import Config


def get_config() -> Config:
  """Returns the configuration."""
  config = Config()
  config.data.source = "sample"
  config.data.shapes = ((24, 12, 28), (64, 28, 28))
  config.data.feedback_length = 28
  config.model.name = "empdg"
  config.model.emb_dim = 66
  config.train.mle_steps = 1_000
  config.train.mle_eval_every = 250
  config.train.warmup_steps = 300
  config.train.discriminator_steps = 100
  config.train.adversarial_rounds = 40
  config.train.adversarial_eval_every = 10
  config.train.checkpoint_every = 250
  return config
