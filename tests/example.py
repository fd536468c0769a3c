"""The stand-alone example of a model card, run without the package."""

import pathlib
import re
import subprocess
import sys

# What makes the package impossible to import.
ALONE = "import sys; sys.modules['empdg_jax'] = None\n"


def example_of(path: pathlib.Path) -> str:
  """Returns the example that reads `respond.jax`."""
  blocks = re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
  (example,) = (block for block in blocks if "deserialize" in block)
  return example


def run_example(example: str, folder: pathlib.Path, turns: list[str]) -> str:
  """Runs the example on other turns, without the package."""
  example = example.replace('"FOLDER"', repr(str(folder)))
  assert '["i lost my job today ."]' in example
  example = example.replace('["i lost my job today ."]', repr(turns))
  return subprocess.run(
    [sys.executable, "-c", ALONE + example],
    check=True,
    capture_output=True,
    text=True,
  ).stdout
