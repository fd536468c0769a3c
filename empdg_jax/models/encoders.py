"""Transformer encoders (paper eqs. 2-3 and 5-6)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from empdg_jax.config import ModelConfig
from empdg_jax.models import layers


class EncoderLayer(nn.Module):
  """Self-attention and feed-forward with residual connections."""

  config: ModelConfig
  dtype: Any = jnp.float32

  def setup(self) -> None:
    """Creates the two sub-layers."""
    c, dtype = self.config, self.dtype
    self.attention = layers.MultiHeadAttention(c, dtype)
    self.feed_forward = layers.FeedForward(c, causal=False, dtype=dtype)
    self.attention_residual = layers.Residual(c, dtype)
    self.feed_forward_residual = layers.Residual(c, dtype)

  def __call__(
    self, x: jax.Array, mask: jax.Array, keys: jax.Array | None
  ) -> jax.Array:
    """Transforms `x` `[batch, length, d]`; see `Encoder`."""
    y = self.attention_residual.before(x)
    y, _ = self.attention(y, y, mask[:, None, None, :])
    x = self.attention_residual.after(x, y, keys)
    y = self.feed_forward_residual.before(x)
    y = self.feed_forward(y, mask)
    return self.feed_forward_residual.after(x, y, keys)


class Encoder(nn.Module):
  """A stack of layers over embedded tokens; positions are added here.

  With `norm_order="pre"` a normalisation follows the stack.

  Attributes:
    config: Sizes and options.
    dtype: The type of products and activations.
  """

  config: ModelConfig
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, x: jax.Array, mask: jax.Array, keys: jax.Array | None
  ) -> jax.Array:
    """Encodes a context.

    Args:
      x: The sums of word and state embeddings, `[batch, length, d]`.
      mask: True at real tokens, `[batch, length]`.
      keys: Dropout keys, `[batch]`, or None for evaluation.

    Returns:
      `[batch, length, d]`; the first position's vector represents the context.
    """
    x += layers.sinusoidal_positions(x.shape[1], x.shape[2])
    x = layers.Dropout(self.config.dropout_rate)(x.astype(self.dtype), keys)
    for layer in range(self.config.num_layers):
      encode = EncoderLayer(self.config, self.dtype, name=f"layer_{layer}")
      x = encode(x, mask, keys)
    if self.config.norm_order == "pre":
      # The residual stream reaches this point without a normalisation.
      x = nn.LayerNorm(dtype=self.dtype, name="norm")(x)
    return x
