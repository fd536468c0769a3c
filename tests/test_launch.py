"""Tests the scripts of `launch/`; see fake_cloud.py for the transcripts."""

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Generator

import fake_commands
import helpers
import kubernetes_validate
import pytest
import yaml
from fake_cloud import LAUNCH, Cloud
from helpers import Ended, finish, wait_for_files, wait_until

SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
COMMANDS = [path for path in SCRIPTS if path.name != "common.sh"]


@pytest.fixture
def cloud(tmp_path: pathlib.Path) -> Generator[Cloud]:
  # A shell that runs the tests in the background has them ignore SIGINT, which
  # the scripts would inherit.
  handler = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield Cloud(tmp_path)
  signal.signal(signal.SIGINT, handler)


PLACE = "--name=pod --zone=us-west4-a"
SLICE = f"{PLACE} --type=v5litepod-16 --workdir=gs://b/run --poll=0"
GKE = "--image=i --workdir=gs://b/run --namespace=mine"


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.name)
def test_help(cloud: Cloud, path: pathlib.Path) -> None:
  assert os.access(path, os.X_OK)
  status, output, errors = cloud.run(f"{path.name} --help")
  assert (status, errors) == (0, "")
  for word in ("usage:", "flags:", "examples:", "--dry_run"):
    assert word in output
  assert "set -euo" not in output
  # The help explains every flag of the script.
  known = re.search(r"parse_flags '([^']*)' '?([\w ]*)", path.read_text())
  for flag in known[0].split()[1:] if known else []:
    assert f"--{flag.strip(chr(39))}" in output, flag
  assert cloud.calls() == []


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("tpu_pod.sh", "no command given"),
    ("tpu_pod.sh fly --name=a --zone=b", "unknown command 'fly'"),
    ("tpu_pod.sh create --name=a --zone=b", "--type is missing"),
    ("tpu_pod.sh wait --zone=b", "--name is missing"),
    ("tpu_pod.sh wait --name=a --zone=b --sopt", "unknown flag --sopt"),
    ("tpu_pod.sh wait --name=a --zone", "--zone needs a value"),
    ("tpu_pod.sh wait --name=a --zone=b --poll=soon", "--poll=soon"),
    ("tpu_pod.sh create --name=a --zone=b --type=h100", "--type=h100"),
    ("tpu_pod.sh create --name=a --zone=b --type=v3-8", "--runtime is missing"),
    (f"tpu_pod.sh train {PLACE} --type=v4-16 --workdir=w/w", "--workdir=w/w"),
    ("tpu_pod.sh create --name=a --zone=b --type=tpu7x-8", "launch/gke.sh"),
    ("tpu_pod.sh wait --name=a --zone=b --valid_until=soon", "--valid_until"),
    ("tpu_pod.sh wait --name=a --zone=b --labels=A", "--labels=A"),
    ("tpu_pod.sh wait --name=a --zone=b --slices=0", "--slices=0"),
    ("tpu_pod.sh wait --name=a --zone=b --spot --reserved", "exclude"),
    ("gke.sh manifest --cpu=many", "--cpu=many"),
    ("gke.sh manifest --memory=16", "--memory=16"),
    ("gke.sh", "no command given"),
    ("gke.sh manifest --workdir=gs://b/run", "--image is missing"),
    ("gke.sh manifest --topology=4y4", "--topology=4y4"),
    ("gke.sh manifest --topology=1x2", "--chips_per_host=4"),
    ("gke.sh manifest --image=i --workdir=runs/pod", "--workdir=runs/pod"),
    ("gke.sh resume --workdir=gs://b/run", "--image is missing"),
    ("gke.sh submit --name=Empdg", "--name=Empdg"),
    ("slurm_gpu.sbatch --config=c", "--workdir is missing"),
    ("slurm_gpu.sbatch --config=c --workdir=w", "submit with sbatch"),
    ("local_pod.sh --processes=2", "no command given"),
    ("local_pod.sh --processes=0 -- train", "--processes=0"),
    ("local_pod.sh train", "unexpected argument 'train'"),
  ],
)
def test_bad_flags(cloud: Cloud, line: str, message: str) -> None:
  status, output, errors = cloud.run(line)
  assert (status, output) == (2, "")
  (error,) = errors.splitlines()
  assert message in error
  assert cloud.calls() == []


@pytest.mark.parametrize(
  ("flags", "runtime", "chips", "several_hosts"),
  [
    ("--type=v5litepod-4", "v2-alpha-tpuv5-lite", 4, False),
    ("--type=v5litepod-8", "v2-alpha-tpuv5-lite", 8, False),
    ("--type=v5p-32", "v2-alpha-tpuv5", 16, True),
    ("--type=v6e-8 --spot", "v2-alpha-tpuv6e --spot", 8, False),
    ("--type=v6e-32", "v2-alpha-tpuv6e", 32, True),
    ("--type=v4-8", "tpu-ubuntu2204-base", 4, False),
    ("--type=v4-8 --runtime=mine", "mine", 4, False),
    ("--type=v4-16", "tpu-ubuntu2204-base", 8, True),
    # Two devices a chip, which the type counts.
    ("--type=tpu7x-16 --runtime=mine", "mine", 16, True),
  ],
)
def test_slice_types(
  cloud: Cloud, flags: str, runtime: str, chips: int, several_hosts: bool
) -> None:
  create = f"tpu_pod.sh create {PLACE} {flags}"
  dry = cloud.run(f"{create} --dry_run").output
  *checks, dry = dry.strip().splitlines()
  assert dry.endswith(f"--runtime-version={runtime}")
  assert ("ssh-add -l" in checks) == several_hosts
  assert cloud.run(create).status == 0
  assert cloud.calls("create") == [dry.split()]
  train = f"tpu_pod.sh train {PLACE} {flags} --workdir=gs://b/run"
  assert cloud.follow(train, "probe=none train").status == 0
  command = cloud.calls()[-1][-1]
  assert re.search(rf"configs/pod\.py:{chips}\b", command)
  assert ("--coordinator_address=auto" in command) == several_hosts


@pytest.mark.parametrize(
  ("line", "call"),
  [
    (f"tpu_pod.sh logs {PLACE} --worker=3 --follow",
     "gcloud compute tpus tpu-vm ssh pod --zone=us-west4-a --worker=3 "
     "'--command=tail -n 100 -F empdg/train.log'"),
    (f"tpu_pod.sh delete {PLACE}",
     "gcloud compute tpus queued-resources delete pod --zone=us-west4-a "
     "--force --quiet"),
    ("gke.sh status",
     "kubectl get job,pods --selector=job-name=empdg --output=wide"),
    ("gke.sh delete --name=other",
     "kubectl delete job,service other --ignore-not-found"),
  ],
  ids=["tpu logs", "tpu delete", "gke status", "gke delete"],
)  # fmt: skip
def test_single_call(cloud: Cloud, line: str, call: str) -> None:
  dry = cloud.run(f"{line} --dry_run").output
  assert cloud.calls() == []
  assert cloud.run(line).status == 0
  assert cloud.calls() == [shlex.split(dry)] == [shlex.split(call)]


