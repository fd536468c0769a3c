"""The systems that EmpDG is compared with (paper §5.3), on the same layers."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from empdg_jax.config import ModelConfig
from empdg_jax.data import vocab
from empdg_jax.models import encoders, layers
from empdg_jax.models.decoder import DecoderLayer, LayerCache
from empdg_jax.models.encoder_decoder import (
  EncoderDecoder,
  Encoding,
  Inputs,
)


class Transformer(EncoderDecoder):
  """An encoder and a decoder (Vaswani et al., 2017); it perceives no emotion.

  The decoder's first input is SOS.
  """

  def setup(self) -> None:
    """Creates the encoder."""
    super().setup()
    self.encoder = encoders.Encoder(self.config)

  def source_ids(self, inputs: Inputs) -> tuple[jax.Array, ...]:
    """Returns words, states and SOS."""
    start = jnp.full_like(inputs.context[:, :1], vocab.SOS)
    return inputs.context, inputs.state, start

  def read(
    self, inputs: Inputs, embedded: list[jax.Array], keys: jax.Array | None
  ) -> Encoding:
    """Encodes the dialogue's words; see `EncoderDecoder.read`."""
    words, states, start = embedded
    mask = inputs.context != vocab.PAD
    semantic = self.encoder(words + states, mask, keys)
    return Encoding(
      semantic[:, 0],
      None,
      None,
      start[:, 0],
      self.decoder.project_memory(semantic, mask),
      inputs.context,
    )


class EmoPrepend(EncoderDecoder):
  """EmoPrepend-1 (Rashkin et al., 2019): the perceived emotion comes first.

  A classifier on the encoder's CLS; its logits, projected, are the decoder's
  first input. It is EmpDG's generator without the emotional context.
  """

  def setup(self) -> None:
    """Creates the encoder and the emotion's projections."""
    super().setup()
    self.encoder = encoders.Encoder(self.config)
    self.emotion = nn.Dense(self.num_emotions, use_bias=False)
    self.emotion_embedding = nn.Dense(self.config.emb_dim)

  def source_ids(self, inputs: Inputs) -> tuple[jax.Array, ...]:
    """Returns words and states."""
    return inputs.context, inputs.state

  def read(
    self, inputs: Inputs, embedded: list[jax.Array], keys: jax.Array | None
  ) -> Encoding:
    """Encodes the dialogue's words; see `EncoderDecoder.read`."""
    words, states = embedded
    mask = inputs.context != vocab.PAD
    semantic = self.encoder(words + states, mask, keys)
    emotion_logits = self.emotion(semantic[:, 0])
    return Encoding(
      semantic[:, 0],
      None,
      emotion_logits,
      self.emotion_embedding(emotion_logits),
      self.decoder.project_memory(semantic, mask),
      inputs.context,
    )


class ListenersMemory(NamedTuple):
  """What MoEL's decoders attend to, projected once a response.

  Attributes:
    shared: The shared listener's keys and values of the context,
      `[batch, heads, memory_length, depth]`.
    listeners: The listeners' keys and values, the same with an axis of
      listeners behind the batch's.
    meta: Each meta layer's.
    mask: True at real tokens, `[batch, memory_length]`.
    weights: Of the listeners, sums to 1, `[batch, listeners]`.
  """

  shared: tuple[jax.Array, jax.Array]
  listeners: tuple[jax.Array, jax.Array]
  meta: tuple[tuple[jax.Array, jax.Array], ...]
  mask: jax.Array
  weights: jax.Array


class ListenersCache(NamedTuple):
  """The caches of MoEL's decoders; see `decoder.LayerCache`.

  Attributes:
    shared: The shared listener's.
    listeners: The listeners', an axis of them behind the batch's.
    meta: Each meta layer's.
  """

  shared: LayerCache
  listeners: LayerCache
  meta: tuple[LayerCache, ...]


def _listeners(config: ModelConfig, num_emotions: int) -> nn.Module:
  """Returns a decoder layer for each emotion.

  Parameters have a leading axis of listeners; arrays of examples have it behind
  the batch's axis.
  """
  lifted = nn.vmap(
    DecoderLayer,
    methods={
      method: {
        "variable_axes": {"params": 0},
        "split_rngs": {"params": True},
        "axis_size": num_emotions,
        "in_axes": in_axes,
        "out_axes": 1,
      }
      for method, in_axes in (
        ("__call__", (None, 1, None, 0)),
        ("keys_values", None),
        ("step", (None, 1, None, 1, None)),
      )
    },
  )
  return lifted(config)


