"""The Transformer decoder (paper eqs. 10-12), for sequences and for steps."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from empdg_jax.config import ModelConfig
from empdg_jax.models import layers


class Memory(NamedTuple):
  """The contexts, projected once per response.

  Attributes:
    keys_values: The keys and values of every layer,
      `[batch, heads, memory_length, depth]`.
    mask: True at real tokens, `[batch, memory_length]`.
  """

  keys_values: tuple[tuple[jax.Array, jax.Array], ...]
  mask: jax.Array


class LayerCache(NamedTuple):
  """The previous positions of one layer.

  Attributes:
    keys: The keys of self-attention, `[batch, heads, max_steps, depth]`.
    values: Its values, the same shape.
    feed_forward: The cache of `layers.FeedForward.step`.
  """

  keys: jax.Array
  values: jax.Array
  feed_forward: tuple[jax.Array, ...]


class DecoderLayer(nn.Module):
  """Causal self-attention, attention to the contexts, feed-forward."""

  config: ModelConfig
  dtype: Any = jnp.float32

  def setup(self) -> None:
    """Creates the three sub-layers."""
    c, dtype = self.config, self.dtype
    self.self_attention = layers.MultiHeadAttention(c, dtype)
    self.cross_attention = layers.MultiHeadAttention(c, dtype)
    self.feed_forward = layers.FeedForward(c, causal=True, dtype=dtype)
    self.self_residual = layers.Residual(c, dtype)
    self.cross_residual = layers.Residual(c, dtype)
    self.feed_forward_residual = layers.Residual(c, dtype)

  def keys_values(self, memory: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Projects the contexts for `cross_attention`."""
    return self.cross_attention.keys_values(memory)

  def __call__(
    self,
    x: jax.Array,
    memory: tuple[jax.Array, jax.Array],
    memory_mask: jax.Array,
    keys: jax.Array | None,
  ) -> tuple[jax.Array, jax.Array]:
    """Transforms all positions at once; see `Decoder.__call__`."""
    y = self.self_residual.before(x)
    causal = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
    y, _ = self.self_attention(y, y, causal)
    x = self.self_residual.after(x, y, keys)
    x, weights = self._attend_to_contexts(x, memory, memory_mask, keys)
    y = self.feed_forward_residual.before(x)
    # No mask: padding follows a response, and causal layers never look ahead.
    y = self.feed_forward(y, jnp.ones(x.shape[:2], bool))
    return self.feed_forward_residual.after(x, y, keys), weights

  def _attend_to_contexts(
    self,
    x: jax.Array,
    memory: tuple[jax.Array, jax.Array],
    mask: jax.Array,
    keys: jax.Array | None,
  ) -> tuple[jax.Array, jax.Array]:
    y = self.cross_residual.before(x)
    y, weights = self.cross_attention.attend(y, *memory, mask[:, None, None])
    return self.cross_residual.after(x, y, keys), weights

  def init_cache(self, batch: int, max_steps: int) -> LayerCache:
    """Returns an empty cache."""
    c = self.config
    depth = c.key_value_depth // c.num_heads
    zeros = jnp.zeros((batch, c.num_heads, max_steps, depth), self.dtype)
    return LayerCache(zeros, zeros, self.feed_forward.init_cache(batch))

  def step(
    self,
    x: jax.Array,
    memory: tuple[jax.Array, jax.Array],
    memory_mask: jax.Array,
    cache: LayerCache,
    index: jax.Array,
  ) -> tuple[jax.Array, jax.Array, LayerCache]:
    """Transforms the position `index`; see `Decoder.step`."""
    # The cache has its full length from the start, since a growing one would
    # compile anew at every step. `seen` hides the positions still empty.
    y = self.self_residual.before(x)
    k, v = self.self_attention.keys_values(y)
    keys = jax.lax.dynamic_update_slice_in_dim(cache.keys, k, index, axis=2)
    values = jax.lax.dynamic_update_slice_in_dim(cache.values, v, index, axis=2)
    seen = jnp.arange(keys.shape[2]) <= index
    y, _ = self.self_attention.attend(y, keys, values, seen)
    x = self.self_residual.after(x, y, None)
    x, weights = self._attend_to_contexts(x, memory, memory_mask, None)
    y = self.feed_forward_residual.before(x)
    y, feed_forward = self.feed_forward.step(y, cache.feed_forward)
    x = self.feed_forward_residual.after(x, y, None)
    return x, weights, LayerCache(keys, values, feed_forward)


