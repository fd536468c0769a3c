"""Several hosts: joining, refusing and failing together."""

import contextlib
import hashlib
import os
import pathlib
import secrets
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from empdg_jax import config as config_lib
from empdg_jax import storage
from empdg_jax.config import InputError

INITIALIZATION_SECONDS = 120  # The hosts of a pod do not start all at once.
SHARED_SECONDS = 60  # For a new folder to be seen by all hosts.
_HEARTBEAT_SECONDS = 60  # After which a silent host counts as lost.
_LEAVE_SECONDS = 10  # For all hosts to refuse what is given.


def initialize(
  coordinator_address: str,
  num_processes: int | None,
  process_id: int | None,
  *,
  preemptible: bool = False,
) -> None:
  """Joins the processes of all hosts; before anything else is done with JAX.

  Args:
    coordinator_address: `host:port` of process 0, or `"auto"` where the cluster
      tells JAX of it (TPU pods, Slurm, Kubernetes); `""` for a single process.
    num_processes: How many there are, with an address.
    process_id: Which of them this is, with an address.
    preemptible: Whether SIGTERM is to be asked for by `preempted`; else it ends
      the process.

  Raises:
    InputError: The flags do not fit each other, or nobody answers.
  """
  numbers = num_processes, process_id
  if not coordinator_address or coordinator_address == "auto":
    if numbers != (None, None):
      raise InputError(
        "--num_processes and --process_id belong to a --coordinator_address"
      )
    if not coordinator_address:
      return
    arguments: dict[str, Any] = {}
  else:
    if num_processes is None or process_id is None:
      raise InputError(
        f"--coordinator_address={coordinator_address} needs --num_processes "
        "and --process_id as well"
      )
    if not 0 <= process_id < num_processes:
      raise InputError(
        f"--process_id={process_id}: expected 0 to {num_processes - 1}"
      )
    arguments = {
      "coordinator_address": coordinator_address,
      "num_processes": num_processes,
      "process_id": process_id,
    }
  jax.config.update("jax_enable_preemption_service", preemptible)
  # JAX aborts the process, without a message for people, when its own time is
  # up: this one comes before.
  timer = threading.Timer(
    INITIALIZATION_SECONDS, _give_up, [coordinator_address]
  )
  timer.daemon = True
  timer.start()
  try:
    jax.distributed.initialize(
      **arguments,
      initialization_timeout=2 * INITIALIZATION_SECONDS,
      heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
    )
  except (RuntimeError, ValueError) as error:
    raise InputError(
      f"--coordinator_address={coordinator_address}: the hosts cannot meet "
      f"({error})"
    ) from error
  finally:
    timer.cancel()


def _give_up(coordinator_address: str) -> None:
  """Ends the process while it waits for others that do not come."""
  print(
    f"empdg: --coordinator_address={coordinator_address}: the hosts have not "
    f"met within {INITIALIZATION_SECONDS} s; is process 0 running there, are "
    "all --num_processes started, and is the port open?",
    file=sys.stderr,
    flush=True,
  )
  os._exit(config_lib.BAD_INPUT)


@contextlib.contextmanager
def ending_together() -> Generator[None]:
  """Ends this process at once if what is done with other hosts fails.

  Nothing that waits for all hosts, such as a checkpoint or the usual end of a
  process, would ever end.
  """
  try:
    yield
  except BaseException as error:
    if not jax.distributed.is_initialized():
      raise
    _leave(error)


def _leave(error: BaseException) -> NoReturn:
  """Says what is wrong, and ends one of several processes."""
  status = config_lib.FAILED
  reason = " ".join(str(error).split()) or repr(error)
  if isinstance(error, InputError):
    status = config_lib.BAD_INPUT
  elif isinstance(error, KeyboardInterrupt):
    status, reason = config_lib.INTERRUPTED, "interrupted"
  else:
    if not isinstance(error, jax.errors.JaxRuntimeError | OSError):
      traceback.print_exception(error)
    reason = (
      f"this host failed, or another host is lost ({reason[:200]}); start all "
      "of them again with the same command: training goes on from its latest "
      "checkpoint"
    )
  print(f"empdg: {reason}", file=sys.stderr, flush=True)
  sys.stdout.flush()
  if status == config_lib.BAD_INPUT:
    # If the others refuse it as well, they must not lose this host before they
    # have said so.
    timer = threading.Timer(_LEAVE_SECONDS, os._exit, [status])
    timer.daemon = True
    timer.start()
    jax.distributed.shutdown()
  os._exit(status)


@contextlib.contextmanager
def refusing_together() -> Generator[None]:
  """Has all hosts refuse what one of them refuses.

  Inside, no host may wait for another, so that all come to the end.

  Raises:
    InputError: On all hosts, if one of them raised it inside.
  """
  refusal = None
  try:
    yield
  except InputError as error:
    refusal = error
  if jax.process_count() > 1:
    said = np.zeros(512, np.uint8)
    words = str(refusal or "").encode()[: said.size]
    said[: len(words)] = np.frombuffer(words, np.uint8)
    for process, line in enumerate(multihost_utils.process_allgather(said)):
      message = line.tobytes().rstrip(b"\0").decode(errors="ignore")
      if message and refusal is None:
        refusal = InputError(f"process {process}: {message}")
  if refusal is not None:
    raise refusal


def check_shared(folder: pathlib.Path, flag: str) -> None:
  """Raises InputError unless all hosts see the same folder."""
  if jax.process_count() == 1:
    return
  name = multihost_utils.broadcast_one_to_all(np.uint32(secrets.randbits(32)))
  file = folder / f".seen-by-all-{name:08x}"
  with refusing_together():
    if is_main_process():
      what = f"--{flag}={folder}: cannot write"
      with storage.errors(what, InputError):
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text("")
  try:
    with refusing_together():
      what = f"--{flag}={folder}: cannot read"
      with storage.errors(what, InputError):
        # Some network disks look for what was not there only after a while.
        deadline = time.monotonic() + SHARED_SECONDS
        while not (seen := file.exists()) and time.monotonic() < deadline:
          time.sleep(1)
        if not seen:
          raise InputError(
            f"--{flag}={folder}: the hosts do not share it: process "
            f"{jax.process_index()} does not see what process 0 writes there; "
            "give a bucket (gs://...) or a folder on a shared disk"
          )
  finally:
    if is_main_process():
      file.unlink(missing_ok=True)


def is_main_process() -> bool:
  """Returns whether this process writes what is written once."""
  return jax.process_index() == 0


def check_same(value: Callable[[], str], what: str) -> None:
  """Raises InputError unless all processes have the same value.

  Args:
    value: Returns it; not called if there is one process.
    what: What it tells of, for the message.
  """
  if jax.process_count() == 1:
    return
  digest = hashlib.sha256(value().encode()).digest()[:8]
  ours = np.frombuffer(digest, np.uint32)
  all_of_them = multihost_utils.process_allgather(ours)
  if not np.array_equal(all_of_them, np.broadcast_to(ours, all_of_them.shape)):
    raise InputError(
      f"the hosts have different {what}; start all with the same command on "
      "the same data"
    )


def preempted(steps: range) -> bool:
  """Returns whether the hosts should save and stop, all at the same step.

  The hosts agree on the step behind the latest that any of them has asked with,
  and learn of it only when they ask with that very number: none may be left
  out, though several are taken at once.

  Args:
    steps: What has been taken since the last call.
  """
  return jax.process_count() > 1 and any(
    [multihost_utils.reached_preemption_sync_point(step) for step in steps]
  )