class ListenersDecoder(nn.Module):
  """MoEL's decoders (Lin et al., 2019, §3.2-3.3).

  Each emotion's listener and a shared one read the same inputs; the shared
  listener's output plus the weighted sum of the others goes to the meta
  listener, which has `num_layers` layers.
  """

  config: ModelConfig
  num_emotions: int

  def setup(self) -> None:
    """Creates the listeners and the meta listener."""
    c = self.config
    self.shared = DecoderLayer(c)
    self.listeners = _listeners(c, self.num_emotions)
    self.meta = [DecoderLayer(c) for _ in range(c.num_layers)]
    self.dropout = layers.Dropout(c.dropout_rate)
    if c.norm_order == "pre":
      self.norm = nn.LayerNorm()

  def _last_norm(self, x: jax.Array) -> jax.Array:
    return self.norm(x) if self.config.norm_order == "pre" else x

  def project_memory(
    self, memory: jax.Array, mask: jax.Array, weights: jax.Array
  ) -> ListenersMemory:
    """Projects contexts; see `decoder.Decoder.project_memory`.

    Args:
      memory: `[batch, memory_length, d]`.
      mask: True at real tokens, `[batch, memory_length]`.
      weights: Of the listeners, `[batch, listeners]`.

    Returns:
      What `__call__` and `step` need.
    """
    return ListenersMemory(
      self.shared.keys_values(memory),
      self.listeners.keys_values(memory),
      tuple(layer.keys_values(memory) for layer in self.meta),
      mask,
      weights,
    )

  def __call__(
    self, x: jax.Array, memory: ListenersMemory, keys: jax.Array | None
  ) -> tuple[jax.Array, jax.Array]:
    """Decodes with teacher forcing; see `decoder.Decoder`."""
    x += layers.sinusoidal_positions(x.shape[1], x.shape[2])
    x = self.dropout(x, keys)
    # Each listener drops features of its own.
    of_listeners = (
      keys if keys is None else _fold_in_listeners(keys, self.num_emotions)
    )
    shared, _ = self.shared(x, memory.shared, memory.mask, keys)
    heard, _ = self.listeners(x, memory.listeners, memory.mask, of_listeners)
    x = shared + jnp.einsum("bl,bl...->b...", memory.weights, heard)
    attention = []
    for layer, keys_values in zip(self.meta, memory.meta, strict=True):
      x, weights = layer(x, keys_values, memory.mask, keys)
      attention.append(weights)
    return self._last_norm(x), attention[-1]

  def init_cache(self, batch: int, max_steps: int) -> ListenersCache:
    """Returns empty caches."""
    empty = self.shared.init_cache(batch, max_steps)
    return ListenersCache(
      empty,
      jax.tree.map(lambda x: jnp.stack([x] * self.num_emotions, axis=1), empty),
      (empty,) * self.config.num_layers,
    )

  def step(
    self,
    x: jax.Array,
    memory: ListenersMemory,
    cache: ListenersCache,
    index: jax.Array,
  ) -> tuple[jax.Array, jax.Array, ListenersCache]:
    """Decodes one position; see `decoder.Decoder.step`."""
    steps = cache.shared.keys.shape[2]
    x += layers.sinusoidal_positions(steps, x.shape[2])[index]
    mask = memory.mask
    shared, _, shared_cache = self.shared.step(
      x, memory.shared, mask, cache.shared, index
    )
    heard, _, listeners_cache = self.listeners.step(
      x, memory.listeners, mask, cache.listeners, index
    )
    x = shared + jnp.einsum("bl,bl...->b...", memory.weights, heard)
    meta_cache, attention = [], []
    for layer, keys_values, layer_cache in zip(
      self.meta, memory.meta, cache.meta, strict=True
    ):
      x, weights, layer_cache = layer.step(
        x, keys_values, mask, layer_cache, index
      )
      meta_cache.append(layer_cache)
      attention.append(weights)
    new_cache = ListenersCache(shared_cache, listeners_cache, tuple(meta_cache))
    return self._last_norm(x), attention[-1], new_cache


def _fold_in_listeners(keys: jax.Array, listeners: int) -> jax.Array:
  """Returns a key for each listener and example, `[listeners, batch]`."""
  fold_in = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (None, 0))
  return fold_in(keys, jnp.arange(listeners))


class MoEL(Transformer):
  """The mixture of empathetic listeners (Lin et al., 2019).

  A Transformer whose decoder is the listeners, weighted by the perceived
  emotion.
  """

  def setup(self) -> None:
    """Creates the listeners' keys."""
    super().setup()
    self.emotion = nn.Dense(self.num_emotions, use_bias=False)

  def create_decoder(self) -> ListenersDecoder:
    """Returns the listeners."""
    return ListenersDecoder(self.config, self.num_emotions)

  def read(
    self, inputs: Inputs, embedded: list[jax.Array], keys: jax.Array | None
  ) -> Encoding:
    """Encodes the dialogue's words; see `EncoderDecoder.read`."""
    words, states, start = embedded
    mask = inputs.context != vocab.PAD
    semantic = self.encoder(words + states, mask, keys)
    emotion_logits = self.emotion(semantic[:, 0])
    weights = listener_weights(emotion_logits, self.config.listener_top_k)
    if inputs.listener is not None:
      gold = jax.nn.one_hot(inputs.listener, self.num_emotions)
      weights = jnp.where(inputs.listener[:, None] < 0, weights, gold)
    return Encoding(
      semantic[:, 0],
      None,
      emotion_logits,
      start[:, 0],
      self.decoder.project_memory(semantic, mask, weights),
      inputs.context,
    )


def listener_weights(logits: jax.Array, top_k: int) -> jax.Array:
  """Returns the softmax over the `top_k` largest of `[batch, emotions]` logits.

  Args:
    logits: Of the emotions.
    top_k: How many listeners are heard; 0 for all.

  >>> listener_weights(jnp.array([[0.0, 0.0, -9.0]]), top_k=2)
  Array([[0.5, 0.5, 0. ]], dtype=float32)
  """
  if top_k:
    _, heard = jax.lax.top_k(logits, top_k)
    is_heard = jnp.any(
      heard[..., None] == jnp.arange(logits.shape[-1]), axis=-2
    )
    logits = jnp.where(is_heard, logits, -jnp.inf)
  return jax.nn.softmax(logits)
