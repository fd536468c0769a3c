"""The interactive discriminators (paper §4.2, eqs. 16-17): one module, twice.

Responses reach a discriminator as embedded words, so that a gradient can reach
the generator through them. Nothing behind an utterance's end reaches a score.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp


class Utterances(NamedTuple):
  """A batch of utterances; as words, or as a discriminator's hidden states.

  Attributes:
    features: `[batch, length, d]`, zeros behind an utterance's end.
    mask: True up to an utterance's end, `[batch, length]`.
  """

  features: jax.Array
  mask: jax.Array


def pick(words: Utterances, chosen: jax.Array, max_words: int) -> Utterances:
  """Moves some words of each utterance to its front and drops the others.

  Gradients flow through the words that are kept.

  Args:
    words: The utterances.
    chosen: Which words to keep, `[batch, length]`; none behind the end.
    max_words: The most to keep of an utterance, its first ones.

  Returns:
    The words kept, in their order, `[batch, min(length, max_words), d]`; where
    there are none, one position of zeros, so that every utterance has a first
    word.
  """
  order = jnp.argsort(~chosen, axis=1, stable=True)[:, :max_words]
  features = jnp.take_along_axis(words.features, order[..., None], axis=1)
  position = jnp.arange(order.shape[1])
  kept = position < jnp.sum(chosen, axis=1, keepdims=True)
  return Utterances(
    jnp.where(kept[..., None], features, 0.0), kept | (position == 0)
  )


def pad_to_longest(batches: tuple[Utterances, ...]) -> list[Utterances]:
  """Pads several batches of utterances to the longest one's length."""
  length = max(words.mask.shape[1] for words in batches)

  def pad(x: jax.Array) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[1] = (0, length - x.shape[1])
    return jnp.pad(x, widths)

  return [jax.tree.map(pad, words) for words in batches]


class DiscriminatorInputs(NamedTuple):
  """What one discriminator reads of a batch of dialogues.

  Attributes:
    responses: The responses to score, one or several to each dialogue.
    feedback: The user's next turn.
    context: `x~0` or `w~0`, `[batch, d]`.
  """

  responses: tuple[Utterances, ...]
  feedback: Utterances
  context: jax.Array


class LSTM(nn.Module):
  """A recurrent encoder (Hochreiter and Schmidhuber, 1997), from left to right.

  Attributes:
    dim: Features of the hidden state.
  """

  dim: int

  @nn.compact
  def __call__(self, words: Utterances) -> Utterances:
    """Encodes utterances; returns a hidden state for every word."""
    recurrent = self.param(
      "recurrent", nn.initializers.orthogonal(), (self.dim, 4 * self.dim)
    )
    inputs = nn.Dense(4 * self.dim, name="input")(words.features)

    def step(
      carry: tuple[jax.Array, jax.Array], x: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
      hidden, cell = carry
      i, f, g, o = jnp.split(x + hidden @ recurrent, 4, axis=-1)
      cell = nn.sigmoid(f) * cell + nn.sigmoid(i) * jnp.tanh(g)
      hidden = nn.sigmoid(o) * jnp.tanh(cell)
      return (hidden, cell), hidden

    zeros = jnp.zeros((inputs.shape[0], self.dim))
    _, hidden = jax.lax.scan(step, (zeros, zeros), inputs.transpose(1, 0, 2))
    hidden = hidden.transpose(1, 0, 2)  # -> [batch, length, dim]
    return Utterances(jnp.where(words.mask[..., None], hidden, 0.0), words.mask)


class Discriminator(nn.Module):
  """Scores responses in their dialogue: the higher, the more like gold ones.

  Attributes:
    dim: d.
    kernel_widths: Of the convolutions, in words; each has an equal share of d
      filters.
  """

  dim: int
  kernel_widths: tuple[int, ...]

  def setup(self) -> None:
    """Creates the encoder, the convolutions and the score."""
    self.lstm = LSTM(self.dim)
    filters = self.dim // len(self.kernel_widths)
    self.convolutions = [nn.Dense(filters) for _ in self.kernel_widths]
    self.output = nn.Dense(1)

  def represent(
    self, reading: DiscriminatorInputs
  ) -> tuple[list[Utterances], jax.Array]:
    """Encodes a dialogue's utterances with one set of weights.

    Args:
      reading: The dialogues; no gradient flows into their context.

    Returns:
      The responses' hidden states, all of one length, and what they interact
      with, `dF + x~0` or `dF + w~0`, `[batch, d]`.
    """
    padded = pad_to_longest(reading.responses)
    hidden = self.lstm(jax.tree.map(lambda *x: jnp.concatenate(x), *padded))
    encoded = [
      Utterances(*x)
      for x in zip(*(jnp.split(x, len(padded)) for x in hidden), strict=True)
    ]
    # Apart, since no gradient goes to a feedback's words in a generator's step.
    of_feedback = self.lstm(reading.feedback)
    last = jnp.sum(of_feedback.mask, axis=1)[:, None, None] - 1
    last_hidden = jnp.take_along_axis(
      of_feedback.features, jnp.maximum(last, 0), axis=1
    )[:, 0]
    return encoded, last_hidden + jax.lax.stop_gradient(reading.context)

  def score(self, response: Utterances, interaction: jax.Array) -> jax.Array:
    """Scores representations (eqs. 16-17).

    Args:
      response: Hidden states.
      interaction: `dF + x~0` or `dF + w~0`, `[batch, d]`.

    Returns:
      `D(d)`, `[batch]`.
    """
    real = response.mask[..., None]
    # Also where they are zeros already, so that no slope is measured there.
    hidden = jnp.where(real, response.features, 0.0)
    length = hidden.shape[1]
    pooled = []
    for width, convolution in zip(
      self.kernel_widths, self.convolutions, strict=True
    ):
      # A window begins at each word; the last ones reach into zeros.
      padded = jnp.pad(hidden, ((0, 0), (0, width - 1), (0, 0)))
      windows = [padded[:, i : i + length] for i in range(width)]
      features = nn.relu(convolution(jnp.concatenate(windows, axis=-1)))
      # No feature is below 0, so zeros behind the end leave the maximum alone.
      pooled.append(jnp.max(jnp.where(real, features, 0.0), axis=1))
    f = jnp.concatenate(pooled, axis=-1)  # -> [batch, d]
    return self.output(nn.relu(f + interaction))[:, 0]

  def __call__(self, reading: DiscriminatorInputs) -> list[jax.Array]:
    """Returns the scores of each response to each dialogue, `[batch]`."""
    encoded, interaction = self.represent(reading)
    return [self.score(response, interaction) for response in encoded]
