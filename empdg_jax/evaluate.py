"""Scoring and responding, of single contexts and of whole splits."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress, TextColumn

from empdg_jax import bundle, checkpoint, metrics, parallel, predictions, steps
from empdg_jax.config import Config
from empdg_jax.data import pipeline, prepare, text, vocab
from empdg_jax.data.empathetic_dialogues import EMOTIONS
from empdg_jax.data.lexicon import Lexicon
from empdg_jax.data.pipeline import Batch, Encoded, Shape
from empdg_jax.data.vocab import Vocabulary
from empdg_jax.models import registry
from empdg_jax.train_state import count_parameters, init_params


@dataclasses.dataclass(frozen=True)
class Response:
  """What the system makes of a context.

  Attributes:
    tokens: The response, without EOS.
    emotions: The probability of every emotion, `[32]`; None if the system
      perceives none.
    cut: How many of the context's oldest tokens it did not see.
  """

  tokens: tuple[str, ...]
  emotions: np.ndarray | None
  cut: int

  @property
  def text(self) -> str:
    """The response as people write."""
    return text.join_tokens(self.tokens)

  @property
  def emotion(self) -> str | None:
    """The likeliest emotion."""
    if self.emotions is None:
      return None
    return EMOTIONS[int(self.emotions.argmax())]


def sum_metrics(values: Iterable[dict[str, Any]]) -> dict[str, float]:
  """Adds up replicated metric sums of several steps, in float64."""
  totals: dict[str, float] = {}
  for step in values:
    for name, value in step.items():
      totals[name] = totals.get(name, 0.0) + float(parallel.unreplicate(value))
  return totals


def average_metrics(sums: dict[str, float]) -> dict[str, float]:
  """Divides sums by their counts: loss, perplexities, accuracy if any."""
  averages = {
    "loss": sums["loss"] / sums["examples"],
    "perplexity": float(np.exp(sums["nll"] / sums["tokens"])),
    "perplexity_per_example": float(
      np.exp(sums["mean_nll"] / sums["examples"])
    ),
  }
  if "emotion_correct" in sums:
    averages["emotion_accuracy"] = sums["emotion_correct"] / sums["examples"]
  return averages


def validate(
  p_eval_step: Callable[..., Any], params: Any, batches: Sequence[Batch]
) -> dict[str, float]:
  """Scores a split with teacher forcing.

  Args:
    p_eval_step: The compiled `steps.eval_step`.
    params: Replicated parameters.
    batches: The split's batches.

  Returns:
    See `average_metrics`.
  """
  sums = [p_eval_step(params, parallel.shard(batch))[0] for batch in batches]
  return average_metrics(sum_metrics(sums))


def response_tokens(
  ids: np.ndarray,
  copied_from: np.ndarray,
  words: Sequence[str],
  vocabulary: Vocabulary,
) -> tuple[str, ...]:
  """Turns ids into tokens up to EOS; an UNK becomes the word it copies.

  Args:
    ids: `[max_steps]`.
    copied_from: The source position that an UNK copies, `[max_steps]`.
    words: The source's tokens by position, as `source_words` gives them.
    vocabulary: Ids to tokens.

  Returns:
    The tokens.
  """
  tokens = []
  for token, position in zip(ids, copied_from, strict=True):
    if token in (vocab.EOS, vocab.PAD):
      break
    unknown = token == vocab.UNK and position >= 0
    tokens.append(words[position] if unknown else vocabulary.tokens[token])
  return tuple(tokens)


def source_words(encoded: Encoded, shape: Shape) -> list[str]:
  """Returns the text at each position of the decoder's source."""
  context = ["CLS", *encoded.words]
  context += ["PAD"] * (shape.context - len(context))
  return [*context, "LAB", *encoded.emotion_words]


class System:
  """A trained system: its compiled steps, its parameters, its data rules."""

  def __init__(
    self,
    config: Config,
    vocabulary: Vocabulary,
    params: Any,
    lexicon: Lexicon | None = None,
    step: int | None = None,
  ) -> None:
    """Compiles nothing yet; each shape is compiled at its first batch.

    Args:
      config: The run's configuration.
      vocabulary: The run's vocabulary.
      params: The model's parameters, not replicated.
      lexicon: An export's lexicon; None: the one that the configuration names.
      step: The run's updates before the checkpoint; None if it is none.

    Raises:
      InputError: The batch size does not divide among the devices.
    """
    parallel.rows_per_device(
      config.eval.batch_size, jax.device_count(), "config.eval.batch_size"
    )
    self.config = config
    self.vocabulary = vocabulary
    self.lexicon = lexicon
    self.step = step
    self.shapes = pipeline.padded_shapes(config.data)
    self.eval_shapes = pipeline.coarse_shapes(self.shapes)
    self.params = parallel.replicate(params)
    model = registry.create_model(config.model, len(vocabulary))
    self.parameters = count_parameters(model)
    self.p_eval_step = steps.compile_eval_step(model)
    self.p_predict_step = steps.compile_predict_step(model, config.eval)

  def respond(
    self, encoded: Sequence[Encoded], batch_size: int
  ) -> Iterator[tuple[int, Response]]:
    """Writes a response to each context.

    Args:
      encoded: The contexts; targets are not looked at.
      batch_size: Contexts a step.

    Yields:
      Each example's index and response, batch by batch.
    """
    # Only contexts matter here, so batches are made by them alone.
    blank = [e._replace(target=[vocab.EOS], feedback=[]) for e in encoded]
    shapes = _context_shapes(self.eval_shapes)
    for batch in self._batches(blank, shapes, batch_size):
      prediction = parallel.unshard(
        self.p_predict_step(self.params, parallel.shard(batch))
      )
      shape = Shape(batch.context.shape[1], batch.emotion_context.shape[1], 1)
      prediction, indices, mask = parallel.gather(
        (prediction, batch.index, batch.mask)
      )
      emotions = prediction.emotion_probs
      for row, index in enumerate(indices):
        if mask[row]:
          example = encoded[index]
          yield (
            int(index),
            Response(
              response_tokens(
                prediction.tokens[row],
                prediction.copied_from[row],
                source_words(example, shape),
                self.vocabulary,
              ),
              emotions if emotions is None else emotions[row],
              example.cut[0],
            ),
          )

  def _batches(
    self, encoded: Sequence[Encoded], shapes: Sequence[Shape], batch_size: int
  ) -> Iterator[Batch]:
    """Yields this host's part of the examples' batches."""
    return pipeline.eval_batches(
      encoded,
      shapes,
      batch_size=batch_size,
      host=jax.process_index(),
      num_hosts=jax.process_count(),
    )

  def score(
    self, encoded: Sequence[Encoded]
  ) -> Iterator[tuple[int, float, int]]:
    """Yields each example's index, token NLL in all, and token count."""
    batch_size = self.config.eval.batch_size
    for batch in self._batches(encoded, self.eval_shapes, batch_size):
      _, values = self.p_eval_step(self.params, parallel.shard(batch))
      values, indices, mask = parallel.gather(
        (parallel.unshard(values), batch.index, batch.mask)
      )
      for row, index in enumerate(indices):
        if mask[row]:
          yield (
            int(index),
            float(values["nll"][row]),
            int(values["tokens"][row]),
          )


