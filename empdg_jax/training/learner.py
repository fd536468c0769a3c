"""The generator and its discriminators in training: states and steps."""

import contextlib
import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from empdg_jax.config import Config
from empdg_jax.data import prepare
from empdg_jax.data.pipeline import Batch
from empdg_jax.parallel import devices
from empdg_jax.training import (
  calls,
  checkpoint,
  steps,
  train_state,
  validation,
)
from empdg_jax.training.calls import Call, CallSums
from empdg_jax.training.checkpoint import Checkpoints
from empdg_jax.training.train_state import DISCRIMINATOR, GENERATOR, TrainState
from empdg_jax.training.trainable import assemble_for


class Update(NamedTuple):
  """One update of one player.

  Attributes:
    player: `GENERATOR` or `DISCRIMINATOR`, for all discriminators together.
    batch: This host's rows of the batch.
    call: The sums of all updates of its call.
    index: Its index among them.
  """

  player: str
  batch: Batch
  call: CallSums
  index: int

  @property
  def sums(self) -> dict[str, float]:
    """The metric sums over the whole batch; waits for the devices."""
    return self.call.numbers[self.index]

  @property
  def not_finite(self) -> list[str]:
    """The names of the metrics that are not finite."""
    return [n for n, value in self.sums.items() if not math.isfinite(value)]

  @property
  def examples(self) -> list[int]:
    """The positions of this host's examples in the train split."""
    return [int(i) for i in self.batch.index[self.batch.mask > 0]]

  def to_json(self) -> str:
    """Returns everything about it; infinity and NaN as text."""
    sums = {name: str(value) for name, value in self.sums.items()}
    batch = {name: x.tolist() for name, x in self.batch._asdict().items()}
    return json.dumps({"player": self.player, "sums": sums, "batch": batch})


class Step(NamedTuple):
  """A step of one player.

  Attributes:
    player: The player that it updates.
    function: The compiled step; see `trainable.TrainSteps`.
    reads: The players whose parameters it reads.
  """

  player: str
  function: Any
  reads: tuple[str, ...] = ()


