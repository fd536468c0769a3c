"""The generator against its NumPy transcription, and its guarantees."""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from reference import (
  CLS,
  EOS,
  LAB,
  PAD,
  SOS,
  SYS,
  UNK,
  USR,
  Example,
  in_float64,
  pad,
)

from empdg_jax.config import ModelConfig
from empdg_jax.losses import log_mixture
from empdg_jax.models import layers
from empdg_jax.models.encoder_decoder import Inputs
from empdg_jax.models.generator import Generator
from empdg_jax.training.train_state import init_params

VOCAB = 60
STEPS = 8
SHAPE = (12, 6, STEPS)  # Context, emotional context, target.
LONGER = (17, 9, 11)
# norm_order, feed_forward, pointer_generator, tie_embeddings, num_layers.
CASES = (
  ("pre", "conv", True, False, 1),
  ("pre", "dense", False, True, 1),
  ("post", "conv", True, True, 2),
  ("post", "dense", True, False, 1),
)
EXAMPLES = (
  # Two unknown words in the context; repeated words.
  Example(
    [CLS, 20, UNK, 21, 20, 9, UNK, 30, 31, 9, 44, 59],
    [CLS, USR, USR, USR, USR, SYS, SYS, SYS, USR, USR, USR, USR],
    [LAB, 30, 44, 30],
    [12, 20, 9, EOS],
  ),
  # Neither unknown nor emotional words.
  Example([CLS, 8, 13], [CLS, USR, USR], [LAB], [50, 13, 8, 8, 17, 33, 9, EOS]),
  # Unknown words in the emotional context too.
  Example(
    [CLS, 15, 16, UNK, 18, 19],
    [CLS, USR, USR, USR, USR, USR],
    [LAB, UNK, 18, 11, 45, UNK],
    [UNK, EOS],
  ),
)


class Case(NamedTuple):
  """A small generator, its parameters and its compiled methods.

  Attributes:
    config: Sizes and options.
    params: Parameters, none of them at a neutral value.
    expected: The reference's outputs for `EXAMPLES`.
    full: `(inputs, target) -> ` emotion logits, logits, log-probabilities.
    decoded: `(inputs, target) -> ` emotion logits, log-probabilities of every
      step `[batch, steps, V]` and the last cache, the target being fed.
  """

  config: ModelConfig
  params: Any
  expected: list[reference.Outputs]
  full: Callable[..., Any]
  decoded: Callable[..., Any]


def make_batch(
  examples: tuple[Example, ...], shape: tuple[int, int, int]
) -> tuple[Inputs, jax.Array]:
  """Pads examples to one shape."""
  inputs = Inputs(
    pad([e.context for e in examples], shape[0]),
    pad([e.state for e in examples], shape[0]),
    pad([e.emotion_context for e in examples], shape[1]),
  )
  return inputs, pad([e.target for e in examples], shape[2])


def make_model(
  case: tuple[str, str, bool, bool, int], dropout_rate: float = 0.0
) -> tuple[Generator, Any]:
  """Returns a generator, and parameters none of which is 0 or 1."""
  norm_order, feed_forward, pointer, tied, num_layers = case
  model = Generator(
    ModelConfig(
      emb_dim=16,
      key_value_depth=8,
      filter_size=12,
      norm_order=norm_order,
      feed_forward=feed_forward,
      pointer_generator=pointer,
      tie_embeddings=tied,
      num_layers=num_layers,
      dropout_rate=dropout_rate,
      emotion_dropout=dropout_rate,
    ),
    VOCAB,
    32,
  )
  shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
  return model, reference.random_params(shapes)


@pytest.fixture(
  scope="module", params=CASES, ids=lambda c: "-".join(map(str, c))
)
def case(request: pytest.FixtureRequest) -> Case:
  """Each of `CASES`, compiled once."""
  model, params = make_model(request.param)

  @jax.jit
  def full(variables: Any, inputs: Inputs, target: jax.Array) -> Any:
    outputs: Any = model.apply(variables, inputs, target)
    encoded, logits, pointer = (
      outputs.encoded,
      outputs.logits,
      outputs.pointer,
    )
    emotion_logits = encoded.emotion_logits
    return emotion_logits, logits, log_mixture(logits, pointer)

  @jax.jit
  def decoded(variables: Any, inputs: Inputs, target: jax.Array) -> Any:
    rows, steps = target.shape
    encoded = model.apply(variables, inputs, None, method="encode")
    cache = model.apply(variables, rows, steps, method="init_cache")

    def body(cache: Any, index: jax.Array) -> Any:
      tokens = target[:, jnp.maximum(index - 1, 0)]
      log_probs, cache = model.apply(
        variables, encoded, tokens, cache, index, method="decode_step"
      )
      return cache, log_probs

    cache, log_probs = jax.lax.scan(body, cache, jnp.arange(steps))
    return encoded.emotion_logits, log_probs.swapaxes(0, 1), cache

  variables = {"params": params}
  expected = [
    reference.generator(in_float64(params), model.config, e) for e in EXAMPLES
  ]
  return Case(
    model.config,
    params,
    expected,
    functools.partial(full, variables),
    functools.partial(decoded, variables),
  )


