"""Layers that every system is made of (Vaswani et al., 2017; Lin et al., 2019).

Arrays are batch-first: `[batch, length, features]`. Masks are boolean, True
where a position is real. Dropout takes one key an example, and `keys=None`
means evaluation.
"""

import math
import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp

from empdg_jax.rng import random_words

NEGATIVE_INFINITY = -1e9


def sinusoidal_positions(length: int, dim: int) -> jax.Array:
  """Returns position embeddings (Vaswani et al., 2017, §3.5).

  Args:
    length: How many positions.
    dim: Features, even.

  Returns:
    `[length, dim]`, the first half sines, the second half cosines, with
    wavelengths from 2 pi to 10,000 x 2 pi.
  """
  half = dim // 2
  exponent = jnp.arange(half) / max(half - 1, 1)
  angles = jnp.arange(length)[:, None] * jnp.power(1e4, -exponent)[None]
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


@jax.custom_vjp
def project(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Returns `x @ kernel`, `[..., features] @ [features, outputs]`.

  The kernel's gradient is one product of two matrices as they lie in memory;
  the derivative that JAX finds itself transposes `[..., outputs]` first, which
  takes a third of the time of the product for a whole vocabulary.
  """
  return x @ kernel


def _project_forward(
  x: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return x @ kernel, (x, kernel)


def _project_backward(
  residuals: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
  x, kernel = residuals
  rows = x.reshape(-1, x.shape[-1])
  return gradient @ kernel.T, rows.T @ gradient.reshape(len(rows), -1)


project.defvjp(_project_forward, _project_backward)


@jax.custom_vjp
def straight_through(
  weights: jax.Array, tokens: jax.Array, table: jax.Array
) -> jax.Array:
  """Looks tokens up, with the gradient of a weighted mean (Jang et al., 2017).

  Args:
    weights: Of every row of the table; they only take the gradient,
      `[..., V]`.
    tokens: `[...]`.
    table: `[V, d]`.

  Returns:
    `table[tokens]`, `[..., d]`, whose gradient is that of `weights @ table`
    with respect to the weights, and its own with respect to the table.
  """
  del weights
  return table[tokens]


def _straight_through_forward(
  weights: jax.Array, tokens: jax.Array, table: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return straight_through(weights, tokens, table), (tokens, table)


def _straight_through_backward(
  residuals: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, None, jax.Array]:
  tokens, table = residuals
  return (
    gradient @ table.T,
    None,
    jnp.zeros_like(table).at[tokens].add(gradient),
  )


straight_through.defvjp(_straight_through_forward, _straight_through_backward)


class Dropout(nn.Module):
  """Dropout whose masks are drawn an example at a time.

  An example's mask depends on its key and on this module's place in the
  model, never on the batch or the device that the example is in.
  """

  rate: float

  @nn.compact
  def __call__(self, x: jax.Array, keys: jax.Array | None) -> jax.Array:
    """Drops features of `x` `[batch, ...]` by `keys` `[batch]`, Threefry's."""
    if keys is None or self.rate == 0.0:
      return x
    site = zlib.crc32("/".join(self.path).encode())
    threshold = round(self.rate * 2**16)

    count = math.prod(x.shape[1:])

    def keep(key: jax.Array) -> jax.Array:
      # 16 bits decide on a feature.
      words = random_words(jax.random.fold_in(key, site), -(-count // 2))
      bits = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(-1)
      return bits[:count].reshape(x.shape[1:]) >= threshold

    return jnp.where(jax.vmap(keep)(keys), x / (1.0 - self.rate), 0.0)


class MultiHeadAttention(nn.Module):
  """Scaled dot-product attention with several heads, no biases.

  Attributes:
    num_heads: How many.
    key_value_depth: Depth of queries, keys and values, all heads together.
    dim: Features of the output.
  """

  num_heads: int
  key_value_depth: int
  dim: int

  def setup(self) -> None:
    """Creates the four projections."""
    self.query = nn.Dense(self.key_value_depth, use_bias=False)
    self.key = nn.Dense(self.key_value_depth, use_bias=False)
    self.value = nn.Dense(self.key_value_depth, use_bias=False)
    self.output = nn.Dense(self.dim, use_bias=False)

  def _split(self, x: jax.Array) -> jax.Array:
    x = x.reshape(*x.shape[:2], self.num_heads, -1)
    return x.transpose(0, 2, 1, 3)  # -> [batch, heads, length, depth]

  def keys_values(self, memory: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Projects what is attended to.

    Args:
      memory: `[batch, memory_length, features]`.

    Returns:
      Keys and values, `[batch, heads, memory_length, depth]` each.
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
      `[batch, length, dim]`, and the attention weights averaged over the heads,
      `[batch, length, memory_length]`.
    """
    queries = self._split(self.query(x))
    queries *= queries.shape[-1] ** -0.5
    scores = jnp.einsum("bhqd,bhkd->bhqk", queries, keys)
    weights = nn.softmax(jnp.where(mask, scores, NEGATIVE_INFINITY))
    mixed = jnp.einsum("bhqk,bhkd->bqhd", weights, values)
    mixed = mixed.reshape(*x.shape[:2], -1)  # -> [batch, length, all heads]
    return self.output(mixed), weights.mean(axis=1)

  def __call__(
    self, x: jax.Array, memory: jax.Array, mask: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Attends from `x` to `memory`; see `attend`."""
    return self.attend(x, *self.keys_values(memory), mask)


class FeedForward(nn.Module):
  """Two layers with ReLU between: dense, or convolutions of width 3.

  Attributes:
    filter_size: Hidden units.
    dim: Features of the output.
    kind: `"conv"` (Lin et al., 2019) or `"dense"` (the paper's words).
    causal: Whether a convolution sees the current and earlier positions only,
      and not also the next one.
  """

  filter_size: int
  dim: int
  kind: str
  causal: bool

  def setup(self) -> None:
    """Creates both layers; a convolution is a dense layer over windows."""
    self.hidden = nn.Dense(self.filter_size)
    self.output = nn.Dense(self.dim)

  def _windows(self, x: jax.Array) -> jax.Array:
    if self.kind == "dense":
      return x
    length = x.shape[1]
    x = jnp.pad(x, ((0, 0), (2, 0) if self.causal else (1, 1), (0, 0)))
    return jnp.concatenate([x[:, i : i + length] for i in range(3)], axis=-1)

  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    """Transforms `x` `[batch, length, features]`.

    Args:
      x: The input.
      mask: `[batch, length]`; a convolution sees zeros at other positions.

    Returns:
      `[batch, length, dim]`.
    """
    real = mask[..., None]
    hidden = nn.relu(self.hidden(self._windows(jnp.where(real, x, 0.0))))
    return self.output(self._windows(jnp.where(real, hidden, 0.0)))

  def init_cache(self, batch: int, dtype: jnp.dtype) -> tuple[jax.Array, ...]:
    """Returns the two positions before the first, for both layers."""
    if self.kind == "dense":
      return ()
    return (
      jnp.zeros((batch, 2, self.dim), dtype),
      jnp.zeros((batch, 2, self.filter_size), dtype),
    )

  def step(
    self, x: jax.Array, cache: tuple[jax.Array, ...]
  ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Transforms one position of a causal layer.

    Args:
      x: `[batch, 1, features]`.
      cache: The two positions before this one, of both layers.

    Returns:
      `[batch, 1, dim]` and the cache for the next position.
    """
    if self.kind == "dense":
      return self.output(nn.relu(self.hidden(x))), ()
    before_x, before_hidden = cache
    x = jnp.concatenate([before_x, x], axis=1)
    hidden = nn.relu(self.hidden(x.reshape(x.shape[0], 1, -1)))
    hidden = jnp.concatenate([before_hidden, hidden], axis=1)
    y = self.output(hidden.reshape(hidden.shape[0], 1, -1))
    return y, (x[:, 1:], hidden[:, 1:])


class Residual(nn.Module):
  """Where a sub-layer's normalisation stands.

  `"pre"`: `x + dropout(f(norm(x)))`; `"post"`: `norm(x + dropout(f(x)))`, as
  eqs. 2-3, 5-6 and 10-12 are printed.

  Attributes:
    norm_order: `"pre"` or `"post"`.
    dropout_rate: Of the sub-layer's output.
  """

  norm_order: str
  dropout_rate: float

  def setup(self) -> None:
    """Creates the normalisation and the dropout."""
    self.norm = nn.LayerNorm()
    self.dropout = Dropout(self.dropout_rate)

  def before(self, x: jax.Array) -> jax.Array:
    """Returns the sub-layer's input for the residual stream `x`."""
    return self.norm(x) if self.norm_order == "pre" else x

  def after(
    self, x: jax.Array, y: jax.Array, keys: jax.Array | None
  ) -> jax.Array:
    """Returns the stream after the sub-layer gave `y` for `before(x)`."""
    y = x + self.dropout(y, keys)
    return y if self.norm_order == "pre" else self.norm(y)
