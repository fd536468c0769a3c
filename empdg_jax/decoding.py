"""Greedy and beam search, and sampling, over a callback and a cache.

The callback `step(tokens, cache, index) -> (log_probs, cache)` takes the
tokens `[rows]` chosen at the step before and gives log-probabilities
`[rows, vocab]`; the cache is any pytree of arrays whose first axis is the rows.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from empdg_jax.rng import exponential

Step = Callable[[jax.Array, Any, jax.Array], tuple[jax.Array, Any]]
_WORST = -1e18


def argmax(x: jax.Array) -> jax.Array:
  """Returns the first largest's index, `[..., vocab] -> [...]`.

  By two plain reductions: XLA's CPU backend does not vectorise `jnp.argmax`.
  """
  size = x.shape[-1]
  largest = x == jnp.max(x, axis=-1, keepdims=True)
  return jnp.min(jnp.where(largest, jnp.arange(size), size), axis=-1)


def greedy_search(
  step: Step, cache: Any, rows: int, max_steps: int, *, eos: int, pad: int
) -> tuple[jax.Array, Any]:
  """Takes the likeliest token at every step until all rows have ended.

  Args:
    step: The callback.
    cache: Its first cache.
    rows: How many sequences.
    max_steps: Tokens a sequence, EOS included.
    eos: The id that ends a sequence.
    pad: The id that fills a sequence up behind its end.

  Returns:
    Sequences `[rows, max_steps]` and the last cache.
  """

  def unfinished(carry: tuple) -> jax.Array:
    index, _, _, ended, _ = carry
    return (index < max_steps) & ~jnp.all(ended)

  def body(carry: tuple) -> tuple:
    index, tokens, sequences, ended, cache = carry
    log_probs, cache = step(tokens, cache, index)
    tokens = jnp.where(ended, pad, argmax(log_probs))
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
  ended stays in its beam with its score and competes with the others.

  Args:
    step: The callback, over `rows * beam_size` sequences, the beams of a row
      side by side.
    cache: Its first cache, of `rows * beam_size` rows.
    rows: How many inputs.
    max_steps: Tokens a sequence, EOS included.
    beam_size: Hypotheses a row.
    length_penalty: alpha; 0 compares sums.
    eos: The id that ends a sequence.
    pad: The id that fills a sequence up behind its end.

  Returns:
    The best sequences `[rows, max_steps]`, their scores `[rows]`, and the
    cache rows that belong to them.
  """
  beams = (rows, beam_size)

  def score(total: jax.Array, length: jax.Array) -> jax.Array:
    return total / ((5.0 + length) / 6.0) ** length_penalty

  def unfinished(carry: tuple) -> jax.Array:
    index, ended = carry[0], carry[4]
    return (index < max_steps) & ~jnp.all(ended)

  def body(carry: tuple) -> tuple:
    index, sequences, totals, lengths, ended, cache = carry
    tokens = sequences[:, :, jnp.maximum(index - 1, 0)]
    log_probs, cache = step(tokens.reshape(-1), cache, index)
    vocab = log_probs.shape[-1]
    log_probs = log_probs.reshape(*beams, vocab)
    # An ended hypothesis goes on with `pad` alone, at no cost.
    stay = jnp.full((vocab,), _WORST).at[pad].set(0.0)
    log_probs = jnp.where(ended[..., None], stay, log_probs)
    next_totals = totals[..., None] + log_probs  # -> [rows, beams, vocab]
    next_lengths = jnp.where(ended, lengths, index + 1)
    candidates = score(next_totals, next_lengths[..., None])
    _, best = jax.lax.top_k(candidates.reshape(rows, -1), beam_size)
    parent, tokens = best // vocab, best % vocab

    def of_parent(x: jax.Array) -> jax.Array:
      grouped = x.reshape(*beams, *x.shape[1:])
      chosen = jax.vmap(lambda values, indices: values[indices])(
        grouped, parent
      )
      return chosen.reshape(x.shape)

    ended = jnp.take_along_axis(ended, parent, axis=1)
    sequences = jax.vmap(lambda s, p: s[p])(sequences, parent)
    sequences = sequences.at[:, :, index].set(tokens)
    totals = jnp.take_along_axis(next_totals.reshape(rows, -1), best, axis=1)
    lengths = jnp.take_along_axis(next_lengths, parent, axis=1)
    cache = jax.tree.map(of_parent, cache)
    return index + 1, sequences, totals, lengths, ended | (tokens == eos), cache

  _, sequences, totals, lengths, _, cache = jax.lax.while_loop(
    unfinished,
    body,
    (
      jnp.int32(0),
      jnp.full((*beams, max_steps), pad, jnp.int32),
      # All beams begin alike, so that only the first one may branch.
      jnp.broadcast_to(
        jnp.where(jnp.arange(beam_size) == 0, 0.0, _WORST), beams
      ),
      jnp.zeros(beams, jnp.int32),
      jnp.zeros(beams, bool),
      cache,
    ),
  )
  scores = score(totals, lengths)
  best = jnp.argmax(scores, axis=1)

  def of_best(x: jax.Array) -> jax.Array:
    grouped = x.reshape(*beams, *x.shape[1:])
    return jax.vmap(lambda values, i: values[i])(grouped, best)

  return (
    of_best(sequences.reshape(-1, max_steps)),
    scores.max(axis=1),
    (jax.tree.map(of_best, cache)),
  )


