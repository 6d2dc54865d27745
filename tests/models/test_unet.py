"""The UNet: live parity with diffusers, gradients, precision.

The recorded numbers are checked by `make verify`, the published names and shapes in
`tests/convert/test_full_size.py`.
"""

import collections
import dataclasses
import functools
import json

from diffusers import UNetSpatioTemporalConditionModel
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from convert import naming
from dicetalk_jax.errors import ConfigError
from dicetalk_jax.models import parameters
from dicetalk_jax.models.unet import (
  UNet,
  UNetConfig,
  init_adapters_from_image,
  zero_residuals,
)

# Compilation is nearly all the time of these tests.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})

# Relative to the reference's deviation; six times the reference's own float32 error.
TOLERANCE = 3e-5


@pytest.fixture(autouse=True)
def exact():
  with jax.default_matmul_precision('highest'):
    yield


def channels_last(x):
  """`(B,F,C,h,w)` to `[B,F,h,w,C]`."""
  return np.moveaxis(x, 2, -1)


def assert_close(actual, expected, tolerance=TOLERANCE):
  np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * expected.std())


# One level, as gradients take long to compile; two channels per group, as with one the
# gradients of what is added before a norm vanish.
SMALL = UNetConfig(
  down_block_types=('CrossAttnDownBlockSpatioTemporal',),
  up_block_types=('UpBlockSpatioTemporal',),
  block_out_channels=(64,),
  num_attention_heads=(2,),
  layers_per_block=1,
  cross_attention_dim=16,
  addition_time_embed_dim=8,
  projection_class_embeddings_input_dim=24,
  adapters=0,
)


class Twin:
  """The same random weights in diffusers and here.

  Both give their output and the gradients of a scalar loss.
  """

  def __init__(self):
    rng = np.random.default_rng(0)
    self.x = {
      'sample': (2, 3, 16, 24, 8),
      'image': (2, 1, 1, 16),
      'ids': (2, 3),
      'weight': (2, 3, 16, 24, 4),
    }
    self.x = {
      k: rng.normal(size=shape).astype(np.float32) for k, shape in self.x.items()
    }
    self.t = np.array([0.5, -1.25], np.float32)
    self.graphdef, target = parameters.abstract(lambda rngs: UNet(SMALL, rngs=rngs))
    self.params = parameters.numpy_params(target)

  def ours(self):
    def loss(params, sample):
      unet = parameters.merge(self.graphdef, params)
      kv = unet.context_kv(jnp.asarray(self.x['image']))
      ids = jnp.asarray(self.x['ids'])
      v, _ = unet(sample, jnp.asarray(self.t), kv, ids, remat='dots')
      return jnp.sum(v * self.x['weight']), v

    (_, v), grads = jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(
      self.params, self.x['sample']
    )
    return v, naming.to_torch(grads[0]), grads[1]

  def stock(self):
    fields = {
      k: v
      for k, v in SMALL.to_json().items()
      if k not in ('adapters', 'norm_num_groups')
    }
    model = UNetSpatioTemporalConditionModel(**fields)
    model.load_state_dict(
      {k: torch.tensor(v) for k, v in naming.to_torch(self.params).items()}
    )
    sample = torch.tensor(np.moveaxis(self.x['sample'], -1, 2), requires_grad=True)
    image = torch.tensor(self.x['image'][:, 0])
    v = model(sample, torch.tensor(self.t), image, torch.tensor(self.x['ids'])).sample
    (v * torch.tensor(np.moveaxis(self.x['weight'], -1, 2))).sum().backward()
    return (
      channels_last(v.detach().numpy()),
      {k: p.grad.numpy() for k, p in model.named_parameters()},
      channels_last(sample.grad.numpy()),
    )


