"""What every system shares: words in, a decoder with a pointer, words out.

A system says what it reads of a dialogue and how; `EncoderDecoder` does the
rest, for teacher forcing, for decoding and for sampling.
"""

import itertools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from empdg_jax.config import ModelConfig
from empdg_jax.data import vocab
from empdg_jax.losses import Pointer, log_mixture
from empdg_jax.models import decoder, layers

# A response never holds these; it may hold UNK, which copies a source word.
_NEVER_GENERATED = (
  vocab.PAD,
  vocab.SOS,
  vocab.USR,
  vocab.SYS,
  vocab.CLS,
  vocab.LAB,
)


class Inputs(NamedTuple):
  """A batch of dialogues as ids; see `data.pipeline.Batch`.

  Attributes:
    context: `[batch, M]`.
    state: `[batch, M]`.
    emotion_context: `[batch, E]`.
    listener: The one listener to hear in training, -1 where the model chooses
      itself, `[batch]`; None always lets it choose. Of MoEL alone.
  """

  context: jax.Array
  state: jax.Array
  emotion_context: jax.Array
  listener: jax.Array | None = None


class Encoding(NamedTuple):
  """What a system makes of a dialogue; `d` features.

  Attributes:
    semantic: `x~0`, the dialogue context's vector, `[batch, d]`.
    emotional: `w~0`, the emotional context's vector, `[batch, d]`, of EmpDG's
      generator alone.
    emotion_logits: `ep` of eq. 7, `[batch, emotions]`; None for a system that
      perceives no emotion.
    first_input: The decoder's first input, `[batch, d]`.
    memory: What the decoder attends to, projected; the decoder's own type.
    source: Ids of the tokens that it attends to, `[batch, length]`.
  """

  semantic: jax.Array
  emotional: jax.Array | None
  emotion_logits: jax.Array | None
  first_input: jax.Array
  memory: Any
  source: jax.Array


class Outputs(NamedTuple):
  """What a system makes of a dialogue and a target.

  Attributes:
    encoded: The dialogue.
    logits: Over the vocabulary, `[batch, N, V]`.
    attention: Of the decoder's last layer to the source, the mean of its heads,
      `[batch, N, length]`.
    pointer: Where the decoder copies from, if the model has a pointer.
  """

  encoded: Encoding
  logits: jax.Array
  attention: jax.Array
  pointer: Pointer | None


class Cache(NamedTuple):
  """What decoding remembers between steps.

  Attributes:
    layers: The decoder's caches; the decoder's own type.
    copied_from: For each step the source position that an UNK of that step
      copies, -1 where there is none, `[batch, max_steps]`.
  """

  layers: Any
  copied_from: jax.Array


