"""Stand-ins for the commands that the scripts of `launch/` call.

A transcript lists the calls that a script must make, and their responses:

    create     a call of this verb (`fake_commands.verb_of`)
    ACTIVE     `describe`, which prints this state; NONE if there is no slice
    probe=0,1  `probe`: training exited with 0 on one worker, 1 on another
    scp!2      a call that fails with status 2
    /          not a call: `run` restarts here
"""

import os
import pathlib
import re
import shlex
import subprocess
import sys

import helpers
from helpers import Ended, finish

TESTS = pathlib.Path(__file__).resolve().parent
LAUNCH = TESTS.parent / "launch"


class Cloud:
  """A folder with the stand-ins, first on the PATH of the scripts."""

  def __init__(self, folder: pathlib.Path) -> None:
    self.folder = folder
    for name in (
      "gcloud",
      "kubectl",
      "git",
      "scontrol",
      "srun",
      "ssh-add",
      "empdg",
    ):
      helpers.write_executable(
        folder / "bin" / name,
        f"#!{sys.executable} -IS\nimport sys\n"
        f"sys.path.insert(0, {str(TESTS)!r})\n"
        "import fake_commands, pathlib\n"
        f"fake_commands.main(pathlib.Path({str(folder)!r}), {name!r})\n",
      )
    ours = ("SLURM", "EMPDG", "XLA_FLAGS", "JAX_PLATFORMS")
    self.env = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    self.env["PATH"] = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    self.env["EMPDG"] = str(folder / "bin" / "empdg")

  def shell(self, text: str) -> subprocess.Popen[str]:
    return helpers.start_bash(text, cwd=self.folder, env=self.env)

  def start(self, line: str) -> subprocess.Popen[str]:
    """Starts a script of launch/ with its flags."""
    script, _, flags = line.partition(" ")
    return self.shell(f"exec bash {shlex.quote(str(LAUNCH / script))} {flags}")

  def run(self, line: str) -> Ended:
    return finish(self.start(line), seconds=60)

  def expect(self, transcript: str) -> list[str]:
    """Gives the stand-ins a transcript; returns its verbs."""
    steps = [step for step in transcript.split() if step != "/"]
    (self.folder / "transcript").write_text(" ".join(steps))
    verbs = [re.split("[=!]", step)[0] for step in steps]
    return ["describe" if verb.isupper() else verb for verb in verbs]

  def follow(self, line: str, transcript: str) -> Ended:
    """Runs a script whose calls must be those of the transcript."""
    verbs = self.expect(transcript)
    before = len(self.records())
    ended = self.run(line)
    called = [call["verb"] for call in self.records()[before:]]
    checks = "git", "ssh-add", "storage"
    assert [verb for verb in called if verb not in checks] == verbs, (
      ended.errors
    )
    return ended

  def records(self, file: str = "calls") -> list[dict]:
    """Calls of all stand-ins except `empdg`, or of one: `empdg-PROCESS`."""
    return helpers.read_records(self.folder / file)

  def calls(self, verb: str = "") -> list[list[str]]:
    calls = self.records()
    return [call["argv"] for call in calls if verb in ("", call["verb"])]

  def empdg(self) -> list[dict]:
    return self.records("empdg-0")
