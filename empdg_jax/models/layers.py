"""The layers of all systems (Vaswani et al., 2017; Lin et al., 2019).

Arrays are batch-first, `[batch, length, features]`. Masks are boolean, True at
real positions. Dropout takes one key per example; `keys=None` means evaluation.
"""

import functools
import math
import zlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from empdg_jax.config import ModelConfig
from empdg_jax.losses import product
from empdg_jax.rng import random_words

# Finite, so that a softmax over masked positions alone is not NaN.
NEGATIVE_INFINITY = -1e9


def sinusoidal_positions(length: int, dim: int) -> jax.Array:
  """Returns position embeddings (Vaswani et al., 2017, §3.5).

  Args:
    length: The number of positions.
    dim: The number of features, even.

  Returns:
    `[length, dim]`: sines in the first half and cosines in the second, with
    wavelengths from 2 pi to 10,000 x 2 pi.
  """
  half = dim // 2
  exponent = jnp.arange(half) / max(half - 1, 1)
  angles = jnp.arange(length)[:, None] * jnp.power(1e4, -exponent)[None]
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


@jax.custom_vjp
def project(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Returns `x @ kernel` in float32, `[..., features] @ [features, outputs]`.

  For a kernel as wide as the vocabulary; the result and its gradients are those
  of the plain product, but the kernel's gradient is faster. The type of `x` is
  that of the products' factors.
  """
  return product(x, kernel.astype(x.dtype))


def _project_backward(
  residuals: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
  # The kernel's gradient is one product of two matrices as they lie in memory.
  # The derivative that JAX finds transposes the `[..., outputs]` gradient
  # first, and with a whole vocabulary of outputs that copy takes a third of the
  # time of the product itself.
  x, kernel = residuals
  rows = x.reshape(-1, x.shape[-1])
  gradient = gradient.astype(x.dtype)
  # Without the barrier XLA gives the second product the rows as they are, to
  # transpose in passing, for which its CPU backend has no fast product.
  columns = jax.lax.optimization_barrier(rows.T)
  return (
    product(gradient, kernel.T.astype(x.dtype)).astype(x.dtype),
    product(columns, gradient.reshape(len(rows), -1)),
  )


project.defvjp(
  lambda x, kernel: (project(x, kernel), (x, kernel)), _project_backward
)


@jax.custom_vjp
def straight_through(
  weights: jax.Array, tokens: jax.Array, table: jax.Array
) -> jax.Array:
  """Looks up tokens with the gradient of a weighted mean (Jang et al., 2017).

  Args:
    weights: The weights of the table's rows, `[..., V]`. The result ignores
      them, but they receive a gradient.
    tokens: `[...]`.
    table: `[V, d]`.

  Returns:
    `table[tokens]`, `[..., d]`. Its gradient with respect to the weights is
    that of `weights @ table`; with respect to the table, that of the look-up.
  """
  # Jang et al. write this as `soft + stop_gradient(hard - soft)`, which would
  # compute `weights @ table`, a product over the vocabulary, and discard it.
  # The custom rule runs that product in the backward pass alone.
  del weights
  return table[tokens]


def _straight_through_backward(
  residuals: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, None, jax.Array]:
  tokens, table = residuals
  return (
    gradient @ table.T,
    None,
    jnp.zeros_like(table).at[tokens].add(gradient),
  )


straight_through.defvjp(
  lambda weights, tokens, table: (table[tokens], (tokens, table)),
  _straight_through_backward,
)


class Dropout(nn.Module):
  """Dropout with a mask per example.

  An example's mask depends on its key and on this module's place in the model,
  never on the batch or device that holds the example.

  Attributes:
    rate: The probability of dropping a feature.
  """

  rate: float

  @nn.compact
  def __call__(self, x: jax.Array, keys: jax.Array | None) -> jax.Array:
    """Drops features of `x` `[batch, ...]`; `keys` `[batch]` are Threefry's."""
    if keys is None or self.rate == 0.0:
      return x
    # All layers get the same keys, so each folds in its path in the model, as
    # Flax does with its one key per batch. Unlike `hash`, crc32 gives the same
    # number in every process, and so on every host.
    site = zlib.crc32("/".join(self.path).encode())
    threshold = round(self.rate * 2**16)
    count = math.prod(x.shape[1:])

    def keep(key: jax.Array) -> jax.Array:
      # 16 bits per feature halve the hashing of 32, and set the rate to within
      # 2**-17, far closer than anyone tunes it.
      words = random_words(jax.random.fold_in(key, site), -(-count // 2))
      bits = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(-1)
      return bits[:count].reshape(x.shape[1:]) >= threshold

    return jnp.where(jax.vmap(keep)(keys), x / (1.0 - self.rate), 0.0)


class Pool(nn.Module):
  """The vector of a context that the classifier of emotions reads.

  `config.emotion_pooling` is `"first"` (the encoder's first output, `x~0` or
  `w~0` of eqs. 3 and 6), or `"mean"` or `"attention"` over the embedded words;
  `"attention"` weights them by `softmax(v tanh(W x + b))` (Yang et al., 2016).
  Only `"attention"` has parameters.

  Attributes:
    config: The kind, d, and the rate at which training drops whole words.
  """

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    first: jax.Array,
    words: jax.Array,
    mask: jax.Array,
    keys: jax.Array | None,
  ) -> jax.Array:
    """Pools a context.

    Args:
      first: The encoder's first output, `[batch, d]`.
      words: The embedded words, `[batch, length, d]`.
      mask: True at real words, `[batch, length]`.
      keys: Dropout keys, `[batch]`, or None for evaluation.

    Returns:
      `[batch, d]`.
    """
    c = self.config
    if c.emotion_pooling == "first":
      return first
    kept = Dropout(c.word_dropout)(jnp.ones(mask.shape), keys) > 0
    # The first one is CLS or LAB, so that something always remains.
    mask &= kept.at[:, 0].set(True)
    scores = jnp.zeros(mask.shape)
    if c.emotion_pooling == "attention":
      hidden = nn.tanh(nn.Dense(c.emb_dim, name="hidden")(words))
      scores = nn.Dense(1, use_bias=False, name="score")(hidden)[..., 0]
    weights = nn.softmax(jnp.where(mask, scores, NEGATIVE_INFINITY))
    return jnp.einsum("bl,bld->bd", weights, words)


class MultiHeadAttention(nn.Module):
  """Scaled dot-product attention with several heads and no biases.

  Attributes:
    config: The number of heads, the depth of queries, keys and values over all
      heads, and d.
    dtype: The type of products and activations.
  """

  config: ModelConfig
  dtype: Any = jnp.float32

  def setup(self) -> None:
    """Creates the four projections."""
    depth = self.config.key_value_depth
    dense = functools.partial(nn.Dense, use_bias=False, dtype=self.dtype)
    self.query, self.key, self.value = dense(depth), dense(depth), dense(depth)
    self.output = dense(self.config.emb_dim)

  def _split(self, x: jax.Array) -> jax.Array:
    x = x.reshape(*x.shape[:2], self.config.num_heads, -1)
    return x.transpose(0, 2, 1, 3)  # -> [batch, heads, length, depth]

  def keys_values(self, memory: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Projects the memory `[batch, memory_length, features]`.

    Returns:
      The keys and the values, each `[batch, heads, memory_length, depth]`.
    """
    return self._split(self.key(memory)), self._split(self.value(memory))

  def attend(
    self, x: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Attends from `x` to projected keys and values.

    Args:
      x: `[batch, length, features]`.
      keys: `[batch, heads, memory_length, depth]`.
      values: The same shape.
      mask: Broadcasts to `[batch, heads, length, memory_length]`.

    Returns:
      The outputs `[batch, length, dim]`, and the attention weights averaged
      over the heads, `[batch, length, memory_length]`.
    """
    queries = self._split(self.query(x))
    # Scaling the queries rather than the scores touches a smaller array.
    queries *= queries.shape[-1] ** -0.5
    scores = jnp.einsum(
      "bhqd,bhkd->bhqk", queries, keys, preferred_element_type=jnp.float32
    )
    weights = nn.softmax(jnp.where(mask, scores, NEGATIVE_INFINITY))
    mixed = jnp.einsum("bhqk,bhkd->bqhd", weights.astype(self.dtype), values)
    mixed = mixed.reshape(*x.shape[:2], -1)  # -> [batch, length, all heads]
    return self.output(mixed), weights.mean(axis=1)

  def __call__(
    self, x: jax.Array, memory: jax.Array, mask: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Attends from `x` to `memory`; see `attend`."""
    return self.attend(x, *self.keys_values(memory), mask)


class FeedForward(nn.Module):
  """Two layers with ReLU between them: dense, or convolutions of width 3.

  Attributes:
    config: The number of hidden units, d, and the kind: `"conv"` (Lin et al.,
      2019) or `"dense"` (the paper's wording).
    causal: Whether a convolution covers the two previous positions rather than
      the previous and the next one.
    dtype: The type of products and activations.
  """

  config: ModelConfig
  causal: bool
  dtype: Any = jnp.float32

  def setup(self) -> None:
    """Creates both layers."""
    # A convolution is a dense layer over concatenated windows: one large
    # product, and the same parameters serve `step`, which holds the window.
    self.hidden = nn.Dense(self.config.filter_size, dtype=self.dtype)
    self.output = nn.Dense(self.config.emb_dim, dtype=self.dtype)

  def _windows(self, x: jax.Array) -> jax.Array:
    if self.config.feed_forward == "dense":
      return x
    length = x.shape[1]
    x = jnp.pad(x, ((0, 0), (2, 0) if self.causal else (1, 1), (0, 0)))
    return jnp.concatenate([x[:, i : i + length] for i in range(3)], axis=-1)

  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    """Transforms `x` `[batch, length, features]`.

    Args:
      x: The inputs.
      mask: `[batch, length]`; a convolution reads zeros where it is False.

    Returns:
      `[batch, length, dim]`.
    """
    real = mask[..., None]
    hidden = nn.relu(self.hidden(self._windows(jnp.where(real, x, 0.0))))
    return self.output(self._windows(jnp.where(real, hidden, 0.0)))

  def init_cache(self, batch: int) -> tuple[jax.Array, ...]:
    """Returns the two zero positions before the first, for both layers."""
    if self.config.feed_forward == "dense":
      return ()
    return (
      jnp.zeros((batch, 2, self.config.emb_dim), self.dtype),
      jnp.zeros((batch, 2, self.config.filter_size), self.dtype),
    )

  def step(
    self, x: jax.Array, cache: tuple[jax.Array, ...]
  ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Transforms one position of a causal layer.

    Args:
      x: `[batch, 1, features]`.
      cache: The inputs of both layers at the two previous positions.

    Returns:
      `[batch, 1, dim]`, and the cache for the next position.
    """
    if self.config.feed_forward == "dense":
      return self.output(nn.relu(self.hidden(x))), ()
    before_x, before_hidden = cache
    x = jnp.concatenate([before_x, x], axis=1)
    hidden = nn.relu(self.hidden(x.reshape(x.shape[0], 1, -1)))
    hidden = jnp.concatenate([before_hidden, hidden], axis=1)
    y = self.output(hidden.reshape(hidden.shape[0], 1, -1))
    return y, (x[:, 1:], hidden[:, 1:])


class Residual(nn.Module):
  """The residual connection and the normalisation of a sub-layer f.

  `"pre"` is `x + dropout(f(norm(x)))`; `"post"` is `norm(x + dropout(f(x)))`,
  as printed in eqs. 2-3, 5-6 and 10-12.

  Attributes:
    config: The order, and the dropout rate of the sub-layer's output.
    dtype: The type of activations; statistics are float32.
  """

  config: ModelConfig
  dtype: Any = jnp.float32

  def setup(self) -> None:
    """Creates the normalisation and the dropout."""
    self.norm = nn.LayerNorm(dtype=self.dtype)
    self.dropout = Dropout(self.config.dropout_rate)

  def before(self, x: jax.Array) -> jax.Array:
    """Returns the sub-layer's input for the residual stream `x`."""
    return self.norm(x) if self.config.norm_order == "pre" else x

  def after(
    self, x: jax.Array, y: jax.Array, keys: jax.Array | None
  ) -> jax.Array:
    """Returns the stream after a sub-layer that maps `before(x)` to `y`."""
    y = x + self.dropout(y, keys)
    return y if self.config.norm_order == "pre" else self.norm(y)