def test_tpu_pod_dry_run(cloud: Cloud) -> None:
  flags = "--dry-run --project=p -- --config.train.seed=1"
  status, output, errors = cloud.run(f"tpu_pod.sh run {SLICE} {flags}")
  assert (status, errors, cloud.calls()) == (0, "", [])
  lines = output.splitlines()
  assert (
    "# Quota of tpu.googleapis.com in us-west4-a for 1 x v5litepod-16: "
    "TPUV5sLitepodPerProjectPerZoneForTPUAPI"
  ) in lines
  assert (
    "gcloud compute tpus queued-resources create pod --node-id=pod "
    "--zone=us-west4-a --project=p --accelerator-type=v5litepod-16 "
    "--runtime-version=v2-alpha-tpuv5-lite"
  ) in lines
  assert sum("--worker=all" in line for line in lines) == 6
  (train,) = (line for line in lines if "nohup" in line)
  # The line can be pasted: a shell undoes its quoting.
  assert finish(cloud.shell(train)).status == 0
  (call,) = cloud.calls()
  assert call[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh"]
  for word in (
    "--config=configs/pod.py:16", "--workdir=gs://b/run",
    "--coordinator_address=auto", "--config.train.seed=1",
  ):  # fmt: skip
    assert word in call[-1]


def test_setup_sends_head(cloud: Cloud) -> None:
  assert cloud.follow(f"tpu_pod.sh setup {SLICE}", "ssh scp setup").status == 0
  (archive,) = (call for call in cloud.calls("git") if "archive" in call)
  (copy,) = cloud.calls("scp")
  assert archive[-1] == "HEAD"
  assert f"--output={copy[5]}" in archive
  assert copy[6:] == ["pod:", "--zone=us-west4-a", "--worker=all"]


def with_python_that_refuses(cloud: Cloud) -> pathlib.Path:
  """Makes Python externally managed; returns the file of its calls."""
  said = cloud.folder / "python"
  helpers.write_executable(
    cloud.folder / "bin" / "python3",
    f'#!/bin/sh\necho "$*" >> {said}\n'
    'case "$*" in *break-system-packages*) ;;\n'
    "*--user*) echo externally-managed-environment >&2; exit 1;; esac\n",
  )
  return said


def test_setup_where_pip_refuses(cloud: Cloud) -> None:
  """An externally managed Python gets `uv` all the same."""
  worker = cloud.folder / "worker"
  worker.mkdir()
  with tarfile.open(worker / "empdg.tar.gz", "w:gz"):
    pass
  said = with_python_that_refuses(cloud)
  status, _, errors = cloud.run(f"tpu_pod.sh setup {SLICE}")
  assert (status, errors) == (0, "")
  first, second, *_, last = said.read_text().splitlines()
  assert first.endswith("pip install --quiet --user uv")
  assert second.endswith("--user --break-system-packages uv")
  assert "uv pip install" in last


RUNNING = "probe=running,running"
START = "ssh scp setup probe=none,none train"  # On an ACTIVE slice.
NEW = f"NONE create ACTIVE {START}"
AGAIN = "ACTIVE ssh probe=none,none ACTIVE"  # A look first: nothing runs there.
DONE = "ACTIVE probe=0,0"
FAILS = "-> 1 failed with status 2: gcloud"
GIVES_UP = rf"{FAILS}.*\n.*three starts in a row failed"
# A command of tpu_pod.sh and what happens: the transcript, and unless it ends
# with 0 the status and a pattern for the last lines of stderr.
CASES = {
  "create": "create",
  "setup": "ssh scp setup",
  "train": "probe=none,none train",
  "wait": "WAITING_FOR_RESOURCES PROVISIONING ACTIVE",
  "wait, failed": "CREATING FAILED -> 1 it is FAILED",
  "wait, suspended": "CREATING SUSPENDED -> 1 it is SUSPENDED",
  # Status 1 whatever the call's: 2 would mean bad input to training.
  "create, call fails": f"create!2 {FAILS}",
  "setup, no ssh": "ssh!255 " * 10 + "-> 1 failed with status 255",
  "setup, scp fails": f"ssh scp!2 {FAILS}",
  "status, call fails": f"describe!2 {FAILS}",
  "resume, delete fails": f"SUSPENDED delete!2 {FAILS}",
  "resume, setup fails": "SUSPENDED delete create ACTIVE ssh scp setup!2 "
  f"{FAILS}",
  # It leaves alone what may be training.
  "resume, probe fails": "ACTIVE ssh probe!255 "
  "-> 1 workers of pod do not respond",
  "resume, suspended": f"SUSPENDED delete create ACTIVE {START}",
  "resume, failed": f"FAILED delete create ACTIVE {START}",
  "resume, no slice": NEW,
  "resume, creating": f"CREATING ACTIVE {START}",
  "resume, active": f"{AGAIN} {START}",
  "train, already running": "probe=none,running "
  "-> 1 training is already running on pod",
  "run, already running": f"ACTIVE ssh {RUNNING} ACTIVE {RUNNING} {DONE}",
  "run, bad input": f"{NEW} ACTIVE probe=2,2 -> 2 tpu_pod.sh logs",
  "run --spot, preempted": f"{NEW} ACTIVE {RUNNING} SUSPENDED / "
  f"SUSPENDED delete create ACTIVE {START} ACTIVE {RUNNING} {DONE}",
  # Saved after SIGTERM; a host was lost; a host was replaced.
  **{
    f"run, ended {ended}": f"{NEW} ACTIVE probe={ended} / "
    f"ACTIVE ssh probe={ended} ACTIVE {START} {DONE}"
    for ended in ("75,0", "1,134", "none,0")
  },
  "run, create refused": f"NONE create!2 NONE {FAILS}",
  "run, no quota": "NONE create FAILED FAILED -> 1 it is FAILED",
  # It retries what was not refused before.
  "run, second create fails": f"{NEW} SUSPENDED / "
  f"SUSPENDED delete create!1 NONE / {NEW} {DONE}",
  "run, 2 describes fail": "NONE create describe!1 describe!1 ACTIVE "
  f"{START} ACTIVE {RUNNING} describe!2 describe!2 {DONE}",
  "run, 3 describes fail": "NONE create describe!1 describe!1 ACTIVE "
  f"{START} ACTIVE {RUNNING} describe!2 describe!2 describe!2 / "
  f"ACTIVE ssh {RUNNING} {DONE}",
  "run, late ssh": f"NONE create ACTIVE {'ssh!255 ' * 9} {START} {DONE}",
  # Two in a row; the count begins again once training has started.
  **{
    f"run, {start.split()[-1]} twice": f"NONE create ACTIVE {start} ACTIVE / "
    f"{AGAIN} {start} ACTIVE / {AGAIN} {START} ACTIVE probe=1,1 / "
    f"{AGAIN} {start} ACTIVE / {AGAIN} {start} ACTIVE / {AGAIN} {START} {DONE}"
    for start in (
      "ssh scp!2", "ssh scp setup!2", "ssh scp setup probe=none,none train!2"
    )
  },
  "run, scp fails": " / ".join([f"{AGAIN} ssh scp!2 ACTIVE"] * 3) + GIVES_UP,
  "run, describe fails": " / ".join(["describe!2 " * 4] * 3) + GIVES_UP,
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_tpu_pod(cloud: Cloud, case: str) -> None:
  command, _, _ = case.partition(",")
  transcript, _, end = CASES[case].partition("-> ")
  expected_status, _, message = end.partition(" ")
  ended = cloud.follow(f"tpu_pod.sh {command} {SLICE}", transcript)
  status, output, errors = ended
  assert status == int(expected_status or 0), errors
  assert re.search(rf"({message}).*\Z", errors.strip())
  # Every failed call is reported, except probes.
  failed = re.findall(r"\b(?!probe)(\w+)!(\d+)", transcript)
  assert errors.count("no quota") == len(failed)
  reports = re.findall(r"failed with status (\d+): (gcloud .*)", errors)
  for (verb, number), (reported, call) in zip(failed, reports, strict=True):
    assert reported == number
    assert fake_commands.SENT.get(verb, f" {verb} ") in call
  waits = min(transcript.count("ssh!"), 9)  # It tries ten times.
  assert output.count("waiting for ssh on all workers") == waits
  if command == "wait":
    states = re.findall(r"pod: (\w+), \d+ s", output)
    assert states == transcript.split()
  assert re.findall("restart.*", errors) == [
    f"restart {i + 1} of 20" for i in range(transcript.count("/"))
  ]
  finished = command.startswith("run") and status == 0
  assert ("Training has finished" in output) == finished
  if command.split()[0] in ("create", "resume", "run"):
    granted = "create refused" not in case
    assert ("tpu_pod.sh delete --name=pod" in output) == granted
  # A restart repeats the same commands.
  assert all(call == cloud.calls("train")[0] for call in cloud.calls("train"))
  for call in cloud.calls("create"):
    assert ("--spot" in call) == ("--spot" in command)


@pytest.mark.parametrize("most", ["2", "08"])
def test_run_gives_up(cloud: Cloud, most: str) -> None:
  attempt = f"{AGAIN} {START} ACTIVE probe=1,1 "
  line = f"tpu_pod.sh run {SLICE} --max-restarts={most}"
  status, _, errors = cloud.follow(line, attempt * (int(most) + 1))
  assert status == 1
  assert f"reached --max_restarts={int(most)}" in errors


def send(process: subprocess.Popen[str], number: signal.Signals) -> None:
  """Signals the group as Ctrl-C in a terminal does, or the script alone."""
  (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)


@pytest.mark.parametrize(
  ("number", "status"),
  [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
)
def test_a_signal_ends_run(
  cloud: Cloud, number: signal.Signals, status: int
) -> None:
  """Whatever status gcloud ends with; training goes on, and the slice too."""
  (cloud.folder / "bin" / "gcloud").write_text(
    '#!/bin/sh\ncase "$*" in *describe*) echo ACTIVE; exit;; '
    "*delete*) : > deleted; exit;; esac\n"
    'trap "exit 1" INT\n: > called\nsleep 6 > /dev/null & wait\n'
  )
  line = f"tpu_pod.sh run {SLICE} --delete_at_end --project=p"
  process = cloud.start(f"{line} --skip_checks")
  wait_for_files(cloud.folder / "called")
  send(process, number)
  assert process.wait(timeout=5) == status
  assert process.stdout
  (line,) = process.stdout.read().splitlines()
  assert line == (
    "Billed from its grant until it is deleted: 1 x v5litepod-16 as pod in "
    "us-west4-a: tpu_pod.sh delete --name=pod --zone=us-west4-a --project=p"
  )
  assert not (cloud.folder / "deleted").exists()


def test_status_and_stop(cloud: Cloud) -> None:
  ended = cloud.follow(f"tpu_pod.sh status {PLACE}", f"ACTIVE {RUNNING}")
  assert ended.output.splitlines() == [
    "pod: ACTIVE", "training=running worker-0", "training=running worker-1",
  ]  # fmt: skip
  assert cloud.follow(f"tpu_pod.sh stop {PLACE}", "stop").status == 0
  assert "--worker=all" in cloud.calls()[-1]


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_commands_on_worker(cloud: Cloud) -> None:
  """Runs what is sent to the workers: start, refuse, stop and finish."""
  worker = cloud.folder / "worker" / "empdg"
  shutil.copytree(LAUNCH, worker / "launch")

  def run(command: str, play: str = "") -> Ended:
    flags = f"{SLICE} -- --play={play}" if play else PLACE
    return cloud.run(f"tpu_pod.sh {command} {flags}")

  def training() -> str:
    return run("status").output.split("training=")[1].split()[0]

  assert training() == "none"
  started = run("train", "wait")
  assert started.status == 0, started
  assert training() == "running"
  wait_for_files(cloud.folder / "empdg-0")
  assert run("train", "wait").status == 1
  assert "asked to save" in run("stop").output
  wait_until(lambda: training() == "75", "training=75", seconds=10)
  assert "training is not running" in run("stop").output
  assert run("train", "finish").status == 0
  wait_until(lambda: training() == "0", "training=0", seconds=10)
  assert "Next: empdg" in run("logs").output
  first, second = cloud.empdg()
  assert first["argv"] == [
    "train", "--config=configs/pod.py:16", "--workdir=gs://b/run",
    "--coordinator_address=auto", "--play=wait",
  ]  # fmt: skip
  assert second["argv"][:-1] == first["argv"][:-1]


@pytest.mark.parametrize(
  ("play", "status"),
  [("finish", 0), ("stop", 75), ("2", 2), ("1", 1), ("134", 134), ("0", 75)],
)
def test_train(cloud: Cloud, play: str, status: int) -> None:
  ended = cloud.run(f"train.sh --play={play} '--workdir=a b'")
  assert ended.status == status
  (started,) = cloud.empdg()
  assert started["argv"] == ["train", f"--play={play}", "--workdir=a b"]
  assert ("Next: empdg evaluate" in ended.output) == (play == "finish")


@pytest.mark.parametrize("meetings", ["3", "08"])
def test_train_waits_for_other_hosts(cloud: Cloud, meetings: str) -> None:
  cloud.env["EMPDG_MEETINGS"] = meetings
  assert cloud.run("train.sh --play=alone").status == 1  # Not bad input.
  assert len(cloud.empdg()) == int(meetings)


def test_train_tells_of_a_closed_port(cloud: Cloud) -> None:
  """After two tries; another start cannot help."""
  ended = cloud.run("train.sh --play=unreachable")
  assert ended.status == 2
  assert len(cloud.empdg()) == 2
  assert "process 0 cannot be reached" in ended.output


@pytest.mark.parametrize(
  ("says", "told"),
  [
    ("UNAVAILABLE: tasks stopped sending heartbeats: task:3", "host 3 is lost"),
    ("1 unexpectedly tried to connect with a different incarnation.",
     "id 1 is taken: host 1 was restarted alone, or two processes have"),
    ("Failed to send RPC to coordination service", "host 0 is lost"),
    ("RegisterTask: Aborted connect attempt as there is a request from a newer "
     "incarnation.", "id 0 is taken: another process with it has joined"),
    ("Fatal", "this host failed, or another is lost"),
  ],
)  # fmt: skip
def test_train_tells_of_a_lost_host(cloud: Cloud, says: str, told: str) -> None:
  """The last line, below the stack of JAX's abort; with status 1."""
  line = f"train.sh --coordinator_address=auto --workdir=w '--play=says:{says}'"
  status, _, errors = cloud.run(line)
  assert status == 1
  last = errors.strip().splitlines()[-1]
  assert last.startswith(f"train.sh: {told}")
  assert "training resumes from step 40 as soon as all hosts" in last


def test_train_copies_its_log(cloud: Cloud) -> None:
  """Into the run folder, so that it outlives the slice, however it ends."""
  named = r"/train-%s-\d{8}T\d{6}Z\.log"
  line = "train.sh --workdir=gs://b/run --coordinator_address=auto"
  cloud.env["TPU_WORKER_ID"] = "3"
  for play, says in (("stop", "Stopped and saved"), ("says:Gone", "Gone")):
    ended = cloud.run(f"{line} --play={play}")
    (*_, call) = cloud.calls("storage")
    assert call[:4] == ["gcloud", "storage", "cp", "--quiet"]
    assert re.fullmatch("gs://b/run" + named % 3, call[-1])
    stored = (cloud.folder / "stored").read_text()
    assert says in stored
    assert "".join(ended.errors.splitlines()[-1:]) in stored
  calls = len(cloud.calls("storage"))
  cloud.env["EMPDG_LOG_COPY"] = "none"
  cloud.run(f"{line} --play=finish")
  assert len(cloud.calls("storage")) == calls
  del cloud.env["EMPDG_LOG_COPY"]
  (cloud.folder / "disk").mkdir()
  shared = line.replace("gs://b/run", "disk")
  cloud.run(f"{shared} --process_id=1 --play=finish")
  (log,) = (cloud.folder / "disk").iterdir()
  assert re.search(named % 1, str(log))
  assert "Next: empdg evaluate" in log.read_text()
  cloud.run("train.sh --workdir=disk --play=finish")  # Alone, on its own disk.
  assert len(list((cloud.folder / "disk").iterdir())) == 1


def test_a_log_that_cannot_be_copied(cloud: Cloud) -> None:
  (cloud.folder / "storage-fails").touch()
  status, _, errors = cloud.run("train.sh --workdir=gs://b/run --play=finish")
  assert status == 0
  start = "train.sh: cannot copy the log to gs://b/run/train-0-"
  assert errors.startswith(start)
  assert len(errors.splitlines()) == 1


def test_a_log_without_gcloud(cloud: Cloud) -> None:
  tools = cloud.folder / "tools"
  tools.mkdir()
  names = "basename bash date dirname env grep mkfifo mktemp rm sed tee timeout"
  for name in names.split():
    (tools / name).symlink_to(shutil.which(name) or "")
  cloud.env["PATH"] = str(tools)
  status, _, errors = cloud.run("train.sh --workdir=gs://b/run --play=finish")
  assert status == 0
  (line,) = errors.splitlines()
  assert line.startswith("train.sh: the output is not copied to gs://b/run/tra")
  assert line.endswith(": no gcloud here")


def test_a_log_is_copied_while_training_runs(cloud: Cloud) -> None:
  """A machine that is lost says nothing more."""
  cloud.env["EMPDG_LOG_COPY_SECONDS"] = "1"
  process = cloud.start("train.sh --workdir=gs://b/run --play=wait")
  wait_until(lambda: len(cloud.calls("storage")) >= 2, "two copies")
  send(process, signal.SIGTERM)
  assert finish(process, seconds=10).status == 75
  assert len({call[-1] for call in cloud.calls("storage")}) == 1
  assert "Stopped and saved" in (cloud.folder / "stored").read_text()


@pytest.mark.parametrize("seconds", ["1", "60"])
def test_copies_end_with_a_killed_script(cloud: Cloud, seconds: str) -> None:
  """They hold no lock, which would tell that training still runs."""
  cloud.env["EMPDG_LOG_COPY_SECONDS"] = seconds
  train = f"{LAUNCH}/train.sh --workdir=gs://b/run --play=wait"
  process = cloud.shell(f"exec 3> lock; flock 3; exec {train}")
  # For its line: the file is there a moment earlier.
  wait_until(lambda: bool(cloud.empdg()), "the training")
  (started,) = cloud.empdg()
  process.kill()  # `empdg` goes on, and holds the lock.
  process.wait()
  tries = "flock -n lock true"
  assert finish(cloud.shell(tries)).status == 1
  os.kill(started["pid"], signal.SIGTERM)
  wait_until(lambda: not finish(cloud.shell(tries)).status, "the lock", 5)
  copies = len(cloud.calls("storage"))
  time.sleep(2.5)
  assert len(cloud.calls("storage")) <= copies + 1


def test_train_runs_other_commands(cloud: Cloud) -> None:
  status, _, _ = cloud.run("train.sh evaluate --play=0 --workdir=w")
  assert status == 0  # Not 75: only training can be unfinished.
  (started,) = cloud.empdg()
  assert started["argv"] == ["evaluate", "--play=0", "--workdir=w"]


def test_train_forwards_sigterm(cloud: Cloud) -> None:
  process = cloud.start("train.sh --play=wait")
  wait_for_files(cloud.folder / "empdg-0")
  send(process, signal.SIGTERM)
  status, output, _ = finish(process, seconds=10)
  assert "Stopped and saved at step 7" in output
  assert status == 75


def test_train_finds_empdg_on_path(cloud: Cloud) -> None:
  """Without EMPDG and without a virtual environment."""
  script = cloud.folder / "clone" / "launch" / "train.sh"
  shutil.copytree(LAUNCH, script.parent)
  del cloud.env["EMPDG"]
  assert cloud.run(f"{script} --play=stop").status == 75
  dry = cloud.run(f"{script} --dry-run '--workdir=a b'").output
  assert dry == "empdg train --workdir=a\\ b\n"


def test_local_pod(cloud: Cloud) -> None:
  flags = "--processes=3 --devices=2 --logdir=logs"
  command = "train --play=finish '--workdir=a b'"
  status, output, errors = cloud.run(f"local_pod.sh {flags} -- {command}")
  assert (status, errors) == (0, "")
  assert output.count("Next: empdg evaluate") == 1  # The first host's.
  addresses = set()
  for process in range(3):
    (started,) = cloud.records(f"empdg-{process}")
    *before, address, number, this = started["argv"]
    assert before == shlex.split(command)
    assert number == "--num_processes=3"
    assert this == f"--process_id={process}"
    assert started["env"] == {
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    addresses.add(address)
    log = (cloud.folder / "logs" / f"host-{process}.log").read_text()
    assert "Next: empdg evaluate" in log
  (address,) = addresses
  assert re.fullmatch(r"--coordinator_address=127\.0\.0\.1:\d+", address)


def test_local_pod_ends_if_process_fails(cloud: Cloud) -> None:
  command = "train --play=wait --play1=7"
  status, _, errors = cloud.run(f"local_pod.sh --processes=3 -- {command}")
  assert status == 7
  assert "process 1 failed with status 7" in errors


def test_local_pod_kills_children(cloud: Cloud) -> None:
  """Those that ignore SIGTERM, once another process has failed."""
  text = '#!/bin/sh\ntrap "" TERM\ncase $* in *=1) exit 3;; esac\nsleep 20\n'
  (cloud.folder / "bin" / "empdg").write_text(text)
  began = time.monotonic()
  ended = cloud.run("local_pod.sh --processes=2 --grace=0 -- train")
  assert ended.status == 3
  assert time.monotonic() - began < 10


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
  ("flags", "signals", "status", "message"),
  [
    ("-- train --play=wait", 1, 0, "Stopped and saved at step 7"),
    ("--grace=0 -- train --play=wait --play1=hang", 1, 137, "killing the"),
    ("--grace=100 -- train --play=wait --play1=hang", 2, 137, "killing the"),
  ],
  ids=["saves", "grace is over", "second signal"],
)
def test_local_pod_signals(
  cloud: Cloud,
  number: signal.Signals,
  flags: str,
  signals: int,
  status: int,
  message: str,
) -> None:
  line = f"local_pod.sh --processes=2 --logdir=logs {flags}"
  process = cloud.start(line)
  wait_for_files(cloud.folder / "empdg-0", cloud.folder / "empdg-1")
  send(process, number)
  assert process.stdout
  assert process.stderr
  assert "asked to save and stop" in process.stderr.readline()
  if signals == 2:
    send(process, number)
  assert process.wait(timeout=10) == status
  assert message in (process.stderr if status else process.stdout).read()


def test_local_pod_dry_run(cloud: Cloud) -> None:
  command = "--dry-run -- train '--workdir=a b'"
  status, output, _ = cloud.run(f"local_pod.sh {command}")
  assert status == 0
  first, second = output.splitlines()
  assert "JAX_PLATFORMS=cpu" in first
  assert "--xla_force_host_platform_device_count=4" in first
  assert "--workdir=a\\ b" in first
  assert first.replace("--process_id=0", "--process_id=1") == second
  assert cloud.empdg() == []
  flags = "--processes=02 --devices=08 --grace=09"  # Not octal.
  output = cloud.run(f"local_pod.sh {flags} {command}").output
  assert output.count("--num_processes=2 ") == 2
  assert "--xla_force_host_platform_device_count=8 " in output


@pytest.mark.parametrize(
  ("topology", "per_host", "hosts", "accelerator"),
  [
    ("4x4", 4, 4, "tpu-v5-lite-podslice"),
    ("2x4", 8, 1, "tpu-v5-lite-podslice"),
    ("2x2x4", 4, 4, "tpu-v5p-slice"),
    ("16x16", 4, 64, "tpu-v6e-slice"),
    ("2x2x4", 4, 4, "tpu7x"),
  ],
)
def test_gke_manifest(
  cloud: Cloud, topology: str, per_host: int, hosts: int, accelerator: str
) -> None:
  status, output, errors = cloud.run(
    f"gke.sh manifest --name=pod --topology={topology} "
    f"--accelerator={accelerator} "
    f"--chips_per_host=0{per_host} --image=image:1 --workdir=gs://b/run "
    '--service-account=writer --max_restarts=5 -- "--config.x=it\'s"'
  )
  assert (status, errors) == (0, "")
  service, job = yaml.safe_load_all(output)
  spec = job["spec"]
  template = spec["template"]
  pod = template["spec"]
  (container,) = pod["containers"]
  assert service["kind"] == "Service"
  assert service["spec"]["clusterIP"] == "None"
  selector = service["spec"]["selector"]
  assert selector.items() <= template["metadata"]["labels"].items()
  assert pod["subdomain"] == service["metadata"]["name"]
  assert spec["completionMode"] == "Indexed"
  assert spec["completions"] == spec["parallelism"] == hosts
  assert spec["backoffLimit"] == 5 * hosts
  assert spec["successPolicy"] == {"rules": [{"succeededIndexes": "0"}]}
  assert pod["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": accelerator,
    "cloud.google.com/gke-tpu-topology": topology,
  }
  for document in (service, job):
    kubernetes_validate.validate(document, "1.36", strict=True)
  terms = pod["affinity"]
  affinity, anti = (
    terms[name]["requiredDuringSchedulingIgnoredDuringExecution"]
    for name in ("podAffinity", "podAntiAffinity")
  )
  # All pods in one pool, which no other Job of this program shares.
  own = {"matchLabels": {"empdg-slice": "pod"}}
  pool = "cloud.google.com/gke-nodepool"
  assert affinity == [{"topologyKey": pool, "labelSelector": own}]
  assert anti[0]["topologyKey"] == pool
  assert template["metadata"]["labels"]["empdg-slice"] == "pod"
  assert spec["ttlSecondsAfterFinished"] == 168 * 3600
  assert "activeDeadlineSeconds" not in spec
  assert container["resources"]["requests"]["memory"] == "16Gi"
  assert pod["terminationGracePeriodSeconds"] == 120
  assert pod["restartPolicy"] == "Never"
  assert pod["serviceAccountName"] == "writer"
  assert container["image"] == "image:1"
  assert container["resources"]["limits"] == {"google.com/tpu": per_host}
  several = ["--coordinator_address=auto"] if hosts > 1 else []
  # A chip of tpu7x is two devices to JAX.
  devices = hosts * per_host * (2 if accelerator == "tpu7x" else 1)
  assert container["args"] == [
    f"--config=configs/pod.py:{devices}", "--workdir=gs://b/run",
    *several, "--config.x=it's",
  ]  # fmt: skip
  rules = spec["podFailurePolicy"]["rules"]
  assert rules[0]["onPodConditions"] == [{"type": "DisruptionTarget"}]
  codes = {rule["action"]: rule["onExitCodes"]["values"] for rule in rules[1:]}
  assert codes == {"Ignore": [75], "FailJob": [2]}
  assert rules[1]["onExitCodes"]["containerName"] == container["name"]


def test_gke_options(cloud: Cloud) -> None:
  line = f"gke.sh manifest {GKE} --spot --queue=team --priority_class=low"
  output = cloud.run(f"{line} --max_hours=2 --cpu=4 --memory=8Gi").output
  _, job = yaml.safe_load_all(output)
  kubernetes_validate.validate(job, "1.36", strict=True)
  pod = job["spec"]["template"]["spec"]
  assert job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "team"}
  assert job["spec"]["activeDeadlineSeconds"] == 7200
  assert pod["priorityClassName"] == "low"
  assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
  assert pod["tolerations"][0]["key"] == "cloud.google.com/gke-spot"
  assert pod["terminationGracePeriodSeconds"] == 15
  requests = pod["containers"][0]["resources"]["requests"]
  assert (requests["cpu"], requests["memory"]) == ("4", "8Gi")
  output = cloud.run(f"{line} --grace=90").output
  assert "terminationGracePeriodSeconds: 90" in output


def test_strict_stand_ins(cloud: Cloud) -> None:
  """They refuse what the real commands refuse."""
  create = "gcloud compute tpus queued-resources create a --zone=us-west4-a"
  kind = "--accelerator-type=v5litepod-16 --runtime-version=r"
  for line, status in (
    (f"{create} {kind} --node-id=a --spot", 0),
    (f"{create} {kind} --node-id=a --sopt", 2),
    (f"{create} --runtime-version=r --node-id=a", 2),
    (f"{create} --accelerator-type=v4-8 --node-id=a", 2),
    (f"{create} {kind} --node-id=a".replace("--zone=us-west4-a", ""), 2),
    ("gcloud compute tpus queued-resources delete a --quiet", 2),
    ("gcloud compute tpus tpu-vm scp a b: --worker=all", 2),
    ("kubectl apply --wait", 2),
    (f"{create} {kind} --node-id=a --zone=west", 2),
    (f"{create} {kind} --node-id=a --node-count=2", 2),
    (f"{create} {kind} --node-count=1", 2),
    (f"{create} {kind} --node-id=a --max-run-duration=3h", 2),
    ("gcloud compute tpus tpu-vm ssh a --zone=us-west4-a --node=all", 2),
    ("kubectl delete job a --cascade=yes", 2),
    ("kubectl annotate job a", 2),
  ):
    assert finish(cloud.shell(line)).status == status, line


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    ("--service_account=a@b.c --network=n --subnetwork=s",
     "--service-account=a@b.c --network=n --subnetwork=s"),
    ("--internal_ips --reserved", "--internal-ips --reserved"),
    ("--labels=team=a,use=b", "--labels=team=a,use=b"),
    ("--valid_until=6h", "--valid-until-duration=6h"),
    ("--slices=2", "--node-count=2"),
  ],
)  # fmt: skip
def test_flags_of_create(cloud: Cloud, flags: str, words: str) -> None:
  assert cloud.run(f"tpu_pod.sh create {SLICE} {flags}").status == 0
  (call,) = cloud.calls("create")
  assert set(words.split()) <= set(call)


