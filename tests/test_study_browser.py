"""A study in real Potato, answered in a real browser."""

import concurrent.futures
import http.cookiejar
import json
import os
import pathlib
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from helpers import chromium, wait_until
from studies import potato_state

from empdg_jax.data import sample_corpus, text
from empdg_jax.web import study, study_answers, study_potato, study_report
from empdg_jax.web.study import Plan, Source, Study

pytestmark = pytest.mark.study
ROOT = pathlib.Path(__file__).resolve().parents[1]
EVIL = "<script>document.title='hacked'</script>"


def _sources(count: int) -> list[Source]:
  """Two invented systems on the embedded corpus."""
  corpus = sample_corpus.dialogues()["test"][:count]
  made = []
  for name, offset in (("EmpDG", 0), ("MoEL", 1)):
    lines = {}
    for number, dialogue in enumerate(corpus):
      turns = [" ".join(text.tokenize(u)) for u in dialogue.utterances]
      other = corpus[(number + offset) % count].utterances[1]
      reply = " ".join(text.tokenize(other)) if offset else turns[1]
      # A hostile reply of the second system, in the rating part alone.
      lines[str(number)] = {
        "id": str(number),
        "emotion": dialogue.emotion,
        "context": turns[:1],
        "reference": turns[1],
        "response": f"{reply} {EVIL}" if offset and number == 1 else reply,
      }
    made.append(Source(name, f"/runs/{name}", lines))
  return made


def _free_port() -> int:
  with socket.socket() as server:
    server.bind(("127.0.0.1", 0))
    return server.getsockname()[1]


class Server:
  """`empdg study serve` in a process group of its own."""

  def __init__(self, folder: pathlib.Path, part: str, port: int) -> None:
    self.log = folder.parent / f"{part}.log"
    self.process = subprocess.Popen(
      [sys.executable, "-m", "empdg_jax.main", "study", "serve"]
      + [f"--study={folder}", f"--part={part}", f"--port={port}"],
      stdout=self.log.open("ab"),
      stderr=subprocess.STDOUT,
      start_new_session=True,
      env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
    )
    self.count = self.log.read_text().count("Ctrl-C")

  def wait(self) -> list[str]:
    """Waits until it serves; returns the links."""
    wait_until(
      lambda: (
        self.log.read_text().count("Ctrl-C") > self.count
        or self.process.poll() is not None
      ),
      "Potato",
      90,
    )
    assert self.process.poll() is None, self.log.read_text()
    links = re.findall(r"(http\S+) +\d+ of", self.log.read_text())
    return links[-3:]

  def kill(self) -> None:
    """Kills it and Potato with SIGKILL."""
    if self.process.poll() is None:
      os.killpg(self.process.pid, signal.SIGKILL)
    self.process.wait()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
  """A browser without a window."""
  with chromium() as started:
    yield started


def _enter(page: Any, link: str, question: str = "empathy") -> None:
  """Follows a link and agrees, up to the first item."""
  page.goto(link)
  page.get_by_text("I agree").first.click()
  page.get_by_role("button", name="Next").last.click()
  page.get_by_text("A worked example").wait_for()
  page.get_by_role("button", name="Next").last.click()
  page.locator(f"form#{question}").wait_for()


def _rate(page: Any, keys: str) -> str:
  """Rates the shown item with the keyboard and waits until it is saved."""
  item = page.locator("#instance_id").input_value()
  page.locator("body").click(position={"x": 2, "y": 2})
  for key in keys:
    page.keyboard.press(key)
  with page.expect_response(
    lambda r: "updateinstance" in r.url and r.request.post_data
  ) as saved:
    page.keyboard.press("ArrowRight")
  # The page moves on, and takes the body with it; the disk is read later.
  assert saved.value.ok
  page.wait_for_function(
    "item => document.querySelector('#instance_id').value !== item", arg=item
  )
  return item


