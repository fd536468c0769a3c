"""All three phases end to end on the embedded corpus."""

import copy
import json
import math
import pathlib
import signal

import jax
import numpy as np
import pytest
from helpers import run_training

from empdg_jax import config as config_lib
from empdg_jax.config import Config, InputError
from empdg_jax.data.prepare import load_dataset
from empdg_jax.training import (
  checkpoint,
  loop,
  metric_writer,
  run_folder,
  steps,
)
from empdg_jax.training.learner import Learner
from empdg_jax.training.train_state import TrainState

# Updates: 4 of phase 1, 4 of phase 2, 3 rounds of 1 + 2 in phase 3.
_UPDATES = 4 + 4 + 3 * 3


def _three_phases(config: Config) -> Config:
  config = copy.deepcopy(config)
  config.model.name = "empdg"
  config.model.kernel_widths = (1, 2)
  config.data.shapes = (config.data.shapes[-1],)
  config.data.feedback_length = 12
  t = config.train
  t.mle_steps, t.mle_eval_every = 4, 2
  t.discriminator_steps, t.adversarial_rounds = 4, 3
  t.d_steps, t.g_steps, t.adversarial_eval_every = 1, 2, 2
  t.sample_steps, t.log_every, t.checkpoint_every = 4, 1, 2
  return config


def _values(workdir: pathlib.Path) -> dict[tuple[int, str], float]:
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  values = [json.loads(line) for line in lines]
  names = [(v["step"], v["name"]) for v in values]
  assert len(names) == len(set(names)), "a step is logged twice"
  return {
    (v["step"], v["name"]): v["value"]
    for v in values
    if v["name"] not in ("train/examples_per_second", "train/input_wait")
  }


@pytest.fixture(scope="module")
def finished(
  sample_config: Config, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Config, pathlib.Path]:
  """A run of all phases that was never disturbed."""
  config = _three_phases(sample_config)
  workdir = tmp_path_factory.mktemp("phases") / "run"
  assert loop.train(config, workdir)
  return config, workdir


def test_phases_follow_each_other(
  finished: tuple[Config, pathlib.Path],
) -> None:
  _, workdir = finished
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  phases: dict[str, set[int]] = {}
  names: dict[str, set[str]] = {}
  for line in lines:
    value = json.loads(line)
    phases.setdefault(value["phase"], set()).add(value["step"])
    names.setdefault(value["phase"], set()).add(value["name"])
    assert math.isfinite(value["value"])
  assert phases == {
    "mle": {1, 2, 3, 4},
    "discriminator": {5, 6, 7, 8},
    "adversarial": {8, 11, 14, 17},
  }
  of_discriminators = {
    f"discriminator/{name}"
    for name in ("loss", "wasserstein", "gradient_penalty", "gradient_norm")
  }
  assert names["discriminator"] >= of_discriminators
  assert names["adversarial"] >= of_discriminators | {
    "train/loss",
    "train/learning_rate",
    "generator/signal",
    "generator/signal_grad_norm",
    "valid/perplexity",
    "valid/emotion_accuracy",
  }
  values = _values(workdir)
  assert all(
    v > 0 for (_, n), v in values.items() if n == "generator/signal_grad_norm"
  )
  checkpoints = checkpoint.Checkpoints(workdir)
  assert checkpoints.step(checkpoint.LATEST) == _UPDATES
  # A round must improve on phase 1's best, which is validated first.
  assert values[8, "valid/perplexity"] == values[4, "valid/perplexity"]
  accuracies = {s: values[s, "valid/emotion_accuracy"] for s in (8, 14, 17)}
  best = max(accuracies, key=lambda step: accuracies[step])
  assert checkpoints.step(checkpoint.BEST) == best
  # The schedule goes on from phase 1's best generator.
  progress = checkpoints.restore_progress(checkpoint.LATEST)
  assert progress["phase"] == "adversarial"
  assert values[11, "train/learning_rate"] > values[4, "train/learning_rate"]


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", [4, 10])
def test_options_resume(
  with_options: tuple[Config, pathlib.Path],
  tmp_path: pathlib.Path,
  kill_at: int,
) -> None:
  """The averages come back, and no validation is logged twice."""
  config, undisturbed = with_options
  workdir = tmp_path / "run"
  killed = run_training(config, workdir, kill_at, signal.SIGKILL)
  assert killed.returncode == -signal.SIGKILL, killed.stderr
  assert loop.train(config, workdir)
  logged = [
    {
      (entry["step"], entry["phase"], entry["name"]): entry["value"]
      for entry in metric_writer.read_metrics(folder / "metrics.jsonl")
      if entry["name"] not in ("train/examples_per_second", "train/input_wait")
    }
    for folder in (undisturbed, workdir)
  ]
  assert logged[0].keys() == logged[1].keys()
  np.testing.assert_allclose(
    [logged[1][key] for key in logged[0]],
    list(logged[0].values()),
    rtol=1e-5,
    atol=1e-7,
  )


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", [6, 14])
def test_kill_and_resume_in_every_phase(
  finished: tuple[Config, pathlib.Path], tmp_path: pathlib.Path, kill_at: int
) -> None:
  config, undisturbed = finished
  workdir = tmp_path / "run"
  killed = run_training(config, workdir, kill_at, signal.SIGKILL)
  assert killed.returncode == -signal.SIGKILL, killed.stderr
  assert loop.train(config, workdir)
  expected, values = _values(undisturbed), _values(workdir)
  assert values.keys() == expected.keys()
  np.testing.assert_allclose(
    [values[key] for key in expected],
    list(expected.values()),
    rtol=1e-5,
    atol=1e-7,
  )


