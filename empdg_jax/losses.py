"""Losses (eqs. 14, 19) and the mixture of generating and copying.

Every loss returns one value per example or per token; the caller masks and
averages.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.experimental.layout import Layout, with_layout_constraint

from empdg_jax.rng import gumbel

# Keeps log(0), and the derivative of a norm at 0, finite. It is far below any
# probability or slope that matters.
_TINY = 1e-20
# Far below every logit and log-probability, but finite.
_IMPOSSIBLE = -1e9


class Pointer(NamedTuple):
  """The copying part of a pointer-generator's output (See et al., 2017).

  Attributes:
    gate: The logit of generating rather than copying, `[batch, length]`.
    attention: The probability of copying each source position, summing to 1,
      `[batch, length, source_length]`.
    source: The ids of the source tokens, `[batch, source_length]`.
  """

  gate: jax.Array
  attention: jax.Array
  source: jax.Array


def product(a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns `a @ b` in float32, whatever the type of the factors."""
  return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def exclude(scores: jax.Array, excluded: jax.Array) -> jax.Array:
  """Lowers the scores of impossible tokens to -1e9.

  Args:
    scores: Logits, probabilities or their logarithms, `[..., vocab]`.
    excluded: Marks impossible tokens, from id 0 on; it broadcasts to
      `[..., n]`.
  """
  # One pass over all words, which XLA fuses with what made the scores; writing
  # the first few into an array of its own doubles the time of sampling.
  missing = scores.shape[-1] - excluded.shape[-1]
  padding = [(0, 0)] * (excluded.ndim - 1) + [(0, missing)]
  return jnp.where(jnp.pad(excluded, padding), _IMPOSSIBLE, scores)


def _copied(pointer: Pointer, vocab: int) -> jax.Array:
  """Returns the attention to each token, `[batch, length, vocab]`."""
  return jax.vmap(
    lambda ids, weights: (
      jnp.zeros((weights.shape[0], vocab)).at[:, ids].add(weights)
    )
  )(pointer.source, pointer.attention)


def _log_add_copies(
  log_generated: jax.Array, log_copy: jax.Array, copied: jax.Array
) -> jax.Array:
  """Returns `log(generated + (1 - g) copied)`; `log_copy` is `log(1 - g)`."""
  # A probability may underflow where its logarithm does not: a saturated gate
  # or a confident softmax still has a finite loss and gradient.
  return jnp.logaddexp(
    log_generated, log_copy + jnp.log(jnp.maximum(copied, _TINY))
  )


def mixture(logits: jax.Array, pointer: Pointer | None) -> jax.Array:
  """Returns probabilities over the whole vocabulary.

  Without a pointer this is the softmax of eq. 13. With one, and gate
  probability g, it is `g softmax(logits)[v] + (1 - g) sum of attention to v`.

  Args:
    logits: `[batch, length, vocab]`.
    pointer: The gate, attention and source ids.

  Returns:
    `[batch, length, vocab]`.
  """
  probs = jax.nn.softmax(logits)
  if pointer is None:
    return probs
  gate = jax.nn.sigmoid(pointer.gate)[..., None]
  return gate * probs + (1.0 - gate) * _copied(pointer, logits.shape[-1])


def log_mixture(logits: jax.Array, pointer: Pointer | None) -> jax.Array:
  """Returns the logarithm of `mixture`, accurate for tiny probabilities."""
  log_probs = jax.nn.log_softmax(logits)
  if pointer is None:
    return log_probs
  copied = _copied(pointer, logits.shape[-1])
  gate = pointer.gate[..., None]
  return _log_add_copies(
    jax.nn.log_sigmoid(gate) + log_probs, jax.nn.log_sigmoid(-gate), copied
  )


def _at_source(
  logits: jax.Array, log_normalizer: jax.Array, pointer: Pointer
) -> tuple[jax.Array, jax.Array]:
  """Returns the log-probabilities of source words, generated and mixed.

  Args:
    logits: The logits of the source words, `[rows, source_length]`.
    log_normalizer: The logsumexp of all logits, `[rows]`.
    pointer: The copying part of each row; see `_Rows`.

  Returns:
    `log(g softmax)` and `log p`, each `[rows, source_length]`.
  """
  # A repeated word collects the attention to all its positions.
  same = pointer.source[:, :, None] == pointer.source[:, None, :]
  copied = jnp.einsum("rs,rst->rt", pointer.attention, same.astype(jnp.float32))
  log_scale = jax.nn.log_sigmoid(pointer.gate) - log_normalizer
  generated = logits + log_scale[:, None]
  log_copy = jax.nn.log_sigmoid(-pointer.gate)[:, None]
  return generated, _log_add_copies(generated, log_copy, copied)


