"""The demo's HTML: dialogues, perceived emotions and attention, all escaped."""

import heapq
import html
from collections.abc import Sequence

from empdg_jax.analysis.attention import Attended
from empdg_jax.config import printable
from empdg_jax.data import text
from empdg_jax.data.examples import Utterance
from empdg_jax.web.demo_replies import PERCEIVED, Reply

_EMOTIONS_SHOWN = 5
STYLE = """
.empdg-dialogue {min-height: 9rem; max-height: 32rem; overflow-y: auto}
.empdg-dialogue p {margin: 0.1rem 0}
.empdg-dialogue .empdg-said, .empdg-reply {
  border-radius: var(--radius-lg); margin: 0.5rem 0; overflow-wrap: anywhere;
  padding: 0.5rem 0.75rem; width: fit-content; max-width: 92%}
.empdg-dialogue .empdg-said {background: var(--color-accent-soft);
  margin-left: auto}
.empdg-reply {background: var(--background-fill-secondary);
  border: 1px solid var(--border-color-primary); min-width: 60%}
.empdg-text {font-weight: 600}
.empdg-dialogue mark {background: none; color: #b2182b; font-weight: 700}
.dark .empdg-dialogue mark {color: #f4a582}
.empdg-about, .empdg-dialogue summary, .empdg-bar {
  opacity: 0.85; font-size: 0.8rem}
.empdg-bar {display: grid; grid-template-columns: 7rem 1fr 3rem; gap: 0.5rem;
  align-items: center}
.empdg-bar meter {width: 100%; height: 0.8rem}
.empdg-attention {overflow-x: auto}
.empdg-attention table {border-collapse: collapse; font-size: 0.75rem}
.empdg-attention caption {text-align: left; font-weight: 600}
.empdg-attention thead th {writing-mode: vertical-rl; font-weight: 400;
  transform: rotate(180deg); padding: 0.2rem 0; text-align: left}
.empdg-attention tbody th {font-weight: 400; text-align: right;
  padding-right: 0.4rem}
.empdg-attention .emotional {color: #b2182b; font-weight: 700}
.dark .empdg-attention .emotional {color: #f4a582}
.empdg-attention th, .empdg-attention thead td {border: none}
.empdg-attention tbody td {width: 1.3rem; min-width: 1.3rem; height: 1.3rem;
  border: 1px solid var(--border-color-primary)}
.empdg-attention .gap {border: none; min-width: 0.8rem}
.empdg-error {color: #b2182b; font-weight: 600}
"""


def escape(said: str) -> str:
  """Returns HTML that shows a text of people or models as it is.

  >>> escape("<script>")
  '&lt;script&gt;'
  """
  return html.escape(printable(said))


def _marked(utterance: Utterance) -> str:
  """Returns a turn as a system reads it, its emotional words marked."""
  tokens = [
    # Not quotes, which the joining below looks for; none is in an attribute.
    html.escape(printable(token), quote=False)
    for token in utterance.tokens
  ]
  return text.join_tokens(
    [
      f"<mark>{token}</mark>" if emotional else token
      for token, emotional in zip(tokens, utterance.emotional, strict=True)
    ]
  )


def _bars(emotions: dict[str, float]) -> str:
  """Returns the likeliest emotions as bars, the others folded."""
  ranked = heapq.nlargest(len(emotions), emotions, key=emotions.__getitem__)
  bars = [
    f'<div class="empdg-bar"><span>{escape(label)}</span>'
    f'<meter min="0" max="1" value="{emotions[label]:.4f}"'
    f' aria-label="{escape(label)}"></meter>'
    f"<span>{emotions[label]:.0%}</span></div>"
    for label in ranked
  ]
  shown = "".join(bars[:_EMOTIONS_SHOWN])
  if folded := bars[_EMOTIONS_SHOWN:]:
    shown += (
      f"<details><summary>{len(folded)} other emotions</summary>"
      f"{''.join(folded)}</details>"
    )
  return shown


def _reply(reply: Reply, labels: Sequence[str]) -> str:
  """Returns one reply with its emotions, how it was made, and its latency."""
  settings, emotions = reply.settings, reply.response.emotions
  about = [f"{reply.seconds:.2f} s", settings.decoding]
  felt = ""
  if emotions is not None:
    felt = _bars(dict(zip(labels, emotions.tolist(), strict=True)))
    if settings.emotion != PERCEIVED:
      about.append(f"emotion set to {labels[settings.emotion]}")
  if reply.response.cut:
    about.append(f"{reply.response.cut} oldest words not read")
  said = escape(reply.response.text) or "<em>(says nothing)</em>"
  return (
    f'<div class="empdg-reply"><p class="empdg-text">{said}</p>{felt}'
    f'<p class="empdg-about">{escape(" · ".join(about))}</p></div>'
  )


def dialogue(
  name: str,
  said: Sequence[Utterance],
  replies: Sequence[Reply],
  labels: Sequence[str],
) -> str:
  """Returns a dialogue with one system.

  Args:
    name: The name to show the system by.
    said: The person's turns.
    replies: The system's replies to them.
    labels: The emotion labels.
  """
  turns = [
    f'<p class="empdg-said">{_marked(one)}</p>{_reply(reply, labels)}'
    for one, reply in zip(said, replies, strict=True)
  ]
  shown = "".join(turns) or '<p class="empdg-about">Nothing said yet.</p>'
  return (
    f'<h3>{escape(name)}</h3><div class="empdg-dialogue" role="log"'
    f' aria-label="{escape(name)}">{shown}</div>'
  )


def attention(name: str, attended: Attended) -> str:
  """Returns the attention of a reply as a table, a row for each of its words.

  Args:
    name: The name to show the system by.
    attended: The reply's attention.
  """
  semantic, emotional, response, weights, _ = attended
  largest = float(weights.max()) or 1.0
  border = len(semantic)

  def head(column: int, word: str) -> str:
    felt = column >= border or word in emotional[1:]
    kind = ' class="emotional"' if felt and word != "LAB" else ""
    return f'<th scope="col"{kind}>{escape(word)}</th>'

  def cell(column: int, word: str, weight: float) -> str:
    # One scale for both contexts: the decoder attends to them together.
    return (
      f'<td title="{escape(word)}: {weight:.0%}" style="background:'
      f' rgba(33, 102, 172, {weight / largest:.2f})"></td>'
    )

  words = (*semantic, *emotional)
  columns = list(enumerate(words))
  gap_head = '<th class="gap"></th>' if emotional else ""
  gap = '<td class="gap"></td>' if emotional else ""
  heads = [head(column, word) for column, word in columns]
  rows = []
  for word, row in zip(response, weights.tolist(), strict=True):
    cells = [cell(column, words[column], w) for column, w in enumerate(row)]
    rows.append(
      f'<tr><th scope="row">{escape(word)}</th>'
      + "".join([*cells[:border], gap, *cells[border:]])
      + "</tr>"
    )
  return (
    f'<div class="empdg-attention"><table><caption>{escape(name)}</caption>'
    f"<thead><tr><td></td>{''.join([*heads[:border], gap_head])}"
    f"{''.join(heads[border:])}</tr></thead>"
    f"<tbody>{''.join(rows)}</tbody></table></div>"
  )


def error(message: str) -> str:
  """Returns a message for a mistake, "" for none."""
  if not message:
    return ""
  return f'<p class="empdg-error" role="alert">{escape(message)}</p>'
