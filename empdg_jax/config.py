"""The configuration: typed, every field with its unit and source."""

import dataclasses
import json
import math
import typing
from typing import Any

# Exit statuses. After FAILED the same command may be given again.
FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130


class InputError(ValueError):
  """Something given from outside is wrong; its message is one clear line."""

  def __init__(self, message: str) -> None:
    """Joins the message's lines: errors of libraries may have several."""
    super().__init__(" ".join(message.splitlines()))


class SaveError(OSError):
  """A disk or a bucket failed in the middle of work; one clear line as well."""

  def __init__(self, message: str) -> None:
    """Joins the message's lines."""
    super().__init__(" ".join(message.splitlines()))


@dataclasses.dataclass
class DataConfig:
  """What is read and how it becomes batches (DESIGN: data)."""

  # "official" (downloaded), "sample" (the embedded corpus), or the path of an
  # archive or folder in the official CSV format.
  source: str = "official"
  # The emotion labels: "empathetic_dialogues" for the 32 of that dataset, or a
  # file with one label a line, in the order of their numbers.
  emotions: str = "empathetic_dialogues"
  # Where prepared datasets are kept; "" is a folder in the user's cache.
  data_dir: str = ""
  # "empdg": 20,724 / 2,972 / 2,713 examples with user feedback (the paper);
  # "all_turns": every listener turn (Lin et al., 2019).
  example_set: str = "empdg"
  # "nrclex", or a lexicon file (see `data/lexicon.py`).
  lexicon: str = "nrclex"
  # Pre-trained word vectors in GloVe's text format (may be gzipped); "": none.
  vectors: str = ""
  # Splits whose words make the vocabulary: "train", or "all" (the published
  # protocol).
  vocab_scope: str = "train"
  # The batches' padded lengths in tokens: a context with its CLS, its
  # emotional words with their LAB, a target with its EOS. An example goes to
  # the first that holds it. What the last cannot hold is cut: of contexts the
  # oldest tokens, of targets the end. The default suits the real data.
  shapes: tuple[tuple[int, int, int], ...] = (
    (16, 10, 8),
    (24, 14, 8),
    (16, 10, 12),
    (20, 12, 14),
    (32, 16, 12),
    (24, 14, 16),
    (20, 12, 22),
    (40, 20, 16),
    (32, 16, 24),
    (64, 28, 14),
    (24, 14, 32),
    (48, 22, 24),
    (56, 24, 36),
    (80, 32, 28),
    (96, 36, 48),
    (160, 48, 48),
    (160, 48, 100),
  )
  # The padded length of a user's feedback in tokens; its end is cut.
  feedback_length: int = 32


@dataclasses.dataclass
class ModelConfig:
  """The generator (paper §4.1; sizes of Lin et al., 2019)."""

  name: str = "empdg_wo_d"  # A key of `models/registry.py`.
  emb_dim: int = 300  # d.
  num_layers: int = 1  # L, of each encoder and of the decoder.
  num_heads: int = 2
  key_value_depth: int = 40  # Of all heads together.
  filter_size: int = 50  # The feed-forward layers' hidden units.
  norm_order: str = "pre"  # "pre" | "post" (eqs. 2-6, 10-12 as printed).
  feed_forward: str = "conv"  # "conv" (kernel 3) | "dense" (the paper's words).
  pointer_generator: bool = True  # Copy from both contexts; False: eq. 13.
  tie_embeddings: bool = False  # Output projection = embedding, transposed.
  dropout_rate: float = 0.1  # Of embeddings and of sub-layers' outputs.
  emotion_loss_weight: float = 1.0  # gamma 1 of eq. 15.
  generation_loss_weight: float = 1.0  # gamma 2 of eq. 15.
  label_smoothing: float = 0.1  # Probability spread over the vocabulary.
  # Widths of the discriminators' convolutions, in words; each width has an
  # equal share of the d filters.
  kernel_widths: tuple[int, ...] = (1, 2, 3)
  # The emotional discriminator reads at most so many words of an utterance.
  max_emotional_words: int = 16
  listener_top_k: int = 0  # MoEL: how many listeners are heard; 0: all.
  # MoEL: the share of examples whose gold emotion's listener alone is heard, at
  # the first step; it falls as exp(-step / listener_teacher_steps).
  listener_teacher_ratio: float = 1.0
  listener_teacher_steps: int = 10_000


