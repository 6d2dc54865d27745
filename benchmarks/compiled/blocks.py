"""A program by its blocks: each distinct one is compiled once.

For programs that take too long to compile as a whole. What is between the blocks, such
as the sum of guidance branches or the optimizer, is left out; so is what the compiler
would join across them.
"""

import collections
from collections.abc import Callable, Iterator
import contextlib
import dataclasses
from typing import Any

from flax import nnx
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.abstract_programs import Program, Shape
from dicetalk_jax.models import target, vae
from dicetalk_jax.models.layers import GroupNorm
from dicetalk_jax.models.resnet import Downsample, SpatioTemporalResBlock, Upsample
from dicetalk_jax.models.transformer import SpatioTemporalTransformer

# The largest modules are blocks; what is inside them is not looked at.
BLOCKS = (
  SpatioTemporalTransformer,
  SpatioTemporalResBlock,
  Downsample,
  Upsample,
  vae.Attention,
  nnx.Conv,
  GroupNorm,
)


@dataclasses.dataclass(frozen=True)
class Block:
  """A block as it is called: its structure, and shapes of parameters and arguments."""

  name: str
  graphdef: Any
  params: Any
  args: Any

  @property
  def key(self) -> str:
    """Equal for blocks that compile to the same."""
    leaves = jax.tree.leaves((self.params, self.args))
    return f'{self.name} {[(x.shape, str(x.dtype)) for x in leaves]}'

  def run(self, params: Any, args: Any) -> Any:
    """Applies the block."""
    positional, named = args
    return nnx.merge(self.graphdef, params)(*positional, **named)


def count_blocks(program: Program, platform: str) -> list[tuple[Block, int]]:
  """The distinct blocks of a program, and how often it calls each."""
  found: list[Block] = []
  jax.clear_caches()  # what has been traced before would not be called again
  with program.context(), target.compiling_for(platform), _recorded(found):
    jax.eval_shape(program.run.__wrapped__, *program.args)
  counts = collections.Counter(block.key for block in found)
  distinct = {block.key: block for block in found}
  return [(block, counts[key]) for key, block in distinct.items()]


@contextlib.contextmanager
def _recorded(found: list[Block]) -> Iterator[None]:
  """Notes every call of a block that is not inside another one."""
  inside = False

  def recording(original: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **named: Any) -> Any:
      nonlocal inside
      if inside:
        return original(self, *args, **named)
      graphdef, params = nnx.split(self)
      shapes = jax.tree.map(lambda x: Shape(x.shape, x.dtype), (params, (args, named)))
      found.append(Block(type(self).__name__, graphdef, *shapes))
      inside = True
      try:
        return original(self, *args, **named)
      finally:
        inside = False

    return call

  originals = {block: block.__call__ for block in BLOCKS}
  for block, original in originals.items():
    block.__call__ = recording(original)
  try:
    yield
  finally:
    for block, original in originals.items():
      block.__call__ = original


def block_program(block: Block, mesh: Mesh, *, training: bool) -> Program:
  """A block alone: forward, or all that it does in a training step.

  In training, the backward pass computes the block again, as with `remat='block'`.
  """
  everywhere = NamedSharding(mesh, PartitionSpec())
  params, args = jax.tree.map(
    lambda x: Shape(x.shape, x.dtype, sharding=everywhere), (block.params, block.args)
  )

  def step(params: Any, args: Any, gradient: Any) -> Any:
    _, pullback = jax.vjp(jax.checkpoint(block.run), params, args)
    return pullback(gradient)

  options = target.compiler_options()
  if not training:
    run = jax.jit(block.run, compiler_options=options)
    return Program(run, (params, args), mesh)
  gradient = jax.eval_shape(block.run, params, args)
  run = jax.jit(step, compiler_options=options)
  return Program(run, (params, args, gradient), mesh)