def _context_shapes(shapes: Sequence[Shape]) -> list[Shape]:
  """Returns the distinct context lengths, ascending, the longest last."""
  return sorted({Shape(s.context, s.emotion, 1) for s in shapes})


def load_system(
  folder: pathlib.Path, config: Config | None = None, which: str | None = None
) -> System:
  """Loads the system of a run folder or of an export.

  Args:
    folder: The folder.
    config: The run's configuration with other `eval` fields, or None.
    which: Which checkpoint of a run; see `Checkpoints.select`.

  Returns:
    The system.

  Raises:
    InputError: The folder holds neither, a damaged export, no such checkpoint,
      or one of other shapes.
  """
  if bundle.is_bundle(folder):
    with parallel.refusing_together():
      exported = bundle.open_bundle(folder)
    return System(
      config or exported.config,
      exported.vocabulary,
      exported.params,
      exported.lexicon,
      exported.step,
    )
  with parallel.refusing_together():
    run = checkpoint.open_run(folder)
    checkpoints = checkpoint.Checkpoints(folder)
    selected = checkpoints.select(which)
  params = checkpoints.restore_params(
    selected.kind, params_like(run), selected.step
  )
  checkpoints.close()
  return System(
    config or run.config, run.vocabulary, params, step=selected.step
  )


def params_like(run: checkpoint.Run) -> Any:
  """Returns the shapes of a run's parameters."""
  model = registry.create_model(run.config.model, len(run.vocabulary))
  return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


def evaluate_split(
  system: System, split: str, folder: pathlib.Path, console: Console
) -> dict[str, Any]:
  """Scores and answers every example of a split, and writes both files.

  Args:
    system: What to evaluate.
    split: The split's name.
    folder: Where `predictions.jsonl` and `metrics.json` go.
    console: Shows progress.

  Returns:
    The content of `metrics.json`.

  Raises:
    InputError: The data or the folder cannot be used.
  """
  with parallel.refusing_together():
    if parallel.is_main_process():
      predictions.check_writable(folder)
    dataset = prepare.load_dataset(
      system.config.data, system.vocabulary, system.lexicon
    )
  parallel.check_same(dataset.digest, "data")
  examples, encoded = dataset.examples[split], dataset.encoded(split)
  scores, responses = {}, {}
  with Progress(
    *Progress.get_default_columns(),
    TextColumn("{task.fields[rate]}"),
    console=console,
    transient=True,
    disable=not console.is_terminal,
  ) as bar:
    task = bar.add_task("Scoring", total=len(examples), rate="")
    for index, nll, tokens in system.score(encoded):
      scores[index] = nll, tokens
      bar.advance(task)
    task = bar.add_task("Responding", total=len(examples), rate="")
    batch_size = system.config.eval.batch_size
    for index, response in system.respond(encoded, batch_size):
      responses[index] = response
      speed = bar.tasks[task].speed or 0.0
      bar.update(task, advance=1, rate=f"{speed:.0f} responses/s")
  lines = []
  for index, example in enumerate(examples):
    nll, tokens = scores[index]
    lines.append(
      {
        "id": example.id,
        "emotion": EMOTIONS[example.emotion],
        "predicted_emotion": responses[index].emotion,
        "context": [" ".join(turn.tokens) for turn in example.context],
        "emotion_words": list(encoded[index].emotion_words),
        "reference": " ".join(example.target.tokens),
        "response": " ".join(responses[index].tokens),
        "nll": nll,
        "tokens": tokens,
      }
    )
  values = {
    "model": system.config.model.name,
    "split": split,
    **origin(system.config, system.step),
    "parameters": system.parameters,
    **metrics.text_metrics(lines, len(system.vocabulary)),
  }
  if parallel.is_main_process():
    predictions.write_evaluation(folder, lines, values)
  return values


def origin(config: Config, step: int | None) -> dict[str, Any]:
  """Returns what `metrics.json` says of where its figures come from.

  Args:
    config: What the system was evaluated with.
    step: Of the checkpoint.
  """
  return {
    "step": step,
    "source": config.data.source,
    "max_decode_steps": config.eval.max_decode_steps,
    "beam_size": config.eval.beam_size,
    "length_penalty": config.eval.length_penalty,
  }
