"""The demo without a browser: its batches, its HTML, what is refused."""

import asyncio
import importlib.util
import pathlib
import re
import socket
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import pytest
from helpers import refused
from invented import make_run
from untrained import make_system

from empdg_jax.analysis.attention import Attended
from empdg_jax.config import Config, InputError
from empdg_jax.data.examples import Utterance
from empdg_jax.data.prepare import Dataset
from empdg_jax.inference.respond import Responder
from empdg_jax.inference.system import Response
from empdg_jax.web import (
  demo,
  demo_html,
  demo_page,
  demo_replies,
  demo_server,
)
from empdg_jax.web.demo_replies import SAMPLING, Replies, Reply, Settings

EVIL = "<script>alert(1)</script><img src=x onerror=alert(1)>\x1b[2J"
SAID = ("i lost my dog .", "i am afraid of the dark .", "i feel so happy !")


@pytest.fixture(scope="module")
def responder(sample_config: Config, sample_dataset: Dataset) -> Responder:
  """A system that no test changes."""
  return Responder(make_system(sample_config, sample_dataset))


@pytest.fixture
def replies(responder: Responder) -> Generator[Replies]:
  """One system that replies."""
  made = Replies([responder])
  yield made
  made.close()


def ask(
  replies: Replies, asked: Sequence[tuple[str, Settings]]
) -> list[list[str]]:
  """Asks all at once; returns the words of each reply."""
  futures = [replies.ask(0, [said], settings) for said, settings in asked]
  return [list(f.result(timeout=120).response.tokens) for f in futures]


def test_everyone_gets_the_reply_that_is_theirs(
  replies: Replies, responder: Responder
) -> None:
  """In one batch, with other settings each; the same words as alone."""
  asked = [
    (SAID[i % 3], Settings(SAMPLING, 1.0, 1.0, seed=i, emotion=i % 4 - 1))
    for i in range(12)
  ]
  batches = []
  respond = replies._answer

  def record(batch: Any) -> list[Response]:
    batches.append(len(batch))
    return respond(batch)

  replies._answer = record  # type: ignore[method-assign]
  together = ask(replies, asked)
  # The first may have left alone, before the others came.
  assert len(batches) <= 2
  assert sum(batches) == 12
  alone = [words for one in asked[:3] for words in ask(replies, [one])]
  assert together[:3] == alone
  assert len({tuple(words) for words in together}) > 6
  sampling = responder.system.with_decoding(temperature=1.0, sampling_seed=0)
  (found,) = Responder(sampling).respond_encoded([responder.encode([SAID[0]])])
  (first,) = ask(replies, [(SAID[0], Settings(SAMPLING, 1.0, 1.0, seed=0))])
  assert first == list(found.tokens)


