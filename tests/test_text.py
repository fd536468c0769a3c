"""Normalisation, tokenisation and emotional words."""

import itertools
import re
from collections.abc import Container
from pathlib import Path

import nltk
import pytest
from nltk.tag.perceptron import PerceptronTagger

from empdg_jax.config import InputError
from empdg_jax.data import lexicon, text
from empdg_jax.data.empathetic_dialogues import read_csv, read_source


def emotional_words(tokens: list[str], words: Container[str]) -> list[str]:
  """The emotional words of an utterance, in order, repeats kept."""
  flags = lexicon.is_emotional(tokens, words)
  return list(itertools.compress(tokens, flags))


@pytest.fixture(scope="module")
def valid_utterances(real_data: Path) -> list[str]:
  """The valid split's utterances without quotes, as in examples."""
  data = read_source(real_data / "empatheticdialogues.tar.gz")["valid"]
  return [
    utterance.replace('"', "")
    for conversation in read_csv(data, "valid.csv")
    for utterance in conversation.utterances
  ]


@pytest.fixture(scope="module")
def valid_tokens(valid_utterances: list[str]) -> list[list[str]]:
  """The tokens of `valid_utterances`."""
  return [text.tokenize(utterance) for utterance in valid_utterances]


@pytest.mark.parametrize(
  ("contraction", "expansion"),
  [
    ("It's", "it is"),
    ("don't", "do not"),
    ("doesn't", "does not"),
    ("didn't", "did not"),
    ("you'd", "you would"),
    ("you're", "you are"),
    ("you'll", "you will"),
    ("I'm", "i am"),
    ("they're", "they are"),
    ("that's", "that is"),
    ("what's", "what is"),
    ("couldn't", "could not"),
    ("I've", "i have"),
    ("we've", "we have"),
    ("can't", "cannot"),
    ("I'd", "i would"),
    ("aren't", "are not"),
    ("isn't", "is not"),
    ("wasn't", "was not"),
    ("weren't", "were not"),
    ("won't", "will not"),
    ("there's", "there is"),
    ("there're", "there are"),
    ("WON'T", "will not"),
  ],
)
def test_expands_contractions(contraction: str, expansion: str) -> None:
  assert text.normalize(f"So {contraction} go") == f"so {expansion} go"


def test_leaves_other_contractions_to_the_tokeniser() -> None:
  assert text.normalize("She'll say he hasn't") == "she'll say he hasn't"
  assert text.tokenize("She'll say he hasn't") == [
    *("she", "'ll", "say", "he", "has", "n't")
  ]


@pytest.mark.parametrize(
  ("utterance", "tokens"),
  [
    ("The rain stopped.", "the rain stopped ."),
    ("It rained. Then we ran. Home!", "it rained . then we ran . home !"),
    ("Mr. Gray saw dr. Hill.", "mr. gray saw dr. hill ."),
    ("My cat and mrs. Pond left", "my cat and mrs. pond left"),
    ("I waited... for hours...", "i waited ... for hours ..."),
    ("Row by j. smith", "row by j. smith"),
    ("It was 9.50, or more", "it was 9.50 , or more"),
    ("Really?! (Yes).", "really ? ! ( yes ) ."),
    ("I can't, you cannot", "i can not , you can not"),
    ("I haven't. It's grandpa's. Ok", "i have n't . it is grandpa 's . ok"),
    ("From the 50's. Nice", "from the 50 's . nice"),
    ("  two   spaces ", "two spaces"),
    ("", ""),
  ],
)
def test_tokenizes(utterance: str, tokens: str) -> None:
  assert text.tokenize(utterance) == tokens.split()


def test_former_rules_are_kept() -> None:
  """Version 1 took a letter behind an apostrophe for a lone one."""
  tokens = text.tokenize("I haven't. It was J. Mine", rules=1)

  assert tokens == ["i", "haven't.", "it", "was", "j.", "mine"]
  assert text.tokenize("I haven't. It was J. Mine") == [
    *("i", "have", "n't", ".", "it", "was", "j.", "mine")
  ]
  words = frozenset({"mine", "storm"})
  assert lexicon.is_emotional(["mine", "storm"], words, 1) == [False, True]
  assert lexicon.is_emotional(["mine", "storm"], words) == [True, True]


def test_the_rules_differ_where_a_clitic_ends_a_sentence(
  real_data: Path,
) -> None:
  """In 40 utterances of train, 2 of valid and 7 of test."""
  data = read_source(real_data / "empatheticdialogues.tar.gz")
  for split, count in (("train", 40), ("valid", 2), ("test", 7)):
    ended = [
      utterance.replace('"', "")
      for conversation in read_csv(data[split], f"{split}.csv")
      for utterance in conversation.utterances
      if re.search(r"'[a-z]\"?\.\"?\s", utterance.lower())
    ]
    different = [text.tokenize(u, 1) != text.tokenize(u) for u in ended]
    assert sum(different) == count


