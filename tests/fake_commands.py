"""Programs that stand in for `empdg`, gcloud and others in test_launch.py.

They import little, because the tests start them hundreds of times.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

# The commands that tpu_pod.sh sends to the workers: verb, and a part of each.
SENT = {
  "ssh": "command=true",
  "setup": "uv pip",
  "train": "train.sh",
  "stop": "kill -TERM",
  "logs": "tail",
  "probe": "training=running",
}


def verb_of(name: str, argv: list[str]) -> str:
  """Returns one word for a call, such as `create` or `probe`."""
  if name == "kubectl":
    return next(word for word in argv if not word.startswith("--"))
  if name != "gcloud":
    return name
  if argv[3] == "ssh":
    return next(verb for verb, mark in SENT.items() if mark in argv[-1])
  return argv[3]


def record(file: pathlib.Path, verb: str, argv: list[str]) -> None:
  names = ("JAX_PLATFORMS", "JAX_LOCAL_DEVICE_IDS", "XLA_FLAGS")
  env = {name: os.environ[name] for name in names if name in os.environ}
  with file.open("a") as records:
    print(json.dumps({"verb": verb, "argv": argv, "env": env}), file=records)


def follow(transcript: pathlib.Path, verb: str) -> str:
  """Takes the next step of a transcript; returns what to respond."""
  if not transcript.exists():
    return "ACTIVE" if verb == "describe" else ""
  step, *rest = transcript.read_text().split() or ["nothing"]
  transcript.write_text(" ".join(rest))
  step, _, status = step.partition("!")
  expected, _, response = step.partition("=")
  if expected.isupper():
    expected, response = "describe", expected
  if verb != expected:
    sys.exit(f"called {verb}, not {expected}")
  if status:
    print("no quota", file=sys.stderr)
    sys.exit(int(status))
  return response


def cloud(folder: pathlib.Path, name: str, argv: list[str]) -> None:
  """Stands in for gcloud, kubectl, git, srun and scontrol."""
  verb = verb_of(name, argv)
  record(folder / "calls", verb, [name, *argv])
  if name == "git":
    return
  if "ssh" in argv and (folder / "worker").exists():
    command = argv[-1].removeprefix("--command=")
    sys.exit(subprocess.call(["bash", "-c", command], cwd=folder / "worker"))
  response = follow(folder / "transcript", verb)
  if response == "NONE":
    sys.exit("NOT_FOUND: no such queued resource")
  for worker, line in enumerate(response.split(",") if response else []):
    print(f"training={line} worker-{worker}" if verb == "probe" else line)
  if verb == "apply":
    (folder / "applied").write_text(sys.stdin.read())


def empdg(folder: pathlib.Path, argv: list[str]) -> None:
  """Records its arguments for each process, then does what --play says."""
  flags = dict(a[2:].split("=", 1) for a in argv if a.startswith("--"))
  process = flags.get("process_id", "0")
  play = flags.get("play" + process, flags["play"])

  def stop(*_: object) -> None:
    print("Stopped and saved at step 7. The same", flush=True)
    sys.exit(0)

  signal.signal(signal.SIGTERM, signal.SIG_IGN if play == "hang" else stop)
  record(folder / f"empdg-{process}", "empdg", argv)
  if play == "finish":
    print("Finished training\nNext: empdg evaluate --workdir=w --split=test")
  elif play == "stop":
    stop()
  elif play == "alone":
    print("empdg: the hosts have not met within 120 s", file=sys.stderr)
    sys.exit(2)
  elif play in ("wait", "hang"):
    time.sleep(60)
  else:
    sys.exit(int(play))


def main(folder: pathlib.Path, name: str) -> None:
  if name == "empdg":
    empdg(folder, sys.argv[1:])
  else:
    cloud(folder, name, sys.argv[1:])
