"""Two trainings in one run folder, on a disk and in a bucket."""

import errno
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import fake_bucket
import pytest
from etils import epath
from helpers import SMALL, wait_until

from empdg_jax import main
from empdg_jax.config import Config, InputError, SaveError
from empdg_jax.training import run_folder, run_lock
from empdg_jax.training.run_lock import RunLock

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Takes the lock of a folder and dies: the arguments are folder and seconds.
HOLDER = """
import os, signal, sys
from empdg_jax import storage
from empdg_jax.training.run_lock import RunLock
lock = RunLock(storage.run_path(sys.argv[1], "workdir"), int(sys.argv[2]))
lock.acquire(print)
print("taken", flush=True)
sys.stdin.readline()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(params=["disk", "bucket", "disk without locks"])
def workdir(
  request: pytest.FixtureRequest,
  storage: fake_bucket.FakeStorage,
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
) -> Any:
  """A run folder."""
  storage.objects.clear()
  if request.param == "bucket":
    return epath.Path("gs://pod/run")
  if request.param == "disk without locks":

    def flock(*args: object) -> None:
      raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "flock", flock)
  return tmp_path / "run"


def test_refuses_a_second_training(workdir: Any) -> None:
  first, second = RunLock(workdir, 2), RunLock(workdir, 2)
  said: list[str] = []
  first.acquire(said.append)
  assert not said
  with pytest.raises(InputError) as error:
    second.acquire(said.append)
  line = str(error.value)
  assert f"--workdir={workdir}: process {os.getpid()} on " in line
  assert " UTC, trains there" in line
  assert len(said) == 1
  assert "waiting up to 2 s" in said[0]
  second.close()
  first.check()
  first.close()
  second = RunLock(workdir, 2)
  second.acquire(said.append)
  second.close()
  assert len(said) == 1


def test_waits_for_one_that_ends(workdir: Any) -> None:
  first, second = RunLock(workdir, 20), RunLock(workdir, 20)
  first.acquire(print)
  said: list[str] = []
  threading.Timer(0.5, first.close).start()
  second.acquire(said.append)
  assert len(said) == 1
  second.close()


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_a_killed_training_leaves_the_folder_free(
  storage: fake_bucket.FakeStorage, tmp_path: pathlib.Path, place: str
) -> None:
  """At once on a disk; in a bucket, once its lease is stale."""
  folder = str(tmp_path / "run") if place == "disk" else "gs://pod/killed"
  seconds = 6
  holder = subprocess.Popen(
    [sys.executable, "-c", HOLDER, folder, str(seconds)],
    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
  )  # fmt: skip
  assert holder.stdout is not None
  assert holder.stdout.readline() == "taken\n"
  holder.communicate("die\n")
  assert holder.returncode == -signal.SIGKILL
  said: list[str] = []
  began = time.monotonic()
  workdir: Any = epath.Path(folder)
  lock = RunLock(workdir, 180)
  lock.acquire(said.append)
  waited = time.monotonic() - began
  lock.close()
  if place == "disk":
    assert not said
    assert waited < 1
  else:
    assert f"process {holder.pid} on" in said[0]
    assert 1.5 < waited < seconds


def test_a_training_that_lost_its_lease_saves_nothing(
  storage: fake_bucket.FakeStorage,
) -> None:
  workdir: Any = epath.Path("gs://pod/lost")
  first = RunLock(workdir, 2)
  first.acquire(print)
  other = {"host": "pod-7", "process": 1, "since": "now", "token": "other"}
  storage.put(f"lost/{run_lock.FILE}", json.dumps(other).encode())
  wait_until(lambda: first._lost, "the loss")
  with pytest.raises(SaveError, match="process 1 on pod-7, since now, has"):
    first.check()
  first.close()
  assert f"lost/{run_lock.FILE}" in storage.objects


@pytest.mark.parametrize(
  "content", [b"", b"[", b"[1]", b"\xff", b'{"host":{}}']
)
def test_a_damaged_lease_is_stale(
  storage: fake_bucket.FakeStorage, content: bytes
) -> None:
  storage.put(f"damaged/{run_lock.FILE}", content)
  workdir: Any = epath.Path("gs://pod/damaged")
  lock = RunLock(workdir, 2)
  lock.acquire(print)
  lock.close()


def argv_of(sample_config: Config, workdir: str) -> list[str]:
  return [
    f"--config={ROOT}/configs/transformer.py", *SMALL,
    f"--config.data.data_dir={sample_config.data.data_dir}",
    "--config.train.mle_steps=4", "--config.train.mle_eval_every=2",
    "--config.train.log_every=1", "--config.train.lease_seconds=1",
    f"--workdir={workdir}",
  ]  # fmt: skip


def test_only_training_is_refused(
  sample_config: Config,
  tmp_path: pathlib.Path,
  capsys: pytest.CaptureFixture[str],
) -> None:
  workdir = tmp_path / "run"
  argv = argv_of(sample_config, str(workdir))
  assert main.main(["train", *argv]) == 0
  lock = RunLock(workdir, 1)
  lock.acquire(print)
  before = (workdir / "metrics.jsonl").read_bytes()
  capsys.readouterr()
  assert main.main(["train", *argv]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith(f"empdg: --workdir={workdir}: process {os.getpid()}")
  folder = f"--workdir={workdir}"
  assert main.main(["checkpoints", folder]) == 0
  assert main.main(["export", folder, f"--out={tmp_path}/export"]) == 0
  evaluated = ["evaluate", folder, "--split=valid", "--samples=0"]
  assert main.main([*evaluated, "--config.eval.max_decode_steps=2"]) == 0
  lock.close()
  assert (workdir / "metrics.jsonl").read_bytes() == before
  # A resumed run may wait longer.
  argv = [*argv, "--config.train.lease_seconds=2"]
  assert main.main(["train", *argv]) == 0


def test_the_wait_is_not_of_the_run(
  config: Config, tmp_path: pathlib.Path
) -> None:
  from empdg_jax import config as config_lib

  values = json.loads(config_lib.to_json(config))
  del values["train"]["lease_seconds"]
  (tmp_path / "config.json").write_text(json.dumps(values))
  config.train.lease_seconds = 7
  run_folder.check_same_config(tmp_path, config)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_kill_and_start_again_at_once(
  storage: fake_bucket.FakeStorage,
  sample_config: Config,
  tmp_path: pathlib.Path,
  place: str,
) -> None:
  """The whole command: it resumes, after a wait in a bucket."""
  folder = str(tmp_path / "run") if place == "disk" else "gs://pod/again"
  argv = argv_of(sample_config, folder)
  argv += ["--config.train.mle_steps=100000", "--config.train.mle_patience=99"]
  argv += ["--config.train.lease_seconds=12"]
  command = [sys.executable, "-m", "empdg_jax.main", "train", *argv]

  def start() -> subprocess.Popen[str]:
    return subprocess.Popen(
      command, stdout=subprocess.PIPE, text=True, cwd=ROOT,
      env={**os.environ, "GLIBC_TUNABLES": ""},
    )  # fmt: skip

  def read_until(process: subprocess.Popen[str], text: str) -> list[str]:
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
      lines.append(line)
      if text in line:
        return lines
    raise AssertionError(lines)

  first = start()
  # By then, the first checkpoints have reached the disk.
  read_until(first, "step 20: valid")
  first.kill()
  first.communicate()
  again = start()
  said = read_until(again, "Resuming")
  again.kill()
  again.communicate()
  waited = [line for line in said if f"process {first.pid} on" in line]
  assert len(waited) == (place == "bucket"), said
