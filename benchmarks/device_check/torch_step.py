"""Part `torch`: the denoising step in PyTorch, in turn with ours."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from benchmarks import arithmetic, denoising_step
from benchmarks.denoising_step import Sizes, Step, make_step
from benchmarks.device_check import floors
from benchmarks.device_check.failures import Unavailable
from benchmarks.device_check.measure import GIB, compile_program
from benchmarks.device_check.networks import REDUCED, fill_for
from benchmarks.device_check.parts import Context, Result
from benchmarks.timing import Laps, alternate, seconds

COMPARED = (
  'PyTorch eager, SDPA, contiguous layout: the stock class of diffusers with our '
  'weights, adapters and pose guide, so nothing is missing. In temporal blocks it '
  'projects the image token for every pixel.'
)
# Relative errors (root mean square) that the rounding of each type explains.
LIMITS = {'float32': 1e-3, 'bfloat16': 0.1, 'float16': 0.1}


class OurStep(NamedTuple):
  """The step in JAX: compiled, with its arithmetic and its output.

  Attributes:
    sizes: of the step.
    step: parameters and inputs, which PyTorch gets too.
    call: evaluates it once, and waits for the result.
    tflop: its arithmetic in 1e12 operations.
    output: `[rows, frames, side, side, channels]` in float32.
  """

  sizes: Sizes
  step: Step
  call: Callable[[], jax.Array]
  tflop: float
  output: np.ndarray


def compare_with_torch(context: Context) -> Result:
  """The ratio of median times, PyTorch over JAX, for each type of numbers."""
  import diffusers
  import torch

  if not context.reduced and not torch.cuda.is_available():
    raise Unavailable(f'PyTorch {torch.__version__} finds no CUDA device here')
  torch.backends.cudnn.benchmark = True

  ours = our_step(context)
  facts: Result = {
    'compared': COMPARED,
    'torch': torch.__version__,
    'diffusers': diffusers.__version__,
    'jax_dtype': ours.step.params['conv_in.kernel'].dtype.name,
  }
  dtypes = ('float32',) if context.reduced else ('bfloat16', 'float16')
  for dtype in dtypes:
    facts[dtype] = compare_dtype(context, ours, dtype)
    context.save(facts)

  wrong = [
    dtype
    for dtype in dtypes
    if not facts[dtype]['relative_error'] <= LIMITS[dtype]  # NaN is wrong too
  ]
  if wrong:
    raise ArithmeticError(
      f'the outputs of JAX and PyTorch differ in {", ".join(wrong)}'
    )
  ratios = ', '.join(f'{dtype} {facts[dtype]["ratio"]:.2f}' for dtype in dtypes)
  return facts | {'summary': f'PyTorch takes this many times as long: {ratios}'}


def our_step(context: Context) -> OurStep:
  """Compiles the step, and evaluates it once."""
  sizes = REDUCED if context.reduced else denoising_step.FULL
  step = make_step(sizes, fill_for(context))
  tflop = arithmetic.tflop(step.call, step.params, *step.inputs)
  program = compile_program(step.call, step.params, *step.inputs)

  def call():
    return program.call(step.params, *step.inputs).block_until_ready()

  return OurStep(sizes, step, call, tflop, np.asarray(call(), np.float32))


def compare_dtype(context: Context, ours: OurStep, dtype: str) -> Result:
  """Both steps in turn, with PyTorch in type `dtype`."""
  import torch
  from torch.utils.flop_counter import FlopCounterMode

  from benchmarks.device_check.torch_twin import Twin

  on_cuda = torch.cuda.is_available()
  device = 'cuda' if on_cuda else 'cpu'
  twin = Twin(ours.sizes.config, ours.step, device, getattr(torch, dtype))

  # 1. Compare the outputs, count the arithmetic
  error = twin.prediction() - ours.output
  with FlopCounterMode(display=False) as counter:
    twin()
  torch_tflop = counter.get_total_flops() / 1e12

  # 2. Measure
  def torch_call():
    twin()
    if on_cuda:
      torch.cuda.synchronize()

  warm_up = seconds(torch_call)
  repeats = 5 if context.reduced else 15
  jax_seconds, torch_seconds = alternate(ours.call, torch_call, repeats)

  # 3. Describe
  rates = floors.measured_rates(context.out)

  def times(tflop: float, median: float) -> Result:
    return floors.compare_with_floors(tflop, Laps(median, median, median), rates)

  facts: Result = {
    'jax': times(ours.tflop, jax_seconds),
    'torch': times(torch_tflop, torch_seconds),
    'ratio': torch_seconds / jax_seconds,
    'repeats': repeats,
    'torch_warm_up_seconds': warm_up,
    'relative_error': float(np.sqrt(np.mean(error**2)) / ours.output.std()),
  }
  if on_cuda:
    facts['torch_peak_gib'] = torch.cuda.max_memory_allocated() / GIB
  return facts
