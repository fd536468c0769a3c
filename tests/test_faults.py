"""Faults of disks and of other hosts, in real processes; see `watchdog.py`."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from typing import Any

import pytest
from etils import epath
from helpers import refused, wait_until
from two_hosts import (
  ROOT,
  TINY,
  assert_equal_run,
  finish,
  start,
  wait_for_step,
)

from empdg_jax.config import Config, InputError
from empdg_jax.training import checkpoint, loop, watchdog

_HANGS = """
import pathlib, sys, time
from empdg_jax.training.watchdog import Watchdog
folder, seconds, before = sys.argv[1:]
watchdog = Watchdog(pathlib.Path(folder), float(seconds) / 60)
time.sleep(1)  # Not fed yet: nothing is expected.
exec(before)
for _ in range(10):
  watchdog.feed()
  time.sleep(0.1)
with watchdog.expecting("a checkpoint"):
  time.sleep(20)
"""


def hang(folder: pathlib.Path, seconds: float = 0.5, before: str = "") -> str:
  """Runs a process whose watchdog ends it; returns its one line."""
  done = subprocess.run(
    [sys.executable, "-c", _HANGS, folder, str(seconds), before],
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    check=False,
    timeout=60,
  )
  assert done.returncode == 1, done.stderr
  (line,) = done.stderr.strip().splitlines()
  assert line.startswith("empdg: gave up after 0.0")
  assert "minutes without a checkpoint: " in line
  return line


def test_a_hanging_process_is_ended(tmp_path: pathlib.Path) -> None:
  assert f"are in {tmp_path / 'stacks-0.txt'};" in hang(tmp_path)
  stacks = (tmp_path / "stacks-0.txt").read_text()
  assert 'File "<string>", line 12' in stacks
  assert stacks.count("most recent call first") >= 2


def test_stacks_of_a_folder_that_is_gone(tmp_path: pathlib.Path) -> None:
  line = hang(tmp_path / "missing")
  stacks = pathlib.Path(line.split("are in ")[1].split(";")[0])
  assert 'File "<string>", line 12' in stacks.read_text()


# Each takes twice as long as anything else may.
_COMPILES = {
  "traces": """
def slow(x):
  time.sleep(4)
  return x + 1
jax.jit(slow)(1.0)
""",
  "compiles": """
def wait(event, **_):
  if event == "/jax/compilation_cache/compile_requests_use_cache":
    time.sleep(4)
