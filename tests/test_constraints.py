"""Releases that `constraints/` names, and what they require of each other."""

import importlib.metadata
import pathlib
import sys

import pytest
from packaging.requirements import Requirement

CONSTRAINTS = pathlib.Path(__file__).resolve().parents[1] / "constraints"


def releases_of(file: pathlib.Path) -> dict[str, str]:
  """Returns the version of each package in a file of constraints."""
  lines = [line.partition(";")[0] for line in file.read_text().splitlines()]
  return dict(line.strip().split("==") for line in lines)


def test_libtpu_is_the_one_that_jax_names() -> None:
  """Otherwise no `pip install -c` can resolve `jax[tpu]`."""
  version = "{}.{}".format(*sys.version_info)
  releases = releases_of(CONSTRAINTS / f"python{version}.txt")
  if importlib.metadata.version("jax") != releases["jax"]:
    pytest.skip("needs the release of JAX that the constraints name")
  (libtpu,) = (
    requirement
    for requirement in map(
      Requirement, importlib.metadata.requires("jax") or ()
    )
    if requirement.name == "libtpu"
  )
  assert libtpu.marker
  assert libtpu.marker.evaluate({"extra": "tpu"})
  assert libtpu.specifier.contains(releases["libtpu"])
