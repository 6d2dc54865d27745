"""TAESDV against a PyTorch twin with random weights. No published file was read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from convert import naming
from dicetalk_jax.models import parameters, registry, taesdv
from tests.models import parity, taesdv_twin

CONFIG = taesdv.TAESDVConfig(channels=8, levels=2, blocks=2)


@pytest.fixture(scope='module')
def nets():
  """Twin, and a function that decodes with ours."""
  torch.manual_seed(0)
  twin = taesdv_twin.Twin(width=8, levels=2, blocks=2)
  weights = parity.lively(twin)
  graphdef, params = parity.converted(CONFIG, taesdv.TAESDV, weights)

  @parity.jit
  def decode(z, memory):
    return parameters.merge(graphdef, params).decode(z, memory)

  return twin, decode


def latents(frames):
  z = np.random.default_rng(0).normal(size=(2, frames, 5, 4, 4))
  return np.float32(2 * z)


def test_decodes_as_the_twin_does(nets):
  """All frames at once, where the twin takes one after the other."""
  twin, decode = nets
  z = latents(3)
  with jax.default_matmul_precision('highest'):
    ours, _ = decode(z, taesdv.blank_memory(CONFIG, 2, 5, 4))
  with torch.no_grad():
    expected = twin.decode(torch.tensor(np.moveaxis(z, -1, -3)))
  expected = np.moveaxis(expected.numpy(), -3, -1)
  assert ours.shape == (2, 3, 20, 16, 3)
  assert parity.error(ours, expected) < 1e-5


def test_memory_joins_the_parts_of_a_clip(nets):
  _, decode = nets
  z = latents(6)
  blank = taesdv.blank_memory(CONFIG, 2, 5, 4)
  first, memory = decode(z[:, :3], blank)
  second, _ = decode(z[:, 3:], memory)
  alone, _ = decode(z[:, 3:], blank)
  whole = jnp.concatenate([first, second], axis=1)
  one_by_one = []
  memory = blank
  for i in range(6):
    frame, memory = decode(z[:, i : i + 1], memory)
    one_by_one.append(frame)
  np.testing.assert_allclose(whole, jnp.concatenate(one_by_one, axis=1), atol=1e-5)
  assert np.abs(second - alone).max() > 0.01


def test_the_published_file_has_these_tensors():
  """As stated by the published program: names, shapes and numbers of parameters."""
  _, target = parameters.abstract(registry.builder('taesdv', {}))
  ours = {
    naming.torch_name(name): naming.torch_shape(name, x.shape)
    for name, x in target.items()
  }
  twin = taesdv_twin.Twin()
  assert ours == {key: tuple(x.shape) for key, x in twin.state_dict().items()}
  assert ours['decoder.3.conv.0.weight'] == (64, 128, 3, 3)
  assert ours['decoder.19.weight'] == (3, 64, 3, 3)
  encoder = sum(np.prod(x) for key, x in ours.items() if key.startswith('encoder.'))
  assert encoder == 1_222_532  # as its author states for TAESD, which has the same
