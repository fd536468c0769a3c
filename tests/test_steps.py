"""The steps against directly computed updates and sums, on 1 to 8 devices.

As a program, `test_steps.py FILE` writes what `take_three` returns to FILE.
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from dialogues import (
  KEY,
  MODEL,
  ROWS,
  TRAIN,
  VOCAB,
  flat,
  make_batch,
  make_examples,
  relative_difference,
  run_again_on_eight_devices,
  run_on_devices,
)
from reference import (
  EOS,
  PAD,
  UNK,
  in_float64,
)

from empdg_jax.config import EvalConfig
from empdg_jax.data.pipeline import Batch
from empdg_jax.losses import log_mixture
from empdg_jax.models.encoder_decoder import Inputs
from empdg_jax.models.generator import Generator
from empdg_jax.parallel.devices import replicate, shard, unreplicate, unshard
from empdg_jax.training import steps
from empdg_jax.training.train_state import (
  TrainState,
  create_optimizer,
  init_params,
)


class Steps(NamedTuple):
  """The compiled steps and their first state.

  Attributes:
    state: The state on one device.
    mle: `mle_step` over all devices.
    evaluate: `eval_step` over all devices.
  """

  state: TrainState
  mle: Callable[..., Any]
  evaluate: Callable[..., Any]


def direct_terms(
  params: Any, batch: Batch, keys: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns the mean `Lg` (eq. 15) and its parts, from whole distributions."""
  inputs = Inputs(batch.context, batch.state, batch.emotion_context)
  outputs: Any = MODEL.apply({"params": params}, inputs, batch.target, keys)
  emotion_logits = outputs.encoded.emotion_logits
  log_probs = log_mixture(outputs.logits, outputs.pointer)
  wanted = 0.9 * jax.nn.one_hot(batch.target, VOCAB) + 0.1 / VOCAB
  real = batch.target != PAD
  generation = -jnp.sum(jnp.sum(wanted * log_probs, -1) * real, -1)
  rows = jnp.arange(ROWS)
  emotion = -jnp.log(jax.nn.softmax(emotion_logits)[rows, batch.emotion])
  loss = 0.5 * emotion + 2.0 * generation
  nll = -jnp.sum(
    jnp.take_along_axis(log_probs, batch.target[..., None], -1)[..., 0] * real,
    axis=-1,
  )
  parts = {
    "loss": loss,
    "nll": nll,
    "tokens": jnp.sum(real, -1),
    "mean_nll": nll / jnp.sum(real, -1),
    "emotion_correct": jnp.argmax(emotion_logits, -1) == batch.emotion,
    "examples": jnp.ones(ROWS),
  }
  mean = jnp.sum(loss * batch.mask) / jnp.sum(batch.mask)
  return mean, {k: jnp.sum(v * batch.mask) for k, v in parts.items()}


def compile_steps(model: Generator = MODEL) -> Steps:
  """Returns the steps over the devices of this process."""
  optimizer = create_optimizer(TRAIN, MODEL.config.emb_dim)
  params = reference.random_params(
    jax.eval_shape(lambda: init_params(MODEL, jax.random.key(0)))
  )
  return Steps(
    TrainState(np.int32(0), params, optimizer.init(params)),
    steps.compile_step(steps.mle_step, model=model, optimizer=optimizer),
    steps.compile_step(steps.eval_step, model=model),
  )


def take(
  compiled: Steps, state: TrainState, batch: Batch
) -> tuple[TrainState, dict[str, float]]:
  """Takes one `mle_step`; states are those of one device."""
  state, metrics = compiled.mle(
    replicate(state),
    shard(batch),
    replicate(KEY),
  )
  metrics = unreplicate(metrics)
  return unreplicate(state), {k: float(v) for k, v in metrics.items()}


@pytest.fixture(scope="module")
def compiled() -> Steps:
  """The steps, compiled once."""
  return compile_steps()


@pytest.fixture(scope="module")
def direct() -> Callable[..., Any]:
  """`(params, batch, keys) -> ` loss and sums, and the loss's gradient."""
  return jax.jit(jax.value_and_grad(direct_terms, has_aux=True))


def keys_of(step: int) -> jax.Array:
  """Returns the dropout keys from the root key, the step and the position."""
  of_step = jax.random.fold_in(KEY, step)
  return jnp.stack([jax.random.fold_in(of_step, i) for i in range(ROWS)])


