"""Replies to contexts from a file (`generate`) and in a dialogue (`chat`)."""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TextIO

import jax
from rich.console import Console

from empdg_jax.config import InputError
from empdg_jax.data import lexicon as lexicon_lib
from empdg_jax.data import pipeline, text
from empdg_jax.data.examples import Utterance, annotate
from empdg_jax.data.pipeline import EncodedExample
from empdg_jax.inference.system import Response, System

# A context longer than this is taken for a mistake; shorter ones keep the
# latest tokens that fit the model's longest shape.
MAX_CONTEXT_TOKENS = 2_000


class Responder:
  """Turns utterances into replies.

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
    self._tokenizer = text.Tokenizer()

  def encode(self, utterances: Sequence[str]) -> EncodedExample:
    """Turns a dialogue's turns into ids, with an empty target.

    Args:
      utterances: The turns; the last is the user's, and they alternate.

    Returns:
      The example.

    Raises:
      InputError: There is no word, none that the system knows, or too many; or
        the turns are not a list.
    """
    if isinstance(utterances, str):
      raise InputError(
        f"{utterances[:60]!r}: expected a list of turns, the user's last"
      )
    turns = [annotate(u, self._tokenizer, self._lexicon) for u in utterances]
    if len(turns) % 2 == 0:  # The dialogue began with the listener.
      turns.insert(0, Utterance((), ()))
    tokens = [token for turn in turns for token in turn.tokens]
    if not tokens:
      raise InputError("the context is empty; write what the user says")
    if len(tokens) > MAX_CONTEXT_TOKENS:
      raise InputError(
        f"the context has {len(tokens):,} tokens; "
        f"at most {MAX_CONTEXT_TOKENS:,}"
      )
    if not any(t in self.system.vocabulary.ids for t in tokens if t.isalpha()):
      raise InputError(
        f"no word of the context is in the vocabulary of "
        f"{len(self.system.vocabulary):,} words: {' '.join(tokens)[:60]!r}"
      )
    return pipeline.encode(
      turns, (), 0, self.system.vocabulary, self.system.shapes[-1]
    )

  def respond(self, context: Sequence[str]) -> Response:
    """Returns the reply to a dialogue.

    Args:
      context: Its turns; the last is the user's, and they alternate.

    Raises:
      InputError: The context cannot be answered; see `encode`.
    """
    (reply,) = self.answer([self.encode(context)])
    return reply

  def respond_batch(self, contexts: Sequence[Sequence[str]]) -> list[Response]:
    """Returns the replies to several dialogues, in their order."""
    return self.answer([self.encode(context) for context in contexts])

  def answer(self, encoded: Sequence[EncodedExample]) -> list[Response]:
    """Returns a reply to each of what `encode` gave, in their order."""
    if not encoded:
      return []
    # A single reply need not wait for a whole batch: one row a device.
    devices = jax.local_device_count()
    batch_size = self.system.config.eval.batch_size
    batch_size = devices if len(encoded) == 1 else batch_size
    replies = dict(self.system.respond(encoded, batch_size))
    return [replies[index] for index in range(len(encoded))]


def _parse_line(line: str) -> list[str]:
  try:
    value = json.loads(line)
  except ValueError as error:
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
  """Answers contexts, one JSON value a line.

  Args:
    responder: Who answers.
    lines: `{"context": [utterance, ...]}` each; blank lines are passed over.
    batch_size: How many lines to read before answering.

  Yields:
    `{"context", "response", "emotion", "emotion_probability"}` for each line
    in order (without an emotion if the system perceives none;
    `"context_tokens_cut"` too where the context was too long), or `{"error"}`
    for a line that cannot be answered.
  """
  group: list[tuple[list[str], EncodedExample] | InputError] = []
  for number, line in enumerate(lines, start=1):
    if not line.strip():
      continue
    try:
      context = _parse_line(line)
      group.append((context, responder.encode(context)))
    except InputError as error:
      group.append(InputError(f"line {number}: {error}"))
    if len(group) == batch_size:
      yield from _answer(responder, group)
      group = []
  if group:
    yield from _answer(responder, group)


def _answer(
  responder: Responder,
  group: list[tuple[list[str], EncodedExample] | InputError],
) -> Iterator[dict[str, Any]]:
  good = [item[1] for item in group if not isinstance(item, InputError)]
  replies = iter(responder.answer(good) if good else [])
  for item in group:
    if isinstance(item, InputError):
      yield {"error": str(item)}
      continue
    reply = next(replies)
    answer: dict[str, Any] = {
      "context": item[0],
      "response": reply.text,
    }
    if reply.emotions is not None:
      answer["emotion"] = reply.emotion
      answer["emotion_probability"] = round(float(reply.emotions.max()), 4)
    if reply.cut:
      answer["context_tokens_cut"] = reply.cut
    yield answer


def chat(responder: Responder, console: Console, lines: TextIO) -> None:
  """Holds a dialogue in the terminal until the user leaves.

  Args:
    responder: Who answers.
    console: Where to print.
    lines: Where the user's turns come from.
  """
  console.print(
    "Say how you feel. An empty line or Ctrl-D ends, /new begins anew."
  )
  turns: list[str] = []
  while True:
    console.print("[bold]you>[/bold] ", end="")
    said = lines.readline().strip()
    if not said:
      console.print()
      return
    if said == "/new":
      turns = []
      continue
    try:
      reply = responder.respond([*turns, said])
    except InputError as error:
      console.print(f"({error})", markup=False, highlight=False)
      continue
    turns += [said, reply.text]
    if reply.emotions is not None:
      likeliest = reply.emotions.argsort()[::-1][:3]
      labels = responder.system.emotions
      felt = ", ".join(
        f"{labels[e]} {reply.emotions[e]:.0%}" for e in likeliest
      )
      console.print(f"[dim]perceived: {felt}[/dim]", highlight=False)
    console.print(f"empdg> {reply.text}", markup=False, highlight=False)
