"""The generator in plain NumPy: eqs. 1-13 of the paper, in float64.

Written from the equations and apart from the model's code, a single example
at a time and without padding, so that agreement also shows that padding does
not matter. Vectors are rows.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from empdg_jax.config import ModelConfig

UNK, PAD, EOS, SOS, USR, SYS, CLS, LAB = range(8)
Params = dict[str, Any]


class Example(NamedTuple):
  """A dialogue as ids, none of them padding.

  Attributes:
    context: `CLS x1 .. xm`.
    state: The dialogue state of each context token.
    emotion_context: `LAB w1 .. we`.
    target: `y1 .. yn EOS`.
  """

  context: Sequence[int]
  state: Sequence[int]
  emotion_context: Sequence[int]
  target: Sequence[int]

  @property
  def source(self) -> list[int]:
    """The tokens that the decoder attends to."""
    return [*self.context, *self.emotion_context]


class Outputs(NamedTuple):
  """What the generator makes of an example.

  Attributes:
    emotion_logits: `ep` of eq. 7, `[32]`.
    logits: `Wo y` of eq. 13, `[N, V]`.
    gate: The probability of generating, `[N]`; ones without a pointer.
    attention: The last layer's, averaged over heads, `[N, M + E]`.
    probs: `p(yj | y<j, C)`, copies included, `[N, V]`.
  """

  emotion_logits: np.ndarray
  logits: np.ndarray
  gate: np.ndarray
  attention: np.ndarray
  probs: np.ndarray


def random_params(shapes: Params) -> Params:
  """Draws parameters none of which is at a neutral value such as 0 or 1.

  Args:
    shapes: Arrays, or what has their shapes, in nested dictionaries.

  Returns:
    Arrays of float32 in the same dictionaries.
  """
  rng = np.random.default_rng(7)

  def draw(name: str, node: Any) -> Any:
    if isinstance(node, dict):
      return {key: draw(key, child) for key, child in node.items()}
    deviation = np.sqrt(2.0 / sum(node.shape))
    values = rng.normal(float(name == "scale"), deviation, node.shape)
    return values.astype(np.float32)

  return draw("", shapes)


def in_float64(params: Params) -> Params:
  """Returns a model's parameters as the functions below take them."""
  return {
    name: in_float64(node)
    if isinstance(node, dict)
    else np.asarray(node, np.float64)
    for name, node in params.items()
  }


def pad(sequences: Sequence[Sequence[int]], length: int) -> np.ndarray:
  """Fills sequences up with PAD, `[len(sequences), length]`."""
  padded = [[*ids, *[PAD] * (length - len(ids))] for ids in sequences]
  return np.array(padded, np.int32)


def softmax(scores: np.ndarray) -> np.ndarray:
  """Returns the softmax of a vector."""
  weights = np.exp(scores - scores.max())
  return weights / weights.sum()


def positions(length: int, dim: int) -> np.ndarray:
  """Returns sinusoids: sines in the first half, cosines in the second."""
  half = dim // 2
  table = np.zeros((length, dim))
  for position in range(length):
    for i in range(half):
      angle = position / 10_000 ** (i / (half - 1))
      table[position, i] = np.sin(angle)
      table[position, half + i] = np.cos(angle)
  return table


def layer_norm(params: Params, x: np.ndarray) -> np.ndarray:
  """Normalises every vector to mean 0 and variance 1, then rescales it."""
  rows = []
  for row in x:
    centred = row - row.mean()
    rows.append(centred / np.sqrt((centred**2).mean() + 1e-6))
  return np.stack(rows) * params["scale"] + params["bias"]


def attention(
  params: Params, x: np.ndarray, memory: np.ndarray, heads: int, causal: bool
) -> tuple[np.ndarray, np.ndarray]:
  """Attends with every head in turn.

  Args:
    params: Kernels of query, key, value and output.
    x: What asks, `[length, d]`.
    memory: What is asked, `[memory_length, d]`.
    heads: How many heads share the depth.
    causal: Whether position i sees `memory[: i + 1]` only.

  Returns:
    `[length, d]`, and the weights averaged over heads.
  """
  queries = x @ params["query"]["kernel"]
  keys = memory @ params["key"]["kernel"]
  values = memory @ params["value"]["kernel"]
  depth = queries.shape[1] // heads
  mixed = np.zeros_like(queries)
  average = np.zeros((len(x), len(memory)))
  for head in range(heads):
    part = slice(head * depth, (head + 1) * depth)
    for i in range(len(x)):
      seen = i + 1 if causal else len(memory)
      weights = softmax(
        np.array([queries[i, part] @ k for k in keys[:seen, part]])
        / np.sqrt(depth)
      )
      mixed[i, part] = weights @ values[:seen, part]
      average[i, :seen] += weights / heads
  return mixed @ params["output"]["kernel"], average


def affine(
  params: Params, x: np.ndarray, kind: str, causal: bool
) -> np.ndarray:
  """Applies one layer of the feed-forward network to every position.

  Args:
    params: Kernel and bias.
    x: `[length, features]`.
    kind: `"dense"`, or `"conv"` for a convolution of width 3.
    causal: Whether the convolution ends at its position, not one later.

  Returns:
    `[length, new features]`.
  """
  if kind == "dense":
    return x @ params["kernel"] + params["bias"]
  taps = params["kernel"].reshape(3, x.shape[1], -1)
  y = np.tile(params["bias"], (len(x), 1))
  for i in range(len(x)):
    for tap in range(3):
      neighbour = i + tap - (2 if causal else 1)
      if 0 <= neighbour < len(x):
        y[i] += x[neighbour] @ taps[tap]
  return y


