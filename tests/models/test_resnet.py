"""Residual blocks: both forms of the temporal convolution, and the reach of norms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dicetalk_jax.models import parameters, registry
from dicetalk_jax.models.resnet import (
  Blend,
  SpatioTemporalResBlock,
  TemporalConv,
  as_convolution,
  as_product,
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
