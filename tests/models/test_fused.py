"""Fused kernels for NVIDIA GPUs, interpreted on CPUs: they equal the plain layers."""

import contextlib
import functools
import re

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp
import numpy as np
import pytest

from dicetalk_jax.models import (
  attention,
  fused,
  fused_cross_attention,
  fused_geglu,
  parameters,
)
from dicetalk_jax.models.attention import CrossAttention, KeyValue
from dicetalk_jax.models.target import compiling_for
from dicetalk_jax.models.transformer import GEGLU, SpatioTemporalTransformer
from tests import cudnn

P = jax.P
HEADS, CHANNELS, TOKENS = 2, 32, 16


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
  """Runs kernels on CPUs, and stands in for cuDNN's attention."""
  interpret = functools.partial(pl.pallas_call, interpret=True)
  monkeypatch.setattr(pl, 'pallas_call', interpret)
  cudnn.stand_in(monkeypatch)


@contextlib.contextmanager
def on_nvidia(*, on=True, capability=9.0):
  with compiling_for('cuda', capability), fused.kernels(on):
    yield


def draw(seed, *shape, dtype=jnp.float32):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def value_and_grads(function, *args):
  """The value, and the gradients of a sum that weighs every value differently."""

  def loss(args):
    out = function(*args)
    return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

  (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(args)
  return out, grads


def assert_near(got, expected, tolerance):
  """Of the largest value of each array."""

  def check(x, y):
    x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
    assert np.isfinite(x).all()
    np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())

  assert jax.tree.structure(got) == jax.tree.structure(expected)
  jax.tree.map(check, got, expected)


# Float32 sums in another order; roundings of bfloat16, which keeps 8 bits.
EXACT, ROUNDED = 5e-6, 2e-2


def test_gelu_without_erf_is_exact():
  x = jnp.linspace(-12, 12, 100_001)
  error = fused_geglu.exact_gelu(x) - jax.nn.gelu(x, approximate=False)
  assert jnp.abs(error).max() < 5e-7


@pytest.mark.parametrize(
  ('rows', 'channels', 'width'),
  [((1,), 64, 64), ((3, 43), 64, 128), ((2, 64), 128, 64), ((257,), 320, 64)],
)
def test_geglu_equals_the_plain_layer(rows, channels, width):
  x = draw(0, *rows, channels)
  kernel = draw(1, channels, 2 * width) * channels**-0.5
  bias = draw(2, 2 * width)
  with on_nvidia():
    got = value_and_grads(fused_geglu.geglu, x, kernel, bias)
  assert_near(got, value_and_grads(fused_geglu._plain, x, kernel, bias), EXACT)


def contexts(frames, adapters, dtype=jnp.float32, rows=2):
  """Image and adapters: the last is shared by all frames, as the emotion is."""
  shapes = [(frames, 1), *[(frames, TOKENS), (1, 2 * TOKENS)][2 - adapters :]]
  return [
    KeyValue(
      draw(2 * i, rows, *shape, CHANNELS, dtype=dtype),
      draw(2 * i + 1, rows, *shape, CHANNELS, dtype=dtype),
    )
    for i, shape in enumerate(shapes, 1)
  ]


@pytest.mark.parametrize(
  ('frames', 'shared', 'tokens', 'adapters', 'mask_rows'),
  [
    (3, False, 9, 2, 2),
    (3, False, 64, 2, 1),
    (2, False, 130, 1, 2),
    (3, True, 128, 2, None),
    (3, True, 77, 1, None),
  ],
)
def test_attention_equals_one_adapter_after_the_other(
  frames, shared, tokens, adapters, mask_rows
):
  q = draw(0, 2, frames, tokens, CHANNELS)
  image, *kv = contexts(1 if shared else frames, adapters)
  mask = None if mask_rows is None else draw(9, mask_rows, tokens)
  plain = functools.partial(attention._attend_to_each, HEADS)
  kernel = functools.partial(attention._attend_in_one_kernel, HEADS)
  run = functools.partial(fused.with_plain_gradient, kernel, plain)
  with on_nvidia():
    got = value_and_grads(run, q, image, kv, mask)
  assert_near(got, value_and_grads(plain, q, image, kv, mask), EXACT)


def takes(
  *,
  on=True,
  platform='cuda',
  capability=9.0,
  dtype=jnp.bfloat16,
  channels=320,
  width=1280,
  heads=5,
  image=1,
  keys=32,
  adapters=2,
):
  """(GEGLU, attention): whether the kernels take such layers."""

  def array(tokens):
    return jnp.zeros((3, 1, tokens, channels), dtype)

  q = array(8)
  adapter = KeyValue(array(keys), array(keys))
  with compiling_for(platform, capability), fused.kernels(on):
    return (
      fused_geglu.fits(dtype, q.shape, width),
      fused_cross_attention.fits(q, heads, array(image), adapters * [adapter]),
    )


