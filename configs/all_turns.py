"""The settings of `paper.py` for every listener's turn, as later papers score.

empdg train --config=configs/all_turns.py:empdg_wo_d \
  --workdir=runs/empdg_wo_d --config.data.lexicon=nrc_words.txt \
  --config.data.vectors=glove.6B.300d.txt
"""

from empdg_jax import config as config_lib
from empdg_jax.config import Config


def get_config(system: str = "empdg") -> Config:
  """Returns the configuration of a system."""
  config = config_lib.from_file(f"paper:{system}")
  config.data.example_set = "all_turns"
  # An epoch has twice as many batches.
  config.train.mle_steps = 12_000
  config.train.mle_eval_every = 2_000
  return config
