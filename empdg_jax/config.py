"""The configuration: typed, every field with its unit and source."""

import ast
import dataclasses
import importlib.resources
import json
import math
import os
import pathlib
import re
import runpy
import typing
from collections.abc import Mapping
from typing import Any, Literal

# Exit statuses. After FAILED the same command may be given again.
FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
# Devices count and draw random numbers in int32.
MAX_INT = 2**31 - 1
# The newest rules of `data/text.py`, `data/lexicon.py` and `data/examples.py`.
# Raise it when one of them changes, and keep the former rules: a trained system
# goes on reading text as it learned it.
TEXT_RULES = 2


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


# Escape sequences can clear a screen, forge lines or retitle a window; so can
# C1 controls and marks that change the direction of writing. UTF-8 has no code
# for lone surrogates.
_UNPRINTABLE = re.compile(
  r"[\0-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
  r"""Returns text with its control characters spelled out, but line ends.

  >>> printable("\x1b[2J")
  '\\x1b[2J'
  """
  return _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)


def printable_json(value: Any) -> str:
  r"""Returns a value as a line of JSON with its control characters escaped.

  >>> printable_json(["naïve", "\x9b2J"])
  '["naïve", "\\u009b2J"]'
  """
  return _UNPRINTABLE.sub(
    lambda match: f"\\u{ord(match[0]):04x}",
    json.dumps(value, ensure_ascii=False),
  )


@dataclasses.dataclass
class SourceConfig:
  """Where the data come from; a trained system may be used with other data."""

  # Dataset to read: "official" (downloaded), "sample" (the embedded corpus), or
  # the path of an archive or folder in the official CSV format.
  source: str = "official"
  # Folder for prepared datasets; "" is a folder in the user's cache.
  data_dir: str = ""


@dataclasses.dataclass
class DataConfig(SourceConfig):
  """Data and batches."""

  # Emotion labels: "empathetic_dialogues" for the 32 of that dataset, or a file
  # with one label a line, in the order of their numbers.
  emotions: str = "empathetic_dialogues"
  # "empdg": 20,724 / 2,972 / 2,713 examples with user feedback (the paper);
  # "all_turns": every listener turn (Lin et al., 2019).
  example_set: Literal["empdg", "all_turns"] = "empdg"
  # Emotion lexicon: "nrclex", or a lexicon file (see `data/lexicon.py`).
  lexicon: str = "nrclex"
  # Pre-trained word vectors in GloVe's text format, optionally gzipped; "" for
  # none.
  vectors: str = ""
  # Version of the rules that tokenise text and mark emotional words; 0 for the
  # newest, or for those of the run that is resumed.
  text_rules: int = 0
  # Splits whose words form the vocabulary: "train", or "all" (the published
  # protocol).
  vocab_scope: Literal["train", "all"] = "train"
  # Padded lengths of the batches in tokens, as triples: the context with its
  # CLS, its emotional words with their LAB, the target with its EOS. An example
  # goes to the first triple that holds it. If even the last is too short,
  # contexts lose their oldest tokens and targets their end. The default suits
  # the real data.
  shapes: tuple[tuple[int, int, int], ...] = (
    (16, 10, 8), (24, 14, 8), (16, 10, 12), (20, 12, 14), (32, 16, 12),
    (24, 14, 16), (20, 12, 22), (40, 20, 16), (32, 16, 24), (64, 28, 14),
    (24, 14, 32), (48, 22, 24), (56, 24, 36), (80, 32, 28), (96, 36, 48),
    (160, 48, 48), (160, 48, 100),
  )  # fmt: skip
  # Padded length of the user's feedback in tokens; longer feedback loses its
  # end.
  feedback_length: int = 32
  # Neighbouring batches of one padded length in maximum likelihood. 1 mixes the
  # lengths best; config.train.steps_per_call needs more.
  batches_per_run: int = 1


