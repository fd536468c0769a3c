"""A run in a bucket, kept in memory by a stand-in for Cloud Storage."""

import json
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import fake_bucket
import numpy as np
import pytest
from etils import epath
from helpers import SMALL

from empdg_jax import main
from empdg_jax.config import Config, InputError
from empdg_jax.inference import export_files
from empdg_jax.training.checkpoint import BEST, LATEST, Checkpoints
from empdg_jax.training.train_state import (
  DISCRIMINATOR,
  GENERATOR,
  TrainState,
)

ROOT = pathlib.Path(__file__).resolve().parents[1]


def argv_of(sample_config: Config) -> tuple[str, ...]:
  """Flags of a short run, without its folder."""
  return (
    f"--config={ROOT}/configs/transformer.py",
    *SMALL,
    f"--config.data.data_dir={sample_config.data.data_dir}",
    "--config.train.mle_steps=4",
    "--config.train.mle_eval_every=2",
    "--config.train.log_every=1",
    "--config.eval.max_decode_steps=3",
  )


@pytest.mark.slow
def test_a_run_in_a_bucket(
  storage: fake_bucket.FakeStorage,
  sample_config: Config,
  tmp_path: pathlib.Path,
  capsys: pytest.CaptureFixture[str],
) -> None:
  """Trains, resumes, evaluates, lists and exports it."""
  argv = (*argv_of(sample_config), "--workdir=gs://pod/runs/one")
  assert main.main(["train", *argv]) == 0
  names = set(storage.objects)
  assert {"runs/one/config.json", "runs/one/vocab.txt"} <= names
  (events,) = (n for n in names if n.startswith("runs/one/tensorboard/"))
  assert b"train/loss" in storage.objects[events].data
  assert not [n for n in names if "/." in n]  # No temporary file is left.
  lines = storage.objects["runs/one/metrics.jsonl"].data.splitlines()
  losses = [e["step"] for e in map(json.loads, lines) if "loss" in e["name"]]
  assert losses == [1, 2, 3, 4]
  assert main.main(["train", *argv]) == 0  # Nothing is left to do.
  assert storage.objects["runs/one/metrics.jsonl"].data.splitlines() == lines
  assert main.main(["evaluate", "--workdir=gs://pod/runs/one"]) == 0
  values = json.loads(storage.objects["runs/one/eval/test/metrics.json"].data)
  assert values["examples"] == 128
  capsys.readouterr()
  argv = ["checkpoints", "--workdir=gs://pod/runs/one", "--format=json"]
  assert main.main(argv) == 0
  listed = json.loads(capsys.readouterr().out)
  assert {c["step"] for c in listed} == {2, 4}
  assert all(c["bytes"] > 10_000 for c in listed)
  out = tmp_path / "export"
  assert (
    main.main(["export", "--workdir=gs://pod/runs/one", f"--out={out}"]) == 0
  )
  assert export_files.read_export(out).step in (2, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("refused", "says"),
  [
    ("metrics.jsonl", "metrics.jsonl: cannot write ("),
    ("plugins/profile", ".xplane.pb: cannot write ("),
  ],
)
def test_logs_are_not_worth_a_run(
  storage: fake_bucket.FakeStorage,
  sample_config: Config,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
  refused: str,
  says: str,
) -> None:
  monkeypatch.setattr(storage, "refused", refused)
  storage.objects.clear()
  argv = (*argv_of(sample_config), "--config.train.profile_steps=1:2")
  assert main.main(["train", *argv, "--workdir=gs://pod/logs"]) == 0
  said = capsys.readouterr().out
  assert says in said
  assert "Next: empdg evaluate" in said
  assert "logs/checkpoints/latest/4/_CHECKPOINT_METADATA" in storage.objects


