"""Calls of a step: their batches, read and put on the devices ahead."""

import collections
import concurrent.futures
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from empdg_jax.config import Config
from empdg_jax.data.pipeline import Batch, Shape, shape_of
from empdg_jax.parallel import devices

MAX_STEPS = 16
_AHEAD = 2  # Calls that are read while another is computed.


def steps_per_call(config: Config) -> int:
  """Returns `config.train.steps_per_call`, with 0 decided for the devices."""
  if config.train.steps_per_call:
    return config.train.steps_per_call
  # On a CPU, a call costs little beside a step.
  most = 1 if jax.default_backend() == "cpu" else MAX_STEPS
  run = config.data.batches_per_run
  return max(n for n in range(1, most + 1) if run % n == 0)


class Call(NamedTuple):
  """One or more batches of one shape for one call of a step.

  Attributes:
    batches: This host's rows of each batch.
    inputs: The step's arguments that come from them, on the devices; see
      `stack`.
    position: The position of the input pipeline after the last of them.
  """

  batches: tuple[Batch, ...]
  inputs: tuple[Any, ...]
  position: Any

  @property
  def shape(self) -> Shape:
    """The padded lengths."""
    return shape_of(self.batches[0])


def stack(batches: tuple[Batch, ...], steps: int) -> tuple[Any, ...]:
  """Puts batches of one shape on the devices.

  Args:
    batches: This host's rows of each batch.
    steps: The most steps of a call.

  Returns:
    For 1, the batch, `[devices, rows, ...]`. For more, the batches with filling
    behind the last, `[devices, steps, rows, ...]`, and their number.
  """
  if steps == 1:
    return (devices.put(devices.shard(batches[0])),)
  # Always as many, since another number would be another program.
  filling = batches[-1:] * (steps - len(batches))
  sharded = map(devices.shard, batches + filling)
  stacked = jax.tree.map(lambda *x: np.stack(x, axis=1), *sharded)
  return devices.put(stacked), devices.replicate(np.int32(len(batches)))


class CallReader:
  """An iterator over calls, which a thread reads ahead."""

  def __init__(
    self, batches: Any, steps: int, until_due: Callable[[int], int]
  ) -> None:
    """Begins to read.

    Args:
      batches: The input pipeline; see `pipeline.train_batches`.
      steps: The most steps of a call.
      until_due: Returns the number of batches that the next call may take at
        most, at least 1, given the number taken before.
    """
    self._batches, self._steps, self._until_due = batches, steps, until_due
    self._taken = 0
    # A batch already read that no call has taken, with the position after it.
    self._next: tuple[Batch, Any] | None = None
    # A single thread, for the order; only it touches the pipeline.
    self._thread = concurrent.futures.ThreadPoolExecutor(1, "batches")
    self._calls = collections.deque(
      self._thread.submit(self._read) for _ in range(_AHEAD)
    )

  def __iter__(self) -> Self:
    """Returns itself."""
    return self

  def __next__(self) -> Call:
    """Returns the next call; raises what reading it raised."""
    call = self._calls.popleft().result()
    self._calls.append(self._thread.submit(self._read))
    return call

  def close(self) -> None:
    """Ends the thread."""
    self._thread.shutdown(cancel_futures=True)

  def _read(self) -> Call:
    most = min(self._steps, self._until_due(self._taken))
    taken: list[tuple[Batch, Any]] = []
    while len(taken) < most:
      if self._next is None:
        self._next = next(self._batches), self._batches.get_state()
      if taken and shape_of(self._next[0]) != shape_of(taken[0][0]):
        break
      taken.append(self._next)
      self._next = None
    self._taken += len(taken)
    batches = tuple(batch for batch, _ in taken)
    return Call(batches, stack(batches, self._steps), taken[-1][1])


class CallSums:
  """The metric sums of a call's updates, on the devices until asked for."""

  def __init__(self, sums: dict[str, jax.Array]) -> None:
    """Takes replicated sums, scalars or `[steps]`."""
    self._sums = sums

  @functools.cached_property
  def numbers(self) -> list[dict[str, float]]:
    """The sums of each update; waits for the devices."""
    sums = devices.unreplicate(self._sums)
    columns = [np.atleast_1d(value).tolist() for value in sums.values()]
    return [
      dict(zip(sums, row, strict=True)) for row in zip(*columns, strict=True)
    ]
