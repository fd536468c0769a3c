"""PyTorch's version of the steps has our numbers; needs PyTorch.

Marked `peer` and run by `make test-peer`.
"""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs PyTorch, of the extra 'peer'")

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "benchmarks" / "pytorch_peer.py"
SMALL = ("--vocab_size=300", "--batch_size=4", "--emb_dim=12", "--shape=12,6,8")

pytestmark = pytest.mark.peer


def run(*flags: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [sys.executable, str(PROGRAM), *flags],
    env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )


def test_help() -> None:
  said = run("--help")
  assert said.returncode == 0
  assert "--checkout" in said.stdout


def test_equal_numbers() -> None:
  """Losses, gradients and responses, from equal parameters."""
  said = run("--numbers_only", "--modes=eager", "--dtype=float32", *SMALL)
  assert said.returncode == 0, said.stderr
  for kind in ("mle/gradient", "mle/nll", "critics/gradient", "greedy"):
    assert kind in said.stdout


def test_the_slope_is_the_gradient() -> None:
  """Written out, as autograd finds it."""
  import torch

  sys.path.insert(0, str(PROGRAM.parent))
  import pytorch_model as model  # pyrefly: ignore[missing-import]

  torch.manual_seed(0)
  sizes = model.Sizes(6, 2, (1, 2, 3), 4, 0.0, 0.1, 0.1, 3, 3)
  p = {"critic/output/kernel": torch.randn(6, 1), "critic/output/bias": None}
  for i, width in enumerate(sizes.kernel_widths):
    p[f"critic/convolutions_{i}/kernel"] = torch.randn(6 * width, 2)
    p[f"critic/convolutions_{i}/bias"] = torch.randn(2)
  hidden = torch.randn(3, 5, 6, requires_grad=True)
  mask = torch.arange(5) < torch.tensor([[5], [3], [1]])
  real = hidden * mask[..., None]
  inputs = real, mask, torch.randn(3, 6), sizes
  scores, *parts = model._score(p, "critic", *inputs)
  (wanted,) = torch.autograd.grad(scores.sum(), hidden)
  found = model._slope(p, "critic", real, mask, sizes, *parts)
  np.testing.assert_allclose(found.detach(), wanted, rtol=1e-5, atol=1e-6)
