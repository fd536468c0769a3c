"""Emotional words (paper §3): in an emotion lexicon, or adjectives."""

import hashlib
import importlib.resources
import json
from collections.abc import Container, Sequence

import numpy as np
from textblob.en import parser

from empdg_jax import storage
from empdg_jax.config import TEXT_RULES, InputError

# The closed-class words of English and the pieces that tokenisation splits off
# contractions. They are never emotional, whatever a lexicon or the tagger says:
# they are in every utterance, so marking them would say nothing.
STOP_WORDS = frozenset(
  """
  i me my myself we us our ours ourselves you your yours yourself
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
# By the version of the rules: `mine` is also a word of the NRC lexicon.
_STOP_WORDS = {1: STOP_WORDS | {"mine"}, 2: STOP_WORDS}


def load_lexicon(lexicon: str) -> frozenset[str]:
  """Reads an emotion lexicon.

  Args:
    lexicon: `"nrclex"` for the words that the NRC lexicon associates with an
      emotion or polarity (Mohammad and Turney, 2013), as shipped by the
      package of that name; else a file with either one word a line or lines
      of `word<TAB>emotion<TAB>0 or 1`, the NRC lexicon's own format.

  Returns:
    The words.

  Raises:
    InputError: The file cannot be read or a line has neither form.
  """
  if lexicon == "nrclex":
    package = importlib.resources.files("nrclex")
    return frozenset(json.loads((package / "data/nrc_en.json").read_text()))
  with storage.errors(
    f"config.data.lexicon: cannot read {lexicon!r}; give 'nrclex' or a text "
    "file with one word a line",
    InputError,
  ):
    path = storage.disk_path(lexicon, "config.data.lexicon")
    lines = storage.read_text(path).splitlines()
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


class HashedWords(Container[str]):
  """A lexicon known by the hashes of its words alone.

  Exports hold this form: a lexicon's licence may forbid listing its words.

  Attributes:
    hashes: The result of `hashes_of`.

  >>> words = HashedWords(hashes_of(frozenset(["job", "hoping"])))
  >>> "job" in words, "soon" in words, len(words)
  (True, False, 2)
  """

  def __init__(self, hashes: np.ndarray) -> None:
    """Creates the lexicon from the result of `hashes_of`."""
    self.hashes = hashes
    # A search of the array for every token of a dataset would take minutes.
    self._set = frozenset(hashes.tolist())

  def __contains__(self, word: object) -> bool:
    """Returns whether the word is in the lexicon."""
    return isinstance(word, str) and _hash(word) in self._set

  def __len__(self) -> int:
    """Returns the number of words."""
    return len(self._set)


Lexicon = frozenset[str] | HashedWords


def hashes_of(lexicon: Lexicon) -> np.ndarray:
  """Returns a hash of every word, ascending, `[words]` uint64."""
  if isinstance(lexicon, HashedWords):
    return lexicon.hashes
  return np.array(sorted(map(_hash, lexicon)), np.uint64)


def is_emotional(
  tokens: Sequence[str], lexicon: Container[str], rules: int = TEXT_RULES
) -> list[bool]:
  """Marks the emotional words of one utterance.

  Args:
    tokens: The utterance's tokens, lower-case.
    lexicon: The words of an emotion lexicon.
    rules: The version of the rules.

  Returns:
    A flag a token, true if it is no stop word, and in the lexicon or tagged an
    adjective by TextBlob's tagger.

  >>> is_emotional("a full time job .".split(), frozenset({"job"}))
  [False, True, False, True, False]
  """
  stop_words = _STOP_WORDS[rules]
  # Tagged as a whole, since a word's tag depends on its neighbours.
  return [
    token not in stop_words and (token in lexicon or tag.startswith("JJ"))
    for token, tag in parser.find_tags(tokens)
  ]
