"""The evaluation of a whole split: scores and responses."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console

from empdg_jax import metrics
from empdg_jax.config import Config
from empdg_jax.data import prepare
from empdg_jax.data.pipeline import EncodedExample
from empdg_jax.inference import predictions
from empdg_jax.inference.system import Response, System
from empdg_jax.parallel import hosts
from empdg_jax.training import terminal

_LIKELIEST = 5  # Labels that a prediction lists.


def evaluate_split(
  system: System, split: str, folder: pathlib.Path, console: Console
) -> dict[str, Any]:
  """Scores every example of a split, generates its responses, writes the files.

  Args:
    system: The system to evaluate.
    split: The split's name.
    folder: The folder for `predictions.jsonl` and `metrics.json`.
    console: The terminal, for progress.

  Returns:
    The content of `metrics.json`.

  Raises:
    InputError: The data or the folder cannot be used.
  """
  with hosts.refusing_together():
    # Before the work, which may take an hour.
    if hosts.is_main_process():
      predictions.check_writable(folder)
    dataset = prepare.load_dataset(
      system.config.data, system.vocabulary, system.lexicon, system.emotions
    )
  hosts.check_same(dataset.digest, "data")
  encoded = dataset.encoded(split)
  scores, responses = _run_steps(system, encoded, console)
  # In the split's order: batches come by shape.
  lines = [
    {
      "id": example.id,
      "emotion": system.emotions[example.emotion],
      "predicted_emotion": responses[index].emotion,
      "likeliest_emotions": _likeliest(responses[index], system.emotions),
      "context": [" ".join(turn.tokens) for turn in example.context],
      "emotion_words": list(encoded[index].emotion_words),
      "reference": " ".join(example.target.tokens),
      "response": " ".join(responses[index].tokens),
      **scores[index],
    }
    for index, example in enumerate(dataset.examples[split])
  ]
  values = {
    "model": system.config.model.name,
    "split": split,
    **origin(system.config, system.step),
    "parameters": system.parameters,
    **metrics.text_metrics(lines, len(system.vocabulary)),
  }
  if hosts.is_main_process():
    predictions.write_evaluation(folder, lines, values)
  return values


def _likeliest(response: Response, emotions: Sequence[str]) -> list[str] | None:
  """Returns the likeliest labels, the best first; None if there are none."""
  if response.emotions is None:
    return None
  # Stable: the first of equals is also `argmax`, the predicted emotion.
  order = np.argsort(-response.emotions, kind="stable")
  return [emotions[number] for number in order[:_LIKELIEST].tolist()]


def _run_steps(
  system: System, encoded: Sequence[EncodedExample], console: Console
) -> tuple[dict[int, dict[str, float]], dict[int, Response]]:
  """Scores examples and generates responses, with a progress bar.

  Returns:
    By the examples' indices: the summed token loss `nll` and the number of
    `tokens`; the response.
  """
  scores, responses = {}, {}
  with terminal.progress_bar(console, transient=True) as bar:
    task = bar.add_task("Scoring", total=len(encoded), rate="")
    for index, nll, tokens in system.score(encoded):
      scores[index] = {"nll": nll, "tokens": tokens}
      bar.advance(task)
    task = bar.add_task("Responding", total=len(encoded), rate="")
    batch_size = system.config.eval.batch_size
    for index, response in system.respond(encoded, batch_size):
      responses[index] = response
      speed = bar.tasks[task].speed or 0.0
      bar.update(task, advance=1, rate=f"{speed:.0f} responses/s")
  return scores, responses


def origin(config: Config, step: int | None) -> dict[str, Any]:
  """Returns the part of `metrics.json` that says where its figures come from.

  Args:
    config: The configuration of the evaluation.
    step: The number of updates before the checkpoint.
  """
  values = {
    "step": step,
    "source": config.data.source,
    "max_decode_steps": config.eval.max_decode_steps,
    "beam_size": config.eval.beam_size,
    "length_penalty": config.eval.length_penalty,
  }
  # Sampling came later: evaluations without it stay what they were.
  if config.eval.temperature:
    values["temperature"] = config.eval.temperature
    values["top_p"] = config.eval.top_p
    values["sampling_seed"] = config.eval.sampling_seed
  return values
