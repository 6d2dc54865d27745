"""Kernels of a compiled program: what kind each is, and what it moves and computes.

A kernel is an instruction that a device runs on its own: a fusion, a library call, a
copy, a collective. Those in loops count as often as the loop runs.
"""

from collections.abc import Iterator
import dataclasses
import itertools
import math
import re

from benchmarks.compiled.hlo import Computation, Instruction, Module, Shape

# They describe data and run nothing.
FREE = {
  'parameter',
  'constant',
  'tuple',
  'get-tuple-element',
  'bitcast',
  'after-all',
  'partition-id',
  'replica-id',
  'opt-barrier',
}
COLLECTIVES = {
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
  'collective-broadcast',
  'ragged-all-to-all',
}
LAYOUT = {
  'bitcast',
  'broadcast',
  'concatenate',
  'constant',
  'copy',
  'dynamic-slice',
  'dynamic-update-slice',
  'gather',
  'iota',
  'pad',
  'parameter',
  'reshape',
  'reverse',
  'slice',
  'transpose',
  'tuple',
  'get-tuple-element',
}
SLICES = {'slice', 'dynamic-slice', 'gather'}
# Custom calls that allocate, or mark something for the compiler.
NO_KERNEL = {
  'AllocateBuffer',
  'AssumeGatherIndicesInBound',
  'ConcatBitcast',
  'Sharding',
}
WORKSPACE = {'s8', 'u8'}
# Custom calls by what they compute. The first pattern that is found counts.
LIBRARIES = {
  r'fmha.*Backward': 'attention',
  r'fmha': 'attention',
  r'cudnn\$conv': 'convolution',
  r'cublas|matmul|gemm': 'product',
  r'^tpu_custom_call$': 'pallas',
  r'triton': 'pallas',
}


@dataclasses.dataclass(frozen=True)
class Kernel:
  """One kernel.

  Attributes:
    name: of the instruction.
    kind: 'product', 'convolution', 'attention', 'reduction', 'elementwise', 'layout',
      'collective', 'pallas' or 'other'.
    count: how often it runs.
    nbytes: operands that it reads and results that it writes, once.
    flop: operations of its products, once; a multiply-add is two.
    cycles: as the compiler for TPU estimates; None if it does not.
    is_custom: a library call or a hand-written kernel: the compiler knows nothing of
      its time.
    source: where it comes from in the traced program.
  """

  name: str
  kind: str
  count: int
  nbytes: int
  flop: int
  cycles: int | None
  is_custom: bool
  source: str


def kernels(module: Module) -> list[Kernel]:
  """Lists the kernels of a program in the order of its text."""
  return list(_walk(module, module.computations[module.entry], 1))


def _walk(module: Module, computation: Computation, count: int) -> Iterator[Kernel]:
  for instruction in computation.instructions.values():
    opcode = instruction.opcode
    if opcode in FREE or opcode.endswith('-done'):
      continue
    if opcode == 'custom-call' and instruction.target in NO_KERNEL:
      continue
    if opcode == 'while':
      body = module.computations[instruction.called('body')]
      yield from _walk(module, body, count * trip_count(instruction))
    elif opcode == 'conditional':
      yield from _longest_branch(module, instruction, count)
    elif opcode in ('call', 'async-start'):
      name = instruction.called('to_apply') or instruction.called('calls')
      yield from _walk(module, module.computations[name], count)
    else:
      yield _kernel(module, computation, instruction, count)


def trip_count(loop: Instruction) -> int:
  """How often a loop runs; 1 if the compiler does not know."""
  known = loop.backend_config.get('known_trip_count', {})
  return int(known.get('n', 1))


def _longest_branch(
  module: Module, instruction: Instruction, count: int
) -> list[Kernel]:
  """The kernels of the branch that moves the most."""
  names = re.search(r'branch_computations=\{([^}]*)\}', instruction.attributes)
  if names:
    branches = [name.strip(' %') for name in names[1].split(',')]
  else:
    branches = [instruction.called(f'{case}_computation') for case in ('true', 'false')]
  walks = [list(_walk(module, module.computations[name], count)) for name in branches]
  return max(walks, key=lambda walk: sum(k.nbytes * k.count for k in walk))


