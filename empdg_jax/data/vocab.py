"""The vocabulary: tokens to ids and back."""

import dataclasses
import functools
import pathlib
from collections import Counter
from collections.abc import Iterable, Sequence

from empdg_jax.config import InputError

SPECIAL_TOKENS = ("UNK", "PAD", "EOS", "SOS", "USR", "SYS", "CLS", "LAB")
UNK, PAD, EOS, SOS, USR, SYS, CLS, LAB = range(len(SPECIAL_TOKENS))


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """An ordered set of tokens; ids 0-7 are `SPECIAL_TOKENS`."""

  tokens: tuple[str, ...]

  @functools.cached_property
  def ids(self) -> dict[str, int]:
    """The id of every token that text may contain."""
    special = len(SPECIAL_TOKENS)
    return {t: i for i, t in enumerate(self.tokens) if i >= special}

  def __len__(self) -> int:
    """Returns the number of ids."""
    return len(self.tokens)

  def encode(self, tokens: Iterable[str]) -> list[int]:
    """Returns the tokens' ids, UNK for unknown ones."""
    return [self.ids.get(token, UNK) for token in tokens]

  def to_text(self) -> str:
    """Returns one token a line, in the order of the ids."""
    return "\n".join(self.tokens) + "\n"

  def save(self, path: pathlib.Path) -> None:
    """Writes `to_text`."""
    path.write_text(self.to_text(), encoding="utf-8")


def build_vocabulary(utterances: Iterable[Sequence[str]]) -> Vocabulary:
  """Collects every token, the most frequent first, ties by spelling."""
  counts = Counter(token for tokens in utterances for token in tokens)
  words = sorted(counts, key=lambda token: (-counts[token], token))
  return Vocabulary(SPECIAL_TOKENS + tuple(words))


def load_vocabulary(path: pathlib.Path) -> Vocabulary:
  """Reads what `Vocabulary.save` wrote.

  Raises:
    InputError: The file is missing or does not begin with the special tokens.
  """
  try:
    data = path.read_bytes()
  except OSError as error:
    raise InputError(f"{path}: cannot read the vocabulary ({error})") from error
  return parse_vocabulary(data, str(path))


def parse_vocabulary(data: bytes, where: str) -> Vocabulary:
  """Reads the content of a file that `Vocabulary.save` wrote.

  Args:
    data: The content.
    where: What to call it in messages.

  Returns:
    The vocabulary.

  Raises:
    InputError: It is no text or does not begin with the special tokens.
  """
  try:
    tokens = tuple(data.decode("utf-8").removesuffix("\n").split("\n"))
  except UnicodeDecodeError as error:
    raise InputError(f"{where}: not a vocabulary ({error})") from error
  if tokens[: len(SPECIAL_TOKENS)] != SPECIAL_TOKENS:
    raise InputError(
      f"{where}: not a vocabulary: its first lines must be "
      + " ".join(SPECIAL_TOKENS)
    )
  return Vocabulary(tokens)
