"""Text normalisation and tokenisation.

Tokens are those of `nltk.word_tokenize`, without its downloaded Punkt model:
one regular expression stands in for Punkt's sentence ends.
"""

import re
from collections.abc import Sequence

from nltk.tokenize.destructive import NLTKWordTokenizer

from empdg_jax.config import TEXT_RULES

# Replaced wherever they occur, inside words too, and in this order, as the
# field's preprocessing of the dataset does (Lin et al., 2019): published
# vocabularies and figures depend on it.
_CONTRACTIONS = {
  "it's": "it is",
  "don't": "do not",
  "doesn't": "does not",
  "didn't": "did not",
  "you'd": "you would",
  "you're": "you are",
  "you'll": "you will",
  "i'm": "i am",
  "they're": "they are",
  "that's": "that is",
  "what's": "what is",
  "couldn't": "could not",
  "i've": "i have",
  "we've": "we have",
  "can't": "cannot",
  "i'd": "i would",
  "aren't": "are not",
  "isn't": "is not",
  "wasn't": "was not",
  "weren't": "were not",
  "won't": "will not",
  "there's": "there is",
  "there're": "there are",
}

# NLTK's tokeniser splits off only the full stop that ends the whole string and
# leaves sentences to Punkt. Here a stop inside the string ends a sentence if
# white space follows it, unless it follows another stop, a digit, a lone letter
# or a common abbreviation. Look-behinds have a fixed width, so `mrs` is apart.
# A letter behind an apostrophe is not alone, as version 1 of the rules took it.
_SENTENCE_ENDS = {
  rules: re.compile(
    rf"(?<![\s.\d])(?<!\b{lone}[a-z])(?<!\b(?:mr|ms|dr|st|vs|ok))(?<!\bmrs)"
    r"\.(?=\s)"
  )
  for rules, lone in ((1, ""), (2, "(?<!')"))
}


def normalize(text: str) -> str:
  """Lower-cases `text` and expands the field's list of contractions."""
  text = text.lower()
  for contraction, expansion in _CONTRACTIONS.items():
    text = text.replace(contraction, expansion)
  return text


def tokenize(text: str, rules: int = TEXT_RULES) -> list[str]:
  """Normalises text and splits it into tokens.

  Args:
    text: The text.
    rules: The version of the rules.

  Returns:
    The tokens.

  >>> tokenize("I'm fine. You can't complain?")
  ['i', 'am', 'fine', '.', 'you', 'can', 'not', 'complain', '?']
  """
  sentences = _SENTENCE_ENDS[rules].sub(" .", normalize(text))
  return NLTKWordTokenizer().tokenize(sentences)


def join_tokens(tokens: Sequence[str]) -> str:
  """Returns readable text: no space before closing punctuation or clitics.

  >>> join_tokens("that is great ! did n't he ?".split())
  "that is great! didn't he?"
  """
  text = " ".join(tokens)
  return re.sub(r" (?=[.,!?;:)]|n't\b|'(?:s|m|d|re|ve|ll)\b)", "", text)
