"""The scripts of `launch/`, against stand-ins for what they call."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Sequence

import pytest
import yaml

LAUNCH = pathlib.Path(__file__).resolve().parents[1] / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
COMMANDS = [path for path in SCRIPTS if path.name != "common.sh"]

# Stands in for gcloud, kubectl, git and others. It appends what it was called
# with, and takes its answers from files beside that, a line at a time.
STAND_IN = """#!{python} -IS
import json, os, pathlib, subprocess, sys
here = pathlib.Path({here!r})
name, argv = os.path.basename(sys.argv[0]), sys.argv[1:]
with open(here / "calls", "a") as calls:
  print(json.dumps([name, *argv]), file=calls)
def answer(file):
  first, *rest = (here / file).read_text().splitlines() or [""]
  (here / file).write_text("".join(line + "\\n" for line in rest))
  return first
# A line is a status and a part of the call that is to end with it.
status, _, part = (here / "failing").read_text().split("\\n")[0].partition(" ")
if part and part in " ".join(argv):
  answer("failing")
  if status != "0":
    print("no quota", file=sys.stderr)
    sys.exit(int(status))
command = argv[-1].removeprefix("--command=")
if "describe" in argv:
  state = answer("states")
  if not state:
    sys.exit("NOT_FOUND: no such queued resource")
  print(state)
elif "ssh" in argv and (here / "worker").exists():
  home = here / "worker"
  sys.exit(subprocess.call(["bash", "-c", command], cwd=home))
elif "ssh" in argv and "training=running" in command:
  for worker, line in enumerate(answer("training").split()):
    print(f"training={{line}} worker-{{worker}}")
elif name == "kubectl" and "apply" in argv:
  (here / "applied").write_text(sys.stdin.read())
elif name == "kubectl" and "pods" in argv:
  print((here / "pods").read_text(), end="")
elif name == "srun":
  (here / "environment").write_text(json.dumps(dict(os.environ)))
  sys.exit(int(os.environ["STATUS"]))
"""

# Stands in for `empdg`: writes what it was given to a file of its own, then
# does what its flag --play says.
EMPDG = """#!{python} -IS
import json, os, signal, sys, time
flags = dict(a[2:].split("=", 1) for a in sys.argv[1:] if a.startswith("--"))
process = flags.get("process_id", "0")
play = flags.get("play" + process, flags["play"])
def stop(*_):
  print("Stopped and saved at step 7. The same", flush=True)
  sys.exit(0)
signal.signal(signal.SIGTERM, signal.SIG_IGN if play == "deaf" else stop)
environment = {{k: os.environ.get(k) for k in ("JAX_PLATFORMS", "XLA_FLAGS")}}
with open(f"{here}/empdg-{{process}}", "a") as file:
  print(json.dumps({{"argv": sys.argv[1:], **environment}}), file=file)
if play == "finish":
  print("Finished training\\nNext: empdg evaluate --workdir=w --split=test")
elif play == "stop":
  stop()
elif play == "strangers":
  print("empdg: the hosts have not met within 120 s", file=sys.stderr)
  sys.exit(2)
elif play in ("wait", "deaf"):
  time.sleep(60)
else:
  sys.exit(int(play))
