"""Programs that stand in for `empdg`, gcloud and others in test_launch.py.

They import little, because the tests start them hundreds of times.
"""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

# The flags of the commands, and patterns of their values, None for a switch:
# from `--help` of Google Cloud SDK 528.0.0 and of kubectl 1.32.4. A command
# that is not here, or another flag or value, is refused, as the real one does.
_NAME = "[a-z]([-a-z0-9]*[a-z0-9])?"
_PLACE = {"zone": "[a-z]+-[a-z]+[0-9]-[a-z]", "project": "[a-z][-a-z0-9]*"}
_SSH = {
  "worker": "all|[0-9]+", "internal-ip": None, "dry-run": None, "plain": None,
  "ssh-key-file": ".+", "ssh-flag": ".+", "force-key-file-overwrite": None,
}  # fmt: skip
_NODES = {"node": "all|[0-9]+", "tunnel-through-iap": None, "batch-size": ".+"}
_QUEUED, _VM = "compute tpus queued-resources ", "compute tpus tpu-vm "
_SELECTOR = {"selector": ".+=.+", "output": "name|wide|json|yaml"}
FLAGS: dict[str, dict[str, str | None]] = {
  "gcloud " + _QUEUED + "create": {
    **_PLACE,
    "accelerator-type": "(v[23456]|v5litepod|v5p|v6e|tpu7x)-[1-9][0-9]*",
    "runtime-version": "[a-z0-9][-a-z0-9.]*",
    "node-id": _NAME,
    "node-count": "[2-9]|[1-9][0-9]+",
    "node-prefix": _NAME,
    "async": None, "spot": None, "reserved": None, "guaranteed": None,
    "internal-ips": None, "shielded-secure-boot": None,
    "service-account": "[^@ ]+@[^@ ]+", "network": ".+", "subnetwork": ".+",
    "labels": "([a-z][-_a-z0-9]*=[-_a-z0-9]*,?)+", "tags": ".+",
    "valid-until-duration": "([1-9][0-9]*[smhd])+",
    "valid-after-duration": "([1-9][0-9]*[smhd])+",
  },
  "gcloud " + _QUEUED + "describe": {**_PLACE, "format": "value\\(.+\\)"},
  "gcloud " + _QUEUED + "delete": {
    **_PLACE, "force": None, "async": None, "quiet": None,
  },
  "gcloud " + _QUEUED + "ssh": {**_PLACE, **_SSH, **_NODES, "command": None},
  "gcloud " + _QUEUED + "scp": {
    **_PLACE, **_SSH, **_NODES, "recurse": None, "compress": None,
  },
  "gcloud " + _VM + "ssh": {**_PLACE, **_SSH, "command": None},
  "gcloud " + _VM + "scp": {
    **_PLACE, **_SSH, "recurse": None, "compress": None,
  },
  "gcloud storage cp": {"quiet": None, "recursive": None, "no-clobber": None},
  "kubectl apply": {"filename": ".+", "namespace": _NAME, "wait": None},
  "kubectl delete": {
    "namespace": _NAME, "ignore-not-found": None, "wait": None,
    "cascade": "background|orphan|foreground", "force": None, "now": None,
    "selector": ".+",
  },
  "kubectl get": {
    **_SELECTOR, "namespace": _NAME, "sort-by": "[.].+", "watch": None,
  },
  "kubectl logs": {
    "namespace": _NAME, "tail": "-?[0-9]+", "follow": None, "selector": ".+",
    "container": ".+", "previous": None,
  },
}  # fmt: skip

# The flags without which they refuse, or ask what a script cannot answer.
REQUIRED = {
  "gcloud compute tpus": {"zone"},
  "gcloud " + _QUEUED + "create": {"accelerator-type", "runtime-version"},
  "kubectl apply": {"filename"},
}


def check(name: str, argv: list[str]) -> None:
  """Exits with 2 unless the real command knows all of these arguments."""
  line = " ".join([name, *(a for a in argv if not a.startswith("-"))])
  found = [c for c in FLAGS if f"{line} ".startswith(f"{c} ")]
  if not found:
    sys.exit(print(f"{name}: no such command: {line}", file=sys.stderr) or 2)
  command = max(found, key=len)
  flags, given = FLAGS[command], set()
  for argument in argv:
    if not argument.startswith("-") or argument == "-":
      continue
    flag, equals, value = argument.lstrip("-").partition("=")
    flag = {"f": "filename"}.get(flag, flag)
    given.add(flag)
    known = flag in flags
    pattern = flags.get(flag)
    if known and flag != "command" and flag != "filename":
      known = bool(equals) == (pattern is not None)
      known = known and (not equals or re.fullmatch(pattern or "", value))
    if not known:
      print(f"{name}: unrecognized arguments: {argument}", file=sys.stderr)
      sys.exit(2)
  for group, required in REQUIRED.items():
    if command.startswith(group) and not required <= given:
      print(f"{name}: required: {required - given}", file=sys.stderr)
      sys.exit(2)
  nodes = given & {"node-id", "node-count"}
  if command.endswith("create") and len(nodes) != 1:
    print("Exactly one of (--node-count | --node-id)", file=sys.stderr)
    sys.exit(2)


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
  if argv[0] == "storage":
    return "storage"
  if argv[3] == "ssh":
    return next(verb for verb, mark in SENT.items() if mark in argv[-1])
  return argv[3]


def record(file: pathlib.Path, verb: str, argv: list[str]) -> None:
  names = ("JAX_PLATFORMS", "JAX_LOCAL_DEVICE_IDS", "XLA_FLAGS")
  env = {name: os.environ[name] for name in names if name in os.environ}
  with file.open("a") as records:
    line = {"verb": verb, "argv": argv, "env": env, "pid": os.getpid()}
    print(json.dumps(line), file=records)


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
  if name in ("gcloud", "kubectl"):
    check(name, argv)
  verb = verb_of(name, argv)
  record(folder / "calls", verb, [name, *argv])
  if name in ("git", "ssh-add") or verb == "storage":
    if verb == "storage" and pathlib.Path(argv[-2]).is_file():
      text = pathlib.Path(argv[-2]).read_text()
      (folder / "stored").write_text(text)
    sys.exit((folder / f"{verb}-fails").exists())
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
  if argv[0] == "checkpoints":
    print('[{"kind": "latest", "step": 40}, {"kind": "latest", "step": 35}]')
    return
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
  elif play == "unreachable":
    print("empdg: --coordinator_address=a:1: process 0 cannot be reached")
    sys.exit(2)
  elif play.startswith("says:"):
    print(play[5:], file=sys.stderr, flush=True)
    os.abort()
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
