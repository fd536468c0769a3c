"""The adversarial game: sampled responses, discriminator inputs and losses.

A generator's signal (paper §4.2) is a gradient that flows from the
discriminators' scores through embedded responses into its parameters.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from empdg_jax import decoding, losses
from empdg_jax.config import TrainConfig
from empdg_jax.data import vocab
from empdg_jax.models.discriminators import (
  Discriminator,
  DiscriminatorInputs,
  Utterances,
  pick,
)
from empdg_jax.models.encoder_decoder import EncoderDecoder, Encoding, Inputs


@dataclasses.dataclass(frozen=True)
class Adversary:
  """What phases 2 and 3 add to a system.

  Attributes:
    discriminator: The module of every discriminator; parameters are keyed by
      the discriminators' names.
    is_emotional: Which words the emotional discriminator reads, `[V]` booleans.
    max_emotional_words: The most that it reads of an utterance.
    config: Penalty, signal and sampling.
  """

  discriminator: Discriminator
  is_emotional: np.ndarray
  max_emotional_words: int
  config: TrainConfig


class EmbeddedResponse(NamedTuple):
  """A batch of responses as the discriminators are given them.

  Attributes:
    tokens: `[batch, length]`, PAD behind the end.
    embedded: `[batch, length, d]`.
  """

  tokens: jax.Array
  embedded: jax.Array


# The generator's parameters that have a row or a column a word.
_OF_VOCABULARY = ("embedding", "vocab_projection")


class _Taps(NamedTuple):
  """Zeros added in each step of sampling, for gradients with respect to them.

  Attributes:
    embedded: Added to the decoder's input, `[steps, batch, d]`.
    logits: Added to the logits, `[steps, batch, V]`.
  """

  embedded: jax.Array
  logits: jax.Array


def _sample(
  params: Any,
  encoded: Encoding,
  keys: jax.Array,
  model: EncoderDecoder,
  adversary: Adversary,
) -> EmbeddedResponse:
  """Draws a response to each dialogue; see `straight_through_sample`.

  The backward pass of a scan would add to the gradient of the vocabulary's
  matrices in every step, and they are most of the model. So they are constants
  in the scan, and their gradient is one product after it, of what went into
  them and of the gradient that came back to them.
  """
  steps = adversary.config.sample_steps
  batch, dim = encoded.first_input.shape

  def draw(params: Any, encoded: Encoding, taps: _Taps) -> Any:
    """Returns the embedded response, and its tokens and hidden states."""
    constants = {k: v for k, v in params.items() if k in _OF_VOCABULARY}
    variables = {"params": params | jax.lax.stop_gradient(constants)}

    def step(x: jax.Array, cache: Any, index: jax.Array, tap: _Taps) -> Any:
      taken: Any = model.apply(
        variables,
        encoded,
        x + tap.embedded,
        cache,
        index,
        tap.logits,
        method="decode_embedded",
      )
      log_probs, hidden, cache = taken
      return log_probs, cache, hidden

    def embed(tokens: jax.Array, weights: jax.Array) -> Any:
      return model.apply(variables, tokens, weights, method="embed")

    tokens, embedded, hidden = decoding.straight_through_sample(
      step,
      embed,
      encoded.first_input,
      model.apply(variables, batch, steps, method="init_cache"),
      keys,
      taps,
      steps,
      adversary.config.sample_temperature,
      eos=vocab.EOS,
      pad=vocab.PAD,
    )
    return embedded, (tokens, hidden)

  zeros = _Taps(
    jnp.zeros((steps, batch, dim)),
    jnp.zeros((steps, batch, len(adversary.is_emotional))),
  )

  @jax.custom_vjp
  def sample(params: Any, encoded: Encoding) -> EmbeddedResponse:
    embedded, (tokens, _) = draw(params, encoded, zeros)
    return EmbeddedResponse(tokens, embedded)

  def forward(params: Any, encoded: Encoding) -> Any:
    embedded, pull, (tokens, hidden) = jax.vjp(
      draw, params, encoded, zeros, has_aux=True
    )
    return EmbeddedResponse(tokens, embedded), (params, pull, tokens, hidden)

  def backward(residuals: Any, gradient: EmbeddedResponse) -> Any:
    params, pull, tokens, hidden = residuals
    of_params, of_encoded, of_taps = pull(gradient.embedded)

    def through_matrices(params: Any) -> Any:
      """Returns what the taps were added to; the first input is no token."""
      variables = {"params": params}
      return (
        model.apply(variables, tokens[:, :-1].T, method="embed"),
        model.apply(variables, hidden, method="project"),
      )

    _, pull_matrices = jax.vjp(through_matrices, params)
    (of_matrices,) = pull_matrices((of_taps.embedded[1:], of_taps.logits))
    return jax.tree.map(jnp.add, of_params, of_matrices), of_encoded

  sample.defvjp(forward, backward)
  return sample(params, encoded)


def respond(
  params: Any,
  inputs: Inputs,
  target: jax.Array,
  keys: jax.Array,
  model: EncoderDecoder,
  adversary: Adversary,
) -> tuple[EmbeddedResponse, Encoding]:
  """Lets the generator respond; gradients reach `params` as configured.

  The discriminators read words through the generator's embedding table, which
  the signal never changes.

  Args:
    params: The generator's parameters.
    inputs: The dialogues.
    target: Gold responses, which `"expected"` follows, `[batch, N]`.
    keys: Of the noise, `[batch]`.
    model: The generator.
    adversary: Says how to respond.

  Returns:
    The responses, and what the generator made of the dialogues.
  """
  frozen = {"params": jax.lax.stop_gradient(params)}
  signal = adversary.config.generator_signal
  if signal == "expected":
    # With dropout, as the step's likelihood: the compiler joins both passes.
    outputs: Any = model.apply({"params": params}, inputs, target, keys)
    probs = losses.mixture(outputs.logits, outputs.pointer)
    tokens = jnp.where(target == vocab.PAD, vocab.PAD, decoding.argmax(probs))
    embedded: Any = model.apply(frozen, probs, method="expected_embedding")
    return EmbeddedResponse(tokens, embedded), outputs.encoded
  if signal == "constant":
    params = jax.lax.stop_gradient(params)
  encoded: Any = model.apply({"params": params}, inputs, None, method="encode")
  return _sample(params, encoded, keys, model, adversary), encoded


def embed_words(
  params: Any, tokens: jax.Array, model: EncoderDecoder
) -> EmbeddedResponse:
  """Returns gold responses or feedback as the discriminators are given them."""
  frozen = {"params": jax.lax.stop_gradient(params)}
  embedded: Any = model.apply(frozen, tokens, method="embed")
  return EmbeddedResponse(tokens, embedded)


def discriminator_inputs(
  names: Iterable[str],
  encoded: Encoding,
  responses: tuple[EmbeddedResponse, ...],
  feedback: EmbeddedResponse,
  adversary: Adversary,
) -> dict[str, DiscriminatorInputs]:
  """Returns what each discriminator reads.

  Args:
    names: Of the discriminators, `"semantic"` or `"emotional"`.
    encoded: The dialogues.
    responses: One or several to each dialogue.
    feedback: The user's next turns.
    adversary: Says which words are emotional.

  Returns:
    A reading by name.
  """

  def read(name: str, response: EmbeddedResponse) -> Utterances:
    mask = response.tokens != vocab.PAD
    embedded = jnp.where(mask[..., None], response.embedded, 0.0)
    words = Utterances(embedded, mask)
    if name == "emotional":
      chosen = jnp.asarray(adversary.is_emotional)[response.tokens] & mask
      return pick(words, chosen, adversary.max_emotional_words)
    return words

  return {
    name: DiscriminatorInputs(
      tuple(read(name, response) for response in responses),
      read(name, feedback),
      getattr(encoded, name),
    )
    for name in names
  }


def discriminator_losses(
  discriminator: Discriminator,
  params: Any,
  reading: DiscriminatorInputs,
  alpha: jax.Array,
  penalty_weight: float,
) -> dict[str, jax.Array]:
  """Scores a generated and a gold response to each dialogue (eqs. 17-19).

  Args:
    discriminator: The discriminator.
    params: Its parameters.
    reading: The dialogues, with the generated and the gold responses.
    alpha: Between 0, gold, and 1, generated: where the slope is measured,
      `[B]`.
    penalty_weight: beta.

  Returns:
    `loss`, `wasserstein` (gold minus generated score), `gradient_penalty` and
    `gradient_norm`, `[B]` each.
  """
  variables = {"params": params}
  represented: Any = discriminator.apply(variables, reading, method="represent")
  (generated, gold), interaction = represented

  def score(response: Utterances) -> Any:
    return discriminator.apply(variables, response, interaction, method="score")

  mask = generated.mask | gold.mask
  penalty, norm = losses.gradient_penalty(
    lambda features: score(Utterances(features, mask)),
    generated.features,
    gold.features,
    alpha,
  )
  wasserstein = score(gold) - score(generated)
  return {
    "loss": penalty_weight * penalty - wasserstein,
    "wasserstein": wasserstein,
    "gradient_penalty": penalty,
    "gradient_norm": norm,
  }