def test_several_slices(cloud: Cloud) -> None:
  line = f"tpu_pod.sh run {SLICE} --slices=2"
  assert cloud.follow(line, f"{NEW} {DONE}").status == 0
  for call in cloud.calls("ssh") + cloud.calls("scp") + cloud.calls("train"):
    assert call[3] == "queued-resources"
    assert "--node=all" in call
  assert "configs/pod.py:32" in cloud.calls("train")[0][-1]


@pytest.mark.parametrize("ended", ["0,0", "2,2"])
def test_deletes_at_the_end(cloud: Cloud, ended: str) -> None:
  line = f"tpu_pod.sh run {SLICE} --delete_at_end"
  play = f"{NEW} ACTIVE probe={ended} delete"
  status, output, _ = cloud.follow(line, play)
  assert status == int(ended[0])
  assert output.endswith("Deleted pod: nothing is billed any more\n")


@pytest.mark.parametrize(
  ("play", "said"),
  [
    (
      "NONE create WAITING_FOR_RESOURCES delete",
      "reached --max_hours=1 before pod was ACTIVE",
    ),
    (
      f"{NEW} stop!255 probe!255 stop {RUNNING} probe!255 probe=75,running "
      "probe=75,75 delete",
      "reached --max_hours=1; training saves and stops",
    ),
    (f"{NEW} stop {f'{RUNNING} ' * 60} delete", "training has not stopped"),
  ],
  ids=["in the queue", "saves", "does not stop"],
)
def test_the_hours_are_over(cloud: Cloud, play: str, said: str) -> None:
  """Those in the queue count; a slice is deleted when no worker trains."""
  cloud.env["SECONDS"] = "3600"  # Where bash begins to count.
  line = f"tpu_pod.sh run {SLICE} --delete_at_end --max_hours=1"
  status, output, errors = cloud.follow(line, play)
  assert status == 1
  assert said in errors
  assert output.endswith("Deleted pod: nothing is billed any more\n")


