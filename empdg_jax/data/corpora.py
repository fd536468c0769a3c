"""A dataset's conversations, labels, splits, licence and rules."""

import dataclasses

from empdg_jax import storage
from empdg_jax.config import DataConfig, InputError

# The files of the official CSV format, one for each split.
SPLITS = ("train", "valid", "test")
EMOTIONS = (
  "afraid", "angry", "annoyed", "anticipating", "anxious", "apprehensive",
  "ashamed", "caring", "confident", "content", "devastated", "disappointed",
  "disgusted", "embarrassed", "excited", "faithful", "furious", "grateful",
  "guilty", "hopeful", "impressed", "jealous", "joyful", "lonely", "nostalgic",
  "prepared", "proud", "sad", "sentimental", "surprised", "terrified",
  "trusting",
)  # fmt: skip
EMPATHETIC_DIALOGUES = "empathetic_dialogues"


@dataclasses.dataclass(frozen=True)
class Conversation:
  """A conversation: as recorded, or as preprocessing joins several.

  Attributes:
    id: The dataset's `conv_id`.
    emotion: The number of the label that the speaker was given.
    situation: The speaker's description of the situation, written beforehand.
    utterances: The turns; the speaker begins.
    speakers: The `speaker_idx` of each turn.
  """

  id: str
  emotion: int
  situation: str
  utterances: tuple[str, ...]
  speakers: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Facts of a dataset that its files do not state.

  Attributes:
    title: The dataset's name and source, for the model card.
    licence: A sentence on its terms, for the model card.
    citation: The work to cite, empty if there is none.
    emotions: The emotion labels, in the order of their numbers.
    splits: The names of the splits.
    dropped_conversations: The number of conversations at the end of each split
      that the published example sets leave out.
    joins_situations: Whether neighbouring conversations about one situation
      form a single dialogue, as in the published example sets.
    train_examples: The number of training examples in each example set; none
      where only the data tell.
  """

  title: str
  licence: str
  citation: str
  emotions: tuple[str, ...]
  splits: tuple[str, ...] = SPLITS
  # Both rules exist to reproduce published sizes, so they are off elsewhere.
  dropped_conversations: int = 0
  joins_situations: bool = False
  train_examples: tuple[tuple[str, int], ...] = ()


_EMPATHETIC_DIALOGUES = Corpus(
  title="EmpatheticDialogues (Rashkin et al., 2019)",
  licence=(
    "EmpatheticDialogues is CC BY-NC 4.0: models trained on it are not for "
    "commercial use."
  ),
  citation="Rashkin et al. (2019) for the data",
  emotions=EMOTIONS,
  dropped_conversations=2,
  joins_situations=True,
  train_examples=(("empdg", 20_724), ("all_turns", 40_250)),
)


def find_corpus(
  config: DataConfig, emotions: tuple[str, ...] | None = None
) -> Corpus:
  """Returns the facts of the dataset that a configuration names.

  Reads at most the file of labels, never the data.

  Args:
    config: The data settings. `emotions` marks data with the 32 labels of
      EmpatheticDialogues, or names the file with another dataset's labels.
    emotions: The labels kept by an export or a run folder. They replace the
      file, which may be gone or have changed since training.

  Raises:
    InputError: The file of labels cannot be read or is malformed.
  """
  if config.emotions != EMPATHETIC_DIALOGUES:
    emotions = emotions or read_labels(config.emotions)
    return Corpus(
      title=f"a dataset with {len(emotions)} emotion labels in the format of "
      "EmpatheticDialogues",
      licence="The licence of the training data applies to the parameters.",
      citation="",
      emotions=emotions,
    )
  if config.source == "sample":
    return dataclasses.replace(
      _EMPATHETIC_DIALOGUES,
      title="EmpDG-JAX's embedded corpus",
      licence="The corpus was written for EmpDG-JAX and has its licence.",
      citation="",
      train_examples=(),
    )
  if config.source != "official":
    return dataclasses.replace(
      _EMPATHETIC_DIALOGUES,
      title=_EMPATHETIC_DIALOGUES.title + ", or other data in its format",
      train_examples=(),
    )
  return _EMPATHETIC_DIALOGUES


def read_labels(path: str) -> tuple[str, ...]:
  """Reads a file of emotion labels, one a line.

  Raises:
    InputError: The file cannot be read, or does not hold two or more different
      labels without white space or commas.
  """
  where = f"config.data.emotions={path!r}"
  with storage.errors(
    f"{where}: cannot read; give {EMPATHETIC_DIALOGUES!r} or a file with one "
    "label a line",
    InputError,
  ):
    # A run folder keeps its labels beside it, so they may lie in a bucket.
    file = storage.run_path(path, "config.data.emotions")
    text = storage.read_text(file)
  return parse_labels(text, where)


def parse_labels(text: str, where: str) -> tuple[str, ...]:
  """Reads the content of a file of emotion labels; see `read_labels`.

  Args:
    text: The content.
    where: The file's name in messages.
  """
  labels = text.splitlines()
  for number, label in enumerate(labels, start=1):
    # CSV rows split at commas, and exports list labels between white space.
    plain = label.isprintable() and "," not in label
    if label.split() != [label] or not plain:
      raise InputError(f"{where}: line {number}: {label!r:.60} is no label")
  if len(set(labels)) < len(labels):
    raise InputError(f"{where}: a label occurs twice")
  if len(labels) < 2:
    raise InputError(f"{where}: expected at least 2 labels, one a line")
  return tuple(labels)


def to_text(emotions: tuple[str, ...]) -> str:
  """Returns the content of `emotions.txt`, which `read_labels` reads."""
  return "".join(f"{label}\n" for label in emotions)
