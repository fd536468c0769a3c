"""Data parallelism: the one file that names `pmap`.

Compiled steps take arrays with a leading axis over this host's devices, called
`"batch"` inside.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "batch"


def pmap(step: Callable[..., Any], *, donate_state: bool = False) -> Any:
  """Compiles a step for all devices.

  Args:
    step: A function of replicated state and sharded batch, maybe more
      replicated arguments.
    donate_state: Whether the first argument's memory may be reused for the
      result.

  Returns:
    The compiled step.
  """
  return jax.pmap(
    step, axis_name=AXIS, donate_argnums=(0,) if donate_state else ()
  )


def psum(tree: Any) -> Any:
  """Sums over all devices; inside a compiled step.

  On one device nothing is to be done, and nothing is compiled: XLA's CPU
  backend would copy every gradient.
  """
  return tree if jax.lax.axis_size(AXIS) == 1 else jax.lax.psum(tree, AXIS)


def _sharding() -> NamedSharding:
  """Returns the sharding whose leading axis is this host's devices."""
  mesh = Mesh(np.array(jax.local_devices()), (AXIS,))
  return NamedSharding(mesh, PartitionSpec(AXIS))


def replicate(tree: Any) -> Any:
  """Copies every array to every local device: `[...] -> [devices, ...]`."""
  devices = jax.local_device_count()
  return jax.tree.map(
    lambda x: jax.device_put(
      np.broadcast_to(x, (devices, *np.shape(x))), _sharding()
    ),
    tree,
  )


def replicate_key(key: jax.Array) -> jax.Array:
  """Copies a random key to every local device."""
  data = replicate(np.asarray(jax.random.key_data(key)))
  return jax.random.wrap_key_data(data)


def unreplicate(tree: Any) -> Any:
  """Returns the first device's copy as NumPy: `[devices, ...] -> [...]`."""
  return jax.tree.map(
    lambda x: np.asarray(x.addressable_shards[0].data)[0], tree
  )


def shard(batch: Any) -> Any:
  """Splits rows: `[rows, ...] -> [local devices, rows / devices, ...]`."""
  devices = jax.local_device_count()
  return jax.tree.map(
    lambda x: x.reshape(devices, x.shape[0] // devices, *x.shape[1:]), batch
  )


def unshard(tree: Any) -> Any:
  """Joins the devices' rows as NumPy: `[devices, n, ...] -> [rows, ...]`."""
  return jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), tree)


def step_flops(compiled: Any) -> float:
  """Returns XLA's count of one device's floating-point operations."""
  analysis = compiled.cost_analysis()
  analysis = analysis[0] if isinstance(analysis, list) else analysis
  return float(analysis["flops"])