def test_a_slice_that_cannot_be_deleted(cloud: Cloud) -> None:
  line = f"tpu_pod.sh run {SLICE} --delete_at_end"
  status, output, errors = cloud.follow(line, f"{NEW} {DONE} delete!1")
  assert status == 0
  assert "failed with status 1: gcloud" in errors
  assert "Deleted pod" not in output
  assert output.splitlines()[-1].startswith("Billed from its grant until it")


def test_deletes_when_given_up(cloud: Cloud) -> None:
  line = f"tpu_pod.sh run {SLICE} --delete_at_end --max_restarts=0"
  play = f"{NEW} ACTIVE probe=1,1 delete"
  assert cloud.follow(line, play).status == 1


@pytest.mark.parametrize(
  ("fails", "message"),
  [
    ("ssh-add", "ssh-agent holds no key"),
    ("storage", "--workdir=gs://b/run: cannot write to the bucket"),
  ],
)
def test_checks_before_it_queues(
  cloud: Cloud, fails: str, message: str
) -> None:
  (cloud.folder / f"{fails}-fails").touch()
  for more in ("", " --detach"):
    status, output, errors = cloud.run(f"tpu_pod.sh run {SLICE}{more}")
    assert (status, output) == (2, "")
    assert message in errors
  assert cloud.calls("create") == []
  line = f"tpu_pod.sh create {SLICE} --skip_checks"
  assert cloud.run(line).status == 0


