"""Training end to end on the embedded corpus: resume, stop, compile once."""

import copy
import itertools
import json
import pathlib
import shutil
import signal
import subprocess

import jax
import numpy as np
import pytest
import rich.console
from helpers import damage, refused, run_training

from empdg_jax import config as config_lib
from empdg_jax.config import TEXT_RULES, Config, InputError, SaveError
from empdg_jax.inference import evaluate
from empdg_jax.inference.system import load_system
from empdg_jax.training import (
  checkpoint,
  loop,
  record,
  run_folder,
  train_log,
  validation,
)
from empdg_jax.training.metric_writer import MetricWriter


def _losses(workdir: pathlib.Path) -> dict[int, float]:
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  values = [json.loads(line) for line in lines]
  steps = [v["step"] for v in values if v["name"] == "train/loss"]
  assert len(steps) == len(set(steps)), "a step is logged twice"
  return {v["step"]: v["value"] for v in values if v["name"] == "train/loss"}


def _short(config: Config) -> Config:
  config.train.mle_steps = 24
  config.train.mle_eval_every = 8
  config.train.checkpoint_every = 3
  config.train.log_every = 1
  return config


@pytest.fixture(scope="module")
def trained(
  sample_config: Config, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Config, pathlib.Path]:
  """A run that was never disturbed, and its configuration."""
  config = _short(copy.deepcopy(sample_config))
  config.train.validation_responses = True
  workdir = tmp_path_factory.mktemp("undisturbed") / "run"
  assert loop.train(config, workdir)
  return config, workdir


def test_run_folder(trained: tuple[Config, pathlib.Path]) -> None:
  config, workdir = trained
  written = run_folder.read_config(workdir)
  assert written.data.text_rules == TEXT_RULES
  assert written == run_folder.with_text_rules(config, workdir)
  assert sorted(_losses(workdir)) == list(range(1, 25))
  names = {
    json.loads(line)["name"]
    for line in (workdir / "metrics.jsonl").read_text().splitlines()
  }
  assert names >= {
    "train/loss",
    "train/perplexity",
    "train/emotion_accuracy",
    "train/learning_rate",
    "train/examples_per_second",
    "train/input_wait",
    "valid/perplexity",
    "valid/emotion_accuracy",
  }
  assert list((workdir / "tensorboard").iterdir())
  checkpoints = checkpoint.Checkpoints(workdir)
  assert checkpoints.step(checkpoint.LATEST) == 24
  assert checkpoints.step(checkpoint.BEST) in (8, 16, 24)
  latest = [c.step for c in checkpoints.all() if c.kind == checkpoint.LATEST]
  assert latest == [24, 21, 18]  # `keep_checkpoints` of them.


def test_validations_score_the_responses_that_evaluation_gives(
  trained: tuple[Config, pathlib.Path], tmp_path: pathlib.Path
) -> None:
  _, workdir = trained
  system = load_system(workdir, which="24")
  console = rich.console.Console(quiet=True)
  evaluated = evaluate.evaluate_split(system, "valid", tmp_path, console)
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  logged = {
    entry["name"]: entry["value"]
    for entry in map(json.loads, lines)
    if entry["step"] == 24
  }
  assert evaluated["distinct_2"] > 0
  for name in validation.OF_RESPONSES:
    assert logged[f"valid/{name}"] == pytest.approx(evaluated[name]), name


def test_the_record_adds_up_the_sessions(
  trained: tuple[Config, pathlib.Path], tmp_path: pathlib.Path
) -> None:
  config, workdir = trained
  written = json.loads((workdir / record.RECORD).read_text())
  assert written["updates"] == 24
  assert written["finished"]
  assert written["compute_dtype"] in ("float32", "bfloat16")
  assert 0 < written["hours"] < 1
  assert " of " in written["hardware"] or "device" in written["hardware"]
  earlier = {"commit": "0123", "hardware": "an abacus", "hours": 2.5}
  (tmp_path / record.RECORD).write_text(json.dumps(earlier))
  recorder = record.Recorder(tmp_path, "float32")
  resumed = json.loads(recorder.to_json(30))
  assert resumed["hours"] == pytest.approx(2.5, abs=0.1)
  assert resumed["hardware"] == f"an abacus; {written['hardware']}"
  assert resumed["commit"].startswith("0123")
  assert resumed["updates"] == 30
  assert not resumed["finished"]


