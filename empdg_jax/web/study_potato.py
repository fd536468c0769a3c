"""The study as a project of Potato, a program of its own that serves it.

Potato (Pei et al., 2022; `potato-annotation`) is licensed under GPL-3.0: it is
run, never imported. Its folder of a part has the annotators' platform ids and
addresses; they stay there.
"""

import json
import os
import pathlib
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from empdg_jax import storage
from empdg_jax.config import InputError
from empdg_jax.web import study, study_pages
from empdg_jax.web.study import Study

_MAJOR = 2  # Of Potato, whose formats of projects and answers these are.
_INSTALL = "in a clone: pip install -e '.[study]'"
_KEYS = {"empathy": "12345", "relevance": "qwert", "fluency": "asdfg"}
URL_ARGUMENT = "PROLIFIC_PID"


class Answer(NamedTuple):
  """What a platform holds of one person's answer to one item.

  Attributes:
    person: The platform's id of the person.
    item: The item's id.
    answers: The chosen values by question; maybe not to all of them.
    seconds: The time since the person's previous answer, if known.
    where: The place, for messages.
  """

  person: str
  item: str
  answers: dict[str, Any]
  seconds: float | None
  where: str


def _schemes(part: str) -> list[dict[str, Any]]:
  """Returns the questions of a part in Potato's format."""
  required = {"required": True}
  if part == "pairwise":
    labels = [
      {"name": name, "displayed_label": shown, "key_value": key}
      for name, shown, key in zip(
        study.CHOICES, ("Left", "Right", "Tie"), "123", strict=True
      )
    ]
    asked = {"choice": (study_pages.question(part), labels)}
  else:
    asked = {
      name: (
        f"{name.title()}: {what}",
        [
          {
            "name": str(point),
            "displayed_label": study_pages.anchored(point),
            "key_value": key,
          }
          for point, key in zip(study.POINTS, _KEYS[name], strict=True)
        ],
      )
      for name, what in study.METRICS.items()
    }
  return [
    {
      "annotation_type": "radio",
      "name": name,
      "description": described,
      "labels": labels,
      "horizontal": True,
      "label_requirement": required,
    }
    for name, (described, labels) in asked.items()
  ]


def files(content: Study, part: str) -> dict[str, Any]:
  """Returns Potato's files of a part by name, as JSON, which is YAML too."""
  consent = {
    "annotation_type": "radio",
    "name": "consent",
    "description": study_pages.CONSENT,
    "labels": ["I agree"],
    "label_requirement": {"required": True},
  }
  instructions = {
    "annotation_type": "pure_display",
    "name": "instructions",
    "description": "How to answer",
    "labels": [study_pages.instructions(part)],
    "allow_html": True,
  }
  groups = [
    {"name": f"annotator-{number}", "max_annotators": 1, "instances": order}
    for number, order in enumerate(content.orders[part], start=1)
  ]
  config = {
    "annotation_task_name": "Replies in conversations",
    "task_dir": ".",
    "output_annotation_dir": "answers",
    "data_files": ["items.json"],
    "item_properties": {"id_key": "id", "text_key": "text"},
    "login": {"type": "url_direct", "url_argument": URL_ARGUMENT},
    "require_password": False,
    "persist_sessions": True,
    # Whoever comes next, invited here or sent by Prolific, gets the next order.
    "assignment_strategy": "batch",
    "batch_assignment": {"auto_assign_annotators": True, "groups": groups},
    "require_fully_annotated": True,
    "jumping_to_id_disabled": True,
    "interaction_tracking": {"enabled": False},
    "ui": {"theme": "light"},
    "annotation_instructions": study_pages.question(part),
    "phases": {
      "order": ["consent", "instructions", "annotation"],
      "consent": {"type": "consent", "file": "consent.json"},
      "instructions": {"type": "instructions", "file": "instructions.json"},
      "annotation": {"type": "annotation"},
    },
    "annotation_schemes": _schemes(part),
  }
  items = [
    {"id": name, "text": study_pages.item(shown)}
    for name, shown in content.items.items()
    if shown["part"] == part
  ]
  return {
    "config.yaml": config,
    "items.json": items,
    "consent.json": [consent],
    "instructions.json": [instructions],
    # Invitations for people who come from no platform.
    "links.json": [secrets.token_urlsafe(9).lstrip("-") for _ in groups],
  }


def program() -> str:
  """Returns Potato's program.

  Raises:
    InputError: It is not installed, or of another major version.
  """
  beside = pathlib.Path(sys.executable).with_name("potato")
  found = str(beside) if beside.exists() else shutil.which("potato")
  if not found:
    raise InputError(f"Potato is not installed; {_INSTALL}")
  # The interpreter of the program's own environment knows its version.
  with open(found, "rb") as file:
    line = file.readline(4096).decode("utf-8", "replace").strip()
  asked = (
    "import importlib.metadata as m; print(m.version('potato-annotation'))"
  )
  with storage.errors(f"{found}: not Potato; {_INSTALL}", InputError):
    version = subprocess.run(
      [line.removeprefix("#!").strip(), "-c", asked],
      check=True,
      capture_output=True,
      text=True,
    ).stdout.strip()
  if version.partition(".")[0] != str(_MAJOR):
    raise InputError(
      f"{found} is Potato {version}; studies need version {_MAJOR}; {_INSTALL}"
    )
  return found