@dataclasses.dataclass
class TrainConfig:
  """Training in three phases (paper §4.3, §5.4).

  Maximum likelihood first; then, for systems with discriminators, the
  discriminators alone; then both in turn.
  """

  seed: int = 0
  batch_size: int = 16  # Examples a step, over all devices.
  mle_steps: int = 100_000  # At most; early stopping usually ends before.
  mle_eval_every: int = 2_000  # Steps between validations.
  mle_patience: int = 3  # Validations without a better one before stopping.
  learning_rate_factor: float = 1.0  # Of the schedule of Vaswani et al.
  warmup_steps: int = 8_000
  adam_b1: float = 0.9
  adam_b2: float = 0.98
  adam_eps: float = 1e-9
  # A run folder whose best generator takes the place of phase 1; "": none.
  mle_checkpoint: str = ""
  discriminator_steps: int = 1_000  # Of phase 2.
  discriminator_learning_rate: float = 1e-4  # Adam's, constant.
  gradient_penalty_weight: float = 0.1  # beta of eq. 19.
  adversarial_rounds: int = 5_000  # Of phase 3, at most.
  d_steps: int = 1  # Discriminators' steps a round.
  g_steps: int = 5  # Generator's steps a round.
  adversarial_eval_every: int = 200  # Rounds between validations.
  adversarial_patience: int = 3  # Validations without a better one.
  # What phase 3 keeps the best of: "emotion_accuracy" | "perplexity" |
  # "perplexity_per_example".
  selection_metric: str = "emotion_accuracy"
  # How the discriminators move the generator: "straight_through" (through
  # sampled responses), "expected" (through expected embeddings under teacher
  # forcing), "constant" (no gradient: the scores are added as numbers).
  generator_signal: str = "straight_through"
  generator_signal_weight: float = 1.0  # Of -Dsem - Demo beside Lg; paper: 1.
  sample_steps: int = 20  # Tokens of a sampled response, its EOS included.
  sample_temperature: float = 1.0  # Of their gradients; see `decoding.py`.
  log_every: int = 50  # Updates between lines in metrics.jsonl.
  checkpoint_every: int = 500  # Updates between checkpoints to resume from.
  keep_checkpoints: int = 3  # How many of the latest ones stay.
  # "A:B" traces what JAX does between updates A and B, for TensorBoard; "": no.
  profile_steps: str = ""


@dataclasses.dataclass
class EvalConfig:
  """Evaluation and decoding."""

  batch_size: int = 64  # Examples a step, over all devices.
  max_decode_steps: int = 30  # Tokens of a response, its EOS included.
  beam_size: int = 1  # 1 is greedy decoding.
  length_penalty: float = 0.6  # alpha of Wu et al., 2016, eq. 14; beams only.


@dataclasses.dataclass
class Config:
  """A whole run."""

  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
  eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)


_CHOICES = {
  "data.example_set": ("empdg", "all_turns"),
  "data.vocab_scope": ("train", "all"),
  "model.norm_order": ("pre", "post"),
  "model.feed_forward": ("conv", "dense"),
  "train.selection_metric": (
    "emotion_accuracy",
    "perplexity",
    "perplexity_per_example",
  ),
  "train.generator_signal": ("straight_through", "expected", "constant"),
}
_MAY_BE_ZERO = {
  "train.seed",
  "train.discriminator_steps",
  "train.adversarial_rounds",
  "train.gradient_penalty_weight",
  "train.generator_signal_weight",
  "model.dropout_rate",
  "model.emotion_loss_weight",
  "model.label_smoothing",
  "model.listener_top_k",
  "model.listener_teacher_ratio",
  "eval.length_penalty",
}


def flatten(config: Config) -> dict[str, Any]:
  """Returns every field by its dotted name, as in `data.source`."""
  return {
    f"{section}.{name}": value
    for section, fields in dataclasses.asdict(config).items()
    for name, value in fields.items()
  }


