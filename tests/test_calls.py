"""Runs of batches, calls of several steps, and the thread that reads ahead."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from dialogues import flat, relative_difference, run_again_on_eight_devices
from encoded import SHAPES, invented

from empdg_jax import config as config_lib
from empdg_jax.config import Config, InputError
from empdg_jax.data import pipeline
from empdg_jax.data.pipeline import BatchPlan
from empdg_jax.training import calls, loop, run_folder
from empdg_jax.training.calls import CallReader
from empdg_jax.training.checkpoint import Checkpoints


def test_runs_of_one_batch_are_the_former_order() -> None:
  """The order as it was before there were runs, spelled out."""
  encoded = invented(150)
  plan = BatchPlan(encoded, SHAPES, 8)
  rng = np.random.default_rng((3, 2))
  batches = plan.epoch(rng.permutation(len(encoded)))
  counts, seen = Counter(shape for shape, _ in batches), Counter()
  times = []
  for shape, _ in batches:
    times.append((seen[shape] + rng.random()) / counts[shape])
    seen[shape] += 1
  former = [batches[i] for i in np.argsort(times, kind="stable")]

  order = plan.shuffled_epoch(3, 2)
  assert [shape for shape, _ in order] == [shape for shape, _ in former]
  for (_, ours), (_, theirs) in zip(order, former, strict=True):
    np.testing.assert_array_equal(ours, theirs)


def test_runs_hold_neighbours_of_one_shape() -> None:
  plan = BatchPlan(invented(300), SHAPES, 8)
  single = plan.shuffled_epoch(1, 0)
  order = plan.shuffled_epoch(1, 0, 4)

  def as_set(batches: list[Any]) -> set[Any]:
    return {(shape, tuple(index)) for shape, index in batches}

  assert as_set(order) == as_set(single)
  assert len(order) == len(single) == plan.batches_per_epoch
  counts = Counter(shape for shape, _ in order)
  # Every shape changes at most once a run.
  changes = 1 + sum(
    a[0] != b[0] for a, b in zip(order[:-1], order[1:], strict=True)
  )
  assert changes <= sum(-(-count // 4) for count in counts.values())
  assert len(counts) > 1


def test_bad_steps_per_call(config: Config) -> None:
  config.data.batches_per_run, config.train.steps_per_call = 6, 4
  with pytest.raises(
    InputError, match=r"steps_per_call=4: .*batches_per_run=6, or 0"
  ):
    config_lib.validate(config)
  config.train.steps_per_call = 3
  config_lib.validate(config)


def test_old_runs_have_runs_of_one_batch(config: Config) -> None:
  config.data.batches_per_run = 16
  values = json.loads(config_lib.to_json(config))
  del values["data"]["batches_per_run"], values["train"]["steps_per_call"]
  old = config_lib.from_json(json.dumps(values), "old")
  assert old.data.batches_per_run == 1


@pytest.mark.parametrize(
  ("run", "platform", "steps"),
  [(1, "gpu", 1), (16, "gpu", 16), (24, "tpu", 12), (64, "gpu", 16)]
  + [(16, "cpu", 1)],
)
def test_automatic_steps_per_call(
  config: Config,
  monkeypatch: pytest.MonkeyPatch,
  run: int,
  platform: str,
  steps: int,
) -> None:
  monkeypatch.setattr(calls.jax, "default_backend", lambda: platform)
  config.data.batches_per_run = run
  assert calls.steps_per_call(config) == steps
  config.train.steps_per_call = 2
  assert calls.steps_per_call(config) == 2


class Pipeline:
  """Five batches of one shape, four of another, then an error."""

  def __init__(self) -> None:
    self._read, self._encoded = 0, invented(60)

  def __next__(self) -> pipeline.Batch:
    if self._read == 9:
      raise OSError("the disk is gone")
    shape = SHAPES[-1] if self._read < 5 else SHAPES[-1]._replace(target=20)
    first, self._read = self._read, self._read + 1
    return pipeline.collate(self._encoded, np.arange(first, 60), shape, 8)

  def get_state(self) -> int:
    return self._read


def test_the_reader_cuts_calls_and_counts_what_was_taken() -> None:
  """No call mixes shapes or passes what is due at 3 batches."""
  reader = CallReader(Pipeline(), 4, lambda taken: 3 - taken % 3)
  read = [next(reader) for _ in range(4)]
  assert [len(call.batches) for call in read] == [3, 2, 1, 3]
  # Of the last batch of the call, though others have been read since.
  assert [call.position for call in read] == [3, 5, 6, 9]
  batches, count = read[1].inputs
  devices = jax.local_device_count()
  assert batches.mask.shape == (devices, 4, 8 // devices)
  assert int(count) == 2
  index = np.asarray(batches.index).swapaxes(0, 1).reshape(4, 8)
  np.testing.assert_array_equal(index[:, 0], [3, 4, 4, 4])
  with pytest.raises(OSError, match="the disk is gone"):
    next(reader)
  reader.close()


def _train(
  config: Config, workdir: Path, steps: int
) -> tuple[list[Any], np.ndarray, dict[str, Any]]:
  """Takes 12 steps; lines, checkpoints and validations cut calls short.

  Returns:
    What it logged, but times, and the last parameters and progress.
  """
  train, saved = config.train, {}
  config.data.batches_per_run, train.steps_per_call = 4, steps
  train.mle_steps, train.mle_eval_every = 12, 6
  train.checkpoint_every, train.log_every = 5, 4
  write = Checkpoints.save

  def save(self: Checkpoints, kind: str, step: int, *rest: Any) -> None:
    saved[step] = rest
    write(self, kind, step, *rest)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Checkpoints, "save", save)
    assert loop.train(config, workdir)
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  times = ("train/examples_per_second", "train/input_wait")
  logged = [v for v in map(json.loads, lines) if v["name"] not in times]
  assert sorted(saved) == [5, 6, 10, 12]
  states, progress = saved[12]
  return logged, flat(states["generator"].params), progress


def test_calls_of_several_steps_change_no_number(
  config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
  """Nor what is logged, nor where a run that is resumed goes on."""
  one = _train(config, tmp_path / "one", 1)
  said = capsys.readouterr().out
  four = _train(config, tmp_path / "four", 4)
  for name in ("step", "phase", "name"):
    assert [v[name] for v in four[0]] == [v[name] for v in one[0]]
  np.testing.assert_allclose(
    *([v["value"] for v in run[0]] for run in (four, one)), rtol=1e-5
  )
  assert relative_difference(four[1], one[1]) <= 1e-6
  assert four[2]["data"] == one[2]["data"]
  assert "Compiling step 1 of 2, for " in said
  # A resumed run may take another number of steps a call.
  run_folder.check_same_config(tmp_path / "one", config)
  config.data.batches_per_run = 8
  with pytest.raises(InputError, match=r"data\.batches_per_run=4, not 8"):
    run_folder.check_same_config(tmp_path / "one", config)


@pytest.mark.slow
def test_all_of_these_on_eight_devices() -> None:
  """The other tests again, in a process with 8 devices."""
  run_again_on_eight_devices(__file__, "several_steps or reader")
