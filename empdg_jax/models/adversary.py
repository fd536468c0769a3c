"""The adversarial game: sampled responses, discriminator inputs and losses.

The generator's signal (paper §4.2) is a gradient that flows from the scores of
the discriminators through embedded responses into the generator's parameters.
Both sides are embedded by the generator's own embedding table, which is frozen
for the discriminators: neither player's loss moves it on this way.
"""

import dataclasses
import functools
import math
import zlib
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
  pad_to_longest,
  pick,
)
from empdg_jax.models.encoder_decoder import EncoderDecoder, Encoding, Inputs
from empdg_jax.rng import fold_in, gumbel


@dataclasses.dataclass(frozen=True)
class Adversary:
  """The part of a system that only phases 2 and 3 use.

  Attributes:
    discriminator: The module of all discriminators; their parameters are keyed
      by their names.
    is_emotional: Marks the words that the emotional discriminator reads, `[V]`
      booleans.
    max_emotional_words: The most words that it reads of an utterance.
    config: The options of the penalty, the signal and the sampling.
  """

  discriminator: Discriminator
  is_emotional: np.ndarray
  max_emotional_words: int
  config: TrainConfig


class EmbeddedResponse(NamedTuple):
  """A batch of responses, or of feedback, with embeddings to score.

  Attributes:
    tokens: The ids, PAD after the end, `[batch, length]`.
    embedded: The embeddings, which carry gradients, `[batch, length, d]`.
  """

  tokens: jax.Array
  embedded: jax.Array


# The generator's matrices with a row or a column per word.
_VOCABULARY_MATRICES = ("embedding", "vocab_projection")


class _Taps(NamedTuple):
  """Zeros added in each step of sampling.

  The gradient with respect to a tap is the gradient that arrives at the place
  where it is added.

  Attributes:
    embedded: Added to the decoder's input, `[steps, batch, d]`.
    logits: Added to the logits, `[steps, batch, V]`.
  """

  embedded: jax.Array
  logits: jax.Array