@pytest.fixture(scope="module")
def with_options(
  sample_config: Config, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Config, pathlib.Path]:
  """A run with the options that have a state of their own."""
  config = _three_phases(sample_config)
  config.model.emotion_pooling = "attention"
  config.model.emotion_dropout, config.model.word_dropout = 0.5, 0.3
  t = config.train
  t.schedule, t.warmup_steps, t.adversarial_learning_rate = "cosine", 2, 1e-3
  t.ema_decay, t.generator_signal_share = 0.5, 0.3
  t.generator_signal, t.gradient_penalty_at = "teacher_forced", "words"
  t.discriminators, t.feedback = "semantic", "shuffled"
  t.discriminator_steps = 0
  t.mle_selection_metric, t.selection_metric = "joint", "last"
  workdir = tmp_path_factory.mktemp("options") / "run"
  assert loop.train(config, workdir)
  return config, workdir


def test_the_average_of_phase_3_is_kept_as_the_best(
  with_options: tuple[Config, pathlib.Path],
) -> None:
  config, workdir = with_options
  trained = run_folder.open_run(workdir)
  learner = Learner(
    config, load_dataset(config.data), np.zeros((len(trained.vocabulary), 16))
  )
  checkpoints = checkpoint.Checkpoints(workdir)
  progress = learner.restore(checkpoints)
  assert progress["updates"] == checkpoints.step(checkpoint.BEST) == 13
  learner.start()
  generator = learner.states()["generator"]
  assert generator.game is not None
  assert np.all(generator.game["norms"] > 0)
  best = learner.states(best=True)["generator"]
  assert best.game is None
  kept = checkpoints.restore_params(checkpoint.BEST, generator.params)
  for ours, theirs, average in zip(
    jax.tree.leaves(generator.params),
    jax.tree.leaves(kept),
    jax.tree.leaves(generator.game["average"]),
    strict=True,
  ):
    np.testing.assert_array_equal(theirs, average)
    assert not np.array_equal(ours, theirs)
  values = [
    entry
    for entry in metric_writer.read_metrics(workdir / "metrics.jsonl")
    if entry["phase"] == "adversarial"
  ]
  rates = [v["value"] for v in values if v["name"] == "train/learning_rate"]
  assert rates
  assert rates == [pytest.approx(1e-3)] * len(rates)


def test_another_runs_generator_begins_phase_2(
  finished: tuple[Config, pathlib.Path], tmp_path: pathlib.Path
) -> None:
  config, workdir = finished
  alone = copy.deepcopy(config)
  alone.model.name = "empdg_wo_d"
  assert loop.train(alone, tmp_path / "mle")
  config = copy.deepcopy(config)
  config.train.mle_checkpoint = str(tmp_path / "mle")
  assert loop.train(config, tmp_path / "run")
  values, expected = _values(tmp_path / "run"), _values(workdir)
  assert {step for step, _ in values} == {1, 2, 3, 4, 7, 10, 13}
  # The same generator, with batches from the start of this run's data.
  name = "train/learning_rate"
  assert values[7, name] == expected[11, name]