@pytest.mark.parametrize(
  ("tokens", "joined"),
  [
    ("oh no , that is bad !", "oh no, that is bad!"),
    ("he did n't say ; she 'll know .", "he didn't say; she'll know."),
    ("we 're here : it is late ?", "we're here: it is late?"),
    ("wait ... what", "wait... what"),
    ("", ""),
  ],
)
def test_join_tokens(tokens: str, joined: str) -> None:
  assert text.join_tokens(tokens.split()) == joined


def test_tokens_are_those_of_nltk_with_punkt(
  real_data: Path,
  valid_utterances: list[str],
  valid_tokens: list[list[str]],
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """At least 99.5% of the utterances have the same tokens."""
  nltk_data = str(real_data / "nltk_data")
  monkeypatch.setattr(nltk.data, "path", [nltk_data, *nltk.data.path])

  same = sum(
    nltk.word_tokenize(text.normalize(utterance)) == tokens
    for utterance, tokens in zip(valid_utterances, valid_tokens, strict=True)
  )

  assert len(valid_utterances) == 12_078
  assert same / len(valid_utterances) >= 0.995


def test_emotional_words_are_those_of_nltk(
  real_data: Path,
  valid_tokens: list[list[str]],
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """Jaccard overlap with NLTK's tagger and stop words: at least 0.94."""
  nltk_data = real_data / "nltk_data"
  monkeypatch.setattr(nltk.data, "path", [str(nltk_data), *nltk.data.path])
  stop_words = set(
    (nltk_data / "corpora/stopwords/english").read_text().split()
  )
  words = lexicon.load_lexicon(str(real_data / "nrc_words.txt"))
  tagger = PerceptronTagger()

  both = either = 0
  for tokens in valid_tokens:
    theirs = {
      token
      for token, tag in tagger.tag(tokens)
      if token not in stop_words and (token in words or tag.startswith("JJ"))
    }
    ours = set(emotional_words(tokens, words))
    both += len(ours & theirs)
    either += len(ours | theirs)

  assert both / either >= 0.94


def test_emotional_words_of_the_papers_example(real_data: Path) -> None:
  """Table 5; repeats are kept, in order."""
  words = lexicon.load_lexicon(str(real_data / "nrc_words.txt"))
  context = (
    "my husband lost a job but i am hoping he can find a full time job soon ."
  )

  assert emotional_words(context.split(), words) == [
    *("lost", "job", "hoping", "find", "full", "time", "job")
  ]


def test_stop_words_are_never_emotional() -> None:
  words = frozenset({"not", "storm", "the"})

  assert emotional_words("the storm is not near".split(), words) == ["storm"]
  assert lexicon.is_emotional("the storm".split(), words) == [False, True]
  assert lexicon.is_emotional([], words) == []


def test_adjectives_are_emotional_without_a_lexicon() -> None:
  tokens = "we saw a beautiful lake".split()

  assert emotional_words(tokens, frozenset()) == ["beautiful"]


def test_default_lexicon() -> None:
  words = lexicon.load_lexicon("nrclex")

  assert 5_000 < len(words) < 14_182
  assert {"happy", "lost", "afraid", "grief"} <= words
  assert all(word == word.lower() for word in words)


@pytest.mark.parametrize(
  "content",
  [
    "storm\nJoy\n\n calm \n",
    "storm\r\njoy\r\ncalm",
    "Storm\tfear\t1\nstorm\tjoy\t0\njoy\tjoy\t1\ncalm\ttrust\t1\nlamp\tfear\t0\n",
  ],
)
def test_lexicon_file(tmp_path: Path, content: str) -> None:
  path = tmp_path / "lexicon.txt"
  path.write_text(content, encoding="utf-8")

  assert lexicon.load_lexicon(str(path)) == {"storm", "joy", "calm"}


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"storm\tfear\t1\nlamp\tfear\n", "lexicon.txt:2: expected a word"),
    (b"storm\tfear\t2\n", "lexicon.txt:1: expected a word"),
    (b"storm\tfear\t1\textra\n", "lexicon.txt:1: expected a word"),
    (b"", "lexicon.txt: holds no word"),
    (b"lamp\tfear\t0\n", "lexicon.txt: holds no word"),
    (b"caf\xe9\n", "lexicon.txt"),
  ],
)
def test_bad_lexicon_file(tmp_path: Path, content: bytes, message: str) -> None:
  path = tmp_path / "lexicon.txt"
  path.write_bytes(content)

  with pytest.raises(InputError) as error:
    lexicon.load_lexicon(str(path))

  assert message in str(error.value)
  assert "\n" not in str(error.value)


def test_missing_lexicon_file(tmp_path: Path) -> None:
  path = str(tmp_path / "nowhere.txt")

  with pytest.raises(InputError, match=r"config\.data\.lexicon.*nowhere\.txt"):
    lexicon.load_lexicon(path)
