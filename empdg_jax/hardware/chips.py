"""Published rates of TPU chips, and the slices that they come in."""

import math
from typing import NamedTuple


class Chip(NamedTuple):
  """A TPU chip's published rates.

  Attributes:
    memory: HBM, bytes.
    flops: Peak rate in bfloat16, operations/s.
    bandwidth: HBM bandwidth, bytes/s.
    interconnect: All links to other chips in both directions, bytes/s.
    layouts: The slices known to work, up to 256 chips.
    options: Compiler options needed to take a chip as one device.
  """

  memory: float
  flops: float
  bandwidth: float
  interconnect: float
  layouts: tuple[str, ...]
  options: tuple[tuple[str, str], ...] = ()


_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")
# A v4 chip has two cores; without megacore each would be a device.
_MEGACORE = (("chip_config_name", "megacore"),)
CHIPS = {
  "v4": Chip(32 * 2**30, 275e12, 1.2e12, 6e11, _CUBES, _MEGACORE),
  "v5e": Chip(16 * 2**30, 197e12, 8.19e11, 4e11, _FLAT),
  "v5p": Chip(95 * 2**30, 459e12, 2.765e12, 1.2e12, _CUBES),
  "v6e": Chip(32 * 2**30, 918e12, 1.64e12, 8e11, _FLAT),
}


def topology_of(accelerator: str) -> str:
  """Returns the slice of an accelerator type; anything else as it is.

  >>> topology_of("v5litepod-8"), topology_of("v5p-32"), topology_of("v5e:2x2")
  ('v5e:2x4', 'v5p:2x2x4', 'v5e:2x2')
  """
  generation, _, number = accelerator.partition("-")
  version = {"v5litepod": "v5e"}.get(generation, generation)
  if version not in CHIPS or not number.isdecimal() or len(number) > 9:
    return accelerator
  # The types v4 and v5p count cores, of which a chip has two.
  chips = int(number) // (2 if version in ("v4", "v5p") else 1)
  for layout in CHIPS[version].layouts:
    if math.prod(map(int, layout.split("x"))) == chips:
      return f"{version}:{layout}"
  return accelerator


def known_slices() -> list[str]:
  """Returns the slices of `CHIPS`, a line for each chip."""
  return [f"{name}: {', '.join(c.layouts)}" for name, c in CHIPS.items()]
