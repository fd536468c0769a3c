"""The paper's protocol for a system, with regularisation and a cosine schedule.

empdg train --config=configs/paper.py:empdg_wo_d --workdir=runs/empdg_wo_d
  --config.data.lexicon=nrc_words.txt --config.data.vectors=glove.6B.300d.txt

After the colon stands the system, EmpDG by default. The settings are the same
for all six. To begin at phase 2 with the generator of another run, add
--config.train.mle_checkpoint=runs/empdg_wo_d.
"""

from empdg_jax.config import Config


def get_config(system: str = "empdg") -> Config:
  """Returns the configuration of a system."""
  config = Config()
  config.data.vocab_scope = "all"
  config.model.name = system
  config.model.label_smoothing = 0.0
  config.model.emotion_pooling = "attention"
  config.model.emotion_dropout = 0.5
  config.model.word_dropout = 0.3
  config.model.emotion_loss_weight = 3.0
  config.train.schedule = "cosine"
  config.train.peak_learning_rate = 1e-3
  config.train.warmup_steps = 1_500
  config.train.mle_steps = 7_000
  config.train.mle_eval_every = 1_000
  # The rate falls to the end: no early stop.
  config.train.mle_patience = 7
  config.train.discriminator_steps = 300
  config.train.gradient_penalty_weight = 10.0
  config.train.generator_signal = "expected"
  config.train.generator_signal_share = 0.3
  config.train.adversarial_learning_rate = 2e-4
  config.train.ema_decay = 0.99
  config.train.d_steps = 1
  config.train.g_steps = 1
  # A fixed number of rounds: the game swings, and a peak would be luck.
  config.train.adversarial_rounds = 250
  config.train.adversarial_eval_every = 50
  config.train.adversarial_patience = 6
  config.train.selection_metric = "last"
  # The paper's released responses run to 51 tokens.
  config.eval.max_decode_steps = 50
  return config
