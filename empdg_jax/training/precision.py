"""The type in which training computes products and activations."""

import pathlib

import jax
import jax.numpy as jnp

from empdg_jax.config import TrainConfig

# Processors multiply bfloat16 faster than float32 only with such instructions.
_CPU_FLAGS = frozenset(("avx512_bf16", "amx_bf16"))


def compute_dtype(config: TrainConfig) -> jnp.dtype:
  """Returns the type that a configuration asks for; see `resolve`."""
  return jnp.dtype(resolve(config))


def resolve(config: TrainConfig) -> str:
  """Returns `compute_dtype`, with `"auto"` decided for the first device."""
  if config.compute_dtype != "auto":
    return config.compute_dtype
  platform = jax.devices()[0].platform
  pays = platform != "cpu" or not _CPU_FLAGS.isdisjoint(cpu_flags())
  return "bfloat16" if pays else "float32"


def cpu_flags(path: str = "/proc/cpuinfo") -> frozenset[str]:
  """Returns the names of the processor's features; none where Linux is not."""
  return frozenset(cpu_field("flags", path).split())


def cpu_field(name: str, path: str = "/proc/cpuinfo") -> str:
  """Returns what Linux says of the first processor; "" where Linux is not."""
  try:
    lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
  except OSError:
    return ""
  found = [line.partition(":")[2] for line in lines if line.startswith(name)]
  return found[0].strip() if found else ""
