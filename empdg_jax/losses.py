"""Losses an example (eqs. 9, 14) and the pointer's mixture.

Every loss returns values of single examples or tokens; the caller masks and
averages.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

_TINY = 1e-20


class Pointer(NamedTuple):
  """The part of a copying decoder's output that points (See et al., 2017).

  Attributes:
    gate: Logit of generating rather than copying, `[batch, length]`.
    attention: Where it points, sums to 1, `[batch, length, source_length]`.
    source: Ids of the tokens pointed at, `[batch, source_length]`.
  """

  gate: jax.Array
  attention: jax.Array
  source: jax.Array


def emotion_nll(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Returns `-log softmax(logits)[label]` (eq. 9).

  Args:
    logits: `[batch, classes]`.
    labels: `[batch]` integers.

  Returns:
    `[batch]`.

  >>> emotion_nll(jnp.zeros((1, 4)), jnp.array([2])).round(4)
  Array([1.3863], dtype=float32)
  """
  log_probs = jax.nn.log_softmax(logits)
  return -jnp.take_along_axis(log_probs, labels[:, None], axis=-1)[:, 0]


def _copied(pointer: Pointer, vocab: int) -> jax.Array:
  """Returns the attention to each token, `[batch, length, vocab]`."""
  return jax.vmap(
    lambda ids, weights: (
      jnp.zeros((weights.shape[0], vocab)).at[:, ids].add(weights)
    )
  )(pointer.source, pointer.attention)


def mixture(logits: jax.Array, pointer: Pointer | None) -> jax.Array:
  """Returns probabilities over the whole vocabulary.

  Without a pointer the softmax of eq. 13; with one, with gate probability g,
  `g softmax(logits)[v] + (1 - g) sum of attention to tokens v`.

  Args:
    logits: `[batch, length, vocab]`.
    pointer: Gate, attention and source ids.

  Returns:
    `[batch, length, vocab]`.
  """
  probs = jax.nn.softmax(logits)
  if pointer is None:
    return probs
  gate = jax.nn.sigmoid(pointer.gate)[..., None]
  return gate * probs + (1.0 - gate) * _copied(pointer, logits.shape[-1])


def log_mixture(logits: jax.Array, pointer: Pointer | None) -> jax.Array:
  """Returns the logarithm of `mixture`, also where that is very small."""
  log_probs = jax.nn.log_softmax(logits)
  if pointer is None:
    return log_probs
  copied = _copied(pointer, logits.shape[-1])
  gate = pointer.gate[..., None]
  return jnp.logaddexp(
    jax.nn.log_sigmoid(gate) + log_probs,
    jax.nn.log_sigmoid(-gate) + jnp.log(jnp.maximum(copied, _TINY)),
  )


def token_losses(
  logits: jax.Array,
  targets: jax.Array,
  pointer: Pointer | None,
  label_smoothing: float,
) -> tuple[jax.Array, jax.Array]:
  """Returns the loss and the negative log-likelihood of each target (eq. 14).

  With smoothing s over V words the loss is the cross-entropy with
  `(1 - s) onehot + s / V`. It equals what `log_mixture` gives, but touches the
  vocabulary only in the softmax: words that the source does not hold have
  `log p = log g + log softmax`, and the source's few words are corrected.

  Args:
    logits: `[batch, length, vocab]`.
    targets: `[batch, length]`.
    pointer: Gate, attention and source ids, or None for the plain softmax.
    label_smoothing: s.

  Returns:
    Smoothed loss and unsmoothed negative log-likelihood, `[batch, length]`
    each.
  """
  vocab = logits.shape[-1]
  log_normalizer = jax.nn.logsumexp(logits, axis=-1)  # -> [batch, length]
  at_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  log_likelihood = at_target - log_normalizer
  # The sum of log p over the vocabulary -> [batch, length]
  total = jnp.sum(logits, axis=-1) - vocab * log_normalizer
  if pointer is not None:
    log_gate = jax.nn.log_sigmoid(pointer.gate)
    log_copy = jax.nn.log_sigmoid(-pointer.gate)
    # Whether source position s holds target t -> [batch, length, source_length]
    hits = pointer.source[:, None, :] == targets[:, :, None]
    copied = jnp.sum(pointer.attention * hits, axis=-1)
    log_likelihood = jnp.logaddexp(
      log_gate + log_likelihood, log_copy + jnp.log(jnp.maximum(copied, _TINY))
    )
    source = pointer.source
    same = source[:, :, None] == source[:, None, :]
    first = ~jnp.any(jnp.tril(same, k=-1), axis=-1)  # -> [batch, source_length]
    copied = pointer.attention @ same.astype(logits.dtype)
    ids = jnp.broadcast_to(source[:, None, :], copied.shape)
    generated = (
      jnp.take_along_axis(logits, ids, axis=-1)
      + (log_gate - log_normalizer)[..., None]
    )
    mixed = jnp.logaddexp(
      generated, log_copy[..., None] + jnp.log(jnp.maximum(copied, _TINY))
    )
    total += vocab * log_gate + jnp.sum(
      (mixed - generated) * first[:, None, :], axis=-1
    )
  nll = -log_likelihood
  if label_smoothing == 0.0:
    return nll, nll  # The compiler drops the sum.
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
  """Returns how far each discriminator's slope is from 1 (eq. 19).

  `(|| grad D(d') ||_2 - 1) ** 2` at `d' = alpha dN + (1 - alpha) dP`, the norm
  over time and features together (Gulrajani et al., 2017). May be
  differentiated in its turn, also where the slope is 0.

  Args:
    score: D, from `[batch, length, d]` to `[batch]`, each example apart.
    generated: `dN`, `[batch, length, d]`.
    gold: `dP`, the same shape.
    alpha: Between 0 and 1, `[batch]`.

  Returns:
    The penalty and the norm, `[batch]` each.

  >>> points = jnp.ones((1, 1, 2))
  >>> plane = lambda x: jnp.sum(3.0 * x[..., 0] + 4.0 * x[..., 1], axis=-1)
  >>> penalty, norm = gradient_penalty(plane, points, points, jnp.zeros(1))
  >>> float(penalty[0]), float(norm[0])
  (16.0, 5.0)
  """
  weight = alpha[:, None, None]
  between = weight * generated + (1.0 - weight) * gold
  gradient = jax.grad(lambda x: jnp.sum(score(x)))(between)
  norm = optax.safe_norm(gradient, _TINY, axis=(1, 2))
  return (norm - 1.0) ** 2, norm