def test_detach(cloud: Cloud) -> None:
  """The loop goes on by itself; two lines start it on another machine."""
  cloud.expect(f"{NEW} {DONE}")
  status, output, _ = cloud.run(f"tpu_pod.sh run {SLICE} --detach")
  assert status == 0
  assert "nohup setsid launch/tpu_pod.sh run --name=pod" in output
  assert "--detach" not in output
  log = cloud.folder / "pod.log"
  wait_until(
    lambda: log.exists() and "has finished" in log.read_text(), "the run", 30
  )


def test_other_commands_on_the_slice(cloud: Cloud) -> None:
  line = f"tpu_pod.sh evaluate {SLICE} -- --split=test"
  assert cloud.follow(line, "probe=none train").status == 0
  command = cloud.calls("train")[0][-1].replace("\\", "")
  assert "launch/train.sh evaluate --workdir=gs://b/run" in command
  export = f"tpu_pod.sh export {SLICE} -- --out=gs://b/e"
  assert cloud.follow(export, "train").status == 0  # A call of train.sh.
  call = cloud.calls()[-1]
  assert "--worker=0" in call
  assert call[-1] == (
    "--command=cd empdg && JAX_PLATFORMS=cpu launch/train.sh export "
    "--workdir=gs://b/run --out=gs://b/e"
  )


