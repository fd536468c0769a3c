"""The lock of a run folder: one training at a time."""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import pathlib
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from empdg_jax import storage
from empdg_jax.config import InputError, SaveError
from empdg_jax.parallel import hosts

FILE = ".training.lock"
# Shares of `train.lease_seconds`. A holder that misses three renewals has died.
_RENEWAL, _STALE = 1 / 12, 1 / 3
_POLL_SECONDS = 1  # Between two looks at a lock that another training holds.
# What file systems without locks raise.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


class RunLock:
  """The right to train in a run folder, held by the first host alone.

  On a disk, an operating system's lock, which even a killed process gives up at
  once. A bucket has no locks: there a lease, a file that its holder renews, and
  that counts as given up once it no longer changes.
  """

  def __init__(self, workdir: pathlib.Path, seconds: int) -> None:
    """Takes nothing yet.

    Args:
      workdir: The run folder.
      seconds: The longest wait for another training to end.
    """
    self._workdir, self._seconds = workdir, seconds
    self._path = workdir / FILE
    self._use_lease = storage.in_bucket(workdir)
    self._descriptor: int | None = None
    self._ours = {
      "host": socket.gethostname(),
      "process": os.getpid(),
      "since": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M:%S} UTC",
      "stale_seconds": seconds * _STALE,
      "token": secrets.token_hex(8),
      "renewals": 0,
    }
    # The other training's lease, and when it was last seen to change.
    self._theirs: dict[str, Any] | None = None
    self._changed = 0.0
    self._renewer: threading.Thread | None = None
    self._closing = threading.Event()
    self._lost = False

  def acquire(self, say: Callable[[str], None]) -> None:
    """Takes the lock; waits for a training that may be about to end.

    A scheduler starts a crashed training again while a host of the first start
    still waits for the lost one, or its lease is not yet stale. All hosts call
    it.

    Args:
      say: Prints a line for people.

    Raises:
      InputError: Another training holds the lock all the time, or the folder
        cannot be written.
    """
    began, said = time.monotonic(), False
    # Many short waits: a collective operation that one host enters minutes
    # after the others would time out.
    while True:
      with hosts.refusing_together():
        taken = not hosts.is_main_process() or self._try(began)
      if hosts.decided_by_main(taken):
        return
      if not said:
        say(
          f"{self._holder()} trains in {self._workdir}: waiting up to "
          f"{self._seconds} s for it to end"
        )
        said = True
      time.sleep(min(_POLL_SECONDS, self._seconds / 20))

  def _try(self, began: float) -> bool:
    """Takes the lock if it is free; raises InputError if time is up."""
    what = f"--workdir={self._workdir}: cannot write"
    with storage.errors(what, InputError):
      self._workdir.mkdir(parents=True, exist_ok=True)
      before = self._theirs
      if self._take_lease() if self._use_lease else self._take_lock():
        return True
    # A lease is refused only when it is seen renewed: an old one is waited for
    # until it is stale, however long that takes.
    alive = not self._use_lease or before not in (None, self._theirs)
    if alive and time.monotonic() - began >= self._seconds:
      raise InputError(
        f"--workdir={self._workdir}: {self._holder()} trains there; stop it, "
        "or use another --workdir"
      )
    return False

  def _holder(self) -> str:
    """Returns the other training in words."""
    theirs = self._theirs or {}
    return (
      f"process {theirs.get('process', '?')} on {theirs.get('host', '?')}, "
      f"since {theirs.get('since', '?')},"
    )

  def _take_lock(self) -> bool:
    """Takes the operating system's lock, unless another process has it."""
    if self._descriptor is None:
      self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
      fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      self._theirs = self._read()
      return False
    except OSError as error:
      if error.errno not in _NO_LOCKS:
        raise
      self._use_lease = True
      return self._take_lease()
    # Into the locked file itself: a new one of its name would not be locked.
    os.ftruncate(self._descriptor, 0)
    os.pwrite(self._descriptor, json.dumps(self._ours).encode(), 0)
    return True

  def _take_lease(self) -> bool:
    """Takes the lease if there is none or it is stale."""
    theirs, now = self._read(), time.monotonic()
    if theirs is not None:
      # By this machine's clock alone, since two clocks may differ.
      if theirs != self._theirs:
        self._theirs, self._changed = theirs, now
      if now - self._changed < _number(theirs.get("stale_seconds")):
        return False
    self._write()
    # Of two that write at the same time, the later one wins.
    time.sleep(min(_POLL_SECONDS, self._seconds / 20))
    if not self._is_ours(self._read()):
      return False
    self._renewer = threading.Thread(target=self._renew, daemon=True)
    self._renewer.start()
    return True

  def _renew(self) -> None:
    """Renews the lease until the end, or until another training has it."""
    while not self._closing.wait(self._seconds * _RENEWAL):
      # A bucket may fail for a while; the next renewal may succeed.
      with contextlib.suppress(Exception):
        theirs = self._read()
        if theirs is not None and not self._is_ours(theirs):
          self._theirs, self._lost = theirs, True
          return
        self._ours["renewals"] += 1
        self._write()

  def check(self) -> None:
    """Raises SaveError if another training has taken the folder over."""
    # As after a suspension of this machine that was longer than the lease.
    if self._lost:
      raise SaveError(
        f"--workdir={self._workdir}: {self._holder()} has taken over, as this "
        "process did not renew its lease in time"
      )

  def close(self) -> None:
    """Gives up what this process holds."""
    self._closing.set()
    if self._descriptor is not None:
      os.close(self._descriptor)
      self._descriptor = None
    if self._renewer is not None:
      self._renewer.join(10)
      self._renewer = None
      # A lease that cannot be deleted grows stale by itself.
      with contextlib.suppress(Exception):
        if self._is_ours(self._read()):
          self._path.unlink()

  def _is_ours(self, lease: dict[str, Any] | None) -> bool:
    return lease is not None and lease.get("token") == self._ours["token"]

  def _read(self) -> dict[str, Any] | None:
    """Returns the content of the file, None without one."""
    try:
      value = json.loads(storage.read_text(self._path))
    except FileNotFoundError:
      return None
    except ValueError:  # Half written, or damaged.
      value = None
    return value if isinstance(value, dict) else {}

  def _write(self) -> None:
    storage.write_text(self._path, json.dumps(self._ours))


def _number(value: Any) -> float:
  """Returns the seconds that a lease names, 0 if they are malformed."""
  return float(value) if isinstance(value, int | float) else 0.0
