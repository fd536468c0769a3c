"""The demo's page in a real browser, and ten people at once."""

import concurrent.futures
import contextlib
import http.client
import json
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Generator
from typing import Any

import pytest
from helpers import chromium, write_executable

pytestmark = pytest.mark.browser
ROOT = pathlib.Path(__file__).resolve().parents[1]
SECONDS = 1_000.0  # Playwright counts in milliseconds.


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
  """The environment of a person's own terminal."""
  kept = {
    # Optimised, unlike the other tests' processes: replies are timed.
    name: value
    for name, value in os.environ.items()
    if "OPTIM" not in name
  }
  cache = str(tmp_path_factory.mktemp("cache"))
  return {**kept, "XDG_CACHE_HOME": cache, "GRADIO_ANALYTICS_ENABLED": "True"}


@pytest.fixture(scope="module")
def runs(
  environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
  """The run folders of two small systems, trained for a minute."""
  folder = tmp_path_factory.mktemp("runs")
  # Another folder of runs, when working on the page.
  if given := os.environ.get("EMPDG_TEST_RUNS"):
    folder = pathlib.Path(given)
  for name in ("empdg_wo_d", "transformer"):
    if not (folder / name).exists():
      argv = [
        "train", "--config=quickstart", f"--workdir={folder / name}",
        f"--config.model.name={name}", "--config.train.mle_steps=300",
        "--config.train.mle_eval_every=150", "--config.train.warmup_steps=100",
      ]  # fmt: skip
      command = [sys.executable, "-m", "empdg_jax.main", *argv]
      subprocess.run(command, check=True, capture_output=True, env=environment)
  return [str(folder / name) for name in ("empdg_wo_d", "transformer")]


@contextlib.contextmanager
def serving(
  environment: dict[str, str], *argv: str
) -> Generator[tuple[subprocess.Popen[str], str]]:
  """Serves a page until the block ends; yields the process and the address."""
  command = [sys.executable, "-m", "empdg_jax.main", "demo", "--port=0", *argv]
  process = subprocess.Popen(
    command,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    env={**environment, "PYTHONUNBUFFERED": "1"},
  )
  try:
    assert process.stdout
    lines = []
    for line in process.stdout:
      lines.append(line)
      if found := re.search(r"Open (http://\S+) ", line):
        yield process, found[1]
        break
    else:
      raise AssertionError("".join(lines))
  finally:
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def address(runs: list[str], environment: dict[str, str]) -> Generator[str]:
  """The address of a page with both systems."""
  argv = [f"--workdir={run}" for run in runs]
  with serving(environment, *argv) as (_, found):
    yield found


@pytest.fixture(scope="module")
def browser() -> Generator[Any]:
  """A browser without a window."""
  with chromium() as started:
    yield started


# Before the others: Playwright starts once at a time.
def test_a_browser_that_does_not_start_skips_nothing(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  write_executable(tmp_path / "chromium", "#!/bin/sh\nexit 1\n")
  monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
  with pytest.raises(Exception, match="launch"), chromium():
    pass


def test_tests_are_skipped_without_a_browser(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Playwright's own Chromium counts as one."""
  monkeypatch.setattr("shutil.which", lambda name: None)
  monkeypatch.setenv("PLAYWRIGHT_BROWSERS_PATH", str(tmp_path))
  with pytest.raises(pytest.skip.Exception, match="apt-get"), chromium():
    pass


class Person:
  """Someone with a browser of their own on the page.

  Attributes:
    page: The page.
    requests: The addresses that the page has asked for.
    mistakes: What the page's scripts complained about.
  """

  def __init__(self, browser: Any, address: str) -> None:
    """Opens the page."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    self.page = context.new_page()
    self.page.set_default_timeout(20 * SECONDS)
    self.requests: list[str] = []
    self.mistakes: list[str] = []
    self.page.on("request", lambda sent: self.requests.append(sent.url))
    self.page.on("websocket", lambda sent: self.requests.append(sent.url))
    self.page.on("pageerror", lambda error: self.mistakes.append(str(error)))
    self.page.on("console", self._hear)
    self.page.goto(address)
    self.page.locator(".empdg-dialogue").first.wait_for()

  def _hear(self, message: Any) -> None:
    if message.type == "error":
      self.mistakes.append(message.text)

  def texts(self, selector: str) -> list[str]:
    """Returns the text of all elements."""
    return self.page.locator(selector).all_inner_texts()

  def click(self, name: str) -> None:
    """Clicks a button."""
    self.page.get_by_role("button", name=name, exact=True).click()

  def wait_for(self, selector: str, count: int) -> None:
    """Waits until there are as many elements."""
    self.page.wait_for_function(
      "([s, n]) => document.querySelectorAll(s).length === n",
      arg=[selector, count],
    )

  def say(self, said: str, columns: int = 2) -> list[str]:
    """Says something; returns the replies of all columns."""
    before = self.page.locator(".empdg-reply").count()
    self.page.get_by_label("You", exact=True).fill(said)
    self.page.keyboard.press("Enter")
    self.wait_for(".empdg-reply", before + columns)
    turns = (before + columns) // columns
    shown = self.texts(".empdg-text")
    return [shown[turns * column - 1] for column in range(1, columns + 1)]

  def close(self) -> None:
    """Checks that nothing came from elsewhere, and leaves."""
    page = re.escape("/".join(self.page.url.split("/")[:3]))
    elsewhere = [
      one for one in self.requests
      if not re.match(rf"{page}/|data:|blob:{page}/", one)
    ]  # fmt: skip
    assert len(self.requests) > 10
    assert elsewhere == []
    assert self.mistakes == []
    self.page.context.close()


def test_three_turns_side_by_side(
  browser: Any, address: str, tmp_path: pathlib.Path
) -> None:
  """From opening the page to its attention; makes the README's picture."""
  start = time.monotonic()
  person = Person(browser, address)
  page = person.page
  assert page.get_by_text("no help in an emergency").is_visible()
  replies = person.say("I lost my job today and I feel terrible.")
  assert time.monotonic() - start < 5
  assert all(replies)
  assert person.texts("mark") == ["lost", "job", "terrible"] * 2
  # The Transformer perceives no emotion: bars in one column alone.
  assert page.locator(".empdg-bar:visible").count() == 5
  page.locator(".empdg-dialogue summary").click()
  assert page.locator(".empdg-bar:visible").count() == 32
  page.locator(".empdg-dialogue summary").click()
  assert re.search(r"\d\.\d\d s · greedy", person.texts(".empdg-about")[0])
  person.say("I do not know what to do now.")
  assert person.say("Thank you, I will try.") == [
    person.texts("#system-0 .empdg-text")[2],
    person.texts("#system-1 .empdg-text")[2],
  ]
  assert person.texts("h3") == ["System A", "System B"]
  person.click("Show the systems' names")
  page.get_by_text("Transformer").wait_for()
  assert sorted(person.texts("h3")) == ["EmpDG w/o D", "Transformer"]
  page.get_by_text("Attention: what each word looked at").click()
  person.click("Show attention")
  person.wait_for("#attention table", 2)
  heads = page.locator("#attention thead th.emotional").count()
  assert heads > 0
  last = person.texts("#system-0 .empdg-text")[2].split()[0]
  rows = person.texts("#attention table:first-child tbody th")
  assert rows[0].strip() == last.strip(".,!?")
  folder = os.environ.get("EMPDG_SCREENSHOTS") or tmp_path
  picture = pathlib.Path(folder) / "demo.png"
  person.click("Undo last turn")
  person.wait_for(".empdg-reply", 4)
  person.click("Show attention")
  person.wait_for("#attention table", 2)
  page.get_by_label("You", exact=True).fill("")
  page.screenshot(path=picture, full_page=True)
  assert picture.stat().st_size > 20_000
  person.close()


def test_three_systems_of_runs_and_an_export(
  browser: Any,
  runs: list[str],
  environment: dict[str, str],
  tmp_path: pathlib.Path,
) -> None:
  export = tmp_path / "export"
  argv = ["export", f"--workdir={runs[1]}", f"--out={export}"]
  command = [sys.executable, "-m", "empdg_jax.main", *argv]
  subprocess.run(command, check=True, capture_output=True, env=environment)
  argv = [*(f"--workdir={run}" for run in runs), f"--bundle={export}"]
  with serving(environment, *argv) as (_, address):
    person = Person(browser, address)
    replies = person.say("I lost my job today.", columns=3)
    assert all(replies)
    assert person.texts("h3") == ["System A", "System B", "System C"]
    person.click("Show the systems' names")
    person.page.get_by_text("EmpDG w/o D").wait_for()
    said = dict(zip(person.texts("h3"), replies, strict=True))
    run, exported = (
      said[f"Transformer ({name})"] for name in (runs[1], export)
    )
    assert run == exported
    person.close()


def test_undo_new_and_examples(browser: Any, address: str) -> None:
  person = Person(browser, address)
  said = person.page.get_by_label("You", exact=True)
  person.say("I lost my job today.")
  person.say("It hurts so much.")
  person.click("Undo last turn")
  person.wait_for(".empdg-reply", 2)
  assert said.input_value() == "It hurts so much."
  person.click("New dialogue")
  person.wait_for(".empdg-reply", 0)
  assert said.input_value() == ""
  person.click("Send")
  person.wait_for("#error [role=alert]", 1)
  assert "nothing said" in person.texts("#error")[0]
  person.page.locator("button.gallery-item").first.click()
  person.page.wait_for_function(
    "document.querySelector('#said textarea, #said input').value.length > 9"
  )
  person.click("Send")
  person.wait_for(".empdg-reply", 2)
  assert person.texts("#error [role=alert]") == []
  person.close()


def test_settings(browser: Any, address: str) -> None:
  """Sampling repeats with its seed; the emotion and length are as set."""
  person = Person(browser, address)
  page = person.page
  page.get_by_text("How to reply").click()
  page.get_by_label("sampling", exact=True).check()
  page.get_by_label("number input for Sampling: temperature").fill("2")
  page.get_by_label("number input for Sampling: top-p").fill("1")
  said = "I lost my job today."

  def draw(seed: str) -> list[str]:
    page.get_by_label("Sampling: seed").fill(seed)
    found = sorted(person.say(said))
    person.click("New dialogue")
    person.wait_for(".empdg-reply", 0)
    return found

  first = draw("1")
  assert draw("2") != first
  assert draw("1") == first
  page.get_by_label("beam search", exact=True).check()
  page.get_by_label("number input for Maximum length in tokens").fill("3")
  emotion = page.get_by_label("Emotion to respond to")
  emotion.fill("proud")
  page.get_by_role("option", name="proud").click()
  replies = person.say(said)
  assert all(len(re.findall(r"\w+|[^\w\s]", one)) <= 4 for one in replies)
  about = " ".join(person.texts(".empdg-about"))
  assert "beam search · emotion set to proud" in about
  assert person.texts(".empdg-bar span")[0] == "proud"
  person.close()


def test_what_people_write_stays_text(browser: Any, address: str) -> None:
  """Neither HTML nor templates run, wherever they are shown."""
  person = Person(browser, address)
  page = person.page
  evil = (
    "i lost my job <script>window.hit=1</script> <img src=x "
    "onerror='window.hit=1'> ${window.hit=1} {{value}} *bold* [a](b)"
  )
  person.say(evil)
  page.get_by_text("Attention: what each word looked at").click()
  person.click("Show attention")
  person.wait_for("#attention table", 2)
  page.wait_for_timeout(200)
  assert page.evaluate("window.hit") is None
  for selector in ("script", "img", "strong", "a"):
    assert page.locator(f".empdg-said {selector}").count() == 0
  shown = person.texts(".empdg-said")[0]
  for part in ("script", "window.hit=1", "onerror=", "$", "value", "bold"):
    assert part in shown
  person.close()


def test_two_people_do_not_meet(browser: Any, address: str) -> None:
  one, other = Person(browser, address), Person(browser, address)
  one.say("I lost my zebra today.")
  other.say("I feel so happy about my parrot.")
  one.say("It hurts so much.")
  assert "parrot" not in one.page.content()
  assert "zebra" not in other.page.content()
  assert other.page.locator(".empdg-reply").count() == 2
  one.page.reload()
  one.page.locator(".empdg-dialogue").first.wait_for()
  assert one.page.locator(".empdg-reply").count() == 0
  one.close()
  other.close()


class Client:
  """Someone who speaks to the server as the page does, without a browser."""

  def __init__(self, address: str, name: str) -> None:
    """Reads the page's configuration, as the browser does when it opens."""
    self._host = address.removeprefix("http://")
    self._session = name
    config = json.loads(self._request("GET", "/config"))
    kinds = {one["id"]: one["type"] for one in config["components"]}
    # Sending is what reads the controls.
    self._send = max(config["dependencies"], key=lambda d: len(d["inputs"]))
    self._controls = ["greedy", 0.8, 0.9, 0, 30, "as perceived"]
    assert [kinds[i] for i in self._send["inputs"]][:2] == ["state", "textbox"]

  def _request(self, method: str, path: str, body: Any = None) -> str:
    connection = http.client.HTTPConnection(self._host, timeout=60)
    sent = None if body is None else json.dumps(body)
    headers = {"Content-Type": "application/json"}
    connection.request(method, path, sent, headers)
    with connection.getresponse() as response:
      text = response.read().decode()
    assert response.status == 200, text
    return text

  def say(self, said: str) -> tuple[str, float]:
    """Says something; returns what is shown, and the seconds it took."""
    start = time.monotonic()
    body = {
      "data": [None, said, *self._controls],
      "fn_index": self._send["id"],
      "session_hash": self._session,
    }
    self._request("POST", "/gradio_api/queue/join", body)
    path = f"/gradio_api/queue/data?session_hash={self._session}"
    for line in self._request("GET", path).splitlines():
      if line.startswith("data:"):
        message = json.loads(line.removeprefix("data:"))
        if message["msg"] == "process_completed":
          assert message["success"], message
          shown = json.dumps(message["output"]["data"])
          return shown, time.monotonic() - start
    raise AssertionError("no reply")


def test_ten_people_at_once(address: str) -> None:
  """Five turns each, as fast as they can; nobody sees another's words."""
  people = 10

  def talk(number: int, of: str = "person") -> list[float]:
    client = Client(address, f"{of}{number}")
    name = f"name{'abcdefghij'[number] * 3}"
    taken = []
    for turn in range(1, 6):
      shown, seconds = client.say(f"i lost my job , says {name} .")
      taken.append(seconds)
      assert set(re.findall(r"name(?:(\w)\1\1)", shown)) == {name[4]}
      assert len(re.findall("empdg-said", shown)) == 2 * turn
    return taken

  talk(0, of="first")
  start = time.monotonic()
  with concurrent.futures.ThreadPoolExecutor(people) as pool:
    taken = [s for found in pool.map(talk, range(people)) for s in found]
  wall = time.monotonic() - start
  median = statistics.median(taken)
  print(
    f"\n{len(taken)} replies in {wall:.1f} s: median {median:.2f} s, "
    f"slowest {max(taken):.2f} s"
  )
  assert len(taken) == 50
  assert median < 1


def test_the_servers_rules(address: str) -> None:
  """Other names for this machine are refused; so are other hosts' scripts."""
  host = address.removeprefix("http://")
  for name, status in (("127.0.0.1", 200), ("evil.example", 400)):
    connection = http.client.HTTPConnection(host, timeout=20)
    connection.request("GET", "/", headers={"Host": name})
    with connection.getresponse() as response:
      assert response.status == status
      policy = response.getheader("content-security-policy") or ""
      assert "default-src 'self'" in policy
  # FastAPI's own documentation would load scripts from elsewhere.
  connection = http.client.HTTPConnection(host, timeout=20)
  connection.request("GET", "/docs")
  with connection.getresponse() as response:
    assert response.status == 404


def test_ctrl_c_and_an_open_host(
  runs: list[str], environment: dict[str, str]
) -> None:
  argv = ("--host=0.0.0.0", f"--workdir={runs[1]}")
  with serving(environment, *argv) as (process, address):
    assert process.stdout
    assert "Warning: --host=0.0.0.0 lets everyone" in process.stdout.readline()
    Client(address, "somebody").say("i lost my job .")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130
    assert "Traceback" not in process.stdout.read()
