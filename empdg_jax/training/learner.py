"""The generator and its discriminators in training: states and steps."""

import pathlib
from typing import Any

import jax
import numpy as np

from empdg_jax.config import Config
from empdg_jax.data import prepare
from empdg_jax.data.pipeline import Batch
from empdg_jax.parallel import devices
from empdg_jax.training import checkpoint, steps, train_state, validation
from empdg_jax.training.checkpoint import Checkpoints
from empdg_jax.training.trainable import assemble

GENERATOR, DISCRIMINATOR = "generator", "discriminator"

# Metric sums of one update, of `GENERATOR` or of `DISCRIMINATOR`.
Sums = tuple[str, Any]


class Learner:
  """A system's generator, and its discriminators if it has any.

  Attributes:
    parameters: How many the generator has.
    generator_steps: Its updates so far.
    has_discriminators: Whether the system has discriminators.
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
    self._seed = config.train.seed
    self.generator_steps = 0
    self.running: Any = None
    trainable = assemble(
      config,
      len(dataset.vocabulary),
      len(dataset.corpus.emotions),
      prepare.emotional_table(dataset.vocabulary, dataset.lexicon),
    )
    self.parameters = train_state.count_parameters(trainable.generator)
    self.has_discriminators = trainable.adversary is not None
    self._generator: Any
    self._discriminators: Any
    self._generator, self._discriminators = trainable.create_states(
      self._seed, embeddings
    )
    self._p_steps = trainable.compile_steps()
    self._p_eval_step = steps.compile_eval_step(trainable.generator)

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
    self._discriminators = checkpoints.restore_discriminators(
      latest, self._discriminators
    )

  def start(self) -> None:
    """Puts the states on the devices, after which steps can be taken."""
    self.generator_steps = int(self._generator.step)
    self._generator = devices.replicate(self._generator)
    self._discriminators = devices.replicate(self._discriminators)
    self._key = devices.replicate(jax.random.key(self._seed))

  def restore_best(self, checkpoints: Checkpoints) -> None:
    """Goes back to the best generator, on the devices."""
    best = checkpoints.restore_generator(
      checkpoint.BEST, devices.unreplicate(self._generator)
    )
    self.generator_steps = int(best.step)
    self._generator = devices.replicate(best)

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
      devices.unreplicate(self._generator),
      devices.unreplicate(self._discriminators),
      progress,
    )

  def mle_step(self, batch: Batch) -> Sums:
    """Takes one step of maximum likelihood on this host's rows."""
    self._generator, sums = self._p_steps.mle(
      self._generator, devices.shard(batch), self._key
    )
    self.generator_steps += 1
    return self._taken(GENERATOR, sums)

  def discriminator_step(self, batch: Batch) -> Sums:
    """Takes one step of the discriminators."""
    self._discriminators, sums = self._p_steps.discriminator(
      self._discriminators,
      self._generator.params,
      devices.shard(batch),
      self._key,
    )
    return self._taken(DISCRIMINATOR, sums)

  def adversarial_generator_step(self, batch: Batch) -> Sums:
    """Takes one step of the generator that hears its discriminators."""
    self._generator, sums = self._p_steps.adversarial(
      self._generator,
      self._discriminators.params,
      devices.shard(batch),
      self._key,
    )
    self.generator_steps += 1
    return self._taken(GENERATOR, sums)

  def _taken(self, kind: str, sums: Any) -> Sums:
    self.running = sums["examples"]
    return kind, sums

  def validate(self, batches: list[Batch]) -> dict[str, float]:
    """Scores this host's rows of a split; see `validation.validate`."""
    return validation.validate(
      self._p_eval_step, self._generator.params, batches
    )
