"""Emotional words (paper §3): in an emotion lexicon, or adjectives."""

import hashlib
import importlib.resources
import json
import pathlib
from collections.abc import Container, Iterable, Sequence

import numpy as np
from textblob.en import parser

from empdg_jax.config import InputError

# The closed-class words of English and the pieces that tokenisation splits off
# contractions: never emotional, whatever a lexicon says.
STOP_WORDS = frozenset(
  """
  i me my mine myself we us our ours ourselves you your yours yourself
  yourselves he him his himself she her hers herself it its itself they them
  their theirs themselves what which who whom whose this that these those
  am is are was were be been being have has had having do does did doing done
  will would shall should can could may might must ought cannot
  a an the and but if or nor so than then because as until while though
  although whether unless since
  of at by for with about against between into through during before after
  above below to from up down in out on off over under upon onto within without
  again further once here there when where why how
  all any both each few more most other another such some no not only own same
  too very just now also ever
  s t d m o y re ve ll ma don ain aren couldn didn doesn hadn hasn haven isn
  mightn mustn needn shan shouldn wasn weren won wouldn n't
  """.split()
)


def load_lexicon(lexicon: str) -> frozenset[str]:
  """Reads an emotion lexicon.

  Args:
    lexicon: `"nrclex"` for the words that the NRC lexicon associates with an
      emotion or polarity (Mohammad and Turney, 2013) as the package of that
      name ships them; else a file with either one word a line or lines of
      `word<TAB>emotion<TAB>0 or 1`, the NRC lexicon's own format.

  Returns:
    The words.

  Raises:
    InputError: The file cannot be read or a line has neither form.
  """
  if lexicon == "nrclex":
    package = importlib.resources.files("nrclex")
    return frozenset(json.loads((package / "data/nrc_en.json").read_text()))
  try:
    lines = pathlib.Path(lexicon).read_text(encoding="utf-8").splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(
      f"config.data.lexicon: cannot read {lexicon!r} ({error}); give 'nrclex' "
      "or a text file with one word a line"
    ) from error
  words = set()
  for number, line in enumerate(lines, start=1):
    match line.split("\t"):
      case [word] | [word, _, "1"]:
        words.add(word.strip().lower())
      case [_, _, "0"]:
        pass
      case _:
        raise InputError(
          f"{lexicon}:{number}: expected a word, or word<TAB>emotion<TAB>0 or 1"
        )
  words.discard("")
  if not words:
    raise InputError(f"{lexicon}: holds no word")
  return frozenset(words)


def _hash(word: str) -> int:
  """Returns the first 8 bytes of a word's SHA-256."""
  return int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big")


def word_hashes(words: Iterable[str]) -> np.ndarray:
  """Returns a hash of every word, ascending, `[words]` uint64."""
  return np.array(sorted(map(_hash, words)), np.uint64)


class HashedWords(Container[str]):
  """A lexicon of which only the words' hashes are known.

  Attributes:
    hashes: What `word_hashes` gave.

  >>> words = HashedWords(word_hashes(["job", "hoping"]))
  >>> "job" in words, "soon" in words, len(words)
  (True, False, 2)
  """

  def __init__(self, hashes: np.ndarray) -> None:
    """Takes what `word_hashes` gave."""
    self.hashes = hashes
    self._set = frozenset(hashes.tolist())

  def __contains__(self, word: object) -> bool:
    """Returns whether the word is in the lexicon."""
    return isinstance(word, str) and _hash(word) in self._set

  def __len__(self) -> int:
    """Returns the number of words."""
    return len(self._set)


Lexicon = frozenset[str] | HashedWords


def hashes_of(lexicon: Lexicon) -> np.ndarray:
  """Returns `word_hashes` of a lexicon of either kind."""
  if isinstance(lexicon, HashedWords):
    return lexicon.hashes
  return word_hashes(lexicon)


def is_emotional(tokens: Sequence[str], lexicon: Container[str]) -> list[bool]:
  """Tells which tokens of one utterance are emotional words.

  Args:
    tokens: The utterance's tokens, lower-case.
    lexicon: The words of an emotion lexicon.

  Returns:
    A flag a token: no stop word, and in the lexicon or tagged an adjective by
    TextBlob's tagger.
  """
  return [
    token not in STOP_WORDS and (token in lexicon or tag.startswith("JJ"))
    for token, tag in parser.find_tags(tokens)
  ]


def emotional_words(
  tokens: Sequence[str], lexicon: Container[str]
) -> list[str]:
  """Returns the emotional words of an utterance, in order, repeats kept.

  >>> words = "but i am hoping he can find a full time job soon .".split()
  >>> emotional_words(words, frozenset({"hoping", "job"}))
  ['hoping', 'full', 'job']
  """
  flags = is_emotional(tokens, lexicon)
  return [token for token, flag in zip(tokens, flags, strict=True) if flag]
