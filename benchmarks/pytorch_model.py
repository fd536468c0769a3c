"""EmpDG in PyTorch: the functions that `pytorch_peer.py` times.

It computes what `empdg_jax` does, from parameters with the same names and
layouts, in the ways that are fastest in PyTorch.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Params = dict[str, Tensor]
# The ids of `empdg_jax.data.vocab`.
UNK, PAD, EOS, LAB, SPECIAL_TOKENS = 0, 1, 2, 7, 8


class Sizes(NamedTuple):
  """The sizes and options of a run; see `empdg_jax.config`."""

  emb_dim: int
  num_heads: int
  kernel_widths: tuple[int, ...]
  max_emotional_words: int
  dropout_rate: float
  label_smoothing: float
  penalty_weight: float
  sample_steps: int
  decode_steps: int


class Batch(NamedTuple):
  """A batch of dialogues; see `empdg_jax.data.pipeline.Batch`.

  Attributes:
    context: `[B, M]` int64, as all ids are.
    state: `[B, M]`.
    emotion_context: `[B, E]`.
    target: `[B, N]`.
    feedback: `[B, F]`.
    emotion: `[B]`.
    rows: The real positions of `target`, flat.
  """

  context: Tensor
  state: Tensor
  emotion_context: Tensor
  target: Tensor
  feedback: Tensor
  emotion: Tensor
  rows: Tensor


class Encoded(NamedTuple):
  """The encoded dialogues; see `empdg_jax.models.encoder_decoder.Encoding`."""

  semantic: Tensor
  emotional: Tensor
  emotion_logits: Tensor
  first_input: Tensor
  keys: Tensor
  values: Tensor
  mask: Tensor
  source: Tensor


def _positions(length: int, dim: int, device: torch.device) -> Tensor:
  half = dim // 2
  exponent = torch.arange(half, device=device) / max(half - 1, 1)
  angles = torch.arange(length, device=device)[:, None] * 1e4**-exponent
  return torch.cat([angles.sin(), angles.cos()], dim=-1)


def _dense(p: Params, name: str, x: Tensor) -> Tensor:
  return F.linear(x, p[f"{name}/kernel"].T, p.get(f"{name}/bias"))


def _norm(p: Params, name: str, x: Tensor) -> Tensor:
  scale, bias = p[f"{name}/scale"], p[f"{name}/bias"]
  return F.layer_norm(x.float(), scale.shape, scale, bias, 1e-6)


def _drop(x: Tensor, rate: float) -> Tensor:
  return F.dropout(x, rate) if rate else x


def _split(x: Tensor, heads: int) -> Tensor:
  return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _merge(x: Tensor) -> Tensor:
  return x.transpose(1, 2).flatten(2)


def _self_attention(
  p: Params, name: str, x: Tensor, heads: int, mask: Tensor | None
) -> Tensor:
  q, k, v = (
    _split(_dense(p, f"{name}/{part}", x), heads)
    for part in ("query", "key", "value")
  )
  mixed = F.scaled_dot_product_attention(
    q, k, v, attn_mask=mask, is_causal=mask is None
  )
  return _dense(p, f"{name}/output", _merge(mixed))


def _cross_attention(
  p: Params, name: str, x: Tensor, encoded: Encoded, heads: int
) -> tuple[Tensor, Tensor]:
  """Returns the outputs and the weights `[batch, length, memory_length]`."""
  q = _split(_dense(p, f"{name}/query", x), heads)
  scores = (q * q.shape[-1] ** -0.5) @ encoded.keys.transpose(2, 3)
  scores = scores.float().masked_fill(~encoded.mask[:, None, None], -1e9)
  weights = scores.softmax(-1)
  mixed = weights.to(encoded.values.dtype) @ encoded.values
  return _dense(p, f"{name}/output", _merge(mixed)), weights.mean(1)


def _windows(x: Tensor, width: int, left: int) -> Tensor:
  length = x.shape[1]
  x = F.pad(x, (0, 0, left, width - 1 - left))
  return torch.cat([x[:, i : i + length] for i in range(width)], dim=-1)


def _feed_forward(
  p: Params, name: str, x: Tensor, mask: Tensor | None
) -> Tensor:
  """Convolutions of width 3, causal without a mask."""
  left = 2 if mask is None else 1
  x = x if mask is None else x * mask[..., None]
  hidden = _dense(p, f"{name}/hidden", _windows(x, 3, left)).relu()
  hidden = hidden if mask is None else hidden * mask[..., None]
  return _dense(p, f"{name}/output", _windows(hidden, 3, left))


def _encoder(
  p: Params, name: str, x: Tensor, mask: Tensor, sizes: Sizes, rate: float
) -> Tensor:
  x = _drop(x + _positions(x.shape[1], x.shape[2], x.device), rate)
  layer = f"{name}/layer_0"
  y = _norm(p, f"{layer}/attention_residual/norm", x)
  attended = mask[:, None, None]
  y = _self_attention(p, f"{layer}/attention", y, sizes.num_heads, attended)
  x = x + _drop(y, rate)
  y = _norm(p, f"{layer}/feed_forward_residual/norm", x)
  x = x + _drop(_feed_forward(p, f"{layer}/feed_forward", y, mask), rate)
  return _norm(p, f"{name}/norm", x)


def _read(
  p: Params,
  batch: Batch,
  embedded: tuple[Tensor, ...],
  sizes: Sizes,
  rate: float,
) -> Encoded:
  words, states, emotion_words, label = embedded
  mask, emotion_mask = batch.context != PAD, batch.emotion_context != PAD
  semantic = _encoder(p, "semantic_encoder", words + states, mask, sizes, rate)
  emotional = _encoder(
    p, "emotion_encoder", emotion_words + label, emotion_mask, sizes, rate
  )
  logits = _dense(p, "emotion", torch.cat([emotional[:, 0], semantic[:, 0]], 1))
  memory = torch.cat([semantic, emotional], dim=1)
  cross = "decoder/layers_0/cross_attention"
  return Encoded(
    semantic[:, 0],
    emotional[:, 0],
    logits.float(),
    _dense(p, "emotion_embedding", logits).float(),
    _split(_dense(p, f"{cross}/key", memory), sizes.num_heads),
    _split(_dense(p, f"{cross}/value", memory), sizes.num_heads),
    torch.cat([mask, emotion_mask], dim=1),
    torch.cat([batch.context, batch.emotion_context], dim=1),
  )


def _embed(p: Params, *ids: Tensor) -> tuple[Tensor, ...]:
  """Embeds all ids in one look-up, whose gradient is one array."""
  table = p["embedding"]
  found = F.embedding(torch.cat(ids, dim=1), table) * table.shape[1] ** 0.5
  return found.split([i.shape[1] for i in ids], dim=1)


def _source(batch: Batch) -> tuple[Tensor, ...]:
  label = torch.full_like(batch.context[:, :1], LAB)
  return batch.context, batch.state, batch.emotion_context, label


class _VocabularyLogits(torch.autograd.Function):
  """What the loss needs of the logits, which one array holds.

  From hidden states `[n, d]`, the projection `[d, V]` and ids `[n, k]`: the
  log-probabilities of the ids `[n, k]`, and the sum of all words' `[n]`.
  """

  @staticmethod
  def forward(
    ctx: Any, hidden: Tensor, projection: Tensor, ids: Tensor
  ) -> tuple[Tensor, Tensor]:
    log_probs = F.log_softmax((hidden @ projection).float(), dim=-1)
    ctx.save_for_backward(hidden, projection, ids, log_probs)
    return log_probs.gather(1, ids), log_probs.sum(-1)

  @staticmethod
  def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
    at_ids, at_total = grads
    hidden, projection, ids, log_probs = ctx.saved_tensors
    weight = -(at_ids.sum(-1) + log_probs.shape[-1] * at_total)
    if torch.compiler.is_compiling():
      gradient = log_probs.exp() * weight[:, None] + at_total[:, None]
    else:  # In place: what only this pass reads needs no new memory.
      gradient = log_probs.exp_()
      torch.addcmul(at_total[:, None], gradient, weight[:, None], out=gradient)
    gradient = gradient.scatter_add(1, ids, at_ids)
    gradient = gradient.to(hidden.dtype)
    return gradient @ projection.T, hidden.T @ gradient, None


def _mix(generated: Tensor, log_copy: Tensor, copied: Tensor) -> Tensor:
  return torch.logaddexp(generated, log_copy + copied.clamp(min=1e-20).log())


def mle_loss(
  p: Params, batch: Batch, sizes: Sizes, dtype: torch.dtype, train: bool = True
) -> tuple[Tensor, Tensor]:
  """Returns the mean loss (eq. 15) and the summed likelihood of a batch."""
  rate = sizes.dropout_rate if train else 0.0
  *embedded, target = _embed(p, *_source(batch), batch.target[:, :-1])
  encoded = _read(p, batch, tuple(embedded), sizes, rate)
  x = torch.cat([encoded.first_input[:, None], target], dim=1)
  x = _drop(x + _positions(x.shape[1], x.shape[2], x.device), rate)
  layer = "decoder/layers_0"
  y = _norm(p, f"{layer}/self_residual/norm", x)
  y = _self_attention(p, f"{layer}/self_attention", y, sizes.num_heads, None)
  x = x + _drop(y, rate)
  y = _norm(p, f"{layer}/cross_residual/norm", x)
  y, attention = _cross_attention(
    p, f"{layer}/cross_attention", y, encoded, sizes.num_heads
  )
  x = x + _drop(y, rate)
  y = _norm(p, f"{layer}/feed_forward_residual/norm", x)
  x = x + _drop(_feed_forward(p, f"{layer}/feed_forward", y, None), rate)
  hidden = _norm(p, "decoder/norm", x)
  loss, nll = _token_losses(p, batch, sizes, dtype, hidden, attention, encoded)
  emotion = F.cross_entropy(encoded.emotion_logits, batch.emotion)
  return loss / len(batch.target) + emotion, nll


def _token_losses(
  p: Params,
  batch: Batch,
  sizes: Sizes,
  dtype: torch.dtype,
  hidden: Tensor,
  attention: Tensor,
  encoded: Encoded,
) -> tuple[Tensor, Tensor]:
  """Returns summed losses; see `empdg_jax.losses.token_losses`."""
  rows, source = batch.rows, encoded.source
  dialogue = rows // batch.target.shape[1]
  same = source[:, :, None] == source[:, None, :]
  first = ~same.tril(-1).any(-1)
  copied = (attention @ same.to(attention.dtype)).flatten(0, 1)[rows]
  # Padded positions need no product with the vocabulary.
  hidden = hidden.flatten(0, 1)[rows]
  targets = batch.target.flatten()[rows]
  words = source[dialogue]
  ids = torch.cat([targets[:, None], words], dim=1)
  with torch.autocast(hidden.device.type, enabled=False):
    at_ids, total = _VocabularyLogits.apply(
      hidden.to(dtype), p["vocab_projection"].to(dtype), ids
    )
  gate = _dense(p, "gate", hidden).float()
  log_gate, log_copy = F.logsigmoid(gate), F.logsigmoid(-gate)
  hits = words == targets[:, None]
  attended = attention.flatten(0, 1)[rows]
  to_target = (attended * hits).sum(-1)
  generated = at_ids + log_gate
  nll = -_mix(generated[:, 0], log_copy[:, 0], to_target).sum()
  gain = _mix(generated[:, 1:], log_copy, copied) - generated[:, 1:]
  vocab, s = p["vocab_projection"].shape[1], sizes.label_smoothing
  whole = (total + vocab * log_gate[:, 0]).sum() + (
    gain * first[dialogue]
  ).sum()
  return (1.0 - s) * nll - s / vocab * whole, nll


class Cache(NamedTuple):
  """The previous positions; see `empdg_jax.models.decoder.LayerCache`."""

  keys: Tensor
  values: Tensor
  inputs: Tensor
  hidden: Tensor


def _empty_cache(p: Params, rows: int, steps: int, sizes: Sizes) -> Cache:
  layer = "decoder/layers_0"
  depth = p[f"{layer}/self_attention/key/kernel"].shape[1]
  filters = p[f"{layer}/feed_forward/hidden/kernel"].shape[1]
  new = p["embedding"].new_zeros
  heads = sizes.num_heads
  return Cache(
    new(rows, heads, steps, depth // heads),
    new(rows, heads, steps, depth // heads),
    new(rows, 2, sizes.emb_dim),
    new(rows, 2, filters),
  )


def decode_step(
  p: Params,
  encoded: Encoded,
  x: Tensor,
  cache: Cache,
  index: Tensor,
  sizes: Sizes,
  dtype: torch.dtype,
) -> tuple[Tensor, Cache]:
  """Returns the next token's probabilities `[B, V]`, and the next cache."""
  layer, heads = "decoder/layers_0", sizes.num_heads
  steps = cache.keys.shape[2]
  position = _positions(steps, x.shape[1], x.device).index_select(0, index)
  x = x[:, None] + position
  y = _norm(p, f"{layer}/self_residual/norm", x)
  name = f"{layer}/self_attention"
  q, k, v = (
    _split(_dense(p, f"{name}/{part}", y), heads)
    for part in ("query", "key", "value")
  )
  keys = cache.keys.index_copy(2, index, k.float())
  values = cache.values.index_copy(2, index, v.float())
  seen = torch.arange(steps, device=x.device) <= index
  mixed = F.scaled_dot_product_attention(
    q.float(), keys, values, attn_mask=seen[None, None, None]
  )
  x = x + _dense(p, f"{name}/output", _merge(mixed))
  y = _norm(p, f"{layer}/cross_residual/norm", x)
  y, attention = _cross_attention(
    p, f"{layer}/cross_attention", y, encoded, heads
  )
  x = x + y
  y = _norm(p, f"{layer}/feed_forward_residual/norm", x)
  window = torch.cat([cache.inputs, y], dim=1)
  name = f"{layer}/feed_forward"
  hidden = _dense(p, f"{name}/hidden", window.flatten(1)[:, None]).relu()
  hidden = torch.cat([cache.hidden, hidden.float()], dim=1)
  x = x + _dense(p, f"{name}/output", hidden.flatten(1)[:, None])
  y = _norm(p, "decoder/norm", x)[:, 0]
  with torch.autocast(x.device.type, enabled=False):
    logits = (y.to(dtype) @ p["vocab_projection"].to(dtype)).float()
  gate = _dense(p, "gate", y).float().sigmoid()
  probs = gate * logits.softmax(-1)
  probs = probs.scatter_add(1, encoded.source, (1.0 - gate) * attention[:, 0])
  copies = (encoded.source == UNK).any(-1)
  probs[:, UNK] *= copies
  for token in range(1, SPECIAL_TOKENS):
    if token != EOS:
      probs[:, token] = 0.0
  return probs, Cache(keys, values, window[:, 1:], hidden[:, 1:])


