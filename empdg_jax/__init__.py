"""EmpDG: multi-resolution adversarial empathetic dialogue generation in JAX."""

__version__ = "0.1.0"