def straight_through_sample(
  step: Callable[[jax.Array, Any, jax.Array, Any], tuple[jax.Array, Any, Any]],
  embed: Callable[[jax.Array, jax.Array], jax.Array],
  first: jax.Array,
  cache: Any,
  keys: jax.Array,
  of_steps: Any,
  max_steps: int,
  temperature: float,
  *,
  eos: int,
  pad: int,
) -> tuple[jax.Array, jax.Array, Any]:
  """Draws sequences through which gradients flow (Jang et al., 2017).

  A token is the largest of `log p + Gumbel noise`, which draws it from p; its
  weights, `softmax((log p + noise) / temperature)`, stand for it in gradients.

  Args:
    step: `(x, cache, index, of_step) -> (log_probs, cache, record)`; x is the
      token before, embedded.
    embed: Embeds tokens `[rows]` that have weights `[rows, vocab]`,
      `[rows, d]`.
    first: The first x, `[rows, d]`.
    cache: Its first cache.
    keys: Of each row's noise, `[rows]`.
    of_steps: Arrays with an axis of steps before the others; each step is given
      its own part.
    max_steps: Tokens a sequence, EOS included.
    temperature: Of the weights; the lower, the closer to the tokens and the
      noisier the gradient.
    eos: The id that ends a sequence.
    pad: The id that fills a sequence up behind its end.

  Returns:
    Sequences `[rows, max_steps]`, the same embedded `[rows, max_steps, d]`, and
    the records of all steps, an axis of steps before the others.
  """

  def body(carry: tuple, step_inputs: tuple) -> tuple[tuple, tuple]:
    x, ended, cache = carry
    index, of_step = step_inputs
    log_probs, cache, record = step(x, cache, index, of_step)
    vocab = log_probs.shape[-1]
    noise = jax.vmap(
      lambda key: -jnp.log(exponential(jax.random.fold_in(key, index), vocab))
    )(keys)
    noisy = log_probs + noise
    tokens = jnp.where(ended, pad, argmax(noisy))
    x = embed(tokens, jax.nn.softmax(noisy / temperature))
    return (x, ended | (tokens == eos), cache), (tokens, x, record)

  _, (tokens, embedded, records) = jax.lax.scan(
    body,
    (first, jnp.zeros(len(keys), bool), cache),
    (jnp.arange(max_steps), of_steps),
  )
  return tokens.T, embedded.transpose(1, 0, 2), records