@dataclasses.dataclass
class ModelConfig:
  """Generator and discriminators (paper, section 4; Lin et al., 2019)."""

  # System to build: a key of `models/registry.py`.
  name: str = "empdg_wo_d"
  emb_dim: int = 300  # Size of embeddings and hidden states (d).
  num_layers: int = 1  # Layers of each encoder and of the decoder (L).
  num_heads: int = 2  # Attention heads of each layer.
  key_value_depth: int = 40  # Size of keys and values, over all heads.
  filter_size: int = 50  # Hidden units of the feed-forward layers.
  # Layer normalisation: "pre" (before each sub-layer), or "post" (as printed in
  # eqs. 2-6 and 10-12).
  norm_order: Literal["pre", "post"] = "pre"
  # Feed-forward layers: "conv" (convolutions of kernel 3), or "dense" (the
  # paper's words).
  feed_forward: Literal["conv", "dense"] = "conv"
  # Copy words from both contexts; false is eq. 13 alone.
  pointer_generator: bool = True
  # Use the transposed embedding as the output projection.
  tie_embeddings: bool = False
  # Dropout rate of embeddings and of sub-layers' outputs.
  dropout_rate: float = 0.1
  # Weight of the emotion loss (gamma 1 of eq. 15).
  emotion_loss_weight: float = 1.0
  # Weight of the generation loss (gamma 2 of eq. 15).
  generation_loss_weight: float = 1.0
  label_smoothing: float = 0.1  # Probability spread over the vocabulary.
  # What the classifier of emotions reads of each context:
  # "first": the encoder's first output, as printed in eqs. 3, 6 and 7;
  # "mean": the mean of the embedded words;
  # "attention": their mean weighted by softmax(v tanh(W x + b)) (Yang et al.,
  # 2016). The discriminators read the first output in any case.
  emotion_pooling: Literal["first", "mean", "attention"] = "first"
  # Dropout rate of the input of We (eq. 7); none in the paper.
  emotion_dropout: float = 0.0
  # Probability of leaving a whole word out of the pool (Iyyer et al., 2015);
  # the encoders keep it. None in the paper.
  word_dropout: float = 0.0
  # Widths of the discriminators' convolutions in words; each gets an equal
  # share of the filters.
  kernel_widths: tuple[int, ...] = (1, 2, 3)
  # Maximum words of an utterance that the emotional discriminator reads.
  max_emotional_words: int = 16
  listener_top_k: int = 0  # MoEL: listeners used for each example; 0 for all.
  # MoEL: share of examples, at the first step, that use only their gold
  # emotion's listener; it decays as exp(-step / listener_teacher_steps).
  listener_teacher_ratio: float = 1.0
  # MoEL: time constant of that decay in steps.
  listener_teacher_steps: int = 10_000