def test_two_updates_equal_adam(
  compiled: Steps, direct: Callable[..., Any]
) -> None:
  """Adam on `jax.grad` of the direct loss; sums of the metrics."""
  state, params = compiled.state, compiled.state.params
  scale = 16**-0.5
  adam = optax.inject_hyperparams(optax.adam)(1.0, b1=0.9, b2=0.98, eps=1e-3)
  opt_state = adam.init(params)
  for step in range(2):
    batch, before = make_batch(step), params
    (loss, sums), grads = direct(params, batch, keys_of(step))
    opt_state.hyperparams["learning_rate"] = scale * (step + 1) * 10**-1.5
    updates, opt_state = adam.update(grads, opt_state)
    params = optax.apply_updates(params, updates)
    state, metrics = take(compiled, state, batch)

    assert int(state.step) == step + 1
    moved = flat(params) - flat(before)
    assert np.linalg.norm(moved) > 0.1
    assert relative_difference(flat(state.params) - flat(before), moved) < 1e-4
    assert metrics["examples"] == ROWS
    assert metrics["loss"] / ROWS == pytest.approx(float(loss), rel=1e-5)
    assert metrics.pop("skipped") == 0.0
    norm = metrics.pop("grad_norm") / ROWS
    assert norm == pytest.approx(np.linalg.norm(flat(grads)), rel=1e-4)
    assert set(metrics) == set(sums)
    for name, value in sums.items():
      assert metrics[name] == pytest.approx(float(value), rel=1e-4), name


def test_masked_examples_contribute_nothing(
  compiled: Steps, direct: Callable[..., Any]
) -> None:
  """Masked rows change no update; the mean is over the others."""
  batch, garbage = make_batch(2, real=5), make_batch(3, real=5)
  other = Batch(
    *(
      np.concatenate([a[:5], b[5:]])
      for a, b in zip(batch, garbage, strict=True)
    )
  )
  assert not np.array_equal(batch.target, other.target)
  state, metrics = take(compiled, compiled.state, batch)
  other_state, other_metrics = take(compiled, compiled.state, other)
  start = flat(compiled.state.params)
  moved = flat(state.params) - start
  assert relative_difference(flat(other_state.params) - start, moved) < 1e-5
  assert metrics == pytest.approx(other_metrics, rel=1e-6)

  (loss, sums), grads = direct(compiled.state.params, batch, keys_of(0))
  assert metrics["examples"] == 5
  assert metrics["tokens"] == np.sum(batch.target[:5] != PAD)
  assert metrics["loss"] / 5 == pytest.approx(float(loss), rel=1e-5)
  assert metrics["nll"] == pytest.approx(float(sums["nll"]), rel=1e-5)
  # The first update of Adam: g / (|g| + eps) times the rate.
  grad = flat(grads)
  rate = 16**-0.5 * 10**-1.5
  assert relative_difference(moved, -rate * grad / (np.abs(grad) + 1e-3)) < 1e-4


def test_dropout_follows_the_position(compiled: Steps) -> None:
  """Another position in the global batch draws another mask."""
  batch = make_batch(4)
  state, _ = take(compiled, compiled.state, batch)
  moved = batch._replace(position=batch.position + 1)
  other, _ = take(compiled, compiled.state, moved)
  start = flat(compiled.state.params)
  assert (
    relative_difference(flat(other.params) - start, flat(state.params) - start)
    > 0.01
  )


def test_evaluation_equals_the_reference(compiled: Steps) -> None:
  """Without smoothing or dropout: each example's values and the sums."""
  params = in_float64(compiled.state.params)
  examples, emotions = make_examples(6)
  sums, values = compiled.evaluate(
    replicate(compiled.state.params),
    shard(make_batch(6, real=5)),
  )
  sums, values = unreplicate(sums), unshard(values)
  nlls, correct = [], []
  for row, example in enumerate(examples):
    out = reference.generator(params, MODEL.config, example)
    nlls.append(reference.smoothed_losses(out.probs, example.target, 0.0).sum())
    correct.append(int(out.emotion_logits.argmax()) == emotions[row])
    emotion_nll = -np.log(reference.softmax(out.emotion_logits)[emotions[row]])
    if row >= 5:  # A masked row, of which no number counts.
      continue
    assert values["nll"][row] == pytest.approx(nlls[row], rel=1e-5)
    assert values["tokens"][row] == len(example.target)
    assert values["loss"][row] == pytest.approx(
      0.5 * emotion_nll + 2.0 * nlls[row], rel=1e-5
    )
  lengths = [len(e.target) for e in examples]
  assert float(sums["examples"]) == 5
  assert float(sums["tokens"]) == sum(lengths[:5])
  assert float(sums["nll"]) == pytest.approx(sum(nlls[:5]), rel=1e-5)
  assert float(sums["emotion_correct"]) == sum(correct[:5])
  assert float(sums["mean_nll"]) == pytest.approx(
    sum(n / length for n, length in zip(nlls[:5], lengths[:5], strict=True)),
    rel=1e-5,
  )