def test_a_failure_reaches_those_who_asked_alone(
  replies: Replies, monkeypatch: pytest.MonkeyPatch
) -> None:
  def fail(batch: Any) -> list[Response]:
    raise RuntimeError("out of memory")

  with monkeypatch.context() as patch:
    patch.setattr(replies, "_answer", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
      ask(replies, [(SAID[0], Settings())])
  assert ask(replies, [(SAID[0], Settings(length=2))])[0]


def test_kinds_wait_for_batches_of_their_own(replies: Replies) -> None:
  """A queue of two kinds: the oldest request's kind goes first, 16 at most."""
  replies.close()
  encoded = replies.responders[0].encode([SAID[0]])
  for index in range(40):
    settings = Settings(SAMPLING if index % 2 else demo_replies.GREEDY)
    request = demo_replies._Request(0, encoded, settings, index, Any)  # type: ignore[arg-type]
    replies._waiting.append(request)
  taken = []
  while batch := replies._take():
    assert len({request.kind for request in batch}) == 1
    taken.append([request.position for request in batch])
  evens, odds = list(range(0, 40, 2)), list(range(1, 40, 2))
  assert taken == [evens[:16], odds[:16], evens[16:], odds[16:]]


def test_length_cuts_and_the_attention_follows(replies: Replies) -> None:
  reply = replies.ask(0, [SAID[0]], Settings(length=2)).result(timeout=120)
  assert len(reply.response.tokens) == 2
  assert reply.seconds > 0
  attended = replies.attend(0, reply)
  assert attended.response == reply.response.tokens  # Cut, and so no EOS.
  assert attended.weights.shape[0] == 2
  np.testing.assert_allclose(attended.weights.sum(axis=1), 1.0, rtol=1e-5)


def make_reply(text: str, **fields: Any) -> Reply:
  """A reply with these words, as if a system had given it."""
  response = Response((text,), "sad", np.array([0.1, 0.9]), cut=0)
  encoded: Any = None
  return Reply(response, encoded, Settings(**fields), 0.125)


def test_text_of_people_and_models_stays_text() -> None:
  shown = demo_html.dialogue(
    EVIL,
    [Utterance((EVIL, "lost"), (True, False))],
    [make_reply(EVIL, emotion=0)],
    [EVIL, "sad"],
  )
  attended = Attended(
    ("CLS", EVIL), ("LAB", EVIL), (EVIL,), np.full((1, 4), 0.25), None
  )
  shown += demo_html.attention(EVIL, attended) + demo_html.error(EVIL)
  assert "<script" not in shown
  assert "<img" not in shown
  assert "\x1b" not in shown
  assert shown.count("&lt;script&gt;") >= 8
  tags = set(re.findall(r"<(\w+)", shown))
  assert tags <= {
    "h3", "div", "p", "mark", "span", "meter", "details", "summary", "table",
    "caption", "thead", "tbody", "tr", "th", "td",
  }  # fmt: skip


def test_the_page_reports_to_nobody(
  replies: Replies, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "True")
  page = demo_page.build_page(demo.Demo(replies, ["EmpDG"]))
  assert page.analytics_enabled is False


def test_a_reply_shows_what_it_came_from() -> None:
  """Emotional words, the likeliest emotions, the latency."""
  labels = [f"label{i}" for i in range(8)]
  response = Response(("oh", "no", "!"), "label7", np.arange(8.0) / 28, cut=4)
  encoded: Any = None
  reply = Reply(response, encoded, Settings(SAMPLING, emotion=2), 0.125)
  said = Utterance(("i", "lost", "it", "!"), (False, True, False, False))
  shown = demo_html.dialogue("System A", [said], [reply], labels)
  assert '<p class="empdg-said">i <mark>lost</mark> it!</p>' in shown
  assert '<p class="empdg-text">oh no!</p>' in shown
  before, folded = shown.split("<details>")
  assert re.findall("<span>(label.)</span>", before) == [
    f"label{i}" for i in (7, 6, 5, 4, 3)
  ]
  assert "3 other emotions" in folded
  assert re.findall("<span>(label.)</span>", folded) == [
    "label2", "label1", "label0",
  ]  # fmt: skip
  assert "<span>25%</span>" in before  # 7 / 28.
  about = "0.12 s · sampling · emotion set to label2 · 4 oldest words not read"
  assert about in shown


def test_attention_as_a_table() -> None:
  """The strongest cell is opaque; the others are relative to it."""
  weights = np.array([[0.5, 0.25, 0.25, 0.0]])
  attended = Attended(("CLS", "lost"), ("LAB", "lost"), ("oh",), weights, None)
  shown = demo_html.attention("System A", attended)
  assert re.findall(r"172, ([\d.]+)\)", shown) == [
    "1.00",
    "0.50",
    "0.50",
    "0.00",
  ]
  assert shown.count('class="emotional">lost') == 2
  assert 'title="CLS: 50%"' in shown
  assert '<th scope="row">oh</th>' in shown


def test_dialogues_are_each_systems_own(responder: Responder) -> None:
  """Names are hidden until asked for; undo and new lose what they should."""
  replies = Replies([responder, responder])
  shown = demo.Demo(replies, ["EmpDG", "MoEL"])
  dialogue = shown.new_dialogue()
  assert sorted(dialogue.order) == [0, 1]
  assert {shown.new_dialogue().order for _ in range(64)} == {(0, 1), (1, 0)}
  settings = shown.settings("sampling", 1.0, 1.0, 0, 30, "as perceived")
  for said in SAID[:2]:
    dialogue = asyncio.run(shown.say(dialogue, said, settings))
  replies.close()
  first = dialogue.turns[0]
  assert dialogue.context(1, "and now ?") == [
    SAID[0], first.replies[1].response.text,
    SAID[1], dialogue.turns[1].replies[1].response.text, "and now ?",
  ]  # fmt: skip
  hidden = shown.panels(dialogue)
  assert ["System A" in hidden[0], "System B" in hidden[1]] == [True, True]
  assert not any("EmpDG" in panel or "MoEL" in panel for panel in hidden)
  named = shown.panels(demo.dataclasses.replace(dialogue, named=True))
  for column, system in enumerate(dialogue.order):
    assert ["EmpDG", "MoEL"][system] in named[column]


@pytest.mark.parametrize(
  ("controls", "says"),
  [
    (("guess", 1, 1, 0, 9, "as perceived"), "unknown decoding"),
    (("greedy", 1, 1, 0, 9, "<script>"), "unknown decoding or emotion"),
    (("greedy", 0, 1, 0, 9, "sad"), "out of range"),
    (("greedy", 1, 1.5, 0, 9, "sad"), "out of range"),
    (("greedy", 1, float("nan"), 0, 9, "sad"), "out of range"),
    (("greedy", 1, 1, -1, 9, "sad"), "seed: expected a whole number"),
    (("greedy", 1, 1, 0.5, 9, "sad"), "seed: expected a whole number"),
    (("greedy", 1, 1, None, 9, "sad"), "seed: expected a whole number"),
    (("greedy", 1, 1, 2**31, 9, "sad"), "seed: expected a whole number"),
    (("greedy", 1, 1, float("inf"), 9, "sad"), "seed: expected a whole number"),
    (("greedy", 1, 1, 0, 10**9, "sad"), "out of range"),
  ],
)
def test_controls_that_the_page_does_not_offer(
  replies: Replies, controls: Any, says: str
) -> None:
  shown = demo.Demo(replies, ["EmpDG"])
  with pytest.raises(InputError, match=says):
    shown.settings(*controls)


def test_nothing_said_and_too_much(replies: Replies) -> None:
  shown = demo.Demo(replies, ["EmpDG"])
  dialogue = shown.new_dialogue()
  assert dialogue.named  # A single system has nothing to hide.
  for said, says in (
    (" ", "nothing said"),
    (None, "nothing said"),
    ("a" * 1_001, "at most 1,000 characters"),
    ("qqq zzz", "no word of the context is in the vocabulary"),
  ):
    with pytest.raises(InputError, match=says):
      asyncio.run(shown.say(dialogue, said, Settings()))  # type: ignore[arg-type]
  with pytest.raises(InputError, match="no such turn"):
    shown.attention(dialogue, 1)


def test_systems_of_other_labels(responder: Responder) -> None:
  other: Any = type("Other", (), {})()
  other.system = type("System", (), {"emotions": ("calm", "angry")})()
  with pytest.raises(InputError, match="--bundle=b: its emotion labels differ"):
    demo.check_systems([responder, other], ["--workdir=a", "--bundle=b"])
  assert demo.titles([responder], ["a"]) == ["EmpDG w/o D"]
  assert demo.titles([responder] * 2, ["a", "b"])[1] == "EmpDG w/o D (b)"


def test_bad_input(
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
) -> None:
  run = f"--workdir={make_run(tmp_path / 'run', 'moel', 1)}"
  monkeypatch.setattr(demo_server, "require_extra", lambda: None)
  assert "--workdir is missing" in refused(capsys, "demo")
  assert "4 times" in refused(capsys, "demo", *[run] * 4)
  said = refused(capsys, "demo", run, "--config.eval.beam_size=2")
  assert "--config.eval.beam_size: no such field" in said
  said = refused(capsys, "demo", run, "--port=70000")
  assert said == "empdg: --port=70000: expected at most 65535"
  assert "--port=-1: expected at least 0" in refused(
    capsys, "demo", run, "--port=-1"
  )
  with socket.create_server(("127.0.0.1", 0)) as taken:
    port = taken.getsockname()[1]
    said = refused(capsys, "demo", run, f"--port={port}")
  assert f"--port={port}: cannot listen there (Address already in use)" in said
  said = refused(capsys, "demo", run, "--port=0", "--host=no such host")
  assert "--host=no such host: expected an address of this machine" in said
  nothing = f"--workdir={tmp_path / 'nothing'}"
  assert "nothing" in refused(capsys, "demo", nothing, "--port=0")
  (tmp_path / "empty").mkdir()
  said = refused(capsys, "demo", f"--bundle={tmp_path / 'empty'}", "--port=0")
  assert "is no export" in said


def test_without_the_extra(
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
) -> None:
  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util,
    "find_spec",
    lambda name, *rest: None if name == "gradio" else find(name, *rest),
  )
  run = f"--workdir={make_run(tmp_path / 'run', 'moel', 1)}"
  said = refused(capsys, "demo", run)
  assert "pip install -e '.[web]'" in said


@pytest.mark.parametrize(
  ("host", "loopback"),
  [
    ("127.0.0.1", True),
    ("127.1.2.3", True),
    ("::1", True),
    ("localhost", True),
    ("0.0.0.0", False),
    ("::", False),
    ("192.0.2.1", False),
    ("example.org", False),
  ],
)
def test_loopback(host: str, loopback: bool) -> None:
  assert demo_server.is_loopback(host) == loopback


def test_the_address_of_the_page() -> None:
  with demo_server.open_socket("0.0.0.0", 0) as listening:
    port = listening.getsockname()[1]
    assert demo_server.url(listening) == f"http://127.0.0.1:{port}"


def test_close_answers_what_waits(responder: Responder) -> None:
  replies = Replies([responder])
  future = replies.ask(0, [SAID[0]], Settings())
  replies.close()
  assert future.result(timeout=1).response.text
  assert not replies._thread.is_alive()
