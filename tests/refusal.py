"""Commands that must be refused."""

import pytest

from empdg_jax import main


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
  """Runs a command that must be refused; returns its one line."""
  assert main.main(argv) == 2
  lines = capsys.readouterr().err.strip().splitlines()
  assert len(lines) == 1, lines
  return lines[0]