def test_diffusers_live():
  """Forward pass and every gradient, partly rematerialised."""
  twin = Twin()
  v, grads, sample_grad = twin.ours()
  expected_v, expected_grads, expected_sample_grad = twin.stock()
  assert_close(v, expected_v)
  assert_close(sample_grad, expected_sample_grad)
  assert grads.keys() == expected_grads.keys()
  for name, expected in expected_grads.items():
    # The floor is for gradients that are zero but for rounding: queries and keys of a
    # single image token.
    atol = 1e-4 * np.abs(expected).max() + 1e-5
    np.testing.assert_allclose(grads[name], expected, rtol=0, atol=atol, err_msg=name)


def test_defaults_are_published(goldens):
  configs = json.loads((goldens.parent / 'manifests/configs.json').read_text())
  published = configs['unet_config']['value']
  for adapters in (2, 1, 0):
    config = UNetConfig.from_json(published | {'adapters': adapters})
    assert config == UNetConfig(adapters=adapters)


CONV = jax.lax.conv_general_dilated_p.name


def equations(jaxpr):
  """All equations of a program, those of inner programs too."""
  for eqn in jaxpr.eqns:
    yield eqn
    for param in eqn.params.values():
      inner = getattr(param, 'jaxpr', param)
      if hasattr(inner, 'eqns'):
        yield from equations(inner)


def abstract_call(config, rows, frames, size, tokens=32, **kwargs):
  """The traced program of a UNet and its output shapes, from shapes alone."""
  graphdef, target = parameters.abstract(
    lambda rngs: UNet(config, dtype=jnp.bfloat16, rngs=rngs)
  )

  def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)

  def forward(params, sample, image, audio, emotion, *args):
    unet = parameters.merge(graphdef, params)
    return unet(sample, 0.3, unet.context_kv(image, audio, emotion), *args, **kwargs)

  return jax.make_jaxpr(forward, return_shape=True)(
    target,
    f32(rows, frames, size, size, config.in_channels),
    f32(rows, 1, 1, config.cross_attention_dim),
    f32(rows, frames, tokens, config.cross_attention_dim),
    f32(rows, 1, tokens, config.cross_attention_dim),
    f32(rows, 3),
    f32(1, 1, size, size, config.block_out_channels[0]),
    tuple(f32(1, (size >> level) ** 2) for level in range(config.levels)),
  )


def test_full_size_program():
  """A guided window of 25 frames in bfloat16, traced but not run.

  Shapes, number types, memory and rematerialisation.
  """
  jaxpr, (v, mid) = abstract_call(UNetConfig(), 3, 25, 64, remat='block')
  assert (v.shape, v.dtype) == ((3, 25, 64, 64, 4), jnp.float32)
  assert (mid.shape, mid.dtype) == ((3, 25, 8, 8, 1280), jnp.bfloat16)
  eqns = list(equations(jaxpr.jaxpr))
  operands = [
    x.aval.dtype
    for eqn in eqns
    for x in eqn.invars
    if eqn.primitive.name in ('dot_general', CONV)
  ]
  assert set(operands) == {jnp.dtype(jnp.bfloat16)}
  # Whole logits of the first level would take 25 GB.
  assert (
    max(x.aval.size * x.aval.dtype.itemsize for eqn in eqns for x in eqn.outvars)
    < 1.6e9
  )
  names = collections.Counter(eqn.primitive.name for eqn in eqns)
  resnets, transformers, chunked = 22, 16, names['scan']
  assert names['remat2'] == resnets + transformers + chunked


ONE_LEVEL = UNetConfig(
  block_out_channels=(8,),
  down_block_types=('CrossAttnDownBlockSpatioTemporal',),
  up_block_types=('CrossAttnUpBlockSpatioTemporal',),
  layers_per_block=1,
  num_attention_heads=2,
  norm_num_groups=4,
  cross_attention_dim=12,
)
THREE_LEVELS = dataclasses.replace(
  ONE_LEVEL,
  block_out_channels=(8, 16, 24),
  layers_per_block=(1, 2, 1),
  num_attention_heads=(1, 2, 3),
  down_block_types=(
    'DownBlockSpatioTemporal',
    'CrossAttnDownBlockSpatioTemporal',
    'DownBlockSpatioTemporal',
  ),
  up_block_types=('UpBlockSpatioTemporal',) * 3,
)


