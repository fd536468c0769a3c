"""What is set and said for GPUs; none is needed."""

import importlib.util
import types

import pytest

from empdg_jax.parallel import devices

(FLAG,) = devices.GPU_FLAGS


@pytest.mark.parametrize(
  ("given", "wanted"),
  [
    ("", FLAG),
    ("--xla_dump_to=d", f"--xla_dump_to=d {FLAG}"),
    ("--xla_gpu_enable_command_buffer=", "--xla_gpu_enable_command_buffer="),
    ("flags.txt", "flags.txt"),
  ],
)
def test_the_users_flags_stay(given: str, wanted: str) -> None:
  assert devices.with_gpu_flags(given) == wanted


@pytest.mark.parametrize(
  ("platforms", "plugin", "wanted"),
  [
    ("", "jax_cuda13_plugin", FLAG),
    ("cuda,cpu", "jax_cuda12_plugin", FLAG),
    ("cpu", "jax_cuda12_plugin", ""),
    ("", "jax_rocm7_plugin", ""),
  ],
)
def test_flags_are_set_for_cuda_alone(
  platforms: str, plugin: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setenv("JAX_PLATFORMS", platforms)
  monkeypatch.setenv("XLA_FLAGS", "")
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == plugin)
  devices.set_gpu_flags()
  assert devices.os.environ["XLA_FLAGS"] == wanted


@pytest.mark.parametrize(
  ("platform", "capability", "precision", "wanted"),
  [
    ("gpu", "9.0", None, True),
    ("gpu", "9.0", "tensorfloat32", True),
    ("gpu", "9.0", "highest", False),
    ("gpu", "7.5", None, False),
    ("gpu", "gfx942", None, False),
    ("cpu", "", None, False),
  ],
)
def test_tf32(
  platform: str, capability: str, precision: str | None, wanted: bool
) -> None:
  device = types.SimpleNamespace(
    platform=platform, compute_capability=capability
  )
  assert devices.multiplies_in_tf32(device, precision) == wanted
