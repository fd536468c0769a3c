"""EmpDG on many devices: 32 examples per device and a learning rate to match.

empdg train --config=configs/pod.py:8 --workdir=runs/pod

The number after the colon is the number of devices, 8 by default. The dataset
is small: an epoch has 81 steps on 8 devices and only 3 on 256.
"""

from empdg_jax.config import Config, InputError

# launch/README.md compares it with fewer and more.
PER_DEVICE = 32


def get_config(devices: str = "8") -> Config:
  """Returns the configuration for a number of devices."""
  if not (devices.isdecimal() and int(devices[:6]) > 0 and len(devices) < 6):
    raise InputError(f"expected a number of devices, such as :8, not {devices}")
  config = Config()
  config.model.name = "empdg"
  config.train.batch_size = PER_DEVICE * int(devices)
  config.eval.batch_size = PER_DEVICE * int(devices)
  # Adam's rate should grow with the square root of the batch (Malladi et al.,
  # 2022). The schedule of Vaswani et al. does so if it warms up over the same
  # number of examples, that is over fewer steps.
  scale = config.train.batch_size / Config().train.batch_size
  config.train.warmup_steps = max(1, round(8_000 / scale))
  config.train.discriminator_learning_rate *= scale**0.5
  config.train.mle_eval_every = max(1, round(2_000 / scale))
  config.train.log_every = 10
  return config