def _kernel(
  module: Module, computation: Computation, instruction: Instruction, count: int
) -> Kernel:
  inner = None
  if instruction.opcode == 'fusion':
    inner = module.computations[instruction.called('calls')]
  cycles = re.search(r'"estimated_cycles":"?(\d+)', instruction.attributes)
  source = re.search(r'op_name="([^"]*)"', instruction.attributes)
  operands = [computation.instructions[name] for name in instruction.operands]
  return Kernel(
    name=instruction.name,
    kind=_kind(module, instruction, inner),
    count=count,
    nbytes=_bytes(instruction, operands, inner),
    flop=_flop(module, computation, instruction, inner),
    cycles=int(cycles[1]) if cycles else None,
    is_custom=instruction.opcode == 'custom-call',
    source=source[1] if source else '',
  )


# 1. Kinds


def _kind(module: Module, instruction: Instruction, inner: Computation | None) -> str:
  if instruction.opcode == 'custom-call':
    for pattern, kind in LIBRARIES.items():
      if re.search(pattern, instruction.target):
        return kind
    return 'other'
  if instruction.opcode.removesuffix('-start') in COLLECTIVES:
    return 'collective'
  opcodes = {instruction.opcode}
  if inner is not None:
    opcodes = set(_opcodes(module, inner))
  if 'convolution' in opcodes:
    return 'convolution'
  if 'dot' in opcodes:
    return 'product'
  if opcodes & {'reduce', 'reduce-window'}:
    return 'reduction'
  if opcodes <= LAYOUT or opcodes <= {'copy-start', 'async-start'}:
    return 'layout'
  if instruction.opcode in ('sort', 'rng', 'rng-bit-generator', 'scatter'):
    return 'other'
  return 'elementwise'


def _opcodes(module: Module, computation: Computation) -> Iterator[str]:
  """The opcodes in a fusion and in the fusions inside it."""
  for instruction in computation.instructions.values():
    yield instruction.opcode
    if instruction.opcode == 'fusion':
      yield from _opcodes(module, module.computations[instruction.called('calls')])


# 2. Memory


def _bytes(
  instruction: Instruction, operands: list[Instruction], inner: Computation | None
) -> int:
  """Bytes read and written: parts of operands where only parts are used."""
  if instruction.opcode in SLICES:
    return 2 * instruction.nbytes
  read = sum({operand.name: operand.nbytes for operand in operands}.values())
  if re.search('cublas|cudnn', instruction.target):
    # The last result is the library's workspace.
    results = [shape for shape in instruction.shapes if shape.dtype not in WORKSPACE]
    return read + sum(shape.nbytes for shape in results)
  if inner is None:
    return read + instruction.nbytes
  read = sum(_read(inner, parameter) for parameter in inner.parameters())
  return read + _written(inner)


def _read(fusion: Computation, parameter: Instruction) -> int:
  """Bytes of a parameter that a fusion reads."""
  users = fusion.users(parameter.name)
  if users and all(user.opcode in SLICES for user in users):
    return min(parameter.nbytes, sum(user.nbytes for user in users))
  updates = [user for user in users if user.opcode == 'dynamic-update-slice']
  if updates and len(updates) == len(users):
    is_target = all(user.operands[0] == parameter.name for user in updates)
    return 0 if is_target else parameter.nbytes
  return parameter.nbytes


def _written(fusion: Computation) -> int:
  """Bytes that a fusion writes: of an array updated in place, the new part."""
  root = fusion.root
  if root.opcode == 'dynamic-update-slice':
    return fusion.instructions[root.operands[1]].nbytes
  return root.nbytes


# 3. Arithmetic


