"""Programs of the published sizes, lowered for a platform, and what they consist of."""

import collections
import re
from typing import Any

import jax

from benchmarks import abstract_programs
from benchmarks.abstract_programs import Program, Shape
from dicetalk_jax.pipeline import Pipeline

CUDNN = '__cudnn$fmhaSoftmax'
CUDNN_BACKWARD = '__cudnn$fmhaSoftmaxBackward'
TRITON = '__gpu$xla.gpu.triton'
ACCELERATORS = ('cuda', 'tpu')


class Lowered(abstract_programs.Stages):
  """Lowers the stages of a pipeline one after the other, each as it is called.

  Attributes:
    text: StableHLO by name of the stage.
  """

  def __init__(self, pipe: Pipeline, platform: str):
    super().__init__(pipe)
    self.platform = platform
    self.text: dict[str, str] = {}

  def shapes(self, name: str, program: Program) -> Any:
    self.text[name], shapes = program.lower(self.platform)
    return jax.tree.map(lambda x: Shape(x.shape, x.dtype), shapes)


def custom_calls(program: str) -> collections.Counter[str]:
  """How often a program calls what is not StableHLO."""
  return collections.Counter(re.findall(r'stablehlo\.custom_call @([\w$.]+)', program))


def fused_lengths(program: str) -> collections.Counter[tuple[int, int]]:
  """How often cuDNN attends from how many queries to how many keys, either way."""
  calls = re.findall(
    r'@__cudnn\$fmha\w+\(.*: \(tensor<\d+x(\d+)x.*?>, tensor<\d+x(\d+)x', program
  )
  return collections.Counter((int(t), int(s)) for t, s in calls)


def _operands(program: str) -> list[set[str]]:
  """The types of what each product and convolution takes."""
  products = re.findall(
    r'stablehlo\.(?:convolution|dot_general).* : \((.*)\) ->', program
  )
  return [
    set(re.findall(r'(\w+)>', re.sub(r'<(?:\d+x)*', '<', types))) for types in products
  ]


def number_of_products(program: str) -> int:
  """Products and convolutions of a program."""
  return len(_operands(program))


def share_of_products(program: str, types: set[str]) -> float:
  """The share of products and convolutions whose operands have these types."""
  operands = _operands(program)
  return operands.count(types) / len(operands)
