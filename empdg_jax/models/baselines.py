"""The baselines of EmpDG (paper §5.3), built from the same layers."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from empdg_jax.config import ModelConfig
from empdg_jax.data import vocab
from empdg_jax.models import decoder, encoders, layers
from empdg_jax.models.decoder import DecoderLayer, LayerCache
from empdg_jax.models.encoder_decoder import EncoderDecoder, Encoding, Inputs


class Transformer(EncoderDecoder):
  """The Transformer (Vaswani et al., 2017), which predicts no emotion.

  The first input of its decoder is SOS.
  """

  predicts_emotion = False

  def setup(self) -> None:
    """Creates the encoder."""
    super().setup()
    self.encoder = encoders.Encoder(self.config, self.dtype)

  def source_ids(self, inputs: Inputs) -> tuple[jax.Array, ...]:
    """Returns the words, their states and SOS."""
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
      start[:, 0],
      self.decoder.project_memory(semantic, mask),
      inputs.context,
    )


class EmoPrepend(EncoderDecoder):
  """EmoPrepend-1 (Rashkin et al., 2019): the predicted emotion comes first.

  A classifier reads the encoder's output at CLS; its projected logits are the
  first input of the decoder. It is EmpDG's generator without the emotional
  context.
  """

  def setup(self) -> None:
    """Creates the encoder and the projections of the emotion."""
    super().setup()
    self.encoder = encoders.Encoder(self.config, self.dtype)
    self.pool = layers.Pool(self.config)
    self.emotion_embedding = nn.Dense(self.config.emb_dim)

  def source_ids(self, inputs: Inputs) -> tuple[jax.Array, ...]:
    """Returns the words and their states."""
    return inputs.context, inputs.state

  def read(
    self, inputs: Inputs, embedded: list[jax.Array], keys: jax.Array | None
  ) -> Encoding:
    """Encodes the dialogue's words; see `EncoderDecoder.read`."""
    words, states = embedded
    mask = inputs.context != vocab.PAD
    semantic = self.encoder(words + states, mask, keys)
    pooled = self.pool(semantic[:, 0], words, mask, keys)
    emotion_logits = self.perceive(pooled, inputs, keys)
    return Encoding(
      semantic[:, 0],
      self.emotion_embedding(emotion_logits),
      self.decoder.project_memory(semantic, mask),
      inputs.context,
      emotion_logits,
    )


class ListenersMemory(NamedTuple):
  """The context, projected once per response for all of MoEL's decoders.

  Attributes:
    shared: The keys and values of the shared listener,
      `[batch, heads, memory_length, depth]`.
    listeners: Those of the listeners,
      `[batch, listeners, heads, memory_length, depth]`.
    meta: The memory of the meta listener.
    weights: The weights of the listeners, which sum to 1, `[batch, listeners]`;
      None before `MoEL` has predicted them.
  """

  shared: tuple[jax.Array, jax.Array]
  listeners: tuple[jax.Array, jax.Array]
  meta: decoder.Memory
  weights: jax.Array | None = None


class ListenersCache(NamedTuple):
  """The caches of MoEL's decoders; see `decoder.LayerCache`.

  Attributes:
    shared: The cache of the shared listener.
    listeners: Those of the listeners, with their axis after the batch axis.
    meta: Those of every meta layer.
  """

  shared: LayerCache
  listeners: LayerCache
  meta: tuple[LayerCache, ...]


def _listeners(config: ModelConfig, num_emotions: int, dtype: Any) -> nn.Module:
  """Returns one decoder layer per emotion, vectorised.

  Parameters have a leading axis of listeners; arrays of examples have it as
  their second axis.
  """
  # `nn.vmap` needs the axes of each method that is called. The input, mask and
  # index are common to all listeners; the keys and values of `keys_values`
  # (axis 1), the dropout keys (axis 0) and the cache (axis 1) are their own.
  # They are the second axis because beam search reorders the first.
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
  return lifted(config, dtype)


def _mix(each: jax.Array, memory: ListenersMemory) -> jax.Array:
  """Returns the weighted sum of listeners' outputs, `[batch, length, d]`."""
  weights: Any = memory.weights
  return jnp.einsum("bl,bl...->b...", weights.astype(each.dtype), each)