def _copy_gain(
  logits: jax.Array, log_normalizer: jax.Array, pointer: Pointer
) -> jax.Array:
  """Returns the sum over source words of `log p - log(g softmax)`.

  Each distinct source word counts once, `[rows]`; see `_at_source`.
  """
  generated, mixed = _at_source(logits, log_normalizer, pointer)
  same = pointer.source[:, :, None] == pointer.source[:, None, :]
  first = ~jnp.any(jnp.tril(same, k=-1), axis=-1)  # -> [rows, source_length]
  return jnp.sum((mixed - generated) * first, axis=-1)


def likeliest(
  hidden: jax.Array,
  kernel: jax.Array,
  pointer: Pointer | None,
  excluded: jax.Array,
  active: jax.Array,
  keys: jax.Array | None = None,
) -> jax.Array:
  """Returns the token of the largest `log_mixture` in each active row.

  The likeliest token is either that of the largest logit or in the source, so
  no distribution over the vocabulary is mixed.

  Args:
    hidden: The inputs of the projection, `[batch, d]`.
    kernel: The projection, `[d, vocab]`.
    pointer: The gate `[batch]`, attention and source `[batch, source_length]`,
      or None for the plain softmax.
    excluded: Marks tokens that are impossible, from id 0 on, `[batch, n]`.
    active: The rows to look at, `[batch]`; the others cost no product and get
      an arbitrary token.
    keys: The keys of Gumbel noise to add, `[batch]`, or None for no noise; the
      largest sum is a token drawn from `mixture`.
  """
  batch, count, vocab = hidden.shape[0], excluded.shape[1], kernel.shape[1]
  source = jnp.zeros((batch, 0), int) if pointer is None else pointer.source

  def score(rows: jax.Array) -> tuple[jax.Array, ...]:
    logits = product(hidden[rows], kernel.astype(hidden.dtype))
    allowed = exclude(logits, excluded[rows])
    at_source = jnp.take_along_axis(logits, source[rows], axis=-1)
    added = jnp.zeros_like(at_source)
    if keys is not None:
      noise = gumbel(keys[rows], vocab)
      allowed += noise
      added = jnp.take_along_axis(noise, source[rows], axis=-1)
    top = jnp.max(allowed, axis=-1)
    ids = jnp.where(allowed == top[:, None], jnp.arange(vocab), vocab)
    return (
      jnp.min(ids, axis=-1),
      top,
      jax.nn.logsumexp(logits, axis=-1) if pointer else top,
      at_source,
      added,
    )

  if isinstance(batch, int):
    # Active rows first, as many quarters of the batch as hold them: products of
    # many rows at once cost less than one after the other.
    order, quarter = jnp.argsort(~active, stable=True), -(-batch // 4)
    sizes = sorted({min(n * quarter, batch) for n in range(1, 5)})
    zeros, at_none = jnp.zeros(batch), jnp.zeros(source.shape)
    blank = jnp.zeros(batch, int), zeros, zeros, at_none, at_none

    def score_first(size: int) -> tuple[jax.Array, ...]:
      rows = order[:size]
      return jax.tree.map(lambda x, y: x.at[rows].set(y), blank, score(rows))

    found = jax.lax.switch(
      jnp.sum(jnp.sum(active) > jnp.array(sizes[:-1], int)),
      [functools.partial(score_first, size) for size in sizes],
    )
  else:  # An export's batch is a symbol, which has no quarters.
    found = score(jnp.arange(batch))
  best, top, log_normalizer, at_source, added = found
  if pointer is None:
    return best
  _, mixed = _at_source(at_source, log_normalizer, pointer)
  impossible = jnp.take_along_axis(
    excluded, jnp.minimum(source, count - 1), axis=-1
  ) & (source < count)
  mixed = jnp.where(impossible, -jnp.inf, mixed + added)
  generated = top + (jax.nn.log_sigmoid(pointer.gate) - log_normalizer)
  largest = jnp.maximum(generated, jnp.max(mixed, axis=-1))
  # The first of equally likely tokens, as `decoding.argmax`.
  copies = jnp.min(jnp.where(mixed == largest[:, None], source, vocab), axis=-1)
  return jnp.minimum(copies, jnp.where(generated == largest, best, vocab))


class _Rows(NamedTuple):
  """Target tokens, one a row.

  Attributes:
    hidden: The inputs of the projection, `[rows, d]`.
    targets: `[rows]`.
    pointer: See `Pointer`, each array with one axis `[rows]` in place of the
      first two; None without one.
    weights: The weights of the losses, `[rows]`.
  """

  hidden: jax.Array
  targets: jax.Array
  pointer: Pointer | None
  weights: jax.Array


class _Statistics(NamedTuple):
  """All that a loss needs to know of the logits of each row.

  Attributes:
    log_normalizer: Their logsumexp, `[rows]`.
    at_target: The target's logit, `[rows]`.
    total: Their sum, `[rows]`; None without label smoothing.
    at_source: The logits of the source words, `[rows, source_length]`; None
      without a pointer or without label smoothing.
  """

  log_normalizer: jax.Array
  at_target: jax.Array
  total: jax.Array | None
  at_source: jax.Array | None


def _statistics(logits: jax.Array, rows: _Rows, smooth: bool) -> _Statistics:
  """Reduces `[rows, vocab]` logits to what the losses need."""

  def at(ids: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logits, ids, axis=-1)

  return _Statistics(
    jax.nn.logsumexp(logits, axis=-1),
    at(rows.targets[:, None])[:, 0],
    jnp.sum(logits, axis=-1) if smooth else None,
    at(rows.pointer.source) if smooth and rows.pointer else None,
  )


def _logits_gradient(
  logits: jax.Array, rows: _Rows, values: _Statistics, given: _Statistics
) -> jax.Array:
  """Returns the gradient of the logits.

  Args:
    logits: `[rows, vocab]`.
    rows: The rows.
    values: The statistics of the logits.
    given: The gradients of the statistics.
  """
  # By comparison: a scatter would need the whole array in memory first.
  is_target = jnp.arange(logits.shape[-1]) == rows.targets[:, None]
  gradient = given.log_normalizer[:, None] * jnp.exp(
    logits - values.log_normalizer[:, None]
  ) + jnp.where(is_target, given.at_target[:, None], 0.0)
  if given.total is not None:
    gradient += given.total[:, None]
  if given.at_source is not None and rows.pointer is not None:
    row = jnp.arange(len(logits))[:, None]
    gradient = gradient.at[row, rows.pointer.source].add(given.at_source)
  return gradient


def _row_losses(
  values: _Statistics,
  pointer: Pointer | None,
  targets: jax.Array,
  vocab: int,
  label_smoothing: float,
) -> tuple[jax.Array, jax.Array]:
  """Returns the loss and the negative log-likelihood of each row (eq. 14).

  Args:
    values: The statistics of the logits.
    pointer: See `_Rows`.
    targets: `[rows]`.
    vocab: V.
    label_smoothing: s.
  """
  # log softmax(x)[v] = x[v] - logsumexp(x).
  log_likelihood = values.at_target - values.log_normalizer
  total = -vocab * values.log_normalizer
  if values.total is not None:
    total += values.total
  if pointer is not None:
    log_gate = jax.nn.log_sigmoid(pointer.gate)
    log_copy = jax.nn.log_sigmoid(-pointer.gate)
    # The copies of a target come from the source positions that hold it, found
    # by comparison: no scatter over the vocabulary.
    hits = pointer.source == targets[:, None]
    copied = jnp.sum(pointer.attention * hits, axis=-1)
    log_likelihood = _log_add_copies(
      log_gate + log_likelihood, log_copy, copied
    )
    if values.at_source is not None:
      # A word that is not in the source has log p = log g + log softmax. So the
      # sum of log p over the vocabulary is that of all words, plus what the few
      # source words gain by copying.
      total += vocab * log_gate + _copy_gain(
        values.at_source, values.log_normalizer, pointer
      )
  nll = -log_likelihood
  if values.total is None:
    return nll, nll
  loss = (1.0 - label_smoothing) * nll - label_smoothing / vocab * total
  return loss, nll


def _block_size(rows: int) -> int:
  """Returns the number of rows whose logits are computed together.

  >>> _block_size(192), _block_size(3_200), _block_size(51_200)
  (96, 512, 512)
  """
  # Every block reads the projection and adds to its gradient, so they must not
  # be small; but never is one block the whole batch.
  return -(-min(512, -(-rows // 2)) // 8) * 8


# The first block has as many of these parts of a block as rows need.
_PARTS = 4


def _score_blocks(
  rows: _Rows,
  kernel: jax.Array,
  label_smoothing: float,
  differentiate: bool,
) -> tuple[tuple[jax.Array, jax.Array], Any]:
  """Computes the losses of rows block by block, and their gradients.

  Args:
    rows: The rows; those with a weight come last.
    kernel: The projection, `[d, vocab]`.
    label_smoothing: s.
    differentiate: Whether to compute gradients as well.

  Returns:
    The losses and negative log-likelihoods, `[rows]`; and the gradients of the
    weighted sum with respect to the kernel and, row by row, to the hidden
    states, gates and attentions, or None.
  """
  count, vocab = len(rows.targets), kernel.shape[1]
  size = _block_size(count)
  blocks = -(-count // size)
  filling = blocks * size - count

  def pad(x: jax.Array) -> jax.Array:
    return jnp.pad(x, [(filling, 0), *[(0, 0)] * (x.ndim - 1)])

  rows = jax.tree.map(pad, rows)
  dtype = rows.hidden.dtype
  factor, columns = kernel.astype(dtype), rows.hidden.T
  transposed = None
  if dtype == jnp.bfloat16:
    # On a CPU, bfloat16 products are three times faster from rows as they lie.
    # Without the layouts XLA would transpose anew for every block.
    rows_first = Layout((0, 1))
    transposed = with_layout_constraint(factor.T, rows_first)
    columns = with_layout_constraint(columns, rows_first)

  def score(start: jax.typing.ArrayLike, size: int) -> Any:
    chosen = jax.tree.map(
      lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), rows
    )
    logits = product(chosen.hidden, factor)
    values = _statistics(logits, chosen, label_smoothing > 0)

    def losses(values: _Statistics, pointer: Pointer | None) -> Any:
      return _row_losses(
        values, pointer, chosen.targets, vocab, label_smoothing
      )

    if not differentiate:
      return (losses(values, chosen.pointer), None), None
    loss, pull, nll = jax.vjp(losses, values, chosen.pointer, has_aux=True)
    given, pointer = pull(chosen.weights)
    gradient = _logits_gradient(logits, chosen, values, given).astype(dtype)
    hidden = product(gradient, factor.T if transposed is None else transposed)
    by_row = hidden.astype(dtype), pointer and pointer[:2]
    chosen_columns = jax.lax.dynamic_slice_in_dim(columns, start, size, axis=1)
    return ((loss, nll), by_row), product(chosen_columns, gradient)

  def first(parts: int) -> Any:
    """Returns a call that scores the last rows of the first block."""

    def run(start: jax.Array) -> Any:
      part = parts * size // _PARTS
      found, kernel_gradient = score(start + size - part, part)
      found = jax.tree.map(
        lambda x: jnp.pad(x, [(size - part, 0), *[(0, 0)] * (x.ndim - 1)]),
        found,
      )
      return found, kernel_gradient

    return run

  def put(buffers: Any, start: jax.Array, found: Any) -> Any:
    return jax.tree.map(
      lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, start, axis=0),
      buffers,
      found,
    )

  def body(block: jax.Array, carry: Any) -> Any:
    found, kernel_gradient = score(block * size, size)
    buffers, total = carry
    buffers = put(buffers, block * size, found)
    return buffers, jax.tree.map(jnp.add, total, kernel_gradient)

  weighted = jnp.sum(rows.weights != 0.0)
  used = jnp.maximum(-(-weighted // size), 1)
  start = (blocks - used) * size
  # The first block's gradient of the kernel is the sum that others add to.
  needed = weighted - (used - 1) * size
  parts = jnp.maximum(-(-needed * _PARTS // size), 1)
  found, total = jax.lax.switch(
    parts - 1, [first(n) for n in range(1, _PARTS + 1)], start
  )
  buffers = jax.tree.map(
    lambda x: jnp.zeros((blocks * size, *x.shape[1:]), x.dtype), found
  )
  buffers, kernel_gradient = jax.lax.fori_loop(
    blocks - used + 1, blocks, body, (put(buffers, start, found), total)
  )
  outputs, by_row = jax.tree.map(lambda x: x[filling:], buffers)
  return outputs, (kernel_gradient, by_row)


def _score(
  hidden: jax.Array,
  kernel: jax.Array,
  targets: jax.Array,
  pointer: Pointer | None,
  weights: jax.Array,
  label_smoothing: float,
  differentiate: bool,
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], Any]:
  """Returns the results of `vocabulary_loss`, and its gradients or None."""
  # Tokens with a weight last: the blocks before the first of them are skipped.
  order = jnp.argsort(weights.reshape(-1) != 0.0, stable=True)
  back = jnp.argsort(order)

  def to_rows(x: jax.Array) -> jax.Array:
    return x.reshape(-1, *x.shape[2:])[order]

  def from_rows(x: jax.Array) -> jax.Array:
    return x[back].reshape(*targets.shape, *x.shape[1:])

  if pointer is not None:
    sources = jnp.broadcast_to(pointer.source[:, None], pointer.attention.shape)
    pointer = pointer._replace(source=sources)
  rows = jax.tree.map(to_rows, _Rows(hidden, targets, pointer, weights))
  outputs, gradients = _score_blocks(
    rows, kernel, label_smoothing, differentiate
  )
  loss, nll = jax.tree.map(from_rows, outputs)
  results = jnp.sum(loss * weights), loss, nll
  if gradients is None:
    return results, None
  kernel_gradient, by_row = gradients
  return results, (kernel_gradient, jax.tree.map(from_rows, by_row))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def vocabulary_loss(
  hidden: jax.Array,
  kernel: jax.Array,
  targets: jax.Array,
  pointer: Pointer | None,
  weights: jax.Array,
  label_smoothing: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Scores targets from hidden states, without `[batch, length, vocab]` arrays.

  With smoothing s over V words the loss of a token (eq. 14) is the
  cross-entropy with `(1 - s) onehot + s / V`, where the probabilities are those
  of `log_mixture(hidden @ kernel, pointer)`. The logits are computed block by
  block of tokens, and each block's share of the gradients at once, before its
  logits are forgotten.

  Args:
    hidden: The inputs of the projection, `[batch, length, d]`. Their type is
      that of the products' factors; sums and losses are float32.
    kernel: The projection, `[d, vocab]`.
    targets: `[batch, length]`.
    pointer: The gate, attention and source ids, or None for the plain softmax.
    weights: The weight of each token's loss, `[batch, length]`; tokens of
      weight 0, such as padding, cost no product.
    label_smoothing: s.

  Returns:
    The weighted sum of the losses, the one differentiable result; and the
    smoothed loss and the unsmoothed negative log-likelihood of each token of a
    weight other than 0, `[batch, length]`.
  """
  results, _ = _score(
    hidden, kernel, targets, pointer, weights, label_smoothing, False
  )
  return results


def _loss_backward(
  label_smoothing: float, gradients: Any, given: Any
) -> tuple[Any, ...]:
  del label_smoothing
  kernel, (hidden, at) = jax.tree.map(
    lambda g: given[0].astype(g.dtype) * g, gradients
  )
  # Ids have no gradient.
  pointer: Any = at and (*at, None)
  return hidden, kernel, None, pointer and Pointer(*pointer), None


vocabulary_loss.defvjp(
  functools.partial(_score, differentiate=True), _loss_backward
)


def gradient_penalty(
  score: Callable[[jax.Array], jax.Array],
  generated: jax.Array,
  gold: jax.Array,
  alpha: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Returns the penalty on slopes of a discriminator other than 1 (eq. 19).

  `(|| grad D(d') ||_2 - 1) ** 2` at `d' = alpha dN + (1 - alpha) dP`, with the
  norm over time and features together (Gulrajani et al., 2017).

  Args:
    score: D, from `[batch, length, d]` to `[batch]`. It must score every
      example by itself, and must mask padding.
    generated: `dN`, `[batch, length, d]`.
    gold: `dP`, the same shape.
    alpha: The weight of `generated`, between 0 and 1, `[batch]`.

  Returns:
    The penalty and the norm, each `[batch]`.

  >>> points = jnp.ones((1, 1, 2))
  >>> plane = lambda x: jnp.sum(3.0 * x[..., 0] + 4.0 * x[..., 1], axis=-1)
  >>> penalty, norm = gradient_penalty(plane, points, points, jnp.zeros(1))
  >>> float(penalty[0]), float(norm[0])
  (16.0, 5.0)
  """
  weight = alpha[:, None, None]
  between = weight * generated + (1.0 - weight) * gold
  # Each score depends on its own example alone, so the gradient of their sum
  # holds every example's own gradient, in one backward pass.
  gradient = jax.grad(lambda x: jnp.sum(score(x)))(between)
  # Training differentiates the penalty again, and the derivative of a plain
  # norm is NaN at 0, where a ReLU network that is flat for an example puts it.
  norm = optax.safe_norm(gradient, _TINY, axis=(1, 2))
  return (norm - 1.0) ** 2, norm