def decode(
  p: Params,
  batch: Batch,
  sizes: Sizes,
  dtype: torch.dtype,
  steps: int,
  choose: Callable[[Tensor, int], Tensor],
  step: Callable[..., tuple[Tensor, Cache]],
) -> tuple[Tensor, Encoded]:
  """Returns responses `[B, steps]` and the encoded dialogues.

  Args:
    p: The generator's parameters.
    batch: The dialogues.
    sizes: The sizes.
    dtype: The type of products.
    steps: The most tokens of a response.
    choose: Takes a token of each row from probabilities `[B, V]` and the step.
    step: `decode_step`, compiled or not.
  """
  embedded = _embed(p, *_source(batch))
  encoded = _read(p, batch, embedded, sizes, 0.0)
  rows = len(batch.context)
  cache = _empty_cache(p, rows, steps, sizes)
  ended = torch.zeros(rows, dtype=torch.bool, device=batch.context.device)
  tokens = torch.full_like(batch.context[:, :1], PAD).repeat(1, steps)
  x = encoded.first_input
  indices = torch.arange(steps, device=tokens.device)
  for index in range(steps):
    probs, cache = step(
      p, encoded, x, cache, indices[index : index + 1], sizes, dtype
    )
    chosen = choose(probs, index).masked_fill(ended, PAD)
    tokens[:, index] = chosen
    ended = ended | (chosen == EOS)
    # On a GPU each look would wait for it.
    if ended.device.type == "cpu" and bool(ended.all()):
      break
    (x,) = _embed(p, chosen[:, None])
    x = x[:, 0]
  return tokens, encoded


