"""EmpDG's generator trained by maximum likelihood (the paper's "w/o D").

empdg train --config=configs/empdg_wo_d.py --workdir=runs/empdg_wo_d

The paper's numbers also need its lexicon, vectors and vocabulary:
--config.data.lexicon=nrc_words.txt --config.data.vectors=glove.6B.300d.txt
--config.data.vocab_scope=all.
"""

from empdg_jax.config import Config


def get_config() -> Config:
  """Returns the configuration."""
  config = Config()
  config.model.name = "empdg_wo_d"
  return config