@pytest.mark.parametrize(
  ('layer', 'expected'),
  [
    ({}, (True, True)),
    ({'on': False}, (False, False)),
    # Platforms.
    ({'capability': 8.0}, (True, True)),
    ({'capability': 7.5}, (False, False)),
    ({'platform': 'rocm'}, (False, False)),
    ({'platform': 'tpu'}, (False, False)),
    ({'platform': 'cpu'}, (False, False)),
    # Types.
    ({'dtype': jnp.float16}, (True, True)),
    ({'dtype': jnp.float32}, (False, False)),
    # Sizes.
    ({'channels': 640, 'heads': 10, 'width': 2560}, (False, True)),
    ({'channels': 320, 'heads': 8}, (True, False)),
    ({'channels': 32, 'heads': 2, 'width': 128}, (False, True)),
    ({'width': 1296}, (False, True)),
    ({'image': 2}, (True, False)),
    ({'keys': 24}, (True, False)),
    ({'keys': 257}, (True, False)),
    # Adapters.
    ({'adapters': 1}, (True, True)),
    ({'adapters': 0}, (True, False)),
  ],
)
def test_choice(layer, expected):
  assert takes(**layer) == expected


def test_off_unless_turned_on():
  assert takes(on=True) == (True, True)
  with compiling_for('cuda'):
    assert not fused.can_run(jnp.bfloat16, 3)


def build(module, *sizes, dtype=jnp.bfloat16, **options):
  """A function of (parameters, arguments) that runs a module, and its parameters."""
  graphdef, target = parameters.abstract(
    lambda rngs: module(*sizes, **options, dtype=dtype, rngs=rngs)
  )
  params = {
    name: jnp.asarray(value, dtype)
    for name, value in parameters.numpy_params(target).items()
  }

  def run(params, *args):
    return parameters.merge(graphdef, params)(*args)

  return run, params


def kernels_in(function, *args):
  return str(jax.make_jaxpr(function)(*args)).count('pallas_call[')


@functools.cache
def transformer():
  """A transformer of one spatial and one temporal block, and its arguments."""
  run, params = build(SpatioTemporalTransformer, 64, heads=4, context_dim=8, adapters=2)
  bf16 = functools.partial(draw, dtype=jnp.bfloat16)
  image, audio, emotion = (2, 3, 1, 64), (2, 3, 16, 64), (2, 1, 32, 64)
  kv = {
    f'{kind}.0.attn2': tuple(
      KeyValue(bf16(i, *shape), bf16(i + 3, *shape))
      for i, shape in enumerate((image, audio, emotion))
    )
    for kind in ('transformer_blocks', 'temporal_transformer_blocks')
  }
  args = params, bf16(7, 2, 3, 6, 6, 64), kv, jax.nn.sigmoid(draw(8, 2, 36))
  return run, args


@pytest.mark.parametrize('wrap', [lambda run: run, jax.checkpoint])
def test_a_transformer_computes_the_same(wrap):
  """In bfloat16, the value and all gradients, with and without rematerialisation."""
  run, args = transformer()
  results = []
  for on in (True, False):
    with on_nvidia(on=on):
      # Two feed-forwards in time and one in space; two cross-attentions.
      assert kernels_in(run, *args) == (5 if on else 0)
      results.append(value_and_grads(wrap(run), *args))
  assert_near(*results, 4 * ROUNDED)


def test_float32_does_not_change():
  run, params = build(GEGLU, 64, 256, dtype=jnp.float32)
  with on_nvidia():
    assert not kernels_in(run, params, draw(0, 5, 64))


def cross_attention(rows):
  run, params = build(CrossAttention, 32, 2, 8, 2)
  kv = contexts(2, 2, jnp.bfloat16, rows)
  return run, (params, draw(0, rows, 2, 9, 32, dtype=jnp.bfloat16), kv, draw(1, 1, 9))


def feed_forward(rows):
  run, params = build(GEGLU, 64, 256)
  return run, (params, draw(0, rows, 2, 9, 64, dtype=jnp.bfloat16))


@pytest.mark.parametrize('layer', [cross_attention, feed_forward])
def test_devices_compute_their_own_rows(mesh, layer):
  run, args = layer(8)
  expected = jax.jit(run)(*args)
  with on_nvidia(), jax.set_mesh(mesh):
    rows, whole = (jax.NamedSharding(mesh, spec) for spec in (P(mesh.axis_names), P()))
    placed = jax.tree.map(
      lambda x: jax.device_put(x, rows if x.shape[0] == 8 and x.ndim > 2 else whole),
      args,
    )
    program = jax.jit(run, out_shardings=rows)
    compiled = program.lower(*placed).compile().as_text()
    got = program(*placed)
    assert kernels_in(run, *placed) == 1
  assert not re.search(r'all-gather|all-to-all|collective-permute', compiled)
  assert_near(got, expected, ROUNDED)


@pytest.mark.parametrize('layer', [cross_attention, feed_forward])
def test_rows_that_do_not_divide_and_split_images_stay_plain(layer):
  run, args = layer(6)
  for sizes in ((4, 2, 1), (2, 1, 2), (1, 1, 2)):
    mesh = jax.sharding.AbstractMesh(sizes, ('data', 'fsdp', 'sequence'))
    with on_nvidia(), jax.sharding.use_abstract_mesh(mesh):
      assert not fused.can_run(jnp.bfloat16, 6)
      assert not kernels_in(run, *args)
