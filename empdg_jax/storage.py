"""Files on a disk or in a bucket: paths, whole files, errors of one line."""

import contextlib
import os
import pathlib
from collections.abc import Generator
from typing import Any

from empdg_jax.config import InputError, SaveError


def cache_dir() -> pathlib.Path:
  """Returns the product's folder in the user's cache."""
  root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(root) / "empdg"


def run_path(name: str, flag: str) -> pathlib.Path:
  """Returns a folder on a disk or, as `gs://bucket/...`, in a bucket.

  Args:
    name: What the user gave.
    flag: The flag that it was given with, for messages.

  Returns:
    A path that is used alike, wherever it is.

  Raises:
    InputError: The bucket cannot be read.
  """
  if "://" not in name:
    return pathlib.Path(name)
  from etils import epath

  path: Any = epath.Path(name)
  try:
    path.exists()
  except ImportError as error:
    raise InputError(
      f"--{flag}={name}: needs a package for buckets; pip install "
      f"'empdg-jax[gcs]' ({error})"
    ) from error
  except Exception as error:  # Buckets' clients have no common class.
    raise InputError(
      f"--{flag}={name}: cannot read the bucket; do you have its permission? "
      f"({error})"
    ) from error
  return path


def in_bucket(path: pathlib.Path) -> bool:
  """Returns whether a path is not on a disk."""
  return "://" in str(path)


def absolute(path: pathlib.Path) -> pathlib.Path:
  """Returns the absolute path; a bucket's is absolute."""
  return path if in_bucket(path) else path.absolute()


@contextlib.contextmanager
def atomic_path(path: pathlib.Path) -> Generator[pathlib.Path]:
  """Yields a temporary path beside `path` that becomes it on success.

  In a bucket it is `path` itself: an object appears when it is whole.
  """
  if in_bucket(path):
    yield path
    return
  temporary = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    yield temporary
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def errors(what: str, kind: type[Exception]) -> Generator[None]:
  """Raises one error of one line for whatever a disk or a bucket raises.

  Args:
    what: The message's beginning: which path, and what cannot be done with it.
    kind: `InputError` before work has begun, `SaveError` in the middle of it.
  """
  try:
    yield
  except (InputError, SaveError):
    raise
  except Exception as error:  # Buckets' clients have no common class.
    if type(error).__name__ == "JaxRuntimeError":  # Another host is lost.
      raise
    raise kind(f"{what} ({first_line(error)})") from error


def first_line(error: Exception) -> str:
  """Returns the first line of an error's message, its name if it has none."""
  return str(error).splitlines()[0] if str(error) else repr(error)


def copy_files(root: pathlib.Path, to: pathlib.Path) -> list[pathlib.Path]:
  """Copies all files below a folder, each whole, to a disk or a bucket.

  Returns:
    The copies.

  Raises:
    SaveError: One could not be written.
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