jax.monitoring.register_event_listener(wait)
jax.jit(lambda x: x + 1)(1.0)
""",
  "another host": "watchdog.feed(patient=True); time.sleep(4)\n",
}


@pytest.mark.parametrize("what", _COMPILES)
def test_a_process_may_compile_for_longer(
  tmp_path: pathlib.Path, what: str
) -> None:
  """And has its usual time after it."""
  before = "import jax; jax.jit(lambda x: x)(1.0); watchdog.feed()\n"
  hang(tmp_path, 2, before + _COMPILES[what] + "time.sleep(0.3)")


def test_a_start_that_hangs(
  config: Config, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  ended = []
  config.train.stall_minutes = 0.1 / 60

  def hang_once(*_: Any, **__: Any) -> None:
    wait_until(lambda: bool(ended), "the watchdog")
    raise InputError("enough")

  def end(_: Any, what: str, __: float) -> None:
    ended.append(what)

  monkeypatch.setattr(watchdog.Watchdog, "_end", end)
  monkeypatch.setattr(checkpoint, "Checkpoints", hang_once)
  with pytest.raises(InputError, match="enough"):
    loop.train(config, tmp_path / "run")
  assert set(ended) == {"the start"}


@pytest.fixture
def full_disk(tmp_path: pathlib.Path) -> Generator[pathlib.Path]:
  """A file system of 3 MiB."""
  folder = tmp_path / "disk"
  folder.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
  try:
    subprocess.run(mount, check=True, capture_output=True)
  except (OSError, subprocess.CalledProcessError):
    pytest.skip("needs the right to mount a file system")
  yield folder
  subprocess.run(["umount", "-l", str(folder)], check=True)


def argv_of(config: Config, workdir: pathlib.Path, *more: str) -> list[str]:
  return [
    "train", *TINY, f"--config.data.data_dir={config.data.data_dir}",
    f"--workdir={workdir}", *more,
  ]  # fmt: skip


# A size of which the disk holds one checkpoint, but not two.
LARGE = (
  "--config.model.name=transformer",
  "--config.model.emb_dim=64",
  "--config.train.stall_minutes=0.3",
)


def enlarge(disk: pathlib.Path) -> None:
  """Makes room on the full disk, as somebody would who deletes files there."""
  remount = ["mount", "-o", "remount,size=64m", str(disk)]
  subprocess.run(remount, check=True, capture_output=True)


def train(*argv: str) -> subprocess.CompletedProcess[str]:
  """Trains in one process."""
  return subprocess.run(
    [sys.executable, "-m", "empdg_jax.main", *argv],
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    check=False,
    timeout=120,
  )


@pytest.mark.slow
def test_a_full_disk(
  sample_config: Config, full_disk: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  argv = argv_of(sample_config, full_disk / "run", *LARGE)
  done = train(*argv)
  assert done.returncode == 1, done.stderr
  line = done.stderr.strip().splitlines()[-1]
  assert "No space left" in line or "without a checkpoint" in line
  assert "Traceback" not in done.stderr, done.stderr
  enlarge(full_disk)
  assert train(*argv).returncode == 0
  undisturbed = tmp_path / "undisturbed"
  assert train(*argv_of(sample_config, undisturbed, *LARGE)).returncode == 0
  assert_equal_run(undisturbed, full_disk / "run")


@pytest.mark.slow
def test_a_full_disk_of_two_hosts(
  sample_config: Config, full_disk: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  argv = argv_of(sample_config, full_disk / "run", *LARGE)
  hosts = start(*argv)
  said = [host.communicate(timeout=240)[1] for host in hosts]
  for host, errors in zip(hosts, said, strict=True):
    assert host.returncode == 1, errors
    assert errors.strip().splitlines()[-1].startswith("empdg: "), errors
    assert "Traceback" not in errors
  assert "No space left" in said[0] or "without a checkpoint" in said[0]
  enlarge(full_disk)
  finish(start(*argv))
  undisturbed = tmp_path / "undisturbed"
  finish(start(*argv_of(sample_config, undisturbed, *LARGE)))
  assert_equal_run(undisturbed, full_disk / "run")


@pytest.mark.slow
def test_a_stalled_host(sample_config: Config, tmp_path: pathlib.Path) -> None:
  """SIGSTOP: its connections stay open, and nothing comes over them."""
  short = ("--config.model.name=transformer", "--config.train.mle_steps=40")
  finish(start(*argv_of(sample_config, tmp_path / "undisturbed", *short)))
  workdir = tmp_path / "run"
  argv = argv_of(sample_config, workdir, *short)
  hosts = start(*argv, "--config.train.stall_minutes=0.3")
  wait_for_step(workdir, 12)
  hosts[1].send_signal(signal.SIGSTOP)
  began = time.monotonic()
  _, errors = hosts[0].communicate(timeout=120)
  assert time.monotonic() - began < 100
  assert hosts[0].returncode == 1, errors
  last = errors.strip().splitlines()[-1]
  assert "gave up after" in last or "another host is lost" in last
  if "gave up" in last:
    assert "most recent call first" in (workdir / "stacks-0.txt").read_text()
  hosts[1].kill()
  hosts[1].communicate()
  finish(start(*argv))
  assert_equal_run(tmp_path / "undisturbed", workdir)


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    ("--workdir=s3://bucket/run", "gs://BUCKET/FOLDER, or a folder on a disk"),
    ("--workdir=az://container/run", "writes checkpoints to no other storage"),
    ("--config=pod:0", "expected a number of devices, such as :8, not 0"),
    ("--config=pod:abc", "expected a number of devices, such as :8, not abc"),
  ],
)
def test_refusals(
  flag: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
  config = () if "config" in flag else ("--config=quickstart",)
  said = refused(capsys, "train", *config, flag)
  assert message in said
  assert "InputError" not in said


def test_a_bucket_without_its_package(
  monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
  def fail(_: object) -> bool:
    raise ImportError("install gcsfs")

  monkeypatch.setattr(type(epath.Path("gs://bucket")), "exists", fail)
  said = refused(capsys, "train", "--config=quickstart", "--workdir=gs://b/r")
  assert "pip install -e '.[gcs]' (install gcsfs)" in said


def test_id_0_is_taken(
  tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  with socket.socket(socket.AF_INET6) as taken:
    taken.bind(("", 0))
    taken.listen()
    port = taken.getsockname()[1]
    said = refused(
      capsys,
      "train",
      f"--config={ROOT}/configs/quickstart.py",
      f"--workdir={tmp_path / 'run'}",
      f"--coordinator_address=127.0.0.1:{port}",
      "--num_processes=2",
      "--process_id=0",
    )
  assert f"id 0 is taken: port {port} of this machine is in use" in said