class EncoderDecoder(nn.Module):
  """A system without its encoders.

  A system's `setup` creates its encoders after this class's, and another
  `self.decoder` if it has one; `source_ids` and `read` say what they read.

  Attributes:
    config: Its sizes and options.
    vocab_size: V.
    num_emotions: How many emotions the dataset labels.
  """

  config: ModelConfig
  vocab_size: int
  num_emotions: int

  def setup(self) -> None:
    """Creates what is of the vocabulary's size, the gate and the decoder."""
    c = self.config
    self.embedding = self.param(
      "embedding",
      nn.initializers.normal(c.emb_dim**-0.5),
      (self.vocab_size, c.emb_dim),
    )
    self.decoder = self.create_decoder()
    if c.pointer_generator:
      self.gate = nn.Dense(1)
    if not c.tie_embeddings:
      # Glorot's bound, a sixth of the layer's default, gives every word almost
      # the same chance at first: words that are never targets keep what they
      # are given, and must not take probability from the others.
      self.vocab_projection = self.param(
        "vocab_projection",
        nn.initializers.xavier_uniform(),
        (c.emb_dim, self.vocab_size),
      )

  def create_decoder(self) -> Any:
    """Returns the decoder; see `decoder.Decoder` for what it must do."""
    return decoder.Decoder(self.config)

  def source_ids(self, inputs: Inputs) -> tuple[jax.Array, ...]:
    """Returns the ids to embed, `[batch, length]` each, for `read`."""
    raise NotImplementedError

  def read(
    self, inputs: Inputs, embedded: list[jax.Array], keys: jax.Array | None
  ) -> Encoding:
    """Encodes what `source_ids` gave.

    Args:
      inputs: The dialogues.
      embedded: The embedded ids, `[batch, length, d]` each.
      keys: Dropout keys, `[batch]`, or None for evaluation.

    Returns:
      The emotion and what the decoder needs.
    """
    raise NotImplementedError

  def expected_embedding(self, probs: jax.Array) -> jax.Array:
    """Returns the mean of `embed` over distributions `[..., V]`."""
    return probs @ self.embedding * self.config.emb_dim**0.5

  def _embed_all(self, *ids: jax.Array) -> list[jax.Array]:
    """Returns `embed` of each argument, `[batch, length]`.

    All ids are looked up at once: the gradient of a look-up is an array as
    large as the table, so one is cheaper than several.
    """
    embedded = self.embed(jnp.concatenate(ids, axis=1))
    ends = list(itertools.accumulate(i.shape[1] for i in ids))
    return jnp.split(embedded, ends[:-1], axis=1)

  def embed(
    self, tokens: jax.Array, weights: jax.Array | None = None
  ) -> jax.Array:
    """Returns scaled word embeddings.

    Args:
      tokens: `[batch]` or `[batch, length]`.
      weights: Takes the gradient of `tokens`, one axis more, V; see
        `layers.straight_through`.

    Returns:
      `[batch, d]` or `[batch, length, d]`.
    """
    if weights is None:
      embedded = self.embedding[tokens]
    else:
      embedded = layers.straight_through(weights, tokens, self.embedding)
    return embedded * self.config.emb_dim**0.5

  def encode(self, inputs: Inputs, keys: jax.Array | None) -> Encoding:
    """Reads the dialogue (eqs. 1-8).

    Args:
      inputs: The dialogues.
      keys: Dropout keys, `[batch]`, or None for evaluation.

    Returns:
      The emotion and what the decoder needs.
    """
    embedded = self._embed_all(*self.source_ids(inputs))
    return self.read(inputs, embedded, keys)

  def project(self, hidden: jax.Array) -> jax.Array:
    """Returns logits over the vocabulary, `[..., d] -> [..., V]`."""
    if self.config.tie_embeddings:
      return hidden @ self.embedding.T
    return layers.project(hidden, self.vocab_projection)

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
      inputs: The contexts.
      target: `y1 .. yn EOS`, `[batch, N]`.
      keys: Dropout keys, `[batch]`, or None for evaluation.

    Returns:
      The dialogue, the logits, the attention and the pointer.
    """
    *embedded, embedded_target = self._embed_all(
      *self.source_ids(inputs), target[:, :-1]
    )
    encoded = self.read(inputs, embedded, keys)
    x = jnp.concatenate([encoded.first_input[:, None], embedded_target], axis=1)
    hidden, attention = self.decoder(x, encoded.memory, keys)
    pointer = self._point(hidden, attention, encoded.source)
    return Outputs(encoded, self.project(hidden), attention, pointer)

  def init_cache(self, batch: int, max_steps: int) -> Cache:
    """Returns the empty cache for responses of at most `max_steps` tokens."""
    return Cache(
      self.decoder.init_cache(batch, max_steps),
      jnp.full((batch, max_steps), -1, jnp.int32),
    )

  def decode_step(
    self, encoded: Encoding, tokens: jax.Array, cache: Cache, index: jax.Array
  ) -> tuple[jax.Array, Cache]:
    """Predicts the token at position `index`.

    Args:
      encoded: The dialogue.
      tokens: The tokens chosen one step earlier, `[batch]`; ignored at 0.
      cache: What the earlier steps left.
      index: The step, a scalar.

    Returns:
      Log-probabilities `[batch, V]` with impossible tokens at -1e9, and the
      cache for the next step.
    """
    x = jnp.where(index == 0, encoded.first_input, self.embed(tokens))
    log_probs, _, cache = self.decode_embedded(encoded, x, cache, index)
    return log_probs, cache

  def decode_embedded(
    self,
    encoded: Encoding,
    x: jax.Array,
    cache: Cache,
    index: jax.Array,
    added: jax.typing.ArrayLike = 0.0,
  ) -> tuple[jax.Array, jax.Array, Cache]:
    """Predicts as `decode_step` does, from an embedded token.

    Args:
      encoded: The dialogue.
      x: The token chosen one step earlier, embedded, `[batch, d]`; at 0
        `encoded.first_input`.
      cache: What the earlier steps left.
      index: The step, a scalar.
      added: To the logits, for a gradient with respect to them.

    Returns:
      Log-probabilities as `decode_step`, what `project` was given
      `[batch, d]`, and the cache.
    """
    hidden, attention, layer_caches = self.decoder.step(
      x[:, None], encoded.memory, cache.layers, index
    )
    pointer = self._point(hidden, attention, encoded.source)
    hidden = hidden[:, 0]
    logits = self.project(hidden) + added
    log_probs = log_mixture(logits[:, None], pointer)[:, 0]
    # UNK stands for the unknown source word most attended to, if any.
    unknown = encoded.source == vocab.UNK
    copied_from = jnp.argmax(jnp.where(unknown, attention[:, 0], -1.0), axis=-1)
    copies = jnp.any(unknown, axis=-1) & self.config.pointer_generator
    ids = jnp.arange(self.vocab_size)
    never = jnp.isin(ids, jnp.array(_NEVER_GENERATED))
    impossible = never | ((ids == vocab.UNK) & ~copies[:, None])
    log_probs = jnp.where(impossible, layers.NEGATIVE_INFINITY, log_probs)
    copied_from = jnp.where(copies, copied_from, -1).astype(jnp.int32)
    return (
      log_probs,
      hidden,
      Cache(layer_caches, cache.copied_from.at[:, index].set(copied_from)),
    )
