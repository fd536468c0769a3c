"""A picture of what each word of a reply attends to (the paper's Table 4)."""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from empdg_jax import parallel, storage
from empdg_jax.config import InputError
from empdg_jax.data import vocab
from empdg_jax.inference.respond import Responder
from empdg_jax.models import registry
from empdg_jax.models.encoder_decoder import Inputs

_EMOTIONS_SHOWN = 8
_EMOTIONAL = "#b2182b"  # The colour of emotional words.
_CELL = 0.28  # Inches.


class Attended(NamedTuple):
  """A reply and where its words looked.

  Attributes:
    semantic: The dialogue context's tokens, CLS first.
    emotional: The emotional context's tokens, LAB first; none if the system
      does not read it.
    reply: The reply's tokens, EOS last unless the reply was cut off.
    weights: Of the decoder's last layer, the mean of its heads, over both
      contexts; a row for each token of the reply.
    emotions: The probability of every emotion by its label, or None.
  """

  semantic: tuple[str, ...]
  emotional: tuple[str, ...]
  reply: tuple[str, ...]
  weights: np.ndarray
  emotions: dict[str, float] | None


def attend(responder: Responder, context: Sequence[str]) -> Attended:
  """Replies, then reads the reply with teacher forcing for its attention.

  Args:
    responder: Who replies.
    context: The turns, the user's last.

  Returns:
    The reply with its attention (eq. 11).

  Raises:
    InputError: The context cannot be answered.
  """
  system = responder.system
  encoded = responder.encode(context)
  (response,) = responder.respond_encoded([encoded])
  reply = list(response.tokens)
  if len(reply) < system.config.eval.max_decode_steps:
    reply.append("EOS")
  # A copied word that is not in the vocabulary was fed back as UNK.
  ids = [system.vocabulary.ids.get(token, vocab.UNK) for token in reply]
  model = registry.create_model(
    system.config.model, len(system.vocabulary), len(system.emotions)
  )
  outputs: Any = model.apply(
    {"params": parallel.unreplicate(system.params)},
    Inputs(
      jnp.array([encoded.context]),
      jnp.array([encoded.state]),
      jnp.array([encoded.emotion_context]),
    ),
    jnp.array([ids]),
  )
  weights = np.asarray(outputs.attention[0])
  semantic = ("CLS", *encoded.words)
  emotional = ("LAB", *encoded.emotion_words)
  if weights.shape[1] == len(semantic):
    emotional = ()
  emotions = None
  if response.emotions is not None:
    emotions = dict(
      zip(system.emotions, response.emotions.tolist(), strict=True)
    )
  return Attended(semantic, emotional, tuple(reply), weights, emotions)


def draw(attended: Attended, stem: pathlib.Path) -> list[pathlib.Path]:
  """Draws the attention beside the perceived emotion.

  Args:
    attended: The reply.
    stem: The pictures' path without `.png` and `.svg`.

  Returns:
    Both paths.

  Raises:
    InputError: They cannot be written.
  """
  figure = _figure(attended)
  paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
  with storage.errors(f"--image={stem}: cannot write", InputError):
    stem.parent.mkdir(parents=True, exist_ok=True)
    for path in paths:
      with storage.atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=150)
  return paths


def _figure(attended: Attended) -> Figure:
  semantic, emotional, reply, weights, emotions = attended
  widths = [_CELL * len(semantic)]
  if emotional:
    widths.append(_CELL * len(emotional))
  if emotions is not None:
    widths.append(2.0)
  size = sum(widths) + 2.5, _CELL * len(reply) + 2.2
  figure = Figure(figsize=size, layout="constrained")
  (panels,) = figure.subplots(
    1, len(widths), width_ratios=widths, squeeze=False
  )
  images = []
  maps = [("dialogue context", semantic, weights[:, : len(semantic)])]
  if emotional:
    maps.append(("emotional context", emotional, weights[:, len(semantic) :]))
  for panel, (title, words, of_words) in zip(panels, maps, strict=False):
    images.append(
      panel.imshow(
        of_words, vmin=0.0, vmax=weights.max(), cmap="Blues", aspect="auto"
      )
    )
    panel.set_title(title, fontsize="medium")
    panel.set_xticks(range(len(words)), words, rotation=90)
    panel.set_yticks([])
    for label, word in zip(panel.get_xticklabels(), words, strict=True):
      if word in attended.emotional[1:]:
        label.set(color=_EMOTIONAL, fontweight="bold")
  panels[0].set_yticks(range(len(reply)), reply)
  panels[0].set_ylabel("reply")
  figure.colorbar(
    images[0], ax=list(panels[: len(maps)]), label="attention", pad=0.01
  )
  if emotions is not None:
    _draw_emotions(panels[-1], emotions)
  return figure


def _draw_emotions(panel: Axes, emotions: dict[str, float]) -> None:
  """Draws the likeliest emotions as bars, the likeliest on top."""
  likeliest = sorted(emotions, key=lambda label: -emotions[label])
  likeliest = likeliest[:_EMOTIONS_SHOWN]
  bars = panel.barh(likeliest, [emotions[label] for label in likeliest])
  panel.bar_label(bars, fmt="{:.0%}", padding=2, fontsize="small")
  panel.invert_yaxis()
  panel.set_xlim(0.0, 1.2 * max(emotions.values()))
  panel.set_xticks([])
  panel.set_title("perceived emotion", fontsize="medium")
  panel.spines[["top", "right", "bottom"]].set_visible(False)
