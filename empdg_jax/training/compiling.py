"""Compiling of a phase's steps side by side, ahead of their first batches."""

import concurrent.futures
import os
from collections.abc import Callable, Hashable, Mapping

import jax

THREADS = "compile"  # How the names of the threads begin.
# Each program takes some 300 MB while it is compiled, and a container may have
# fewer cores than its machine.
_MOST_THREADS = 8


class Compiler:
  """Compiles programs in threads, while the caller runs those that are ready.

  XLA compiles one program on few cores, so several at a time are faster.
  """

  def __init__(self, programs: Mapping[Hashable, Callable[[], None]]) -> None:
    """Begins to compile.

    Args:
      programs: By key, functions that compile a program each, in the order in
        which they will be needed.
    """
    # The caller compiles as well. Several processes must run the same programs
    # in the same order, so there each is compiled when all of them need it.
    threads = min(_MOST_THREADS, (os.cpu_count() or 1) - 1)
    if jax.process_count() > 1:
      threads = 0
    self._pool = concurrent.futures.ThreadPoolExecutor(max(1, threads), THREADS)
    self._futures = {
      key: self._pool.submit(compile_one)
      for key, compile_one in (programs.items() if threads else ())
    }
    self._total, self._callers = len(programs), 0

  def wait(self, key: Hashable, say: Callable[[str], None]) -> None:
    """Returns once a program is compiled, or is the caller's to compile.

    Args:
      key: The program; each is waited for once.
      say: Called with its number, if it is not ready yet.

    Raises:
      Exception: What compiling it raised.
    """
    future = self._futures.get(key)
    mine = future is None or future.cancel()
    ready = sum(f.done() and not f.cancelled() for f in self._futures.values())
    if mine or not future.done():
      number = ready + self._callers + 1
      say(f"step {number} of {max(number, self._total)}")
    if mine:
      self._callers += 1
    else:
      future.result()

  def close(self) -> None:
    """Begins no further program."""
    self._pool.shutdown(wait=False, cancel_futures=True)
