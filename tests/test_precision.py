"""The type in which training computes, and where it is decided."""

import copy
import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dialogues import KEY, MODEL, TRAIN, flat, make_batch
from helpers import refused

from empdg_jax import config as config_lib
from empdg_jax.config import Config, TrainConfig
from empdg_jax.parallel.devices import replicate, shard, unreplicate
from empdg_jax.training import loop, precision, run_folder, steps
from empdg_jax.training.train_state import create_optimizer, init_params, start


def test_processors_with_bfloat16_products(tmp_path: pathlib.Path) -> None:
  """The flags of the first processor."""
  path = tmp_path / "cpuinfo"
  path.write_text(
    "processor : 0\nflags\t\t: fpu avx2 avx512_bf16\nflags : other\n"
  )
  assert precision.cpu_flags(str(path)) == {"fpu", "avx2", "avx512_bf16"}
  assert precision.cpu_flags(str(tmp_path / "none")) == frozenset()


@pytest.mark.parametrize(
  ("flags", "chosen"),
  [({"avx2"}, "float32"), ({"avx2", "amx_bf16"}, "bfloat16")],
)
def test_auto_asks_the_processor(
  flags: set[str], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(precision, "cpu_flags", lambda: frozenset(flags))
  assert precision.resolve(TrainConfig()) == chosen
  assert precision.resolve(TrainConfig(compute_dtype="float32")) == "float32"


def test_a_run_keeps_its_type(
  sample_config: Config,
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """`auto` is decided once; a resumed run does not ask again."""
  config = copy.deepcopy(sample_config)
  config.train.compute_dtype, config.train.mle_steps = "auto", 2
  monkeypatch.setattr(
    precision, "cpu_flags", lambda: frozenset({"avx512_bf16"})
  )
  assert loop.train(config, tmp_path)
  saved = json.loads((tmp_path / "config.json").read_text())
  assert saved["train"]["compute_dtype"] == "bfloat16"

  monkeypatch.setattr(precision, "cpu_flags", frozenset)
  assert loop.train(config, tmp_path)
  assert run_folder.read_config(tmp_path).train.compute_dtype == "bfloat16"


def test_runs_without_the_field_are_float32() -> None:
  values = dataclasses.asdict(Config())
  del values["train"]["compute_dtype"]
  read = config_lib.from_json(json.dumps(values), "config.json")
  assert read.train.compute_dtype == "float32"


def test_an_unknown_type_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
  error = refused(
    capsys,
    "train",
    "--config=empdg",
    "--config.train.compute_dtype=float16",
    "--workdir=nowhere",
  )
  assert "auto, float32, bfloat16" in error


def test_bfloat16_steps_keep_float32_states() -> None:
  """Close to the float32 update, but not equal: products are rounded."""
  optimizer = create_optimizer(TRAIN, MODEL.config.emb_dim)
  state = start(init_params(MODEL, jax.random.key(1)), optimizer)
  moved, losses = {}, {}
  for dtype in (jnp.float32, jnp.bfloat16):
    step = steps.compile_step(
      steps.mle_step, model=MODEL.clone(dtype=dtype), optimizer=optimizer
    )
    after, sums = step(replicate(state), shard(make_batch(0)), replicate(KEY))
    after = unreplicate(after)
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(after.params))
    moved[dtype] = flat(after.opt_state[0].mu)
    losses[dtype] = float(unreplicate(sums["loss"]))
  rounded, exact = moved[jnp.bfloat16], moved[jnp.float32]
  difference = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
  assert 1e-5 < difference < 3e-2
  assert losses[jnp.bfloat16] == pytest.approx(losses[jnp.float32], rel=1e-2)
