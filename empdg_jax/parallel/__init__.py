"""Data parallelism: `devices` within a host, `hosts` between them."""

from empdg_jax.parallel.devices import (
  check_batches,
  check_devices,
  compile_step,
  describe_devices,
  gather,
  psum,
  replicate,
  rows_per_device,
  shard,
  step_flops,
  unreplicate,
  unshard,
)
from empdg_jax.parallel.hosts import (
  check_same,
  check_shared,
  ending_together,
  initialize,
  is_main_process,
  preempted,
  refusing_together,
)

__all__ = [
  "check_batches",
  "check_devices",
  "check_same",
  "check_shared",
  "compile_step",
  "describe_devices",
  "ending_together",
  "gather",
  "initialize",
  "is_main_process",
  "preempted",
  "psum",
  "refusing_together",
  "replicate",
  "rows_per_device",
  "shard",
  "step_flops",
  "unreplicate",
  "unshard",
]
