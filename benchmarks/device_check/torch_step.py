"""Part `torch`: the denoising step in PyTorch, in turn with ours."""

from typing import Any

import numpy as np

from benchmarks import arithmetic, denoising_step
from benchmarks.denoising_step import make_step
from benchmarks.device_check import floors
from benchmarks.device_check.measure import GIB, compiled
from benchmarks.device_check.networks import REDUCED, fill_for
from benchmarks.device_check.parts import Context, Unavailable
from benchmarks.timing import Laps, alternate, seconds

COMPARED = (
  'PyTorch eager, SDPA, contiguous layout: the stock class of diffusers with our '
  'weights, adapters and pose guide, so nothing is missing. In temporal blocks it '
  'projects the image token for every pixel.'
)
# Relative errors (root mean square) that the rounding of each type explains.
LIMITS = {'float32': 1e-3, 'bfloat16': 0.1, 'float16': 0.1}


def run(context: Context) -> dict[str, Any]:
  """The ratio of median times, PyTorch over JAX, for each type of numbers."""
  import diffusers
  import torch

  if not context.reduced and not torch.cuda.is_available():
    raise Unavailable(f'PyTorch {torch.__version__} finds no CUDA device here')
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  torch.backends.cudnn.benchmark = True
  sizes = REDUCED if context.reduced else denoising_step.FULL
  names = ('float32',) if context.reduced else ('bfloat16', 'float16')

  step = make_step(sizes, fill_for(context))
  tflop = arithmetic.tflop(step.call, step.params, *step.inputs)
  program = compiled(step.call, step.params, *step.inputs)

  def ours():
    return program.call(step.params, *step.inputs).block_until_ready()

  expected = np.asarray(ours(), np.float32)
  facts = {
    'compared': COMPARED,
    'torch': torch.__version__,
    'diffusers': diffusers.__version__,
    'jax_dtype': step.params['conv_in.kernel'].dtype.name,
  }
  for name in names:
    facts[name] = against_torch(
      context, sizes.config, step, ours, tflop, expected, device, name
    )
    context.save(facts)
  ratios = ', '.join(f'{name} {facts[name]["ratio"]:.2f}' for name in names)
  wrong = [name for name in names if not facts[name]['relative_error'] <= LIMITS[name]]
  if wrong:
    raise ArithmeticError(
      f'the outputs of JAX and PyTorch differ in {", ".join(wrong)}'
    )
  return facts | {'summary': f'PyTorch takes this many times as long: {ratios}'}


def against_torch(
  context, config, step, ours, tflop, expected, device, name
) -> dict[str, Any]:
  """Both steps in turn, with PyTorch in type `name`."""
  import torch
  from torch.utils.flop_counter import FlopCounterMode

  from benchmarks.device_check.torch_twin import Twin

  twin = Twin(config, step, device, getattr(torch, name))
  wait = torch.cuda.synchronize if device == 'cuda' else lambda: None

  def theirs():
    twin()
    wait()

  error = twin.prediction() - expected
  with FlopCounterMode(display=False) as counter:
    twin()
  first = seconds(theirs)
  repeats = 5 if context.reduced else 15
  jax_seconds, torch_seconds = alternate(ours, theirs, repeats)
  measured = floors.here(context.out)
  both = {
    key: floors.against(count, Laps(median, median, median), measured)
    for key, count, median in (
      ('jax', tflop, jax_seconds),
      ('torch', counter.get_total_flops() / 1e12, torch_seconds),
    )
  }
  facts = both | {
    'ratio': torch_seconds / jax_seconds,
    'repeats': repeats,
    'torch_warm_up_seconds': first,
    'relative_error': float(np.sqrt(np.mean(error**2)) / expected.std()),
  }
  if device == 'cuda':
    facts['torch_peak_gib'] = torch.cuda.max_memory_allocated() / GIB
  return facts
