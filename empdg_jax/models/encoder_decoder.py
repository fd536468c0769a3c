"""The part that all systems share: embeddings, decoder, pointer and output.

A system defines which ids it embeds and how it encodes them; `EncoderDecoder`
does the rest for teacher forcing, decoding and sampling.
"""

import itertools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from empdg_jax import decoding
from empdg_jax.config import ModelConfig
from empdg_jax.data import vocab
from empdg_jax.losses import (
  Pointer,
  exclude,
  likeliest,
  log_mixture,
  product,
)
from empdg_jax.models import decoder, layers
from empdg_jax.rng import fold_in

# The special tokens that a response may hold: UNK copies a source word.
_GENERATED = (vocab.UNK, vocab.EOS)


class Inputs(NamedTuple):
  """A batch of dialogues as ids; see `data.pipeline.Batch`.

  Attributes:
    context: `[batch, M]`.
    state: `[batch, M]`.
    emotion_context: `[batch, E]`.
    listener: MoEL's forced listener in training, -1 where the predicted emotion
      weights the listeners, `[batch]`; None forces none.
    emotion: The emotion to respond to, -1 for the one perceived, `[batch]`;
      None for the perceived ones.
  """

  context: jax.Array
  state: jax.Array
  emotion_context: jax.Array
  listener: jax.Array | None = None
  emotion: jax.Array | None = None


class Encoding(NamedTuple):
  """A batch of encoded dialogues.

  Attributes:
    semantic: `x~0`, the vector of the dialogue context, `[batch, d]`.
    first_input: The first input of the decoder, `[batch, d]`.
    memory: The projected contexts, of the decoder's own type.
    source: The ids of the tokens the decoder attends to, `[batch, length]`.
    emotion_logits: `ep` of eq. 7, `[batch, emotions]`; None in a system that
      predicts no emotion.
    emotional: `w~0`, the vector of the emotional context, `[batch, d]`; None
      except in EmpDG's generator.
  """

  semantic: jax.Array
  first_input: jax.Array
  memory: Any
  source: jax.Array
  emotion_logits: jax.Array | None = None
  emotional: jax.Array | None = None


def choose_emotion(logits: jax.Array, emotion: jax.Array | None) -> jax.Array:
  """Makes a chosen emotion the likeliest.

  Its logit and the largest change places, so that the logits stay as peaked as
  those the decoder was trained with.

  Args:
    logits: The logits of the emotions, `[batch, emotions]`.
    emotion: The emotion, -1 for the likeliest, `[batch]`; None changes none.

  >>> choose_emotion(jnp.array([[3.0, 1.0, 2.0]]), jnp.array([1]))
  Array([[1., 3., 2.]], dtype=float32)
  """
  if emotion is None:
    return logits
  likeliest = jnp.argmax(logits, axis=-1)
  chosen = jnp.where(emotion < 0, likeliest, emotion)
  ids = jnp.arange(logits.shape[-1])
  order = jnp.where(ids == chosen[:, None], likeliest[:, None], ids)
  order = jnp.where(ids == likeliest[:, None], chosen[:, None], order)
  return jnp.take_along_axis(logits, order, axis=-1)


class Outputs(NamedTuple):
  """The outputs of a system under teacher forcing.

  Attributes:
    encoded: The encoded dialogues.
    hidden: The inputs of the projection, `[batch, N, d]`.
    projection: The matrix of the output, `[d, V]`.
    attention: The attention of the decoder's last layer to the source, averaged
      over its heads, `[batch, N, length]`.
    pointer: The copying part, None without `config.pointer_generator`.
  """

  encoded: Encoding
  hidden: jax.Array
  projection: jax.Array
  attention: jax.Array
  pointer: Pointer | None

  @property
  def logits(self) -> jax.Array:
    """The logits over the vocabulary, `[batch, N, V]`."""
    return layers.project(self.hidden, self.projection)