def _draw(
  params: Any,
  encoded: Encoding,
  taps: _Taps,
  keys: jax.Array,
  model: EncoderDecoder,
  adversary: Adversary,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """Draws responses by `straight_through_sample`.

  Returns:
    The embedded responses `[batch, steps, d]`, whose gradient reaches all
    parameters but the vocabulary's matrices; the tokens `[batch, steps]` and
    the inputs of `project`, `[steps, batch, d]`.
  """
  matrices = {k: v for k, v in params.items() if k in _VOCABULARY_MATRICES}
  variables = {"params": params | jax.lax.stop_gradient(matrices)}

  def step(x: jax.Array, cache: Any, index: jax.Array, tap: _Taps) -> Any:
    return model.apply(
      variables,
      encoded,
      x + tap.embedded,
      cache,
      index,
      tap.logits,
      method="decode_embedded",
    )

  def embed(tokens: jax.Array, weights: jax.Array) -> Any:
    return model.apply(variables, tokens, weights, method="embed")

  steps = adversary.config.sample_steps
  tokens, embedded, hidden = decoding.straight_through_sample(
    step,
    embed,
    encoded.first_input,
    model.apply(variables, len(keys), steps, method="init_cache"),
    keys,
    taps,
    steps,
    adversary.config.sample_temperature,
    eos=vocab.EOS,
    pad=vocab.PAD,
  )
  return embedded, (tokens, hidden)


def _search(
  params: Any,
  encoded: Encoding,
  keys: jax.Array,
  model: EncoderDecoder,
  adversary: Adversary,
) -> EmbeddedResponse:
  """Draws the responses of `_draw`, without a gradient and so in less time."""
  variables, steps = {"params": params}, adversary.config.sample_steps

  def choose(*of_step: Any) -> Any:
    return model.apply(
      variables, encoded, *of_step, keys, method="choose_token"
    )

  tokens, _ = decoding.greedy_search(
    choose,
    model.apply(variables, len(keys), steps, method="init_cache"),
    len(keys),
    steps,
    eos=vocab.EOS,
    pad=vocab.PAD,
  )
  return embed_words(params, tokens, model)


def _sample(
  params: Any,
  encoded: Encoding,
  keys: jax.Array,
  model: EncoderDecoder,
  adversary: Adversary,
) -> EmbeddedResponse:
  """Draws a response to each dialogue; see `straight_through_sample`.

  The gradient is exact. It does not flow into the embedding table as the
  discriminators read it, but into everything that chose the tokens.
  """
  # JAX's backward pass of a scan carries a gradient of every parameter and adds
  # to it in each step. For the vocabulary's matrices, most of the model, that
  # means writing arrays of their size `steps` times. So `_draw` makes them
  # constants of the scan, and the taps collect, for all steps, the gradients
  # that arrive where the matrices were used:
  #   logits = hidden @ projection + tap.logits
  #   decoder input = embedding[token] + tap.embedded
  # A product's gradient with respect to its matrix needs only the product's
  # input, which `_draw` records, and the gradient of its output, which the taps
  # hold. One product over all steps after the scan then gives the whole sum.
  batch, dim = encoded.first_input.shape
  steps = adversary.config.sample_steps
  taps = _Taps(
    jnp.zeros((steps, batch, dim)),
    jnp.zeros((steps, batch, len(adversary.is_emotional))),
  )
  of_draw = {"keys": keys, "model": model, "adversary": adversary}
  draw = functools.partial(_draw, **of_draw)
  # Called as it is only where nobody asks for a gradient.
  sample = jax.custom_vjp(functools.partial(_search, **of_draw))

  def forward(params: Any, encoded: Encoding) -> Any:
    embedded, pull, (tokens, hidden) = jax.vjp(
      draw, params, encoded, taps, has_aux=True
    )
    return EmbeddedResponse(tokens, embedded), (params, pull, tokens, hidden)

  def backward(residuals: Any, gradient: EmbeddedResponse) -> Any:
    params, pull, tokens, hidden = residuals
    scan_grads, encoded_grads, tap_grads = pull(gradient.embedded)

    def use_matrices(params: Any) -> Any:
      """Returns the terms that the taps were added to."""
      variables = {"params": params}
      return (
        model.apply(variables, tokens[:, :-1].T, method="embed"),
        model.apply(variables, hidden, method="project"),
      )

    # The first input is no token, and the last token is never an input: token
    # i meets tap i + 1.
    _, pull_matrices = jax.vjp(use_matrices, params)
    (matrix_grads,) = pull_matrices((tap_grads.embedded[1:], tap_grads.logits))
    return jax.tree.map(jnp.add, scan_grads, matrix_grads), encoded_grads

  sample.defvjp(forward, backward)
  return sample(params, encoded)


def _gumbel(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Draws Gumbel noise `[batch, N, V]` from a key per example."""
  keys = fold_in(keys, zlib.crc32(b"teacher_forced"))
  return gumbel(keys, math.prod(shape[1:])).reshape(shape)


def respond(
  params: Any,
  inputs: Inputs,
  target: jax.Array,
  keys: jax.Array,
  model: EncoderDecoder,
  adversary: Adversary,
) -> tuple[EmbeddedResponse, Encoding]:
  """Generates responses whose gradient reaches `params` as configured.

  `config.generator_signal` is `"straight_through"` (sampled responses),
  `"expected"` (expected embeddings under teacher forcing), `"teacher_forced"`
  (tokens sampled under teacher forcing, with a soft gradient) or `"constant"`
  (sampled responses without a gradient). Responses under teacher forcing are as
  long as the gold ones.

  Args:
    params: The generator's parameters.
    inputs: The dialogues.
    target: The gold responses for teacher forcing, `[batch, N]`.
    keys: The keys of the noise, `[batch]`.
    model: The generator.
    adversary: The options of the signal and the sampling.

  Returns:
    The responses and the encoded dialogues.
  """
  # The discriminators read words through the generator's embedding table. The
  # signal must not reach it there: moving the words' embeddings would raise a
  # score without changing a response.
  frozen = {"params": jax.lax.stop_gradient(params)}
  signal = adversary.config.generator_signal
  if signal in ("expected", "teacher_forced"):
    # With the same dropout as the likelihood, so that XLA merges both passes.
    outputs: Any = model.apply({"params": params}, inputs, target, keys)
    # A PAD would hide the position from the discriminators.
    excluded: Any = model.apply(
      frozen, outputs.encoded.source, method="excluded"
    )

    def choose(scores: jax.Array) -> jax.Array:
      """Returns the best possible token at each position, `[batch, N]`."""
      tokens = decoding.argmax(losses.exclude(scores, excluded[:, None]))
      return jnp.where(target == vocab.PAD, vocab.PAD, tokens)

    if signal == "expected":
      probs = losses.mixture(outputs.logits, outputs.pointer)
      embedded: Any = model.apply(frozen, probs, method="expected_embedding")
      return EmbeddedResponse(choose(probs), embedded), outputs.encoded
    log_probs = losses.log_mixture(outputs.logits, outputs.pointer)
    noise = _gumbel(keys, log_probs.shape)
    noisy = losses.exclude(log_probs + noise, excluded[:, None])
    weights = jax.nn.softmax(noisy / adversary.config.sample_temperature)
    tokens = choose(noisy)
    hard: Any = model.apply(frozen, tokens, weights, method="embed")
    return EmbeddedResponse(tokens, hard), outputs.encoded
  if signal == "constant":
    params = jax.lax.stop_gradient(params)
  encoded: Any = model.apply({"params": params}, inputs, None, method="encode")
  return _sample(params, encoded, keys, model, adversary), encoded


def embed_words(
  params: Any, tokens: jax.Array, model: EncoderDecoder
) -> EmbeddedResponse:
  """Embeds gold responses or feedback, without a gradient."""
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
  """Returns the inputs of each discriminator, by its name.

  Args:
    names: The names of the discriminators, `"semantic"` or `"emotional"`.
    encoded: The encoded dialogues.
    responses: One or several responses per dialogue.
    feedback: The user's next turns.
    adversary: Marks the emotional words.
  """

  def select(name: str, response: EmbeddedResponse) -> Utterances:
    mask = response.tokens != vocab.PAD
    embedded = jnp.where(mask[..., None], response.embedded, 0.0)
    words = Utterances(embedded, mask)
    if name == "emotional":
      chosen = jnp.asarray(adversary.is_emotional)[response.tokens] & mask
      return pick(words, chosen, adversary.max_emotional_words)
    return words

  return {
    name: DiscriminatorInputs(
      tuple(select(name, response) for response in responses),
      select(name, feedback),
      getattr(encoded, name),  # Named like the context that it reads.
    )
    for name in names
  }


def discriminator_losses(
  discriminator: Discriminator,
  params: Any,
  inputs: DiscriminatorInputs,
  alpha: jax.Array,
  penalty_weight: float,
  at: str = "states",
) -> dict[str, jax.Array]:
  """Scores a generated and a gold response per dialogue (eqs. 17-19).

  Args:
    discriminator: The discriminator.
    params: Its parameters.
    inputs: The dialogues, with the generated and the gold responses.
    alpha: The point at which the slope is measured, from 0 (gold) to 1
      (generated), `[B]`.
    penalty_weight: beta.
    at: Where the slope is measured, the LSTM's `"states"` (eq. 19) or the
      embedded `"words"`.

  Returns:
    `loss`, `wasserstein` (gold minus generated score), `gradient_penalty` and
    `gradient_norm`, each `[B]`.
  """
  variables = {"params": params}
  represented: Any = discriminator.apply(variables, inputs, method="represent")
  (generated, gold), interaction = represented

  def score(response: Utterances, method: str = "score") -> Any:
    return discriminator.apply(variables, response, interaction, method=method)

  # A point between two responses is real wherever either of them is, and its
  # slope counts there and nowhere else.
  mask = generated.mask | gold.mask
  method, ends = "score", (generated, gold)
  if at == "words":
    method, ends = "score_words", tuple(pad_to_longest(inputs.responses))
  penalty, norm = losses.gradient_penalty(
    lambda features: score(Utterances(features, mask), method),
    ends[0].features,
    ends[1].features,
    alpha,
  )
  wasserstein = score(gold) - score(generated)
  return {
    "loss": penalty_weight * penalty - wasserstein,
    "wasserstein": wasserstein,
    "gradient_penalty": penalty,
    "gradient_norm": norm,
  }
