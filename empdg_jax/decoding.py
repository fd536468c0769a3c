"""Greedy search, beam search and sampling over a callback and a cache.

The callback `step(tokens, cache, index) -> (log_probs, cache)` takes the tokens
`[rows]` chosen one step earlier and returns log-probabilities `[rows, vocab]`.
The cache is any pytree of arrays whose first axis is the rows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from empdg_jax.rng import fold_in, gumbel

Step = Callable[[jax.Array, Any, jax.Array], tuple[jax.Array, Any]]
Choose = Callable[[jax.Array, Any, jax.Array, jax.Array], tuple[jax.Array, Any]]
# The name, for `checkpoint_name`, of what the backward pass of sampling shall
# read back, beside the products that JAX sees: noise, and in a `step` products
# with a derivative of their own.
SAVED = "saved"
# Below every sum of log-probabilities, also of tokens that a model makes
# impossible with -1e9.
_WORST = -1e18


def argmax(x: jax.Array) -> jax.Array:
  """Returns the index of the first largest value, `[..., vocab] -> [...]`."""
  # Two plain reductions: XLA's CPU backend vectorises them, but not the
  # reduction over pairs of value and index that `jnp.argmax` becomes.
  size = x.shape[-1]
  largest = x == jnp.max(x, axis=-1, keepdims=True)
  return jnp.min(jnp.where(largest, jnp.arange(size), size), axis=-1)


def greedy_search(
  choose: Choose, cache: Any, rows: int, max_steps: int, *, eos: int, pad: int
) -> tuple[jax.Array, Any]:
  """Takes one token at every step until all rows have ended.

  Args:
    choose: Returns the next tokens `[rows]` and the cache, given the tokens
      chosen one step earlier, the cache, the step, and which rows have ended,
      whose tokens do not matter, `[rows]`.
    cache: The cache of the first step.
    rows: The number of sequences.
    max_steps: The most tokens in a sequence, EOS included.
    eos: The id that ends a sequence.
    pad: The id that fills a sequence after its end.

  Returns:
    The sequences `[rows, max_steps]` and the last cache.
  """

  def unfinished(carry: tuple) -> jax.Array:
    index, _, _, ended, _ = carry
    return (index < max_steps) & ~jnp.all(ended)

  def body(carry: tuple) -> tuple:
    index, tokens, sequences, ended, cache = carry
    tokens, cache = choose(tokens, cache, index, ended)
    # Ended rows run on until the last one ends; their tokens stay padding.
    tokens = jnp.where(ended, pad, tokens)
    sequences = sequences.at[:, index].set(tokens)
    return index + 1, tokens, sequences, ended | (tokens == eos), cache

  _, _, sequences, _, cache = jax.lax.while_loop(
    unfinished,
    body,
    (
      jnp.int32(0),
      jnp.full((rows,), pad, jnp.int32),
      jnp.full((rows, max_steps), pad, jnp.int32),
      jnp.zeros((rows,), bool),
      cache,
    ),
  )
  return sequences, cache


def nucleus(log_probs: jax.Array, top_p: jax.Array) -> jax.Array:
  """Keeps the nucleus of distributions (Holtzman et al., 2020).

  A token belongs to it if all likelier tokens together have a probability below
  `top_p`, so that tokens of equal probability stay or go together.

  Args:
    log_probs: Log-probabilities, `[rows, vocab]`.
    top_p: The nucleus' least probability, above 0; 1 keeps all, `[rows]`.

  Returns:
    The log-probabilities, not normalised anew, with -inf outside the nucleus.

  >>> nucleus(jnp.log(jnp.array([[0.5, 0.3, 0.2]])), jnp.array([0.6]))[0, 2]
  Array(-inf, dtype=float32)
  """
  probs = jnp.exp(log_probs)
  top_p = top_p[:, None]
  # The smallest probability of the nucleus, by bisection: the bits of floats
  # above 0 are in the floats' order. Sorting a vocabulary at every step takes
  # XLA's CPU backend 27 times as long.
  bits = jax.lax.bitcast_convert_type(probs, jnp.int32)

  def halve(_: int, bounds: tuple) -> tuple:
    low, high = bounds
    middle = low + (high - low) // 2
    likelier = jnp.sum(probs, axis=-1, keepdims=True, where=bits > middle)
    inside = likelier < top_p
    return jnp.where(inside, low, middle + 1), jnp.where(inside, middle, high)

  low = jnp.zeros_like(bits[:, :1])
  high = jnp.max(bits, axis=-1, keepdims=True)
  least, _ = jax.lax.fori_loop(0, 31, halve, (low, high))
  # Probabilities may add up to 1 before the last of them.
  return jnp.where((bits >= least) | (top_p >= 1.0), log_probs, -jnp.inf)


def sample_search(
  step: Step,
  cache: Any,
  keys: jax.Array,
  temperature: jax.Array,
  top_p: jax.Array,
  max_steps: int,
  *,
  eos: int,
  pad: int,
) -> tuple[jax.Array, Any]:
  """Draws every token until all rows have ended.

  The largest of `log p + Gumbel noise` is a token drawn from p.

  Args:
    step: The callback.
    cache: The cache of the first step.
    keys: The keys of the noise, `[rows]`.
    temperature: Divides log-probabilities, above 0, `[rows]`.
    top_p: The probability of the nucleus that is drawn from, `[rows]`.
    max_steps: The most tokens in a sequence, EOS included.
    eos: The id that ends a sequence.
    pad: The id that fills a sequence after its end.

  Returns:
    The sequences `[rows, max_steps]` and the last cache.
  """

  def draw(
    tokens: jax.Array, cache: Any, index: jax.Array, ended: jax.Array
  ) -> tuple[jax.Array, Any]:
    del ended
    inner, *of_rows = cache
    keys, temperature, top_p = of_rows
    log_probs, inner = step(tokens, inner, index)
    log_probs = jax.nn.log_softmax(log_probs / temperature[:, None])
    # A key per row and step, so that a row's words do not depend on the batch
    # around it.
    noise = gumbel(fold_in(keys, index), log_probs.shape[-1])
    return argmax(nucleus(log_probs, top_p) + noise), (inner, *of_rows)

  # In the cache, since a search may rearrange the rows of its cache.
  cache = (cache, keys, temperature, top_p)
  sequences, cache = greedy_search(
    draw, cache, len(keys), max_steps, eos=eos, pad=pad
  )
  return sequences, cache[0]


class _Beams(NamedTuple):
  """The hypotheses of a beam search.

  Attributes:
    index: The number of steps taken, a scalar.
    sequences: `[rows, beam_size, max_steps]`.
    totals: Summed log-probabilities, `[rows, beam_size]`.
    lengths: Numbers of tokens, EOS included, `[rows, beam_size]`.
    ended: Whether a hypothesis holds EOS, `[rows, beam_size]`.
    cache: The cache, of `rows * beam_size` rows.
  """

  index: jax.Array
  sequences: jax.Array
  totals: jax.Array
  lengths: jax.Array
  ended: jax.Array
  cache: Any


def _choose(x: jax.Array, indices: jax.Array) -> jax.Array:
  """Takes `indices` `[rows, ...]` from the second axis of `[rows, n, ...]`."""
  return jax.vmap(lambda values, index: values[index])(x, indices)


def _score(
  totals: jax.Array, lengths: jax.Array, length_penalty: float
) -> jax.Array:
  return totals / ((5.0 + lengths) / 6.0) ** length_penalty


def _expand(
  beams: _Beams, log_probs: jax.Array, length_penalty: float, eos: int, pad: int
) -> _Beams:
  """Continues all hypotheses by all tokens and keeps the best of each row.

  Args:
    beams: The hypotheses, with the cache of the step that scored them.
    log_probs: Log-probabilities of the next tokens,
      `[rows, beam_size, vocab]`.
    length_penalty: alpha.
    eos: The id that ends a sequence.
    pad: The id that fills a sequence after its end.

  Returns:
    The hypotheses one step later.
  """
  rows, beam_size, vocab = log_probs.shape
  # An ended hypothesis has one continuation, `pad` at no cost, and so takes one
  # place in the beam with an unchanged score.
  stay = jnp.full((vocab,), _WORST).at[pad].set(0.0)
  log_probs = jnp.where(beams.ended[..., None], stay, log_probs)
  totals = beams.totals[..., None] + log_probs  # -> [rows, beam_size, vocab]
  lengths = jnp.where(beams.ended, beams.lengths, beams.index + 1)
  # The best of beams and tokens together, by their flat index.
  candidates = _score(totals, lengths[..., None], length_penalty)
  _, best = jax.lax.top_k(candidates.reshape(rows, -1), beam_size)
  parents, tokens = best // vocab, best % vocab
  # One parent may have several children and another none. What belongs to a
  # hypothesis, its cache included, is copied from its parent's place; a cache
  # left in place would mix the pasts of different hypotheses.
  sequences = _choose(beams.sequences, parents)
  return _Beams(
    beams.index + 1,
    sequences.at[:, :, beams.index].set(tokens),
    _choose(totals.reshape(rows, -1), best),
    _choose(lengths, parents),
    _choose(beams.ended, parents) | (tokens == eos),
    jax.tree.map(
      lambda x: _choose(
        x.reshape(rows, beam_size, *x.shape[1:]), parents
      ).reshape(x.shape),
      beams.cache,
    ),
  )


def beam_search(
  step: Step,
  cache: Any,
  rows: int,
  max_steps: int,
  beam_size: int,
  length_penalty: float,
  *,
  eos: int,
  pad: int,
) -> tuple[jax.Array, jax.Array, Any]:
  """Keeps the `beam_size` best hypotheses of every row.

  A hypothesis of n tokens with summed log-probability l scores
  `l / ((5 + n) / 6) ** length_penalty` (Wu et al., 2016, eq. 14). One that has
  ended keeps its score and competes with the others.

  Args:
    step: The callback, over `rows * beam_size` sequences; the hypotheses of a
      row are adjacent.
    cache: The cache of the first step, of `rows * beam_size` rows.
    rows: The number of inputs.
    max_steps: The most tokens in a sequence, EOS included.
    beam_size: The number of hypotheses per row.
    length_penalty: alpha; 0 compares sums.
    eos: The id that ends a sequence.
    pad: The id that fills a sequence after its end.

  Returns:
    The best sequences `[rows, max_steps]`, their scores `[rows]`, and their
    rows of the cache.
  """
  shape = (rows, beam_size)

  def unfinished(beams: _Beams) -> jax.Array:
    return (beams.index < max_steps) & ~jnp.all(beams.ended)

  def body(beams: _Beams) -> _Beams:
    # The first step reads padding, which the callback ignores.
    tokens = beams.sequences[:, :, jnp.maximum(beams.index - 1, 0)]
    log_probs, cache = step(tokens.reshape(-1), beams.cache, beams.index)
    return _expand(
      beams._replace(cache=cache),
      log_probs.reshape(*shape, -1),
      length_penalty,
      eos,
      pad,
    )

  beams = jax.lax.while_loop(
    unfinished,
    body,
    _Beams(
      jnp.int32(0),
      jnp.full((*shape, max_steps), pad, jnp.int32),
      # All hypotheses of a row begin alike. Only the first may branch, or the
      # beam would hold `beam_size` copies of the same sequence.
      jnp.broadcast_to(
        jnp.where(jnp.arange(beam_size) == 0, 0.0, _WORST), shape
      ),
      jnp.zeros(shape, jnp.int32),
      jnp.zeros(shape, bool),
      cache,
    ),
  )
  scores = _score(beams.totals, beams.lengths, length_penalty)
  best = jnp.argmax(scores, axis=1)
  return (
    _choose(beams.sequences, best),
    scores.max(axis=1),
    jax.tree.map(
      lambda x: _choose(x.reshape(*shape, *x.shape[1:]), best), beams.cache
    ),
  )


def straight_through_sample(
  step: Callable[[jax.Array, Any, jax.Array, Any], tuple[jax.Array, Any, Any]],
  embed: Callable[[jax.Array, jax.Array], jax.Array],
  first: jax.Array,
  cache: Any,
  keys: jax.Array,
  extras: Any,
  max_steps: int,
  temperature: float,
  *,
  eos: int,
  pad: int,
) -> tuple[jax.Array, jax.Array, Any]:
  """Samples sequences through which gradients flow (Jang et al., 2017).

  The largest of `log p + Gumbel noise` is a token drawn from p. In gradients
  its weights `softmax((log p + noise) / temperature)` stand for it.

  Args:
    step: `(x, cache, index, extra) -> (log_probs, cache, record)`, where x is
      the embedded token of the previous step.
    embed: Embeds tokens `[rows]` with weights `[rows, vocab]`, to `[rows, d]`.
    first: The first x, `[rows, d]`.
    cache: The cache of the first step.
    keys: The keys of the noise, `[rows]`.
    extras: Arrays with a leading axis of steps; each step gets its own part.
    max_steps: The most tokens in a sequence, EOS included.
    temperature: The temperature of the weights. A lower one brings them closer
      to the tokens, with a noisier gradient.
    eos: The id that ends a sequence.
    pad: The id that fills a sequence after its end.

  Returns:
    The sequences `[rows, max_steps]`, their embeddings `[rows, max_steps, d]`,
    and the records of all steps, with a leading axis of steps.
  """

  def body(carry: tuple, inputs: tuple) -> tuple[tuple, tuple]:
    x, ended, cache = carry
    index, extra = inputs
    log_probs, cache, record = step(x, cache, index, extra)
    vocab = log_probs.shape[-1]
    noise = checkpoint_name(gumbel(fold_in(keys, index), vocab), SAVED)
    noisy = log_probs + noise
    tokens = jnp.where(ended, pad, argmax(noisy))
    x = embed(tokens, jax.nn.softmax(noisy / temperature))
    return (x, ended | (tokens == eos), cache), (tokens, x, record)

  # A scan of fixed length: a `while_loop` that stops at the last EOS has no
  # backward pass. That pass reads the products and the noise of each step back
  # and computes the rest anew: several more numbers for each word of the
  # vocabulary would take longer to write and to read. The loop itself keeps XLA
  # from merging both computations.
  policies = jax.checkpoint_policies
  saved = policies.save_from_both_policies(
    policies.dots_saveable, policies.save_only_these_names(SAVED)
  )
  _, (tokens, embedded, records) = jax.lax.scan(
    jax.checkpoint(body, policy=saved, prevent_cse=False),
    (first, jnp.zeros(len(keys), bool), cache),
    (jnp.arange(max_steps), extras),
  )
  return tokens.T, embedded.transpose(1, 0, 2), records
