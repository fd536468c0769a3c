"""Two hosts on this machine, for tests, and comparisons of their runs."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from helpers import SMALL

from empdg_jax.inference.system import params_like
from empdg_jax.training import checkpoint, run_folder

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
  "--config.train.heartbeat_seconds=10",
  "--config.eval.max_decode_steps=4",
)


def start(
  *argv: str,
  second: str = "",
  folders: tuple[pathlib.Path, ...] = (ROOT, ROOT),
  before: str = "",
) -> list[subprocess.Popen[str]]:
  """Starts a command on two hosts, with one more flag on the second.

  Each host works in its own one of the two folders, and first runs `before`, a
  piece of Python.
  """
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  return [
    subprocess.Popen(
      [
        sys.executable,
        "-c",
        f"from empdg_jax import main\n{before}\nmain.run()",
        *argv,
        f"--coordinator_address=127.0.0.1:{port}",
        "--num_processes=2",
        f"--process_id={process}",
        *([second] if second and process else []),
      ],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      cwd=folders[process],
      env={**os.environ, "JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": ""},
    )
    for process in range(2)
  ]


def finish(hosts: list[subprocess.Popen[str]], status: int = 0) -> list[str]:
  """Waits for both hosts; returns their output."""
  said = [host.communicate(timeout=480) for host in hosts]
  for host, (_, errors) in zip(hosts, said, strict=True):
    assert host.returncode == status, errors
  # Gloo prints its connections among our lines.
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
    if line["name"] not in ("train/examples_per_second", "train/input_wait")
  }


def params_of(workdir: pathlib.Path) -> np.ndarray:
  """Returns the latest generator's parameters, flat: `[parameters]`."""
  run = run_folder.open_run(workdir)
  checkpoints = checkpoint.Checkpoints(workdir)
  like = params_like(run)
  params = checkpoints.restore_params(checkpoint.LATEST, like)
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(params)])


def assert_equal_run(one: pathlib.Path, other: pathlib.Path) -> None:
  """Compares all metrics and the parameters, which must have the same bits."""
  assert metrics_of(other) == metrics_of(one)
  np.testing.assert_array_equal(params_of(other), params_of(one))


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
  raise AssertionError(f"{workdir} has not reached step {step}")
