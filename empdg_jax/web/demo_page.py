"""The demo's page in Gradio: its looks, and what its buttons do."""

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import gradio as gr

from empdg_jax.config import InputError
from empdg_jax.data import sample_corpus
from empdg_jax.web import demo_html
from empdg_jax.web.demo import AS_PERCEIVED, MOST_CHARACTERS, Demo, Dialogue
from empdg_jax.web.demo_replies import DECODINGS, Settings

_EXAMPLES = 6
# The fonts of the person's own system: the page loads nothing from elsewhere.
_FONTS = ("system-ui", "sans-serif")
_MONO_FONTS = ("ui-monospace", "monospace")
_NOTICE = (
  "**A research model.** It imitates empathy, understands nothing and may say "
  "something wrong or hurtful. It is no help in an emergency: if you or others "
  "are in danger, call your local emergency number or someone you trust."
)


def situations() -> list[str]:
  """Returns first turns of the embedded corpus, each of another emotion."""
  dialogues = sample_corpus.dialogues()["test"]
  first = {dialogue.emotion: dialogue.utterances[0] for dialogue in dialogues}
  return list(first.values())[:: max(1, len(first) // _EXAMPLES)][:_EXAMPLES]


class _Page(NamedTuple):
  """The parts of the page that change."""

  dialogue: Any
  panels: list[Any]
  said: Any
  error: Any
  turn: Any
  attention: Any
  settings: list[Any]


def _show(demo: Demo, dialogue: Dialogue, said: str, error: str = "") -> list:
  """Returns what to put into each part of the page, settings left alone."""
  turns = len(dialogue.turns)
  numbers = [str(number) for number in range(1, turns + 1)]
  return [
    dialogue,
    *demo.panels(dialogue),
    said,
    demo_html.error(error),
    gr.update(choices=numbers, value=numbers[-1] if numbers else None),
    "",
  ]


def _handlers(demo: Demo) -> dict[str, Callable[..., Awaitable[Any]]]:
  """Returns the functions behind the page's buttons, by the buttons' names."""

  # A page that outlives a restart of the server brings no dialogue.
  async def send(kept: Dialogue | None, said: str, *controls: Any) -> list:
    dialogue = kept or demo.new_dialogue()
    try:
      settings = demo.settings(*controls)
      return _show(demo, await demo.say(dialogue, said, settings), "")
    except InputError as error:
      return _show(demo, dialogue, said, str(error))

  async def open_page() -> list:
    return _show(demo, demo.new_dialogue(), "")

  async def undo(kept: Dialogue | None, said: str) -> list:
    dialogue = kept or demo.new_dialogue()
    # Its words come back, to be changed and said again.
    if dialogue.turns:
      said = dialogue.turns[-1].said
    shorter = dataclasses.replace(dialogue, turns=dialogue.turns[:-1])
    return _show(demo, shorter, said)

  async def name(kept: Dialogue | None, said: str) -> list:
    dialogue = kept or demo.new_dialogue()
    return _show(demo, dataclasses.replace(dialogue, named=True), said)

  async def attend(kept: Dialogue | None, turn: str | None) -> str:
    dialogue = kept or demo.new_dialogue()
    try:
      number = int(turn) if turn and turn.isdecimal() else 0
      return await asyncio.to_thread(demo.attention, dialogue, number)
    except InputError as error:
      return demo_html.error(str(error))

  return {
    "open": open_page, "send": send, "undo": undo, "new": open_page,
    "name": name, "show": attend,
  }  # fmt: skip


def _controls(demo: Demo) -> list[Any]:
  """Puts the controls of `Demo.settings` on the page."""
  systems = [responder.system for responder in demo.replies.responders]
  longest = max(system.config.eval.max_decode_steps for system in systems)
  default = Settings()
  with gr.Accordion("How to reply", open=False):
    with gr.Row():
      decoding = gr.Radio(
        list(DECODINGS), value=default.decoding, label="Decoding"
      )
      emotion = gr.Dropdown(
        [AS_PERCEIVED, *demo.labels],
        value=AS_PERCEIVED,
        label="Emotion to respond to",
      )
      length = gr.Slider(
        1, longest, longest, step=1, label="Maximum length in tokens"
      )
    with gr.Row():
      temperature = gr.Slider(
        0.1, 2.0, default.temperature, step=0.1, label="Sampling: temperature"
      )
      top_p = gr.Slider(
        0.05, 1.0, default.top_p, step=0.05, label="Sampling: top-p"
      )
      seed = gr.Number(default.seed, label="Sampling: seed", precision=0)
  return [decoding, temperature, top_p, seed, length, emotion]


def _lay_out(demo: Demo) -> tuple[_Page, dict[str, Any]]:
  """Puts everything on the page; returns its parts, and its buttons by name."""
  several = len(demo.titles) > 1
  gr.Markdown("# Talk with EmpDG-JAX\n" + _NOTICE)
  dialogue = gr.State()
  with gr.Row(equal_height=True):
    panels = [
      gr.HTML(elem_id=f"system-{column}") for column in range(len(demo.titles))
    ]
  error = gr.HTML(elem_id="error")
  with gr.Row(equal_height=True):
    said = gr.Textbox(
      label="You",
      placeholder="Write what happened to you, then press Enter",
      max_length=MOST_CHARACTERS,
      lines=1,
      scale=6,
      autofocus=True,
      elem_id="said",
    )
    send = gr.Button("Send", variant="primary", scale=1)
  with gr.Row():
    buttons = {
      "send": send,
      "undo": gr.Button("Undo last turn"),
      "new": gr.Button("New dialogue"),
      "name": gr.Button("Show the systems' names", visible=several),
    }
  gr.Examples(
    [[one] for one in situations()], said, label="Situations to start from"
  )
  settings = _controls(demo)
  with gr.Accordion("Attention: what each word looked at", open=False):
    with gr.Row(equal_height=True):
      turn = gr.Dropdown([], label="Turn", scale=1)
      buttons["show"] = gr.Button("Show attention", scale=2)
    attention = gr.HTML(elem_id="attention")
  page = _Page(dialogue, panels, said, error, turn, attention, settings)
  return page, buttons


def build_page(demo: Demo) -> Any:
  """Returns the page as Gradio's blocks."""
  with gr.Blocks(title="EmpDG-JAX", analytics_enabled=False) as blocks:
    page, buttons = _lay_out(demo)
    functions = _handlers(demo)
    whole = [
      page.dialogue, *page.panels, page.said, page.error, page.turn,
      page.attention,
    ]  # fmt: skip
    inputs = {name: [page.dialogue, page.said] for name in functions}
    inputs["new"] = []
    inputs["send"] = [page.dialogue, page.said, *page.settings]
    inputs["show"] = [page.dialogue, page.turn]
    for name, button in buttons.items():
      triggers = [button.click]
      if name == "send":
        triggers.append(page.said.submit)
      gr.on(
        triggers,
        functions[name],
        inputs[name],
        [page.attention] if name == "show" else whole,
        # People do not wait for each other; `Replies` batches them.
        concurrency_limit=None,
        show_progress="hidden",
        api_visibility="private",
      )
    blocks.load(
      functions["open"],
      None,
      whole,
      show_progress="hidden",
      api_visibility="private",
    )
  return blocks


def mount(app: Any, demo: Demo) -> None:
  """Puts the page at the root of a FastAPI application."""
  gr.mount_gradio_app(
    app,
    build_page(demo),
    path="/",
    footer_links=[],
    run_history=False,  # It would keep dialogues in the browser.
    enable_monitoring=False,
    ssr_mode=False,
    pwa=False,
    mcp_server=False,
    show_error=False,
    theme=gr.themes.Default(font=_FONTS, font_mono=_MONO_FONTS),
    css=demo_html.STYLE,
  )
