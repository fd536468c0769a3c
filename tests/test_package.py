"""The package as users install it, the notebook and the documentation."""

import ast
import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.package

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Commands run in the new environment, which no variable may lead elsewhere.
ENV = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
NOT_SOURCE = (".*", "*.egg-info", "__pycache__", "build", "dist", "runs")
NOT_SOURCE += ("site", "generated")
# Runs a notebook, then says which package it ran with.
RUN_NOTEBOOK = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
cell = nbformat.v4.new_code_cell("import empdg_jax; empdg_jax.__file__")
notebook.cells.append(cell)
nbclient.execute(notebook, timeout=600, kernel_name="python3")
print(cell.outputs[0]["data"]["text/plain"])
"""


class Built(NamedTuple):
  """A source distribution and the wheel that was built from it."""

  sdist: pathlib.Path
  wheel: pathlib.Path


def run(
  *command: str | pathlib.Path, cwd: pathlib.Path, stdin: str = ""
) -> str:
  """Runs a command that must succeed; returns its stdout."""
  done = subprocess.run(
    command, cwd=cwd, env=ENV, input=stdin, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A copy of the source: building writes into it, and reads what is there."""
  folder = tmp_path_factory.mktemp("source") / "empdg-jax"
  ignore = shutil.ignore_patterns(*NOT_SOURCE)
  return shutil.copytree(ROOT, folder, ignore=ignore)