@dataclasses.dataclass
class TrainConfig:
  """Training in three phases (paper, sections 4.3 and 5.4).

  Maximum likelihood first; then, for systems with discriminators, the
  discriminators alone; then both in turn.
  """

  seed: int = 0  # Seed of all random numbers.
  # Type of products and activations: "float32", "bfloat16", or "auto", which is
  # bfloat16 where the hardware multiplies it faster. Parameters, optimiser
  # states, losses and normalisations are float32 in any case.
  compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
  batch_size: int = 16  # Examples per step, over all devices.
  # Steps of maximum likelihood that the devices take in one call, which changes
  # no number; a divisor of config.data.batches_per_run. 0 for 1 on a CPU, and
  # elsewhere for the largest that fits, at most 16.
  steps_per_call: int = 0
  # Maximum steps of phase 1; early stopping usually ends it sooner.
  mle_steps: int = 100_000
  mle_eval_every: int = 2_000  # Steps between validations in phase 1.
  # Validations without improvement after which phase 1 stops.
  mle_patience: int = 3
  # Validation metric by which phase 1 keeps its best checkpoint and stops; its
  # names are those of `selection_metric`.
  mle_selection_metric: Literal[
    "emotion_accuracy", "perplexity", "perplexity_per_example", "joint", "last"
  ] = "perplexity"
  # Learning rate of the generator: "inverse_sqrt" (Vaswani et al., 2017; the
  # paper), or "cosine" (Loshchilov and Hutter, 2017): a linear warm-up to
  # `peak_learning_rate`, then half a cosine to 0 at `mle_steps`.
  schedule: Literal["inverse_sqrt", "cosine"] = "inverse_sqrt"
  # Factor of the schedule of Vaswani et al.
  learning_rate_factor: float = 1.0
  peak_learning_rate: float = 1e-3  # Highest rate of the cosine schedule.
  warmup_steps: int = 8_000  # Warm-up steps of either schedule.
  # Constant learning rate of the generator in phase 3; 0 goes on with the
  # schedule, as in the paper.
  adversarial_learning_rate: float = 0.0
  adam_b1: float = 0.9  # Adam's decay rate of the first moment.
  adam_b2: float = 0.98  # Adam's decay rate of the second moment.
  adam_eps: float = 1e-9  # Adam's epsilon.
  # Run folder whose best generator replaces phase 1; "" for none.
  mle_checkpoint: str = ""
  discriminator_steps: int = 1_000  # Steps of phase 2.
  # Constant learning rate of the discriminators, which Adam trains as well.
  discriminator_learning_rate: float = 1e-4
  # Discriminators that play: "all" of the system's (the paper), or one.
  discriminators: Literal["all", "semantic", "emotional"] = "all"
  # Feedback that they read in training: the dialogue's "own" (the paper), or
  # that of another dialogue, "shuffled", to measure what it contributes.
  feedback: Literal["own", "shuffled"] = "own"
  # Weight of the gradient penalty (beta of eq. 19).
  gradient_penalty_weight: float = 0.1
  # Where the slope is measured that the penalty holds at 1: at the LSTM's
  # "states" (eq. 19), or at the embedded "words" (Gulrajani et al., 2017).
  gradient_penalty_at: Literal["states", "words"] = "states"
  adversarial_rounds: int = 5_000  # Maximum rounds of phase 3.
  d_steps: int = 1  # Discriminators' steps per round.
  g_steps: int = 5  # Generator's steps per round.
  adversarial_eval_every: int = 200  # Rounds between validations in phase 3.
  # Validations without improvement after which phase 3 stops.
  adversarial_patience: int = 3
  # Decay of the average of the generator's weights in phase 3 (Yazici et al.,
  # 2019), which is then validated and kept as the best; 0 for no average.
  ema_decay: float = 0.0
  # Validation metric by which phase 3 keeps its best checkpoint and stops, with
  # the formula in `training/validation.py:selection_score`:
  # "emotion_accuracy", "perplexity", "perplexity_per_example";
  # "joint": ln(perplexity_per_example) - emotion_accuracy;
  # "last": the number of rounds, so that the last validation is the best.
  selection_metric: Literal[
    "emotion_accuracy", "perplexity", "perplexity_per_example", "joint", "last"
  ] = "emotion_accuracy"
  # How the discriminators move the generator:
  # "straight_through": through responses it samples;
  # "expected": through expected embeddings of teacher-forced words;
  # "teacher_forced": through teacher-forced words that it samples;
  # "constant": not at all, their scores are added as numbers.
  generator_signal: Literal[
    "straight_through", "expected", "teacher_forced", "constant"
  ] = "straight_through"
  # Weight of -Dsem - Demo beside Lg; 1 in the paper.
  generator_signal_weight: float = 1.0
  # Norm of the signal's gradient as a share of the likelihood's, both smoothed
  # over about 20 updates; it replaces the weight. 0 for the weight (the paper).
  generator_signal_share: float = 0.0
  # Whether validations also respond to the split, greedily, for the metrics of
  # its responses: Distinct, BLEU, length and repetition.
  validation_responses: bool = False
  sample_steps: int = 20  # Maximum tokens of a sampled response, with its EOS.
  # Temperature of the sampled responses' gradients; see `decoding.py`.
  sample_temperature: float = 1.0
  log_every: int = 50  # Updates between lines in metrics.jsonl.
  checkpoint_every: int = 500  # Updates between checkpoints to resume from.
  keep_checkpoints: int = 3  # Number of latest checkpoints to keep.
  # Longest wait, in seconds, for another training in the run folder to end, as
  # after a crash; refused if it then still goes on.
  lease_seconds: int = 180
  # Longest time, in minutes, without an update or for a checkpoint; training
  # then ends with status 1 and stacks-HOST.txt. Six times as long to compile.
  stall_minutes: float = 10.0
  # Seconds of silence after which a host counts as lost to the others.
  heartbeat_seconds: int = 60
  # "A:B" traces what JAX does between updates A and B, for TensorBoard; "" for
  # no trace.
  profile_steps: str = ""