def project_memory(
  stack: Sequence[DecoderLayer], memory: jax.Array, mask: jax.Array
) -> Memory:
  """Projects contexts `[batch, memory_length, d]` for a stack of layers."""
  return Memory(tuple(layer.keys_values(memory) for layer in stack), mask)


def run_stack(
  stack: Sequence[DecoderLayer],
  x: jax.Array,
  memory: Memory,
  keys: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """Runs a stack of layers; returns its output and the last attention."""
  attention = []
  for layer, keys_values in zip(stack, memory.keys_values, strict=True):
    x, weights = layer(x, keys_values, memory.mask, keys)
    attention.append(weights)
  return x, attention[-1]


def step_stack(
  stack: Sequence[DecoderLayer],
  x: jax.Array,
  memory: Memory,
  cache: tuple[LayerCache, ...],
  index: jax.Array,
) -> tuple[jax.Array, jax.Array, tuple[LayerCache, ...]]:
  """Runs a stack of layers at one position; see `Decoder.step`."""
  new_cache, attention = [], []
  for layer, keys_values, layer_cache in zip(
    stack, memory.keys_values, cache, strict=True
  ):
    x, weights, layer_cache = layer.step(
      x, keys_values, memory.mask, layer_cache, index
    )
    new_cache.append(layer_cache)
    attention.append(weights)
  return x, attention[-1], tuple(new_cache)


class Decoder(nn.Module):
  """A stack of decoder layers; positions are added here.

  With `norm_order="pre"` a normalisation follows the stack.

  Attributes:
    config: Sizes and options.
    dtype: The type of products and activations.
  """

  config: ModelConfig
  dtype: Any = jnp.float32

  def setup(self) -> None:
    """Creates the layers."""
    c = self.config
    self.layers = [DecoderLayer(c, self.dtype) for _ in range(c.num_layers)]
    self.dropout = layers.Dropout(c.dropout_rate)
    # With "post" the last layer has already normalised its output.
    pre = c.norm_order == "pre"
    self.norm = nn.LayerNorm(dtype=self.dtype) if pre else lambda x: x

  def project_memory(self, memory: jax.Array, mask: jax.Array) -> Memory:
    """Projects contexts `[batch, memory_length, d]` for all layers."""
    return project_memory(self.layers, memory, mask)

  def __call__(
    self, x: jax.Array, memory: Memory, keys: jax.Array | None
  ) -> tuple[jax.Array, jax.Array]:
    """Decodes with teacher forcing.

    Args:
      x: The inputs, `[batch, length, d]`.
      memory: The projected contexts.
      keys: The dropout keys, `[batch]`, or None for evaluation.

    Returns:
      The outputs `[batch, length, d]`, and the last layer's attention to the
      contexts, `[batch, length, memory_length]`.
    """
    x += layers.sinusoidal_positions(x.shape[1], x.shape[2])
    x = self.dropout(x.astype(self.dtype), keys)
    x, attention = run_stack(self.layers, x, memory, keys)
    return self.norm(x), attention

  def init_cache(self, batch: int, max_steps: int) -> tuple[LayerCache, ...]:
    """Returns an empty cache for every layer."""
    return tuple(layer.init_cache(batch, max_steps) for layer in self.layers)

  def step(
    self,
    x: jax.Array,
    memory: Memory,
    cache: tuple[LayerCache, ...],
    index: jax.Array,
  ) -> tuple[jax.Array, jax.Array, tuple[LayerCache, ...]]:
    """Decodes one position.

    Args:
      x: The input, `[batch, 1, d]`.
      memory: The projected contexts.
      cache: The caches of all layers.
      index: The position, a scalar.

    Returns:
      The output `[batch, 1, d]`, the last layer's attention to the contexts
      `[batch, 1, memory_length]`, and the caches for the next position.
    """
    # `index` is traced and the table's length may not be: look up a row of the
    # whole table, which is a constant of the compiled loop.
    steps = cache[0].keys.shape[2]
    x += layers.sinusoidal_positions(steps, x.shape[2])[index]
    x = x.astype(self.dtype)
    x, attention, cache = step_stack(self.layers, x, memory, cache, index)
    return self.norm(x), attention, cache