@pytest.mark.slow
def test_a_checkpoint_that_fails_is_no_bad_input(
  storage: fake_bucket.FakeStorage,
  sample_config: Config,
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  monkeypatch.setattr(storage, "refused", "latest/2")
  argv = (*argv_of(sample_config), "--workdir=gs://pod/saves")
  done = subprocess.run(
    [sys.executable, "-m", "empdg_jax.main", "train", *argv],
    capture_output=True, text=True, check=False, timeout=100,
  )  # fmt: skip
  assert done.returncode == 1, done.stderr
  # Tensorstore's own threads may print lines of their own before.
  line = done.stderr.strip().splitlines()[-1]
  assert line.startswith("empdg: gs://pod/saves/checkpoints: cannot write a")


def test_a_bucket_without_permission(
  storage: fake_bucket.FakeStorage,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
) -> None:
  monkeypatch.setattr(storage, "forbidden", True)
  config = f"--config={ROOT}/configs/quickstart.py"
  assert main.main(["train", config, "--workdir=gs://pod/runs/two"]) == 2
  said = capsys.readouterr().err.strip().splitlines()
  assert len(said) == 1
  assert "--workdir=gs://pod/runs/two: cannot read the bucket" in said[0]


def state_of(value: float) -> TrainState:
  """Returns a state that holds one number alone."""
  return TrainState(
    step=np.int32(value),
    params={"w": np.full(3, value, np.float32)},
    opt_state=(np.full(3, value, np.float32),),
  )


def test_resumes_before_the_damage(storage: fake_bucket.FakeStorage) -> None:
  """The damaged checkpoint is named, and moved aside in the bucket."""
  workdir: Any = epath.Path("gs://pod/damage")
  written = Checkpoints(workdir, create=True, keep=2)
  for step in (3, 5):
    states = {GENERATOR: state_of(step)}
    written.save(LATEST, step, states, {"phase": "mle", "done": step})
  written.close()
  root = "damage/checkpoints"
  arrays = [
    name
    for name in storage.objects
    if name.startswith(f"{root}/latest/5/params/") and "/d/" in name
  ]
  for name in arrays:
    data = bytearray(storage.objects[name].data)
    data[len(data) // 2] ^= 1
    storage.put(name, bytes(data))

  said: list[str] = []
  checkpoints = Checkpoints(workdir, create=True, keep=2, warn=said.append)
  found, progress = checkpoints.resume({GENERATOR: state_of(0)})
  assert found[GENERATOR].step == progress["done"] == 3
  np.testing.assert_array_equal(found[GENERATOR].params["w"], [3, 3, 3])
  (line,) = said
  assert line.startswith(f"Warning: gs://pod/{root}/latest/5: damaged")
  assert line.endswith(f"; using gs://pod/{root}/latest/3 instead")
  moved = {name.replace("latest", "damaged", 1) for name in arrays}
  assert moved <= set(storage.objects)
  assert not set(arrays) & set(storage.objects)
  assert checkpoints.all() == [(LATEST, 3)]
  checkpoints.close()


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_checkpoints_of_earlier_versions(
  storage: fake_bucket.FakeStorage, tmp_path: pathlib.Path, place: str
) -> None:
  """Items had other names and no checksums.

  A partly written checkpoint does not count.
  """
  root = "gs://pod/old" if place == "bucket" else str(tmp_path)
  workdir: Any = epath.Path(root)
  written = Checkpoints(workdir, create=True)
  states = {GENERATOR: state_of(1), DISCRIMINATOR: state_of(2)}
  written.save(LATEST, 3, states, {"phase": "adversarial"})
  written.close()
  names = {
    "discriminators": "critics",
    "discriminator_optimizer": "critics_optimizer",
  }

  def renamed(text: bytes) -> bytes:
    for name, former in names.items():
      text = text.replace(b'"%b"' % name.encode(), b'"%b"' % former.encode())
    return text

  if place == "bucket":
    for name in [n for n in storage.objects if n.startswith("old/")]:
      parts = [names.get(part, part) for part in name.split("/")]
      data = storage.objects.pop(name).data
      if name.endswith("_CHECKPOINT_METADATA"):
        data = renamed(data)
      if "checksums" not in parts:
        storage.put("/".join(parts), data)
    # Without the mark that Orbax writes last.
    storage.put("old/checkpoints/latest/5/critics/array", b"part")
  else:
    latest = tmp_path / "checkpoints" / "latest"
    for name, former in names.items():
      (latest / "3" / name).rename(latest / "3" / former)
    shutil.rmtree(latest / "3" / "checksums")
    about = latest / "3" / "_CHECKPOINT_METADATA"
    about.write_bytes(renamed(about.read_bytes()))
    (latest / "5.orbax-checkpoint-tmp-1" / "critics").mkdir(parents=True)

  checkpoints = Checkpoints(workdir)
  assert checkpoints.step(LATEST) == 3
  assert checkpoints.step(BEST) is None
  assert [tuple(c) for c in checkpoints.all()] == [(LATEST, 3)]
  found = checkpoints.restore_state(LATEST, DISCRIMINATOR, state_of(0))
  np.testing.assert_array_equal(found.params["w"], state_of(2).params["w"])
  np.testing.assert_array_equal(found.opt_state, state_of(2).opt_state)
  assert found.step == 2
  assert checkpoints.restore_state(LATEST, GENERATOR, state_of(0)).step == 1
  assert checkpoints.restore_progress(LATEST) == {"phase": "adversarial"}
  checkpoints.close()

  # A folder that was copied in part is refused in one line.
  (workdir / "checkpoints" / "latest" / "3" / "critics").rmtree()
  checkpoints = Checkpoints(workdir)
  with pytest.raises(InputError, match=r"latest/3: damaged") as error:
    checkpoints.restore_state(LATEST, DISCRIMINATOR, state_of(0))
  assert "\n" not in str(error.value)
  checkpoints.close()