@dataclasses.dataclass
class EvalConfig:
  """Evaluation and decoding."""

  batch_size: int = 64  # Examples per step, over all devices.
  max_decode_steps: int = 30  # Maximum tokens of a response, with its EOS.
  beam_size: int = 1  # Beams; 1 is greedy decoding.
  # Length penalty of beam search (alpha of eq. 14, Wu et al., 2016).
  length_penalty: float = 0.6
  # Temperature of sampling, which divides log-probabilities; 0 samples nothing:
  # greedy decoding or beam search.
  temperature: float = 0.0
  # Draw from the likeliest tokens whose probabilities add up to this (Holtzman
  # et al., 2020); 1 for all.
  top_p: float = 1.0
  # Seed of sampling; a response depends on it and on its example's position.
  sampling_seed: int = 0


@dataclasses.dataclass
class Config:
  """A whole run."""

  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
  eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)


_MAY_BE_ZERO = {
  "data.text_rules", "train.seed", "train.steps_per_call",
  "train.discriminator_steps",
  "train.adversarial_rounds",
  "train.gradient_penalty_weight", "train.generator_signal_weight",
  "model.dropout_rate", "model.emotion_loss_weight", "model.label_smoothing",
  "model.emotion_dropout", "model.word_dropout",
  "train.adversarial_learning_rate", "train.ema_decay",
  "train.generator_signal_share",
  "model.listener_top_k", "model.listener_teacher_ratio", "eval.length_penalty",
  "eval.temperature", "eval.sampling_seed",
}  # fmt: skip

_BELOW_1 = (
  "model.dropout_rate", "model.emotion_dropout", "model.word_dropout",
  "model.label_smoothing", "train.ema_decay",
)  # fmt: skip


def flatten(config: Config) -> dict[str, Any]:
  """Returns every field by its dotted name, as in `data.source`."""
  return {
    f"{section}.{name}": value
    for section, fields in dataclasses.asdict(config).items()
    for name, value in fields.items()
  }


def field_types() -> dict[str, Any]:
  """Returns the type of every field by its dotted name."""
  return {
    f"{section.name}.{name}": hint
    for section in dataclasses.fields(Config)
    for name, hint in typing.get_type_hints(section.type).items()
  }


_NAMES = {
  int: "a whole number",
  float: "a number",
  bool: "true or false",
  str: "text",
  tuple: "a tuple",
  list: "a list",
}


def parse(text: str, hint: Any) -> Any:
  """Returns the value of this type that a text stands for; else the text.

  >>> parse("(1,2)", tuple), parse("true", bool), parse("x", int)
  ((1, 2), True, 'x')
  """
  kind = typing.get_origin(hint) or hint
  try:
    if type(None) in typing.get_args(hint):
      return parse(text, typing.get_args(hint)[0])
    if kind is tuple:
      value = ast.literal_eval(text)
      return tuple(value) if isinstance(value, list | tuple) else (value,)
    if kind is bool:
      return {"true": True, "false": False}[text.lower()]
    return kind(text) if kind in (int, float) else text
  except (ValueError, SyntaxError, TypeError, KeyError):
    return text
  except (RecursionError, MemoryError):  # Parentheses nested too deeply.
    return text


def unparse(value: Any) -> str:
  """Returns the text that `parse` reads."""
  if isinstance(value, bool):
    return str(value).lower()
  return value if isinstance(value, str) else str(value).replace(" ", "")


def expected(value: Any, hint: Any) -> str:
  """Returns what a value of this type should be, "" if it is one.

  The elements of tuples are not checked.

  >>> expected("x", int)
  'a whole number'
  >>> expected("pre", Literal["pre", "post"])
  ''
  """
  arguments = typing.get_args(hint)
  # First, since a longer number may not even convert to a float.
  if type(value) is int and abs(value) > MAX_INT:
    return f"a number from 0 to {MAX_INT:,}"
  if type(None) in arguments:
    return "" if value is None else expected(value, arguments[0])
  if typing.get_origin(hint) is Literal:
    fits = any(value == choice for choice in arguments)
    return "" if fits else "one of " + ", ".join(arguments)
  kind = typing.get_origin(hint) or hint
  fits = type(value) is kind or (kind is float and type(value) is int)
  return "" if fits else _NAMES[kind]


