"""Two processes that train and evaluate one run together, over loopback.

Tests that start them are marked `slow`; `make test-slow` runs those.
"""

import contextlib
import json
import os
import pathlib
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import fake_bucket
import numpy as np
import pytest
from etils import epath
from helpers import damage, wait_until, write_executable
from two_hosts import (
  ROOT,
  TINY,
  assert_equal_run,
  assert_same_run,
  finish,
  metrics_of,
  start,
  wait_for_step,
)

from empdg_jax import main
from empdg_jax.config import Config, InputError
from empdg_jax.data import sample_corpus
from empdg_jax.inference import predictions
from empdg_jax.parallel import hosts as hosts_lib
from empdg_jax.training import checkpoint
from empdg_jax.training.train_state import GENERATOR, TrainState


def refused(*argv: str, **started: Any) -> list[str]:
  """Starts a command that both hosts must refuse; returns their last lines."""
  lines = []
  for host in start(*argv, **started):
    _, errors = host.communicate(timeout=120)
    assert host.returncode == 2, errors
    assert "Traceback" not in errors
    lines.append(errors.strip().splitlines()[-1])
  return lines


def write_corpus(
  folder: pathlib.Path, old: bytes = b"", new: bytes = b""
) -> None:
  """Writes the embedded corpus to a folder, its first `old` made `new`."""
  (folder / "corpus").mkdir(parents=True)
  for name, text in sample_corpus.csv_files().items():
    path = folder / "corpus" / f"{name}.csv"
    path.write_bytes(text.replace(old, new, 1))


def with_corpus(argv: tuple[str, ...]) -> list[str]:
  """Returns a command that reads the corpus in its working folder."""
  kept = [a for a in argv if "data_dir" not in a and "source" not in a]
  return [
    *kept, "--config.data.source=corpus", "--config.data.data_dir=prepared",
  ]  # fmt: skip


