"""Residual blocks: both forms of the temporal convolution, and the reach of norms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dicetalk_jax.models import parameters, registry, target
from dicetalk_jax.models.resnet import (
  Blend,
  SpatioTemporalResBlock,
  TemporalConv,
  Upsample,
  as_convolution,
  as_product,
  upsample_transposed,
)
from tests import tiny


def draw(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize('form', [as_convolution, as_product])
def test_temporal_convolution_agrees_with_torch(form):
  x, kernel, weight = draw(0, 2, 4, 6, 5), draw(1, 3, 5, 7), draw(2, 2, 4, 6, 7)
  grads = jax.jit(
    jax.grad(lambda x, kernel: jnp.sum(form(x, kernel) * weight), argnums=(0, 1))
  )(x, kernel)
  torch_x, torch_kernel = (torch.tensor(v, requires_grad=True) for v in (x, kernel))
  y = torch.nn.functional.conv3d(
    torch_x.permute(0, 3, 1, 2)[..., None],
    torch_kernel.permute(2, 1, 0)[..., None, None],
    padding=(1, 0, 0),
  )
  y = y[..., 0].permute(0, 2, 3, 1)
  (y * torch.tensor(weight)).sum().backward()
  y_ours = jax.jit(form)(x, kernel)
  np.testing.assert_allclose(y_ours, y.detach(), rtol=0, atol=1e-5)
  np.testing.assert_allclose(grads[0], torch_x.grad, rtol=0, atol=1e-5)
  np.testing.assert_allclose(grads[1], torch_kernel.grad, rtol=0, atol=3e-5)


def test_temporal_convolution_mixes_frames_of_a_pixel_only():
  graphdef, target = parameters.abstract(lambda rngs: TemporalConv(4, 4, rngs=rngs))
  convolve = jax.jit(parameters.merge(graphdef, parameters.numpy_params(target)))
  x = draw(0, 1, 5, 2, 3, 4)
  moved = x.copy()
  moved[0, 3, 1, 2] += 1
  changed = np.any(convolve(x) != convolve(moved), axis=-1)
  assert {tuple(i) for i in np.argwhere(changed)} == {(0, f, 1, 2) for f in (2, 3, 4)}


def test_blend_directions():
  spatial, temporal = jnp.ones(1), jnp.zeros(1)
  s = 1 / (1 + np.exp(-0.5))
  np.testing.assert_allclose(Blend(0.5)(spatial, temporal), s, rtol=1e-6)
  np.testing.assert_allclose(
    Blend(0.5, switched=True)(spatial, temporal), 1 - s, rtol=1e-6
  )


def test_upsampling_agrees_with_torch_in_both_forms():
  x, kernel, weight = draw(0, 2, 5, 7, 6), draw(1, 3, 3, 6, 4), draw(2, 2, 10, 14, 4)

  def repeated(x, kernel):
    return jax.lax.conv_general_dilated(
      x.repeat(2, axis=1).repeat(2, axis=2),
      kernel,
      (1, 1),
      ((1, 1), (1, 1)),
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )

  torch_x, torch_kernel = (torch.tensor(v, requires_grad=True) for v in (x, kernel))
  y = torch.nn.functional.conv2d(
    torch.nn.functional.interpolate(torch_x.permute(0, 3, 1, 2), scale_factor=2),
    torch_kernel.permute(3, 2, 0, 1),
    padding=1,
  ).permute(0, 2, 3, 1)
  (y * torch.tensor(weight)).sum().backward()
  for form in (repeated, upsample_transposed):
    ours = jax.jit(form)(x, kernel)
    np.testing.assert_allclose(ours, y.detach(), rtol=0, atol=2e-5)
    _, pullback = jax.vjp(form, x, kernel)
    grads = pullback(jnp.asarray(weight))
    np.testing.assert_allclose(grads[0], torch_x.grad, rtol=0, atol=3e-5)
    np.testing.assert_allclose(grads[1], torch_kernel.grad, rtol=0, atol=1e-4)


def test_upsampling_for_nvidia_is_one_transposed_convolution():
  graphdef, params = parameters.abstract(lambda rngs: Upsample(4, rngs=rngs))
  x = jax.ShapeDtypeStruct((1, 2, 8, 8, 4), jnp.float32)

  def upsample(params, x):
    return parameters.merge(graphdef, params)(x)

  dilation = {}
  for platform in ('cpu', 'cuda', 'tpu'):
    with target.compiling_for(platform):
      traced = jax.jit(upsample).trace(params, x)
    (convolution,) = [
      e for e in traced.jaxpr.eqns if e.primitive.name == 'conv_general_dilated'
    ]
    dilation[platform] = convolution.params['lhs_dilation']
  assert dilation == {'cpu': (1, 1), 'cuda': (2, 2), 'tpu': (1, 1)}


@pytest.mark.parametrize('switched', [False, True])
def test_the_last_convolution_blends(switched):
  """The block is the blend of its spatial part and the whole temporal part on it."""
  graphdef, shapes = parameters.abstract(
    lambda rngs: SpatioTemporalResBlock(4, 4, groups=2, switched=switched, rngs=rngs)
  )
  block = parameters.merge(graphdef, parameters.numpy_params(shapes))
  x = jnp.asarray(draw(0, 2, 3, 4, 4, 4))
  spatial = block.spatial_res_block(x.reshape(6, 4, 4, 4)).reshape(x.shape)
  expected = block.time_mixer(spatial, block.temporal_res_block(spatial))
  np.testing.assert_allclose(block(x), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize('platform', ['cpu', 'cuda'])
def test_the_form_for_nvidia_computes_the_same(platform):
  graphdef, shapes = parameters.abstract(
    lambda rngs: SpatioTemporalResBlock(4, 4, groups=2, temb_channels=6, rngs=rngs)
  )
  block = parameters.merge(graphdef, parameters.numpy_params(shapes))
  x, temb = jnp.asarray(draw(0, 2, 3, 4, 4, 4)), jnp.asarray(draw(1, 2, 6))
  with target.compiling_for(platform):
    ours = jax.jit(block)(x, temb)
  np.testing.assert_allclose(ours, block(x, temb), rtol=0, atol=2e-5)


def test_rows_are_independent_and_frames_are_not():
  """A change stays in its row, but reaches all its frames.

  Spatial statistics are per frame, temporal ones per row.
  """
  graphdef, target = parameters.abstract(
    lambda rngs: SpatioTemporalResBlock(8, 16, groups=4, temb_channels=6, rngs=rngs)
  )
  block = jax.jit(parameters.merge(graphdef, parameters.numpy_params(target)))
  x, temb = draw(0, 2, 6, 4, 4, 8), draw(1, 2, 6)
  moved = x.copy()
  moved[1, 0] *= 2
  changed = np.abs(block(x, temb) - block(moved, temb)).max((2, 3, 4))
  assert not changed[0].any()
  assert (changed[1] > 0).all()
  shifted = np.abs(
    block(x, temb) - block(x, temb + np.array([[0], [1]], np.float32))
  ).max((2, 3, 4))
  assert not shifted[0].any() and (shifted[1] > 0).all()


def test_no_parameter_has_a_weak_type():
  """It would be lost in the first step, and training would compile a second time."""
  for name, config in tiny.CONFIGS.items():
    target = parameters.abstract(registry.builder(name, config))[1]
    assert not [key for key, x in target.items() if x.weak_type], name
