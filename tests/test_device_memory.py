"""Windows per call that follow from the memory of a device, on stand-ins."""

import jax
import jax.numpy as jnp
import pytest

from dicetalk_jax import device_memory, parallel, pipeline
from dicetalk_jax.diffusion.sampler import SamplerConfig
from dicetalk_jax.errors import ConfigError
from dicetalk_jax.models.unet import UNetConfig
from dicetalk_jax.pipeline import Pipeline
from tests import tiny

GB = 10**9


class Device:
  """A device that says how much memory it has."""

  def __init__(self, **stats):
    self.stats = stats

  def memory_stats(self):
    return self.stats or None


def test_the_published_network_takes_what_its_compiled_program_does():
  """3.7 GB of temporaries for one window at 512 pixels, in bfloat16."""
  size = device_memory.window_bytes(UNetConfig(), SamplerConfig(), 64, 64, 2)
  assert size == pytest.approx(3.7 * GB, rel=0.02)
  wide = device_memory.window_bytes(UNetConfig(), SamplerConfig(), 64, 128, 4)
  assert wide == 4 * size
  two_branches = SamplerConfig(g_image=1.0)
  fewer = device_memory.window_bytes(UNetConfig(), two_branches, 64, 64, 2)
  assert fewer == size * 2 / 3


def test_windows_fill_a_share_of_what_is_free():
  free = Device(bytes_limit=100 * GB, bytes_in_use=20 * GB)
  assert device_memory.windows_that_fit(free, 7 * GB) == 8
  assert device_memory.windows_that_fit(Device(bytes_limit=GB), 7 * GB) == 1
  assert device_memory.windows_that_fit(Device(), 7 * GB) is None


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tiny.shared_model(tmp_path_factory)


def test_the_pipeline_asks_its_devices(folder, monkeypatch):
  """Of several the one with the least; CPUs, which say nothing, change nothing."""
  of_tiny = 8 * device_memory.NUMBERS * 4 * 3 * 4 * 8 * 15  # bytes, 16 pixels wide
  sizes = []

  def fit(device, size):
    sizes.append(size)
    return 5 if device.id else 3

  def windows(dtype=None, mesh=None):
    pipe = Pipeline.abstract(folder, dtype)
    filling = pipeline._filling_memory(pipe.settings, pipe.networks, mesh)
    return filling.sampler.windows_per_call

  assert windows() == 1
  monkeypatch.setattr(device_memory, 'windows_that_fit', fit)
  assert windows() == 3
  assert sizes == [of_tiny]
  mesh = parallel.make_mesh(data=-1, fsdp=1)
  assert windows(jnp.bfloat16, mesh) == 3 * jax.device_count()
  assert sizes[1:] == [of_tiny // 2] * 8

  pipe = Pipeline.load(folder, fill_memory=True)
  assert pipe.settings.sampler.windows_per_call == 3


def test_an_exported_sampler_has_its_windows_already(folder):
  with pytest.raises(ConfigError, match='leave out fill_memory'):
    Pipeline.load(folder, samplers=['any'], fill_memory=True)
