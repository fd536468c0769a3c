"""Files on a disk or in a bucket: paths, atomic writes, one-line errors."""

import contextlib
import errno
import io
import os
import pathlib
import stat
from collections.abc import Generator, Iterator
from typing import Any

import platformdirs

from empdg_jax.config import InputError, SaveError, parse_json

# The most bytes that a file may hold, once unpacked, to be read as a whole. The
# official archive has far fewer.
_MOST_BYTES = 2**30
# What names that no disk can hold raise, whatever is done with them.
_NO_NAME = (errno.ENAMETOOLONG, errno.ELOOP)


def cache_dir() -> pathlib.Path:
  """Returns this program's folder in the user's cache."""
  return platformdirs.user_cache_path("empdg", appauthor=False)


def run_path(name: str, flag: str) -> pathlib.Path:
  """Returns the path of a folder on a disk or in a bucket.

  Args:
    name: The folder as the user gave it; `gs://bucket/...` for a bucket.
    flag: The name of the flag that gave it, for messages.

  Returns:
    A path with the methods of `pathlib.Path`, whatever it names.

  Raises:
    InputError: No disk can hold the name, or the bucket cannot be read.
  """
  if "://" not in name:
    return disk_path(name, f"--{flag}")
  if not name.startswith("gs://"):
    # Orbax names buckets of no other kind to TensorStore, which writes arrays.
    raise InputError(
      f"--{flag}={name}: expected gs://BUCKET/FOLDER, or a folder on a disk, a "
      "mounted one included; Orbax writes checkpoints to no other storage"
    )
  from etils import epath

  path: Any = epath.Path(name)
  advice = "cannot read the bucket; do you have its permission?"
  with errors(f"--{flag}={name}: {advice}", InputError):
    try:
      path.exists()
    except ImportError as error:
      raise InputError(
        f"--{flag}={name}: needs a package for buckets; in a clone: "
        f"pip install -e '.[gcs]' ({error})"
      ) from error
  return path


def disk_path(name: str, flag: str) -> pathlib.Path:
  """Returns the path of a file or folder that must be on a disk.

  Raises:
    InputError: It is in a bucket or of an unknown scheme, or no disk can hold
      the name.
  """
  if "://" in name:
    raise InputError(
      f"{flag}={name}: expected a path on a disk, not in a bucket or elsewhere"
    )
  try:
    os.lstat(name)
  except OSError as error:
    if error.errno in _NO_NAME:
      raise InputError(
        f"{flag}={name[:60]}...: {error.strerror}, {len(name):,} characters"
      ) from error
  return pathlib.Path(name)


def is_bad_name(error: Exception) -> bool:
  """Returns whether an error says that no disk can hold a path's name."""
  return isinstance(error, OSError) and error.errno in _NO_NAME


def machine_memory() -> int:
  """Returns the memory in bytes that this process may use.

  The machine's, or less in a container with a limit.
  """
  memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  return min([memory, *_container_limits()])


def _container_limits(
  groups: pathlib.Path = pathlib.Path("/proc/self/cgroup"),
  root: pathlib.Path = pathlib.Path("/sys/fs/cgroup"),
) -> list[int]:
  """Returns the limits of memory of Linux's control groups, of both versions.

  Args:
    groups: The list of this process's groups.
    root: The folder of all groups.
  """
  limits: list[int] = []
  with contextlib.suppress(OSError, ValueError):
    for line in groups.read_text().splitlines():
      _, kinds, group = line.split(":", 2)
      if not kinds:
        tops, file = (root, root / "unified"), "memory.max"
      elif "memory" in kinds.split(","):
        tops, file = (root / "memory",), "memory.limit_in_bytes"
      else:
        continue
      # Each group above has a limit too. In a container the topmost folder may
      # be the group itself, whatever its name outside.
      inner = pathlib.PurePosixPath(group.lstrip("/"))
      for top in tops:
        for name in (inner, *inner.parents):
          with contextlib.suppress(OSError, ValueError):  # "max" is no number.
            limits.append(int((top / name / file).read_text()))
  return limits


def check_fits(what: str, numbers: int) -> None:
  """Checks that arrays can fit into this machine's memory, before any is made.

  Args:
    what: The sizes that ask for them, for the message.
    numbers: At least how many numbers of 4 bytes they hold.

  Raises:
    InputError: They cannot.
  """
  memory = machine_memory()
  if 4 * numbers > memory:
    raise InputError(
      f"{what}: needs more than {4 * numbers / 2**30:,.0f} GiB; this machine "
      f"has {memory / 2**30:,.0f} GiB of memory"
    )