def test_full_pass_equals_the_equations(case: Case) -> None:
  """Emotions, logits and probabilities of a padded batch."""
  emotion_logits, logits, log_probs = case.full(*make_batch(EXAMPLES, SHAPE))
  for row, expected in enumerate(case.expected):
    length = len(EXAMPLES[row].target)
    np.testing.assert_allclose(
      emotion_logits[row], expected.emotion_logits, rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(
      logits[row, :length], expected.logits, rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(
      log_probs[row, :length], np.log(expected.probs), rtol=1e-5, atol=1e-5
    )


def test_pointer_presence_follows_the_config(case: Case) -> None:
  """Only copying needs a gate, only untied embeddings a projection."""
  assert ("gate" in case.params) == case.config.pointer_generator
  assert ("vocab_projection" in case.params) != case.config.tie_embeddings
  copied = [e.gate.max() < 1.0 for e in case.expected]
  assert all(c == case.config.pointer_generator for c in copied)


def test_mixture_sums_to_one(case: Case) -> None:
  """Copies of padding would be missing, repeated words would count twice."""
  _, _, log_probs = case.full(*make_batch(EXAMPLES, SHAPE))
  np.testing.assert_allclose(
    np.exp(log_probs).sum(axis=-1), np.ones((3, STEPS)), atol=1e-5
  )
  assert np.all(np.asarray(log_probs[..., PAD]) < 0.0)


def test_cached_steps_equal_the_full_pass(case: Case) -> None:
  """The probabilities of possible tokens at every position.

  The steps get the same examples, padded to a longer shape.
  """
  emotion_logits, _, log_probs = case.full(*make_batch(EXAMPLES, SHAPE))
  step_emotions, steps, _ = case.decoded(*make_batch(EXAMPLES, LONGER))
  np.testing.assert_allclose(
    step_emotions, emotion_logits, rtol=1e-5, atol=1e-5
  )
  allowed = np.array([EOS, *range(8, VOCAB)])
  np.testing.assert_allclose(
    steps[:, :STEPS, allowed],
    log_probs[..., allowed],
    rtol=1e-5,
    atol=1e-5,
  )


def test_never_generates_marks(case: Case) -> None:
  """Ids that no response holds have no probability, whatever their logits."""
  _, steps, _ = case.decoded(*make_batch(EXAMPLES, LONGER))
  for mark in (PAD, SOS, USR, SYS, CLS, LAB):
    assert np.all(np.exp(steps[..., mark]) == 0.0)
    assert np.all(np.asarray(steps[..., mark]) <= -1e8)
  assert np.all(np.asarray(steps[..., EOS]) > -100.0)


def test_unknown_words_are_copied_only(case: Case) -> None:
  """UNK needs an unknown source word, and copies the most attended one."""
  _, _, log_probs = case.full(*make_batch(EXAMPLES, SHAPE))
  _, steps, cache = case.decoded(*make_batch(EXAMPLES, LONGER))
  copied_from = np.asarray(cache.copied_from)
  for row, example in enumerate(EXAMPLES):
    if not case.config.pointer_generator or UNK not in example.source:
      assert np.all(steps[row, :, UNK] <= -1e8)
      assert np.all(copied_from[row] == -1)
      continue
    np.testing.assert_allclose(
      steps[row, :STEPS, UNK], log_probs[row, :, UNK], rtol=1e-5, atol=1e-5
    )
    # In the padded source, emotional words follow the padding of the context.
    places = [i for i, t in enumerate(example.context) if t == UNK] + [
      LONGER[0] + i for i, t in enumerate(example.emotion_context) if t == UNK
    ]
    unpadded = [i for i, t in enumerate(example.source) if t == UNK]
    attention = case.expected[row].attention[:, unpadded]
    for step, weights in enumerate(attention):
      assert copied_from[row, step] == places[int(weights.argmax())]


class Dropped(NamedTuple):
  """A generator with dropout.

  Attributes:
    call: `(inputs, target, keys) -> ` logits, and the inputs and outputs of
      every dropout layer by its path.
    plain: `(inputs, target) -> ` logits, without keys.
  """

  call: Callable[..., Any]
  plain: Callable[..., Any]


@pytest.fixture(scope="module")
def dropped() -> Dropped:
  """A one-layer generator that drops a third of its features."""
  model, params = make_model(CASES[0], dropout_rate=1 / 3)

  @jax.jit
  def call(
    variables: Any, inputs: Inputs, target: jax.Array, keys: jax.Array
  ) -> Any:
    seen = {}

    def record(
      run: Callable[..., Any], args: Any, kwargs: Any, context: Any
    ) -> Any:
      y = run(*args, **kwargs)
      if isinstance(context.module, layers.Dropout):
        path = "/".join(context.module.path)
        assert path not in seen, f"{path} is called twice with one mask"
        seen[path] = args[0], y
      return y

    with nn.intercept_methods(record):
      logits = model.apply(variables, inputs, target, keys).logits
    return logits, seen

  @jax.jit
  def plain(variables: Any, inputs: Inputs, target: jax.Array) -> jax.Array:
    return model.apply(variables, inputs, target, None).logits

  variables = {"params": params}
  return Dropped(
    functools.partial(call, variables), functools.partial(plain, variables)
  )


KEYS = jax.random.split(jax.random.key(3), 3)


def test_dropout_follows_the_example(dropped: Dropped) -> None:
  """An example and its key give the same result in any row of any batch."""
  logits, _ = dropped.call(*make_batch(EXAMPLES, SHAPE), KEYS)
  moved = (EXAMPLES[2], EXAMPLES[0], EXAMPLES[0])
  other_logits, _ = dropped.call(
    *make_batch(moved, SHAPE), KEYS[jnp.array([2, 0, 1])]
  )
  np.testing.assert_allclose(logits[0], other_logits[1], atol=1e-5)
  np.testing.assert_allclose(logits[2], other_logits[0], atol=1e-5)
  # The same example with another key.
  assert np.abs(other_logits[1] - other_logits[2]).max() > 0.01


def test_dropout_differs_between_sites_and_keys(dropped: Dropped) -> None:
  """Every embedding and sub-layer draws its own mask for each key."""
  one = (EXAMPLES[0],) * 3
  _, seen = dropped.call(*make_batch(one, SHAPE), KEYS)
  # Two encoders and a decoder of one layer, and the input of the classifier.
  assert len(seen) == 3 + 3 + 4 + 1
  masks = {}
  for path, (x, y) in seen.items():
    x, y = np.asarray(x), np.asarray(y)
    kept = y != 0.0
    assert np.all(x[kept] != 0.0)
    np.testing.assert_allclose(y[kept], x[kept] * 1.5, rtol=1e-5)
    # An input of 0 does not show the mask.
    masks[path] = kept, x != 0.0
  for (_, (kept, real)), row in itertools.product(masks.items(), range(3)):
    other = (row + 1) % 3
    both = real[row] & real[other]
    assert 0.1 < np.mean((kept[row] != kept[other])[both]) < 0.8
  compared = 0
  for (a, a_real), (b, b_real) in itertools.combinations(masks.values(), 2):
    if a.shape == b.shape:
      both = a_real & b_real
      # Independent masks differ in 2 * 1/3 * 2/3 of their bits.
      assert 0.25 < np.mean((a != b)[both]) < 0.65
      compared += 1
  assert compared >= 12


def test_no_keys_mean_no_dropout(dropped: Dropped) -> None:
  """Evaluation is deterministic and equals a model without dropout."""
  inputs, target = make_batch(EXAMPLES, SHAPE)
  first, second = dropped.plain(inputs, target), dropped.plain(inputs, target)
  np.testing.assert_array_equal(first, second)
  model, params = make_model(CASES[0])
  expected = reference.generator(in_float64(params), model.config, EXAMPLES[1])
  np.testing.assert_allclose(first[1], expected.logits, rtol=1e-5, atol=1e-5)
  with_dropout, _ = dropped.call(inputs, target, KEYS)
  assert np.abs(first - with_dropout).max() > 0.01


def test_dropout_keeps_the_mean() -> None:
  """The rate, and the scale of the kept features."""
  y = layers.Dropout(0.25).apply({}, jnp.ones((3, 200, 50)), KEYS)
  for row in np.asarray(y):
    assert set(np.unique(row).tolist()) == {0.0, np.float32(1 / 0.75).item()}
    assert np.mean(row == 0.0) == pytest.approx(0.25, abs=0.02)
