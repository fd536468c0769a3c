"""Responses to contexts from a file (`generate`) and in a chat."""

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TextIO

import jax
from rich.console import Console

from empdg_jax.config import InputError, text_rules
from empdg_jax.data import lexicon as lexicon_lib
from empdg_jax.data import pipeline
from empdg_jax.data.examples import Example, Utterance, annotate
from empdg_jax.data.pipeline import EncodedExample
from empdg_jax.inference.system import Response, System
from empdg_jax.training import terminal

# A longer context is taken for a mistake, such as a whole file in one line.
# Shorter ones keep the latest tokens that fit the longest shape.
MAX_CONTEXT_TOKENS = 2_000
_MOST_CHARACTERS = 2**20
_COMMANDS = "/help explains, /new begins anew, /quit or Ctrl-D ends."
_HELP = (
  "Write what happened to you, a line at a time. The system shows the emotions "
  "that it perceives, then responds to the whole dialogue. " + _COMMANDS
)


class Responder:
  """A system that responds to text.

  Attributes:
    system: The system.
  """

  def __init__(self, system: System) -> None:
    """Loads the lexicon that the system was trained with."""
    self.system = system
    self._lexicon = (
      lexicon_lib.load_lexicon(system.config.data.lexicon)
      if system.lexicon is None
      else system.lexicon
    )

  def annotate(self, utterance: str) -> Utterance:
    """Tokenises a turn and marks its emotional words."""
    rules = text_rules(self.system.config.data)
    return annotate(utterance, self._lexicon, rules)

  def encode(self, utterances: Sequence[str]) -> EncodedExample:
    """Turns a dialogue's turns into ids, with an empty target.

    Args:
      utterances: The turns, alternating between user and system; the last is
        the user's.

    Returns:
      The example.

    Raises:
      InputError: The turns are no list, hold no word or none that the system
        knows, or are too long.
    """
    if re.search("[\ud800-\udfff]", " ".join(utterances)):
      raise InputError("the context is no text: it has no form in UTF-8")
    # A string is a sequence of strings too: each letter would be a turn.
    if isinstance(utterances, str):
      raise InputError(
        f"{utterances[:60]!r}: expected a list of turns, the user's last"
      )
    turns = [self.annotate(utterance) for utterance in utterances]
    # The listener began: an empty turn keeps the user's turns at even numbers.
    if len(turns) % 2 == 0:
      turns.insert(0, Utterance((), ()))
    tokens = [token for turn in turns for token in turn.tokens]
    if not tokens:
      raise InputError("the context is empty; write what the user says")
    if len(tokens) > MAX_CONTEXT_TOKENS:
      raise InputError(
        f"the context has {len(tokens):,} tokens; "
        f"at most {MAX_CONTEXT_TOKENS:,}"
      )
    # Punctuation is always known, so only words show another language.
    vocabulary = self.system.vocabulary
    if not any(t in vocabulary.ids for t in tokens if t.isalpha()):
      raise InputError(
        f"no word of the context is in the vocabulary of {len(vocabulary):,} "
        f"words: {' '.join(tokens)[:60]!r}"
      )
    example = Example("", 0, tuple(turns), Utterance((), ()), None)
    return pipeline.encode(example, vocabulary, self.system.shapes[-1])

  def respond(self, context: Sequence[str]) -> Response:
    """Returns the response to a dialogue.

    Where the configuration samples, every turn of a dialogue draws anew.

    Args:
      context: The turns, as in `encode`.

    Raises:
      InputError: The context cannot be used; see `encode`.
    """
    encoded = self.encode(context)
    return self.respond_encoded([encoded], first=len(context) // 2)[0]

  def respond_batch(self, contexts: Sequence[Sequence[str]]) -> list[Response]:
    """Returns the responses to several dialogues, in their order."""
    return self.respond_encoded([self.encode(context) for context in contexts])

  def respond_encoded(
    self, encoded: Sequence[EncodedExample], first: int = 0
  ) -> list[Response]:
    """Returns the responses to encoded dialogues, in their order.

    Args:
      encoded: The dialogues.
      first: The position of the first one, for sampling.
    """
    if not encoded:
      return []
    # A single response need not wait for a whole batch: one row a device.
    batch_size = self.system.config.eval.batch_size
    if len(encoded) == 1:
      batch_size = jax.local_device_count()
    responses = dict(self.system.respond(encoded, batch_size, first))
    return [responses[index] for index in range(len(encoded))]


def _parse_line(line: str) -> list[str]:
  try:
    value = json.loads(line)
  except (ValueError, RecursionError) as error:
    raise InputError(f"no JSON ({error})") from error
  context = value.get("context") if isinstance(value, dict) else value
  if isinstance(context, str):
    context = [context]
  if not isinstance(context, list) or not all(
    isinstance(utterance, str) for utterance in context
  ):
    raise InputError(
      'expected {"context": ["what the user says", ...]}, the turns of the '
      "dialogue, the user's last"
    )
  return context


def generate(
  responder: Responder, lines: Iterable[str], batch_size: int
) -> Iterator[dict[str, Any]]:
  """Responds to contexts, one JSON value a line.

  Args:
    responder: The system's responder.
    lines: `{"context": [utterance, ...]}` each; blank lines are skipped.
    batch_size: The number of lines to read before responding.

  Yields:
    `{"context", "response", "emotion", "emotion_probability"}` for each line
    in order (without an emotion if the system perceives none;
    `"context_tokens_cut"` too if the context was too long), or `{"error"}` for
    a line that cannot be used.
  """
  numbered = ((n, s) for n, s in enumerate(lines, start=1) if s.strip())
  first = 0
  # Batch by batch, so that a pipe gets responses while its input still comes.
  while group := list(itertools.islice(numbered, batch_size)):
    found: list[dict[str, Any]] = []
    encoded: list[EncodedExample] = []
    for number, line in group:
      try:
        context = _parse_line(line)
        encoded.append(responder.encode(context))
        found.append({"context": context})
      except InputError as error:
        found.append({"error": f"line {number}: {error}"})
    responses = iter(responder.respond_encoded(encoded, first))
    first += len(encoded)
    for values in found:
      yield values if "error" in values else values | _fields(next(responses))


def _fields(response: Response) -> dict[str, Any]:
  """Returns the fields of a response in the output of `generate`."""
  values: dict[str, Any] = {"response": response.text}
  if response.emotions is not None:
    values["emotion"] = response.emotion
    values["emotion_probability"] = round(float(response.emotions.max()), 4)
  if response.cut:
    values["context_tokens_cut"] = response.cut
  return values


def chat(responder: Responder, console: Console, lines: TextIO) -> None:
  """Holds a dialogue in the terminal until the user leaves.

  Lines that begin with a slash are commands.

  Args:
    responder: The system's responder.
    console: The terminal.
    lines: The user's turns, one a line.
  """
  terminal.say(f"Say how you feel. {_COMMANDS}", console)
  turns: list[str] = []
  while True:
    console.print("[bold]you>[/bold] ", end="")
    # Bounded, as whatever is piped in may have no line ends.
    line = lines.readline(_MOST_CHARACTERS)
    said = line.strip()
    if not line or said == "/quit":
      console.print()
      return
    if said == "/new":
      turns = []
      terminal.say("(a new dialogue)", console)
      continue
    if not said or said.startswith("/"):
      hint = _HELP if said == "/help" else f"nothing said; {_COMMANDS}"
      if said not in ("", "/help"):
        hint = f"no command {said[:20]!r}; {_COMMANDS}"
      terminal.say(f"({hint})", console)
      continue
    try:
      # Shown on terminals only; each length of context is compiled once.
      with console.status("Thinking, longer the first time ..."):
        response = responder.respond([*turns, said])
    except InputError as error:
      terminal.say(f"({error})", console)
      continue
    turns += [said, response.text]
    if response.emotions is not None:
      likeliest = response.emotions.argsort()[::-1][:3]
      labels = responder.system.emotions
      felt = ", ".join(
        f"{labels[e]} {response.emotions[e]:.0%}" for e in likeliest
      )
      terminal.say(f"perceived: {felt}", console, "dim")
    terminal.say(f"empdg> {response.text}", console)