def test_loss_falls(trained: tuple[Config, pathlib.Path]) -> None:
  losses = _losses(trained[1])
  first = np.mean([losses[step] for step in range(1, 6)])
  last = np.mean([losses[step] for step in range(20, 25)])
  assert last < 0.95 * first


@pytest.mark.parametrize(
  "kill_at",
  [
    pytest.param(1, marks=pytest.mark.slow),
    7,
    pytest.param(9, marks=pytest.mark.slow),
  ],
)
def test_kill_and_resume_gives_the_same_losses(
  trained: tuple[Config, pathlib.Path], tmp_path: pathlib.Path, kill_at: int
) -> None:
  config, undisturbed = trained
  workdir = tmp_path / "run"
  killed = run_training(config, workdir, kill_at, signal.SIGKILL)
  assert killed.returncode == -signal.SIGKILL, killed.stderr
  assert loop.train(config, workdir)
  expected, losses = _losses(undisturbed), _losses(workdir)
  assert losses.keys() == expected.keys()
  np.testing.assert_allclose(
    list(losses.values()), list(expected.values()), rtol=1e-6
  )


def test_no_update_is_missing_in_the_log(
  trained: tuple[Config, pathlib.Path], tmp_path: pathlib.Path
) -> None:
  """Each line is the mean of all updates since the one before it.

  A checkpoint's step has a line, so that a killed run loses none either.
  """
  config, every_step = copy.deepcopy(trained[0]), _losses(trained[1])
  config.train.log_every = 5
  workdir = tmp_path / "run"
  killed = run_training(config, workdir, 8, signal.SIGKILL)
  assert killed.returncode == -signal.SIGKILL, killed.stderr
  assert loop.train(config, workdir)
  losses = _losses(workdir)
  steps = [0, 3, 5, 6, 8, 9, 10, 12, 15, 16, 18, 20, 21, 24]
  assert sorted(losses) == steps[1:]
  for before, step in itertools.pairwise(steps):
    mean = np.mean([every_step[n] for n in range(before + 1, step + 1)])
    assert losses[step] == pytest.approx(mean, rel=1e-5), step


@pytest.mark.parametrize(
  ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)]
)
def test_interrupt_saves_and_says_how_to_resume(
  trained: tuple[Config, pathlib.Path],
  tmp_path: pathlib.Path,
  number: int,
  status: int,
) -> None:
  """Schedulers may send SIGTERM twice, the second during the save."""
  config, _ = trained
  workdir = tmp_path / "run"
  interrupted = run_training(config, workdir, 5, number)
  assert interrupted.returncode == status, interrupted.stderr
  said = " ".join(interrupted.stdout.split())
  assert "Stopped and saved at step" in said
  assert "empdg train" in said
  checkpoints = checkpoint.Checkpoints(workdir)
  assert checkpoints.step(checkpoint.LATEST) in (5, 6)


def test_nothing_compiles_after_each_shapes_first_batch(
  config: Config, tmp_path: pathlib.Path
) -> None:
  """JAX's own monitoring event counts the compilations before each step."""
  compiled: list[str] = []
  steps: list[tuple[int, int]] = []

  def listen(event: str, seconds: float, **kwargs: object) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
      compiled.append(str(kwargs))

  class Writer(train_log.MetricWriter):
    def write(self, step: int, phase: str, values: dict[str, float]) -> None:
      steps.append((step, len(compiled)))
      super().write(step, phase, values)

  jax.monitoring.register_event_duration_secs_listener(listen)
  config = _short(config)
  config.train.mle_steps, config.train.log_every = 60, 30
  config.train.mle_eval_every = config.train.checkpoint_every = 30
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train_log, "MetricWriter", Writer)
    loop.train(config, tmp_path / "run")
  # Both shapes and the first validation occur in the first half.
  warm = {count for step, count in steps if step == 30}
  assert compiled
  assert steps[-1][1] == max(warm), "something was compiled after warm-up"


