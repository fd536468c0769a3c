"""Traces of some steps, and the devices' wait for batches."""

import itertools
import math
import pathlib
import tempfile
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest

from empdg_jax import config as config_lib
from empdg_jax.config import Config, InputError
from empdg_jax.training import loop
from empdg_jax.training.profiling import InputWait, Trace


def test_a_trace_holds_the_steps_between(tmp_path: pathlib.Path) -> None:
  trace = Trace((2, 4), tmp_path)
  step = jax.jit(jnp.sin)
  ended = []
  for done in range(6):
    with trace.before(done):
      result = step(jnp.ones(8))
    ended.append(trace.after(done + 1, result))
  assert trace.close() is None
  assert [folder is not None for folder in ended] == [
    False, False, False, True, False, False,
  ]  # fmt: skip
  (found,) = (tmp_path / "plugins" / "profile").glob("*/*.xplane.pb")
  assert found.parent == ended[3]
  data = jax.profiler.ProfileData.from_file(str(found))
  steps = [
    dict(event.stats)["step_num"]
    for plane in data.planes
    for line in plane.lines
    for event in line.events
    if event.name == "train"
  ]
  assert steps == [2, 3]


def test_a_run_that_ends_early_keeps_its_trace(tmp_path: pathlib.Path) -> None:
  trace = Trace((0, 100), tmp_path)
  trace.before(0)
  assert trace.after(1, jnp.ones(1)) is None
  assert trace.close() is not None
  assert list(tmp_path.rglob("*.xplane.pb"))
  trace.before(1)  # It does not begin again.
  assert trace.close() is None


def test_rounds_of_several_steps() -> None:
  """Rounds that overlap the range are traced, wherever they begin."""
  with tempfile.TemporaryDirectory() as folder:
    trace = Trace((97, 103), pathlib.Path(folder))
    ended = []
    for done in range(84, 114, 6):
      trace.before(done, ahead=6)
      ended.append(trace.after(done + 6, jnp.ones(1)) is not None)
  assert ended == [False, False, False, True, False]


@pytest.mark.parametrize(
  ("first", "missed"), [(0, False), (3, False), (4, True), (9, True)]
)
def test_a_trace_that_is_missed(
  tmp_path: pathlib.Path, first: int, missed: bool
) -> None:
  """A run that resumes after the range says so, once."""
  trace = Trace((2, 4), tmp_path)
  assert [trace.missed(first), trace.missed(first)] == [missed, False]
  assert trace.missed(math.inf) == (not missed)  # It has ended before.


def test_training_traces(
  config: Config, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  config.train.batch_size, config.train.mle_steps = 8, 4
  config.train.profile_steps = "2:3"
  loop.train(config, tmp_path / "run")
  said = capsys.readouterr().out
  (found,) = (tmp_path / "run" / "tensorboard").rglob("*.xplane.pb")
  assert f"Profile in {found.parent}" in said
  assert "nothing is traced" not in said
  loop.train(config, tmp_path / "run")
  said = capsys.readouterr().out
  assert "nothing is traced: training goes on from step 4" in said
  config.train.profile_steps = "7:9"
  loop.train(config, tmp_path / "run")
  said = capsys.readouterr().out
  assert "nothing is traced: training has ended at step 4" in said


def test_no_trace(tmp_path: pathlib.Path) -> None:
  trace = Trace(None, tmp_path)
  trace.before(0)
  assert trace.after(1, jnp.ones(1)) is None
  assert not list(tmp_path.iterdir())


class Result:
  """A step's result, computed or still awaited."""

  def __init__(self, ready: bool) -> None:
    self._ready = ready

  def is_ready(self) -> bool:
    return self._ready


def slow_batches() -> Iterator[int]:
  for number in itertools.count():
    time.sleep(0.02)
    yield number


def test_only_idle_devices_wait() -> None:
  wait, batches = InputWait(), slow_batches()
  assert wait.next(batches, None) == 0  # Nothing runs before the first step.
  first = wait.take()
  assert 0.02 <= first < 0.2
  assert wait.next(batches, Result(ready=False)) == 1
  assert wait.take() == 0.0
  wait.next(batches, Result(ready=True))
  wait.next(batches, Result(ready=True))
  assert 0.04 <= wait.take() < 0.4


@pytest.mark.parametrize("steps", ["3", "4:4", "5:4", "a:b", "1:2:3", "-1:3"])
def test_bad_ranges(config: Config, steps: str) -> None:
  config.train.profile_steps = steps
  with pytest.raises(InputError, match="profile_steps"):
    config_lib.validate(config)


def test_a_range(config: Config) -> None:
  config.train.profile_steps = "100:110"
  config_lib.validate(config)
  assert config_lib.profile_range(config.train) == (100, 110)
