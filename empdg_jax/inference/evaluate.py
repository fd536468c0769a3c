"""Scoring and responding to a whole split."""

import pathlib
from typing import Any

from rich.console import Console
from rich.progress import Progress, TextColumn

from empdg_jax import metrics
from empdg_jax.config import Config
from empdg_jax.data import prepare
from empdg_jax.inference import predictions
from empdg_jax.inference.system import System
from empdg_jax.parallel import hosts


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
  with hosts.refusing_together():
    if hosts.is_main_process():
      predictions.check_writable(folder)
    dataset = prepare.load_dataset(
      system.config.data,
      system.vocabulary,
      system.lexicon,
      system.emotions,
    )
  hosts.check_same(dataset.digest, "data")
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
        "emotion": system.emotions[example.emotion],
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
  if hosts.is_main_process():
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