def test_annotators_rate_and_the_server_is_killed(
  browser: Any, tmp_path: pathlib.Path
) -> None:
  """Five items by keyboard, SIGKILL, on; a second annotator meanwhile.

  `EMPDG_SCREENSHOT=docs/images/study.png` renews the README's picture.
  """
  content = study.build(_sources(8), Plan(dialogues=8, controls=0.1))
  folder = tmp_path / "study"
  study_answers.write(content, folder)
  port = _free_port()
  server = Server(folder, "rating", port)
  pages, hosts = [], set()
  try:
    links = server.wait()
    for link in links[:2]:
      context = browser.new_context(viewport={"width": 1000, "height": 900})
      page = context.new_page()
      page.on("request", lambda r: hosts.add(r.url.split("/")[2]))
      _enter(page, link)
      pages.append(page)
    one, two = pages
    image = os.environ.get("EMPDG_SCREENSHOT")
    if image:
      one.screenshot(path=image)
    rated = {_rate(one, keys) for keys in ("1qa", "2wa", "3ed", "4rf", "5tg")}
    _rate(two, "5tg")
    assert len(rated) == 5
    server.kill()
    saved = {
      a.item: "".join(a.answers[metric] for metric in study.METRICS)
      for a in study_potato.read_answers(folder / "rating")
      if a.person in links[0]
    }
    assert set(saved) == rated
    # The other tests invent answers in this layout.
    person = links[0].partition("=")[2]
    path = folder / "rating" / "answers" / person / "user_state.json"
    stored = json.loads(path.read_text())
    given = {i: dict(zip(study.METRICS, saved[i], strict=True)) for i in saved}
    for name, value in potato_state(person, given).items():
      if name != "instance_id_ordering":  # Which nothing reads.
        assert stored[name] == value
    assert sorted(saved.values()) == ["111", "221", "333", "444", "555"]
    server = Server(folder, "rating", port)
    server.wait()
    assert "5 of" in server.log.read_text()
    one.goto(links[0])
    one.locator("form#empathy").wait_for()
    # The last item is shown again, with its answer; it counts once.
    assert one.locator("#instance_id").input_value() in saved
    assert one.locator("form#empathy input:checked").input_value() == "5"
    total = len(content.orders["rating"][0])
    for _ in range(total - 6):
      rated.add(_rate(one, "4ed"))
    assert one.title() != "hacked"
    assert two.title() != "hacked"
  finally:
    server.kill()
  assert {host.partition(":")[0] for host in hosts} == {"127.0.0.1"}
  found = study_potato.read_answers(folder / "rating")
  answers = {(a.person, a.item): a.answers for a in found if len(a.answers) > 2}
  assert len(answers) == len([a for a in found if len(a.answers) > 2])
  assert rated <= {item for _, item in answers}
  first = {i: v for (p, i), v in answers.items() if p in links[0]}
  kept = [i for i in saved if first[i]["empathy"] == saved[i][0]]
  assert len(kept) >= 4  # All but the one that was shown, and rated, again.
  study_answers.add(content, folder, found, "potato")
  report = study_report.report(folder)
  assert [a.seconds is not None for a in report.annotators].count(True) >= 1


def test_a_pair_is_judged(browser: Any, tmp_path: pathlib.Path) -> None:
  """One choice by keyboard, from the page to the report."""
  content = study.build(_sources(4), Plan(dialogues=4, controls=0))
  folder = tmp_path / "study"
  study_answers.write(content, folder)
  server = Server(folder, "pairwise", 0)
  try:
    link = server.wait()[0]
    page = browser.new_context().new_page()
    _enter(page, link, "choice")
    item = _rate(page, "1")
  finally:
    server.kill()
  (found,) = (
    a for a in study_potato.read_answers(folder / "pairwise") if a.answers
  )
  assert (found.item, found.answers) == (item, {"choice": "left"})
  study_answers.add(content, folder, [found], "potato")
  (pair,) = study_report.report(folder).pairs
  first = content.key["items"][item]["first"]
  assert (pair.win if first == "left" else pair.loss).value == 100


class _Person:
  """An annotator who answers over HTTP, as the page does."""

  def __init__(self, link: str) -> None:
    jar = http.cookiejar.CookieJar()
    self.opener = urllib.request.build_opener(
      urllib.request.HTTPCookieProcessor(jar)
    )
    self.url = link.partition("?")[0]
    self.opener.open(link, timeout=60).read()
    self.post("consent", {"consent": "I agree"})
    self.opener.open(f"{self.url}instructions", data=b"", timeout=60).read()
    self.opener.open(f"{self.url}annotate", timeout=60).read()

  def post(self, path: str, value: Any) -> bytes:
    request = urllib.request.Request(
      self.url + path,
      json.dumps(value).encode(),
      {"Content-Type": "application/json"},
    )
    return self.opener.open(request, timeout=60).read()

  def answer(self, items: list[str]) -> list[float]:
    """Answers items; returns the seconds that each took."""
    times = []
    for item in items:
      start = time.perf_counter()
      said = self.post(
        "updateinstance",
        {
          "instance_id": item,
          "annotations": {
            "empathy:4": "4",
            "relevance:3": "3",
            "fluency:5": "5",
          },
        },
      )
      assert json.loads(said)["status"] == "success"
      times.append(time.perf_counter() - start)
    return times


def test_twenty_annotators_and_2000_answers(
  tmp_path: pathlib.Path,
) -> None:
  """None is lost; prints the figures of the README."""
  given = _sources(50)
  content: Study = study.build(
    given, Plan(dialogues=50, annotators=20, controls=0)
  )
  folder = tmp_path / "study"
  study_answers.write(content, folder)
  server = Server(folder, "rating", _free_port())
  try:
    server.wait()
    links = re.findall(r"(http\S+) +\d+ of", server.log.read_text())
    assert len(links) == 20
    # One after the other, so that it is known who has which order.
    people = [_Person(link) for link in links]
    orders = content.orders["rating"]
    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
      times = [
        seconds
        for own in pool.map(_Person.answer, people, orders)
        for seconds in own
      ]
    took = time.perf_counter() - start
  finally:
    server.kill()
  expected = sum(map(len, orders))
  assert expected == 2_000
  found = study_potato.read_answers(folder / "rating")
  assert len({(a.person, a.item) for a in found}) == len(found) == expected
  assert all(len(a.answers) == 3 for a in found)
  slowest = sorted(times)[int(0.95 * len(times))]
  print(
    f"{expected} answers in {took:.1f} s; a save takes "
    f"{statistics.median(times):.3f} s (median), {slowest:.3f} s (95%)"
  )
