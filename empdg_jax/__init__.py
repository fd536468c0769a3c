"""EmpDG: multi-resolution adversarial empathetic dialogue generation in JAX."""

import importlib
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
  """Imports `export` when it is asked for: that starts JAX.

  >>> from empdg_jax import export
  >>> export.load.__name__
  'load'
  """
  if name == "export":
    return importlib.import_module("empdg_jax.inference.export")
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