def pick(features: Tensor, chosen: Tensor, most: int) -> tuple[Tensor, Tensor]:
  """See `empdg_jax.models.discriminators.pick`."""
  order = torch.sort((~chosen).byte(), dim=1, stable=True).indices[:, :most]
  features = features.gather(
    1, order[..., None].expand(-1, -1, features.shape[2])
  )
  position = torch.arange(order.shape[1], device=order.device)
  kept = position < chosen.sum(1, keepdim=True)
  return features * kept[..., None], kept | (position == 0)


def _pad_to(x: Tensor, length: int) -> Tensor:
  widths = (0, 0) * (x.ndim - 2) + (0, length - x.shape[1])
  return F.pad(x, widths)


@torch.compiler.disable
def _lstm(p: Params, name: str, words: Tensor) -> Tensor:
  """Returns the hidden states; one native call runs all steps."""
  inputs, bias = p[f"{name}/lstm/input/kernel"], p[f"{name}/lstm/input/bias"]
  weights = [
    inputs.T.contiguous(),
    p[f"{name}/lstm/recurrent"].T.contiguous(),
    bias,
    torch.zeros_like(bias),
  ]
  zeros = words.new_zeros(1, len(words), words.shape[-1])
  return torch.lstm(
    words, (zeros, zeros), weights, True, 1, 0.0, True, False, True
  )[0]


