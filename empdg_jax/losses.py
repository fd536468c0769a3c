"""Losses (eqs. 14, 19) and the mixture of generating and copying.

Every loss returns one value per example or per token; the caller masks and
averages.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

# Keeps log(0), and the derivative of a norm at 0, finite. It is far below any
# probability or slope that matters.
_TINY = 1e-20


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


def _copy_gain(
  logits: jax.Array,
  log_scale: jax.Array,
  log_copy: jax.Array,
  pointer: Pointer,
) -> jax.Array:
  """Returns the sum over source words of `log p - log(g softmax)`.

  Args:
    logits: `[batch, length, vocab]`.
    log_scale: `log g - logsumexp(logits)`, `[batch, length]`.
    log_copy: `log(1 - g)`, `[batch, length]`.
    pointer: The gate, attention and source ids.

  Returns:
    `[batch, length]`, each distinct source word counted once.
  """
  source = pointer.source
  same = source[:, :, None] == source[:, None, :]
  # A repeated word collects the attention to all its positions, but counts at
  # its first position alone.
  first = ~jnp.any(jnp.tril(same, k=-1), axis=-1)  # -> [batch, source_length]
  copied = pointer.attention @ same.astype(logits.dtype)
  ids = jnp.broadcast_to(source[:, None, :], copied.shape)
  generated = jnp.take_along_axis(logits, ids, axis=-1) + log_scale[..., None]
  mixed = _log_add_copies(generated, log_copy[..., None], copied)
  return jnp.sum((mixed - generated) * first[:, None, :], axis=-1)


def token_losses(
  logits: jax.Array,
  targets: jax.Array,
  pointer: Pointer | None,
  label_smoothing: float,
) -> tuple[jax.Array, jax.Array]:
  """Returns the loss and the negative log-likelihood of each target (eq. 14).

  With smoothing s over V words the loss is the cross-entropy with
  `(1 - s) onehot + s / V`. It equals the loss of `log_mixture`.

  Args:
    logits: `[batch, length, vocab]`.
    targets: `[batch, length]`.
    pointer: The gate, attention and source ids, or None for the plain softmax.
    label_smoothing: s.

  Returns:
    The smoothed loss and the unsmoothed negative log-likelihood, each
    `[batch, length]`.
  """
  # Arrays `[batch, length, vocab]` dominate the memory traffic of a training
  # step. The logits are the only one here: `log_mixture` would add the softmax,
  # the scattered copies and their sum, and as many again for the gradient. The
  # loss needs two numbers per token only, log p of the target and the sum of
  # log p over the vocabulary, and log softmax(x)[v] = x[v] - logsumexp(x).
  vocab = logits.shape[-1]
  log_normalizer = jax.nn.logsumexp(logits, axis=-1)  # -> [batch, length]
  at_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  log_likelihood = at_target - log_normalizer
  total = jnp.sum(logits, axis=-1) - vocab * log_normalizer
  if pointer is not None:
    log_gate = jax.nn.log_sigmoid(pointer.gate)
    log_copy = jax.nn.log_sigmoid(-pointer.gate)
    # The copies of a target come from the source positions that hold it, found
    # by comparison: no scatter over the vocabulary.
    hits = pointer.source[:, None, :] == targets[:, :, None]
    copied = jnp.sum(pointer.attention * hits, axis=-1)
    log_likelihood = _log_add_copies(
      log_gate + log_likelihood, log_copy, copied
    )
    # A word that is not in the source has log p = log g + log softmax. So the
    # sum is that of all words, plus what the few source words gain by copying.
    total += vocab * log_gate + _copy_gain(
      logits, log_gate - log_normalizer, log_copy, pointer
    )
  nll = -log_likelihood
  if label_smoothing == 0.0:
    return nll, nll  # XLA drops `total`, which nothing reads.
  return (
    (1.0 - label_smoothing) * nll - label_smoothing / vocab * total,
    nll,
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