def validate(config: Config) -> None:
  """Checks every field.

  Raises:
    InputError: Naming the first field that is wrong and what it accepts.
  """
  hints, values = field_types(), flatten(config)

  def check(fits: bool, name: str, wanted: str) -> None:
    if not fits:
      value = f"{values[name]!r:.200}"  # It may be a whole file.
      raise InputError(f"config.{name}={value}: expected {wanted}")

  def are_lengths(given: Any, least: int) -> bool:
    return given and all(
      type(n) is int and least <= n <= MAX_INT for n in given
    )

  for name, value in values.items():
    wanted = expected(value, hints[name])
    check(not wanted, name, wanted)
    if isinstance(value, str):
      check("\0" not in value, name, "text without NUL")
    elif isinstance(value, int | float) and not isinstance(value, bool):
      check(math.isfinite(value), name, "a finite number")
      fits = value > 0 or (value == 0 and name in _MAY_BE_ZERO)
      check(fits, name, "more than 0")
  model, shapes = config.model, config.data.shapes
  wanted = f"a version of at most {TEXT_RULES}; a newer one needs an update"
  check(config.data.text_rules <= TEXT_RULES, "data.text_rules", wanted)
  for name in _BELOW_1:
    check(values[name] < 1, name, "less than 1")
  fits = not model.word_dropout or model.emotion_pooling != "first"
  wanted = "0, with config.model.emotion_pooling=first, which pools no words"
  check(fits, "model.word_dropout", wanted)
  train = config.train
  fits = train.schedule != "cosine" or train.warmup_steps < train.mle_steps
  wanted = (
    f"less than config.train.mle_steps={train.mle_steps}, the cosine's end"
  )
  check(fits, "train.warmup_steps", wanted)
  fits = model.listener_teacher_ratio <= 1
  check(fits, "model.listener_teacher_ratio", "at most 1")
  check(config.eval.top_p <= 1, "eval.top_p", "at most 1")
  fits = not config.eval.temperature or config.eval.beam_size == 1
  wanted = f"0, with config.eval.beam_size={config.eval.beam_size}; sampling "
  check(fits, "eval.temperature", wanted + "needs a beam of 1")
  check(model.emb_dim % 2 == 0, "model.emb_dim", "an even number")
  fits = model.key_value_depth % model.num_heads == 0
  wanted = f"a multiple of config.model.num_heads={model.num_heads}"
  check(fits, "model.key_value_depth", wanted)
  fits = are_lengths(model.kernel_widths, 1)
  check(fits, "model.kernel_widths", "widths of at least 1")
  fits = len(shapes) > 0 and all(
    type(s) is tuple and len(s) == 3 and are_lengths(s, 2) for s in shapes
  )
  wanted = "triples (context, emotion, target) of lengths of at least 2"
  wanted += f" and at most {MAX_INT:,}"
  check(fits, "data.shapes", wanted)
  longest = tuple(map(max, zip(*shapes, strict=True)))
  check(shapes[-1] == longest, "data.shapes", "the longest lengths last")
  fits = config.data.batches_per_run % (config.train.steps_per_call or 1) == 0
  wanted = "a divisor of config.data.batches_per_run="
  wanted += f"{config.data.batches_per_run}, or 0"
  check(fits, "train.steps_per_call", wanted)
  profile_range(config.train)


def text_rules(config: DataConfig) -> int:
  """Returns the version of the rules by which text is read.

  >>> text_rules(DataConfig(text_rules=1))
  1
  """
  return config.text_rules or TEXT_RULES


def profile_range(config: TrainConfig) -> tuple[int, int] | None:
  """Returns the updates that `profile_steps` names, None for none.

  Raises:
    InputError: It is not two ascending numbers.
  """
  if not config.profile_steps:
    return None
  # No longer: int() refuses thousands of digits.
  if re.fullmatch(r"\d{1,10}:\d{1,10}", config.profile_steps):
    first, last = map(int, config.profile_steps.split(":"))
    if first < last:
      return first, last
  raise InputError(
    f"config.train.profile_steps={config.profile_steps!r:.200}: expected two "
    "numbers of updates such as 100:110, or ''"
  )


