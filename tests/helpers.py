"""Helpers shared by test modules: processes, and the files they leave."""

import json
import pathlib
import subprocess
import time
from collections.abc import Callable
from typing import Any, NamedTuple


class Ended(NamedTuple):
  """A process that has ended: its exit status, stdout and stderr."""

  status: int
  output: str
  errors: str


def start_bash(
  text: str, cwd: pathlib.Path, env: dict[str, str]
) -> subprocess.Popen[str]:
  """Starts bash on a text, in a process group of its own."""
  return subprocess.Popen(
    ["bash", "-c", text],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    cwd=cwd,
    env=env,
    process_group=0,
  )


def finish(process: subprocess.Popen[str], seconds: float = 30) -> Ended:
  """Waits for a process whose output is piped."""
  output, errors = process.communicate(timeout=seconds)
  return Ended(process.returncode, output, errors)


def wait_until(
  condition: Callable[[], bool], what: str, seconds: float = 20
) -> None:
  """Polls until `condition` holds; fails with `what` if it never does."""
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline, f"timed out waiting for {what}"
    time.sleep(0.02)


def wait_for_files(*paths: pathlib.Path) -> None:
  """Waits until all of these files exist."""
  wait_until(lambda: all(path.exists() for path in paths), f"{paths}")


def read_records(path: pathlib.Path) -> list[dict[str, Any]]:
  """Reads one JSON object a line; none if there is no file."""
  lines = path.read_text().splitlines() if path.exists() else []
  return [json.loads(line) for line in lines]


def write_executable(path: pathlib.Path, text: str) -> None:
  """Writes a script and makes it executable."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  path.chmod(0o755)