def test_other_commands_on_several_slices(cloud: Cloud) -> None:
  """All hosts of all slices evaluate; one host exports."""
  slices = f"{SLICE} --slices=2"
  evaluate = f"tpu_pod.sh evaluate {slices}"
  assert cloud.follow(evaluate, "probe=none train").status == 0
  (call,) = cloud.calls("train")
  assert {"--node=all", "--worker=all"} <= set(call)
  assert "--coordinator_address=auto" in call[-1]
  export = f"tpu_pod.sh export {slices} -- --out=e"
  assert cloud.follow(export, "train").status == 0
  call = cloud.calls()[-1]
  assert {"--node=0", "--worker=0"} <= set(call)
  assert "--node=all" not in call


def test_internal_addresses(cloud: Cloud) -> None:
  line = f"tpu_pod.sh run {SLICE} --internal_ips"
  assert cloud.follow(line, f"{NEW} {DONE}").status == 0
  for verb in ("ssh", "scp", "setup", "train", "probe"):
    assert cloud.calls(verb)
    assert all("--internal-ip" in call for call in cloud.calls(verb))


@pytest.mark.parametrize(
  ("flags", "name"),
  [
    ("--type=v5litepod-16 --spot", "TPUV5sPreemptibleLitepodPerProject"),
    ("--type=v5litepod-8", "TPUV5sLitepodServingPerProject"),
    ("--type=v5p-32", "TPUV5PPerProject"),
    ("--type=v6e-8 --spot", "TPUV6EPreemptiblePerProject"),
    ("--type=v6e-8 --reserved", "that of v6e, reserved: https://cloud"),
    ("--type=v4-8", "that of v4, on-demand: https://cloud"),
  ],
)
def test_quota(cloud: Cloud, flags: str, name: str) -> None:
  output = cloud.run(f"tpu_pod.sh create {PLACE} {flags} --dry_run").output
  (said,) = (line for line in output.splitlines() if "# Quota" in line)
  assert f": {name}" in said


