"""RIFE: warping and transposed convolution against PyTorch,
doubling of clips.

The recorded numbers are in `tests/convert/test_verify.py`.
"""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from convert import naming
from dicetalk_jax.models import parameters, rife
from tests.models import parity


@pytest.fixture(autouse=True)
def exact():
  with jax.default_matmul_precision('highest'):
    yield


@pytest.fixture(scope='module')
def net():
  """A small network and its parameters."""
  graphdef, target = parity.abstract(rife.RIFEConfig(c=8), rife.IFNet)
  return graphdef, parameters.numpy_params(target)


@pytest.fixture(scope='module')
def double(net):
  """Clips [N,H,W,3] to [2N-1,H,W,3], two pairs at a time."""
  graphdef, params = net
  call = parity.jit(
    lambda params, frames: rife.double(
      parameters.merge(graphdef, params), frames, pairs=2
    )
  )
  return lambda frames: call(params, frames)


@pytest.fixture(scope='module')
def clip():
  """Four frames of a drifting pattern, float32 [4,64,48,3] in [0,1]."""
  t, y, x, c = np.meshgrid(*map(np.arange, (4, 64, 48, 3)), indexing='ij')
  pattern = 0.5 + 0.5 * np.sin(0.2 * (x + 2 * t) + 0.1 * (y - 3 * t) + c)
  return jnp.asarray(pattern, jnp.float32)


def test_doubles(net, double, clip):
  """New frames lie between the given ones; the number of pairs per call is free."""
  graphdef, params = net
  doubled = double(clip)
  between = parity.jit(
    lambda params, *pair: parameters.merge(graphdef, params)(*pair)[-1].frame
  )(params, clip[:-1], clip[1:])
  assert doubled.shape == (7, 64, 48, 3)
  np.testing.assert_array_equal(doubled[::2], clip)
  np.testing.assert_allclose(doubled[1::2], between, atol=1e-6)


def test_sizes_that_do_not_fit_are_extended(net, double, clip):
  """As if the border had been repeated before."""
  frames = clip[:3, :52, :40]
  extended = jnp.pad(frames, ((0, 0), (0, 12), (0, 8), (0, 0)), mode='edge')
  assert double(frames).shape == (5, 52, 40, 3)
  np.testing.assert_allclose(double(frames), double(extended)[:, :52, :40], atol=1e-6)
  with pytest.raises(ValueError, match='multiples of 16'):
    jax.eval_shape(
      lambda params, x: parameters.merge(net[0], params)(x, x), net[1], frames
    )


def test_time_may_run_backwards(double, clip):
  """Both directions are averaged, so reversing and doubling commute."""
  np.testing.assert_allclose(double(clip[::-1])[::-1], double(clip), atol=1e-5)


@pytest.mark.parametrize('size', [0.3, 3.0, 30.0])
def test_warp_live(size):
  """Within a pixel, over several, and far beyond the border; with gradients."""
  rng = np.random.default_rng(0)
  image, weight = (rng.normal(size=(2, 9, 12, 3)).astype(np.float32) for _ in range(2))
  flow = (size * rng.normal(size=(2, 9, 12, 2))).astype(np.float32)

  def twin(image, flow):
    y, x = torch.meshgrid(
      torch.linspace(-1, 1, 9), torch.linspace(-1, 1, 12), indexing='ij'
    )
    grid = torch.stack([x + flow[..., 0] / (11 / 2), y + flow[..., 1] / (8 / 2)], -1)
    return torch.nn.functional.grid_sample(
      image.movedim(-1, 1),
      grid,
      mode='bilinear',
      padding_mode='border',
      align_corners=True,
    ).movedim(1, -1)

  inputs = [torch.tensor(x, requires_grad=True) for x in (image, flow)]
  expected = twin(*inputs)
  (expected * torch.tensor(weight)).sum().backward()
  actual, pull = jax.vjp(rife.warp, image, flow)
  np.testing.assert_allclose(actual, expected.detach(), atol=1e-4)
  for grad, x in zip(pull(weight), inputs):
    np.testing.assert_allclose(grad, x.grad, atol=1e-4)


@pytest.mark.parametrize('factor', [0.25, 0.5, 2, 4])
def test_resize_live(factor):
  x = np.random.default_rng(0).normal(size=(2, 8, 12, 3)).astype(np.float32)
  expected = torch.nn.functional.interpolate(
    torch.tensor(x).movedim(-1, 1),
    scale_factor=factor,
    mode='bilinear',
    align_corners=False,
  ).movedim(1, -1)
  np.testing.assert_allclose(rife.resize(jnp.asarray(x), factor), expected, atol=1e-5)


def test_transposed_convolution_and_rectifier_live():
  """With their parameters through the naming rule."""

  class Net(nnx.Module):
    def __init__(self, *, rngs):
      self.layers = nnx.List([rife._deconv(3, 5, rngs=rngs), rife.PReLU(5)])

  stock = torch.nn.Sequential(
    torch.nn.ConvTranspose2d(3, 5, 4, 2, 1), torch.nn.PReLU(5)
  )
  state_dict = {f'layers.{k}': x for k, x in parity.lively(stock).items()}
  graphdef, target = parameters.abstract(lambda rngs: Net(rngs=rngs))
  params = naming.from_torch(target, state_dict)
  net = parameters.merge(graphdef, {k: jnp.asarray(x) for k, x in params.items()})
  x = np.random.default_rng(0).normal(size=(2, 6, 7, 3)).astype(np.float32)
  with torch.no_grad():
    expected = stock(torch.tensor(x).movedim(-1, 1)).movedim(1, -1)
  np.testing.assert_allclose(
    rife._chain(net.layers, jnp.asarray(x)), expected, atol=1e-5
  )
  for key, value in naming.to_torch(params).items():
    np.testing.assert_array_equal(value, state_dict[key], err_msg=key)
