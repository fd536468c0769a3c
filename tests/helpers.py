"""Helpers shared by test modules: processes, refusals, runs, a browser."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import pytest

from empdg_jax import config as config_lib
from empdg_jax import main
from empdg_jax.config import Config


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


def damage(folder: pathlib.Path) -> None:
  """Flips a bit in the middle of the largest file of data in a folder."""
  files = [p for p in folder.rglob("*") if p.is_file() and p.suffix != ".txt"]
  path = max(files, key=lambda p: p.stat().st_size)
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def write_executable(path: pathlib.Path, text: str) -> None:
  """Writes a script and makes it executable."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  path.chmod(0o755)


# A small model on the embedded corpus, as flags.
SMALL = (
  "--config.data.source=sample",
  "--config.data.shapes=((48,24,24),)",
  "--config.data.feedback_length=12",
  "--config.model.emb_dim=16",
  "--config.model.key_value_depth=8",
  "--config.model.filter_size=12",
  "--config.model.kernel_widths=(1,2)",
  "--config.train.batch_size=8",
  # Named, so that the tests compute the same on every machine.
  "--config.train.compute_dtype=float32",
)


@contextlib.contextmanager
def chromium() -> Generator[Any]:
  """Yields a headless Chromium: the system's, or Playwright's own.

  Skips the test only where neither is installed: one that does not start is a
  failure.
  """
  from playwright import sync_api

  names = ("chromium", "chromium-browser", "google-chrome")
  with sync_api.sync_playwright() as playwright:
    path = next(filter(None, map(shutil.which, names)), None)
    own = pathlib.Path(playwright.chromium.executable_path)
    if not path and not own.exists():
      pytest.skip("needs Chromium: apt-get install chromium")
    # Containers, where root runs tests, have no sandbox to offer.
    browser = playwright.chromium.launch(
      executable_path=path, args=["--no-sandbox", "--lang=en"]
    )
    yield browser
    browser.close()


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
  """Runs a command that must be refused; returns its one line."""
  assert main.main(argv) == 2
  lines = capsys.readouterr().err.strip().splitlines()
  assert len(lines) == 1, lines
  return lines[0]


# What makes the package impossible to import.
ALONE = "import sys; sys.modules['empdg_jax'] = None\n"


def example_of(path: pathlib.Path) -> str:
  """Returns the example that reads `respond.jax`."""
  blocks = re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
  (example,) = (block for block in blocks if "deserialize" in block)
  return example


def run_example(example: str, folder: pathlib.Path, turns: list[str]) -> str:
  """Runs the example on other turns, without the package."""
  example = example.replace('"FOLDER"', repr(str(folder)))
  assert '["i lost my job today ."]' in example
  example = example.replace('["i lost my job today ."]', repr(turns))
  return subprocess.run(
    [sys.executable, "-c", ALONE + example],
    check=True,
    capture_output=True,
    text=True,
  ).stdout


# A stand-in for `empdg train` whose process the tests can kill.
TRAINING = """
import os, pathlib, signal, sys
from empdg_jax import config as config_lib
from empdg_jax.training import checkpoint, loop, train_log
config = config_lib.from_json(pathlib.Path(sys.argv[1]).read_text(), "config")
kill_at, number = int(sys.argv[3]), int(sys.argv[4])
write = train_log.MetricWriter.write

def write_and_die(self, step, phase, values):
  write(self, step, phase, values)
  if step == kill_at:
    checkpoint.Checkpoints.wait = signalled_again
    os.kill(os.getpid(), number)

wait = checkpoint.Checkpoints.wait

def signalled_again(self):
  if number == signal.SIGTERM:
    os.kill(os.getpid(), number)
  wait(self)

train_log.MetricWriter.write = write_and_die
try:
  loop.train(config, pathlib.Path(sys.argv[2]))
except KeyboardInterrupt:
  sys.exit(130)
"""


def run_training(
  config: Config, workdir: pathlib.Path, kill_at: int, number: int
) -> subprocess.CompletedProcess[str]:
  """Trains in a process that sends itself a signal at an update."""
  path = workdir.parent / "config-for-the-process.json"
  path.write_text(config_lib.to_json(config))
  return subprocess.run(
    [sys.executable, "-c", TRAINING, path, workdir, str(kill_at), str(number)],
    capture_output=True,
    text=True,
    check=False,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
  )