def test_what_waits_for_the_backward_pass():
  graphdef, target = parameters.abstract(lambda rngs: UNet(ONE_LEVEL, rngs=rngs))

  def kept(remat):
    """Numbers, parameters not counted."""

    def out(params):
      unet, x = parameters.merge(graphdef, params), jnp.ones((1, 3, 16, 16, 8))
      return unet(
        x, 0.3, unet.context_kv(jnp.ones((1, 1, 1, 12))), jnp.ones((1, 3)), remat=remat
      )[0]

    _, pull = jax.eval_shape(lambda p: jax.vjp(out, p), target)
    return sum(x.size for x in jax.tree.leaves(pull)) - sum(
      x.size for x in target.values()
    )

  assert kept('block') < 0.5 * kept('dots') < 0.25 * kept('none')


@pytest.mark.parametrize('config', [ONE_LEVEL, THREE_LEVELS])
def test_any_number_of_levels(config):
  _, (v, mid) = abstract_call(config, 2, 3, 16)
  lowest = 16 >> config.levels - 1
  assert v.shape == (2, 3, 16, 16, 4)
  assert mid.shape == (2, 3, lowest, lowest, config.block_out_channels[-1])


def test_adapters_start_as_copies():
  _, target = parameters.abstract(lambda rngs: UNet(ONE_LEVEL, rngs=rngs))
  before = parameters.numpy_params(target)
  after = parameters.strip_prefix(
    'unet', init_adapters_from_image(parameters.add_prefix('unet', before))
  )
  assert after.keys() == before.keys()
  for name in before:
    layer, is_adapter, projection = name.partition('processor.')
    source = f'{layer}{projection[:4]}.kernel' if is_adapter else name
    np.testing.assert_array_equal(after[name], before[source])
    # Buffers of their own, or the dict could not be donated.
    assert (
      not is_adapter
      or after[name].unsafe_buffer_pointer() != after[source].unsafe_buffer_pointer()
    )
  layers = len([name for name in before if name.endswith('attn2.to_k.kernel')])
  assert (
    len([name for name in before if '_ip.' in name]) == 4 * layers
  )  # keys and values of two adapters


def test_residual_branches_can_begin_at_zero():
  graphdef, target = parameters.abstract(lambda rngs: UNet(SMALL, rngs=rngs))
  before = parameters.numpy_params(target)
  after = zero_residuals(before)
  changed = {name for name in before if not np.array_equal(before[name], after[name])}
  assert changed == {
    name
    for name in before
    if name.endswith(('conv2.kernel', 'proj_out.kernel', 'conv_out.kernel'))
  }
  assert (
    all(not np.asarray(after[name]).any() for name in changed)
    and 'conv_out.kernel' in changed
  )


@pytest.mark.parametrize(
  'change, sentence',
  [
    (
      dict(down_block_types=('DownBlock', 'DownBlockSpatioTemporal')),
      "'DownBlock', which is unknown",
    ),
    (
      dict(up_block_types=('UpBlockSpatioTemporal',)),
      'has 1 entries, but block_out_channels has 2',
    ),
  ],
)
def test_stages_that_do_not_exist_are_named(change, sentence):
  with pytest.raises(ConfigError, match=sentence):
    dataclasses.replace(
      SMALL,
      block_out_channels=(32, 32),
      **{
        'down_block_types': ('DownBlockSpatioTemporal',) * 2,
        'up_block_types': ('UpBlockSpatioTemporal',) * 2,
        **change,
      },
    )


def test_tokens_without_adapter_are_refused():
  graphdef, target = parameters.abstract(lambda rngs: UNet(SMALL, rngs=rngs))
  tokens = jax.ShapeDtypeStruct((1, 1, 1, 16), jnp.float32)
  with pytest.raises(ValueError, match='0 adapters'):
    jax.eval_shape(
      lambda params, x: parameters.merge(graphdef, params).context_kv(x, x),
      target,
      tokens,
    )