def test_prediction_is_the_references_argmax(compiled: Steps) -> None:
  """Greedy responses, token by token, from the whole equations."""
  config = EvalConfig(max_decode_steps=5)
  predict = steps.compile_step(steps.predict_step, model=MODEL, config=config)
  prediction = unshard(
    predict(replicate(compiled.state.params), shard(make_batch(7)))
  )
  params = in_float64(compiled.state.params)
  for row, example in enumerate(make_examples(7)[0]):
    allowed = [EOS, *range(8, VOCAB)]
    if UNK in example.source:
      allowed.append(UNK)
    tokens: list[int] = []
    while len(tokens) < 5 and EOS not in tokens:
      # The token after the prefix has no influence.
      out = reference.generator(
        params, MODEL.config, example._replace(target=[*tokens, EOS])
      )
      tokens.append(max(allowed, key=lambda t, p=out.probs[-1]: p[t]))
    tokens += [PAD] * (5 - len(tokens))
    assert prediction.tokens[row].tolist() == tokens
    np.testing.assert_allclose(
      prediction.emotion_probs[row],
      reference.softmax(out.emotion_logits),
      rtol=1e-4,
    )


def take_three(compiled: Steps) -> dict[str, Any]:
  """Takes three steps with dropout; each batch has a masked row.

  Args:
    compiled: The steps over this process's devices.

  Returns:
    The parameters before and after, and the last metrics.
  """
  # A step donates its copies of the state, never the caller's own arrays.
  take(compiled, compiled.state, make_batch(0))
  state, metrics = compiled.state, {}
  for step in range(3):
    state, metrics = take(compiled, state, make_batch(step, real=ROWS - 1))
  return {
    "devices": jax.local_device_count(),
    "start": flat(compiled.state.params),
    "end": flat(state.params),
    "skipped_bits": skip(state),
    **metrics,
  }


def skip(state: TrainState) -> list[bool]:
  """Returns what of these is true of updates that overflow, over the devices.

  The loss is infinite; it is finite, but the gradient's norm is not. For each:
  the update is counted as skipped; no parameter and no moment moves; the next
  update draws other random numbers.
  """
  true = []
  for weight in (1e38, 1e30):
    config = dataclasses.replace(MODEL.config, generation_loss_weight=weight)
    overflowing = compile_steps(MODEL.clone(config=config))
    after, metrics = take(overflowing, state, make_batch(3))
    true += [
      bool(np.isfinite(metrics["loss"])) == (weight == 1e30),
      not np.isfinite(metrics["grad_norm"]),
      metrics["skipped"] == 1.0,
      bool(np.array_equal(flat(after.params), flat(state.params))),
      bool(np.array_equal(flat(after.opt_state), flat(state.opt_state))),
      int(after.step) == int(state.step) + 1,
    ]
  return true


@pytest.mark.slow
def test_any_number_of_devices_gives_the_same_update(
  compiled: Steps, tmp_path: Path
) -> None:
  """Three steps here, on 2 and on 8 devices, in a process each."""
  runs = run_on_devices(__file__, tmp_path)
  one = take_three(compiled)
  moved = one["end"] - one["start"]
  assert np.linalg.norm(moved) > 0.01 * np.linalg.norm(one["start"])
  assert all(one["skipped_bits"])
  for devices, run in runs.items():
    _, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    other = np.load(tmp_path / f"{devices}.npz")
    assert other["devices"] == devices
    np.testing.assert_array_equal(other["start"], one["start"])
    assert relative_difference(other["end"], one["end"]) <= 1e-5
    assert other["skipped_bits"].all()
    assert relative_difference(other["end"] - one["start"], moved) <= 1e-5
    for name in ("loss", "nll", "tokens", "examples"):
      assert other[name] == pytest.approx(one[name], rel=1e-5), name


@pytest.mark.slow
def test_all_of_these_on_eight_devices() -> None:
  """The other tests again, in a process with 8 devices."""
  run_again_on_eight_devices(__file__, "not any_number_of_devices")


if __name__ == "__main__":
  jax.config.update("jax_disable_most_optimizations", True)
  np.savez(sys.argv[1], **take_three(compile_steps()))
