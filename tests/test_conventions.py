"""Conventions of the code, checked by reading it."""

import ast
import pathlib
import re
from collections.abc import Iterator

import pytest

from empdg_jax import __version__
from empdg_jax.models import registry

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "empdg_jax"
SOURCES = sorted(PACKAGE.rglob("*.py"))


def _functions(tree: ast.AST) -> Iterator[tuple[str, str]]:
  """Yields the names and docstrings of functions, without properties."""
  for node in ast.walk(tree):
    if isinstance(node, ast.FunctionDef):
      decorators = {ast.unparse(one) for one in node.decorator_list}
      text = ast.get_docstring(node)
      if text and not decorators & {"property", "functools.cached_property"}:
        yield node.name, text


@pytest.mark.parametrize(
  "path", SOURCES, ids=lambda p: p.relative_to(PACKAGE).as_posix()
)
def test_docstrings_begin_with_a_noun_or_a_verb(path: pathlib.Path) -> None:
  """Modules with a noun phrase, functions with a verb in the third person.

  That every public name has a docstring at all is ruff's to check.
  """
  tree = ast.parse(path.read_text())
  module = ast.get_docstring(tree)
  assert module
  assert module.split()[0] not in ("What", "How", "Where", "Is")
  for name, text in _functions(tree):
    verb = text.split()[0].rstrip(",.;:")
    assert verb.endswith("s"), f"{name}: {text.splitlines()[0]}"
    assert verb not in ("Is", "Tells", "Lets"), (
      f"{name}: {text.splitlines()[0]}"
    )


def test_the_citation_has_the_packages_version() -> None:
  text = (ROOT / "CITATION.cff").read_text()
  (version,) = re.findall(r"^version: (.*)$", text, re.MULTILINE)
  assert version == __version__


def _files_that_contain(pattern: str) -> set[str]:
  return {
    path.relative_to(PACKAGE).as_posix()
    for path in SOURCES
    if re.search(pattern, path.read_text())
  }


def test_one_file_names_pmap() -> None:
  assert _files_that_contain(r"\bpmap\b") == {"parallel/devices.py"}


def test_main_alone_has_flags() -> None:
  assert _files_that_contain(r"\b(import tyro|argparse|absl)\b") == {"main.py"}


def test_the_registry_alone_names_systems() -> None:
  """Besides the default of `config.model.name`.

  `empdg` is also the command's name, and that of the paper's example set.
  """
  names = set(registry.SYSTEMS) - {"empdg"}
  for path in SOURCES:
    found = {
      node.value
      for node in ast.walk(ast.parse(path.read_text()))
      if isinstance(node, ast.Constant) and node.value in names
    }
    where = path.relative_to(PACKAGE).as_posix()
    allowed = {
      "models/registry.py": names,
      "config.py": {"empdg_wo_d"},
    }
    assert found <= allowed.get(where, set()), where


def test_the_package_has_few_entries() -> None:
  entries = [
    path.name
    for path in PACKAGE.iterdir()
    if not path.name.startswith("_") and path.name != "py.typed"
  ]
  assert len(entries) <= 16, sorted(entries)


def test_comments_say_why() -> None:
  """At least 3% of the lines that are not blank are comments."""
  lines = [
    line.strip()
    for path in SOURCES
    for line in path.read_text().splitlines()
    if line.strip()
  ]
  comments = sum(line.startswith("#") for line in lines)
  assert comments >= 0.03 * len(lines), f"{comments} of {len(lines)}"


def test_no_test_imports_from_a_test_module() -> None:
  for path in (ROOT / "tests").glob("*.py"):
    assert not re.search(r"^\s*(from|import) test_", path.read_text(), re.M), (
      path.name
    )
