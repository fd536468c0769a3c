"""Several hosts: joining, refusing and failing together."""

import contextlib
import ctypes
import errno
import hashlib
import os
import pathlib
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import distributed  # For the address that a cluster tells.
from jax.experimental import multihost_utils

from empdg_jax import config as config_lib
from empdg_jax import storage
from empdg_jax.config import InputError
from empdg_jax.data import pipeline

INITIALIZATION_SECONDS = 120  # The hosts of a pod do not start all at once.
SHARED_SECONDS = 60  # The longest wait until all hosts see a new file.
_LEAVE_SECONDS = 10  # The longest wait until all hosts have refused an input.
_CONNECT_SECONDS = 10  # The longest wait for a port that does not answer.
_RESTART = (
  "start all of them again with the same command: training goes on from its "
  "latest checkpoint"
)


def initialize(
  coordinator_address: str,
  num_processes: int | None,
  process_id: int | None,
  *,
  preemptible: bool = False,
  heartbeat_seconds: int = config_lib.TrainConfig.heartbeat_seconds,
) -> None:
  """Joins the processes of all hosts; comes before any other use of JAX.

  Args:
    coordinator_address: `host:port` of process 0, or `"auto"` where the cluster
      tells JAX the address (TPU pods, Slurm, Kubernetes); `""` for a single
      process.
    num_processes: The number of processes, with an address.
    process_id: The number of this process, with an address.
    preemptible: Whether the caller asks `preempted` for SIGTERM; otherwise
      SIGTERM ends the process.
    heartbeat_seconds: How long a host may be silent before it counts as lost.

  Raises:
    InputError: The flags do not fit each other, or the hosts cannot meet.
  """
  explicit = coordinator_address not in ("", "auto")
  if not explicit and (num_processes, process_id) != (None, None):
    raise InputError(
      "--num_processes and --process_id belong to a --coordinator_address"
    )
  if not coordinator_address:
    return
  if explicit:
    if num_processes is None or process_id is None:
      raise InputError(
        f"--coordinator_address={coordinator_address} needs --num_processes "
        "and --process_id as well"
      )
    if not 0 <= process_id < num_processes:
      raise InputError(
        f"--process_id={process_id}: expected 0 to {num_processes - 1}"
      )
    if process_id == 0:
      _check_port_is_free(coordinator_address)
  jax.config.update("jax_enable_preemption_service", preemptible)
  # When JAX's own time is up, it aborts the process without a message for
  # people. This timer ends it first, and JAX waits twice as long.
  timer = _start_timer(INITIALIZATION_SECONDS, _give_up, coordinator_address)
  try:
    jax.distributed.initialize(
      coordinator_address if explicit else None,
      num_processes,
      process_id,
      initialization_timeout=2 * INITIALIZATION_SECONDS,
      heartbeat_timeout_seconds=heartbeat_seconds,
    )
  except (RuntimeError, ValueError) as error:
    if "different incarnation" in str(error):
      taken = distributed.global_state.process_id
      raise InputError(
        f"--process_id={taken}: id {taken} is taken: another process with it "
        f"has joined at {coordinator_address}; give each process its own"
      ) from error
    raise InputError(
      f"--coordinator_address={coordinator_address}: the hosts cannot meet "
      f"({error})"
    ) from error
  finally:
    timer.cancel()
  _catch_aborts()


def _catch_aborts() -> None:
  """Ends this process with our line and status 1 where JAX would abort it."""
  # JAX aborts, from a thread in C++, as soon as it misses another host. Its own
  # hook for that cannot be called from Python (its status has no Python type),
  # and a handler of the `signal` module would run too late.
  ctypes.CDLL(None).signal(signal.SIGABRT, _ABORT_HANDLER)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _ABORT_HANDLER(_: int) -> None:
  if not _in_agents_thread():
    return  # Something else has failed; the abort goes on.
  line = f"empdg: another host is lost (see above); {_RESTART}\n"
  os.write(2, line.encode())
  os._exit(config_lib.FAILED)


def _in_agents_thread() -> bool:
  """Returns whether this may be the thread in which JAX misses a host."""
  # JAX starts that thread without a name, so that it has the process's. XLA
  # works in Python's own threads and in threads with names.
  if threading.get_native_id() in {t.native_id for t in threading.enumerate()}:
    return False
  try:
    return (
      pathlib.Path("/proc/thread-self/comm").read_bytes()
      == pathlib.Path("/proc/self/comm").read_bytes()
    )
  except OSError:
    return True  # Where Linux is not.


def _check_port_is_free(address: str) -> None:
  """Raises InputError if another process listens on process 0's port."""
  port = address.rpartition(":")[2]
  if not port.isdecimal() or int(port) > 65535:
    raise InputError(f"--coordinator_address={address}: expected HOST:PORT")
  with socket.socket(socket.AF_INET6 if socket.has_ipv6 else 2) as listener:
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      listener.bind(("", int(port)))
    except OSError as error:
      if error.errno != errno.EADDRINUSE:
        return  # JAX may know better, as without IPv6.
      raise InputError(
        f"--process_id=0: id 0 is taken: port {port} of this machine is in "
        "use, by a process 0 that already runs or by another program; end it, "
        "or give each process its own id, or another port"
      ) from error


def _why_not_met(address: str | None) -> str:
  """Returns why the hosts have not met at the address of process 0."""
  host, _, port = (address or "").rpartition(":")
  why = ""
  if host and port.isdecimal():
    try:
      socket.create_connection(
        (host.strip("[]"), int(port)), _CONNECT_SECONDS
      ).close()
    except TimeoutError:
      # A machine without this program would refuse the connection, and one
      # that is not there yet would have no name.
      return (
        f"process 0 cannot be reached at {address}: nothing answers, not even "
        "with a refusal; a firewall closes the port, or the machine is off"
      )
    except OSError as error:
      why = f" (at {address}: {error.strerror or error})"
  return (
    f"the hosts have not met within {INITIALIZATION_SECONDS} s{why}; is "
    "process 0 running there, are all --num_processes started, and is the "
    "port open?"
  )


