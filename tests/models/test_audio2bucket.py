import jax
import jax.numpy as jnp
import numpy as np
import torch

from dicetalk_jax.models.audio2bucket import AudioToBucket, AudioToBucketConfig
from dicetalk_jax.models.parameters import merge
from tests.models import parity

SMALL = AudioToBucketConfig(seq_len=5, channels=3, clip_dim=4, intermediate_dim=8)


class Twin(torch.nn.Module):
  """The published network in PyTorch: speech before image, SiLU, three linear
  layers.
  """

  def __init__(self, config):
    super().__init__()
    self.proj1 = torch.nn.Linear(
      config.seq_len * config.channels + config.clip_dim, config.intermediate_dim
    )
    self.proj2 = torch.nn.Linear(config.intermediate_dim, config.intermediate_dim)
    self.proj3 = torch.nn.Linear(config.intermediate_dim, config.output_dim)

  def forward(self, x, image):
    frames = [torch.cat([x[:, i].flatten(1), image], dim=1) for i in range(x.shape[1])]
    silu = torch.nn.functional.silu
    return self.proj3(silu(self.proj2(silu(self.proj1(torch.stack(frames, dim=1))))))


def inputs():
  rng = np.random.default_rng(0)
  return np.float32(rng.normal(size=(2, 6, 5, 3))), np.float32(rng.normal(size=(2, 4)))


def test_live_twin():
  torch.manual_seed(0)
  twin = Twin(SMALL)
  graphdef, params = parity.converted(SMALL, AudioToBucket, parity.lively(twin))
  ours = parity.jit(lambda p, *args: merge(graphdef, p)(*args))
  x, image = inputs()
  expected = twin(*map(torch.from_numpy, (x, image))).detach().numpy()
  assert expected.shape == (2, 6, 2)
  assert parity.error(ours(params, x, image), expected) < 2e-6
  np.testing.assert_array_equal(
    ours(params, x.reshape(2, 6, -1), image), ours(params, x, image)
  )


def test_full_size():
  graphdef, params = parity.abstract(AudioToBucketConfig(), AudioToBucket)
  shapes = (
    jax.ShapeDtypeStruct((1, 25, 50, 384), 'float32'),
    jax.ShapeDtypeStruct((1, 1024), 'float32'),
  )
  assert jax.eval_shape(
    lambda p, *args: merge(graphdef, p)(*args), params, *shapes
  ).shape == (1, 25, 2)


def test_compute_dtype():
  graphdef, target = parity.abstract(SMALL, AudioToBucket, dtype=jnp.bfloat16)
  assert all(x.dtype == jnp.float32 for x in target.values())
  assert (
    jax.eval_shape(lambda p, *args: merge(graphdef, p)(*args), target, *inputs()).dtype
    == jnp.bfloat16
  )
