"""EmpDG's empathetic generator (paper §4.1, eqs. 1-15)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from empdg_jax.data import vocab
from empdg_jax.models import encoders, layers
from empdg_jax.models.encoder_decoder import EncoderDecoder, Encoding, Inputs


class Generator(EncoderDecoder):
  """EmpDG's generator, with a second encoder for the emotional words."""

  def setup(self) -> None:
    """Creates both encoders and the projections of the emotion."""
    super().setup()
    self.semantic_encoder = encoders.Encoder(self.config, self.dtype)
    self.emotion_encoder = encoders.Encoder(self.config, self.dtype)
    self.semantic_pool = layers.Pool(self.config)
    self.emotional_pool = layers.Pool(self.config)
    self.emotion_embedding = nn.Dense(self.config.emb_dim)

  def source_ids(self, inputs: Inputs) -> tuple[jax.Array, ...]:
    """Returns words, states, emotional words and LAB."""
    # LAB is the state of every emotional word; one column broadcasts to all.
    label = jnp.full_like(inputs.context[:, :1], vocab.LAB)
    return inputs.context, inputs.state, inputs.emotion_context, label

  def read(
    self, inputs: Inputs, embedded: list[jax.Array], keys: jax.Array | None
  ) -> Encoding:
    """Encodes both contexts (eqs. 1-8); see `EncoderDecoder.read`."""
    words, states, emotion_words, emotion_state = embedded
    mask = inputs.context != vocab.PAD
    emotion_mask = inputs.emotion_context != vocab.PAD
    semantic = self.semantic_encoder(words + states, mask, keys)
    emotional = self.emotion_encoder(
      emotion_words + emotion_state, emotion_mask, keys
    )
    pooled = (
      self.emotional_pool(emotional[:, 0], emotion_words, emotion_mask, keys),
      self.semantic_pool(semantic[:, 0], words, mask, keys),
    )
    emotion_logits = self.perceive(
      jnp.concatenate(pooled, axis=-1), inputs, keys
    )
    # The decoder attends to one memory, C = [Cu ; Ce]. Its parts keep their
    # padding between them: the mask hides it and no shape depends on lengths.
    memory = self.decoder.project_memory(
      jnp.concatenate([semantic, emotional], axis=1),
      jnp.concatenate([mask, emotion_mask], axis=1),
    )
    source = jnp.concatenate([inputs.context, inputs.emotion_context], axis=1)
    return Encoding(
      semantic[:, 0],
      self.emotion_embedding(emotion_logits),
      memory,
      source,
      emotion_logits,
      emotional[:, 0],
    )
