"""The record of a run's training, which results quote: `record.json`."""

import importlib.resources
import json
import os
import pathlib
import platform
import subprocess  # nosec B404
import time
from typing import Any

import jax

from empdg_jax import storage
from empdg_jax.parallel import devices
from empdg_jax.training import precision

RECORD = "record.json"


def program_commit() -> str | None:
  """Returns the commit of this program's checkout, None outside of one."""
  folder = pathlib.Path(str(importlib.resources.files("empdg_jax")))
  # A package that is installed inside some other repository is not that.
  if not (folder.parent / ".git").exists():
    return None
  command = ["git", "-C", str(folder.parent), "rev-parse", "HEAD"]
  try:
    # A fixed command, without a shell.
    found = subprocess.run(  # nosec B603
      command, capture_output=True, text=True, check=True
    )
  except (OSError, subprocess.CalledProcessError):
    return None
  return found.stdout.strip()


def describe_hardware() -> str:
  """Returns the devices in words; of a processor, its cores and its model."""
  if jax.devices()[0].platform != "cpu":
    return devices.describe_devices()
  model = precision.cpu_field("model name") or platform.machine()
  cores = len(os.sched_getaffinity(0))
  return f"{cores} core{'s' * (cores > 1)} of {model}"


class Recorder:
  """Keeps a run's record over all the sessions that train it.

  It has the program's commit, the type that it computed in, the updates of all
  players, the hardware, the hours from each session's start to its latest
  checkpoint, and whether training is finished. Sessions that differ in commit
  or hardware are all named.
  """

  def __init__(self, workdir: pathlib.Path, compute_dtype: str) -> None:
    """Starts this session's clock.

    Raises:
      InputError: The record of the sessions before is damaged.
    """
    self._before = storage.read_object(workdir / RECORD)
    self._start = time.monotonic()
    self._now = {"commit": program_commit(), "hardware": describe_hardware()}
    self._compute_dtype = compute_dtype

  def to_json(self, updates: int, finished: bool = False) -> str:
    """Returns the record after so many updates."""
    values: dict[str, Any] = {"compute_dtype": self._compute_dtype}
    for name, now in self._now.items():
      named = [*str(self._before.get(name) or "").split("; "), now or ""]
      values[name] = "; ".join(dict.fromkeys(filter(None, named))) or None
    values["updates"] = updates
    hours = (time.monotonic() - self._start) / 3600
    values["hours"] = round(float(self._before.get("hours") or 0) + hours, 4)
    values["finished"] = finished
    return json.dumps(values, indent=2) + "\n"