def test_refuses_an_mle_checkpoint_that_does_not_fit(
  finished: tuple[Config, pathlib.Path], tmp_path: pathlib.Path
) -> None:
  config, workdir = finished

  def refused(message: str, change: str, value: object) -> None:
    other = copy.deepcopy(config)
    other.train.mle_checkpoint = str(workdir)
    section, field = change.split(".")
    setattr(getattr(other, section), field, value)
    with pytest.raises(InputError, match=message):
      loop.train(other, tmp_path / "run")
    assert not (tmp_path / "run").exists()

  refused(r"config\.model\.emb_dim=16, this one 18", "model.emb_dim", 18)
  refused("vocabulary of .* is not this", "data.vocab_scope", "all")
  refused("no run folder", "train.mle_checkpoint", str(tmp_path / "none"))
  refused("no phase after", "model.name", "empdg_wo_d")
  refused("must divide", "model.kernel_widths", (1, 2, 3))


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("train.g_steps", 0, "more than 0"),
    ("train.gradient_penalty_weight", -0.1, "more than 0"),
    ("train.generator_signal_weight", -1.0, "more than 0"),
    ("train.sample_temperature", 0.0, "more than 0"),
    ("train.generator_signal", "soft", "teacher_forced, constant"),
    ("train.selection_metric", "bleu", "emotion_accuracy"),
    ("model.kernel_widths", (), "widths of at least 1"),
    ("model.kernel_widths", (1, 0), "widths of at least 1"),
  ],
)
def test_refuses_fields(
  config: Config, field: str, value: object, message: str
) -> None:
  section, name = field.split(".")
  setattr(getattr(config, section), name, value)
  with pytest.raises(InputError, match=message) as error:
    config_lib.validate(config)
  assert f"config.{field}" in str(error.value)


def break_steps(monkeypatch: pytest.MonkeyPatch, broken: range) -> None:
  """Makes some of the discriminators' updates overflow, counted from 1."""
  compile_step = steps.compile_step

  def breaking(step: object, **options: object) -> object:
    compiled, calls = compile_step(step, **options), []
    if step is not steps.discriminator_step:
      return compiled

    def run(state: TrainState, *inputs: object) -> object:
      calls.append(1)
      if len(calls) not in broken:
        return compiled(state, *inputs)
      params = jax.tree.map(lambda x: x + 0.0, state.params)
      huge = jax.tree.map(lambda x: x * 1e38, state.params)
      after, sums = compiled(state.replace(params=huge), *inputs)
      return after.replace(params=params), sums

    vars(run)["lower"] = compiled.lower
    return run

  monkeypatch.setattr(steps, "compile_step", breaking)


def test_updates_that_are_not_finite_are_named(
  finished: tuple[Config, pathlib.Path],
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
) -> None:
  """Training goes on; the step, its examples and its batch are kept."""
  config, _ = finished
  break_steps(monkeypatch, range(2, 3))
  assert loop.train(config, tmp_path / "run")
  step = config.train.mle_steps + 2
  output = " ".join(capsys.readouterr().out.split())
  assert f"Warning: step {step} is skipped, not finite: discriminator" in output
  kept = json.loads(
    (tmp_path / "run" / "not_finite" / f"{step}.json").read_text()
  )
  assert kept["player"] == "discriminator"
  assert len(kept["batch"]["context"]) == config.train.batch_size
  counts = [
    entry["value"]
    for entry in metric_writer.read_metrics(tmp_path / "run" / "metrics.jsonl")
    if entry["name"] == "train/skipped_updates"
  ]
  assert counts == [1]


def test_ten_updates_in_a_row_end_training(
  finished: tuple[Config, pathlib.Path],
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """The message names the step and the term; a good state is saved."""
  config = copy.deepcopy(finished[0])
  config.train.log_every, config.train.discriminator_steps = 3, 30
  break_steps(monkeypatch, range(2, 31))
  with pytest.raises(InputError) as error:
    loop.train(config, tmp_path / "run")

  step = config.train.mle_steps + 11
  assert f"step {step}: not finite: discriminator" in str(error.value)
  checkpoints = checkpoint.Checkpoints(tmp_path / "run")
  saved = checkpoints.step(checkpoint.LATEST)
  assert saved is not None
  assert saved >= step