def to_json(config: Config) -> str:
  """Returns the configuration as it stands in a run folder."""
  return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def _with_tuples(value: Any, depth: int = 4) -> Any:
  """Returns a JSON value with tuples for lists; raises ValueError if deep."""
  if not isinstance(value, dict | list):
    return value
  # What comes after may recurse more often than Python allows.
  if not depth:
    raise ValueError("nested too deep")
  if isinstance(value, dict):
    return {name: _with_tuples(v, depth - 1) for name, v in value.items()}
  return tuple(_with_tuples(v, depth - 1) for v in value)


def _shipped_files() -> dict[str, pathlib.Path]:
  """Returns the configuration files that we ship, by name."""
  folder = pathlib.Path(str(importlib.resources.files("empdg_jax.configs")))
  return {path.stem: path for path in sorted(folder.glob("[!_]*.py"))}


def from_file(given: str) -> Config:
  """Runs a configuration file.

  Args:
    given: FILE, or FILE:ARGUMENT with an argument for its `get_config`. FILE is
      a path, or a name such as `empdg` for one of the files that we ship.

  Returns:
    The configuration, not yet validated.

  Raises:
    InputError: There is no such file, or it does not return a configuration.
  """
  name, colon, argument = given.partition(":")
  shipped = _shipped_files()
  # Of `os.path`, which takes a name that is too long for a missing file.
  is_file = os.path.isfile(name)
  if not is_file and name not in shipped:
    raise InputError(
      f"--config={given[:200]}: no such file; give a path, or one of "
      + ", ".join(shipped)
    )
  file = pathlib.Path(name) if is_file else shipped[name]
  try:
    get_config = runpy.run_path(str(file))["get_config"]
    config = get_config(argument) if colon else get_config()
  except InputError as error:
    raise InputError(f"--config={given}: {error}") from error
  except Exception as error:  # Whatever the file's code raises.
    raise InputError(f"--config={given}: {error!r}") from error
  if not isinstance(config, Config):
    raise InputError(f"--config={given}: get_config() must return a Config")
  return config


def with_fields(config: Config, fields: Mapping[str, str]) -> Config:
  """Returns a configuration with other values, given as texts by dotted name.

  >>> with_fields(Config(), {"train.seed": "3"}).train.seed
  3
  """
  hints = field_types()
  sections = {
    section.name: getattr(config, section.name)
    for section in dataclasses.fields(config)
  }
  for name, text in fields.items():
    section, _, field = name.partition(".")
    value = parse(text, hints[name])
    sections[section] = dataclasses.replace(sections[section], **{field: value})
  return Config(**sections)


def parse_json(text: str) -> Any:
  """Parses JSON strictly.

  Raises:
    ValueError: It is no JSON, nested too deep, repeats a key, or holds NaN.
  """

  def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
      raise ValueError("a key occurs twice")
    return values

  def refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")

  try:
    return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
  except RecursionError as error:
    raise ValueError("nested too deep") from error


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
    values = _with_tuples(parse_json(text))
    # Runs had no such fields while there was one version of the rules for text,
    # while they computed in float32, and while every batch was a run.
    values["data"].setdefault("text_rules", 1)
    values["data"].setdefault("batches_per_run", 1)
    values["train"].setdefault("compute_dtype", "float32")
    given = {f"{s}.{name}" for s, fields in values.items() for name in fields}
    if unknown := given - field_types().keys():
      raise ValueError(f"unknown field {min(unknown)!r:.60}")
    sections = typing.get_type_hints(Config).items()
    config = Config(
      **{name: kind(**values.pop(name)) for name, kind in sections}
    )
    if values:
      raise ValueError(f"unknown section {min(values)!r:.60}")
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    raise InputError(f"{where}: not a run's configuration ({error})") from error
  try:
    validate(config)
  except InputError as error:
    raise InputError(f"{where}: {error}") from error
  return config