class ListenersDecoder(nn.Module):
  """MoEL's decoders (Lin et al., 2019, §3.2-3.3).

  A listener per emotion and a shared listener get the same inputs. The output
  of the shared one plus the weighted sum of the others goes to the meta
  listener, which has `num_layers` layers.
  """

  config: ModelConfig
  num_emotions: int
  dtype: Any = jnp.float32

  def setup(self) -> None:
    """Creates the listeners and the meta listener."""
    c = self.config
    self.shared = DecoderLayer(c, self.dtype)
    self.listeners = _listeners(c, self.num_emotions, self.dtype)
    self.meta = [DecoderLayer(c, self.dtype) for _ in range(c.num_layers)]
    self.dropout = layers.Dropout(c.dropout_rate)
    # With "post" the last layer has already normalised its output.
    pre = c.norm_order == "pre"
    self.norm = nn.LayerNorm(dtype=self.dtype) if pre else lambda x: x

  def project_memory(
    self, memory: jax.Array, mask: jax.Array
  ) -> ListenersMemory:
    """Projects contexts; see `decoder.Decoder`. `MoEL` adds the weights."""
    return ListenersMemory(
      self.shared.keys_values(memory),
      self.listeners.keys_values(memory),
      decoder.project_memory(self.meta, memory, mask),
    )

  def __call__(
    self, x: jax.Array, memory: ListenersMemory, keys: jax.Array | None
  ) -> tuple[jax.Array, jax.Array]:
    """Decodes with teacher forcing; see `decoder.Decoder`."""
    x += layers.sinusoidal_positions(x.shape[1], x.shape[2])
    x = self.dropout(x.astype(self.dtype), keys)
    # All listeners have the same path, so without keys of their own they would
    # share one dropout mask. A key per listener -> [listeners, batch]
    listener_keys = keys
    if keys is not None:
      fold_in = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (None, 0))
      listener_keys = fold_in(keys, jnp.arange(self.num_emotions))
    mask = memory.meta.mask
    shared, _ = self.shared(x, memory.shared, mask, keys)
    each, _ = self.listeners(x, memory.listeners, mask, listener_keys)
    x = shared + _mix(each, memory)
    x, attention = decoder.run_stack(self.meta, x, memory.meta, keys)
    return self.norm(x), attention

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
    x = x.astype(self.dtype)
    mask = memory.meta.mask
    shared, _, shared_cache = self.shared.step(
      x, memory.shared, mask, cache.shared, index
    )
    each, _, listeners_cache = self.listeners.step(
      x, memory.listeners, mask, cache.listeners, index
    )
    x = shared + _mix(each, memory)
    x, attention, meta_cache = decoder.step_stack(
      self.meta, x, memory.meta, cache.meta, index
    )
    new_cache = ListenersCache(shared_cache, listeners_cache, meta_cache)
    return self.norm(x), attention, new_cache


class MoEL(Transformer):
  """The mixture of empathetic listeners (Lin et al., 2019).

  A Transformer whose decoder mixes the listeners by the predicted emotion.
  """

  predicts_emotion = True

  def setup(self) -> None:
    """Creates the encoder and the classifier that weights the listeners."""
    super().setup()
    self.pool = layers.Pool(self.config)

  def create_decoder(self) -> ListenersDecoder:
    """Returns the decoder of all listeners."""
    return ListenersDecoder(self.config, self.num_emotions, self.dtype)

  def read(
    self, inputs: Inputs, embedded: list[jax.Array], keys: jax.Array | None
  ) -> Encoding:
    """Encodes the dialogue's words; see `EncoderDecoder.read`."""
    encoded = super().read(inputs, embedded, keys)
    mask = inputs.context != vocab.PAD
    pooled = self.pool(encoded.semantic, embedded[0], mask, keys)
    emotion_logits = self.perceive(pooled, inputs, keys)
    weights = listener_weights(emotion_logits, self.config.listener_top_k)
    if inputs.listener is not None:
      gold = jax.nn.one_hot(inputs.listener, self.num_emotions)
      weights = jnp.where(inputs.listener[:, None] < 0, weights, gold)
    return encoded._replace(
      memory=encoded.memory._replace(weights=weights),
      emotion_logits=emotion_logits,
    )


def listener_weights(logits: jax.Array, top_k: int) -> jax.Array:
  """Returns the softmax over the `top_k` largest of `[batch, emotions]` logits.

  Args:
    logits: The logits of the emotions.
    top_k: The number of listeners with a weight; 0 for all.

  >>> listener_weights(jnp.array([[0.0, 0.0, -9.0]]), top_k=2)
  Array([[0.5, 0.5, 0. ]], dtype=float32)
  """
  if top_k:
    # By indices and not by the k-th value, which ties could share.
    _, best = jax.lax.top_k(logits, top_k)
    in_best = jnp.any(best[..., None] == jnp.arange(logits.shape[-1]), axis=-2)
    logits = jnp.where(in_best, logits, -jnp.inf)
  return jax.nn.softmax(logits)
