"""Items, instructions and consent of a study as HTML for annotators."""

import html
from collections.abc import Mapping
from typing import Any

from empdg_jax.config import printable
from empdg_jax.web import study

CONSENT = (
  "I am at least 18 years old and take part of my own free will. I can stop at "
  "any time by closing the page. My answers, the time they took and a random "
  "code are kept for research; my name is not asked for."
)
_QUESTION = (
  "Which reply would you rather get? Choose a tie only if you cannot tell."
)
# A dialogue of our own, with replies of plainly different quality.
_EXAMPLE = (
  "<h4>A worked example</h4><p><b>Speaker:</b> I finally passed my driving "
  "test today!</p>"
)
_EXAMPLES = {
  "rating": (
    "<p><b>Reply:</b> Congratulations! You must be so relieved.</p>"
    "<p>Empathy 5, relevance 5, fluency 5: it shares the joy, is about the "
    "test and reads well.</p><p><b>Reply:</b> I am sorry to hear hear that.</p>"
    "<p>Empathy 1, relevance 2, fluency 3: it misses the feeling, hardly fits "
    "and repeats a word.</p>"
  ),
  "pairwise": (
    "<p><b>Left reply:</b> I am sorry to hear that.</p><p><b>Right reply:</b> "
    "Congratulations! You must be so relieved.</p><p>Right: it shares the joy; "
    "the left reply misses it.</p>"
  ),
}


def escape(said: str) -> str:
  """Returns a text as HTML in which nothing is markup.

  >>> escape("<b> & 'c'")
  '&lt;b&gt; &amp; &#x27;c&#x27;'
  """
  return html.escape(printable(said).replace("\n", " "))


def item(shown: Mapping[str, Any]) -> str:
  """Returns an item's conversation and its replies as HTML."""
  turns = [
    f"<p><b>{'Listener' if number % 2 else 'Speaker'}:</b> {escape(turn)}</p>"
    for number, turn in enumerate(shown["context"])
  ]
  replies = [
    f"<blockquote><p><b>{title}:</b> {escape(shown[name])}</p></blockquote>"
    for name, title in (
      ("reply", "Reply"),
      ("left", "Left reply"),
      ("right", "Right reply"),
    )
    if name in shown
  ]
  return "".join(turns + replies)


def question(part: str) -> str:
  """Returns what annotators are asked, in one sentence."""
  if part == "pairwise":
    return _QUESTION
  return "Rate the reply, not the conversation."


def anchored(point: int) -> str:
  """Returns a point of the scale with its anchor.

  >>> anchored(3), anchored(4)
  ('3 moderate', '4')
  """
  return f"{point} {study.ANCHORS.get(point, '')}".strip()


def instructions(part: str) -> str:
  """Returns the instructions of a part, with a worked example, as HTML."""
  asked = "".join(
    f"<li><b>{name.title()}:</b> {what}</li>"
    for name, what in study.METRICS.items()
  )
  keys = "the keys 1, 2 and 3"
  scale = ""
  if part == "rating":
    scale = (
      "<p>Rate each on a scale of 1 to 5: 1 is unacceptable, 3 moderate and 5 "
      "excellent.</p>"
    )
    keys = "1-5 for empathy, q w e r t for relevance and a s d f g for fluency"
  return (
    "<p>You will read conversations in which a speaker describes something "
    f"emotional, and replies of a listener. {question(part)} Consider:</p>"
    f"<ul>{asked}</ul>{scale}<p>On a keyboard, use {keys}; the right arrow "
    f"goes on. Your answers are kept as you give them.</p>{_EXAMPLE}"
    f"{_EXAMPLES[part]}"
  )
