"""Random bits by the word: JAX's own functions spend 64 of them on a number."""

import jax
import jax.numpy as jnp
from jax.extend.random import threefry_2x32


def random_words(key: jax.Array, count: int) -> jax.Array:
  """Draws words of 32 random bits, `[count]` uint32, from a Threefry key."""
  pairs = -(-count // 2)
  words = threefry_2x32(
    jax.random.key_data(key), jnp.arange(2 * pairs, dtype=jnp.uint32)
  )
  return words[:count]


def exponential(key: jax.Array, count: int) -> jax.Array:
  """Draws from the exponential distribution of rate 1, `[count]`, above 0."""
  # The 23 bits of a float32's fraction, in the middle of their interval.
  fraction = (random_words(key, count) >> 9).astype(jnp.float32) + 0.5
  return -jnp.log(fraction * 2.0**-23)
