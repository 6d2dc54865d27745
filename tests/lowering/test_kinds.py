"""How many operations of each kind a small denoising step has, platform by platform.

A pass over memory that is added by mistake shows here; what it costs,
`benchmarks.compiled` shows. Whoever means to change a number changes it here.
"""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import pytest

from benchmarks import denoising_step
from benchmarks.abstract_programs import Program
from benchmarks.denoising_step import Sizes, as_dtype
from benchmarks.device_check.networks import SMALL_UNET
from dicetalk_jax.models import parameters, target
from dicetalk_jax.models.unet import UNet

SIZES = Sizes(SMALL_UNET, rows=3, frames=25, side=16, dtype=jnp.bfloat16)
KINDS = {
  # cuDNN attends; upsampling and temporal layers are convolutions.
  'cuda': dict(
    convolution=41, dot_general=108, reduce=224, transpose=32, custom_call=24
  ),
  'tpu': dict(
    convolution=41, dot_general=156, reduce=272, transpose=104, custom_call=0
  ),
  # Temporal convolutions are products.
  'cpu': dict(
    convolution=25, dot_general=172, reduce=272, transpose=104, custom_call=0
  ),
}


@pytest.mark.parametrize('platform', KINDS)
def test_no_operation_is_added_unseen(platform):
  build = functools.partial(UNet, SIZES.config, dtype=SIZES.dtype)
  graphdef, shapes = parameters.abstract(build)
  params = as_dtype(shapes, SIZES.dtype)

  def make_inputs(params):
    inputs, _ = denoising_step.make_inputs(graphdef, params, SIZES)
    return inputs

  def denoise(params, *inputs):
    prediction, _ = parameters.merge(graphdef, params)(*inputs)
    return prediction

  with target.compiling_for(platform):
    inputs = jax.eval_shape(make_inputs, params)
  text, _ = Program(jax.jit(denoise), (params, *inputs)).lower(platform)
  counted = collections.Counter(re.findall(r'stablehlo\.(\w+)', text))
  assert {kind: counted[kind] for kind in KINDS[platform]} == KINDS[platform]