@pytest.fixture(scope="module")
def train_argv(sample_config: Config) -> tuple[str, ...]:
  """`train` without its run folder; 20 steps or more of each kind."""
  return (
    "train", *TINY, f"--config.data.data_dir={sample_config.data.data_dir}",
  )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(
  train_argv: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> pathlib.Path:
  """The run of a single process, evaluated."""
  workdir = tmp_path_factory.mktemp("hosts") / "one"
  assert main.main([*train_argv, f"--workdir={workdir}"]) == 0
  assert main.main(["evaluate", f"--workdir={workdir}", "--samples=1"]) == 0
  return workdir


@pytest.fixture(scope="module")
def undisturbed_pair(
  train_argv: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> tuple[pathlib.Path, list[str]]:
  """The run of two hosts, and what each of them printed."""
  workdir = tmp_path_factory.mktemp("hosts") / "two"
  return workdir, finish(start(*train_argv, f"--workdir={workdir}"))


def assert_same_predictions(one: pathlib.Path, other: pathlib.Path) -> None:
  """Compares scores to 1e-5 and everything else exactly."""
  expected, found = (
    predictions.read_predictions(w / "eval" / "test" / "predictions.jsonl")
    for w in (one, other)
  )
  assert len(expected) == len(found)
  for ours, theirs in zip(expected, found, strict=True):
    assert theirs.pop("nll") == pytest.approx(ours.pop("nll"), rel=1e-5)
    assert theirs == ours
  ours, theirs = (
    json.loads((w / "eval" / "test" / "metrics.json").read_text())
    for w in (one, other)
  )
  assert ours.keys() == theirs.keys()
  for name, value in ours.items():
    is_float = isinstance(value, float)
    assert theirs[name] == (pytest.approx(value, 1e-5) if is_float else value)


@pytest.mark.slow
def test_eight_devices_give_the_same_run(
  train_argv: tuple[str, ...],
  undisturbed: pathlib.Path,
  tmp_path: pathlib.Path,
) -> None:
  """Each phase's 20 steps, then every prediction and metric."""
  workdir = tmp_path / "eight"
  flags = "--xla_force_host_platform_device_count=8"
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
  for argv in (train_argv, ("evaluate", "--samples=1")):
    subprocess.run(
      [sys.executable, "-m", "empdg_jax.main", *argv, f"--workdir={workdir}"],
      check=True,
      capture_output=True,
      env=environment,
    )
  assert_same_run(undisturbed, workdir)
  assert_same_predictions(undisturbed, workdir)


@pytest.mark.slow
def test_two_hosts_give_the_same_run(
  undisturbed: pathlib.Path, undisturbed_pair: tuple[pathlib.Path, list[str]]
) -> None:
  """Each phase's 20 steps, then every prediction."""
  workdir, (said, little) = undisturbed_pair
  assert "valid perplexity" in said
  last = f"Next: empdg evaluate --workdir={workdir} --split=test\n"
  assert said.endswith(last)
  assert little == last  # Only the first host prints other lines.
  assert_same_run(undisturbed, workdir)
  said, nothing = finish(start("evaluate", f"--workdir={workdir}"))
  assert "Written to" in said
  assert nothing == ""
  assert_same_predictions(undisturbed, workdir)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_lost_host_ends_the_others(
  train_argv: tuple[str, ...],
  undisturbed_pair: tuple[pathlib.Path, list[str]],
  tmp_path: pathlib.Path,
  killed: int,
) -> None:
  argv = (*train_argv, f"--workdir={tmp_path / 'run'}")
  hosts = start(*argv)
  wait_for_step(tmp_path / "run", 25)
  hosts[killed].kill()
  lost = time.monotonic()
  _, errors = hosts[1 - killed].communicate(timeout=120)
  assert time.monotonic() - lost < 50  # Less than JAX's own timeout.
  assert hosts[1 - killed].returncode == 1, errors
  assert "another host is lost" in errors.strip().splitlines()[-1]
  hosts[killed].communicate()
  finish(start(*argv))
  assert_equal_run(undisturbed_pair[0], tmp_path / "run")


# Outside of any step, where nothing but JAX's abort ends a host.
_ABORTS = """
import os, sys, threading, time
from empdg_jax.parallel import hosts
port, process, ends = sys.argv[1:]
hosts.initialize(f"127.0.0.1:{port}", 2, int(process), heartbeat_seconds=5)
if process == "0":
  time.sleep(1)
  exec(ends)
time.sleep(60)
"""


@pytest.mark.parametrize(
  ("ends", "status"),
  [
    ("os._exit(9)", 9),
    # A crash of its own, which must not be taken for a lost host.
    ("os.abort()", -signal.SIGABRT),
    ("threading.Thread(target=os.abort).start()", -signal.SIGABRT),
  ],
)
def test_what_jax_aborts_ends_with_our_line(ends: str, status: int) -> None:
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  one, other = [
    subprocess.Popen(
      [sys.executable, "-c", _ABORTS, str(port), str(n), ends],
      stderr=subprocess.PIPE,
      text=True,
      env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    for n in range(2)
  ]
  began = time.monotonic()
  _, errors = other.communicate(timeout=100)
  assert time.monotonic() - began < 40  # Less than JAX's own timeout.
  assert other.returncode == 1, errors
  last = errors.strip().splitlines()[-1]
  assert last.startswith("empdg: another host is lost (see above); start all")
  _, errors = one.communicate(timeout=100)
  assert one.returncode == status, errors
  assert "another host is lost" not in errors


# Stands in for `empdg` below launch/train.sh.
_JOINS = """
import sys, time
from empdg_jax.parallel import hosts
if sys.argv[1] == "checkpoints":
  sys.exit(1)
flags = dict(argument[2:].split("=", 1) for argument in sys.argv[2:])
address, number = flags["coordinator_address"], int(flags["num_processes"])
print("joins", flush=True)
hosts.initialize(address, number, int(flags["process_id"]))
print("has joined", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("late", [True, False], ids=["late", "early"])
def test_id_1_is_taken(tmp_path: pathlib.Path, late: bool) -> None:
  """Two processes have it, when all hosts have met or still wait for one."""
  (tmp_path / "joins.py").write_text(_JOINS)
  command = shlex.join([sys.executable, str(tmp_path / "joins.py")])
  write_executable(tmp_path / "empdg", f'#!/bin/sh\nexec {command} "$@"\n')
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]

  def launch(process: int, name: str) -> subprocess.Popen[str]:
    log = tmp_path / name
    host = subprocess.Popen(
      [
        ROOT / "launch" / "train.sh",
        f"--coordinator_address=127.0.0.1:{port}",
        f"--num_processes={2 if late else 3}",
        f"--process_id={process}",
      ],
      stdout=log.open("w"),
      stderr=subprocess.STDOUT,
      text=True,
      start_new_session=True,
      env={
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "EMPDG": str(tmp_path / "empdg"),
      },
    )
    said = "has joined" if late and name == "one" else "joins"
    wait_until(lambda: said in log.read_text(), f"{name}: {said}", seconds=60)
    return host

  hosts = [launch(0, "zero"), launch(1, "one"), launch(1, "other")]
  try:
    assert hosts[1].wait(timeout=60) == 1
    if late:
      assert hosts[0].wait(timeout=60) == 1
  finally:
    for host in hosts:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(host.pid, signal.SIGKILL)
      host.wait()
  for name in ("zero", "one") if late else ("one",):
    last = (tmp_path / name).read_text().strip().splitlines()[-1]
    assert last.startswith("train.sh: id 1 is taken: "), last


def test_silence_after_which_a_host_is_lost(
  monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
  given = {}

  def initialize(*_: Any, **options: Any) -> None:
    given.update(options)
    raise InputError("enough")

  monkeypatch.setattr(hosts_lib, "initialize", initialize)
  argv = ["--config=quickstart", "--workdir=runs/none"]
  assert main.main(["train", *argv, "--config.train.heartbeat_seconds=7"]) == 2
  assert "enough" in capsys.readouterr().err
  assert given["heartbeat_seconds"] == 7


@pytest.mark.slow
@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_killed_hosts_start_again_at_once(
  train_argv: tuple[str, ...],
  undisturbed_pair: tuple[pathlib.Path, list[str]],
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
  place: str,
) -> None:
  """They resume, in a bucket once the lease is stale.

  The newest checkpoint on the disk is damaged: both take the one before it.
  """
  with fake_bucket.serve("pod") as server:
    for name, value in server.environment.items():
      monkeypatch.setenv(name, value)
    workdir: Any = tmp_path / "run"
    if place == "bucket":
      workdir = epath.Path("gs://pod/run")
    argv = (
      *train_argv,
      f"--workdir={workdir}",
      "--config.train.lease_seconds=12",
    )
    hosts = start(*argv)
    wait_for_step(workdir, 25)
    for host in hosts:
      host.kill()
      host.communicate()
    damaged = 0
    if place == "disk":
      latest = tmp_path / "run" / "checkpoints" / "latest"
      damaged = max(int(p.name) for p in latest.iterdir() if p.name.isdecimal())
      damage(latest / f"{damaged}/params")
    said, _ = finish(start(*argv))
    assert_equal_run(undisturbed_pair[0], workdir)
  assert "Next: empdg evaluate" in said
  assert "Resuming" in said
  assert ("waiting up to 12 s" in said) == (place == "bucket")
  if damaged:
    assert f"latest/{damaged}: damaged" in said
    assert (workdir / "checkpoints" / "damaged" / str(damaged)).is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("step", [23, 44])  # In phases 2 and 3.
def test_preempted_hosts_save_and_resume(
  train_argv: tuple[str, ...],
  undisturbed_pair: tuple[pathlib.Path, list[str]],
  tmp_path: pathlib.Path,
  step: int,
) -> None:
  argv = (*train_argv, f"--workdir={tmp_path / 'run'}")
  hosts = start(*argv)
  wait_for_step(tmp_path / "run", step)
  for host in hosts:
    host.send_signal(signal.SIGTERM)
  for said in finish(hosts):
    assert "Stopped and saved at step" in said.splitlines()[-1]
  assert max(step for step, _ in metrics_of(tmp_path / "run")) < 40 + 7 * 4
  finish(start(*argv))
  assert_equal_run(undisturbed_pair[0], tmp_path / "run")


@pytest.mark.slow
def test_a_host_that_cannot_begin_ends_both_soon(
  train_argv: tuple[str, ...], tmp_path: pathlib.Path
) -> None:
  """Only the first host writes, and cannot: both refuse."""
  (tmp_path / "file").write_text("")
  for line in refused(*train_argv, f"--workdir={tmp_path / 'file' / 'run'}"):
    assert "file/run: cannot write" in line


@pytest.mark.slow
def test_data_that_one_host_lacks(
  train_argv: tuple[str, ...], tmp_path: pathlib.Path
) -> None:
  folders = tmp_path / "first", tmp_path / "second"
  for folder in folders:
    folder.mkdir()
  write_corpus(folders[0])
  workdir = tmp_path / "run"
  argv = with_corpus(train_argv)
  first, second = refused(*argv, f"--workdir={workdir}", folders=folders)
  assert "corpus" in second
  assert first == second.replace("empdg: ", "empdg: process 1: ")
  assert not workdir.exists()


# Reads the newest whole checkpoint of a host's own copy of a folder.
READ = """
import sys
import jax
import numpy as np
from empdg_jax.config import InputError
from empdg_jax.training.checkpoint import Checkpoints
from empdg_jax.parallel import hosts
port, process, folder = sys.argv[1:]
hosts.initialize(f"127.0.0.1:{port}", 2, int(process))
checkpoints = Checkpoints(__import__("pathlib").Path(folder))
like = {"a": np.zeros(5000, np.float32)}
try:
  one, _ = checkpoints.first_whole(
    checkpoints.select("latest"),
    lambda one: checkpoints.restore_params(one.kind, like, one.step),
  )
  print("used", one.step)
except InputError as error:
  print("refused", error)
checkpoints.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("damaged", "says"), [([2], "used 1"), ([1, 2], "")])
def test_damage_that_one_host_sees(
  damaged: list[int], says: str, tmp_path: pathlib.Path
) -> None:
  state = TrainState(np.int32(1), {"a": np.arange(5000.0, dtype="f4")}, ())
  written = checkpoint.Checkpoints(tmp_path / "0", create=True, keep=2)
  for step in (1, 2):
    written.save("latest", step, {GENERATOR: state}, {"phase": "mle"})
  written.close()
  shutil.copytree(tmp_path / "0", tmp_path / "1")
  for step in damaged:
    folder = tmp_path / "1" / "checkpoints" / "latest" / str(step) / "params"
    for path in folder.rglob("*"):
      if path.is_file() and path.parent.name == "d":
        path.write_bytes(b"")
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  began = time.monotonic()
  hosts = [
    subprocess.Popen(
      [sys.executable, "-c", READ, str(port), str(n), tmp_path / str(n)],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    for n in range(2)
  ]
  first, second = (said.strip() for said in finish(hosts))
  assert time.monotonic() - began < 60
  if says:
    assert first == second == says
  else:
    assert second.startswith(f"refused {tmp_path}/1/checkpoints/latest/2: dam")
    assert first.startswith("refused process 1: ")


@pytest.mark.slow
def test_a_run_folder_that_hosts_do_not_share(
  train_argv: tuple[str, ...], tmp_path: pathlib.Path
) -> None:
  folders = tmp_path / "first", tmp_path / "second"
  for folder in folders:
    folder.mkdir()
  before = "from empdg_jax.parallel import hosts; hosts.SHARED_SECONDS = 1"
  argv = (*train_argv, "--workdir=run")
  for line in refused(*argv, folders=folders, before=before):
    assert "--workdir=run: the hosts do not share it: process 1" in line
  assert not list(tmp_path.rglob("*.*"))


_FULL_DISK = """
from empdg_jax.training import metric_writer
write = metric_writer.MetricWriter.write
def fail(self, step, *rest):
  if step == 7:
    raise OSError(28, "No space left on device")
  write(self, step, *rest)
metric_writer.MetricWriter.write = fail
"""


@pytest.mark.slow
@pytest.mark.parametrize(
  ("before", "number", "status", "says"),
  [
    (_FULL_DISK, None, 1, "No space left"),
    ("", signal.SIGINT, 130, "interrupted"),
  ],
  ids=["full disk", "Ctrl-C"],
)
def test_a_host_that_fails_ends_both_soon(
  train_argv: tuple[str, ...],
  undisturbed_pair: tuple[pathlib.Path, list[str]],
  tmp_path: pathlib.Path,
  before: str,
  number: signal.Signals | None,
  status: int,
  says: str,
) -> None:
  workdir = tmp_path / "run"
  argv = (*train_argv, f"--workdir={workdir}")
  hosts = start(*argv, before=before)
  wait_for_step(workdir, 6)
  if number is not None:
    hosts[0].send_signal(number)
  began = time.monotonic()
  said = [host.communicate(timeout=120)[1] for host in hosts]
  assert time.monotonic() - began < 120
  assert hosts[0].returncode == status, said[0]
  assert says in said[0].splitlines()[-1]
  assert hosts[1].returncode not in (0, None)
  finish(start(*argv))
  assert_equal_run(undisturbed_pair[0], workdir)


@pytest.mark.slow
def test_hosts_that_evaluate_end_at_sigterm(
  undisturbed: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  before = f"""
import pathlib, sys, time
from empdg_jax.inference import evaluate
def wait(*_):
  (pathlib.Path({str(tmp_path)!r}) / sys.argv[-1][-1]).touch()
  time.sleep(60)
evaluate.evaluate_split = wait
"""
  hosts = start("evaluate", f"--workdir={undisturbed}", before=before)
  deadline = time.monotonic() + 60
  while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
    time.sleep(0.05)
  for host in hosts:
    host.send_signal(signal.SIGTERM)
  for host in hosts:
    host.communicate(timeout=10)
    assert host.returncode == -signal.SIGTERM


@pytest.mark.slow
def test_hosts_must_agree(
  train_argv: tuple[str, ...], tmp_path: pathlib.Path
) -> None:
  """With another seed on the second host, both refuse and write nothing."""
  workdir = tmp_path / "run"
  argv = (*train_argv, f"--workdir={workdir}")
  for line in refused(*argv, second="--config.train.seed=1"):
    assert "the hosts have different configurations" in line
  assert not workdir.exists()


@pytest.mark.slow
def test_hosts_must_have_the_same_data(
  train_argv: tuple[str, ...], tmp_path: pathlib.Path
) -> None:
  """One word of one response differs between folders of the same name."""
  folders = tmp_path / "first", tmp_path / "second"
  write_corpus(folders[0])
  write_corpus(folders[1], b"that is", b"it is")
  workdir = tmp_path / "run"
  argv = with_corpus(train_argv)
  for line in refused(*argv, f"--workdir={workdir}", folders=folders):
    assert "the hosts have different data" in line
  assert not workdir.exists()


_IMPATIENT = """
import sys
from empdg_jax import main
from empdg_jax.parallel import hosts
hosts.INITIALIZATION_SECONDS = hosts._CONNECT_SECONDS = 1
sys.exit(main.main(sys.argv[1:]))
"""


def refused_process(*argv: str, **environment: str) -> str:
  """Runs a command that must be refused; returns its last line."""
  done = subprocess.run(
    [sys.executable, "-c", _IMPATIENT, *argv],
    capture_output=True,
    text=True,
    check=False,
    timeout=60,
    env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
  )
  assert done.returncode == 2, done.stderr
  assert "Traceback" not in done.stderr
  return done.stderr.strip().splitlines()[-1]


def refused_to_meet(address: str, process: int, folder: pathlib.Path) -> str:
  """Starts one of two hosts, which the other does not meet."""
  return refused_process(
    "train",
    f"--config={ROOT}/configs/quickstart.py",
    f"--workdir={folder / 'run'}",
    f"--coordinator_address={address}",
    "--num_processes=2",
    f"--process_id={process}",
  )


@pytest.mark.parametrize("process", [0, 1])
def test_a_coordinator_that_nobody_answers(
  process: int, tmp_path: pathlib.Path
) -> None:
  """The first host waits for the second, or the second for the first."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  said = refused_to_meet(address, process, tmp_path)
  assert f"{address}: the hosts have not met within 1 s" in said
  assert ("Connection refused" in said) == bool(process)


def test_a_closed_port(tmp_path: pathlib.Path) -> None:
  """Packets to it are lost, as beyond a firewall."""
  with contextlib.ExitStack() as stack:
    port = stack.enter_context(socket.socket())
    port.bind(("127.0.0.1", 0))
    port.listen(0)
    for _ in range(4):  # More than wait to be accepted.
      waiting = stack.enter_context(socket.socket())
      waiting.setblocking(False)
      waiting.connect_ex(port.getsockname())
    address = f"127.0.0.1:{port.getsockname()[1]}"
    said = refused_to_meet(address, 1, tmp_path)
  assert f"{address}: process 0 cannot be reached at {address}" in said


def test_a_name_that_is_not_known_yet() -> None:
  """As that of a pod whose image is still pulled."""
  why = hosts_lib._why_not_met("host.invalid:1")
  assert why.startswith("the hosts have not met within 120 s (at host.invalid:")


def test_no_device_of_the_platform(tmp_path: pathlib.Path) -> None:
  said = refused_process(
    "train",
    f"--config={ROOT}/configs/quickstart.py",
    f"--workdir={tmp_path / 'run'}",
    JAX_PLATFORMS="cuda",
  )
  assert "no device of cuda" in said
  assert not (tmp_path / "run").exists()


def test_bad_flags(
  capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
  def refused(*argv: str) -> str:
    config = f"--config={ROOT}/configs/quickstart.py"
    command = ["train", config, f"--workdir={tmp_path / 'run'}", *argv]
    assert main.main(command) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line

  assert "belong to a --coordinator_address" in refused("--num_processes=2")
  address = "--coordinator_address=127.0.0.1:1"
  assert "needs --num_processes and --process_id" in refused(address)
  said = refused(address, "--num_processes=2", "--process_id=2")
  assert "--process_id=2: expected 0 to 1" in said
