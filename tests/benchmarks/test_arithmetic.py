"""The count of operations: of single functions by hand, and of the full-size step."""

import functools
from unittest import mock

import jax
from jax import lax
import jax.numpy as jnp
import pytest

from benchmarks import arithmetic
from benchmarks.denoising_step import FULL, PUBLISHED_TFLOP, STEP_TFLOP, make_inputs
from dicetalk_jax.models import parameters
from dicetalk_jax.models.unet import UNet


def operations(function, *shapes, dtype=jnp.float32):
  """The operations of a function of arrays with these shapes."""
  arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
  return 1e12 * arithmetic.tflop(function, *arrays)


def test_products_count_two_operations_for_each_multiply_add():
  def batched(a, b):
    return jnp.einsum('bij,bjk->bik', a, b)

  @jax.jit
  def product_and_sum(a, b):
    return (a @ b) + 1

  assert operations(jnp.matmul, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
  assert operations(product_and_sum, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
  assert operations(batched, (4, 3, 5), (4, 5, 7)) == 4 * 2 * 3 * 5 * 7


def test_convolutions_count_their_kernels():
  def convolve(x, kernel, groups=1):
    return lax.conv_general_dilated(
      x,
      kernel,
      (1, 1),
      'SAME',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      feature_group_count=groups,
    )

  grouped = functools.partial(convolve, groups=2)
  outputs = 2 * 4 * 4 * 8
  assert operations(convolve, (2, 4, 4, 6), (3, 3, 6, 8)) == 2 * outputs * 9 * 6
  assert operations(grouped, (2, 4, 4, 6), (3, 3, 3, 8)) == 2 * outputs * 9 * 3


def test_loops_branches_and_recomputation_count():
  def square(x):
    return x @ x

  def five_squares(x):
    return lax.fori_loop(0, 5, lambda i, y: square(y), x)

  def square_or_nothing(x):
    return lax.cond(x[0, 0] > 0, square, lambda x: x, x)

  def square_until_large(x):
    return lax.while_loop(lambda y: y[0, 0] < 1, square, x)

  def loss(x):
    return jnp.sum(jnp.sin(jnp.sin(x @ x) @ x))

  one = 2 * 4**3
  assert operations(five_squares, (4, 4)) == 5 * one
  assert operations(square_or_nothing, (4, 4)) == one
  assert operations(jax.grad(loss), (4, 4)) == 6 * one
  assert operations(jax.grad(jax.checkpoint(loss)), (4, 4)) == 8 * one
  with pytest.raises(ValueError, match='unknown length'):
    operations(square_until_large, (4, 4))


def test_fused_attention_of_a_gpu_counts_as_the_plain_one():
  from jax._src.cudnn import fused_attention_stablehlo as fused

  qkv = [(2, 32, 4, 8), (2, 16, 4, 8), (2, 16, 4, 8)]
  product = 2 * (2 * 4 * 32 * 16 * 8)

  def count(implementation):
    """Operations of attention, and of attention with its gradient."""
    attend = functools.partial(
      jax.nn.dot_product_attention, implementation=implementation
    )
    gradient = jax.grad(lambda *qkv: attend(*qkv).sum(), argnums=(0, 1, 2))
    return [operations(f, *qkv, dtype=jnp.bfloat16) for f in (attend, gradient)]

  plain, plain_both = count('xla')
  with mock.patch.object(fused, 'check_cudnn_version', lambda: 91000):
    forward, both = count('cudnn')
  assert forward == plain == 2 * product
  assert plain_both == 6 * product  # keeps the probabilities
  assert both == 7 * product  # computes them again


def test_full_size_step_is_the_stated_arithmetic():
  build = functools.partial(UNet, FULL.config, dtype=FULL.dtype)
  graphdef, params = parameters.abstract(build)
  inputs, _ = jax.eval_shape(lambda p: make_inputs(graphdef, p, FULL), params)

  def step(params, *inputs):
    prediction, *_ = parameters.merge(graphdef, params)(*inputs)
    return prediction

  counted = arithmetic.tflop(step, params, *inputs)
  assert counted == pytest.approx(STEP_TFLOP, rel=0.005)
  assert counted < PUBLISHED_TFLOP
