"""Untrained systems, whose distributions are almost flat, for tests."""

import copy
import pathlib
from typing import Any

import jax

from empdg_jax.config import Config
from empdg_jax.data.prepare import Dataset
from empdg_jax.inference.system import System, create_model
from empdg_jax.training.run_folder import Run
from empdg_jax.training.train_state import init_params


def make_system(config: Config, dataset: Dataset, **fields: Any) -> System:
  """Returns a system whose fields, as in `eval__top_p`, differ from these."""
  config = copy.deepcopy(config)
  config.eval.max_decode_steps = 6
  for name, value in fields.items():
    section, _, field = name.partition("__")
    setattr(getattr(config, section), field, value)
  run = Run(pathlib.Path(), config, dataset.vocabulary, dataset.corpus.emotions)
  return System(run, init_params(create_model(run), jax.random.key(0)))