def _flop(
  module: Module,
  computation: Computation,
  instruction: Instruction,
  inner: Computation | None,
) -> int:
  if inner is not None:
    return sum(
      _flop(module, inner, i, _inner(module, i)) for i in inner.instructions.values()
    )

  def operand(number: int) -> Shape:
    return computation.instructions[instruction.operands[number]].shapes[0]

  if instruction.opcode == 'dot':
    return _product(
      instruction, operand(0), instruction.numbers('lhs_contracting_dims')
    )
  if instruction.opcode == 'convolution':
    return _convolution(instruction, operand(1))
  target = instruction.target
  for name, count in HAND_WRITTEN.items():
    if f'/{name}/' in instruction.attributes:
      shapes = [operand(i) for i in range(len(instruction.operands))]
      return count(instruction.shapes[0], shapes)
  if 'cudnn$conv' in target:
    return _cudnn_convolution(instruction, operand(0), operand(1))
  if 'fmha' in target:
    # Forward: logits, and their product with the values. Backward: five products.
    products = 5 if 'Backward' in target else 2
    queries = operand(0)
    return products * 2 * queries.size * operand(1).dims[1]
  if 'cublas' in target:
    config = instruction.backend_config.get('gemm_backend_config', {})
    numbers = config.get('dot_dimension_numbers', {})
    contracted = tuple(map(int, numbers.get('lhs_contracting_dimensions', ())))
    return _product(instruction, operand(0), contracted)
  return 0


def _geglu(out: Shape, operands: list[Shape]) -> int:
  """Two products, for values and gates. Operands: input, kernel, ..."""
  return 2 * 2 * out.size * operands[1].dims[0]


def _attend_to_adapters(out: Shape, operands: list[Shape]) -> int:
  """Two products for each adapter. Operands: queries, image, keys, values, mask."""
  keys = [shape for shape in operands[2::2] if len(shape.dims) == 4]
  return sum(2 * 2 * out.size * shape.dims[2] for shape in keys)


# Arithmetic of our own kernels (`models.fused`), by the name they are called by.
HAND_WRITTEN = {'geglu': _geglu, 'attend_to_adapters': _attend_to_adapters}


def _inner(module: Module, instruction: Instruction) -> Computation | None:
  if instruction.opcode != 'fusion':
    return None
  return module.computations[instruction.called('calls')]


def _product(instruction: Instruction, left: Shape, contracted: tuple[int, ...]) -> int:
  return 2 * instruction.shapes[0].size * math.prod(left.dims[i] for i in contracted)


def _convolution(instruction: Instruction, kernel: Shape) -> int:
  """Each result is a sum over the kernel's window and inputs.

  The compiler for TPU writes products of many small matrices as convolutions: the input
  is dilated so far that a window sees one of them.
  """
  labels = instruction.attributes.split('dim_labels=')[1].split('_')[1].split('->')[0]
  inputs = kernel.dims[labels.index('i')]
  window = 1
  for size, dilation in zip(
    _window(instruction, 'size'),
    _window(instruction, 'lhs_dilate') or itertools.repeat(1),
  ):
    window *= math.ceil(size / dilation)
  return 2 * instruction.shapes[0].size * inputs * window


def _window(instruction: Instruction, key: str) -> list[int]:
  """The entry of a window such as `{size=3x3 lhs_dilate=2x2}`; empty without one."""
  found = re.search(rf'window=\{{[^}}]*\b{key}=([\dx]+)', instruction.attributes)
  return [int(n) for n in found[1].split('x')] if found else []


def _cudnn_convolution(instruction: Instruction, first: Shape, second: Shape) -> int:
  """The same number of operations forward and for either gradient."""
  labels = instruction.attributes.split('dim_labels=')[1].split(',')[0]
  result = instruction.shapes[0]
  kernel_labels = labels.split('_')[1].split('->')[0]
  if 'BackwardFilter' in instruction.target:
    output, kernel = second, result
  elif 'BackwardInput' in instruction.target:
    output, kernel = first, second
  else:
    output, kernel = result, second
  features = kernel.dims[kernel_labels.index('o')]
  return 2 * output.size * kernel.size // features


def collective_bytes(module: Module) -> dict[str, tuple[int, int]]:
  """Number and bytes of the results of each kind of collective."""
  totals: dict[str, tuple[int, int]] = {}
  for kernel in kernels(module):
    if kernel.kind == 'collective':
      opcode = re.sub(r'(-start)?[.\d]*$', '', kernel.name)
      count, nbytes = totals.get(opcode, (0, 0))
      totals[opcode] = (count + kernel.count, nbytes + kernel.count * kernel.nbytes)
  return totals
