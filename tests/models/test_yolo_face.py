"""The face detector of the reference implementation, against a PyTorch twin."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from convert import face_detector, naming, torch_files
from dicetalk_jax.models import parameters
from dicetalk_jax.models.yolo_face import YoloFace, YoloFaceConfig, forward
from tests.models import parity, yolo_twin
from tests.models.yolo_twin import TINY, grids, random_net

LIMIT = 2e-5  # as the goldens


def converted(net):
  """Structure and parameters of our network with the twin's weights."""
  state = {
    key: torch_files.to_numpy(x)
    for key, x in face_detector.fold(net.state_dict()).items()
    if not key.endswith(('anchors', 'anchor_grid', 'num_batches_tracked'))
  }
  return parity.converted(TINY, YoloFace, state)


@pytest.fixture(scope='module')
def nets():
  net = random_net()
  graphdef, params = converted(net)
  run = parity.jit(
    lambda params, image, sizes: forward(
      parameters.merge(graphdef, params), image, sizes
    )
  )
  return net, run, params


def test_the_published_tree():
  """All names and shapes of the fused file, at full size, without computing."""
  graphdef, target = parity.abstract(YoloFaceConfig(), YoloFace)
  del graphdef
  assert sum(np.prod(x.shape) for x in target.values()) == 21_044_232
  assert len(target) == 176
  assert naming.torch_shape(
    'model.23.m.2.kernel', target['model.23.m.2.kernel'].shape
  ) == (48, 768, 1, 1)


def test_rows_equal_those_of_the_twin(nets):
  net, run, params = nets
  image = np.random.default_rng(0).random((2, 64, 96, 3), np.float32)
  with torch.no_grad():
    expected = net(torch.from_numpy(image).permute(0, 3, 1, 2), grids(64, 96))
  sizes = np.full((2, 2), (64, 96))
  assert parity.error(run(params, image, sizes), expected) < LIMIT


def test_an_image_in_a_larger_array_gets_the_rows_that_it_has_alone(nets):
  """So that few programs serve all sizes; with noise where there is no image."""
  net, run, params = nets
  image = np.random.default_rng(1).random((2, 64, 96, 3), np.float32)
  rows = run(params, image, np.array([[64, 64], [32, 96]]))
  for i, (height, width) in enumerate([(64, 64), (32, 96)]):
    part = torch.from_numpy(image[i : i + 1, :height, :width]).permute(0, 3, 1, 2)
    with torch.no_grad():
      expected = net(part, grids(height, width))[0]
    inside = np.concatenate(
      [
        np.tile(
          (np.indices((64 // s, 96 // s)) < np.reshape([height, width], (2, 1, 1)) // s)
          .all(0)
          .ravel(),
          3,
        )
        for s in (8, 16, 32)
      ]
    )
    assert parity.error(rows[i][inside], expected) < LIMIT


def test_gradients_equal_those_of_the_twin():
  net = random_net(fused=True)
  graphdef, params = converted(net)
  image = np.random.default_rng(2).random((1, 32, 64, 3), np.float32)
  out = net(torch.from_numpy(image).permute(0, 3, 1, 2), grids(32, 64))
  weight = np.random.default_rng(3).normal(size=out.shape).astype(np.float32)
  (out * torch.from_numpy(weight)).sum().backward()

  def loss(params):
    rows = forward(parameters.merge(graphdef, params), jnp.asarray(image))
    return (rows * weight).sum()

  params = {name: jnp.asarray(x) for name, x in params.items()}
  gradients = naming.to_torch(parity.jit(jax.grad(loss))(params))
  for name, x in net.named_parameters():
    assert parity.error(gradients[name], x.grad) < 1e-3, name


def test_the_twin_has_the_names_of_the_specification():
  names = functools.reduce(set.union, ({*random_net(f).state_dict()} for f in (0, 1)))
  assert 'model.1.m.0.cv2.bn.running_var' in names
  assert 'model.0.stem_2b.conv.bias' in names
  assert 'model.23.m.1.bias' in names
  assert yolo_twin.EPSILON == face_detector.EPSILON
