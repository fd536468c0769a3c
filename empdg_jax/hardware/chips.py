"""Published rates of TPU chips, and the layouts of the slices they come in."""

import math
from typing import NamedTuple


class Chip(NamedTuple):
  """The published rates of what JAX takes as one device of a TPU.

  That is a chip, or one of the two chiplets of a tpu7x.

  Attributes:
    memory: HBM, bytes.
    flops: Peak rate in bfloat16, operations/s.
    bandwidth: HBM bandwidth, bytes/s.
    interconnect: All links to other chips in both directions, bytes/s.
    axes: The number of axes of its slices' layouts.
    cores: What an accelerator type counts for a chip of a layout.
    options: Compiler options needed to take a chip as one device.
  """

  memory: float
  flops: float
  bandwidth: float
  interconnect: float
  axes: int
  cores: int = 1
  options: tuple[tuple[str, str], ...] = ()


# A v4 chip has two cores; without megacore each would be a device.
_MEGACORE = (("chip_config_name", "megacore"),)
CHIPS = {
  "v4": Chip(32 * 2**30, 275e12, 1.2e12, 6e11, 3, 2, _MEGACORE),
  "v5e": Chip(16 * 2**30, 197e12, 8.19e11, 4e11, 2),
  "v5p": Chip(95 * 2**30, 459e12, 2.765e12, 1.2e12, 3, 2),
  "v6e": Chip(32 * 2**30, 918e12, 1.64e12, 8e11, 2),
  "tpu7x": Chip(96 * 2**30, 1.1535e15, 3.69e12, 6e11, 3, 2),
}
_MOST_CHIPS = 2**14  # More than the largest slice has.


def topology_of(accelerator: str) -> str:
  """Returns the slice of an accelerator type; anything else as it is.

  >>> topology_of("v5litepod-8"), topology_of("v5p-32"), topology_of("v5e:2x2")
  ('v5e:2x4', 'v5p:2x2x4', 'v5e:2x2')
  """
  generation, _, number = accelerator.partition("-")
  version = {"v5litepod": "v5e"}.get(generation, generation)
  chip = CHIPS.get(version)
  if chip is None or not number.isdecimal() or len(number) > 5:
    return accelerator
  chips, rest = divmod(int(number), chip.cores)
  if rest or not 1 <= chips <= _MOST_CHIPS:
    return accelerator
  return f"{version}:{'x'.join(map(str, _nearest_cube(chips, chip.axes)))}"


def _nearest_cube(chips: int, axes: int) -> tuple[int, ...]:
  """Returns the layout with the shortest sides, ascending but for ones.

  >>> _nearest_cube(4, 3), _nearest_cube(6144, 3), _nearest_cube(32, 2)
  ((2, 2, 1), (16, 16, 24), (4, 8))
  """
  first = [d for d in range(1, chips + 1) if axes == 3 and chips % d == 0]
  layouts = [
    (a, b, chips // a // b)
    for a in first or [1]
    for b in range(1, math.isqrt(chips // a) + 1)
    if chips // a % b == 0
  ]
  sides = sorted(min(layouts, key=sum))
  if axes == 2:
    return sides[1], sides[2]
  return (*(s for s in sides if s > 1), *(s for s in sides if s == 1))


def sides_of(layout: str) -> tuple[int, ...]:
  """Returns the sides of a layout; none if it is no layout.

  >>> sides_of("4x4"), sides_of("2x2x1"), sides_of("4"), sides_of("0x2")
  ((4, 4), (2, 2, 1), (), ())
  """
  parts = layout.split("x")
  plain = all(p.isascii() and p.isdecimal() and len(p) < 6 for p in parts)
  sides = tuple(map(int, parts)) if plain and len(parts) in (2, 3) else ()
  return sides if 1 <= math.prod(sides) <= _MOST_CHIPS else ()
