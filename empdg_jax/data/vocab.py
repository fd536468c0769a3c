"""The vocabulary: tokens and their ids."""

import dataclasses
import functools
import pathlib
from collections import Counter
from collections.abc import Iterable, Sequence

from empdg_jax import storage
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
    # Without the special tokens, so that no text can spell one.
    special = len(SPECIAL_TOKENS)
    return {t: i for i, t in enumerate(self.tokens) if i >= special}

  def __len__(self) -> int:
    """Returns the number of ids."""
    return len(self.tokens)

  def encode(self, tokens: Iterable[str]) -> list[int]:
    """Returns the ids of tokens, UNK for unknown ones."""
    return [self.ids.get(token, UNK) for token in tokens]

  def to_text(self) -> str:
    """Returns the tokens, one a line, in the order of their ids."""
    return "\n".join(self.tokens) + "\n"


def build_vocabulary(utterances: Iterable[Sequence[str]]) -> Vocabulary:
  """Builds the vocabulary of all tokens, the most frequent first."""
  counts = Counter(token for tokens in utterances for token in tokens)
  # Ties by spelling, so that ids do not depend on the order of the data.
  words = sorted(counts, key=lambda token: (-counts[token], token))
  return Vocabulary(SPECIAL_TOKENS + tuple(words))


def load_vocabulary(path: pathlib.Path) -> Vocabulary:
  """Reads a vocabulary's file, the content that `Vocabulary.to_text` returns.

  Raises:
    InputError: The file is missing or malformed; see `parse_vocabulary`.
  """
  with storage.errors(f"{path}: cannot read the vocabulary", InputError):
    storage.check_plain(path)
    data = path.read_bytes()
  return parse_vocabulary(data, str(path))


def parse_vocabulary(data: bytes | bytearray, where: str) -> Vocabulary:
  """Reads the content of a vocabulary's file.

  Args:
    data: The content.
    where: The file's name in messages.

  Returns:
    The vocabulary.

  Raises:
    InputError: It is no text, does not begin with the special tokens, or a
      token is empty or repeated.
  """
  with storage.errors(f"{where}: not a vocabulary", InputError):
    # Not `splitlines`, which would also split at separators inside tokens.
    tokens = tuple(data.decode("utf-8").removesuffix("\n").split("\n"))
  if tokens[: len(SPECIAL_TOKENS)] != SPECIAL_TOKENS:
    raise InputError(
      f"{where}: not a vocabulary: its first lines must be "
      + " ".join(SPECIAL_TOKENS)
    )
  if "" in tokens or len(set(tokens)) < len(tokens):
    raise InputError(f"{where}: not a vocabulary: a token is empty or repeated")
  return Vocabulary(tokens)