def validate(config: Config) -> None:
  """Checks every field.

  Raises:
    InputError: Naming the first field that is wrong and what it accepts.
  """
  hints = {
    f"{section.name}.{name}": hint
    for section in dataclasses.fields(config)
    for name, hint in typing.get_type_hints(section.type).items()
  }
  for name, value in flatten(config).items():
    expected = typing.get_origin(hints[name]) or hints[name]
    whole = expected is float and type(value) is int
    if type(value) is not expected and not whole:
      raise InputError(f"config.{name}={value!r}: expected {expected.__name__}")
    if name in _CHOICES and value not in _CHOICES[name]:
      raise InputError(
        f"config.{name}={value!r}: expected one of " + ", ".join(_CHOICES[name])
      )
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and not math.isfinite(value):
      raise InputError(f"config.{name}={value!r}: expected a finite number")
    if is_number and (value < 0 or (value == 0 and name not in _MAY_BE_ZERO)):
      raise InputError(f"config.{name}={value!r}: expected more than 0")
  model = config.model
  for name in ("dropout_rate", "label_smoothing"):
    if getattr(model, name) >= 1:
      raise InputError(f"config.model.{name}: expected less than 1")
  if model.listener_teacher_ratio > 1:
    raise InputError("config.model.listener_teacher_ratio: expected at most 1")
  if model.emb_dim % 2:
    raise InputError(f"config.model.emb_dim={model.emb_dim}: expected even")
  if model.key_value_depth % model.num_heads:
    raise InputError(
      f"config.model.key_value_depth={model.key_value_depth}: expected a "
      f"multiple of config.model.num_heads={model.num_heads}"
    )
  widths = model.kernel_widths
  if not widths or not all(type(w) is int and w > 0 for w in widths):
    raise InputError(
      f"config.model.kernel_widths={widths!r}: expected widths of at least 1"
    )
  shapes = config.data.shapes
  if not shapes or not all(
    type(s) is tuple
    and len(s) == 3
    and all(type(length) is int and length >= 2 for length in s)
    for s in shapes
  ):
    raise InputError(
      "config.data.shapes: expected triples (context, emotion, target) of "
      "lengths of at least 2"
    )
  if shapes[-1] != tuple(max(axis) for axis in zip(*shapes, strict=True)):
    raise InputError("config.data.shapes: the last must be the longest")

  profile_range(config.train)


def profile_range(config: TrainConfig) -> tuple[int, int] | None:
  """Returns the updates that `profile_steps` names, None for none.

  Raises:
    InputError: It is not two ascending numbers.
  """
  if not config.profile_steps:
    return None
  first, _, last = config.profile_steps.partition(":")
  if first.isdecimal() and last.isdecimal() and int(first) < int(last):
    return int(first), int(last)
  raise InputError(
    f"config.train.profile_steps={config.profile_steps!r}: expected two "
    "numbers of updates such as 100:110, or ''"
  )


def to_json(config: Config) -> str:
  """Returns the configuration as it stands in a run folder."""
  return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def _with_tuples(value: Any) -> Any:
  """Returns a JSON value with tuples for lists."""
  if isinstance(value, dict):
    return {name: _with_tuples(v) for name, v in value.items()}
  return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def from_json(text: str, where: str) -> Config:
  """Reads what `to_json` wrote.

  Args:
    text: The JSON text.
    where: What to call it in messages.

  Returns:
    The configuration, validated.

  Raises:
    InputError: It is no JSON, or a field is unknown or wrong.
  """
  try:
    values = _with_tuples(json.loads(text))
    config = Config(
      DataConfig(**values.pop("data")),
      ModelConfig(**values.pop("model")),
      TrainConfig(**values.pop("train")),
      EvalConfig(**values.pop("eval")),
    )
    if values:
      raise ValueError(f"unknown section {', '.join(values)}")
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    raise InputError(f"{where}: not a run's configuration ({error})") from error
  try:
    validate(config)
  except InputError as error:
    raise InputError(f"{where}: {error}") from error
  return config