@pytest.mark.parametrize(
  ("command", "calls"),
  [
    ("submit", []),
    ("resume", ["kubectl --namespace=mine delete job empdg "
                "--ignore-not-found --cascade=foreground --wait"]),
  ],
  ids=["submit", "resume"],
)  # fmt: skip
def test_gke_applies_manifest(
  cloud: Cloud, command: str, calls: list[str]
) -> None:
  calls = [*calls, "kubectl apply -f -"]  # The manifest has the namespace.
  dry = cloud.run(f"gke.sh {command} {GKE} --dry_run").output
  assert cloud.calls() == []
  assert cloud.run(f"gke.sh {command} {GKE}").status == 0
  assert cloud.calls() == [call.split() for call in calls]
  applied = (cloud.folder / "applied").read_text()
  assert applied == cloud.run(f"gke.sh manifest {GKE}").output
  assert dry == "\n".join([*calls, applied])


@pytest.mark.parametrize(
  ("line", "transcript", "message"),
  [
    ("gke.sh delete", "delete!2", "failed with status 2: kubectl delete"),
    # It does not apply the new Job.
    (f"gke.sh resume {GKE}", "delete!2",
     "failed with status 2: kubectl --namespace=mine delete"),
    ("gke.sh logs --worker=3", "get", "worker 3 of empdg has no pod"),
  ],
  ids=["delete fails", "resume, delete fails", "logs, no pod"],
)  # fmt: skip
def test_gke_fails(
  cloud: Cloud, line: str, transcript: str, message: str
) -> None:
  status, output, errors = cloud.follow(line, transcript)
  assert (status, output) == (1, "")
  *others, last = errors.splitlines()
  assert others == ["no quota"] * transcript.count("!")
  assert message in last


def test_gke_logs(cloud: Cloud) -> None:
  """Of the newest pod, whether the script runs or its dry run is pasted."""
  line = "gke.sh logs --worker=2 --follow --namespace=mine"
  dry = cloud.run(f"{line} --dry_run").output
  assert len(dry.splitlines()) == 2
  assert cloud.calls() == []
  for text in (f"bash {LAUNCH}/{line}", dry):
    (cloud.folder / "calls").unlink(missing_ok=True)
    cloud.expect("get=pod/empdg-2-old,pod/empdg-2-new logs")
    assert finish(cloud.shell(text)).status == 0
    assert [" ".join(call) for call in cloud.calls()] == [
      "kubectl --namespace=mine get pods --selector=job-name=empdg,"
      "batch.kubernetes.io/job-completion-index=2 "
      "--sort-by=.metadata.creationTimestamp --output=name",
      "kubectl --namespace=mine logs --tail=100 --follow pod/empdg-2-new",
    ]


