"""The model card of an export: `model_card.md`, filled in."""

import importlib.resources
import string
from collections.abc import Sequence, Sized
from typing import Any

import numpy as np

from empdg_jax.data import corpora
from empdg_jax.models import registry
from empdg_jax.training.run_folder import Run


def checkpoint_text(about: dict[str, Any]) -> str:
  """Returns what `export.json` says of the checkpoint, in words."""
  if about["step"] is None:
    steps_text = ", ".join(f"{step:,}" for step in about["averaged_steps"])
    return f"the mean of the checkpoints at steps {steps_text}"
  return f"the checkpoint at step {about['step']:,}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Returns a table in Markdown."""
  lines = [header, ["---"] * len(header), *rows]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _metrics_text(metrics: dict[str, Any]) -> str:
  if not metrics:
    return "None of this checkpoint is on record."
  first = next(iter(metrics.values()))
  names = [n for n in first if n not in ("model", "split", "step", "source")]

  def shown(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)

  rows = [
    [name, *(shown(values.get(name)) for values in metrics.values())]
    for name in names
  ]
  return _table(["", *metrics], rows)


def write_card(
  run: Run,
  lexicon_words: Sized,
  about: dict[str, Any],
  named: dict[str, np.ndarray],
  metrics: dict[str, Any],
) -> str:
  """Returns the model card.

  Args:
    run: Where the export comes from.
    lexicon_words: The run's lexicon.
    about: The content of `export.json`.
    named: The parameters by name.
    metrics: Each split's metrics of these parameters.
  """
  data = run.config.data
  corpus = corpora.find_corpus(data, run.emotions)
  licences = [corpus.licence]
  citations = ["Li et al. (2020) for EmpDG"]
  if corpus.citation:
    citations.append(corpus.citation)
  if data.lexicon == "nrclex":
    lexicon = "the NRC Emotion Lexicon, as the package `nrclex` ships it"
    licences.append(
      "The NRC Emotion Lexicon is free for research alone. This folder does "
      "not list its words, but `lexicon.npy` marks those of the vocabulary, "
      "and a list of words can be looked up in `lexicon_hashes.npy`."
    )
    citations.append("Mohammad and Turney (2013) for the lexicon")
  else:
    lexicon = f"{len(lexicon_words):,} words that the run was given"
    licences.append(
      "`lexicon.npy` and `lexicon_hashes.npy` tell which words are in the "
      "lexicon that the run was given, and so have its licence (that of the "
      "NRC Emotion Lexicon, Mohammad and Turney, 2013, is for research alone)."
    )
  licences.append("EmpDG-JAX is Apache-2.0.")
  vectors = "pre-trained" if data.vectors else "none"
  template = importlib.resources.files("empdg_jax.inference") / "model_card.md"
  size = sum(array.size for array in named.values())
  return string.Template(template.read_text(encoding="utf-8")).substitute(
    title=f"{about['system']}, an empathetic dialogue system",
    version=about["empdg_jax"],
    system=about["system"],
    system_description=registry.find_system(run.config.model).description,
    parameters=f"{size:,}",
    dtype=about["dtype"],
    checkpoint=checkpoint_text(about),
    data=f"{corpus.title}, example set `{data.example_set}`, train split",
    words=f"{len(run.vocabulary):,}, of the splits `{data.vocab_scope}`",
    vectors=vectors,
    lexicon=lexicon,
    emotions=f"{len(run.emotions)}, in `emotions.txt`",
    metrics=_metrics_text(metrics),
    platforms=", ".join(about["platforms"]),
    jax=about["jax"],
    licences="\n\n".join(licences),
    citations=", ".join(citations),
    names=_table(
      ["name", "shape"],
      [[f"`{n}`", "x".join(map(str, a.shape))] for n, a in named.items()],
    ),
  )
