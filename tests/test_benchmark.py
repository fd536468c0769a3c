"""The benchmark on the embedded corpus, with few rounds."""

import json
import pathlib

import pytest
from rich.console import Console

from empdg_jax.config import Config, InputError
from empdg_jax.data.prepare import Dataset
from empdg_jax.hardware import benchmark


def test_floor_is_arithmetic_plus_adams_passes() -> None:
  # 3 GFLOP at 100 GFLOP/s, and 7 passes of 4 bytes for 10 million at 7 GB/s.
  floor = benchmark.mle_step_floor(3e9, 10_000_000, peak=1e11, bandwidth=7e9)
  assert floor == pytest.approx(0.03 + 0.04)


def test_benchmark(
  sample_dataset: Dataset,
  config: Config,
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  monkeypatch.setattr(benchmark, "_MATRIX", 64)
  monkeypatch.setattr(benchmark, "_STREAM", 1024)
  console = Console(record=True, width=120)
  config.eval.max_decode_steps = config.train.sample_steps = 3
  config.model.name, config.model.kernel_widths = "empdg", (1, 2)
  values = benchmark.benchmark(sample_dataset, config, console, rounds=2)
  assert len(values["mle_step"]) == 2  # Shapes.
  assert sum(s["batches_per_epoch"] for s in values["mle_step"]) == 112
  for shape in values["mle_step"]:
    assert shape["flops"] > 1e5
    assert shape["times_floor"] == pytest.approx(
      shape["step_seconds"] / shape["floor_seconds"]
    )
  assert list(values["mle_step_by_dtype"]) == ["float32", "bfloat16"]
  for dtype, parts in values["mle_step_by_dtype"].items():
    assert parts["rest"] == pytest.approx(
      parts["step"] - parts["vocabulary"] - parts["optimizer"]
    )
    assert min(parts["vocabulary"], parts["optimizer"]) > 0
    # Arithmetic at this type's own peak, then seven passes over parameters.
    assert parts["floor_seconds"] == pytest.approx(
      parts["flops"] / values["matmul_flops_per_second"][dtype]
      + 28 * values["parameters"] / values["stream_bytes_per_second"]
    )
  adversarial = values["adversarial_steps"]
  assert list(adversarial) == [
    f"{player}, {signal}"
    for signal in ("straight_through", "expected")
    for player in ("discriminator", "generator")
  ]
  assert all(s["times_mle_step"] > 0.2 for s in adversarial.values())
  assert values["greedy_decoding"]["responses"] == 128
  assert values["peak_memory_bytes"] > 2**27
  benchmark.print_benchmark(values, console)
  printed = console.export_text()
  assert "x floor" in printed
  assert "x MLE step" in printed
  assert "vocabulary's loss" in printed
  assert "bfloat16" in printed
  benchmark.write_benchmark(values, tmp_path / "b.json")
  assert json.loads((tmp_path / "b.json").read_text()) == values
  (tmp_path / "file").write_text("")
  with pytest.raises(InputError, match="cannot write"):
    benchmark.write_benchmark(values, tmp_path / "file" / "b.json")
