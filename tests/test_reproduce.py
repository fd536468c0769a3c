"""The plan that reproduces the paper's tables, and its execution."""

import gzip
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest
from helpers import refused

from empdg_jax import config as config_lib
from empdg_jax import main
from empdg_jax.analysis import reproduce
from empdg_jax.config import InputError
from empdg_jax.data import vectors
from empdg_jax.training import record

# A configuration for seconds instead of hours.
_TINY = """
from empdg_jax.config import Config

def get_config(system):
  config = Config()
  config.model.name = system
  config.model.emb_dim = 12
  config.model.key_value_depth = 4
  config.model.filter_size = 8
  config.data.shapes = ((160, 48, 100),)
  config.train.mle_steps, config.train.mle_eval_every = 4, 2
  config.train.discriminator_steps = 1
  config.train.adversarial_rounds = 2
  config.train.adversarial_eval_every = 1
  config.train.d_steps = config.train.g_steps = 1
  config.train.generator_signal = "expected"
  config.train.selection_metric = "last"
  config.train.checkpoint_every = 1
  config.train.validation_responses = True
  config.eval.max_decode_steps = 6
  return config
"""


@pytest.fixture
def tiny(tmp_path: pathlib.Path) -> str:
  """The path of the small configuration."""
  path = tmp_path / "tiny.py"
  path.write_text(_TINY)
  return str(path)


def _plan(tiny: str, folder: pathlib.Path, *systems: str) -> list:
  fields = {"data.source": "sample", "data.lexicon": "nrclex"}
  return reproduce.make_plan(systems, [0, 1], tiny, fields, folder)


def test_a_plan_trains_each_start_once_and_first(
  tiny: str, tmp_path: pathlib.Path
) -> None:
  plan = _plan(tiny, tmp_path, "empdg", "empdg_control", "moel")
  assert [run.name for run in plan] == [
    "empdg_wo_d-0", "moel-0", "empdg-0", "empdg_control-0",
    "empdg_wo_d-1", "moel-1", "empdg-1", "empdg_control-1",
  ]  # fmt: skip
  start, other, ours, control = plan[:4]
  assert start.needs is None
  assert other.needs is None
  assert ours.needs == control.needs == start.workdir
  assert ours.config.train.mle_checkpoint == str(start.workdir)
  assert ours.config.train.generator_signal == "expected"
  assert control.config.train.generator_signal == "constant"
  assert plan[4].config.train.seed == 1


def test_all_systems_and_the_control_by_default(
  tiny: str, tmp_path: pathlib.Path
) -> None:
  plan = _plan(tiny, tmp_path, *reproduce.default_systems())
  assert len(plan) == 2 * 7


def test_what_is_done_is_not_done_again(
  tiny: str, tmp_path: pathlib.Path
) -> None:
  run = _plan(tiny, tmp_path, "moel")[0]
  assert [command[0] for command in run.commands] == [
    "train", "evaluate", "evaluate",
  ]  # fmt: skip
  assert reproduce.hours_left([run], {"mle": 900.0}) == 1.0  # 4 x 900 s.
  run.workdir.mkdir()
  path = run.workdir / record.RECORD
  path.write_text(json.dumps({"updates": 1, "finished": False}))
  assert reproduce.hours_left([run], {"mle": 900.0}) == 0.75
  assert run.commands[0][0] == "train"
  path.write_text(json.dumps({"updates": 4, "finished": True}))
  assert reproduce.hours_left([run], {"mle": 900.0}) == 0.0
  valid = run.workdir / "eval" / "valid"
  valid.mkdir(parents=True)
  (valid / "metrics.json").write_text("{}")
  assert run.commands == [
    ("evaluate", f"--workdir={run.workdir}", "--split=test")
  ]


def test_updates_of_each_phase(tiny: str, tmp_path: pathlib.Path) -> None:
  start, ours = _plan(tiny, tmp_path, "empdg")[:2]
  assert reproduce.updates(start.config) == {
    "mle": 4, "discriminator": 0, "generator": 0,
  }  # fmt: skip
  # The discriminators' own phase, and one step in each of two rounds.
  assert reproduce.updates(ours.config) == {
    "mle": 0, "discriminator": 3, "generator": 2,
  }  # fmt: skip