def check_port(host: str, port: int) -> int:
  """Returns a port that a server can listen on, any free one for 0.

  Raises:
    InputError: It cannot.
  """
  with storage.errors(f"--port={port}: cannot listen on {host}", InputError):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as server:
      server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      server.bind((host, port))
      return server.getsockname()[1]


def _states(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
  """Returns Potato's states of a part's annotators by platform id.

  Raises:
    InputError: A file is damaged.
  """
  states = {}
  for path in sorted(folder.glob("answers/*/user_state.json")):
    with storage.errors(f"{path}: not Potato's answers", InputError):
      state = json.loads(storage.read_text(path))
      states[str(state["user_id"])] = state
      if not isinstance(state["instance_id_to_label_to_value"], dict):
        raise ValueError("answers are no object")
  return states


def _seconds(path: pathlib.Path) -> dict[str, float]:
  """Returns the time that each item took, by Potato's history of clicks.

  It is the time from the previous item's last click to this item's last.
  """
  import datetime

  last: dict[str, datetime.datetime] = {}
  if path.exists():
    for line in storage.read_text(path).splitlines():
      # A kill may have cut the last line.
      try:
        action = json.loads(line)
        when = datetime.datetime.fromisoformat(action["timestamp"])
        last[str(action["instance_id"])] = when
      except (ValueError, KeyError, TypeError):
        continue
  ordered = sorted(last.items(), key=lambda pair: pair[1])
  return {
    item: (when - ordered[index][1]).total_seconds()
    for index, (item, when) in enumerate(ordered[1:])
  }


def read_answers(folder: pathlib.Path) -> list[Answer]:
  """Reads the answers in Potato's folder of a part.

  Raises:
    InputError: A file is damaged.
  """
  found = []
  for person, state in _states(folder).items():
    path = folder / "answers" / person / "user_state.json"
    seconds = _seconds(path.with_name("annotation_history.jsonl"))
    with storage.errors(f"{path}: not Potato's answers", InputError):
      for item, chosen in state["instance_id_to_label_to_value"].items():
        where = f"{path}: {item}"
        answers: dict[str, Any] = {}
        for label, value in chosen:
          if label["schema"] in answers:
            raise InputError(f"{where}: two answers to {label['schema']!r}")
          answers[label["schema"]] = value
        found.append(Answer(person, item, answers, seconds.get(item), where))
  return found


def progress(folder: pathlib.Path) -> dict[str, int]:
  """Returns how many items each annotator of a part has answered."""
  return {
    person: sum(map(bool, state["instance_id_to_label_to_value"].values()))
    for person, state in _states(folder).items()
  }


def _environment(folder: pathlib.Path) -> Mapping[str, str]:
  """Returns Potato's environment, with the key that signs its cookies."""
  path = folder / "secret"
  if not path.exists():
    storage.write_text(path, secrets.token_hex(32))
    path.chmod(0o600)
  return {**os.environ, "POTATO_SECRET_KEY": storage.read_text(path)}


def _wait(process: subprocess.Popen[bytes], url: str, log: str) -> None:
  """Waits until Potato answers.

  Raises:
    InputError: It ended or did not start in a minute.
  """
  deadline = time.monotonic() + 60
  while time.monotonic() < deadline and process.poll() is None:
    try:
      # The address is our own server's.
      with urllib.request.urlopen(url, timeout=5):  # nosec B310
        return
    except OSError:
      time.sleep(0.2)
  raise InputError(f"Potato did not start; its log is {log}")


def serve(
  content: Study,
  folder: pathlib.Path,
  part: str,
  host: str,
  port: int,
  say: Callable[[str], None],
) -> None:
  """Serves a part of a study until Ctrl-C or SIGTERM.

  Args:
    content: The study.
    folder: Its folder.
    part: One of `study.PARTS`.
    host: The address to listen on.
    port: The port, 0 for any that is free.
    say: Prints a line.

  Raises:
    InputError: Potato is missing or cannot start.
  """
  potato = program()
  port = check_port(host, port)
  project = folder / part
  total = len(content.orders[part][0])
  done = progress(project)
  log = project / "potato.log"
  # Replaces an address that means all interfaces; binds none.
  shown = "127.0.0.1" if host == "0.0.0.0" else host  # nosec B104
  url = f"http://{f'[{shown}]' if ':' in shown else shown}:{port}/"
  with open(log, "ab") as output:
    process = subprocess.Popen(
      [potato, "start", "config.yaml", "-p", str(port), "--host", host],
      cwd=project,
      env=_environment(project),
      stdin=subprocess.DEVNULL,
      stdout=output,
      stderr=output,
    )
  previous = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
  try:
    _wait(process, url, str(log))
    links = json.loads(storage.read_text(project / "links.json"))
    for person in links:
      count = done.pop(person, 0)
      say(f"{url}?{URL_ARGUMENT}={person}  {count} of {total} answered")
    for number, count in enumerate(done.values(), start=1):
      say(f"from a platform, {number}: {count} of {total} answered")
    say("Ctrl-C stops the server; the same command goes on.")
    process.wait()
  except KeyboardInterrupt:
    say("Stopped.")
  finally:
    signal.signal(signal.SIGTERM, previous)
    process.terminate()
    try:
      process.wait(10)
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()
