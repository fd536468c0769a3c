"""Greedy and beam search over small tables, against brute force."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from empdg_jax.decoding import (
  argmax,
  beam_search,
  greedy_search,
  nucleus,
  sample_search,
)

EOS, PAD = 0, 1
VOCAB = 5
START = VOCAB  # The row of a table for the first token.
IMPOSSIBLE = -1e9


def make_table(rows: int, seed: int) -> np.ndarray:
  """Returns log-probabilities `[rows, VOCAB + 1, VOCAB]` by previous token."""
  rng = np.random.default_rng(seed)
  logits = rng.normal(0.0, 1.5, (rows, VOCAB + 1, VOCAB))
  logits[..., PAD] = -np.inf
  probs = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
  with np.errstate(divide="ignore"):
    return np.maximum(np.log(probs), IMPOSSIBLE)


def make_step(table: jax.Array) -> Any:
  """Returns a callback that looks up a table and records its inputs."""

  def step(tokens: jax.Array, cache: Any, index: jax.Array) -> Any:
    previous = jnp.where(index == 0, START, tokens)
    log_probs = table[cache["row"], previous]
    return log_probs, {
      "row": cache["row"],
      "seen": cache["seen"].at[:, index].set(previous),
      "calls": cache["calls"] + 1,
    }

  return step


def make_cache(rows: int, beams: int, max_steps: int) -> Any:
  """Returns the cache of `make_step` before its first call."""
  return {
    "row": jnp.repeat(jnp.arange(rows), beams),
    "seen": jnp.full((rows * beams, max_steps), -1),
    "calls": jnp.zeros((rows * beams,), jnp.int32),
  }


@functools.partial(jax.jit, static_argnames="max_steps")
def greedy(table: jax.Array, max_steps: int) -> tuple[jax.Array, Any]:
  """Returns sequences and cache of a greedy search."""
  rows = len(table)
  cache = make_cache(rows, 1, max_steps)
  step = make_step(table)

  def choose(*inputs: Any) -> tuple[jax.Array, Any]:
    log_probs, cache = step(*inputs[:3])
    return argmax(log_probs), cache

  return greedy_search(choose, cache, rows, max_steps, eos=EOS, pad=PAD)


@functools.partial(jax.jit, static_argnames=("max_steps", "beam_size"))
def beam(
  table: jax.Array, max_steps: int, beam_size: int, alpha: float
) -> tuple[jax.Array, jax.Array, Any]:
  """Returns sequences, scores and cache of a beam search."""
  rows = len(table)
  cache = make_cache(rows, beam_size, max_steps)
  return beam_search(
    make_step(table),
    cache,
    rows,
    max_steps,
    beam_size,
    alpha,
    eos=EOS,
    pad=PAD,
  )


def argmax_sequence(table: np.ndarray, max_steps: int) -> list[int]:
  """Returns the greedy sequence of one row, padded."""
  sequence: list[int] = []
  previous = START
  while len(sequence) < max_steps and previous != EOS:
    previous = int(table[previous].argmax())
    sequence.append(previous)
  return sequence + [PAD] * (max_steps - len(sequence))


def sequence_score(table: np.ndarray, tokens: list[int], alpha: float) -> float:
  """Returns `sum log p / ((5 + n) / 6) ** alpha` of unpadded tokens."""
  total = sum(
    table[previous, token]
    for previous, token in itertools.pairwise([START, *tokens])
  )
  return total / ((5 + len(tokens)) / 6) ** alpha


def best_sequence(
  table: np.ndarray, max_steps: int, alpha: float
) -> tuple[list[int], float]:
  """Returns the best of all sequences of one row, padded, and its score.

  A sequence ends with its first EOS or has `max_steps` tokens.
  """
  best, best_score = [], -np.inf
  words = [token for token in range(VOCAB) if token not in (EOS, PAD)]
  for length in range(1, max_steps + 1):
    for start in itertools.product(words, repeat=length - 1):
      for last in [EOS, *words] if length == max_steps else [EOS]:
        tokens = [*start, last]
        score = sequence_score(table, tokens, alpha)
        if score > best_score:
          best, best_score = tokens, score
  return best + [PAD] * (max_steps - len(best)), best_score


def assert_cache_belongs(sequences: jax.Array, cache: Any, calls: int) -> None:
  """Checks that each row's cache holds the past of that row's sequence."""
  rows = len(sequences)
  np.testing.assert_array_equal(cache["row"], np.arange(rows))
  np.testing.assert_array_equal(cache["calls"], np.full(rows, calls))
  np.testing.assert_array_equal(cache["seen"][:, 0], np.full(rows, START))
  np.testing.assert_array_equal(
    cache["seen"][:, 1:calls], sequences[:, : calls - 1]
  )


def test_greedy_follows_the_argmax() -> None:
  """Random tables; some rows end early, others never."""
  table, max_steps = make_table(12, seed=0), 6
  sequences, cache = greedy(table, max_steps)
  wanted = np.array([argmax_sequence(t, max_steps) for t in table])
  np.testing.assert_array_equal(sequences, wanted)
  ended = np.any(wanted == EOS, axis=1)
  assert ended.any()
  assert not ended.all()
  assert_cache_belongs(sequences, cache, max_steps)


def chain(*tokens: int) -> np.ndarray:
  """Returns a table whose argmax is this chain of distinct tokens."""
  table = np.full((VOCAB + 1, VOCAB), np.log(0.1))
  table[:, PAD] = IMPOSSIBLE
  for previous, token in itertools.pairwise([START, *tokens]):
    table[previous, token] = np.log(0.7)
  return table


def test_greedy_stops_when_all_have_ended() -> None:
  """Padding after EOS; no call after the EOS of the longest row."""
  table = np.stack([chain(2, EOS), chain(EOS), chain(3, 4, EOS)])
  sequences, cache = greedy(table, max_steps=7)
  np.testing.assert_array_equal(
    sequences,
    [
      [2, EOS, *[PAD] * 5],
      [EOS, *[PAD] * 6],
      [3, 4, EOS, *[PAD] * 4],
    ],
  )
  assert_cache_belongs(sequences, cache, calls=3)


@pytest.mark.parametrize("max_steps", [1, 4])
def test_greedy_respects_max_steps(max_steps: int) -> None:
  """A row that never ends has `max_steps` tokens and no EOS."""
  sequences, cache = greedy(np.stack([chain(2, 3, 2)]), max_steps)
  np.testing.assert_array_equal(sequences, [[2, 3, 2, 3][:max_steps]])
  assert_cache_belongs(sequences, cache, max_steps)


@pytest.mark.parametrize("alpha", [0.0, 0.6])
@pytest.mark.parametrize("seed", [1, 2])
def test_wide_beam_finds_the_best_of_all(seed: int, alpha: float) -> None:
  """The beam holds every hypothesis, so nothing is pruned."""
  table, max_steps = make_table(6, seed), 4
  # Four tokens are possible.
  sequences, scores, cache = beam(table, max_steps, 4**max_steps, alpha)
  for row in range(len(table)):
    wanted, score = best_sequence(table[row], max_steps, alpha)
    assert sequences[row].tolist() == wanted
    assert scores[row] == pytest.approx(score, rel=1e-5)
  assert_cache_belongs(sequences, cache, max_steps)


def test_length_penalty_prefers_longer() -> None:
  """`ln .5` ends at once; `3 ln .75 = -.863` over three tokens.

  Divided by `(8 / 6) ** alpha`, the longer wins from alpha = .762 on.
  """
  table = np.full((VOCAB + 1, VOCAB), IMPOSSIBLE)
  table[START, [EOS, 2]] = np.log([0.5, 0.75])
  table[2, 3] = table[3, EOS] = np.log(0.75)
  short, short_score, _ = beam(table[None], 3, 2, alpha=0.7)
  long, long_score, _ = beam(table[None], 3, 2, alpha=0.8)
  assert short.tolist() == [[EOS, PAD, PAD]]
  assert short_score[0] == pytest.approx(np.log(0.5), rel=1e-6)
  assert long.tolist() == [[2, 3, EOS]]
  assert long_score[0] == pytest.approx(
    3 * np.log(0.75) / (8 / 6) ** 0.8, rel=1e-6
  )


@pytest.mark.parametrize("alpha", [0.0, 0.6])
def test_beam_of_one_is_greedy(alpha: float) -> None:
  """The same sequences, with their scores."""
  table, max_steps = make_table(12, seed=3), 6
  sequences, scores, cache = beam(table, max_steps, 1, alpha)
  np.testing.assert_array_equal(sequences, greedy(table, max_steps)[0])
  for row, score in enumerate(scores):
    tokens = [t for t in sequences[row].tolist() if t != PAD]
    assert score == pytest.approx(
      sequence_score(table[row], tokens, alpha), rel=1e-5
    )
  assert_cache_belongs(sequences, cache, max_steps)


def test_narrow_beam_keeps_cache_and_score() -> None:
  """Hypotheses change places in the beam; their caches follow."""
  table, max_steps = make_table(16, seed=4), 6
  sequences, scores, cache = beam(table, max_steps, 3, 0.6)
  greedy_sequences, _ = greedy(table, max_steps)
  assert np.any(sequences != greedy_sequences)
  for row, score in enumerate(scores):
    tokens = [t for t in sequences[row].tolist() if t != PAD]
    assert score == pytest.approx(
      sequence_score(table[row], tokens, 0.6), rel=1e-5
    )
    assert score <= best_sequence(table[row], max_steps, 0.6)[1] + 1e-5
  assert_cache_belongs(sequences, cache, max_steps)


def test_finished_hypotheses_stay() -> None:
  """A hypothesis that ended first wins over longer ones."""
  table = np.full((VOCAB + 1, VOCAB), IMPOSSIBLE)
  table[START, [EOS, 2, 3]] = np.log([0.4, 0.35, 0.25])
  table[2, [2, 3]] = np.log([0.9, 0.1])
  table[3, [3, 4]] = np.log([0.9, 0.1])
  sequences, scores, cache = beam(table[None], 5, 2, alpha=0.0)
  assert sequences.tolist() == [[EOS, PAD, PAD, PAD, PAD]]
  assert scores[0] == pytest.approx(np.log(0.4), rel=1e-6)
  assert_cache_belongs(sequences, cache, calls=5)


def test_beam_stops_when_all_have_ended() -> None:
  """No call after the last hypothesis of the last row has ended."""
  table = np.full((VOCAB + 1, VOCAB), IMPOSSIBLE)
  table[START, [2, 3]] = np.log([0.6, 0.4])
  table[[2, 3], EOS] = 0.0
  sequences, _, cache = beam(table[None], 9, 2, alpha=0.6)
  assert sequences.tolist() == [[2, EOS, *[PAD] * 7]]
  assert_cache_belongs(sequences, cache, calls=2)


# Sampling.


@functools.partial(jax.jit, static_argnames="max_steps")
def sample(
  table: jax.Array,
  seeds: jax.Array,
  max_steps: int,
  temperature: float = 1.0,
  top_p: float = 1.0,
) -> tuple[jax.Array, Any]:
  """Returns sequences and cache of sampling, a seed for each row."""
  rows = len(table)
  return sample_search(
    make_step(table),
    make_cache(rows, 1, max_steps),
    jax.vmap(jax.random.key)(seeds),
    jnp.full(rows, temperature),
    jnp.full(rows, top_p),
    max_steps,
    eos=EOS,
    pad=PAD,
  )


@pytest.mark.parametrize(
  ("top_p", "kept"),
  [
    (1e-6, [0]),
    (0.49, [0]),  # Nothing is likelier than .5.
    (0.51, [0, 3]),  # .5 is likelier than .3, and below .51.
    (0.79, [0, 3]),
    (0.81, [0, 2, 3]),  # .5 + .3 are likelier than .15.
    (0.96, [0, 1, 2, 3]),
    (1.0, [0, 1, 2, 3]),
  ],
)
def test_nucleus_by_hand(top_p: float, kept: list[int]) -> None:
  """Of the probabilities .5, .3, .15 and .05, and one that is impossible."""
  probs = jnp.log(jnp.array([[0.5, 0.05, 0.15, 0.3, 0.0]])).at[0, 4].set(-1e9)
  found = nucleus(probs, jnp.array([top_p]))[0]
  is_kept = np.isin(np.arange(4), kept)
  np.testing.assert_array_equal(np.isfinite(found[:4]), is_kept)
  np.testing.assert_array_equal(found[np.array(kept)], probs[0, np.array(kept)])


def test_nucleus_keeps_ties_together() -> None:
  """Half of .4, .3 and .3 takes one of the two .3, and so both of them."""
  probs = jnp.log(jnp.array([[0.3, 0.4, 0.3], [0.2, 0.7, 0.1]]))
  found = np.isfinite(nucleus(probs, jnp.array([0.5, 0.5])))
  np.testing.assert_array_equal(found, [[1, 1, 1], [0, 1, 0]])


@pytest.mark.parametrize(
  ("temperature", "top_p", "wanted"),
  [
    (1.0, 1.0, [0.5, 0.3, 0.2]),
    (1.0, 0.7, [0.625, 0.375, 0.0]),  # .5 / .8 and .3 / .8.
    # Square roots of .5, .3 and .2 over their sum, 1.702.
    (2.0, 1.0, [0.4155, 0.3218, 0.2627]),
  ],
)
def test_sampling_follows_the_distribution(
  temperature: float, top_p: float, wanted: list[float]
) -> None:
  """10,000 draws; three standard errors are at most .015."""
  table = np.full((VOCAB + 1, VOCAB), IMPOSSIBLE)
  table[START, [2, 3, 4]] = np.log([0.5, 0.3, 0.2])
  tables = np.broadcast_to(table, (10_000, *table.shape))
  found, _ = sample(tables, jnp.arange(10_000), 1, temperature, top_p)
  shares = np.bincount(found[:, 0], minlength=VOCAB) / len(found)
  np.testing.assert_allclose(shares[2:], wanted, atol=0.015)
  assert shares[:2].sum() == 0


def test_sampled_words_depend_on_the_seed_alone() -> None:
  """In any order and batch; another seed draws other words."""
  tables, seeds = make_table(12, seed=5), jnp.arange(12)
  all_rows, cache = sample(tables, seeds, 6)
  assert_cache_belongs(all_rows, cache, int(cache["calls"][0]))
  order = np.array([7, 2, 11])
  some, _ = sample(tables[order], seeds[order], 6)
  np.testing.assert_array_equal(some, all_rows[order])
  others, _ = sample(tables, seeds + 12, 6)
  assert np.any(others != all_rows)


def test_the_smallest_nucleus_is_greedy() -> None:
  tables = make_table(12, seed=6)
  sampled, _ = sample(tables, jnp.arange(12), 6, 1.0, 1e-6)
  np.testing.assert_array_equal(sampled, greedy(tables, 6)[0])
