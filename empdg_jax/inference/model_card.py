"""The model card of an export: the template `model_card.md`, filled in."""

import importlib.resources
import string
from collections.abc import Sequence, Sized
from typing import Any

import numpy as np
from tabulate import tabulate

from empdg_jax.data import corpora
from empdg_jax.metrics import shown
from empdg_jax.models import registry
from empdg_jax.training.run_folder import Run


def checkpoint_text(about: dict[str, Any]) -> str:
  """Returns a description of the checkpoint that `export.json` records."""
  if about["step"] is None:
    steps_text = ", ".join(f"{step:,}" for step in about["averaged_steps"])
    return f"the mean of the checkpoints at steps {steps_text}"
  return f"the checkpoint at step {about['step']:,}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Returns a table in Markdown."""
  # Parsed as numbers, cells would lose their last zeros. Unaligned, one long
  # name does not widen every row.
  return tabulate(rows, header, "pipe", stralign=None, disable_numparse=True)


def _metrics_text(metrics: dict[str, Any]) -> str:
  if not metrics:
    return "No metrics of this checkpoint are on record."
  # The rest of the card names the system and the checkpoint, and a path on the
  # machine of the evaluation is of no use to others.
  rows = [
    [name, *(shown(name, values.get(name)) for values in metrics.values())]
    for name in next(iter(metrics.values()))
    if name not in ("model", "split", "step", "source")
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
    run: The run that is exported.
    lexicon_words: The words of the run's lexicon.
    about: The content of `export.json`.
    named: The parameters by name.
    metrics: The metrics of these parameters, by split; they may be empty.
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
      "The NRC Emotion Lexicon is free for research only. This folder does "
      "not list its words, but `lexicon.npy` marks those in the vocabulary, "
      "and `lexicon_hashes.npy` shows whether a given word is in the lexicon."
    )
    citations.append("Mohammad and Turney (2013) for the lexicon")
  else:
    lexicon = f"{len(lexicon_words):,} words that the run was given"
    licences.append(
      "`lexicon.npy` and `lexicon_hashes.npy` show which words are in the "
      "lexicon that the run was given, so its licence applies to them (that "
      "of the NRC Emotion Lexicon, Mohammad and Turney, 2013, permits research "
      "only)."
    )
  licences.append("EmpDG-JAX is Apache-2.0.")
  template = importlib.resources.files("empdg_jax.inference") / "model_card.md"
  return string.Template(template.read_text(encoding="utf-8")).substitute(
    title=f"{about['system']}, an empathetic dialogue system",
    version=about["empdg_jax"],
    system=about["system"],
    system_description=registry.find_system(run.config.model).description,
    parameters=f"{sum(array.size for array in named.values()):,}",
    dtype=about["dtype"],
    checkpoint=checkpoint_text(about),
    data=f"{corpus.title}, example set `{data.example_set}`, train split",
    words=f"{len(run.vocabulary):,}, of the splits `{data.vocab_scope}`",
    vectors="pre-trained" if data.vectors else "none",
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
