"""Random numbers from 32 bits each, where `jax.random` spends 64."""

import jax
import jax.numpy as jnp
from jax.extend.random import threefry_2x32


def random_words(key: jax.Array, count: int) -> jax.Array:
  """Draws words of 32 random bits, `[count]` uint32, from a Threefry key."""
  # Threefry hashes two counters into two words, and `jax.random.bits` folds
  # them into one. Here both count: dropout draws for every feature and sampling
  # for every word of the vocabulary, so half the hashes are worth saving.
  pairs = -(-count // 2)
  words = threefry_2x32(
    jax.random.key_data(key), jnp.arange(2 * pairs, dtype=jnp.uint32)
  )
  return words[:count]


def exponential(key: jax.Array, count: int) -> jax.Array:
  """Draws from the exponential distribution of rate 1, `[count]`, above 0."""
  # A uniform number of 23 bits, as many as a float32's fraction holds. The half
  # puts it in the middle of its interval: never 0 and never 1, so that both its
  # logarithm and the logarithm of the result, Gumbel noise, are finite.
  fraction = (random_words(key, count) >> 9).astype(jnp.float32) + 0.5
  return -jnp.log(fraction * 2.0**-23)


def fold_in(keys: jax.Array, data: jax.typing.ArrayLike) -> jax.Array:
  """Returns a key per row for a step or a purpose, `[rows]`."""
  return jax.vmap(jax.random.fold_in, (0, None))(keys, data)


def gumbel(keys: jax.Array, count: int) -> jax.Array:
  """Draws Gumbel noise from a key per row, `[rows, count]`."""
  return -jnp.log(jax.vmap(exponential, (0, None))(keys, count))