def read_bounded(file: io.BufferedIOBase, where: str) -> bytes:
  """Reads a file that may be a bomb, a device or a pipe that never ends.

  Args:
    file: The file, open.
    where: Its name in messages.

  Raises:
    InputError: It holds more than 1 GiB.
  """
  # In pieces: a read of the most bytes would allocate all of them at once.
  read = io.BytesIO()
  while piece := file.read(2**20):
    read.write(piece)
    if read.tell() > _MOST_BYTES:
      raise InputError(f"{where}: holds more than 1 GiB")
  return read.getvalue()


def bounded_lines(
  file: io.BufferedIOBase, where: str, most: float
) -> Iterator[str]:
  """Yields the lines of a text in UTF-8, of which none may be endless.

  Args:
    file: The file, open.
    where: Its name in messages.
    most: The number of bytes that it may hold.

  Raises:
    InputError: It holds more, or a line of 1 MiB.
  """
  total = 0
  while line := file.readline(2**20):
    total += len(line)
    if len(line) == 2**20:
      raise InputError(f"{where}: holds a line of more than 1 MiB")
    if total > most:
      raise InputError(f"{where}: unpacks to more than {most / 2**30:.0f} GiB")
    yield line.decode("utf-8")


def check_plain(path: pathlib.Path) -> None:
  """Raises InputError for what is no file, such as a device or a pipe.

  The opening of a pipe that nobody writes would never return.
  """
  if not in_bucket(path) and not stat.S_ISREG(path.stat().st_mode):
    raise InputError(f"{path}: is no regular file")


def read_text(path: pathlib.Path) -> str:
  """Reads a text in UTF-8; see `check_plain` and `read_bounded`."""
  check_plain(path)
  with path.open("rb") as file:
    return read_bounded(file, str(path)).decode("utf-8")


def read_object(path: pathlib.Path) -> dict[str, Any]:
  """Returns a file's JSON object; an empty one if there is no such file.

  Raises:
    InputError: It is damaged.
  """
  if not path.exists():
    return {}
  with errors(f"{path}: damaged", InputError):
    values = parse_json(read_text(path))
    if not isinstance(values, dict):
      raise ValueError("it holds no object")
    return values


def with_ending(stem: pathlib.Path, ending: str) -> pathlib.Path:
  """Returns `STEM.ending`, also if the stem holds a dot."""
  # Not `with_suffix`, which would cut the stem there.
  return stem.with_name(f"{stem.name}.{ending}")


def in_bucket(path: pathlib.Path) -> bool:
  """Returns whether a path is in a bucket."""
  return "://" in str(path)


def absolute(path: pathlib.Path) -> pathlib.Path:
  """Returns the absolute path; a path in a bucket always is."""
  return path if in_bucket(path) else path.absolute()


@contextlib.contextmanager
def atomic_path(path: pathlib.Path) -> Generator[pathlib.Path]:
  """Yields a temporary path that replaces `path` when the block succeeds."""
  # An object in a bucket appears only when it is whole.
  if in_bucket(path):
    yield path
    return
  # Beside `path`, since only a move within one file system is atomic.
  temporary = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    yield temporary
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a file atomically and in UTF-8, in a folder that it may create."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with atomic_path(path) as temporary:
    temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def errors(what: str, kind: type[Exception]) -> Generator[None]:
  """Converts any storage error into a one-line `kind`.

  Args:
    what: The beginning of the message: the path and the operation that fails.
    kind: `InputError` before work has begun, `SaveError` once it has.
  """
  try:
    yield
  except (InputError, SaveError):
    raise
  except Exception as error:  # Buckets' clients have no common class.
    # A lost host is no storage error. This module knows no JAX, hence the name.
    if type(error).__name__ == "JaxRuntimeError":
      raise
    raise kind(f"{what} ({first_line(error)})") from error


def first_line(error: Exception) -> str:
  """Returns the first line of an error's message, its name if it has none."""
  return str(error).splitlines()[0] if str(error) else repr(error)


def copy_files(root: pathlib.Path, to: pathlib.Path) -> list[pathlib.Path]:
  """Copies all files below a folder, each atomically.

  Args:
    root: The folder.
    to: The folder of the copies, on a disk or in a bucket.

  Returns:
    The paths of the copies.

  Raises:
    SaveError: A copy could not be written.
  """
  copies = []
  for path in root.rglob("*"):
    if path.is_file():
      copy = to / path.relative_to(root).as_posix()
      with errors(f"{copy}: cannot write", SaveError):
        copy.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(copy) as temporary:
          temporary.write_bytes(path.read_bytes())
      copies.append(copy)
  return copies