def _score(
  p: Params, name: str, hidden: Tensor, mask: Tensor, interaction: Tensor,
  sizes: Sizes,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:  # fmt: skip
  """Returns the scores and what `_slope` needs of them."""
  pooled, places = [], []
  for i, width in enumerate(sizes.kernel_widths):
    y = _dense(p, f"{name}/convolutions_{i}", _windows(hidden, width, 0))
    best = (y.float().relu() * mask[..., None]).max(dim=1)
    pooled.append(best.values)
    places.append(best.indices)
  f = torch.cat(pooled, dim=-1) + interaction
  return _dense(p, f"{name}/output", f.relu())[:, 0], pooled, places, f


def _slope(
  p: Params, name: str, hidden: Tensor, mask: Tensor, sizes: Sizes,
  pooled: list[Tensor], places: list[Tensor], f: Tensor,
) -> Tensor:  # fmt: skip
  """Returns the gradient of the scores with respect to `hidden`.

  The discriminator is piecewise linear, so that this is a product of its
  kernels along the largest features. Written out, it needs no second backward
  pass, and `torch.compile` takes it.
  """
  dim, length = hidden.shape[2], hidden.shape[1]
  at_f = p[f"{name}/output/kernel"][:, 0] * (f > 0)
  total = torch.zeros_like(hidden)
  filters = [x.shape[1] for x in pooled]
  for i, at_pooled in enumerate(at_f.split(filters, dim=1)):
    at_features = hidden.new_zeros(len(f), length, filters[i]).scatter(
      1, places[i][:, None], (at_pooled * (pooled[i] > 0))[:, None]
    )
    kernel = p[f"{name}/convolutions_{i}/kernel"]
    windows = (at_features @ kernel.T).float()
    for offset, part in enumerate(windows.split(dim, dim=2)):
      total = total + F.pad(part, (0, 0, offset, 0))[:, :length]
  return total * mask[..., None]


def critics_loss(
  p: Params,
  responses: tuple[Tensor, Tensor],
  encoded: Encoded,
  batch: Batch,
  is_emotional: Tensor,
  alphas: dict[str, Tensor],
  generator: Params,
  sizes: Sizes,
) -> tuple[Tensor, Tensor]:
  """Returns the discriminators' mean loss and mean gradient norm (eq. 19).

  Args:
    p: The discriminators' parameters.
    responses: The generated and the gold tokens, each `[B, length]`.
    encoded: The encoded dialogues.
    batch: The dialogues.
    is_emotional: Marks emotional words, `[V]`.
    alphas: The weights of the generated representations, by discriminator.
    generator: The generator's parameters.
    sizes: The sizes.
  """
  total = norms = torch.zeros((), device=batch.target.device)
  utterances = (*responses, batch.feedback)
  for name, alpha in alphas.items():
    with torch.no_grad():
      words, masks = [], []
      for tokens in utterances:
        mask = tokens != PAD
        embedded = _embed(generator, tokens)[0] * mask[..., None]
        if name == "emotional":
          chosen = is_emotional[tokens] & mask
          embedded, mask = pick(embedded, chosen, sizes.max_emotional_words)
        words.append(embedded)
        masks.append(mask)
    # One run over all utterances: its time depends on steps more than on rows.
    lengths = [m.shape[1] for m in masks]
    together = torch.cat([_pad_to(w, max(lengths)) for w in words])
    hidden = _lstm(p, name, together).float()
    generated, gold, feedback = hidden.chunk(3)
    length = max(lengths[:2])
    mask = [_pad_to(m, length) for m in masks[:2]]
    generated, gold = (
      h[:, :length] * m[..., None]
      for h, m in zip((generated, gold), mask, strict=True)
    )
    last = (masks[2].sum(1) - 1).clamp(min=0)
    interaction = feedback[torch.arange(len(last), device=last.device), last]
    context = encoded.semantic if name == "semantic" else encoded.emotional
    interaction = interaction + context.detach()
    weight = alpha[:, None, None]
    between = weight * generated + (1.0 - weight) * gold
    real = torch.cat([*mask, mask[0] | mask[1]])
    scores, pooled, places, f = _score(
      p, name, torch.cat([generated, gold, between]), real,
      interaction.repeat(3, 1), sizes,
    )  # fmt: skip
    rows = len(alpha)
    slope = _slope(
      p, name, between, mask[0] | mask[1], sizes,
      [x[2 * rows :] for x in pooled], [x[2 * rows :] for x in places],
      f[2 * rows :],
    )  # fmt: skip
    norm = (slope.square().sum((1, 2)) + 1e-20).sqrt()
    penalty = (norm - 1.0).square()
    loss = scores[:rows] - scores[rows : 2 * rows]
    total = total + (loss + sizes.penalty_weight * penalty).mean()
    norms = norms + norm.mean() / len(alphas)
  return total, norms


def learning_rate(update: int, dim: int, warmup: int, factor: float) -> float:
  """See `empdg_jax.training.train_state.learning_rate`."""
  n = update + 1.0
  return factor / math.sqrt(dim) * min(n**-0.5, n * warmup**-1.5)