def feed_forward(
  params: Params, x: np.ndarray, kind: str, causal: bool
) -> np.ndarray:
  """Applies two layers with ReLU between them."""
  hidden = np.maximum(affine(params["hidden"], x, kind, causal), 0.0)
  return affine(params["output"], hidden, kind, causal)


def residual(
  params: Params,
  x: np.ndarray,
  order: str,
  sub_layer: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
  """Adds a sub-layer: `LayerNorm(x + f(x))`, or `x + f(LayerNorm(x))`."""
  if order == "post":
    return layer_norm(params["norm"], x + sub_layer(x))
  return x + sub_layer(layer_norm(params["norm"], x))


def encode(params: Params, config: ModelConfig, x: np.ndarray) -> np.ndarray:
  """Encodes embedded tokens `[length, d]` (eqs. 2-3 and 5-6)."""
  x = x + positions(*x.shape)
  for i in range(config.num_layers):
    layer = params[f"layer_{i}"]
    x = residual(
      layer["attention_residual"],
      x,
      config.norm_order,
      lambda y, p=layer["attention"]: attention(
        p, y, y, config.num_heads, causal=False
      )[0],
    )
    x = residual(
      layer["feed_forward_residual"],
      x,
      config.norm_order,
      lambda y, p=layer["feed_forward"]: feed_forward(
        p, y, config.feed_forward, causal=False
      ),
    )
  return layer_norm(params["norm"], x) if config.norm_order == "pre" else x


def decode(
  params: Params, config: ModelConfig, x: np.ndarray, memory: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Decodes embedded inputs (eqs. 10-12).

  Args:
    params: The decoder's.
    config: The generator's sizes and options.
    x: `[N, d]`.
    memory: `C = [Cu ; Ce]`, `[M + E, d]`.

  Returns:
    Outputs `[N, d]` and the last layer's attention to `C`, `[N, M + E]`.
  """
  x = x + positions(*x.shape)
  weights = np.zeros((len(x), len(memory)))
  for i in range(config.num_layers):
    layer = params[f"layers_{i}"]

    def cross(y: np.ndarray, p: Params = layer["cross_attention"]) -> Any:
      nonlocal weights
      y, weights = attention(p, y, memory, config.num_heads, causal=False)
      return y

    x = residual(
      layer["self_residual"],
      x,
      config.norm_order,
      lambda y, p=layer["self_attention"]: attention(
        p, y, y, config.num_heads, causal=True
      )[0],
    )
    x = residual(layer["cross_residual"], x, config.norm_order, cross)
    x = residual(
      layer["feed_forward_residual"],
      x,
      config.norm_order,
      lambda y, p=layer["feed_forward"]: feed_forward(
        p, y, config.feed_forward, causal=True
      ),
    )
  if config.norm_order == "pre":
    x = layer_norm(params["norm"], x)
  return x, weights


def generator(params: Params, config: ModelConfig, example: Example) -> Outputs:
  """Scores an example's target with teacher forcing (eqs. 1-13).

  Args:
    params: The generator's parameters, nested dictionaries of float64.
    config: Its sizes and options.
    example: The dialogue.

  Returns:
    Everything that the model computes for it.
  """
  embedding = params["embedding"]

  def embed(ids: Sequence[int]) -> np.ndarray:
    return embedding[np.array(ids, int)] * np.sqrt(config.emb_dim)

  semantic = encode(
    params["semantic_encoder"],
    config,
    embed(example.context) + embed(example.state),
  )
  emotional = encode(
    params["emotion_encoder"],
    config,
    embed(example.emotion_context) + embed([LAB]),
  )
  emotion_logits = (
    np.concatenate([emotional[0], semantic[0]]) @ params["emotion"]["kernel"]
  )
  linear = params["emotion_embedding"]
  signal = emotion_logits @ linear["kernel"] + linear["bias"]
  hidden, weights = decode(
    params["decoder"],
    config,
    np.concatenate([signal[None], embed(example.target[:-1])]),
    np.concatenate([semantic, emotional]),
  )
  if config.tie_embeddings:
    logits = hidden @ embedding.T
  else:
    logits = hidden @ params["vocab_projection"]
  gate = np.ones(len(hidden))
  if config.pointer_generator:
    scores = hidden @ params["gate"]["kernel"][:, 0] + params["gate"]["bias"]
    gate = 1.0 / (1.0 + np.exp(-scores))
  probs = mixture(logits, gate, weights, example.source)
  return Outputs(emotion_logits, logits, gate, weights, probs)


def mixture(
  logits: np.ndarray,
  gate: np.ndarray,
  weights: np.ndarray,
  source: Sequence[int],
) -> np.ndarray:
  """Returns `g softmax(logits) + (1 - g) copies`.

  Args:
    logits: `[N, V]`.
    gate: g, `[N]`.
    weights: Attention to the source, `[N, length]`.
    source: Its ids.

  Returns:
    Probabilities, `[N, V]`.
  """
  probs = np.stack(
    [g * softmax(row) for g, row in zip(gate, logits, strict=True)]
  )
  for i in range(len(probs)):
    for token, weight in zip(source, weights[i], strict=True):
      probs[i, token] += (1.0 - gate[i]) * weight
  return probs


def smoothed_losses(
  probs: np.ndarray, targets: Sequence[int], smoothing: float
) -> np.ndarray:
  """Returns the cross-entropy with `(1 - s) onehot + s / V`, `[N]`."""
  size = probs.shape[1]
  losses = []
  for row, target in zip(probs, targets, strict=True):
    wanted = np.full(size, smoothing / size)
    wanted[target] += 1.0 - smoothing
    losses.append(-np.sum(wanted * np.log(row)))
  return np.array(losses)
