"""The documentation's build: pages made from the package and the README.

Nothing here needs the network, and neither do the built pages.
"""

import dataclasses
import inspect
import pathlib
import pkgutil
import re
from collections.abc import Iterator
from typing import Any

from sphinx.application import Sphinx

import empdg_jax
from empdg_jax import commands, config

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Pages that are files of the repository. Links between them, which suit a
# reader of the repository, are turned into links between pages.
FILES = {
  "README.md": "guide",
  "launch/README.md": "launch",
  "CONTRIBUTING.md": "contributing",
  "CHANGELOG.md": "changelog",
}
# The titles of the pages of modules; "" stands for the top-level modules.
TITLES = {
  "": "Top-level modules",
  "data": "Data",
  "models": "Models",
  "training": "Training",
  "inference": "Inference",
  "analysis": "Analysis",
  "hardware": "Hardware",
  "web": "Pages for people",
  "parallel": "Parallelism",
}

project = "EmpDG-JAX"
author = "The EmpDG-JAX authors"
version = release = empdg_jax.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

myst_heading_anchors = 3  # README.md#quick-start, as repositories link.

# Docstrings write code in single backticks. As references these become links
# where they name something documented, and stay code where they do not.
default_role = "py:obj"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False  # The signature has the types.
autoclass_content = "both"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
maximum_signature_line_length = 80
# Several modules have a `Config` or a `Shape` in view; any of them will do.
suppress_warnings = ["ref.python"]

html_theme = "furo"
html_title = f"EmpDG-JAX {version}"
html_copy_source = False
html_show_sphinx = False


def _module_page(package: str) -> str:
  """Returns the page of one package: a section for each of its modules."""
  whole = f"empdg_jax.{package}".rstrip(".")
  lines = [
    f"# {TITLES[package]}",
    f"```{{eval-rst}}\n.. automodule:: {whole}\n```",
  ]
  for module in pkgutil.iter_modules([str(ROOT / whole.replace(".", "/"))]):
    if not module.ispkg:
      lines += [
        f"## {module.name}",
        f"```{{eval-rst}}\n.. automodule:: {whole}.{module.name}\n"
        "   :members:\n   :special-members: __call__\n```",
      ]
  return "\n\n".join(lines) + "\n"


def _file_page(path: pathlib.Path) -> str:
  """Returns a file of the repository with its links turned into pages'."""

  def page(match: re.Match[str]) -> str:
    text, link, anchor = match.groups()
    linked = (path.parent / link).resolve()
    if linked.is_dir():
      linked /= "README.md"
    name = FILES.get(linked.relative_to(ROOT).as_posix())
    # Other files of the repository are no part of the pages.
    return f"[{text}]({name}.md{anchor})" if name else text

  link = r"(?<!!)\[([^]]*)\]\((?!\w+:)([^)#]+)(#[^)]*|)\)"
  pages = re.sub(link, page, path.read_text())
  return pages.replace("](docs/images/", "](../images/")


def _write_pages(app: Sphinx) -> None:
  """Writes the pages that are made from the package and the repository."""
  folder = pathlib.Path(app.srcdir) / "generated"
  folder.mkdir(exist_ok=True)
  pages = {name: _file_page(ROOT / file) for file, name in FILES.items()}
  pages |= {name or "top_level": _module_page(name) for name in TITLES}
  for name, text in pages.items():
    path = folder / f"{name}.md"
    # A page that did not change is not built again.
    if not path.exists() or path.read_text() != text:
      path.write_text(text)


def _document(
  app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
  """Adapts docstrings that autodoc and napoleon would misread."""
  module = getattr(obj, "__module__", "")  # A constant has none.
  if dataclasses.is_dataclass(obj) and module == config.__name__:
    lines += ["", "Attributes:", *_fields(obj)]
  # An example of a command is shell, not text.
  if module == commands.__name__ and "Examples:" in lines:
    at = lines.index("Examples:") + 1
    shell = [f"  {line}" for line in lines[at:]]
    lines[at:] = ["  .. code-block:: sh", "", *shell]
  # The docstring of a tuple's constructor is added by Python.
  lines[:] = [li for li in lines if not li.startswith("Create new instance")]


def _fields(cls: type) -> Iterator[str]:
  """Yields a configuration's fields, explained by the comments above them."""
  comment = ""
  for line in inspect.getsource(cls).splitlines():
    text = line.strip()
    if text.startswith("#"):
      comment += text.removeprefix("#")
      continue
    if field := re.match(r"(\w+): .* = (.+)", text):
      yield f"  {field[1]}:{comment} Default: ``{field[2]}``."
    comment = ""


def _shorten(
  app: Sphinx, what: str, name: str, obj: Any, options: Any, *signature: Any
) -> tuple[str | None, str | None]:
  """Drops the arguments that Flax adds to every module."""
  arguments, returned = signature
  if what == "class" and arguments:
    arguments = re.sub(r", parent: .*", ")", arguments)
  return arguments, returned


def _skip(
  app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any
) -> bool | None:
  """Skips a tuple's fields, which its docstring lists."""
  return True if type(obj).__name__ == "_tuplegetter" else None


def setup(app: Sphinx) -> None:
  """Connects the functions above to the build."""
  app.connect("builder-inited", _write_pages)
  # Before napoleon, which turns sections such as Attributes into markup.
  app.connect("autodoc-process-docstring", _document, priority=400)
  app.connect("autodoc-process-signature", _shorten)
  app.connect("autodoc-skip-member", _skip)
