"""Damaged checkpoints: refused, replaced by the one before, or harmless."""

import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tensorstore
from helpers import damage

from empdg_jax.config import InputError, SaveError
from empdg_jax.training import checkpoint
from empdg_jax.training.checkpoint import BEST, LATEST, Checkpoints
from empdg_jax.training.train_state import (
  DISCRIMINATOR,
  GENERATOR,
  TrainState,
)

FLIPS = 240
PROGRESS = {"phase": "mle", "done": 7, "best": 12.5, "data": {"2": 1, "10": 0}}


def state_of(seed: int) -> TrainState:
  """Returns a state with a large array, small ones and a number."""
  rng = np.random.default_rng(seed)

  def arrays() -> dict[str, np.ndarray]:
    shapes = {"embedding": (150, 64), "bias": (5,), "scale": ()}
    return {
      name: np.asarray(rng.standard_normal(shape), np.float32)
      for name, shape in shapes.items()
    }

  return TrainState(np.int32(seed), arrays(), (np.int32(seed), arrays()))


STATES = {GENERATOR: state_of(1), DISCRIMINATOR: state_of(2)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A folder with two checkpoints; do not change it."""
  workdir = tmp_path_factory.mktemp("saved")
  checkpoints = Checkpoints(workdir, create=True, keep=2)
  checkpoints.save(LATEST, 3, STATES, PROGRESS | {"done": 3})
  checkpoints.save(LATEST, 7, STATES, PROGRESS)
  checkpoints.save(BEST, 7, STATES, PROGRESS)
  checkpoints.close()
  return workdir


@pytest.fixture
def workdir(saved: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
  """A copy of `saved`."""
  return shutil.copytree(saved, tmp_path / "run")


def read(
  workdir: pathlib.Path, said: list[str]
) -> tuple[dict[str, TrainState], dict[str, object]]:
  checkpoints = Checkpoints(workdir, create=True, keep=2, warn=said.append)
  try:
    return checkpoints.resume(STATES)
  finally:
    checkpoints.close()


def check_flip(saved: pathlib.Path, folder: pathlib.Path, seed: int) -> bool:
  """Flips a bit of the newest checkpoint; returns whether it was noticed."""
  rng = random.Random(f"flip{seed}")
  workdir = shutil.copytree(saved, folder / f"run{seed}")
  newest = workdir / "checkpoints" / "latest" / "7"
  files = sorted(p for p in newest.rglob("*") if p.is_file())
  files = [p for p in files if p.stat().st_size]
  # Half of them by size, since the arrays are in a few large files.
  weights = None if seed % 2 else [p.stat().st_size for p in files]
  (path,) = rng.choices(files, weights)
  data = bytearray(path.read_bytes())
  data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
  path.write_bytes(data)
  said: list[str] = []
  began = time.monotonic()
  states, progress = read(workdir, said)
  assert time.monotonic() - began < 30, path
  jax.tree.map(np.testing.assert_array_equal, states, STATES)
  assert progress == PROGRESS | {"done": 3 if said else 7}, path
  if said:
    assert len(said) == 1
    assert "\n" not in said[0]
    assert said[0].startswith(f"Warning: {newest}: "), said
    assert said[0].endswith(f"; using {newest.parent}/3 instead")
    assert (workdir / "checkpoints" / "damaged" / "7").is_dir()
  shutil.rmtree(workdir)
  return bool(said)


def test_flipped_bits(saved: pathlib.Path, tmp_path: pathlib.Path) -> None:
  noticed = [check_flip(saved, tmp_path, seed) for seed in range(12)]
  assert any(noticed)


@pytest.mark.slow
def test_many_flipped_bits(saved: pathlib.Path, tmp_path: pathlib.Path) -> None:
  noticed = [check_flip(saved, tmp_path, s) for s in range(12, FLIPS)]
  assert sum(noticed) > len(noticed) // 2


@pytest.mark.parametrize(
  "item", ["params", "discriminator_optimizer", "progress", "checksums"]
)
def test_resumes_before_the_damage(workdir: pathlib.Path, item: str) -> None:
  """Training can save again at the step of the damaged checkpoint."""
  damage(workdir / "checkpoints" / "latest" / "7" / item)
  said: list[str] = []
  checkpoints = Checkpoints(workdir, create=True, keep=2, warn=said.append)
  _, progress = checkpoints.resume(STATES)
  assert progress["done"] == 3
  assert "latest/7: damaged" in said[0]
  checkpoints.save(LATEST, 7, STATES, PROGRESS)
  checkpoints.wait()
  assert [c.step for c in checkpoints.select(LATEST)] == [7, 3]
  assert checkpoints.resume(STATES)[1] == PROGRESS
  assert len(said) == 1
  checkpoints.close()


def test_refuses_when_none_is_whole(workdir: pathlib.Path) -> None:
  for step in (3, 7):
    damage(workdir / "checkpoints" / "latest" / str(step) / "params")
  said: list[str] = []
  with pytest.raises(InputError, match="latest/7: damaged") as error:
    read(workdir, said)
  assert "\n" not in str(error.value)
  assert not said
  assert not (workdir / "checkpoints" / "damaged").exists()


def test_a_damaged_best_checkpoint(
  workdir: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  """The latest serves instead, unless the user asks for the best."""
  damage(workdir / "checkpoints" / "best" / "7" / "params")
  checkpoints = Checkpoints(workdir)
  like = STATES[GENERATOR].params

  def read_params(one: checkpoint.Selected) -> object:
    return checkpoints.restore_params(one.kind, like, one.step)

  one, _ = checkpoints.first_whole(checkpoints.select(None), read_params)
  assert one == (LATEST, 7)
  line = capsys.readouterr().err
  assert "best/7: damaged" in line
  assert line.endswith("latest/7 instead\n")
  with pytest.raises(InputError, match=r"best/7: damaged"):
    checkpoints.first_whole(checkpoints.select(BEST), read_params)
  checkpoints.close()


def test_notes_a_checkpoint_without_checksums(workdir: pathlib.Path) -> None:
  shutil.rmtree(workdir / "checkpoints" / "latest" / "7" / "checksums")
  said: list[str] = []
  states, _ = read(workdir, said)
  jax.tree.map(np.testing.assert_array_equal, states, STATES)
  assert len(said) == 1
  assert "latest/7 has no checksums" in said[0]


def test_a_failing_bucket_is_no_damage(
  workdir: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  def fail(*args: object, **kwargs: object) -> None:
    raise ValueError("UNAVAILABLE: Error reading gs://pod/one: HTTP 503")

  monkeypatch.setattr(checkpoint.ocp.Checkpointer, "restore", fail)
  with pytest.raises(SaveError, match="latest/7: cannot read"):
    read(workdir, [])


def test_an_absurd_shape_is_refused_before_it_is_read(
  workdir: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Whoever writes the files can make them claim 4 TB, and fill it with 0."""
  folder = workdir / "checkpoints" / "latest" / "7" / "params"
  shutil.rmtree(folder / "d")
  for path in folder.glob("*ocdbt*"):
    shutil.rmtree(path) if path.is_dir() else path.unlink()
  tensorstore.open(
    {
      "driver": "zarr",
      "kvstore": {
        "driver": "ocdbt",
        "base": f"file://{folder}/",
        "path": "embedding/",
      },
      "metadata": {"shape": [10**12], "chunks": [1000], "dtype": "<f4"},
    },
    create=True,
  ).result()
  for name in ("bias", "scale"):
    tensorstore.open(
      {
        "driver": "zarr",
        "kvstore": {
          "driver": "ocdbt",
          "base": f"file://{folder}/",
          "path": f"{name}/",
        },
        "metadata": {"shape": [5], "chunks": [5], "dtype": "<f4"},
      },
      create=True,
    ).result()

  async def read_arrays(stores: object) -> None:
    raise AssertionError("arrays are read")

  monkeypatch.setattr(checkpoint, "_read_arrays", read_arrays)
  checkpoints = Checkpoints(workdir)
  with pytest.raises(InputError, match=r"has shape \(1000000000000,\)"):
    checkpoints.restore_params(LATEST, STATES[GENERATOR].params, 7)
  checkpoints.close()


def test_a_pipe_in_a_checkpoint(workdir: pathlib.Path) -> None:
  newest = workdir / "checkpoints" / "latest" / "7"
  path = newest / "params" / "manifest.ocdbt"
  path.unlink()
  os.mkfifo(path)
  said: list[str] = []
  _, progress = read(workdir, said)
  assert progress["done"] == 3
  assert "manifest.ocdbt: is no regular file" in said[0]


def test_a_checksum_depends_on_every_bit_type_and_shape() -> None:
  array = np.zeros((3, 4096), np.float32)
  others = [array.reshape(4096, 3), array.view(np.int32)]
  for bit in (0, 31, 40_000, array.nbytes * 8 - 1):
    changed = array.copy()
    changed.view(np.uint8).reshape(-1)[bit // 8] ^= 1 << bit % 8
    others.append(changed)
  sums = [checkpoint._checksum(other) for other in others]
  assert checkpoint._checksum(array) not in sums


def test_the_cost_of_checksums_is_measured() -> None:
  root = pathlib.Path(__file__).resolve().parents[1]
  said = subprocess.run(
    [sys.executable, root / "benchmarks" / "checkpoint_cost.py"]
    + ["--rounds=1", "--vocab_size=200", "--emb_dim=12"],
    env={**os.environ, "PYTHONPATH": str(root)},
    check=True,
    capture_output=True,
    text=True,
  ).stdout
  assert "medians of 1 rounds" in said
  for kind in ("save", "restore"):
    assert re.search(
      rf"^{kind} .* [+-]\d+ ms with them: [+-]\d+\.\d%$", said, re.MULTILINE
    )
