"""A picture of the attention of a response (the paper's Table 4)."""

import functools
import heapq
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from empdg_jax.analysis import pictures
from empdg_jax.data import pipeline, vocab
from empdg_jax.data.pipeline import EncodedExample
from empdg_jax.inference.respond import Responder
from empdg_jax.inference.system import Response, System
from empdg_jax.models.encoder_decoder import EncoderDecoder, Inputs

_EMOTIONS_SHOWN = 8
_EMOTIONAL = "#b2182b"  # The colour of emotional words.
_CELL = 0.28  # Inches.


class Attended(NamedTuple):
  """A response and its attention to the contexts.

  Attributes:
    semantic: The tokens of the dialogue context, CLS first.
    emotional: The tokens of the emotional context, LAB first; none if the
      system does not read it.
    response: The tokens of the response, EOS last unless it was cut off.
    weights: The attention of the decoder's last layer, averaged over heads,
      `[response, semantic + emotional]`.
    emotions: The probability of every emotion label, or None.
  """

  semantic: tuple[str, ...]
  emotional: tuple[str, ...]
  response: tuple[str, ...]
  weights: np.ndarray
  emotions: dict[str, float] | None


def attention_step(
  params: Any, inputs: Inputs, target: jax.Array, *, model: EncoderDecoder
) -> jax.Array:
  """Returns the attention of targets to their contexts (eq. 11), `[B, N, M]`.

  Args:
    params: The model's parameters.
    inputs: The contexts.
    target: The responses' ids, `[B, N]`.
    model: The system.
  """
  outputs: Any = model.apply({"params": params}, inputs, target)
  return outputs.attention


class Attender:
  """The attention of one system's responses, compiled at the first of them."""

  def __init__(self, system: System) -> None:
    """Compiles nothing yet.

    Args:
      system: The system that responds.
    """
    self._system = system
    self._step = jax.jit(functools.partial(attention_step, model=system.model))

  def attend(
    self,
    encoded: EncodedExample,
    response: Response,
    emotion: int = -1,
    limit: int | None = None,
  ) -> Attended:
    """Computes a response's attention with teacher forcing.

    Args:
      encoded: The dialogue.
      response: The system's response to it.
      emotion: The emotion that the response was to respond to, -1 for the one
        perceived.
      limit: The most tokens of the response; None for the configuration's.

    Returns:
      The response with its attention (eq. 11).
    """
    system = self._system
    longest = system.config.eval.max_decode_steps
    tokens = list(response.tokens)
    # A response of the full length was cut off before its EOS.
    if len(tokens) < min(longest, limit or longest):
      tokens.append("EOS")
    # Decoding keeps no attention, hence a second pass. It must read the same
    # tokens: a copied word outside the vocabulary was fed back as UNK.
    known = system.vocabulary.ids
    token_ids = [known.get(token, vocab.UNK) for token in tokens]
    shape = system.shapes[-1]._replace(target=longest, feedback=1)
    example = encoded._replace(target=token_ids, feedback=[])
    batch = pipeline.collate([example], np.arange(1), shape, 1)
    inputs = Inputs(batch.context, batch.state, batch.emotion_context)
    if emotion >= 0:
      inputs = inputs._replace(emotion=jnp.array([emotion]))
    (weights,) = np.asarray(self._step(system.params, inputs, batch.target))
    semantic = ("CLS", *encoded.words)
    emotional = ("LAB", *encoded.emotion_words)
    # Without columns for them, the decoder attends to no emotional words.
    if weights.shape[1] == shape.context:
      emotional = ()
    columns = [
      *range(len(semantic)),
      *range(shape.context, shape.context + len(emotional)),
    ]
    emotions = response.emotions
    if emotions is not None:
      emotions = dict(zip(system.emotions, emotions.tolist(), strict=True))
    weights = weights[: len(tokens), columns]
    return Attended(semantic, emotional, tuple(tokens), weights, emotions)


def attend(responder: Responder, context: Sequence[str]) -> Attended:
  """Responds, then computes the response's attention.

  Args:
    responder: The system that responds.
    context: The turns, the user's last.

  Returns:
    The response with its attention (eq. 11).

  Raises:
    InputError: The system cannot respond to the context.
  """
  encoded = responder.encode(context)
  (response,) = responder.respond_encoded([encoded])
  return Attender(responder.system).attend(encoded, response)


def draw(attended: Attended, stem: pathlib.Path) -> list[pathlib.Path]:
  """Draws the attention beside the predicted emotion.

  Args:
    attended: The response and its attention.
    stem: The path of the pictures without `.png` and `.svg`.

  Returns:
    The two paths.

  Raises:
    InputError: The pictures cannot be written.
  """
  return pictures.save(_figure(attended), stem)


def _figure(attended: Attended) -> Figure:
  semantic, emotional, response, weights, emotions = attended
  maps = [("dialogue context", semantic, weights[:, : len(semantic)])]
  if emotional:
    maps.append(("emotional context", emotional, weights[:, len(semantic) :]))
  widths = [_CELL * len(words) for _, words, _ in maps]
  if emotions is not None:
    widths.append(2.0)
  size = sum(widths) + 2.5, _CELL * len(response) + 2.2
  figure = Figure(figsize=size, layout="constrained")
  (panels,) = figure.subplots(
    1, len(widths), width_ratios=widths, squeeze=False
  )
  for panel, (title, words, of_words) in zip(panels, maps, strict=False):
    # One scale for both contexts: the decoder attends to them together.
    panel.imshow(
      of_words, vmin=0.0, vmax=weights.max(), cmap="Blues", aspect="auto"
    )
    panel.set_title(title, fontsize="medium")
    panel.set_xticks(range(len(words)), words, rotation=90)
    panel.set_yticks([])
    for label, word in zip(panel.get_xticklabels(), words, strict=True):
      if word in emotional[1:]:
        label.set(color=_EMOTIONAL, fontweight="bold")
  panels[0].set_yticks(range(len(response)), response)
  panels[0].set_ylabel("response")
  figure.colorbar(
    panels[0].images[0], ax=panels[: len(maps)], label="attention", pad=0.01
  )
  if emotions is not None:
    _draw_emotions(panels[-1], emotions)
  return figure


def _draw_emotions(panel: Axes, emotions: dict[str, float]) -> None:
  """Draws the likeliest emotions as bars, the likeliest on top."""
  likeliest = heapq.nlargest(
    _EMOTIONS_SHOWN, emotions, key=emotions.__getitem__
  )
  bars = panel.barh(likeliest, [emotions[label] for label in likeliest])
  panel.bar_label(bars, fmt="{:.0%}", padding=2, fontsize="small")
  panel.invert_yaxis()
  # Room for the percentages to the right of the bars.
  panel.set_xlim(0.0, 1.2 * max(emotions.values()))
  panel.set_xticks([])
  panel.set_title("perceived emotion", fontsize="medium")
  panel.spines[["top", "right", "bottom"]].set_visible(False)