"""


def write_script(path: pathlib.Path, text: str) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  here = path.parent.parent
  path.write_text(text.format(python=sys.executable, here=str(here)))
  path.chmod(0o755)


class Cloud:
  """A folder with stand-ins first on the PATH."""

  def __init__(self, folder: pathlib.Path) -> None:
    self.folder = folder
    for name in ("gcloud", "kubectl", "git", "scontrol", "srun"):
      write_script(folder / "bin" / name, STAND_IN)
    write_script(folder / "bin" / "empdg", EMPDG)
    for file in ("states", "training", "failing", "pods"):
      self.tell(file)
    others = ("SLURM", "EMPDG", "XLA_FLAGS", "JAX_PLATFORMS")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(others)}
    self.env = {
      **kept,
      "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
      "EMPDG": str(folder / "bin" / "empdg"),
    }

  def tell(self, file: str, *lines: str) -> None:
    """Gives the stand-ins their answers."""
    (self.folder / file).write_text("".join(f"{line}\n" for line in lines))

  def start(
    self, script: str, *argv: str, process_group: int | None = None
  ) -> subprocess.Popen[str]:
    return subprocess.Popen(
      ["bash", str(LAUNCH / script), *argv],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env=self.env,
      cwd=self.folder,
      process_group=process_group,
    )

  def run(self, script: str, *argv: str) -> tuple[int, str, str]:
    """Returns the exit status and what was said."""
    process = self.start(script, *argv)
    said, errors = process.communicate(timeout=30)
    return process.returncode, said, errors

  def calls(self) -> list[list[str]]:
    path = self.folder / "calls"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]

  def verbs(self) -> list[str]:
    """What was asked of the cloud, a word each."""
    return [verb(call) for call in self.calls() if verb(call) != "git"]

  def empdg(self, process: int = 0) -> list[dict[str, str]]:
    """How the stand-in of `empdg` was started."""
    path = self.folder / f"empdg-{process}"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]

  def wait_for(self, *files: str) -> None:
    deadline = time.monotonic() + 20
    while not all((self.folder / file).exists() for file in files):
      assert time.monotonic() < deadline, f"no {files}"
      time.sleep(0.02)


def verb(call: Sequence[str]) -> str:
  if call[0] != "gcloud":
    return call[0]
  if call[4] != "ssh":
    return call[4]
  for name, mark in (("ssh", "command=true"), ("setup", "uv pip"),
                     ("train", "train.sh"), ("stop", "kill -TERM"),
                     ("logs", "tail")):  # fmt: skip
    if mark in call[-1]:
      return name
  return "probe"


@pytest.fixture
def cloud(tmp_path: pathlib.Path) -> Generator[Cloud]:
  # Where the tests run in the background, scripts would ignore Ctrl-C as well.
  handler = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield Cloud(tmp_path)
  signal.signal(signal.SIGINT, handler)


linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
PLACE = ("--name=pod", "--zone=us-west4-a")
SLICE = (*PLACE, "--type=v5litepod-16", "--workdir=gs://b/run", "--poll=0")


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.name)
def test_help(cloud: Cloud, path: pathlib.Path) -> None:
  assert os.access(path, os.X_OK)
  status, said, errors = cloud.run(path.name, "--help")
  assert (status, errors) == (0, "")
  for word in ("usage:", "flags:", "examples:", "--dry_run"):
    assert word in said
  assert "set -euo" not in said
  # Every flag that the script knows is explained.
  known = re.search(r"parse_flags '([^']*)' '?([\w ]*)", path.read_text())
  for flag in known[0].split()[1:] if known else []:
    assert f"--{flag.strip(chr(39))}" in said, flag
  assert cloud.calls() == []


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    ("tpu_pod.sh", "no command is given"),
    ("tpu_pod.sh fly --name=a --zone=b", "unknown command 'fly'"),
    ("tpu_pod.sh create --name=a --zone=b", "--type is missing"),
    ("tpu_pod.sh wait --zone=b", "--name is missing"),
    ("tpu_pod.sh wait --name=a --zone=b --sopt", "unknown flag --sopt"),
    ("tpu_pod.sh wait --name=a --zone", "--zone needs a value"),
    ("tpu_pod.sh wait --name=a --zone=b --poll=soon", "--poll=soon"),
    ("tpu_pod.sh create --name=a --zone=b --type=h100", "--type=h100"),
    ("tpu_pod.sh create --name=a --zone=b --type=v3-8", "--runtime is missing"),
    (
      "tpu_pod.sh train --name=a --zone=b --type=v4-16 --workdir=runs/pod",
      "--workdir=runs/pod",
    ),
    ("gke.sh", "no command is given"),
    ("gke.sh manifest --workdir=gs://b/run", "--image is missing"),
    ("gke.sh manifest --topology=4y4", "--topology=4y4"),
    ("gke.sh manifest --topology=1x2", "--chips_per_host=4"),
    ("gke.sh manifest --image=i --workdir=runs/pod", "--workdir=runs/pod"),
    ("gke.sh resume --workdir=gs://b/run", "--image is missing"),
    ("gke.sh submit --name=Empdg", "--name=Empdg"),
    ("slurm_gpu.sbatch --config=c", "--workdir is missing"),
    ("slurm_gpu.sbatch --config=c --workdir=w", "submit with sbatch"),
    ("local_pod.sh --processes=2", "no command is given"),
    ("local_pod.sh --processes=0 -- train", "--processes=0"),
    ("local_pod.sh train", "unexpected argument 'train'"),
  ],
)
def test_bad_flags(cloud: Cloud, argv: str, message: str) -> None:
  status, said, errors = cloud.run(*argv.split())
  assert (status, said) == (2, "")
  (line,) = errors.splitlines()
  assert message in line
  assert cloud.calls() == []


def test_dry_run_of_a_pod_calls_nothing(cloud: Cloud) -> None:
  argv = ("--dry-run", "--project=p", "--", "--config.train.seed=1")
  status, said, errors = cloud.run("tpu_pod.sh", "run", *SLICE, *argv)
  assert (status, errors, cloud.calls()) == (0, "", [])
  lines = said.splitlines()
  assert (
    "gcloud compute tpus queued-resources create pod --node-id=pod "
    "--zone=us-west4-a --project=p --accelerator-type=v5litepod-16 "
    "--runtime-version=v2-alpha-tpuv5-lite"
  ) in lines
  assert sum("--worker=all" in line for line in lines) == 6
  (train,) = (line for line in lines if "nohup" in line)
  # What is printed can be pasted: the same words come out of a shell.
  subprocess.run(["bash", "-c", train], env=cloud.env, check=True)
  (call,) = cloud.calls()
  assert call[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh"]
  for word in (
    "--config=configs/pod.py:16",
    "--workdir=gs://b/run",
    "--coordinator_address=auto",
    "--config.train.seed=1",
  ):
    assert word in call[-1]


@pytest.mark.parametrize(
  ("flags", "expected"),
  [
    ("--type=v5litepod-4", "v2-alpha-tpuv5-lite"),
    ("--type=v5p-32", "v2-alpha-tpuv5"),
    ("--type=v6e-8 --spot", "v2-alpha-tpuv6e --spot"),
    ("--type=v4-8", "tpu-ubuntu2204-base"),
    ("--type=v4-8 --runtime=mine", "mine"),
  ],
)
def test_create(cloud: Cloud, flags: str, expected: str) -> None:
  argv = ("create", *PLACE, *flags.split())
  said = cloud.run("tpu_pod.sh", *argv, "--dry_run")[1]
  assert said.strip().endswith(f"--runtime-version={expected}")
  assert cloud.run("tpu_pod.sh", *argv)[0] == 0
  (call,) = cloud.calls()
  assert said.split() == call


@pytest.mark.parametrize(
  ("slice_type", "chips", "several"),
  [("v5litepod-8", 8, False), ("v4-16", 8, True), ("v6e-32", 32, True)],
)
def test_what_a_slice_trains(
  cloud: Cloud, slice_type: str, chips: int, several: bool
) -> None:
  cloud.tell("training", "none")
  argv = ("train", *PLACE, f"--type={slice_type}", "--workdir=gs://b/run")
  assert cloud.run("tpu_pod.sh", *argv)[0] == 0
  assert cloud.verbs() == ["probe", "train"]
  command = cloud.calls()[-1][-1]
  assert re.search(rf"configs/pod\.py:{chips}\b", command)
  assert ("--coordinator_address=auto" in command) == several


def test_create_wait_setup_train(cloud: Cloud) -> None:
  cloud.tell("states", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
  cloud.tell("training", "none none")
  for command in ("create", "wait", "setup", "train"):
    status, said, errors = cloud.run("tpu_pod.sh", command, *SLICE)
    assert status == 0, errors
    if command == "wait":
      assert re.findall(r"pod: (\w+), \d+ s", said) == [
        "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE",
      ]  # fmt: skip
  assert cloud.verbs() == [
    "create", "describe", "describe", "describe", "ssh", "scp", "setup",
    "probe", "train",
  ]  # fmt: skip
  (archive,) = (c for c in cloud.calls() if c[0] == "git" and "archive" in c)
  (copy,) = (c for c in cloud.calls() if verb(c) == "scp")
  assert archive[-1] == "HEAD"
  assert f"--output={copy[5]}" in archive
  assert copy[6:] == ["pod:", "--zone=us-west4-a", "--worker=all"]


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_waiting_in_vain(cloud: Cloud, state: str) -> None:
  cloud.tell("states", "CREATING", state)
  status, _, errors = cloud.run("tpu_pod.sh", "wait", *SLICE)
  assert status == 1
  assert f"it is {state}" in errors


@pytest.mark.parametrize(
  ("command", "failing", "before"),
  [
    ("create", "queued-resources create", []),
    ("setup", "tpu-vm scp", ["ssh"]),
    ("status", "queued-resources describe", []),
    ("resume", "queued-resources delete", ["describe"]),
    (
      "resume",
      "uv pip",
      ["describe", "delete", "create", "describe", "ssh", "scp"],
    ),
  ],
)
def test_a_failing_call_is_the_last(
  cloud: Cloud, command: str, failing: str, before: list[str]
) -> None:
  cloud.tell("states", "SUSPENDED", "ACTIVE")
  cloud.tell("failing", f"2 {failing}")
  status, _, errors = cloud.run("tpu_pod.sh", command, *SLICE)
  assert status == 1  # 2 would say that training was given something wrong.
  assert "no quota" in errors
  assert re.search(rf"failed with status 2: gcloud.*{failing[-6:]}", errors)
  assert cloud.verbs()[:-1] == before
  assert failing in " ".join(cloud.calls()[-1])


RESUMED = ["describe", "ssh", "scp", "setup", "probe", "train"]


def test_run_goes_on_after_a_preemption(cloud: Cloud) -> None:
  cloud.tell(
    "states",
    "",  # There is none yet.
    "ACTIVE",
    "ACTIVE",
    "SUSPENDED",  # Seen while it polls,
    "SUSPENDED",  # and again before it is deleted.
    "ACTIVE",
    "ACTIVE",
    "ACTIVE",
  )
  cloud.tell(
    "training", "none none", "running running", "none none", "running running",
    "0 0",
  )  # fmt: skip
  status, said, errors = cloud.run("tpu_pod.sh", "run", "--spot", *SLICE)
  assert status == 0, errors
  assert cloud.verbs() == [
    "describe", "create", *RESUMED,
    "describe", "probe", "describe",
    "describe", "delete", "create", *RESUMED,
    "describe", "probe", "describe", "probe",
  ]  # fmt: skip
  assert "restart 1 of 20" in errors
  assert "tpu_pod.sh delete --name=pod" in said
  created = [call for call in cloud.calls() if verb(call) == "create"]
  assert all("--spot" in call for call in created)
  trained = [call for call in cloud.calls() if verb(call) == "train"]
  assert trained[0] == trained[1]  # The same command.


@pytest.mark.parametrize("ended", ["75 0", "1 134", "none 0"])
def test_run_starts_again_what_did_not_finish(cloud: Cloud, ended: str) -> None:
  """Saved after SIGTERM; after a lost host; on a host that was replaced."""
  cloud.tell("states", "", *["ACTIVE"] * 5)
  cloud.tell("training", "none none", ended, ended, "none none", "0 0")
  status, _, errors = cloud.run("tpu_pod.sh", "run", *SLICE)
  assert status == 0, errors
  assert cloud.verbs() == [
    "describe", "create", *RESUMED, "describe", "probe",
    "describe", "ssh", "probe", *RESUMED, "describe", "probe",
  ]  # fmt: skip


@pytest.mark.parametrize("failures", [2, 3])
def test_run_bears_failing_looks(cloud: Cloud, failures: int) -> None:
  """While it waits for the slice as well as during training."""
  cloud.tell("states", "", *["ACTIVE"] * 4)
  cloud.tell("training", "none none", *["running running"] * 2, "0 0")
  cloud.tell(
    "failing", "0 describe", "1 describe", "1 describe", "0 describe",
    "0 describe", *["2 describe"] * failures,
  )  # fmt: skip
  status, _, errors = cloud.run("tpu_pod.sh", "run", *SLICE)
  assert status == 0, errors
  restarts = failures == 3
  assert cloud.verbs() == [
    "describe", "create", *["describe"] * 2, *RESUMED, "describe", "probe",
    *["describe"] * failures, "describe", *["ssh"] * restarts, "probe",
    "describe", "probe",
  ]  # fmt: skip
  assert ("restart 1 of 20" in errors) == restarts


def test_run_waits_for_ssh(cloud: Cloud) -> None:
  cloud.tell("states", "", "ACTIVE", "ACTIVE")
  cloud.tell("training", "none none", "0 0")
  cloud.tell("failing", *["255 command=true"] * 9)
  status, said, errors = cloud.run("tpu_pod.sh", "run", *SLICE)
  assert status == 0, errors
  assert cloud.verbs() == [
    "describe", "create", "describe", *["ssh"] * 9, *RESUMED[1:],
    "describe", "probe",
  ]  # fmt: skip
  assert said.count("waiting until ssh answers on all workers") == 9
  assert "restart" not in errors


def test_ssh_never_answers(cloud: Cloud) -> None:
  cloud.tell("failing", *["255 command=true"] * 11)
  status, _, errors = cloud.run("tpu_pod.sh", "setup", *SLICE)
  assert status == 1
  assert "failed with status 255" in errors.splitlines()[-1]
  assert cloud.verbs() == ["ssh"] * 10


@pytest.mark.parametrize(
  ("failing", "looks"), [("tpu-vm scp", 3), ("uv pip", 3), ("nohup", 5)]
)
def test_run_tries_a_failed_start_again(
  cloud: Cloud, failing: str, looks: int
) -> None:
  """Twice in a row; what has trained in between starts the count anew."""
  cloud.tell("states", "", *["ACTIVE"] * 20)
  twice = [f"2 {failing}"] * 2
  cloud.tell("failing", *twice, f"0 {failing}", *twice)
  # One in every start on a slice that is ACTIVE, and one before training.
  cloud.tell(
    "training", *["none none"] * looks, "1 1",
    *["none none"] * (looks + 1), "0 0",
  )  # fmt: skip
  status, _, errors = cloud.run("tpu_pod.sh", "run", *SLICE)
  assert status == 0, errors
  assert errors.count("failed with status 2: ") == 4
  assert "restart 5 of 20" in errors


@pytest.mark.parametrize(
  ("failing", "count"), [("tpu-vm scp", 3), ("describe", 12)]
)
def test_run_ends_if_it_never_starts(
  cloud: Cloud, failing: str, count: int
) -> None:
  cloud.tell("states", *["ACTIVE"] * 20)
  cloud.tell("training", *["none none"] * 20)
  cloud.tell("failing", *[f"2 {failing}"] * 20)
  status, _, errors = cloud.run("tpu_pod.sh", "run", *SLICE)
  assert status == 1
  *_, command, last = errors.splitlines()
  assert "failed with status 2: gcloud" in command
  assert "three starts in a row failed" in last
  assert cloud.verbs().count(failing.split()[-1]) == count


def test_run_does_not_repeat_a_refused_request(cloud: Cloud) -> None:
  cloud.tell("failing", "2 queued-resources create")
  status, _, errors = cloud.run("tpu_pod.sh", "run", *SLICE)
  assert status == 1
  assert "no quota" in errors
  assert cloud.verbs() == ["describe", "create", "describe"]


def test_run_asks_again_for_what_it_had(cloud: Cloud) -> None:
  """A request that fails after a preemption: the slice is deleted already."""
  cloud.tell("states", "", "ACTIVE", "SUSPENDED", "SUSPENDED", "", "", "ACTIVE",
             "ACTIVE")  # fmt: skip
  cloud.tell("training", "none none", "none none", "0 0")
  cloud.tell("failing", "0 queued-resources create",
             "1 queued-resources create")  # fmt: skip
  status, _, errors = cloud.run("tpu_pod.sh", "run", *SLICE)
  assert status == 0, errors
  assert cloud.verbs() == [
    "describe", "create", *RESUMED, "describe",
    "describe", "delete", "create", "describe",
    "describe", "create", *RESUMED, "describe", "probe",
  ]  # fmt: skip


def test_resume_leaves_alone_what_may_run(cloud: Cloud) -> None:
  cloud.tell("states", "ACTIVE")
  cloud.tell("training", "running running")
  cloud.tell("failing", "255 training=running")
  status, _, errors = cloud.run("tpu_pod.sh", "resume", *SLICE)
  assert status == 1
  assert "workers of pod do not answer" in errors
  assert cloud.verbs() == ["describe", "ssh", "probe"]


def test_ctrl_c_ends_run(cloud: Cloud) -> None:
  """Whatever gcloud makes of it."""
  (cloud.folder / "bin" / "gcloud").write_text(
    '#!/bin/sh\ncase "$*" in *describe*) echo ACTIVE; exit;; esac\n'
    'trap "exit 1" INT\n: > called\nsleep 9 > /dev/null & wait\n'
  )
  process = cloud.start("tpu_pod.sh", "run", *SLICE, process_group=0)
  cloud.wait_for("called")
  send(process, signal.SIGINT)
  assert process.wait(timeout=5) == 130


def test_run_does_not_repeat_bad_input(cloud: Cloud) -> None:
  cloud.tell("states", "", "ACTIVE", "ACTIVE")
  cloud.tell("training", "none none", "2 2")
  status, _, errors = cloud.run("tpu_pod.sh", "run", *SLICE)
  assert status == 2
  assert "tpu_pod.sh logs" in errors
  assert cloud.verbs().count("train") == 1


def test_run_takes_up_what_runs(cloud: Cloud) -> None:
  cloud.tell("states", "ACTIVE", "ACTIVE", "ACTIVE")
  cloud.tell("training", "running running", "running running", "0 0")
  assert cloud.run("tpu_pod.sh", "run", *SLICE)[0] == 0
  assert cloud.verbs() == [
    "describe", "ssh", "probe", *["describe", "probe"] * 2,
  ]  # fmt: skip


@pytest.mark.parametrize("most", ["2", "08"])
def test_run_gives_up(cloud: Cloud, most: str) -> None:
  cloud.tell("states", *["ACTIVE"] * 40)
  cloud.tell("training", *["none none", "none none", "1 1"] * 10)
  argv = ("run", *SLICE, f"--max-restarts={most}")
  status, _, errors = cloud.run("tpu_pod.sh", *argv)
  assert status == 1
  assert f"--max_restarts={int(most)} is reached" in errors
  assert cloud.verbs().count("train") == int(most) + 1


def test_run_does_not_queue_again_without_quota(cloud: Cloud) -> None:
  cloud.tell("states", "", "FAILED", "FAILED", "ACTIVE")
  status, _, errors = cloud.run("tpu_pod.sh", "run", *SLICE)
  assert status == 1
  assert "it is FAILED" in errors
  assert cloud.verbs() == ["describe", "create", "describe", "describe"]


@pytest.mark.parametrize(
  ("state", "expected"),
  [
    ("SUSPENDED", ["delete", "create", *RESUMED]),
    ("FAILED", ["delete", "create", *RESUMED]),
    ("", ["create", *RESUMED]),
    ("CREATING", RESUMED),
    ("ACTIVE", ["ssh", "probe", *RESUMED]),
  ],
)
def test_resume(cloud: Cloud, state: str, expected: list[str]) -> None:
  cloud.tell("states", state, "ACTIVE")
  cloud.tell("training", *["none none"] * 2)
  status, _, errors = cloud.run("tpu_pod.sh", "resume", *SLICE)
  assert status == 0, errors
  assert cloud.verbs() == ["describe", *expected]


def test_a_second_training_is_refused(cloud: Cloud) -> None:
  cloud.tell("training", "none running")
  status, _, errors = cloud.run("tpu_pod.sh", "train", *SLICE)
  assert status == 1
  assert "training runs on pod already" in errors
  assert cloud.verbs() == ["probe"]


def test_status_logs_stop_delete(cloud: Cloud) -> None:
  cloud.tell("states", "ACTIVE")
  cloud.tell("training", "running running")
  said = cloud.run("tpu_pod.sh", "status", *PLACE)[1]
  assert said.splitlines() == [
    "pod: ACTIVE", "training=running worker-0", "training=running worker-1",
  ]  # fmt: skip
  assert (
    cloud.run("tpu_pod.sh", "logs", *PLACE, "--worker=3", "--follow")[0] == 0
  )
  assert "--worker=3" in cloud.calls()[-1]
  assert cloud.calls()[-1][-1] == "--command=tail -n 100 -F empdg/train.log"
  assert cloud.run("tpu_pod.sh", "stop", *PLACE)[0] == 0
  assert "--worker=all" in cloud.calls()[-1]
  assert cloud.run("tpu_pod.sh", "delete", *PLACE)[0] == 0
  assert cloud.calls()[-1][3:] == [
    "queued-resources", "delete", "pod", "--zone=us-west4-a", "--force",
    "--quiet",
  ]  # fmt: skip


@linux
def test_commands_on_a_worker(cloud: Cloud) -> None:
  """What is sent to the workers, run: start, refuse, stop, finish."""
  worker = cloud.folder / "worker" / "empdg"
  shutil.copytree(LAUNCH, worker / "launch")
  cloud.tell("states", *["ACTIVE"] * 9)

  def status() -> str:
    said = cloud.run("tpu_pod.sh", "status", *PLACE)[1]
    return said.split("training=")[1].split()[0]

  def wait_for_status(expected: str) -> None:
    deadline = time.monotonic() + 10
    while status() != expected:
      assert time.monotonic() < deadline, status()
      cloud.tell("states", *["ACTIVE"] * 9)

  assert status() == "none"
  train = ("train", *SLICE, "--")
  started = cloud.run("tpu_pod.sh", *train, "--play=wait")
  assert started[0] == 0, started
  assert status() == "running"
  cloud.wait_for("empdg-0")
  assert cloud.run("tpu_pod.sh", *train, "--play=wait")[0] == 1
  assert "asked to save" in cloud.run("tpu_pod.sh", "stop", *PLACE)[1]
  wait_for_status("75")
  assert "no training runs" in cloud.run("tpu_pod.sh", "stop", *PLACE)[1]
  assert cloud.run("tpu_pod.sh", *train, "--play=finish")[0] == 0
  wait_for_status("0")
  assert "Next: empdg" in cloud.run("tpu_pod.sh", "logs", *PLACE)[1]
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
  ended, said, _ = cloud.run("train.sh", f"--play={play}", "--workdir=a b")
  assert ended == status
  (started,) = cloud.empdg()
  assert started["argv"] == ["train", f"--play={play}", "--workdir=a b"]
  assert ("Next: empdg evaluate" in said) == (play == "finish")


@pytest.mark.parametrize("meetings", ["3", "08"])
def test_train_waits_for_other_hosts(cloud: Cloud, meetings: str) -> None:
  cloud.env["EMPDG_MEETINGS"] = meetings
  assert cloud.run("train.sh", "--play=strangers")[0] == 1  # Not bad input.
  assert len(cloud.empdg()) == int(meetings)


def test_train_hands_on_sigterm(cloud: Cloud) -> None:
  process = cloud.start("train.sh", "--play=wait")
  cloud.wait_for("empdg-0")
  process.send_signal(signal.SIGTERM)
  said, _ = process.communicate(timeout=10)
  assert "Stopped and saved at step 7" in said
  assert process.returncode == 75


def test_train_takes_the_path(cloud: Cloud) -> None:
  """Without EMPDG, and where there is no virtual environment."""
  shutil.copytree(LAUNCH, cloud.folder / "clone" / "launch")
  del cloud.env["EMPDG"]
  script = str(cloud.folder / "clone" / "launch" / "train.sh")
  assert cloud.run(script, "--play=stop")[0] == 75
  dry = cloud.run(script, "--dry-run", "--workdir=a b")[1]
  assert dry == "empdg train --workdir=a\\ b\n"


def test_local_pod(cloud: Cloud) -> None:
  argv = ("--processes=3", "--devices=2", "--logdir=logs", "--")
  status, said, errors = cloud.run(
    "local_pod.sh", *argv, "train", "--play=finish", "--workdir=a b"
  )
  assert (status, errors) == (0, "")
  assert said.count("Next: empdg evaluate") == 1  # The first host's.
  addresses = set()
  for process in range(3):
    (started,) = cloud.empdg(process)
    *before, address, number, this = started["argv"]
    assert before == ["train", "--play=finish", "--workdir=a b"]
    assert number == "--num_processes=3"
    assert this == f"--process_id={process}"
    assert started["JAX_PLATFORMS"] == "cpu"
    flag = "--xla_force_host_platform_device_count=2"
    assert started["XLA_FLAGS"] == flag
    addresses.add(address)
    log = (cloud.folder / "logs" / f"host-{process}.log").read_text()
    assert "Next: empdg evaluate" in log
  (address,) = addresses
  assert re.fullmatch(r"--coordinator_address=127\.0\.0\.1:\d+", address)


def test_local_pod_ends_with_a_failing_process(cloud: Cloud) -> None:
  argv = ("--processes=3", "--", "train", "--play=wait", "--play1=7")
  status, _, errors = cloud.run("local_pod.sh", *argv)
  assert status == 7
  assert "process 1 failed with status 7" in errors


def test_local_pod_ends_what_does_not_end(cloud: Cloud) -> None:
  text = '#!/bin/sh\ntrap "" TERM\ncase $* in *=1) exit 3;; esac\nsleep 20\n'
  (cloud.folder / "bin" / "empdg").write_text(text)
  argv = ("--processes=2", "--grace=0", "--", "train")
  began = time.monotonic()
  assert cloud.run("local_pod.sh", *argv)[0] == 3
  assert time.monotonic() - began < 10


def send(process: subprocess.Popen[str], number: signal.Signals) -> None:
  """To the whole group, as a terminal does for Ctrl-C, or the script alone."""
  (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_local_pod_hands_on_signals(
  cloud: Cloud, number: signal.Signals
) -> None:
  argv = ("--processes=2", "--logdir=logs", "--", "train", "--play=wait")
  process = cloud.start("local_pod.sh", *argv, process_group=0)
  cloud.wait_for("empdg-0", "empdg-1")
  send(process, number)
  said, errors = process.communicate(timeout=10)
  assert process.returncode == 0
  assert "asked to save and stop" in errors
  assert "Stopped and saved at step 7" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("grace", [0, 100])
def test_local_pod_kills_what_does_not_stop(
  cloud: Cloud, number: signal.Signals, grace: int
) -> None:
  """When its time is over, or at the second signal."""
  flags = ("--processes=2", f"--grace={grace}", "--", "train")
  plays = ("--play=wait", "--play1=deaf")
  process = cloud.start("local_pod.sh", *flags, *plays, process_group=0)
  cloud.wait_for("empdg-0", "empdg-1")
  send(process, number)
  assert process.stderr
  assert "asked to save and stop" in process.stderr.readline()
  if grace:
    send(process, number)
  assert process.wait(timeout=10) == 128 + signal.SIGKILL
  assert "killing what still runs" in process.stderr.read()


def test_local_pod_dry_run(cloud: Cloud) -> None:
  argv = ("--dry-run", "--", "train", "--workdir=a b")
  status, said, _ = cloud.run("local_pod.sh", *argv)
  assert status == 0
  first, second = said.splitlines()
  assert "JAX_PLATFORMS=cpu" in first
  assert "--xla_force_host_platform_device_count=4" in first
  assert "--workdir=a\\ b" in first
  assert first.replace("--process_id=0", "--process_id=1") == second
  assert cloud.empdg() == []
  argv = ("--processes=02", "--devices=08", "--grace=09", *argv)
  said = cloud.run("local_pod.sh", *argv)[1]
  assert said.count("--num_processes=2 ") == 2
  assert "--xla_force_host_platform_device_count=8 " in said


@pytest.mark.parametrize(
  ("topology", "per_host", "hosts"),
  [("4x4", 4, 4), ("2x4", 8, 1), ("2x2x4", 4, 4), ("16x16", 4, 64)],
)
def test_gke_manifest(
  cloud: Cloud, topology: str, per_host: int, hosts: int
) -> None:
  status, said, errors = cloud.run(
    "gke.sh", "manifest", "--name=pod", f"--topology={topology}",
    f"--chips_per_host=0{per_host}", "--image=image:1", "--workdir=gs://b/run",
    "--service-account=writer", "--max_restarts=5", "--", "--config.x=it's",
  )  # fmt: skip
  assert (status, errors) == (0, "")
  service, job = yaml.safe_load_all(said)
  assert service["kind"] == "Service"
  assert service["spec"]["clusterIP"] == "None"
  spec = job["spec"]
  template = spec["template"]
  pod = template["spec"]
  assert service["spec"]["selector"].items() <= (
    template["metadata"]["labels"].items()
  )
  assert pod["subdomain"] == service["metadata"]["name"]
  assert spec["completionMode"] == "Indexed"
  assert spec["completions"] == spec["parallelism"] == hosts
  assert spec["backoffLimit"] == 5 * hosts
  assert spec["successPolicy"] == {"rules": [{"succeededIndexes": "0"}]}
  assert pod["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
    "cloud.google.com/gke-tpu-topology": topology,
  }
  assert pod["terminationGracePeriodSeconds"] == 120
  assert pod["restartPolicy"] == "Never"
  assert pod["serviceAccountName"] == "writer"
  (container,) = pod["containers"]
  assert container["image"] == "image:1"
  assert container["resources"]["limits"] == {"google.com/tpu": per_host}
  chips = hosts * per_host
  several = ["--coordinator_address=auto"] if hosts > 1 else []
  assert container["args"] == [
    f"--config=configs/pod.py:{chips}", "--workdir=gs://b/run", *several,
    "--config.x=it's",
  ]  # fmt: skip
  rules = spec["podFailurePolicy"]["rules"]
  assert rules[0]["onPodConditions"] == [{"type": "DisruptionTarget"}]
  codes = {rule["action"]: rule["onExitCodes"]["values"] for rule in rules[1:]}
  assert codes == {"Ignore": [75], "FailJob": [2]}
  assert rules[1]["onExitCodes"]["containerName"] == container["name"]


def test_gke_commands(cloud: Cloud) -> None:
  new = ("--image=i", "--workdir=gs://b/run")
  dry = cloud.run("gke.sh", "submit", *new, "--dry_run")[1]
  assert cloud.calls() == []
  assert cloud.run("gke.sh", "submit", *new)[0] == 0
  command, manifest = dry.split("\n", 1)
  assert command.split() == cloud.calls()[-1]
  assert (cloud.folder / "applied").read_text() == manifest
  cloud.run("gke.sh", "status")
  assert "--selector=job-name=empdg" in cloud.calls()[-1]
  cloud.run("gke.sh", "delete", "--name=other")
  assert cloud.calls()[-1][1:4] == ["delete", "job,service", "other"]
  cloud.tell("failing", "2 delete")
  status, _, errors = cloud.run("gke.sh", "delete")
  assert status == 1
  assert "failed with status 2: kubectl delete" in errors


def test_gke_resume(cloud: Cloud) -> None:
  new = ("--image=i", "--workdir=gs://b/run", "--namespace=mine")
  dry = cloud.run("gke.sh", "resume", *new, "--dry_run")[1]
  assert cloud.calls() == []
  assert cloud.run("gke.sh", "resume", *new)[0] == 0
  delete, apply, manifest = dry.split("\n", 2)
  assert [delete.split(), apply.split()] == cloud.calls()
  assert cloud.calls()[0] == [
    "kubectl", "--namespace=mine", "delete", "job", "empdg",
    "--ignore-not-found", "--cascade=foreground", "--wait",
  ]  # fmt: skip
  assert manifest == (cloud.folder / "applied").read_text()
  assert manifest == cloud.run("gke.sh", "manifest", *new)[1]
  # Without the old one gone, nothing is applied.
  cloud.tell("failing", "1 delete")
  before = len(cloud.calls())
  assert cloud.run("gke.sh", "resume", *new)[0] == 1
  assert len(cloud.calls()) == before + 1


def test_gke_logs(cloud: Cloud) -> None:
  """Those of the newest pod, whether run or pasted."""
  cloud.tell("pods", "pod/empdg-2-old", "pod/empdg-2-new")
  argv = ("logs", "--worker=2", "--follow", "--namespace=mine")
  assert cloud.run("gke.sh", *argv)[0] == 0
  calls = cloud.calls()
  assert calls == [
    [
      "kubectl", "--namespace=mine", "get", "pods",
      "--selector=job-name=empdg,batch.kubernetes.io/job-completion-index=2",
      "--sort-by=.metadata.creationTimestamp", "--output=name",
    ],
    [
      "kubectl", "--namespace=mine", "logs", "--tail=100", "--follow",
      "pod/empdg-2-new",
    ],
  ]  # fmt: skip
  dry = cloud.run("gke.sh", *argv, "--dry_run")[1]
  assert len(dry.splitlines()) == 2
  assert cloud.calls() == calls
  subprocess.run(["bash", "-c", dry], env=cloud.env, check=True)
  assert cloud.calls() == calls * 2


def test_gke_logs_without_a_pod(cloud: Cloud) -> None:
  status, said, errors = cloud.run("gke.sh", "logs", "--worker=3")
  assert (status, said) == (1, "")
  (line,) = errors.splitlines()
  assert "worker 3 of empdg has no pod" in line
  assert len(cloud.calls()) == 1


@pytest.mark.parametrize(
  ("status", "requeued"), [(0, 0), (75, 1), (2, 0), (1, 1), (134, 1)]
)
def test_slurm(cloud: Cloud, status: int, requeued: int) -> None:
  cloud.env |= {
    "SLURM_JOB_ID": "12",
    "SLURM_SUBMIT_DIR": str(LAUNCH.parent),
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_GPUS_ON_NODE": "4",
    "STATUS": str(status),
  }
  argv = ("--config=configs/pod.py:8", "--workdir=w", "--", "--config.x=1")
  assert cloud.run("slurm_gpu.sbatch", *argv)[0] == status
  first, *others = cloud.calls()
  assert first[-5:] == [
    f"{LAUNCH}/train.sh", "--config=configs/pod.py:8", "--workdir=w",
    "--coordinator_address=auto", "--config.x=1",
  ]  # fmt: skip
  assert others == [["scontrol", "requeue", "12"]] * requeued


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
def test_what_a_slurm_step_gets(cloud: Cloud, platform: str) -> None:
  cloud.env |= {
    "SLURM_JOB_ID": "12",
    "SLURM_SUBMIT_DIR": str(LAUNCH.parent),
    "SLURM_GPUS_ON_NODE": "2",
    "SLURM_CPUS_PER_TASK": "8",
    "STATUS": "0",
  }
  if platform != "cuda":
    cloud.env["JAX_PLATFORMS"] = platform
  argv = ("--config=c", "--workdir=w")
  assert cloud.run("slurm_gpu.sbatch", *argv)[0] == 0
  (call,) = cloud.calls()
  assert "--cpus-per-task=8" in call[: call.index(f"{LAUNCH}/train.sh")]
  environment = json.loads((cloud.folder / "environment").read_text())
  assert environment["JAX_PLATFORMS"] == platform
  assert environment["JAX_LOCAL_DEVICE_IDS"] == "0,1"
  dry = cloud.run("slurm_gpu.sbatch", "--dry_run", *argv)[1]
  assert dry.startswith(f"env JAX_PLATFORMS={platform} JAX_LOCAL_DEVICE_IDS=")
  assert " --cpus-per-task=8 " in dry


def test_slurm_dry_run(cloud: Cloud) -> None:
  argv = ("--dry-run", "--config=c", "--workdir=w")
  cloud.env["SLURM_GPUS_ON_NODE"] = "4"
  said = cloud.run("slurm_gpu.sbatch", *argv)[1]
  assert said.startswith(
    "env JAX_PLATFORMS=cuda JAX_LOCAL_DEVICE_IDS=0\\,1\\,2\\,3 srun"
  )
  assert "--coordinator_address" not in said
  assert "--cpus-per-task" not in said
  cloud.env["SLURM_NTASKS_PER_NODE"] = "4"  # A process for every GPU.
  said = cloud.run("slurm_gpu.sbatch", *argv)[1]
  assert said.startswith("env JAX_PLATFORMS=cuda srun ")
  assert "--coordinator_address=auto" in said
  assert cloud.calls() == []


def test_slurm_directives() -> None:
  text = (LAUNCH / "slurm_gpu.sbatch").read_text()
  head = text.split("\n# ")[0].splitlines()
  directives = {line.split()[1] for line in head if "#SBATCH" in line}
  assert directives >= {
    "--requeue", "--signal=TERM@120", "--open-mode=append", "--nodes=1",
    "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=8",
  }  # fmt: skip


SKY = yaml.safe_load((LAUNCH / "sky.yaml").read_text())


def run_sky(cloud: Cloud, **envs: str) -> subprocess.CompletedProcess[str]:
  """Runs the task on the first of its nodes."""
  given = {name: value or "" for name, value in SKY["envs"].items()}
  return subprocess.run(
    ["bash", "-c", SKY["run"]],
    capture_output=True,
    check=False,
    text=True,
    cwd=LAUNCH.parent,
    env=cloud.env
    | given
    | {
      "WORKDIR": "gs://b/run",
      "FLAGS": "--play=finish --config.x=1",
      "SKYPILOT_NUM_NODES": "1",
      "SKYPILOT_NODE_RANK": "0",
      "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    }
    | envs,
  )


def test_sky_task() -> None:
  recovery = SKY["resources"]["job_recovery"]
  assert recovery["recover_on_exit_codes"] == [75]
  assert SKY["resources"]["use_spot"] is True
  assert SKY["envs"]["WORKDIR"] is None  # It must be given.
  devices = SKY["num_nodes"] * int(SKY["resources"]["accelerators"][-1])
  assert SKY["envs"]["CONFIG"] == f"configs/pod.py:{devices}"


@pytest.mark.parametrize("nodes", [1, 2])
def test_sky(cloud: Cloud, nodes: int) -> None:
  ran = run_sky(cloud, SKYPILOT_NUM_NODES=str(nodes))
  assert ran.returncode == 0, ran.stderr
  assert "Next: empdg evaluate" in ran.stdout
  hosts = ["--coordinator_address=10.0.0.1:8476", "--num_processes=2",
           "--process_id=0"]  # fmt: skip
  (started,) = cloud.empdg()
  assert started["argv"] == [
    "train", "--config=configs/pod.py:8", "--workdir=gs://b/run",
    *(hosts if nodes > 1 else []), "--play=finish", "--config.x=1",
  ]  # fmt: skip
  assert started["JAX_PLATFORMS"] == "cuda"


def test_sky_refuses_a_disk_of_the_machine(cloud: Cloud) -> None:
  ran = run_sky(cloud, WORKDIR="runs/pod")
  assert ran.returncode == 2
  (line,) = ran.stderr.splitlines()
  assert "WORKDIR=runs/pod is lost with the machine" in line
  assert cloud.empdg() == []
  assert run_sky(cloud, WORKDIR="/nfs/pod", SHARED_DISK="1").returncode == 0
  assert "--workdir=/nfs/pod" in cloud.empdg()[0]["argv"]


def test_image_holds_what_it_copies() -> None:
  """The ignore file lets in exactly what the Dockerfile copies."""
  lines = (LAUNCH / "Dockerfile").read_text().splitlines()
  copied = set()
  for line in lines:
    if line.startswith("COPY"):
      copied |= set(line.split()[2:-1])
  ignored = (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
  assert "*" in ignored
  assert {line[1:] for line in ignored if line.startswith("!")} == copied
  for name in copied:
    assert (LAUNCH.parent / name).exists()
  assert "ARG EXTRAS=tpu,gcs" in lines
  assert [line for line in lines if line.startswith("USER")] == ["USER empdg"]
