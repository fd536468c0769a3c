"""Steps that are compiled ahead, in threads."""

import os
import threading
from collections.abc import Callable
from typing import Any

import jax
import pytest

from empdg_jax.config import Config
from empdg_jax.data import pipeline
from empdg_jax.data.prepare import Dataset
from empdg_jax.training import calls, compiling
from empdg_jax.training.compiling import Compiler
from empdg_jax.training.learner import Learner


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
  """One thread beside the caller's."""
  monkeypatch.setattr(os, "cpu_count", lambda: 2)


def _start(
  **programs: Callable[[], None],
) -> tuple[Compiler, threading.Event]:
  """Compiles "first", which waits for an event, and then the given programs."""
  begun, may_end = threading.Event(), threading.Event()

  def first() -> None:
    begun.set()
    assert may_end.wait(20)

  compiler = Compiler({"first": first, **programs})
  assert begun.wait(20)
  return compiler, may_end


def test_programs_that_have_not_begun_are_the_callers(two_cores: None) -> None:
  compiled: list[str] = []
  said: list[str] = []
  compiler, may_end = _start(second=lambda: compiled.append("second"))
  compiler.wait("second", said.append)
  assert said == ["step 1 of 2"]
  threading.Timer(0.2, may_end.set).start()
  compiler.wait("first", said.append)  # Waits for it.
  assert may_end.is_set()
  assert said == ["step 1 of 2", "step 2 of 2"]
  # A later epoch may have lengths that the first had not.
  compiler.wait("third", said.append)
  assert said[-1] == "step 3 of 3"
  compiler.close()
  assert not compiled


def test_ready_programs_are_not_announced(two_cores: None) -> None:
  done = threading.Event()
  said: list[str] = []
  compiler, may_end = _start(second=done.set, third=lambda: None)
  may_end.set()
  assert done.wait(20)
  compiler.wait("first", said.append)
  assert not said
  compiler.close()


def test_errors_reach_the_caller(two_cores: None) -> None:
  begun = threading.Event()

  def fail() -> None:
    begun.set()
    raise MemoryError("too large")

  compiler = Compiler({"fails": fail})
  assert begun.wait(20)
  with pytest.raises(MemoryError, match="too large"):
    compiler.wait("fails", print)
  compiler.close()


def test_closing_begins_nothing(two_cores: None) -> None:
  compiled: list[str] = []
  compiler, may_end = _start(second=lambda: compiled.append("second"))
  compiler.close()
  may_end.set()
  for thread in threading.enumerate():
    if thread.name.startswith(compiling.THREADS):
      thread.join(20)
      assert not thread.is_alive()
  assert not compiled


@pytest.mark.parametrize(("cores", "processes"), [(1, 1), (8, 2)])
def test_nothing_is_compiled_ahead(
  monkeypatch: pytest.MonkeyPatch, cores: int, processes: int
) -> None:
  """On one core, and where several processes must agree."""
  monkeypatch.setattr(os, "cpu_count", lambda: cores)
  monkeypatch.setattr(jax, "process_count", lambda: processes)
  compiled: list[str] = []
  said: list[str] = []
  compiler = Compiler({"first": lambda: compiled.append("first")})
  compiler.wait("first", said.append)
  compiler.close()
  assert not compiled
  assert said == ["step 1 of 1"]


def test_a_step_takes_what_was_compiled_ahead(
  config: Config, sample_dataset: Dataset
) -> None:
  """JAX's monitoring names the thread that compiles."""
  learner = Learner(config, sample_dataset, None)
  learner.start()
  encoded = sample_dataset.encoded("train")
  batch = next(
    pipeline.train_batches(
      encoded,
      sample_dataset.shapes,
      batch_size=config.train.batch_size,
      seed=0,
    )
  )
  blank = pipeline.blank_batch(
    pipeline.shape_of(batch), config.train.batch_size
  )
  events: list[str] = []

  def listen(event: str, _: float, **__: Any) -> None:
    if event.startswith("/jax/core/compile/"):
      events.append(threading.current_thread().name)

  compile_step = learner.compile_ahead()
  inputs = calls.stack((batch,), 1)
  ahead = threading.Thread(
    target=compile_step, args=(learner.mle, calls.stack((blank,), 1))
  )
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    ahead.start()
    ahead.join()
    assert set(events) == {ahead.name}
    taken = [
      learner.take(learner.mle, calls.Call((batch,), inputs, None))
      for _ in range(2)
    ]
    assert set(events) == {ahead.name}
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert taken[0][0].sums["examples"] == batch.mask.sum()