JOB = {"SLURM_JOB_ID": "12", "SLURM_SUBMIT_DIR": str(LAUNCH.parent)}
SLURM = "slurm_gpu.sbatch --config=c --workdir=w -- --config.x=1"


@pytest.mark.parametrize(
  ("status", "requeued"), [(0, 0), (75, 1), (2, 0), (1, 1), (134, 1)]
)
def test_slurm_requeues(cloud: Cloud, status: int, requeued: int) -> None:
  cloud.env |= JOB
  ended = cloud.follow(SLURM, f"srun!{status}" + " scontrol" * requeued)
  assert ended.status == status
  assert cloud.calls("scontrol") == [["scontrol", "requeue", "12"]] * requeued


@pytest.mark.parametrize(
  ("env", "platform", "ids", "cores", "hosts"),
  [
    ("GPUS_ON_NODE=4", "cuda", "0,1,2,3", "", ""),
    ("GPUS_ON_NODE=2 CPUS_PER_TASK=8", "cuda", "0,1", "--cpus-per-task=8", ""),
    ("GPUS_ON_NODE=2 CPUS_PER_TASK=8", "rocm", "0,1", "--cpus-per-task=8", ""),
    ("GPUS_ON_NODE=4 NTASKS_PER_NODE=1 JOB_NUM_NODES=2", "cuda", "0,1,2,3", "",
     "--coordinator_address=auto"),
    ("GPUS_ON_NODE=4 NTASKS_PER_NODE=4", "cuda", "", "",
     "--coordinator_address=auto"),
  ],
  ids=["1 node", "8 cores", "8 cores, rocm", "2 nodes", "process per GPU"],
)  # fmt: skip
def test_slurm_step(
  cloud: Cloud, env: str, platform: str, ids: str, cores: str, hosts: str
) -> None:
  cloud.env |= dict(f"SLURM_{pair}".split("=") for pair in env.split())
  if platform != "cuda":
    cloud.env["JAX_PLATFORMS"] = platform
  variables = {"JAX_PLATFORMS": platform}
  variables |= {"JAX_LOCAL_DEVICE_IDS": ids} if ids else {}
  expected = (
    f"srun --kill-on-bad-exit=0 {cores} {LAUNCH}/train.sh --config=c "
    f"--workdir=w {hosts} --config.x=1"
  ).split()
  for job in ({}, JOB):  # Outside of a job, and in one.
    cloud.env |= job
    dry = cloud.run(SLURM.replace("--", "--dry-run --", 1)).output
    assert shlex.split(dry.splitlines()[0]) == [
      "env", *(f"{name}={value}" for name, value in variables.items()),
      *expected,
    ]  # fmt: skip
  assert cloud.calls() == []
  assert cloud.run(SLURM).status == 0
  (call,) = cloud.records()
  assert (call["verb"], call["argv"]) == ("srun", expected)
  assert call["env"] == variables


def test_slurm_directives() -> None:
  text = (LAUNCH / "slurm_gpu.sbatch").read_text()
  head = text.split("\n# ")[0].splitlines()
  directives = {line.split()[1] for line in head if "#SBATCH" in line}
  assert directives >= {
    "--requeue", "--signal=TERM@120", "--open-mode=append", "--nodes=1",
    "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=8",
  }  # fmt: skip


SKY = yaml.safe_load((LAUNCH / "sky.yaml").read_text())


def run_sky(cloud: Cloud, **envs: str) -> Ended:
  """Runs the task on the first of its nodes."""
  cloud.env |= {name: value or "" for name, value in SKY["envs"].items()}
  cloud.env |= {
    "WORKDIR": "gs://b/run",
    "FLAGS": "--play=finish --config.x=1",
    "SKYPILOT_NUM_NODES": "1",
    "SKYPILOT_NODE_RANK": "0",
    "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    **envs,
  }
  return finish(cloud.shell(f"cd {LAUNCH.parent}\n{SKY['run']}"))


def test_sky_task() -> None:
  recovery = SKY["resources"]["job_recovery"]
  assert recovery["recover_on_exit_codes"] == [75]
  assert SKY["resources"]["use_spot"] is True
  assert SKY["envs"]["WORKDIR"] is None  # Required.
  devices = SKY["num_nodes"] * int(SKY["resources"]["accelerators"][-1])
  assert SKY["envs"]["CONFIG"] == f"configs/pod.py:{devices}"


def test_sky_setup_where_pip_refuses(cloud: Cloud) -> None:
  said = with_python_that_refuses(cloud)
  cloud.env["EXTRAS"] = "cuda,gcs"
  status, _, errors = finish(cloud.shell(SKY["setup"]))
  assert (status, errors) == (0, "")
  _, second, *_, last = said.read_text().splitlines()
  assert second.endswith("--user --break-system-packages uv")
  assert last.endswith("-e .[cuda,gcs]")


@pytest.mark.parametrize("nodes", [1, 2])
def test_sky(cloud: Cloud, nodes: int) -> None:
  status, output, errors = run_sky(cloud, SKYPILOT_NUM_NODES=str(nodes))
  assert status == 0, errors
  assert "Next: empdg evaluate" in output
  hosts = "--coordinator_address=10.0.0.1:8476 --num_processes=2 --process_id=0"
  (started,) = cloud.empdg()
  assert started["argv"] == [
    "train", "--config=configs/pod.py:8", "--workdir=gs://b/run",
    *(hosts.split() if nodes > 1 else []), "--play=finish", "--config.x=1",
  ]  # fmt: skip
  assert started["env"]["JAX_PLATFORMS"] == "cuda"


def test_sky_refuses_local_disk(cloud: Cloud) -> None:
  status, _, errors = run_sky(cloud, WORKDIR="runs/pod")
  assert status == 2
  (line,) = errors.splitlines()
  assert "WORKDIR=runs/pod is lost with the machine" in line
  assert cloud.empdg() == []
  assert run_sky(cloud, WORKDIR="/nfs/pod", SHARED_DISK="1").status == 0
  assert "--workdir=/nfs/pod" in cloud.empdg()[0]["argv"]


def test_dockerignore() -> None:
  """The ignore file lets in exactly what the Dockerfile copies."""
  lines = (LAUNCH / "Dockerfile").read_text().splitlines()
  copies = [line.split()[2:-1] for line in lines if line.startswith("COPY")]
  copied = {name for names in copies for name in names}
  ignored = (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
  assert "*" in ignored
  assert {line[1:] for line in ignored if line.startswith("!")} == copied
  for name in copied:
    assert (LAUNCH.parent / name).exists()
  # Builders without BuildKit read only the one in the root.
  assert (LAUNCH.parent / ".dockerignore").read_text().splitlines() == ignored
  assert "ARG EXTRAS=tpu,gcs" in lines
  assert [line for line in lines if line.startswith("USER")] == ["USER empdg"]
