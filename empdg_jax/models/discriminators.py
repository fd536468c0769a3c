"""The interactive discriminators (paper §4.2, eqs. 16-17).

The semantic and the emotional discriminator are one module with two sets of
parameters. It reads embedded words, so that gradients of its scores can flow
into the generator. Padding reaches no score.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp


class Utterances(NamedTuple):
  """A batch of utterances, as embedded words or as hidden states.

  Attributes:
    features: `[batch, length, d]`, zeros after an utterance's end.
    mask: True up to an utterance's end, `[batch, length]`.
  """

  features: jax.Array
  mask: jax.Array


def pick(words: Utterances, chosen: jax.Array, max_words: int) -> Utterances:
  """Moves the chosen words of each utterance to its front; drops the others.

  Gradients flow through the words that are kept.

  Args:
    words: The utterances.
    chosen: True at the words to keep, `[batch, length]`; False after the end.
    max_words: The most words to keep of an utterance, from its start.

  Returns:
    The words kept, in their order, `[batch, min(length, max_words), d]`. An
    utterance without any has one position of zeros.
  """
  # A stable sort of booleans: the number of words kept differs by example, but
  # shapes must not. Words move together so that a convolution's neighbours are
  # neighbouring words rather than zeros.
  order = jnp.argsort(~chosen, axis=1, stable=True)[:, :max_words]
  features = jnp.take_along_axis(words.features, order[..., None], axis=1)
  position = jnp.arange(order.shape[1])
  kept = position < jnp.sum(chosen, axis=1, keepdims=True)
  # The first position always counts as real, so that every utterance has a
  # last hidden state and every response something to pool.
  return Utterances(
    jnp.where(kept[..., None], features, 0.0), kept | (position == 0)
  )


def pad_to_longest(batches: tuple[Utterances, ...]) -> list[Utterances]:
  """Pads batches of utterances to the length of the longest batch."""
  length = max(words.mask.shape[1] for words in batches)

  def pad(x: jax.Array) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[1] = (0, length - x.shape[1])
    return jnp.pad(x, widths)

  return [jax.tree.map(pad, words) for words in batches]


class DiscriminatorInputs(NamedTuple):
  """The inputs of one discriminator for a batch of dialogues.

  Attributes:
    responses: The responses to score, one or several per dialogue.
    feedback: The user's next turns.
    context: The context vectors, `x~0` or `w~0`, `[batch, d]`.
  """

  responses: tuple[Utterances, ...]
  feedback: Utterances
  context: jax.Array


class LSTM(nn.Module):
  """A left-to-right recurrent encoder (Hochreiter and Schmidhuber, 1997).

  Attributes:
    dim: The number of features of the hidden state.
  """

  # Not `nn.RNN(nn.OptimizedLSTMCell(...))`: its eight kernels could not load a
  # checkpoint's two, and it multiplies words by theirs in every step of the
  # scan, where here one product before the scan serves all steps.
  dim: int

  @nn.compact
  def __call__(self, words: Utterances) -> Utterances:
    """Returns a hidden state for every word."""
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

    # Padding follows the words, so the scan may run over it: no real state
    # depends on a later one, and the mask below clears the others.
    zeros = jnp.zeros((inputs.shape[0], self.dim))
    _, hidden = jax.lax.scan(step, (zeros, zeros), inputs.transpose(1, 0, 2))
    hidden = hidden.transpose(1, 0, 2)  # -> [batch, length, dim]
    return Utterances(jnp.where(words.mask[..., None], hidden, 0.0), words.mask)


class Discriminator(nn.Module):
  """Scores responses in their dialogue: higher means more like gold ones.

  Attributes:
    dim: d.
    kernel_widths: The widths of the convolutions, in words. They share d
      filters equally.
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
    self, inputs: DiscriminatorInputs
  ) -> tuple[list[Utterances], jax.Array]:
    """Encodes the utterances of dialogues with one set of weights.

    Args:
      inputs: The dialogues; no gradient flows into their context.

    Returns:
      The hidden states of the responses, all of one length, and the vectors
      they interact with, `dF + x~0` or `dF + w~0`, `[batch, d]`.
    """
    # All responses go through one scan, whose time depends on the number of
    # steps far more than on the number of rows.
    padded = pad_to_longest(inputs.responses)
    hidden = self.lstm(jax.tree.map(lambda *x: jnp.concatenate(x), *padded))
    encoded = [
      Utterances(*x)
      for x in zip(*(jnp.split(x, len(padded)) for x in hidden), strict=True)
    ]
    # The feedback has a scan of its own: a generator's step needs no gradient
    # with respect to it, and so gets no backward pass through this scan.
    feedback = self.lstm(inputs.feedback)
    last = jnp.sum(feedback.mask, axis=1)[:, None, None] - 1
    # Without feedback `last` is -1. Position 0 stands in; the steps mask the
    # example out of every loss.
    last_hidden = jnp.take_along_axis(
      feedback.features, jnp.maximum(last, 0), axis=1
    )[:, 0]
    return encoded, last_hidden + jax.lax.stop_gradient(inputs.context)

  def score(self, response: Utterances, interaction: jax.Array) -> jax.Array:
    """Scores representations (eqs. 16-17).

    Args:
      response: The hidden states of a response per dialogue.
      interaction: `dF + x~0` or `dF + w~0`, `[batch, d]`.

    Returns:
      `D(d)`, `[batch]`.
    """
    real = response.mask[..., None]
    # Padding holds zeros already. Masking it here, within the function whose
    # slope the gradient penalty measures, makes its slope 0 too.
    hidden = jnp.where(real, response.features, 0.0)
    length = hidden.shape[1]
    pooled = []
    for width, convolution in zip(
      self.kernel_widths, self.convolutions, strict=True
    ):
      # A window starts at each word; the last ones extend into zeros.
      padded = jnp.pad(hidden, ((0, 0), (0, width - 1), (0, 0)))
      windows = [padded[:, i : i + length] for i in range(width)]
      features = nn.relu(convolution(jnp.concatenate(windows, axis=-1)))
      # No feature is negative after the ReLU, so zeros do not change a maximum.
      pooled.append(jnp.max(jnp.where(real, features, 0.0), axis=1))
    f = jnp.concatenate(pooled, axis=-1)  # -> [batch, d]
    return self.output(nn.relu(f + interaction))[:, 0]

  def score_words(self, words: Utterances, interaction: jax.Array) -> jax.Array:
    """Scores embedded words; see `score`."""
    return self.score(self.lstm(words), interaction)

  def __call__(self, inputs: DiscriminatorInputs) -> list[jax.Array]:
    """Returns the scores `[batch]` of every batch of responses."""
    encoded, interaction = self.represent(inputs)
    return [self.score(response, interaction) for response in encoded]