class Cache(NamedTuple):
  """The state of decoding between steps.

  Attributes:
    layers: The decoder's cache, of the decoder's own type.
    copied_from: The source position that an UNK copies at each step, -1 where
      the source has none, `[batch, max_steps]`.
  """

  layers: Any
  copied_from: jax.Array


class EncoderDecoder(nn.Module):
  """The abstract base of all systems; it has no encoder.

  A system extends `setup` by its encoders, defines `source_ids` and `read`, and
  may override `create_decoder`.

  Attributes:
    config: The system's sizes and options.
    vocab_size: V.
    num_emotions: The number of emotion labels in the dataset.
    dtype: The type of products and activations. Parameters, normalisations,
      softmaxes, logits and everything that predicts the emotion are float32.
    predicts_emotion: Whether the system perceives the user's emotion.
  """

  # No field: Flax makes fields of annotated attributes alone.
  predicts_emotion = True

  config: ModelConfig
  vocab_size: int
  num_emotions: int
  dtype: Any = jnp.float32

  def setup(self) -> None:
    """Creates the embedding, output projection, gate and decoder."""
    c = self.config
    self.embedding = self.param(
      "embedding",
      nn.initializers.normal(c.emb_dim**-0.5),
      (self.vocab_size, c.emb_dim),
    )
    self.decoder = self.create_decoder()
    if self.predicts_emotion:
      # In float32: these are small, and the emotion loss reads them.
      self.emotion_dropout = layers.Dropout(c.emotion_dropout)
      self.emotion = nn.Dense(self.num_emotions, use_bias=False)
    if c.pointer_generator:
      self.gate = nn.Dense(1)
    if not c.tie_embeddings:
      # Glorot's bound, a sixth of a dense layer's default, gives all words
      # almost the same probability at first. Words that are never targets keep
      # about that probability, so it must be no larger than the others'.
      self.vocab_projection = self.param(
        "vocab_projection",
        nn.initializers.xavier_uniform(),
        (c.emb_dim, self.vocab_size),
      )

  def create_decoder(self) -> Any:
    """Returns the decoder, with the interface of `decoder.Decoder`."""
    return decoder.Decoder(self.config, self.dtype)

  def source_ids(self, inputs: Inputs) -> tuple[jax.Array, ...]:
    """Returns the ids to embed for `read`, each `[batch, length]`."""
    raise NotImplementedError

  def read(
    self, inputs: Inputs, embedded: list[jax.Array], keys: jax.Array | None
  ) -> Encoding:
    """Encodes the embedded `source_ids`.

    Args:
      inputs: The dialogues.
      embedded: The embedded ids, each `[batch, length, d]`.
      keys: The dropout keys, `[batch]`, or None for evaluation.
    """
    raise NotImplementedError

  def perceive(
    self, pooled: jax.Array, inputs: Inputs, keys: jax.Array | None
  ) -> jax.Array:
    """Returns the logits `ep` of the emotions (eq. 7), `[batch, emotions]`.

    Args:
      pooled: What the classifier reads of the contexts, `[batch, features]`.
      inputs: The dialogues, with the emotions that users chose.
      keys: The dropout keys, `[batch]`, or None for evaluation.
    """
    logits = self.emotion(self.emotion_dropout(pooled, keys))
    return choose_emotion(logits, inputs.emotion)

  def expected_embedding(self, probs: jax.Array) -> jax.Array:
    """Returns the mean of `embed` over distributions `[..., V]`."""
    probs, table = probs.astype(self.dtype), self.embedding.astype(self.dtype)
    return product(probs, table) * self.config.emb_dim**0.5

  def _embed_all(self, *ids: jax.Array) -> list[jax.Array]:
    """Returns `embed` of each argument, `[batch, length]`."""
    # One look-up for all ids: each one's gradient is an array as large as the
    # table, and several would have to be added up.
    embedded = self.embed(jnp.concatenate(ids, axis=1))
    ends = list(itertools.accumulate(i.shape[1] for i in ids))
    return jnp.split(embedded, ends[:-1], axis=1)

  def embed(
    self, tokens: jax.Array, weights: jax.Array | None = None
  ) -> jax.Array:
    """Returns scaled word embeddings.

    Args:
      tokens: `[batch]` or `[batch, length]`.
      weights: Weights that receive the gradient of `tokens`, with a further
        axis of size V; see `layers.straight_through`.

    Returns:
      `[batch, d]` or `[batch, length, d]`.
    """
    if weights is None:
      embedded = self.embedding[tokens]
    else:
      embedded = layers.straight_through(weights, tokens, self.embedding)
    return embedded * self.config.emb_dim**0.5

  def encode(self, inputs: Inputs, keys: jax.Array | None) -> Encoding:
    """Embeds and encodes dialogues (eqs. 1-8).

    Args:
      inputs: The dialogues.
      keys: The dropout keys, `[batch]`, or None for evaluation.
    """
    embedded = self._embed_all(*self.source_ids(inputs))
    return self.read(inputs, embedded, keys)

  def projection(self) -> jax.Array:
    """Returns the matrix of the output, `[d, V]`."""
    if self.config.tie_embeddings:
      return self.embedding.T
    return self.vocab_projection

  def project(self, hidden: jax.Array) -> jax.Array:
    """Returns logits over the vocabulary, `[..., d] -> [..., V]`."""
    return layers.project(hidden, self.projection())

  def _point(
    self, hidden: jax.Array, attention: jax.Array, source: jax.Array
  ) -> Pointer | None:
    if not self.config.pointer_generator:
      return None
    return Pointer(self.gate(hidden)[..., 0], attention, source)

  def __call__(
    self, inputs: Inputs, target: jax.Array, keys: jax.Array | None = None
  ) -> Outputs:
    """Scores a target with teacher forcing.

    Args:
      inputs: The dialogues.
      target: `y1 .. yn EOS`, `[batch, N]`.
      keys: The dropout keys, `[batch]`, or None for evaluation.
    """
    # The decoder predicts each token from the one before it, and the first
    # token from `first_input`; the last token is never an input.
    *embedded, embedded_target = self._embed_all(
      *self.source_ids(inputs), target[:, :-1]
    )
    encoded = self.read(inputs, embedded, keys)
    x = jnp.concatenate([encoded.first_input[:, None], embedded_target], axis=1)
    hidden, attention = self.decoder(x, encoded.memory, keys)
    pointer = self._point(hidden, attention, encoded.source)
    return Outputs(encoded, hidden, self.projection(), attention, pointer)

  def init_cache(self, batch: int, max_steps: int) -> Cache:
    """Returns an empty cache for responses of at most `max_steps` tokens."""
    return Cache(
      self.decoder.init_cache(batch, max_steps),
      jnp.full((batch, max_steps), -1, jnp.int32),
    )

  def decode_step(
    self, encoded: Encoding, tokens: jax.Array, cache: Cache, index: jax.Array
  ) -> tuple[jax.Array, Cache]:
    """Predicts the token at position `index`.

    Args:
      encoded: The encoded dialogues.
      tokens: The tokens chosen one step earlier, `[batch]`; ignored at step 0.
      cache: The cache of the previous step.
      index: The step, a scalar.

    Returns:
      The log-probabilities `[batch, V]`, impossible tokens at -1e9, and the
      cache for the next step.
    """
    x = jnp.where(index == 0, encoded.first_input, self.embed(tokens))
    return self.decode_embedded(encoded, x, cache, index)[:2]

  def choose_token(
    self,
    encoded: Encoding,
    tokens: jax.Array,
    cache: Cache,
    index: jax.Array,
    ended: jax.Array,
    keys: jax.Array | None = None,
  ) -> tuple[jax.Array, Cache]:
    """Chooses the likeliest token at position `index`, or draws one.

    Args:
      encoded: The encoded dialogues.
      tokens: The tokens chosen one step earlier, `[batch]`; ignored at step 0.
      cache: The cache of the previous step.
      index: The step, a scalar.
      ended: The rows whose token does not matter, `[batch]`.
      keys: The keys of the draws, `[batch]`, or None for the likeliest tokens.

    Returns:
      The tokens `[batch]`, those of the largest log-probability of
      `decode_step` or, with keys, of its sum with Gumbel noise; and the cache
      for the next step.
    """
    x = jnp.where(index == 0, encoded.first_input, self.embed(tokens))
    hidden, pointer, cache, excluded = self._advance(encoded, x, cache, index)
    if pointer is not None:
      pointer = Pointer(
        pointer.gate[:, 0], pointer.attention[:, 0], pointer.source
      )
    if keys is not None:
      keys = fold_in(keys, index)
    tokens = likeliest(
      hidden, self.projection(), pointer, excluded, ~ended, keys
    )
    return tokens, cache

  def decode_embedded(
    self,
    encoded: Encoding,
    x: jax.Array,
    cache: Cache,
    index: jax.Array,
    added: jax.typing.ArrayLike = 0.0,
  ) -> tuple[jax.Array, Cache, jax.Array]:
    """Predicts like `decode_step`, but from an embedded token.

    Args:
      encoded: The encoded dialogues.
      x: The embedded token chosen one step earlier, `[batch, d]`; at step 0
        `encoded.first_input`.
      cache: The cache of the previous step.
      index: The step, a scalar.
      added: A term added to the logits, for a gradient with respect to them.

    Returns:
      The log-probabilities and the cache as from `decode_step`, and the input
      of `project`, `[batch, d]`.
    """
    hidden, pointer, cache, excluded = self._advance(encoded, x, cache, index)
    logits = checkpoint_name(self.project(hidden), decoding.SAVED) + added
    log_probs = log_mixture(logits[:, None], pointer)[:, 0]
    return exclude(log_probs, excluded), cache, hidden

  def excluded(self, source: jax.Array) -> jax.Array:
    """Marks the special tokens that no response to a dialogue may hold.

    Args:
      source: The ids of the tokens the decoder attends to, `[batch, length]`.

    Returns:
      `[batch, special tokens]`, True at the impossible ones, from id 0 on.
    """
    copies = jnp.any(source == vocab.UNK, axis=-1)
    copies &= self.config.pointer_generator
    # Special tokens have logits like any other, which could win at any step.
    ids = jnp.arange(len(vocab.SPECIAL_TOKENS))
    never = ~jnp.isin(ids, jnp.array(_GENERATED))
    return never | ((ids == vocab.UNK) & ~copies[:, None])

  def _advance(
    self, encoded: Encoding, x: jax.Array, cache: Cache, index: jax.Array
  ) -> tuple[jax.Array, Pointer | None, Cache, jax.Array]:
    """Runs the decoder at one position; see `decode_embedded`.

    Returns:
      The input of `project`, `[batch, d]`; the copying part, its arrays with a
      length of 1; the next cache; and which of the special tokens are
      impossible, `[batch, special tokens]`.
    """
    hidden, attention, layer_caches = self.decoder.step(
      x[:, None], encoded.memory, cache.layers, index
    )
    pointer = self._point(hidden, attention, encoded.source)
    # All words outside the vocabulary share the id UNK, so a copied UNK alone
    # does not say which word it is. `copied_from` records the unknown source
    # word with the most attention, for the text to show. Without any unknown
    # source word, UNK is impossible.
    unknown = encoded.source == vocab.UNK
    copied_from = jnp.argmax(jnp.where(unknown, attention[:, 0], -1.0), axis=-1)
    excluded = self.excluded(encoded.source)
    copied_from = jnp.where(excluded[:, vocab.UNK], -1, copied_from)
    copied_from = copied_from.astype(jnp.int32)
    copied_from = cache.copied_from.at[:, index].set(copied_from)
    return hidden[:, 0], pointer, Cache(layer_caches, copied_from), excluded
