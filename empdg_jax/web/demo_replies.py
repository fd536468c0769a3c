"""The demo's replies: everyone's requests, answered in batches."""

import collections
import concurrent.futures
import dataclasses
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import NamedTuple

import jax
import numpy as np

from empdg_jax.analysis.attention import Attended, Attender
from empdg_jax.data import vocab
from empdg_jax.data.pipeline import EncodedExample
from empdg_jax.inference.respond import Responder
from empdg_jax.inference.system import Response, System
from empdg_jax.training.steps import Choices

GREEDY, BEAM, SAMPLING = DECODINGS = ("greedy", "beam search", "sampling")
_BEAM_SIZE = 4
_ROWS = 16  # The most requests in a batch.
PERCEIVED = -1


class Settings(NamedTuple):
  """How a reply is wanted.

  Attributes:
    decoding: One of `DECODINGS`.
    temperature: The temperature of sampling.
    top_p: The probability of the nucleus that sampling draws from.
    seed: The seed of sampling.
    length: The most tokens; a longer reply is cut.
    emotion: The emotion to respond to, `PERCEIVED` for the one perceived.
  """

  decoding: str = GREEDY
  temperature: float = 0.8
  top_p: float = 0.9
  seed: int = 0
  length: int = 30
  emotion: int = PERCEIVED


class Reply(NamedTuple):
  """A system's response, and what it came from.

  Attributes:
    response: The response.
    encoded: The dialogue as the system read it.
    settings: How it was wanted.
    seconds: The time from the request to the response.
  """

  response: Response
  encoded: EncodedExample
  settings: Settings
  seconds: float


class _Request(NamedTuple):
  """A request that waits for its batch, the place of its turn included."""

  system: int
  encoded: EncodedExample
  settings: Settings
  position: int
  future: Future[Response]

  @property
  def kind(self) -> tuple[int, str]:
    """What the requests of one batch have in common."""
    return self.system, self.settings.decoding


class Replies:
  """Systems that reply to many people at once.

  One thread takes all waiting requests of a kind together, so that ten people
  wait hardly longer than one, and none for a batch to fill.

  Attributes:
    responders: The responder of each system.
  """

  def __init__(self, responders: Sequence[Responder]) -> None:
    """Starts the thread, which ends with the process or at `close`."""
    self.responders = tuple(responders)
    self._systems = {
      (index, decoding): _with_decoding(responder.system, decoding)
      for index, responder in enumerate(responders)
      for decoding in DECODINGS
    }
    self._attenders = [Attender(r.system) for r in responders]
    self._waiting: collections.deque[_Request] = collections.deque()
    self._changed = threading.Condition()
    self._closed = False
    self._thread = threading.Thread(target=self._answer_all, daemon=True)
    self._thread.start()

  def warm_up(self, index: int, decoding: str) -> None:
    """Compiles how a system decodes, before anyone waits for it."""
    nothing_said = EncodedExample(
      [vocab.CLS],
      [vocab.CLS],
      [vocab.LAB],
      [vocab.EOS],
      [],
      0,
      (),
      (),
      (0,) * 4,
    )
    self._ask(index, nothing_said, Settings(decoding=decoding), 0).result()

  def _ask(
    self, system: int, encoded: EncodedExample, settings: Settings, turn: int
  ) -> Future[Response]:
    future: Future[Response] = Future()
    with self._changed:
      if self._closed:
        raise concurrent.futures.CancelledError
      self._waiting.append(_Request(system, encoded, settings, turn, future))
      self._changed.notify()
    return future

  def ask(
    self, system: int, context: Sequence[str], settings: Settings
  ) -> Future[Reply]:
    """Asks a system for its reply to a dialogue.

    Args:
      system: The index of the system.
      context: The turns, the person's last.
      settings: How the reply is wanted.

    Returns:
      The reply to come.

    Raises:
      InputError: The system cannot respond to the dialogue.
    """
    start = time.perf_counter()
    encoded = self.responders[system].encode(context)
    reply: Future[Reply] = Future()

    def finish(future: Future[Response]) -> None:
      if error := future.exception():
        reply.set_exception(error)
        return
      response = _cut(future.result(), settings.length)
      seconds = time.perf_counter() - start
      reply.set_result(Reply(response, encoded, settings, seconds))

    # Each turn of a dialogue draws anew, as in `empdg chat`.
    turn = len(context) // 2
    self._ask(system, encoded, settings, turn).add_done_callback(finish)
    return reply

  def attend(self, system: int, reply: Reply) -> Attended:
    """Returns what a system's reply attended to."""
    emotion, limit = reply.settings.emotion, reply.settings.length
    return self._attenders[system].attend(
      reply.encoded, reply.response, emotion, limit
    )

  def close(self) -> None:
    """Answers what waits, then ends the thread."""
    with self._changed:
      self._closed = True
      self._changed.notify()
    self._thread.join()

  def _take(self) -> list[_Request]:
    """Waits for requests and takes a batch; none after `close`."""
    with self._changed:
      self._changed.wait_for(lambda: self._waiting or self._closed)
      if not self._waiting:
        return []
      kind = self._waiting[0].kind
      alike = [r for r in self._waiting if r.kind == kind][:_ROWS]
      taken = set(map(id, alike))
      rest = [r for r in self._waiting if id(r) not in taken]
      self._waiting = collections.deque(rest)
      return alike

  def _answer_all(self) -> None:
    """Answers batch after batch."""
    while batch := self._take():
      try:
        responses = self._answer(batch)
      # Whatever fails is told to those who asked, and the others go on.
      except Exception as error:
        for request in batch:
          request.future.set_exception(error)
        continue
      for request, response in zip(batch, responses, strict=True):
        request.future.set_result(response)

  def _answer(self, batch: Sequence[_Request]) -> list[Response]:
    """Returns the responses to the requests of one batch."""
    settings = [request.settings for request in batch]
    choices = Choices(
      np.array([s.emotion for s in settings], np.int32),
      np.array([s.temperature for s in settings], np.float32),
      np.array([s.top_p for s in settings], np.float32),
      np.array([s.seed for s in settings], np.int32),
      np.array([request.position for request in batch], np.int32),
    )
    devices = jax.device_count()
    rows = -(-_ROWS // devices) * devices
    found = dict(
      self._systems[batch[0].kind].respond(
        [request.encoded for request in batch], rows, choices=choices
      )
    )
    return [found[index] for index in range(len(batch))]


def _with_decoding(system: System, decoding: str) -> System:
  """Returns a system that decodes in one of the `DECODINGS`."""
  beams = _BEAM_SIZE if decoding == BEAM else 1
  # Only whether it is 0 counts: each request has its own.
  temperature = 1.0 if decoding == SAMPLING else 0.0
  system = system.with_decoding(beam_size=beams, temperature=temperature)
  # One shape: nobody should wait for another to be compiled.
  system.eval_shapes = system.eval_shapes[-1:]
  return system


def _cut(response: Response, length: int) -> Response:
  """Returns the beginning of a response, of at most `length` tokens."""
  return dataclasses.replace(response, tokens=response.tokens[:length])
