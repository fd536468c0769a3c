"""EmpDG on many devices: 32 examples on each, and a learning rate to match.

empdg train --config=configs/pod.py:8 --workdir=runs/pod

The number behind the colon says how many devices there are, 8 by default. The
dataset is small: with 8 devices an epoch has 81 steps, with 256 only 3.
"""

from empdg_jax.config import Config

PER_DEVICE = 32


def get_config(devices: str = "8") -> Config:
  """Returns the configuration for so many devices."""
  config = Config()
  config.model.name = "empdg"
  config.train.batch_size = PER_DEVICE * int(devices)
  config.eval.batch_size = PER_DEVICE * int(devices)
  # Adam's rate grows with the square root of the batch (Malladi et al., 2022):
  # that of Vaswani et al. does so when it warms up over the same examples.
  scale = config.train.batch_size / Config().train.batch_size
  config.train.warmup_steps = max(1, round(8_000 / scale))
  config.train.discriminator_learning_rate *= scale**0.5
  config.train.mle_eval_every = max(1, round(2_000 / scale))
  config.train.log_every = 10
  return config
