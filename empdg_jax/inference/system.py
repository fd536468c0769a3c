"""A trained system, loaded from a run folder or an export."""

import copy
import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from empdg_jax import config as config_lib
from empdg_jax.config import Config
from empdg_jax.data import pipeline, text
from empdg_jax.data.lexicon import Lexicon
from empdg_jax.data.pipeline import Batch, EncodedExample
from empdg_jax.inference import export_files
from empdg_jax.models import registry
from empdg_jax.models.encoder_decoder import EncoderDecoder
from empdg_jax.parallel import devices, hosts
from empdg_jax.training import checkpoint, responding, run_folder, steps
from empdg_jax.training.run_folder import Run
from empdg_jax.training.train_state import count_parameters, init_params


@dataclasses.dataclass(frozen=True)
class Response:
  """A response and the emotion perceived in its context.

  Attributes:
    tokens: The response, without EOS.
    emotion: The likeliest emotion's label; None if the system perceives none.
    emotions: The probability of every emotion, `[emotions]`, or None.
    cut: The number of the context's oldest tokens that were cut.
  """

  tokens: tuple[str, ...]
  emotion: str | None
  emotions: np.ndarray | None
  cut: int

  @property
  def text(self) -> str:
    """The response as readable text."""
    return text.join_tokens(self.tokens)


def create_model(run: Run) -> EncoderDecoder:
  """Returns the generator of a run."""
  return registry.create_model(
    run.config.model, len(run.vocabulary), len(run.emotions)
  )


def params_like(run: Run) -> Any:
  """Returns the shapes of a run's parameters."""
  model = create_model(run)
  return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


class System:
  """A trained system: its compiled steps, its parameters, its data rules."""

  def __init__(
    self,
    run: Run,
    params: Any,
    lexicon: Lexicon | None = None,
    step: int | None = None,
    config: Config | None = None,
  ) -> None:
    """Compiles nothing yet; each shape is compiled at its first batch.

    Args:
      run: The run's configuration, vocabulary and emotion labels.
      params: The model's parameters, not replicated.
      lexicon: An export's lexicon; None for the one that the configuration
        names.
      step: The number of updates before the checkpoint; None for an average.
      config: The run's configuration with other `eval` fields, or None.

    Raises:
      InputError: The batch size does not divide among the devices.
    """
    config = config or run.config
    devices.rows_per_device(config, "eval", jax.device_count())
    self.config = config
    self.vocabulary = run.vocabulary
    self.emotions = run.emotions
    self.lexicon = lexicon
    self.step = step
    self.shapes = pipeline.padded_shapes(config.data)
    self.eval_shapes = pipeline.coarse_shapes(self.shapes)
    self.params = devices.replicate(params)
    self.model = create_model(run)
    self.parameters = count_parameters(self.model)
    self.p_eval_step = steps.compile_step(steps.eval_step, model=self.model)
    self._compile()

  def _compile(self) -> None:
    """Makes the steps that depend on how to decode."""
    static = {"model": self.model, "config": self.config.eval}
    self.p_predict_step = steps.compile_step(steps.predict_step, **static)
    self.p_choose_step = steps.compile_step(steps.choose_step, **static)

  def with_decoding(self, **fields: Any) -> "System":
    """Returns this system, its parameters shared, with other `eval` fields."""
    other = copy.copy(self)
    evaluation = dataclasses.replace(self.config.eval, **fields)
    other.config = dataclasses.replace(self.config, eval=evaluation)
    config_lib.validate(other.config)
    other._compile()
    return other

  def respond(
    self,
    encoded: Sequence[EncodedExample],
    batch_size: int,
    first: int = 0,
    choices: steps.Choices | None = None,
  ) -> Iterator[tuple[int, Response]]:
    """Generates a response to each context.

    Args:
      encoded: The contexts; targets are ignored.
      batch_size: Contexts a step, over all devices.
      first: The position of the first context in its file or dialogue, for
        sampling.
      choices: What the users chose for each context, `[len(encoded)]`; None for
        what the configuration says.

    Yields:
      Each example's index and response, batch by batch.
    """

    def predict(batch: Batch) -> steps.Prediction:
      sharded = devices.shard(batch._replace(index=batch.index + first))
      if choices is None:
        return self.p_predict_step(self.params, sharded)
      chosen = jax.tree.map(lambda x: x[batch.index], choices)
      return self.p_choose_step(self.params, sharded, devices.shard(chosen))

    for index, tokens, emotions in responding.respond(
      predict, encoded, self.eval_shapes, self.vocabulary, batch_size
    ):
      emotion = None
      if emotions is not None:
        emotion = self.emotions[int(emotions.argmax())]
      cut = encoded[index].cut[0]
      yield index, Response(tokens, emotion, emotions, cut)

  def score(
    self, encoded: Sequence[EncodedExample]
  ) -> Iterator[tuple[int, float, int]]:
    """Yields each example's index, summed token loss, and token count."""
    batch_size = self.config.eval.batch_size
    for batch in pipeline.eval_batches(
      encoded,
      self.eval_shapes,
      batch_size=batch_size,
      rows=hosts.rows(batch_size),
    ):
      _, values = self.p_eval_step(self.params, devices.shard(batch))
      values, indices, mask = devices.gather(
        (devices.unshard(values), batch.index, batch.mask)
      )
      for row in np.flatnonzero(mask):
        nll, tokens = values["nll"][row], values["tokens"][row]
        yield int(indices[row]), float(nll), int(tokens)


def load_system(
  folder: pathlib.Path, config: Config | None = None, which: str | None = None
) -> System:
  """Loads the system of a run folder or of an export.

  Args:
    folder: The folder.
    config: The run's configuration with other `eval` fields, or None.
    which: The checkpoint of a run; see `Checkpoints.select`.

  Returns:
    The system.

  Raises:
    InputError: The folder is neither, a damaged export, or holds no such
      checkpoint or one of other shapes.
  """
  if run_folder.is_export(folder):
    with hosts.refusing_together():
      exported = export_files.read_export(folder)
    return System(*exported, config)
  with hosts.refusing_together():
    run = run_folder.open_run(folder)
    checkpoints = checkpoint.Checkpoints(folder)
    selected = checkpoints.select(which)
  like = params_like(run)
  one, params = checkpoints.first_whole(
    selected, lambda one: checkpoints.restore_params(one.kind, like, one.step)
  )
  checkpoints.close()
  return System(run, params, step=one.step, config=config)
