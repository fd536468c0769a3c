"""Memory traffic and products of a compiled program, from its text.

XLA counts a loop's body once, and a look-up as a pass over the whole table.
Here a body counts as often as it runs, and a look-up counts its rows.
"""

import functools
import math
import re
from typing import NamedTuple

# An array's type: `f32[2,3]{1,0}`, or `pred[8]`, a byte an element; its layout
# may name a memory, as `S(1)` for a TPU's on-chip memory.
_ARRAY = re.compile(r"\b(?:pred|[a-z]+(\d+))\[([\d,]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(
  r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>.*?) "
  r"(?P<opcode>[a-z][\w\-]*)\((?P<rest>.*)$"
)
_CALLED = re.compile(r"\b(calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(
  r"\b(?:branch|true|false)_computations?=(\{[^}]*\}|%\S+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
# They move nothing, or what they move is counted where it is used.
_FREE = frozenset(
  "parameter constant tuple get-tuple-element bitcast after-all partition-id "
  "replica-id opt-barrier iota".split()
)
_SLICES = "gather", "dynamic-slice"
_UPDATES = {"scatter": 2, "dynamic-update-slice": 1}  # The update's operand.


class Work(NamedTuple):
  """What a program does.

  Attributes:
    traffic: Memory traffic, bytes; a look-up counts its rows.
    products: Floating-point operations of matrix products.
  """

  traffic: float
  products: float


class _Instruction(NamedTuple):
  name: str
  type: str
  opcode: str
  operands: tuple[str, ...]
  rest: str
  is_root: bool


_Program = dict[str, dict[str, _Instruction]]


def _size(type_: str) -> float:
  """Returns the bytes of a type's arrays in the device's main memory."""
  return float(
    sum(
      int(bits or 8) / 8 * math.prod(int(n) for n in lengths.split(",") if n)
      for bits, lengths, layout in _ARRAY.findall(type_)
      if "S(" not in layout
    )
  )


def _dims(type_: str) -> list[int]:
  found = _ARRAY.search(type_)
  return [int(n) for n in found[2].split(",") if n] if found else []


def _operands(rest: str) -> tuple[str, ...]:
  """Returns the names up to the closing parenthesis of the operands."""
  depth = 1
  for end, letter in enumerate(rest):
    depth += (letter in "([{") - (letter in ")]}")
    if not depth:
      return tuple(re.findall(r"%([\w.\-]+)", rest[:end]))
  return ()


def _parse(text: str) -> tuple[_Program, str]:
  """Returns a program's computations by name, and the name of the first."""
  program: _Program = {}
  entry = ""
  current: dict[str, _Instruction] = {}
  for line in text.splitlines():
    if header := _HEADER.match(line):
      current = program.setdefault(header[2], {})
      entry = header[2] if header[1] else entry
    elif found := _LINE.match(line):
      current[found["name"]] = _Instruction(
        found["name"],
        found["type"],
        found["opcode"],
        _operands(found["rest"]),
        found["rest"],
        bool(found["root"]),
      )
  return program, entry


class _Counter:
  """Counts the work of a program's computations."""

  def __init__(self, program: _Program, loops: bool) -> None:
    self._program = program
    self._loops = loops
    self.count = functools.cache(self._count)

  def _count(self, name: str) -> Work:
    """Returns the work of one run of a computation."""
    work = [
      self._work(one, self._program[name])
      for one in self._program.get(name, {}).values()
    ]
    return Work(*(math.fsum(column) for column in zip(*work, strict=True)))

  def _work(self, one: _Instruction, scope: dict[str, _Instruction]) -> Work:
    called = dict(_CALLED.findall(one.rest))
    if one.opcode == "while":
      runs = self._runs(one, called["condition"]) if self._loops else 1
      body, condition = map(self.count, (called["body"], called["condition"]))
      return Work(*(runs * sum(x) for x in zip(body, condition, strict=True)))
    if one.opcode == "conditional":
      branches = re.findall(
        r"%([\w.\-]+)", "".join(_BRANCHES.findall(one.rest))
      )
      return max(map(self.count, branches), default=Work(0.0, 0.0))
    inner = called.get("calls") or called.get("to_apply", "")
    if one.opcode in ("call", "async-start"):
      return self.count(inner)
    products = _products(one, scope)
    if one.opcode in _FREE or one.opcode.endswith("-done"):
      return Work(0.0, products)
    if one.opcode in ("copy-start", "slice-start"):
      return Work(_moved(one.type), 0.0)
    given = [scope[o].type for o in one.operands if o in scope]
    if one.opcode == "fusion":
      reads = sum(
        self._read(inner, index, type_) for index, type_ in enumerate(given)
      )
      products = self.count(inner).products
      return Work(reads + self._written(inner, one.type), products)
    return Work(_direct(one, scope), products)

  def _runs(self, one: _Instruction, condition: str) -> int:
    """Returns how often a loop runs, at most."""
    if known := _TRIPS.search(one.rest):
      return int(known[1])
    # A loop that may end early compares its index with a bound.
    bounds = [
      int(found[1])
      for line in self._program[condition].values()
      if line.opcode == "constant"
      and (found := re.match(r"(\d+)\)", line.rest))
    ]
    return max(bounds, default=1)

  def _read(self, name: str, index: int, type_: str) -> float:
    """Returns the bytes that a fusion reads of its operand `index`."""
    scope = self._program.get(name, {})
    parameter = next(
      (
        one.name
        for one in scope.values()
        if one.opcode == "parameter" and one.rest.startswith(f"{index})")
      ),
      "",
    )
    total, names = 0.0, {parameter}
    for one in scope.values():  # In their order: what is used comes first.
      used = [i for i, o in enumerate(one.operands) if o in names]
      if not used:
        continue
      if one.opcode == "bitcast":
        names.add(one.name)
      elif one.opcode in _SLICES and used == [0]:
        total += _size(one.type)
      elif one.opcode in _UPDATES and used == [0]:
        total += _updated(one, scope) * (one.opcode == "scatter")
      elif one.opcode == "fusion":
        inner = dict(_CALLED.findall(one.rest)).get("calls", "")
        total += sum(self._read(inner, i, type_) for i in used)
      else:
        return _size(type_)
    # A slice of overlapping rows may be more than the table.
    return min(total, _size(type_))

  def _written(self, name: str, type_: str) -> float:
    """Returns the bytes that a fusion writes."""
    scope = self._program.get(name, {})
    root = next((one for one in scope.values() if one.is_root), None)
    if root is None:
      return _size(type_)
    parts = [root]
    if root.opcode == "tuple":
      parts = [scope[o] for o in root.operands if o in scope]
    total = 0.0
    for one in parts:
      while one.opcode == "bitcast" and one.operands[0] in scope:
        one = scope[one.operands[0]]
      inner = dict(_CALLED.findall(one.rest)).get("calls", "")
      if one.opcode == "fusion":
        total += self._written(inner, one.type)
      elif one.opcode in _UPDATES:
        total += _updated(one, scope)
      else:
        total += _size(one.type)
    # Inner types name no memory; the fusion's own does.
    return min(total, _size(type_))


def _moved(type_: str) -> float:
  """Returns the traffic of a copy between places, from the type of its start.

  A copy's type has both places of the array. A slice's has the whole array
  first, and then the slice, which is what moves.
  """
  first, second = (found[0] for found in list(_ARRAY.finditer(type_))[:2])
  places = ("S(" not in first) + ("S(" not in second)
  return places * _size(re.sub(r"S\(\d+\)", "", second))


def _updated(one: _Instruction, scope: dict[str, _Instruction]) -> float:
  update = one.operands[_UPDATES[one.opcode]]
  return _size(scope[update].type) if update in scope else _size(one.type)


def _direct(one: _Instruction, scope: dict[str, _Instruction]) -> float:
  """Returns the traffic of an instruction outside fusions."""
  given = [_size(scope[o].type) for o in one.operands if o in scope]
  if one.opcode in _SLICES:
    return 2.0 * _size(one.type) + sum(given[1:])
  if one.opcode in _UPDATES:
    # In place: rows are read where values are added to them.
    passes = 1.0 + (one.opcode == "scatter")
    return passes * _updated(one, scope) + sum(given[1:])
  return _size(one.type) + sum(given)


def _products(one: _Instruction, scope: dict[str, _Instruction]) -> float:
  """Returns the operations of a `dot`, or of a product as a `convolution`."""
  if one.opcode not in ("dot", "convolution") or not all(
    o in scope for o in one.operands
  ):
    return 0.0
  left, right = (_dims(scope[o].type) for o in one.operands[:2])
  outputs = math.prod(_dims(one.type))
  if one.opcode == "dot":
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)
    summed = [left[int(i)] for i in found[1].split(",") if i] if found else []
    return 2.0 * outputs * math.prod(summed)
  labels = re.search(r"dim_labels=\w+_(\w+)->", one.rest)
  if not labels:
    return 0.0
  return 2.0 * outputs * math.prod(right) / right[labels[1].index("o")]


def count_work(text: str, loops: bool = True) -> Work:
  """Counts the work of one run of a compiled program.

  Args:
    text: The program, from `compiled.as_text()`.
    loops: Whether a loop's body counts as often as it runs at most, or once.
  """
  program, entry = _parse(text)
  return _Counter(program, loops).count(entry)