class Learner:
  """A system's generator, and its discriminators if it has any.

  Attributes:
    mle: Maximum likelihood, for the generator.
    discriminator: The step of the discriminators; the generator stays as it is.
    adversarial: The generator's step by likelihood and the discriminators'
      signal. Systems without discriminators have neither of these two steps.
    parameters: The generator's number of parameters.
    has_discriminators: Whether the system has discriminators.
    running: An array of the latest update, None before the first.
    steps_per_call: The most steps of maximum likelihood in a call.
  """

  def __init__(
    self,
    config: Config,
    dataset: prepare.Dataset,
    embeddings: np.ndarray | None,
  ) -> None:
    """Draws the states of a new run; compiles no step yet.

    Args:
      config: The run's configuration.
      dataset: The prepared data.
      embeddings: The initial word embeddings, `[V, d]`, or None to draw them.
    """
    self._seed = config.train.seed
    self._config = config
    self._rate = self._schedule(adversarial=False)
    self._adversarial_rate = self._schedule(adversarial=True)
    # The generator's updates, counted here as well: to read its state's own
    # count is to wait for the devices.
    self._generator_steps = 0
    self.running: Any = None
    trainable = assemble_for(dataset, config)
    self.parameters = train_state.count_parameters(trainable.generator)
    self.has_discriminators = trainable.adversary is not None
    self._states = trainable.create_states(self._seed, embeddings)
    self.steps_per_call = calls.steps_per_call(config)
    compiled = trainable.compile_steps(steps_per_call=self.steps_per_call)
    self.mle = Step(GENERATOR, compiled.mle)
    self.discriminator = Step(
      DISCRIMINATOR, compiled.discriminator, reads=(GENERATOR,)
    )
    self.adversarial = Step(
      GENERATOR, compiled.adversarial, reads=(DISCRIMINATOR,)
    )
    self._dataset = dataset
    self._p_eval_step = steps.compile_step(
      steps.eval_step, model=trainable.evaluator
    )
    greedy = dataclasses.replace(config.eval, beam_size=1, temperature=0.0)
    self._p_predict_step = steps.compile_step(
      steps.predict_step, model=trainable.evaluator, config=greedy
    )

  def _schedule(self, adversarial: bool) -> optax.Schedule:
    c = self._config
    return train_state.learning_rate(c.train, c.model.emb_dim, adversarial)

  def take_over(self, workdir: pathlib.Path) -> None:
    """Takes the best generator of another run, given its folder."""
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
      self._states[GENERATOR] = self._read_best(
        checkpoints, self._states[GENERATOR]
      )

  def restore(self, checkpoints: Checkpoints) -> dict[str, Any]:
    """Takes the latest states; see `Checkpoints.resume`."""
    generator = self._states[GENERATOR]
    game = train_state.start_game(self._config.train, generator.params)
    self._states[GENERATOR] = generator.replace(game=game)
    self._states, progress = checkpoints.resume(self._states)
    return progress

  def start(self) -> None:
    """Puts the states on the devices; steps may be taken from then on."""
    self._generator_steps = int(self._states[GENERATOR].step)
    self._states, self._key = devices.replicate(
      (self._states, jax.random.key(self._seed))
    )

  def restore_best(self, checkpoints: Checkpoints) -> None:
    """Goes back to the best generator, with its optimiser's state."""
    best = self._read_best(
      checkpoints, devices.unreplicate(self._states[GENERATOR])
    )
    self._generator_steps = int(best.step)
    self._states[GENERATOR] = devices.replicate(best)

  def _read_best(
    self, checkpoints: Checkpoints, like: TrainState
  ) -> TrainState:
    """Reads the best generator, with what phases 2 and 3 add to its state."""
    _, best = checkpoints.first_whole(
      checkpoints.select(checkpoint.BEST),
      lambda one: checkpoints.restore_state(
        one.kind, GENERATOR, like, one.step
      ),
    )
    game = train_state.start_game(self._config.train, best.params)
    return best.replace(game=game)

  def states(self, best: bool = False) -> dict[str, TrainState]:
    """Returns the players' states as NumPy arrays.

    Args:
      best: Whether to put the parameters that `validate` scores in the place of
        the generator's own.
    """
    # Copies, since the next step reuses the memory on the devices while the
    # checkpoint is still being written.
    states = devices.unreplicate(self._states)
    if best:
      generator = states[GENERATOR]
      states[GENERATOR] = generator.replace(
        params=generator.evaluated, game=None
      )
    return states

  def learning_rate(self) -> float:
    """Returns the learning rate of the generator's latest update."""
    return np.asarray(self._rate(self._generator_steps - 1)).item()

  def compile_ahead(self) -> Callable[[Step, tuple[Any, ...]], None]:
    """Returns a function that compiles a step for a call's inputs.

    It may run in another thread while steps are taken.
    """
    # Only shapes, since steps donate the states themselves.
    states = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      self._states,
    )

    def compile_step(step: Step, inputs: tuple[Any, ...]) -> None:
      arguments = self._arguments(step, states, inputs)
      step.function.lower(*arguments).compile()

    return compile_step

  def take(self, step: Step, call: Call) -> list[Update]:
    """Updates a player, once for each batch of a call.

    It returns before the devices have computed the step. The step donates the
    memory of the state that it replaces: no other reference to that state may
    be used afterwards.
    """
    if step is self.adversarial:
      self._rate = self._adversarial_rate
    self._states[step.player], sums = step.function(
      *self._arguments(step, self._states, call.inputs)
    )
    self._generator_steps += len(call.batches) * (step.player == GENERATOR)
    self.running = sums["examples"]
    sums_of_call = CallSums(sums)
    return [
      Update(step.player, batch, sums_of_call, index)
      for index, batch in enumerate(call.batches)
    ]

  def _arguments(
    self, step: Step, states: Mapping[str, Any], inputs: tuple[Any, ...]
  ) -> tuple[Any, ...]:
    """Returns a step's arguments from the states and a call's inputs."""
    read = [states[other].params for other in step.reads]
    return states[step.player], *read, *inputs, self._key

  def validate(self, batches: list[Batch]) -> dict[str, float]:
    """Scores the valid split, and its responses if the run asks for them.

    Args:
      batches: Its batches; see `validation.validate`.

    Returns:
      See `validation.average_metrics` and `validation.score_responses`.
    """
    params = self._states[GENERATOR].evaluated
    values = validation.validate(self._p_eval_step, params, batches)
    if self._config.train.validation_responses:
      values |= validation.score_responses(
        lambda batch: self._p_predict_step(params, devices.shard(batch)),
        self._dataset,
        self._config.eval.batch_size,
      )
    return values