@pytest.fixture(scope="module")
def built(
  source: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> Built:
  """The distributions, built with this environment's setuptools."""
  out = tmp_path_factory.mktemp("dist")
  build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out]
  run(*build, source, cwd=out)
  (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
  return Built(sdist, wheel)


@pytest.fixture(scope="module")
def python(
  built: Built, tmp_path_factory: pytest.TempPathFactory
) -> pathlib.Path:
  """The Python of a new environment, in which the wheel is installed.

  To save minutes, the wheel's dependencies are this environment's own. A .pth
  file names their folders; Python reads no .pth file in folders that are added
  like this, and so does not find this environment's editable installation.
  """
  folder = tmp_path_factory.mktemp("installed") / "venv"
  venv.create(folder, symlinks=True)
  python = folder / "bin" / "python"
  pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
  pip += ["--disable-pip-version-check", "--no-index", "--no-deps"]
  run(*pip, built.wheel, cwd=folder)
  (packages,) = folder.glob("lib/python*/site-packages")
  ours = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
  (packages / "dependencies.pth").write_text("\n".join(ours))
  return python


@pytest.fixture(scope="module")
def empdg(python: pathlib.Path) -> pathlib.Path:
  """The `empdg` command of the new environment."""
  return python.with_name("empdg")


@pytest.fixture(scope="module")
def sdist_files(built: Built) -> set[str]:
  """The files of the source distribution, relative to its folder."""
  with tarfile.open(built.sdist) as archive:
    return {name.partition("/")[2] for name in archive.getnames()}


def test_the_sdist_has_all_sources(
  source: pathlib.Path, sdist_files: set[str]
) -> None:
  assert {"LICENSE", "README.md", "configs/quickstart.py"} <= sdist_files
  for path in source.rglob("*"):
    name = path.relative_to(source).as_posix()
    assert not path.is_file() or name in sdist_files, name


def test_the_wheel_has_the_package_alone(built: Built) -> None:
  names = set(zipfile.ZipFile(built.wheel).namelist())
  (about,) = {n.partition("/")[0] for n in names} - {"empdg_jax"}
  assert about.endswith(".dist-info")
  configs = {f"empdg_jax/configs/{p.name}" for p in ROOT.glob("configs/*.py")}
  assert configs | {"empdg_jax/py.typed", f"{about}/licenses/LICENSE"} <= names


def test_every_import_is_a_declared_dependency(built: Built) -> None:
  """Imports that succeed only because a dependency of ours needs them too."""
  wheel = zipfile.ZipFile(built.wheel)
  (metadata,) = (n for n in wheel.namelist() if n.endswith("/METADATA"))
  text = wheel.read(metadata).decode()
  declared = {
    canonicalize_name(Requirement(line).name)
    for line in re.findall(r"^Requires-Dist: (.*)$", text, re.MULTILINE)
  }
  imported = set()
  for name in wheel.namelist():
    if name.endswith(".py"):
      for node in ast.walk(ast.parse(wheel.read(name))):
        if isinstance(node, ast.Import):
          imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
          imported.add(str(node.module).partition(".")[0])
  imported -= {"empdg_jax", *sys.stdlib_module_names}
  distributions = importlib.metadata.packages_distributions()
  for module in imported:
    assert declared & {canonicalize_name(d) for d in distributions[module]}, (
      module
    )


def test_links_of_the_readme(sdist_files: set[str]) -> None:
  """A package index shows no file of ours: images must be addresses."""
  text = (ROOT / "README.md").read_text()
  for image, link in re.findall(r"(!?)\[[^]]*\]\(([^)\s]+)\)", text):
    if not link.startswith(("https://", "#")):
      assert not image, link
      name = link.partition("#")[0].rstrip("/")
      assert name in sdist_files, link


def test_the_installed_package_works(
  python: pathlib.Path, empdg: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  code = "import empdg_jax; print(empdg_jax.__file__)"
  assert run(python, "-c", code, cwd=tmp_path).startswith(
    str(python.parents[1] / "lib")
  )
  steps = ("mle_steps=3", "mle_eval_every=3", "discriminator_steps=2")
  steps += ("adversarial_rounds=2", "adversarial_eval_every=2", "log_every=1")
  flags = [f"--config.train.{step}" for step in steps]
  flags += ["--config.model.emb_dim=24", "--config.data.data_dir=data"]
  flags.append("--config.data.shapes=((64,28,28),)")  # One to compile.
  workdir = "--workdir=run"
  run(empdg, "train", "--config=quickstart", workdir, *flags, cwd=tmp_path)
  assert "perplexity" in run(empdg, "evaluate", workdir, cwd=tmp_path)
  assert (tmp_path / "run/eval/test/metrics.json").exists()
  run(empdg, "export", workdir, "--out=out", cwd=tmp_path)
  chat = [empdg, "chat", "--bundle=out"]
  said = run(*chat, cwd=tmp_path, stdin="I lost my job today.\n\n")
  assert "perceived: " in said
  assert "empdg> " in said


def test_an_unknown_name_lists_the_names(
  empdg: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  done = subprocess.run(
    [empdg, "prepare", "--config=nope"],
    cwd=tmp_path,
    env=ENV,
    capture_output=True,
    text=True,
  )
  names = sorted(p.stem for p in ROOT.glob("configs/[a-z]*.py"))
  assert done.returncode == 2
  assert done.stderr == (
    "empdg: --config=nope: no such file; give a path, or one of "
    f"{', '.join(names)}\n"
  )


@pytest.fixture(scope="module")
def notebook() -> pathlib.Path:
  """The notebook of the repository."""
  return ROOT / "notebooks" / "tour.ipynb"


def test_the_notebook_has_no_outputs_and_no_paths(
  notebook: pathlib.Path,
) -> None:
  text = notebook.read_text()
  cells = [c for c in json.loads(text)["cells"] if c["cell_type"] == "code"]
  assert len(cells) == 10
  assert all(c["outputs"] == [] for c in cells)
  assert all(c["execution_count"] is None for c in cells)
  assert not re.search(r"['\"(](/|[A-Z]:\\)", text)


def test_the_notebook_runs(
  python: pathlib.Path,
  notebook: pathlib.Path,
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  # The machine may have a kernel of the same name, of another environment.
  run(python, "-m", "ipykernel", "install", "--sys-prefix", cwd=tmp_path)
  monkeypatch.setitem(ENV, "JUPYTER_PREFER_ENV_PATH", "1")
  used = run(python, "-c", RUN_NOTEBOOK, notebook, cwd=tmp_path)
  assert str(python.parents[1]) in used


def test_the_documentation_is_complete_and_needs_no_network(
  python: pathlib.Path, source: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  sphinx = [python, "-m", "sphinx", "-q", "-W", "--keep-going"]
  run(*sphinx, source / "docs", tmp_path / "site", cwd=tmp_path)
  site = tmp_path / "site"
  pages = "".join(page.read_text() for page in site.rglob("*.html"))
  for path in (source / "empdg_jax").rglob("*.py"):
    parts = path.relative_to(source).with_suffix("").parts
    name = ".".join(parts).removesuffix(".__init__")
    assert f'id="module-{name}"' in pages, name
  loaded = r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"(?:https?:)?//"
  assert not re.search(loaded, pages)
  address = r"(?:url\(|@import)\W*(?:https?:)?//"
  for sheet in site.rglob("*.css"):
    assert not re.search(address, sheet.read_text()), sheet
  assert "discriminator_step" in (site / "searchindex.js").read_text()
