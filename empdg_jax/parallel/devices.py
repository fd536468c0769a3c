"""Data parallelism over devices: the one file that names `pmap`.

Compiled steps take the state in its own shape, replicated on all devices, and a
batch with a leading axis over this host's devices. Inside a step, `"batch"`
names that axis.
"""

import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from empdg_jax.config import Config, InputError

AXIS = "batch"
# XLA's GPU options that differ from its defaults. A step is replayed as one
# graph only if its loops, as in sampling and decoding, are part of it.
# Autotuning needs none: JAX keeps its results beside the compiled steps.
GPU_FLAGS = ("--xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL",)


def compile_step(
  step: Callable[..., Any],
  in_axes: tuple[int | None, ...],
  out_axes: int | None | tuple[int | None, ...],
  donate_state: bool,
  devices: Sequence[jax.Device] | None,
) -> Any:
  """Compiles a step for all devices.

  Args:
    step: The function of one device, which may use `psum`.
    in_axes: For each argument, None if it is replicated, 0 if it is sharded
      over this host's devices.
    out_axes: The same for each result.
    donate_state: Whether the result may reuse the first argument's memory.
    devices: The devices to compile for; None for all.

  Returns:
    The compiled step.
  """
  # Replicated arrays keep their own shape, so that XLA updates a donated state
  # in place. With a leading axis of devices, its CPU backend would copy every
  # array.
  return jax.pmap(
    step,
    axis_name=AXIS,
    in_axes=in_axes,
    out_axes=out_axes,
    donate_argnums=(0,) if donate_state else (),
    devices=devices,
  )


def psum(tree: Any) -> Any:
  """Sums over all devices, inside a compiled step."""
  # Even over one device, XLA's CPU backend would copy every gradient.
  return tree if jax.lax.axis_size(AXIS) == 1 else jax.lax.psum(tree, AXIS)


def replicate(tree: Any) -> Any:
  """Copies every array to every local device."""
  mesh = Mesh(np.array(jax.local_devices()), (AXIS,))
  sharding = NamedSharding(mesh, PartitionSpec())
  # A copy in any case: a step that donates its state would otherwise delete the
  # caller's arrays. Despite `may_alias=False`, `device_put` gives the first of
  # several devices the array itself.
  tree = jax.tree.map(
    lambda x: x.copy() if isinstance(x, jax.Array) else x, tree
  )
  return jax.device_put(tree, sharding)


def put(tree: Any) -> Any:
  """Puts each row of a leading axis on its local device; see `shard`."""
  mesh = Mesh(np.array(jax.local_devices()), (AXIS,))
  return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(AXIS)))


def unreplicate(tree: Any) -> Any:
  """Returns replicated arrays as NumPy arrays."""
  return jax.tree.map(lambda x: np.asarray(x.addressable_shards[0].data), tree)


def shard(batch: Any) -> Any:
  """Splits rows: `[rows, ...] -> [devices, rows / devices, ...]`."""
  devices = jax.local_device_count()
  return jax.tree.map(
    lambda x: x.reshape(devices, x.shape[0] // devices, *x.shape[1:]), batch
  )


def unshard(tree: Any) -> Any:
  """Joins rows as NumPy: `[devices, rows / devices, ...] -> [rows, ...]`."""
  return jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), tree)


def gather(rows: Any) -> Any:
  """Joins the NumPy rows of all hosts in order, `[rows, ...]`, on each host."""
  if jax.process_count() == 1:
    return rows
  return multihost_utils.process_allgather(rows, tiled=True)


def step_flops(compiled: Any) -> float:
  """Returns XLA's count of floating-point operations on one device."""
  analysis = compiled.cost_analysis()
  analysis = analysis[0] if isinstance(analysis, list) else analysis
  return float(analysis["flops"])


def rows_per_device(config: Config, section: str, devices: int) -> int:
  """Returns the number of examples of a global batch on each device.

  Args:
    config: The run's configuration.
    section: `"train"` or `"eval"`, whose batch size counts.
    devices: The number of devices on all hosts.

  Raises:
    InputError: The batch size does not divide; the message names the nearest
      that does.

  >>> rows_per_device(Config(), "train", 8)
  2
  """
  batch_size = getattr(config, section).batch_size
  rows, rest = divmod(batch_size, devices)
  if rest:
    nearest = max(1, round(batch_size / devices)) * devices
    raise InputError(
      f"config.{section}.batch_size={batch_size} does not divide among "
      f"{devices} devices; the nearest that does is {nearest}"
    )
  return rows


def check_batches(config: Config, devices: int) -> tuple[int, int]:
  """Returns the examples on each device in training and in evaluation.

  Raises:
    InputError: A batch size does not divide; see `rows_per_device`.
  """
  return (
    rows_per_device(config, "train", devices),
    rows_per_device(config, "eval", devices),
  )


def with_gpu_flags(given: str) -> str:
  """Returns XLA_FLAGS with those of `GPU_FLAGS` that the user has not set.

  >>> with_gpu_flags("--xla_gpu_enable_command_buffer= --xla_dump_to=d")
  '--xla_gpu_enable_command_buffer= --xla_dump_to=d'
  """
  flags = given.split()
  if flags and not flags[0].startswith("-"):
    return given  # The name of a file with flags.
  names = {flag.partition("=")[0] for flag in flags}
  ours = [f for f in GPU_FLAGS if f.partition("=")[0] not in names]
  return " ".join([*flags, *ours])


def set_gpu_flags() -> None:
  """Sets XLA_FLAGS where JAX may use a GPU of NVIDIA's; see `with_gpu_flags`.

  XLA reads them when it looks for devices, and no later.
  """
  plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
  asked = os.environ.get("JAX_PLATFORMS") or "cuda"
  if {"cuda", "gpu"} & set(asked.split(",")) and any(
    importlib.util.find_spec(plugin) for plugin in plugins
  ):
    os.environ["XLA_FLAGS"] = with_gpu_flags(os.environ.get("XLA_FLAGS", ""))


def check_devices() -> None:
  """Raises InputError unless the platform asked for has devices."""
  try:
    jax.devices()
  except (RuntimeError, AssertionError) as error:  # JAX asserts some plugins.
    asked = jax.config.values["jax_platforms"] or "any platform"
    raise InputError(
      f"no device of {asked} ({str(error) or 'not installed'}); "
      "JAX_PLATFORMS=cpu takes the processor"
    ) from error


def multiplies_in_tf32(device: Any, precision: str | None) -> bool:
  """Returns whether a device rounds float32 factors to TF32 (10 bits).

  NVIDIA's GPUs do from compute capability 8.0 on, unless more is asked for.

  Args:
    device: The device.
    precision: The value of `jax_default_matmul_precision`.
  """
  capability = getattr(device, "compute_capability", "")
  if device.platform != "gpu" or not capability[:1].isdigit():
    return False
  default = precision in (None, "default", "fastest", "tensorfloat32")
  return default and float(capability) >= 8.0


def describe_devices() -> str:
  """Returns the number and kind of devices, and of hosts, in words."""
  devices, hosts = jax.device_count(), jax.process_count()
  device = jax.devices()[0]
  kind = device.device_kind
  precision = jax.config.values["jax_default_matmul_precision"]
  tf32 = multiplies_in_tf32(device, precision)
  kind += ", float32 products in TF32" * tf32
  return (
    f"{devices} device{'s' * (devices > 1)} ({kind})"
    + f" of {hosts} hosts" * (hosts > 1)
  )
