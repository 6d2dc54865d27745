"""Reads the text of a compiled program (HLO) into instructions.

Only what counting needs is kept: shapes, operands, called computations, attributes.
"""

import dataclasses
import json
import math
import re
from typing import Any

# Bytes of an element; types that are not here, such as tokens, take none.
ITEM_SIZES = {
  'pred': 1,
  's8': 1,
  'u8': 1,
  'f8e4m3fn': 1,
  'f8e5m2': 1,
  's16': 2,
  'u16': 2,
  'bf16': 2,
  'f16': 2,
  's32': 4,
  'u32': 4,
  'f32': 4,
  's64': 8,
  'u64': 8,
  'f64': 8,
}
_ARRAY = re.compile(r'([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]')
_NAME = re.compile(r'%([\w.\-]+)')
_HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')


@dataclasses.dataclass(frozen=True)
class Shape:
  """An array: its element type and dimensions."""

  dtype: str
  dims: tuple[int, ...]

  @property
  def size(self) -> int:
    """Number of elements."""
    return math.prod(self.dims)

  @property
  def nbytes(self) -> int:
    """Size in memory, without padding."""
    return self.size * ITEM_SIZES.get(self.dtype, 0)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One instruction.

  Attributes:
    name: unique in its computation.
    opcode: such as 'fusion'.
    shapes: of the result; several if it is a tuple.
    operands: names of instructions of the same computation.
    attributes: the text behind the operands.
    argument: the text between the parentheses, for a constant or parameter.
    is_root: its result is that of the computation.
  """

  name: str
  opcode: str
  shapes: tuple[Shape, ...]
  operands: tuple[str, ...]
  attributes: str
  argument: str
  is_root: bool

  @property
  def nbytes(self) -> int:
    """Bytes of the result."""
    return sum(shape.nbytes for shape in self.shapes)

  @property
  def target(self) -> str:
    """What a custom call calls; empty for other instructions."""
    found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
    return found[1] if found else ''

  def called(self, attribute: str) -> str:
    """The computation that an attribute such as `calls` or `body` names, or ''."""
    found = re.search(rf'\b{attribute}=%?([\w.\-]+)', self.attributes)
    return found[1] if found else ''

  def numbers(self, attribute: str) -> tuple[int, ...]:
    """The list that an attribute such as `lhs_contracting_dims` holds."""
    found = re.search(rf'\b{attribute}=\{{([\d,]*)\}}', self.attributes)
    if not found or not found[1]:
      return ()
    return tuple(map(int, found[1].split(',')))

  @property
  def backend_config(self) -> dict[str, Any]:
    """What the compiler of the device notes, such as estimated cycles."""
    start = self.attributes.find('backend_config={')
    if start < 0:
      return {}
    text = self.attributes[start + len('backend_config=') :]
    config, _ = json.JSONDecoder().raw_decode(text)
    return dict(config)


@dataclasses.dataclass(frozen=True)
class Computation:
  """A sequence of instructions."""

  name: str
  instructions: dict[str, Instruction]

  @property
  def root(self) -> Instruction:
    """The instruction whose result is that of the computation."""
    return next(i for i in self.instructions.values() if i.is_root)

  def parameters(self) -> list[Instruction]:
    """Its parameters, in order."""
    found = [i for i in self.instructions.values() if i.opcode == 'parameter']
    return sorted(found, key=lambda i: int(i.argument))

  def users(self, name: str) -> list[Instruction]:
    """The instructions that take the result of another."""
    return [i for i in self.instructions.values() if name in i.operands]


@dataclasses.dataclass(frozen=True)
class Module:
  """A compiled program: its computations, and which of them begins."""

  computations: dict[str, Computation]
  entry: str


def parse(text: str) -> Module:
  """Reads what `compiled.as_text()` returns.

  Raises:
    ValueError: the text has no entry computation.
  """
  computations: dict[str, Computation] = {}
  entry = ''
  name = ''
  instructions: dict[str, Instruction] = {}
  for line in text.splitlines():
    header = _HEADER.match(line)
    if header:
      name = header[2]
      instructions = {}
      if header[1]:
        entry = name
    elif line.startswith('}'):
      computations[name] = Computation(name, instructions)
    elif ' = ' in line and line.startswith('  '):
      instruction = _instruction(line.strip())
      instructions[instruction.name] = instruction
  if not entry:
    raise ValueError('the text has no ENTRY computation; is it that of a program?')
  return Module(computations, entry)


def _instruction(line: str) -> Instruction:
  """Reads `[ROOT] %name = shape opcode(operands), attributes`."""
  is_root = line.startswith('ROOT ')
  name, _, rest = line.removeprefix('ROOT ').partition(' = ')
  end = _closing(rest, 0) + 1 if rest.startswith('(') else rest.index(' ')
  shape = rest[:end]
  opcode, _, _ = rest[end:].lstrip().partition('(')
  start = rest.index('(', end)
  close = _closing(rest, start)
  argument = rest[start + 1 : close]
  return Instruction(
    name=name.lstrip('%'),
    opcode=opcode,
    shapes=read_shapes(shape),
    operands=tuple(_NAME.findall(argument)),
    attributes=rest[close + 1 :],
    argument=argument,
    is_root=is_root,
  )


def read_shapes(text: str) -> tuple[Shape, ...]:
  """Reads a shape, or those of a tuple, such as `(f32[2,3]{1,0}, s32[])`."""
  return tuple(
    Shape(dtype, tuple(int(n) for n in dims.split(',') if n))
    for dtype, dims in _ARRAY.findall(text)
  )


def _closing(text: str, start: int) -> int:
  """The position of the parenthesis that closes the one at `start`."""
  depth = 0
  for position in range(start, len(text)):
    if text[position] == '(':
      depth += 1
    elif text[position] == ')':
      depth -= 1
      if not depth:
        return position
  raise ValueError(f'a parenthesis is not closed: {text[:80]}')