def _start_timer(
  seconds: float, end_process: Callable[..., Any], argument: Any
) -> threading.Timer:
  """Ends the process in some seconds unless the timer is cancelled."""
  # A thread, since the main one hangs in native code, where no exception and no
  # signal handler of Python's reaches it.
  timer = threading.Timer(seconds, end_process, [argument])
  timer.daemon = True
  timer.start()
  return timer


def _give_up(coordinator_address: str) -> None:
  """Ends the process because the other hosts have not come."""
  state = distributed.global_state
  # launch/train.sh looks for "cannot be reached" and "have not met".
  why = _why_not_met(state.coordinator_address if state.process_id else None)
  print(
    f"empdg: --coordinator_address={coordinator_address}: {why}",
    file=sys.stderr,
    flush=True,
  )
  # `sys.exit` would only end the timer's own thread.
  os._exit(config_lib.BAD_INPUT)


@contextlib.contextmanager
def ending_together() -> Generator[None]:
  """Ends this process at once if the block fails on one of several hosts.

  Anything that waits for all hosts, such as a checkpoint or JAX's shutdown at
  the usual end of a process, would hang.
  """
  try:
    yield
  except BaseException as error:
    if not jax.distributed.is_initialized():
      raise
    _leave(error)


def _leave(error: BaseException) -> NoReturn:
  """Reports an error and ends this process, one of several."""
  status = config_lib.FAILED
  reason = " ".join(str(error).split()) or repr(error)
  if isinstance(error, InputError):
    status = config_lib.BAD_INPUT
  elif isinstance(error, KeyboardInterrupt):
    status, reason = config_lib.INTERRUPTED, "interrupted"
  else:
    # A lost host shows as one of these, in whatever call waited for it: its
    # traceback would mislead.
    if not isinstance(error, jax.errors.JaxRuntimeError | OSError):
      traceback.print_exception(error)
    reason = (
      f"this host failed, or another host is lost ({reason[:200]}); {_RESTART}"
    )
  reason = config_lib.printable(reason)
  print(f"empdg: {reason}", file=sys.stderr, flush=True)
  sys.stdout.flush()
  if status == config_lib.BAD_INPUT:
    # The others usually refuse the same input. A host that left before they
    # have said so would be lost to them, and JAX would abort them. Shutdown
    # waits for all hosts; the timer, for the case that they never come.
    _start_timer(_LEAVE_SECONDS, os._exit, status)
    jax.distributed.shutdown()
  os._exit(status)


@contextlib.contextmanager
def refusing_together() -> Generator[None]:
  """Refuses an input on all hosts if one of them refuses it.

  No host may wait for another inside the block: one that has raised is already
  at its end, and waits there for the others.

  Raises:
    InputError: On all hosts, if the block raised it on one of them.
  """
  refusal = None
  try:
    yield
  except InputError as error:
    refusal = error
  if jax.process_count() > 1:
    # Hosts exchange arrays of one shape, not strings.
    words = str(refusal or "").encode()[:512].ljust(512, b"\0")
    said = np.frombuffer(words, np.uint8)
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
  # A random name, so that no host takes an earlier start's file for this one's.
  name = multihost_utils.broadcast_one_to_all(np.uint32(secrets.randbits(32)))
  file = folder / f".seen-by-all-{name:08x}"
  with refusing_together():
    if is_main_process():
      with storage.errors(f"--{flag}={folder}: cannot write", InputError):
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text("")
  try:
    with (
      refusing_together(),
      storage.errors(f"--{flag}={folder}: cannot read", InputError),
    ):
      # Some network disks cache for a while that a file does not exist.
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


def decided_by_main(value: bool) -> bool:
  """Returns the first host's value on all hosts."""
  if jax.process_count() == 1:
    return value
  return bool(multihost_utils.broadcast_one_to_all(np.bool_(value)))


def is_main_process() -> bool:
  """Returns whether this process writes the files and lines of all hosts."""
  return jax.process_index() == 0


def rows(batch_size: int) -> slice:
  """Returns the rows of a global batch that this host reads."""
  return pipeline.host_rows(
    batch_size, jax.process_index(), jax.process_count()
  )


def check_same(value: Callable[[], str], what: str) -> None:
  """Raises InputError unless all processes have the same value.

  Args:
    value: Returns the value; not called if there is one process.
    what: The plural name of the values, for the message.
  """
  if jax.process_count() == 1:
    return
  digest = hashlib.sha256(value().encode()).digest()[:8]
  ours = np.frombuffer(digest, np.uint32)
  # Gathered rather than compared with one host's: all must raise together.
  if (multihost_utils.process_allgather(ours) != ours).any():
    raise InputError(
      f"the hosts have different {what}; start all with the same command on "
      "the same data"
    )


def preempted(steps: range) -> bool:
  """Returns whether the hosts should save and stop, all at the same step.

  Args:
    steps: The numbers of the steps taken since the last call.
  """
  # At a preemption the hosts agree on the step after the latest that any of
  # them has asked about, and each learns of it only when it asks about that
  # very number. So every number is asked about, in a list: `any` would stop a
  # generator at the first True, and leave out the rest.
  return jax.process_count() > 1 and any(
    [multihost_utils.reached_preemption_sync_point(step) for step in steps]
  )
