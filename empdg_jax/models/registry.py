"""The registry of systems: one record per system."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from empdg_jax import storage
from empdg_jax.config import Config, InputError, ModelConfig
from empdg_jax.models.adversary import Adversary
from empdg_jax.models.baselines import EmoPrepend, MoEL, Transformer
from empdg_jax.models.discriminators import Discriminator
from empdg_jax.models.encoder_decoder import EncoderDecoder
from empdg_jax.models.generator import Generator

TABLE_1 = "Table 1. Systems"
TABLE_2 = "Table 2. Ablations"


class SystemSpec(NamedTuple):
  """The record of a system.

  Attributes:
    generator: The module that generates responses.
    title: The name of the system in tables.
    description: A phrase for the model card, with the source.
    tables: The titles of the tables that show the system.
    paper: The metrics that the paper reports, by their names in `metrics.json`.
    discriminators: The names of its discriminators, `"semantic"` before
      `"emotional"`; a system without any has no phases 2 and 3.
    start: The system without discriminators whose training is its phase 1.
    ratings: The paper's human ratings: empathy, relevance and fluency.
    preferences: The per cent of the paper's comparisons in which EmpDG won,
      lost and tied against it.
  """

  generator: type[EncoderDecoder]
  title: str
  description: str
  tables: tuple[str, ...] = (TABLE_1,)
  paper: Mapping[str, float] = {}
  discriminators: tuple[str, ...] = ()
  start: str = ""
  ratings: tuple[float, ...] = ()
  preferences: tuple[float, ...] = ()


# The columns of the paper's Tables 1 and 2.
_PAPER = (
  "emotion_accuracy",
  "perplexity_per_example",
  "distinct_1",
  "distinct_2",
)


def _paper(*row: float | None) -> dict[str, float]:
  """Returns a row of `_PAPER` by the names of its metrics, None left out."""
  named = zip(_PAPER, row, strict=True)
  return {name: value for name, value in named if value is not None}


# The systems by `config.model.name`, in the order of the paper's tables.
SYSTEMS: dict[str, SystemSpec] = {
  "transformer": SystemSpec(
    Transformer,
    "Transformer",
    "a Transformer (Vaswani et al., 2017)",
    paper=_paper(None, 33.91, 1.17, 4.70),
    ratings=(3.15, 3.42, 3.64),
    preferences=(40.2, 27.5, 32.3),
  ),
  "emoprepend": SystemSpec(
    EmoPrepend,
    "EmoPrepend-1",
    "EmoPrepend-1 (Rashkin et al., 2019)",
    paper=_paper(0.3328, 33.35, 1.06, 4.29),
    ratings=(3.29, 3.59, 3.71),
    preferences=(38.7, 29.4, 31.9),
  ),
  "moel": SystemSpec(
    MoEL,
    "MoEL",
    "the mixture of empathetic listeners (Lin et al., 2019)",
    paper=_paper(0.3200, 33.58, 1.38, 4.66),
    ratings=(3.47, 3.88, 3.68),
    preferences=(35.7, 31.2, 33.1),
  ),
  "empdg": SystemSpec(
    Generator,
    "EmpDG",
    "EmpDG with both interactive discriminators (Li et al., 2020)",
    tables=(TABLE_1, TABLE_2),
    paper=_paper(0.3431, 34.18, 1.81, 6.94),
    ratings=(3.58, 3.91, 3.67),
    discriminators=("semantic", "emotional"),
    start="empdg_wo_d",
  ),
  "empdg_wo_g": SystemSpec(
    EmoPrepend,
    "EmpDG w/o G",
    "EmoPrepend-1 with a semantic discriminator (Li et al., 2020)",
    tables=(TABLE_2,),
    paper=_paper(0.3281, 33.94, 1.27, 5.21),
    discriminators=("semantic",),
    start="emoprepend",
  ),
  "empdg_wo_d": SystemSpec(
    Generator,
    "EmpDG w/o D",
    "EmpDG's generator without discriminators (Li et al., 2020)",
    tables=(TABLE_2,),
    paper=_paper(0.3347, 32.66, 1.00, 3.89),
  ),
}


PROPOSED = "empdg"  # The paper's own system, which the others stand beside.


def find_system(config: ModelConfig) -> SystemSpec:
  """Returns the record of the system `config.name`.

  Raises:
    InputError: There is no system of that name.
  """
  if config.name not in SYSTEMS:
    raise InputError(
      f"config.model.name={config.name!r:.200}: expected one of "
      + ", ".join(sorted(SYSTEMS))
    )
  return SYSTEMS[config.name]


def chosen_discriminators(config: Config) -> tuple[str, ...]:
  """Returns the names of the system's discriminators that play.

  Raises:
    InputError: There is no such system, or it lacks the chosen discriminator.
  """
  names = find_system(config.model).discriminators
  chosen = config.train.discriminators
  if not names or chosen == "all":
    return names
  if chosen not in names:
    raise InputError(
      f"config.train.discriminators={chosen!r}: {config.model.name} has only "
      f"{', '.join(names)}; expected one of all, {', '.join(names)}"
    )
  return (chosen,)


def check_selection(config: Config) -> None:
  """Checks that the system has the metrics that choose its checkpoints.

  Raises:
    InputError: One is the accuracy, and the system predicts no emotion.
  """
  spec = find_system(config.model)
  names = ["mle_selection_metric"]
  if spec.discriminators:
    names.append("selection_metric")
  for name in names:
    metric = getattr(config.train, name)
    if metric == "emotion_accuracy" and not spec.generator.predicts_emotion:
      raise InputError(
        f"config.train.{name}={metric!r}: {config.model.name} predicts no "
        "emotion; expected perplexity, perplexity_per_example, joint or last"
      )


def check_size(config: ModelConfig, vocab_size: int) -> None:
  """Checks that a model can fit into this machine's memory, before any array.

  Args:
    config: The system's name and sizes.
    vocab_size: V; 0 before it is known.

  Raises:
    InputError: There is no such system, or even the largest of its parameters
      do not fit.
  """
  discriminators = find_system(config).discriminators
  # A lower bound: embeddings; each layer's attention and feed-forward matrices
  # in an encoder and the decoder; the convolutions of a discriminator.
  layer = 4 * config.key_value_depth + 2 * config.filter_size
  parameters = config.emb_dim * (vocab_size + 2 * config.num_layers * layer)
  if discriminators:
    widths = config.kernel_widths
    parameters += config.emb_dim**2 * sum(widths) // len(widths)
  storage.check_fits(
    f"config.model: emb_dim={config.emb_dim:,}, num_layers="
    f"{config.num_layers:,}, key_value_depth={config.key_value_depth:,}, "
    f"filter_size={config.filter_size:,}"
    + (f" and {vocab_size:,} words" if vocab_size else ""),
    parameters,
  )


def create_model(
  config: ModelConfig,
  vocab_size: int,
  num_emotions: int,
  dtype: Any = jnp.float32,
) -> EncoderDecoder:
  """Returns the generator of the system `config.name`.

  Args:
    config: The system's name, sizes and options.
    vocab_size: V.
    num_emotions: The number of emotion labels in the dataset.
    dtype: The type of products and activations.

  Raises:
    InputError: There is no system of that name, or `listener_top_k` exceeds
      the number of emotions.
  """
  check_size(config, vocab_size)
  spec = find_system(config)
  if config.listener_top_k > num_emotions:
    raise InputError(
      f"config.model.listener_top_k={config.listener_top_k}: expected at most "
      f"{num_emotions}, the number of emotions"
    )
  return spec.generator(config, vocab_size, num_emotions, dtype)


def create_adversary(config: Config, is_emotional: np.ndarray) -> Adversary:
  """Returns the part of the system that only phases 2 and 3 use.

  Args:
    config: The run's configuration.
    is_emotional: Marks the words that the emotional discriminator reads, `[V]`
      booleans.

  Raises:
    InputError: The convolutions cannot share d filters equally, or phase 3
      has no learning rate.
  """
  model, train = config.model, config.train
  if train.schedule == "cosine" and not train.adversarial_learning_rate:
    raise InputError(
      "config.train.adversarial_learning_rate=0.0: expected more than 0 with "
      "config.train.schedule=cosine, which has fallen to 0 before phase 3"
    )
  if model.emb_dim % len(model.kernel_widths):
    raise InputError(
      f"config.model.kernel_widths={model.kernel_widths}: their number must "
      f"divide config.model.emb_dim={model.emb_dim}"
    )
  return Adversary(
    Discriminator(model.emb_dim, model.kernel_widths),
    is_emotional,
    model.max_emotional_words,
    config.train,
  )
