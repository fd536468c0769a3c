"""Compiling for TPU slices that do not exist.

Tests that need the TPU compiler are marked `tpu` and run by `make test-tpu`.
"""

import json
import math
import pathlib
import re
import socket
import sys
from collections.abc import Callable
from typing import Any

import helpers
import jax
import pytest

from empdg_jax import config as config_lib
from empdg_jax import main
from empdg_jax.hardware import chips, compile_check, compile_report
from empdg_jax.models import registry
from empdg_jax.parallel import devices
from empdg_jax.training.train_state import count_parameters

ROOT = pathlib.Path(__file__).resolve().parents[1]
VOCAB = 200
TIMES = "compute", "memory", "all_reduce"
TINY = (
  "--config.data.shapes=((12,8,8),)",
  "--config.data.feedback_length=8",
  "--config.model.emb_dim=16",
  "--config.model.key_value_depth=8",
  "--config.model.filter_size=12",
  "--config.model.kernel_widths=(1,2)",
  "--config.train.batch_size=8",
  "--config.train.sample_steps=3",
  "--config.eval.batch_size=8",
  "--config.eval.max_decode_steps=3",
  f"--vocab_size={VOCAB}",
)


def command(system: str, *more: str) -> list[str]:
  config = f"--config={ROOT}/configs/{system}.py"
  return ["compile-check", config, *TINY, *more]


@pytest.fixture(scope="module")
def reports() -> dict[str, dict[str, Any]]:
  """The report on every step of EmpDG on eight chips."""
  with pytest.MonkeyPatch.context() as patch:
    said: list[str] = []
    patch.setattr("sys.stdout.write", said.append)
    argv = command("empdg", "--topology=v5e:2x4", "--format=json")
    assert main.main(argv) == 0
  values = json.loads("".join(said))
  assert values["topology"] == "v5e:2x4"
  return {step["step"]: step for step in values["steps"]}


@pytest.mark.tpu
def test_every_step_is_compiled(reports: dict[str, dict[str, Any]]) -> None:
  assert list(reports) == [
    "mle", "discriminator", "adversarial generator", "eval", "predict",
  ]  # fmt: skip
  for report in reports.values():
    parts = ("arguments", "outputs", "temporaries", "code")
    assert report["memory"] == sum(report[part] for part in parts)
    assert report["memory_share"] == report["memory"] / (16 * 2**30)
    assert report["compute_seconds"] == report["flops"] / 197e12 > 0
    assert report["memory_seconds"] == report["traffic"] / 8.19e11 > 0
    # Every look-up reads fewer bytes than the table has.
    assert report["traffic"] < report["bytes_accessed"]
    assert report["all_reduce_seconds"] == pytest.approx(
      2 * 7 / 8 * report["bytes_reduced"] / 2e11
    )
    assert report["all_gathers"] == 0
    least = report["least_seconds"]
    assert least == max(report[f"{k}_seconds"] for k in TIMES)
    assert report["utilisation"] == pytest.approx(
      report["flops"] / 197e12 / least
    )
    assert report["examples_per_second"] == pytest.approx(8 / least)


@pytest.mark.tpu
def test_gradients_are_summed_in_few_operations(
  reports: dict[str, dict[str, Any]],
) -> None:
  """Only the gradients, and a few metric sums, are all-reduced."""
  from empdg_jax.config import ModelConfig

  model = ModelConfig(
    name="empdg", emb_dim=16, key_value_depth=8, filter_size=12
  )
  parameters = count_parameters(registry.create_model(model, VOCAB, 32))
  mle = reports["mle"]
  assert mle["bytes_reduced"] == pytest.approx(4 * parameters, rel=0.05)
  assert mle["all_reduces"] <= 3
  # Likelihood's and the signal's gradients are apart.
  assert reports["adversarial generator"]["bytes_reduced"] == pytest.approx(
    8 * parameters, rel=0.05
  )
  assert reports["predict"]["bytes_reduced"] == 0