def test_prints_commands_for_other_machines(
  tiny: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  folder = tmp_path / "paper"
  argv = ["--data=sample", f"--config={tiny}", f"--workdir={folder}"]
  argv += ["--systems=empdg", "--seeds=3", "--print_commands"]
  assert main.main(["reproduce", *argv]) == 0
  first, second = capsys.readouterr().out.splitlines()
  runs = folder / "runs"
  assert first.startswith(f"empdg train --config={tiny}:empdg_wo_d ")
  assert first.endswith(f"--workdir={runs}/empdg_wo_d-3 --split=test")
  assert f"--config.train.mle_checkpoint={runs}/empdg_wo_d-3" in second
  assert not folder.exists()


def test_the_settings_follow_the_examples(
  tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  argv = ["--data=sample", f"--workdir={tmp_path}/all", "--systems=empdg"]
  argv += ["--seeds=0", "--print_commands"]
  assert main.main(["reproduce", *argv, "--example_set=all_turns"]) == 0
  for line in capsys.readouterr().out.splitlines():
    assert line.startswith("empdg train --config=all_turns:empdg")
    assert "--config.data.example_set=all_turns" in line
  every = config_lib.from_file("all_turns:empdg")
  paper = config_lib.from_file("paper:empdg")
  # As many epochs or nearly, and phase 3 as in the paper's protocol.
  assert every.data.example_set == "all_turns"
  assert every.train.mle_steps > 1.5 * paper.train.mle_steps
  assert every.train.adversarial_rounds == paper.train.adversarial_rounds
  assert main.main(["reproduce", *argv]) == 0
  assert "--config=paper:empdg_wo_d " in capsys.readouterr().out


def test_refuses_in_one_line(
  tiny: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  given = ["reproduce", "--data=sample", f"--config={tiny}"]
  given += [f"--workdir={tmp_path}/paper"]
  for argv, said in (
    (["reproduce"], "--data is missing; give the dataset's archive"),
    (["reproduce", "--data=x"], "--data=x: no such file; give the dataset's"),
    (["reproduce", f"--data={tiny}"], "--lexicon is missing; give the NRC"),
    (
      ["reproduce", f"--data={tiny}", "--lexicon=nrclex"],
      "--vectors is missing; give GloVe's vectors",
    ),
    ([*given, "--systems=empgd"], "--systems=empgd: expected some of"),
    ([*given, "--seeds=0,x"], "--seeds=0,x: expected numbers"),
    ([*given, "--jobs=0"], "--jobs=0: expected at least 1"),
    ([*given, "--config=nothing"], "--config=nothing:transformer: no such"),
  ):
    assert said in refused(capsys, *argv)
  assert not (tmp_path / "paper").exists()


def test_vectors_side_by_side(tmp_path: pathlib.Path) -> None:
  one, two = tmp_path / "one.txt", tmp_path / "two.txt.gz"
  one.write_text("we 1 2\nare 3 4\n")
  with gzip.open(two, "wt") as file:
    file.write("we 5\nare 6\n")
  out = tmp_path / "out.txt.gz"
  vectors.join_vectors([str(one), str(two)], out)
  with gzip.open(out, "rt") as file:
    assert file.read() == "we 1 2 5\nare 3 4 6\n"
  out.unlink()
  one.write_text("we 1 2\nhere 3 4\n")
  with pytest.raises(InputError, match="two.txt.gz:2: the word 'are', where"):
    vectors.join_vectors([str(one), str(two)], out)
  one.write_text("we 1 2\n")
  with pytest.raises(InputError, match="the same words"):
    vectors.join_vectors([str(one), str(two)], out)
  assert not out.exists()


def _start(tiny: str, folder: pathlib.Path) -> subprocess.Popen:
  command = [sys.executable, "-m", "empdg_jax.main", "reproduce"]
  command += ["--data=sample", f"--config={tiny}", f"--workdir={folder}"]
  command += ["--systems=empdg,empdg_control", "--seeds=0"]
  # A session of its own, whose processes can be killed together.
  return subprocess.Popen(
    command, start_new_session=True, stdout=subprocess.DEVNULL
  )


def _figures(folder: pathlib.Path) -> dict:
  """Returns the systems of a results file without what depends on the clock."""
  values = json.loads((folder / "results" / "paper.json").read_text())
  for system in values["systems"].values():
    for seed in system["seeds"]:
      del seed["hours"]
      # The path of its start is no part of the configuration's hash.
      assert seed["updates"]
  return values["systems"]


@pytest.mark.slow
def test_three_kills_leave_the_same_tables(
  tiny: str, tmp_path: pathlib.Path
) -> None:
  undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
  start = time.monotonic()
  assert _start(tiny, undisturbed).wait() == 0
  whole = time.monotonic() - start
  moments = random.Random(0)
  for _ in range(3):
    process = _start(tiny, killed)
    time.sleep(moments.uniform(0.2, 0.7) * whole)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
  assert _start(tiny, killed).wait() == 0
  assert _figures(killed) == _figures(undisturbed)
  systems = ["EmpDG", "EmpDG, control", "EmpDG w/o D"]
  assert list(_figures(killed)) == systems
  for kind in ("training.png", "training.svg", "confusion.png"):
    assert (killed / "results" / f"paper_{kind}").stat().st_size
  assert (killed / "export" / "export.json").exists()
