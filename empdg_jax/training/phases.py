"""The three phases of training as data: their steps, length and early stop."""

import dataclasses

from empdg_jax.config import TrainConfig
from empdg_jax.training.learner import Learner, Step

MLE, DISCRIMINATOR, ADVERSARIAL = "mle", "discriminator", "adversarial"


@dataclasses.dataclass(frozen=True)
class Phase:
  """One of the three phases, a sequence of equal rounds.

  Attributes:
    name: The name in `metrics.jsonl` and in checkpoints.
    title: The name that people read.
    total: The largest number of rounds.
    steps: One round: its steps in order, each on a call of its own. A single
      step's call may take several rounds.
    steps_per_call: The most batches of a call.
    eval_every: Rounds between validations; 0 for no validation.
    patience: Validations without a better one after which the phase ends.
    metric: The validation metric that chooses the best generator.
    validates_first: Whether a validation comes before the first round, so that
      a round must improve on the phase before.
  """

  name: str
  title: str
  total: int
  steps: tuple[Step, ...]
  steps_per_call: int = 1
  eval_every: int = 0
  patience: int = 1
  metric: str = "perplexity"
  validates_first: bool = False


def phases_of(config: TrainConfig, learner: Learner) -> list[Phase]:
  """Returns the phases of a system, the first alone without discriminators."""
  mle = Phase(
    MLE,
    "Training",
    total=config.mle_steps,
    steps=(learner.mle,),
    steps_per_call=learner.steps_per_call,
    eval_every=config.mle_eval_every,
    patience=config.mle_patience,
    metric=config.mle_selection_metric,
  )
  if not learner.has_discriminators:
    return [mle]
  return [
    mle,
    Phase(
      DISCRIMINATOR,
      "Training the discriminators",
      total=config.discriminator_steps,
      steps=(learner.discriminator,),
    ),
    Phase(
      ADVERSARIAL,
      "Adversarial rounds",
      total=config.adversarial_rounds,
      steps=(learner.discriminator,) * config.d_steps
      + (learner.adversarial,) * config.g_steps,
      eval_every=config.adversarial_eval_every,
      patience=config.adversarial_patience,
      metric=config.selection_metric,
      validates_first=True,
    ),
  ]
