"""The encoder of face crops: frames do not mix, chunks of time change nothing, and
every parameter learns.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dicetalk_jax.errors import ConfigError
from dicetalk_jax.models import crop_encoder, parameters
from dicetalk_jax.models.crop_encoder import CropEncoder
from dicetalk_jax.models.embedder import Embedder, EmbedderConfig
from tests import tiny

CONFIG = EmbedderConfig(
  visual='crops',
  crop_size=8,
  crop_channels=(4, 12),
  whisper_dim=5,
  whisper_states=3,
  width=16,
  heads=4,
  mlp_dim=24,
  visual_layers=0,
  audio_layers=0,
  fusion_layers=1,
  dropout=0.0,
  max_len=12,
)
B, N = 3, 7


@pytest.fixture(scope='module', autouse=True)
def quick_compilation():
  with tiny.quick_compilation():
    yield


def encoder():
  graphdef, target = parameters.abstract(
    lambda rngs: CropEncoder(CONFIG.crop_channels, rngs=rngs)
  )
  return graphdef, parameters.numpy_params(target)


def random_crops(seed=0):
  return np.random.default_rng(seed).integers(0, 256, (B, N, 8, 8, 3), np.uint8)


def test_every_frame_is_encoded_by_itself():
  graphdef, params = encoder()
  encode = jax.jit(lambda crops: parameters.merge(graphdef, params)(crops))
  crops = random_crops()
  features = encode(crops)
  assert features.shape == (B, N, 12) and features.dtype == jnp.float32
  # A copy: JAX may not have read the first crops yet.
  other = crops.copy()
  other[1, 2] = 255 - crops[1, 2]
  changed = np.abs(encode(other) - features).max(axis=-1) > 1e-6
  assert changed[1, 2] and changed.sum() == 1


def test_chunks_of_time_change_nothing(monkeypatch):
  """Neither features nor gradients; 7 frames are 3 chunks of 3, the last one padded."""
  graphdef, params = encoder()
  weights = np.random.default_rng(1).normal(size=(B, N, 12))
  crops = jnp.asarray(random_crops())

  def run():
    def loss(params):
      features = parameters.merge(graphdef, params)(crops)
      return (features * weights).sum()

    return jax.jit(jax.value_and_grad(loss))(params)

  value, grads = run()
  monkeypatch.setattr(crop_encoder, 'TIME_CHUNK', 3)
  other, others = run()
  np.testing.assert_allclose(other, value, rtol=1e-5)
  for name, grad in grads.items():
    np.testing.assert_allclose(others[name], grad, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.fixture(scope='module')
def embed():
  """`embed(crops, mask, has_video)`: gradients, and the prior's mean and variance.

  The gradients are those of a number that depends on all of them.
  """
  graphdef, target = parameters.abstract(lambda rngs: Embedder(CONFIG, rngs=rngs))
  params = parameters.numpy_params(target)
  whisper = np.random.default_rng(2).normal(size=(B, 2 * N, 3, 5))
  whisper = jnp.asarray(whisper, jnp.float32)
  weights = np.random.default_rng(3).normal(size=(2, B, 16))

  def loss(params, *batch):
    mu, var = parameters.merge(graphdef, params)(
      batch[0], whisper, *batch[1:], jnp.ones(B, bool)
    )
    return sum((w * x).sum() for w, x in zip(weights, (mu, var))), (mu, var)

  gradient = jax.jit(jax.grad(loss, has_aux=True))
  return lambda *batch: gradient(params, *batch)


MASK = np.arange(N) < np.array([[N], [4], [5]])


def test_padding_and_missing_crops_never_matter(embed):
  crops = random_crops()
  has_video = np.array([True, True, False])
  _, (mu, var) = embed(crops, MASK, has_video)
  unseen = ~MASK | ~has_video[:, None]
  other = np.where(unseen[..., None, None, None], random_crops(1), crops)
  assert (other != crops).any()
  for actual, expected in zip(embed(other, MASK, has_video)[1], (mu, var)):
    np.testing.assert_array_equal(actual, expected)
  seen = np.abs(embed(random_crops(1), MASK, has_video)[1][0] - mu).max(axis=1) > 1e-3
  np.testing.assert_array_equal(seen, has_video)


def test_gradients_reach_every_parameter(embed):
  grads, _ = embed(random_crops(), MASK, np.ones(B, bool))
  norms = {name: float(np.abs(grad).max()) for name, grad in grads.items()}
  assert all(np.isfinite(norm) for norm in norms.values())
  # A softmax does not change with the biases of keys.
  assert {name for name, norm in norms.items() if norm < 1e-4} <= {
    'fusion.0.self_attn.k_proj.bias',
    'fusion.0.cross_attn.k_proj.bias',
  }, norms
  grads, _ = embed(random_crops(), MASK, np.zeros(B, bool))
  assert not any(
    grad.any() for name, grad in grads.items() if name.startswith('crop_encoder')
  )


def test_sizes():
  _, target = parameters.abstract(
    lambda rngs: Embedder(EmbedderConfig(visual='crops'), rngs=rngs)
  )
  assert sum(np.prod(x.shape) for x in target.values()) == pytest.approx(
    9.1e6, rel=0.01
  )
  for fields in (dict(crop_size=36), dict(crop_size=0), dict(crop_channels=())):
    with pytest.raises(
      ConfigError, match='does not suit crop_channels=.* choose a multiple of'
    ):
      EmbedderConfig(**fields)
