"""Two processes that train and evaluate one run together, over loopback.

What starts them is marked `slow` and run by `make test-slow`.
"""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from test_systems import SMALL

from empdg_jax import checkpoint, evaluate, main
from empdg_jax.config import Config
from empdg_jax.models import registry
from empdg_jax.train_state import init_params

ROOT = pathlib.Path(__file__).resolve().parents[1]
TINY = (
  f"--config={ROOT}/configs/empdg.py",
  *SMALL,
  "--config.train.discriminator_steps=20",
  "--config.train.adversarial_rounds=7",
  "--config.train.g_steps=3",
  "--config.train.sample_steps=2",
  "--config.train.mle_steps=20",
  "--config.train.mle_eval_every=10",
  "--config.train.log_every=1",
  "--config.train.checkpoint_every=5",
  "--config.eval.max_decode_steps=4",
)


def start(*argv: str, second: str = "") -> list[subprocess.Popen[str]]:
  """Starts a command on two hosts, with one more flag on the second."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  return [
    subprocess.Popen(
      [
        sys.executable,
        "-m",
        "empdg_jax.main",
        *argv,
        f"--coordinator_address=127.0.0.1:{port}",
        "--num_processes=2",
        f"--process_id={process}",
        *([second] if second and process else []),
      ],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env={**os.environ, "JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": ""},
    )
    for process in range(2)
  ]


def finish(hosts: list[subprocess.Popen[str]], status: int = 0) -> list[str]:
  """Waits for both; returns what they said."""
  said = [host.communicate(timeout=240) for host in hosts]
  for host, (_, errors) in zip(hosts, said, strict=True):
    assert host.returncode == status, errors
  # Without what Gloo says of its connections.
  return [
    "".join(
      line
      for line in output.splitlines(keepends=True)
      if not line.startswith("[Gloo]")
    )
    for output, _ in said
  ]


def metrics_of(workdir: pathlib.Path) -> dict[tuple[int, str], float]:
  lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return {
    (line["step"], line["name"]): line["value"]
    for line in lines
    if line["name"] != "train/examples_per_second"
  }


def params_of(workdir: pathlib.Path) -> np.ndarray:
  """Returns the latest generator's parameters in one row."""
  run = checkpoint.open_run(workdir)
  model = registry.create_model(run.config.model, len(run.vocabulary))
  like = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
  checkpoints = checkpoint.Checkpoints(workdir)
  params = checkpoints.restore_params(checkpoint.LATEST, like)
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(params)])


def assert_same_run(one: pathlib.Path, other: pathlib.Path) -> None:
  """Compares all metrics to 1e-5 and the parameters to 1e-5 of their size."""
  expected, found = metrics_of(one), metrics_of(other)
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
  params = params_of(one)
  difference = np.linalg.norm(params_of(other) - params)
  assert difference <= 1e-5 * np.linalg.norm(params)


def wait_for_step(workdir: pathlib.Path, step: int) -> None:
  """Waits until a run in progress has logged a step."""
  deadline = time.monotonic() + 240
  while time.monotonic() < deadline:
    path = workdir / "metrics.jsonl"
    if path.exists() and f'"step": {step},' in path.read_text():
      return
    time.sleep(0.05)
  raise AssertionError(f"{workdir} has not come to step {step}")


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


@pytest.mark.slow
def test_two_hosts_give_the_same_run(
  train_argv: tuple[str, ...],
  undisturbed: pathlib.Path,
  tmp_path: pathlib.Path,
) -> None:
  """Each phase's 20 steps, then every prediction."""
  workdir = tmp_path / "two"
  said, nothing = finish(start(*train_argv, f"--workdir={workdir}"))
  assert "Next: empdg evaluate" in said
  assert nothing == ""  # The first host alone speaks.
  assert_same_run(undisturbed, workdir)
  said, nothing = finish(start("evaluate", f"--workdir={workdir}"))
  assert "Written to" in said
  assert nothing == ""
  one, two = (
    evaluate.read_predictions(w / "eval" / "test" / "predictions.jsonl")
    for w in (undisturbed, workdir)
  )
  assert len(one) == len(two)
  for expected, found in zip(one, two, strict=True):
    assert found.pop("nll") == pytest.approx(expected.pop("nll"), rel=1e-5)
    assert found == expected


@pytest.mark.slow
def test_a_lost_host_ends_the_others(
  train_argv: tuple[str, ...],
  undisturbed: pathlib.Path,
  tmp_path: pathlib.Path,
) -> None:
  argv = (*train_argv, f"--workdir={tmp_path / 'run'}")
  hosts = start(*argv)
  wait_for_step(tmp_path / "run", 25)
  hosts[1].kill()
  lost = time.monotonic()
  _, errors = hosts[0].communicate(timeout=120)
  assert time.monotonic() - lost < 120
  assert hosts[0].returncode not in (0, None)
  assert "another host is lost" in errors
  finish(start(*argv))
  assert_same_run(undisturbed, tmp_path / "run")


@pytest.mark.slow
def test_preempted_hosts_save_and_resume(
  train_argv: tuple[str, ...],
  undisturbed: pathlib.Path,
  tmp_path: pathlib.Path,
) -> None:
  argv = (*train_argv, f"--workdir={tmp_path / 'run'}")
  hosts = start(*argv)
  wait_for_step(tmp_path / "run", 23)
  for host in hosts:
    host.send_signal(signal.SIGTERM)
  said, _ = finish(hosts)
  assert "Stopped and saved at step" in " ".join(said.split())
  assert max(step for step, _ in metrics_of(tmp_path / "run")) < 40 + 7 * 4
  finish(start(*argv))
  assert_same_run(undisturbed, tmp_path / "run")


@pytest.mark.slow
def test_hosts_must_agree(
  train_argv: tuple[str, ...], tmp_path: pathlib.Path
) -> None:
  """Another seed on the second host: both are refused, nothing is written."""
  workdir = tmp_path / "run"
  argv = (*train_argv, f"--workdir={workdir}")
  for host in start(*argv, second="--config.train.seed=1"):
    _, errors = host.communicate(timeout=120)
    assert host.returncode == 2
    assert "the hosts have different configurations" in errors
  assert not workdir.exists()


def test_bad_flags(
  capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
  def refused(*argv: str) -> str:
    command = ["evaluate", f"--workdir={tmp_path}", *argv]
    assert main.main(command) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line

  assert "belong to a --coordinator_address" in refused("--num_processes=2")
  address = "--coordinator_address=127.0.0.1:1"
  assert "needs --num_processes and --process_id" in refused(address)
  said = refused(address, "--num_processes=2", "--process_id=2")
  assert "--process_id=2: expected 0 to 1" in said
