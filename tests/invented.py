"""Run folders with invented predictions, for tests of tables and metrics."""

import json
import pathlib
from typing import Any

import numpy as np

from empdg_jax import config
from empdg_jax.config import Config
from empdg_jax.data.vocab import build_vocabulary

WORDS = tuple("abcdefghij")
VOCABULARY = build_vocabulary([WORDS])
EMOTIONS = ("sad", "proud", "afraid")


def make_lines(seed: int, dialogues: int = 40) -> list[dict[str, Any]]:
  """Predictions of one seed; ids, references and tokens never differ."""
  fixed, rng = np.random.default_rng(0), np.random.default_rng(seed)
  lines = []
  for dialogue in range(dialogues):
    for turn in range(1, 2 + 2 * int(fixed.integers(1, 3)), 2):
      reference = fixed.choice(WORDS, int(fixed.integers(3, 9)))
      # Replies follow their reference for a while.
      kept = int(rng.integers(0, len(reference) + 1))
      own = rng.choice(WORDS[: 4 + seed], int(rng.integers(1, 5)))
      lines.append(
        {
          "id": f"conversation:{dialogue}:{turn}",
          "emotion": EMOTIONS[dialogue % 3],
          "predicted_emotion": str(rng.choice(EMOTIONS)),
          "context": ["i am here ."],
          "emotion_words": [],
          "reference": " ".join(reference),
          "response": " ".join([*reference[:kept], *own]),
          "nll": float(rng.uniform(5, 20 + 5 * seed)),
          "tokens": len(reference) + 1,
        }
      )
  return lines


def make_run(
  folder: pathlib.Path, model: str, seed: int, **fields: Any
) -> pathlib.Path:
  """Writes a run folder with predictions on test."""
  run_config = Config()
  run_config.model.name = model
  run_config.train.seed = seed
  for name, value in fields.items():
    section, _, field = name.partition("__")
    setattr(getattr(run_config, section), field, value)
  evaluation = folder / "eval" / "test"
  evaluation.mkdir(parents=True)
  (folder / "config.json").write_text(config.to_json(run_config))
  (folder / "vocab.txt").write_text(VOCABULARY.to_text())
  lines = make_lines(seed)
  if model == "transformer":
    lines = [{**line, "predicted_emotion": None} for line in lines]
  (evaluation / "predictions.jsonl").write_text(
    "".join(json.dumps(line) + "\n" for line in lines)
  )
  values = {"split": "test", "examples": len(lines), "parameters": 1_234}
  (evaluation / "metrics.json").write_text(json.dumps(values))
  return folder