@pytest.mark.tpu
def test_largest_batch(
  monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
  """The search on a chip with too little memory for most batches."""
  chip = chips.CHIPS["v5e"]._replace(memory=3 * 2**23)
  monkeypatch.setitem(chips.CHIPS, "v5e", chip)
  argv = command("transformer", "--topology=v5e:2x2")
  assert main.main([*argv, "--find-batch", "--format=json"]) == 0
  fit = json.loads(capsys.readouterr().out)
  rows, too_many = fit["rows"], fit["too_many"]
  assert 8 <= rows < too_many <= rows * 17 / 16 + 1
  assert fit["batch_size"] == 4 * rows
  for number, fits in ((rows, True), (too_many, False)):
    more = f"--config.train.batch_size={4 * number}", "--format=json"
    assert main.main([*argv, *more]) == (0 if fits else 2)
    checked = json.loads(capsys.readouterr().out)
    assert ("mle" in checked["too_large"]) != fits


@pytest.mark.parametrize("start", [1, 32, 1_000, 100_000])
@pytest.mark.parametrize("refuses", [False, True])
@pytest.mark.parametrize(
  "of_rows",
  [
    lambda rows: 0.06 + 0.002 * rows,
    lambda rows: 0.06 + 0.002 * rows + 1e-7 * rows**2,
    lambda rows: max(0.1 + 0.001 * rows, 0.02 + rows / 100),  # Of two steps.
    lambda rows: max(0.2 + 0.0001 * rows, 0.05 + rows / 300),
  ],
)
def test_search(
  start: int, refuses: bool, of_rows: Callable[[int], float]
) -> None:
  """Memory in tiles of 8 rows; the compiler may refuse what does not fit."""
  tried: dict[int, float] = {}

  def share(rows: int) -> float:
    share = of_rows(8 * -(-rows // 8))
    assert rows not in tried
    tried[rows] = math.inf if refuses and share > 1 else share
    return tried[rows]

  fit = compile_check.largest_that_fits(share, start)
  assert tried[fit.rows] <= 1 < tried[fit.too_many]
  assert fit.too_many - fit.rows <= fit.rows / 16
  assert len(tried) <= 20


def test_nothing_fits() -> None:
  fit = compile_check.largest_that_fits(lambda rows: 1.0 + rows, 8)
  assert fit == (0, 1)


def refused(capsys: pytest.CaptureFixture[str], *more: str) -> str:
  """Runs a check that must be refused; returns its one line."""
  return helpers.refused(capsys, *command("transformer", *more))


def test_help_lists_the_chips(capsys: pytest.CaptureFixture[str]) -> None:
  with pytest.raises(SystemExit):
    main.main(["compile-check", "--help"])
  assert f"Chips of --topology: {', '.join(chips.CHIPS)}." in (
    capsys.readouterr().out
  )


@pytest.mark.parametrize(
  ("accelerator", "topology"),
  [
    ("v5litepod-1", "v5e:1x1"),
    ("v5litepod-8", "v5e:2x4"),
    ("v5litepod-256", "v5e:16x16"),
    ("v6e-32", "v6e:4x8"),
    ("v4-8", "v4:2x2x1"),
    ("v4-512", "v4:4x8x8"),
    ("v5p-16", "v5p:2x2x2"),
    ("v5p-12288", "v5p:16x16x24"),
    ("tpu7x-8", "tpu7x:2x2x1"),
    ("v5p-7", "v5p-7"),
    ("v5e:4x4", "v5e:4x4"),
    ("h100-8", "h100-8"),
  ],
)
def test_accelerator_types(accelerator: str, topology: str) -> None:
  assert chips.topology_of(accelerator) == topology


def test_words(
  monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
  """In 80 columns; a given vocabulary's size needs no data and no network.

  The processor stands in for a chip.
  """
  slice_ = compile_report.Slice(
    "v5e:1x1", chips.CHIPS["v5e"], tuple(jax.devices())
  )
  monkeypatch.setattr(compile_check, "describe_topology", lambda _: slice_)

  def fail(*_: Any) -> None:
    raise AssertionError("tries the network")

  monkeypatch.setattr(socket.socket, "connect", fail)
  monkeypatch.setenv("COLUMNS", "80")
  argv = command("transformer", "--topology=v5e:1x1")
  assert main.main([*argv, "--config.data.data_dir=/nowhere/data"]) == 0
  said = capsys.readouterr().out
  assert max(map(len, said.splitlines())) <= 80
  assert re.search(
    r"^mle: 8 examples, 8 a chip: 0\.0 of 16 GiB a chip: fits\n"
    r"  at least \d+\.\d\d ms a step; model FLOPs utilisation \d+%; "
    r"[\d,]+ examples/s\n"
    r"  at least \d+\.\d\d s an epoch of 20,724 examples$",
    said,
    re.MULTILINE,
  )
  assert "epoch" not in said.partition("\neval: ")[2]
  # Figures are never folded.
  for title in ("memory of a chip", "work of a chip", "sums over chips"):
    table = said.partition(title)[2]
    row = next(line for line in table.splitlines() if " mle" in line)
    assert "…" not in row


def test_a_batch_for_fewer_chips() -> None:
  """That of 7 divides among 8, with fewer examples a chip: words say so."""
  config = config_lib.from_file("pod:7")
  training, evaluation = devices.check_batches(config, 8)
  assert training == evaluation == 28
  report = {
    "step": "mle", "memory": 1.0, "memory_share": 0.5, "least_seconds": 1.0,
    "utilisation": 0.5, "examples": training, "examples_per_second": 1.0,
  }  # fmt: skip
  said, *_ = compile_report.in_words(report, 8, None)
  assert said.startswith("mle: 224 examples, 28 a chip: ")


@pytest.mark.parametrize(
  "more",
  [
    ("--config.train.batch_size=60",),
    ("--config.train.mle_checkpoint=run",),
    ("--config.model.num_heads=0",),
  ],
)
def test_refuses_what_training_refuses(
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
  more: tuple[str, ...],
) -> None:
  """In the same words, before any data are read."""
  slice_ = compile_report.Slice(
    "v5e:2x4", chips.CHIPS["v5e"], (*jax.devices(),) * 8
  )
  monkeypatch.setattr(compile_check, "describe_topology", lambda _: slice_)
  monkeypatch.setattr(jax, "device_count", lambda: 8)
  config = f"--config={ROOT}/configs/transformer.py"
  train = ["train", config, *TINY[:-1], *more, "--workdir=/nowhere/run"]
  said = helpers.refused(capsys, *train, "--config.data.source=/nowhere")
  assert "/nowhere" not in said
  assert said == refused(capsys, "--topology=v5e:2x4", *more)


def test_bad_input(
  monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
  assert "--topology is missing" in refused(capsys)
  for name in ("v9:2x2", "v5e", "v5e:4", "v5e:0x2", "v5e:999x999", "v5p-7"):
    said = refused(capsys, f"--topology={name}")
    assert f"--topology={name}: expected a chip and a layout" in said
  said = refused(capsys, "--topology=v5e:2x2", "--format=csv")
  assert "--format=csv" in said
  monkeypatch.setitem(sys.modules, "libtpu", None)  # As if not installed.
  said = refused(capsys, "--topology=v5e:2x2")
  assert "pip install -e '.[tpu]'" in said


@pytest.mark.tpu
def test_what_the_compiler_refuses(capsys: pytest.CaptureFixture[str]) -> None:
  """Far more examples than a chip's memory holds."""
  said = refused(
    capsys, "--topology=v5e:2x2", f"--config.train.batch_size={2**25}"
  )
  assert "mle, discriminator" not in said
  assert "v5e:2x2: mle: more than the memory of a chip" in said


@pytest.mark.tpu
@pytest.mark.parametrize(
  ("name", "devices"),
  [
    ("v5e:1x1", 1),
    ("v5litepod-8", 8),
    ("v5e:4x2", 8),
    ("v5p:8x8x8", 512),
    ("v4-16", 8),
    ("v6e:16x16", 256),
    ("tpu7x:2x2x1", 8),  # A chip is two devices.
  ],
)
def test_what_the_compiler_describes(name: str, devices: int) -> None:
  assert len(compile_check.describe_topology(name).devices) == devices


@pytest.mark.tpu
def test_what_the_compiler_cannot_describe(
  capsys: pytest.CaptureFixture[str],
) -> None:
  said = refused(capsys, "--topology=v5e:3x5")
  assert "--topology=v5e:3x5: the compiler knows no such slice" in said


@pytest.mark.tpu
@pytest.mark.parametrize("name", ["v5e:1x1", "tpu7x:2x2x1"])
def test_small_slices_compile(
  name: str, capsys: pytest.CaptureFixture[str]
) -> None:
  argv = command("transformer", f"--topology={name}", "--format=json")
  assert main.main(argv) == 0
  checked = json.loads(capsys.readouterr().out)
  assert [s["step"] for s in checked["steps"]] == ["mle", "eval", "predict"]


@pytest.mark.tpu
def test_what_does_not_fit_is_refused(
  monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
  said = refused(capsys, "--topology=v5e:4x4")
  assert "batch_size=8 does not divide among 16 devices" in said
  assert "nearest that does is 16" in said
  chip = chips.CHIPS["v5e"]._replace(memory=1.0)
  monkeypatch.setitem(chips.CHIPS, "v5e", chip)
  said = refused(capsys, "--topology=v5e:2x2")
  assert "mle, eval, predict: more than the memory of a chip" in said
