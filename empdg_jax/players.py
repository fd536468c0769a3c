"""The generator and its critics in training: their states and their steps."""

import pathlib
from typing import Any

import jax
import numpy as np

from empdg_jax import checkpoint, evaluate, parallel, steps, train_state
from empdg_jax.checkpoint import Checkpoints
from empdg_jax.config import Config
from empdg_jax.data import prepare
from empdg_jax.data.pipeline import Batch
from empdg_jax.models import registry

GENERATOR, DISCRIMINATOR = "generator", "discriminator"

# Metric sums of one update, of `GENERATOR` or of `DISCRIMINATOR`.
Sums = tuple[str, Any]


class Players:
  """A system's generator, and its critics if it has any.

  Attributes:
    parameters: How many the generator has.
    generator_steps: Its updates so far.
    has_critics: Whether the system has critics.
    running: An array of the latest update, None before the first.
  """

  def __init__(
    self,
    config: Config,
    dataset: prepare.Dataset,
    embeddings: np.ndarray | None,
  ) -> None:
    """Draws the states of a new run; nothing is compiled yet.

    Args:
      config: The run's configuration.
      dataset: Its data.
      embeddings: The word embeddings to begin with, `[V, d]`, or None.
    """
    self._config = config
    self.generator_steps = 0
    model = registry.create_model(config.model, len(dataset.vocabulary))
    self.parameters = train_state.count_parameters(model)
    optimizer = train_state.create_optimizer(config.train, config.model.emb_dim)
    self._p_mle_step = steps.compile_mle_step(model, optimizer)
    self._p_eval_step = steps.compile_eval_step(model)
    self._generator = train_state.create_train_state(
      model, optimizer, config.train.seed, embeddings
    )
    self._critics: Any = None
    self.running: Any = None
    names = registry.critic_names(config.model)
    self.has_critics = bool(names)
    if names:
      emotional = prepare.emotional_table(dataset.vocabulary, dataset.lexicon)
      adversary = registry.create_adversary(config, emotional)
      critics_optimizer = train_state.create_critics_optimizer(config.train)
      self._p_discriminator_step = steps.compile_discriminator_step(
        model, adversary, critics_optimizer
      )
      self._p_adversarial_generator_step = (
        steps.compile_adversarial_generator_step(model, adversary, optimizer)
      )
      self._critics = train_state.create_critics_state(
        adversary.critic, names, critics_optimizer, config.train.seed
      )

  def take_over(self, workdir: pathlib.Path) -> None:
    """Takes another run's best generator; see `checkpoint.restore_generator`.

    Args:
      workdir: The other run's folder.
    """
    self._generator = checkpoint.restore_generator(workdir, self._generator)

  def restore(self, checkpoints: Checkpoints) -> None:
    """Takes the states of the latest checkpoint."""
    latest = checkpoint.LATEST
    self._generator = checkpoints.restore_generator(latest, self._generator)
    self._critics = checkpoints.restore_critics(latest, self._critics)

  def start(self) -> None:
    """Puts the states on the devices, after which steps can be taken."""
    self.generator_steps = int(self._generator.step)
    self._generator = parallel.replicate(self._generator)
    self._critics = parallel.replicate(self._critics)
    self._key = parallel.replicate(jax.random.key(self._config.train.seed))

  def restore_best(self, checkpoints: Checkpoints) -> None:
    """Goes back to the best generator, on the devices."""
    best = checkpoints.restore_generator(
      checkpoint.BEST, parallel.unreplicate(self._generator)
    )
    self.generator_steps = int(best.step)
    self._generator = parallel.replicate(best)

  def save(
    self,
    checkpoints: Checkpoints,
    kind: str,
    step: int,
    progress: dict[str, Any],
  ) -> None:
    """Begins to write a checkpoint; see `Checkpoints.save`."""
    checkpoints.save(
      kind,
      step,
      parallel.unreplicate(self._generator),
      parallel.unreplicate(self._critics),
      progress,
    )

  def mle_step(self, batch: Batch) -> Sums:
    """Takes one step of maximum likelihood on this host's rows."""
    self._generator, sums = self._p_mle_step(
      self._generator, parallel.shard(batch), self._key
    )
    self.generator_steps += 1
    return self._taken(GENERATOR, sums)

  def discriminator_step(self, batch: Batch) -> Sums:
    """Takes one step of the critics."""
    self._critics, sums = self._p_discriminator_step(
      self._critics, self._generator.params, parallel.shard(batch), self._key
    )
    return self._taken(DISCRIMINATOR, sums)

  def adversarial_generator_step(self, batch: Batch) -> Sums:
    """Takes one step of the generator that hears its critics."""
    self._generator, sums = self._p_adversarial_generator_step(
      self._generator, self._critics.params, parallel.shard(batch), self._key
    )
    self.generator_steps += 1
    return self._taken(GENERATOR, sums)

  def _taken(self, kind: str, sums: Any) -> Sums:
    self.running = sums["examples"]
    return kind, sums

  def validate(self, batches: list[Batch]) -> dict[str, float]:
    """Scores this host's rows of a split; see `evaluate.validate`."""
    return evaluate.validate(self._p_eval_step, self._generator.params, batches)
