"""Attention: all kernels agree, and the UNet's layers treat contexts as documented."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dicetalk_jax.models import attention, parameters
from dicetalk_jax.models.attention import CrossAttention, attend
from dicetalk_jax.models.transformer import SpatioTemporalTransformer

HEADS, CHANNELS, CONTEXT = 4, 32, 24


def draw(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def qkv(b=3, t=37, s=21, heads=HEADS, d=8):
  return draw(1, b, t, heads, d), draw(2, b, s, heads, d), draw(3, b, s, heads, d)


def value_and_grads(implementation, *args):
  def loss(*args):
    return jnp.sum(jnp.sin(attend(*args, implementation=implementation)))

  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*args)


def test_agrees_with_torch():
  torch_order = [torch.tensor(np.moveaxis(x, 1, 2)) for x in qkv()]
  expected = np.moveaxis(F.scaled_dot_product_attention(*torch_order).numpy(), 2, 1)
  np.testing.assert_allclose(attend(*qkv()), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize('rows', [1, 8])
def test_chunks_agree_with_whole(monkeypatch, rows):
  # Room for that many queries.
  monkeypatch.setattr(attention, 'LOGITS_LIMIT', rows * 4 * 3 * HEADS * 21)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
    value_and_grads('chunked', *qkv()),
    value_and_grads('xla', *qkv()),
  )


def test_auto_bounds_the_logits(monkeypatch):
  """Beyond the limit no array of the program is as large as the whole logits.

  This includes the backward pass.
  """

  def largest(limit):
    monkeypatch.setattr(attention, 'LOGITS_LIMIT', limit)
    hlo = (
      jax.jit(lambda *a: value_and_grads('auto', *a))
      .lower(*qkv(t=256, s=256))
      .as_text()
    )
    shapes = {
      s.split('xf32')[0] for s in hlo.replace('>', '<').split('<') if s.endswith('xf32')
    }
    return max(np.prod([int(n) for n in shape.split('x')]) for shape in shapes)

  whole = 3 * HEADS * 256 * 256
  assert largest(4 * whole) == whole
  assert largest(4 * whole // 8) <= whole // 8


def test_chunks_keep_the_batch_sharded(mesh, monkeypatch):
  """The limit counts per device, and chunking needs no communication."""
  # 16 queries of one row per device.
  monkeypatch.setattr(attention, 'LOGITS_LIMIT', 16 * 4 * HEADS * 64)
  rows = jax.sharding.NamedSharding(mesh, jax.P(('data', 'fsdp')))
  q, k, v = jax.device_put(qkv(b=8, t=64, s=64), rows)
  run = jax.jit(attend, out_shardings=rows)
  program = run.lower(q, k, v).compile().as_text()
  assert not re.search(
    r'\b(all-gather|all-reduce|all-to-all|collective-permute)\(', program
  )
  assert ',16,64]' in program  # logits of 16 queries
  np.testing.assert_allclose(
    run(q, k, v), attend(q, k, v, implementation='xla'), rtol=0, atol=2e-6
  )


@pytest.fixture(scope='module')
def layer():
  """Runs a CrossAttention with fixed weights on (x, contexts, mask)."""
  graphdef, target = parameters.abstract(
    lambda rngs: CrossAttention(CHANNELS, HEADS, CONTEXT, 2, rngs=rngs)
  )
  params = parameters.numpy_params(target)

  @jax.jit
  def run(x, contexts, mask=None):
    module = parameters.merge(graphdef, params)
    return jnp.broadcast_to(module(x, module.context_kv(contexts), mask), x.shape)

  run.params = params
  return run


def test_one_token_shortcut(layer):
  """One image token (no softmax) equals the same token twice (two equal logits)."""
  x, token = draw(0, 2, 3, 5, CHANNELS), draw(1, 2, 3, 1, CONTEXT)
  np.testing.assert_allclose(
    layer(x, (token, None, None)),
    layer(x, (token.repeat(2, 2), None, None)),
    rtol=0,
    atol=2e-6,
  )


def test_shared_contexts_equal_repeated_ones(layer):
  x = draw(0, 2, 3, 5, CHANNELS)
  shared = (
    draw(1, 2, 1, 1, CONTEXT),
    draw(2, 2, 1, 4, CONTEXT),
    draw(3, 2, 1, 6, CONTEXT),
  )
  each = jax.tree.map(lambda y: y.repeat(3, 1), shared)
  mask = draw(4, 2, 5)
  np.testing.assert_allclose(
    layer(x, shared, mask), layer(x, each, mask), rtol=0, atol=2e-6
  )


def test_adapters_are_decoupled(layer):
  """Each adds its own attention, weighted by the mask, before the output projection."""
  x, image = draw(0, 2, 3, 5, CHANNELS), draw(1, 2, 3, 1, CONTEXT)
  audio, emotion, mask = (
    draw(2, 2, 3, 4, CONTEXT),
    draw(3, 2, 3, 6, CONTEXT),
    draw(4, 2, 5),
  )
  base = layer(x, (image, None, None))
  parts = layer(x, (image, audio, None)) - base, layer(x, (image, None, emotion)) - base
  assert all(jnp.abs(part).max() > 0.1 for part in parts)
  np.testing.assert_allclose(
    layer(x, (image, audio, emotion)) - base, sum(parts), rtol=0, atol=5e-6
  )
  np.testing.assert_allclose(
    layer(x, (image, audio, emotion), mask) - base,
    sum(parts) * mask[:, None, :, None],
    rtol=0,
    atol=5e-6,
  )


def test_temporal_context_is_the_mean_token():
  """Temporal blocks treat per-frame contexts like their mean."""

  def build(rngs):
    return SpatioTemporalTransformer(
      CHANNELS, heads=HEADS, context_dim=CONTEXT, adapters=2, groups=8, rngs=rngs
    )

  graphdef, target = parameters.abstract(build)
  x = draw(0, 2, 3, 4, 5, CHANNELS)
  tokens = (
    draw(1, 2, 3, 1, CONTEXT),
    draw(2, 2, 3, 4, CONTEXT),
    draw(3, 2, 3, 6, CONTEXT),
  )
  mean = jax.tree.map(
    lambda y: jnp.broadcast_to(y.mean(1, keepdims=True), y.shape), tokens
  )
  first = jax.tree.map(lambda y: jnp.broadcast_to(y[:, :1], y.shape), tokens)

  @jax.jit
  def run(params, temporal):
    module = parameters.merge(graphdef, params)
    contexts = {'transformer_blocks': tokens, 'temporal_transformer_blocks': temporal}
    kv = {
      f'{name}.0.attn2': getattr(module, name)[0].attn2.context_kv(c)
      for name, c in contexts.items()
    }
    return module(x, kv)

  params = parameters.numpy_params(target)
  np.testing.assert_allclose(run(params, tokens), run(params, mean), rtol=0, atol=2e-5)
  assert jnp.abs(run(params, first) - run(params, mean)).max() > 0.01


def test_half_precision_keeps_a_float32_softmax():
  q, k, v = (x.astype(jnp.bfloat16) for x in qkv())
  text = str(jax.make_jaxpr(attend)(q, k, v))
  assert all(
    'bf16' not in line.split('=')[0] for line in text.splitlines() if '= exp' in line
  )
  np.testing.assert_allclose(
    attend(q, k, v).astype(jnp.float32), attend(*qkv()), rtol=0, atol=0.03
  )


def test_unavailable_kernel_is_refused():
  """Asking for the fused kernel where it cannot run is an error, not a fallback."""
  with pytest.raises((RuntimeError, ValueError, NotImplementedError)):
    attend(*qkv(), implementation='cudnn')
