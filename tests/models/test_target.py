"""The target platform: what decides it, and that programs of others are not reused."""

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh
import pytest

from dicetalk_jax.models import resnet, target
from dicetalk_jax.models.parameters import abstract, merge


def test_by_default_it_is_that_of_this_host():
  assert target.current() == target.Target(jax.default_backend())


@pytest.mark.parametrize(
  ('name', 'platform'),
  [
    ('cpu', 'cpu'),
    ('tpu', 'tpu'),
    ('cuda', 'cuda'),
    ('rocm', 'rocm'),
    # Of GPUs that are not here nothing more is known: NVIDIA's are assumed.
    ('gpu', 'cuda'),
  ],
)
def test_devices_of_the_mesh_decide_even_if_they_are_not_here(name, platform):
  device = AbstractDevice(device_kind='', num_cores=None, platform=name)
  mesh = AbstractMesh((2,), ('data',), abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    assert target.current().platform == platform


def test_a_mesh_without_devices_decides_nothing():
  with jax.sharding.use_abstract_mesh(AbstractMesh((2,), ('data',))):
    assert target.current().platform == 'cpu'


def test_the_default_device_decides_without_a_mesh():
  for device in (jax.devices('cpu')[1], 'cpu'):
    with jax.default_device(device):
      assert target.current().platform == 'cpu'
  with jax.default_device('tpu'):
    assert target.current().platform == 'tpu'


def test_what_is_compiled_for_counts_more_than_any_device(mesh):
  with target.compiling_for('tpu'):
    assert target.current().platform == 'tpu'
    with target.compiling_for('cuda', 7.5):
      assert target.current() == target.Target('cuda', 7.5)
    assert target.current().platform == 'tpu'
  assert target.current().platform == 'cpu'


def test_an_unknown_platform_is_refused():
  refused = pytest.raises(ValueError, match="'gpu'; choose one of cpu, cuda, rocm, tpu")
  with refused, target.compiling_for('gpu'):
    pass


def test_temporal_convolutions_are_products_on_cpus_only():
  forms = {platform: resnet.temporal_form(platform) for platform in target.PLATFORMS}
  assert forms.pop('cpu') is resnet.as_product
  assert set(forms.values()) == {resnet.as_convolution}


@pytest.mark.parametrize('wrap', [lambda f: f, jax.checkpoint])
def test_one_function_is_traced_for_each_platform(wrap):
  """Otherwise the second platform would get the program of the first one."""
  graphdef, params = abstract(lambda rngs: resnet.TemporalConv(4, 4, rngs=rngs))

  @wrap
  def layer(params, x):
    return merge(graphdef, params)(x)

  run = jax.jit(layer)
  x = jax.ShapeDtypeStruct((1, 3, 2, 2, 4), jnp.float32)

  def is_convolution(platform):
    with target.compiling_for(platform):
      lowered = run.trace(params, x).lower(lowering_platforms=(platform,))
    return 'stablehlo.convolution' in lowered.as_text()

  assert [is_convolution(p) for p in ('cpu', 'tpu', 'cuda', 'cpu')] == [
    False,
    True,
    True,
    False,
  ]


def test_products_of_nvidia_gpus_are_left_to_cublas():
  options = {}
  for platform in target.PLATFORMS:
    with target.compiling_for(platform):
      options[platform] = target.compiler_options()
  assert options.pop('cuda') == {'xla_gpu_enable_triton_gemm': False}
  assert set(options.values()) == {None}