def test_early_stop_keeps_the_best(
  config: Config, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  perplexities = iter([9.0, 8.0, 8.5, 8.1, 8.0, 7.0])

  def validate(*args: object) -> dict[str, float]:
    return {
      "perplexity": next(perplexities),
      "perplexity_per_example": 1.0,
      "emotion_accuracy": 0.5,
    }

  monkeypatch.setattr(validation, "validate", validate)
  config = _short(config)
  config.train.mle_steps, config.train.mle_eval_every = 100, 2
  assert loop.train(config, tmp_path / "run")
  checkpoints = checkpoint.Checkpoints(tmp_path / "run")
  assert checkpoints.step(checkpoint.BEST) == 4
  assert (
    checkpoints.step(checkpoint.LATEST) == 10
  )  # After 3 that are no better.


def test_refuses_another_configuration(
  trained: tuple[Config, pathlib.Path],
) -> None:
  config, workdir = trained
  before = (workdir / "config.json").read_bytes()
  other = copy.deepcopy(config)
  other.train.profile_steps = "1:2"  # A resumed run may differ in this.
  run_folder.check_same_config(workdir, other)
  other.train.seed = 7
  with pytest.raises(InputError, match=r"config\.train\.seed=0, not 7"):
    loop.train(other, workdir)
  assert (workdir / "config.json").read_bytes() == before


def test_refuses_checkpoints_of_other_shapes(
  trained: tuple[Config, pathlib.Path], tmp_path: pathlib.Path
) -> None:
  config, workdir = trained
  other = copy.deepcopy(config)
  other.model.filter_size = 14
  copied = tmp_path / "run"
  subprocess.run(["cp", "-r", workdir, copied], check=True)
  (copied / "config.json").write_text(config_lib.to_json(other))
  with pytest.raises(InputError, match="needs"):
    loop.train(other, copied)


def test_refuses_a_run_without_a_whole_checkpoint(
  trained: tuple[Config, pathlib.Path],
  tmp_path: pathlib.Path,
  capsys: pytest.CaptureFixture[str],
) -> None:
  copied = shutil.copytree(trained[1], tmp_path / "run")
  latest = copied / "checkpoints" / "latest"
  steps = sorted(latest.iterdir())
  assert len(steps) == 3
  for step in steps:
    damage(step / "params")
  said = refused(capsys, "train", f"--workdir={copied}")
  assert said.startswith(f"empdg: {latest}/24: damaged")
  assert sorted(latest.iterdir()) == steps


def test_refuses_checkpoints_of_an_unknown_run(
  config: Config, tmp_path: pathlib.Path
) -> None:
  (tmp_path / "checkpoints").mkdir()
  with pytest.raises(InputError, match=r"no config\.json"):
    loop.train(config, tmp_path)


def test_refuses_unwritable_workdir(
  config: Config, tmp_path: pathlib.Path
) -> None:
  (tmp_path / "file").write_text("")
  with pytest.raises(InputError, match="cannot write"):
    loop.train(config, tmp_path / "file" / "run")


def test_a_full_disk_ends_training_with_one_line(
  config: Config, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Orbax's background writer fails as on a full disk."""

  def fail(*args: object, **kwargs: object) -> None:
    raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

  monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "save", fail)
  with pytest.raises(SaveError, match="No space left") as error:
    loop.train(_short(config), tmp_path / "run")
  assert "\n" not in str(error.value)


def test_a_disk_that_cannot_be_read_is_no_bad_input(
  trained: tuple[Config, pathlib.Path], monkeypatch: pytest.MonkeyPatch
) -> None:
  def fail(*args: object, **kwargs: object) -> None:
    raise OSError(5, "Input/output error")

  monkeypatch.setattr(checkpoint.ocp.Checkpointer, "restore", fail)
  with pytest.raises(SaveError, match=r"latest/24: cannot read .*Input/output"):
    loop.train(*trained)


def test_refuses_a_batch_that_does_not_divide(
  config: Config, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(loop.jax, "device_count", lambda: 3)
  with pytest.raises(
    InputError, match=r"config\.train\.batch_size=8 .* nearest .* is 9"
  ):
    loop.train(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_a_writer_in_a_bucket_closes_with_all_its_lines(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr("empdg_jax.storage.in_bucket", lambda path: True)
  writer = MetricWriter(tmp_path, 0, "mle")
  writer.write(1, "mle", {"train/loss": 2.0})
  writer.close()
  assert _losses(tmp_path) == {1: 2.0}
  assert list((tmp_path / "tensorboard").iterdir())
