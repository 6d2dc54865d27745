"""The choice of attention's kernel, and cuDNN's kernel in all shapes of the models."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dicetalk_jax.models import attention
from dicetalk_jax.models.attention import attend, choose_kernel
from dicetalk_jax.models.target import Target, compiling_for
from tests import cudnn

CUDA = Target('cuda')
P = jax.P
ROWS = P(('data', 'fsdp'))


def chosen(**changes):
  """(inference, training) for half precision, even lengths and small logits."""
  given = dict(
    target=CUDA, dtype=jnp.bfloat16, t=4096, s=32, d=64, logits=1000, rows_local=True
  )
  given |= changes
  return tuple(choose_kernel(**given, training=training) for training in (False, True))


@pytest.mark.parametrize(
  ('changes', 'expected'),
  [
    # Platforms.
    ({}, ('cudnn', 'cudnn')),
    ({'target': Target('cuda', 8.0)}, ('cudnn', 'cudnn')),
    ({'target': Target('cuda', 7.5)}, ('xla', 'xla')),
    ({'target': Target('rocm')}, ('xla', 'xla')),
    ({'target': Target('tpu')}, ('xla', 'xla')),
    ({'target': Target('cpu')}, ('xla', 'xla')),
    # Types and heads.
    ({'dtype': jnp.float16}, ('cudnn', 'cudnn')),
    ({'dtype': jnp.float32}, ('xla', 'xla')),
    ({'d': 4}, ('xla', 'xla')),
    ({'d': 128}, ('cudnn', 'cudnn')),
    ({'d': 512}, ('xla', 'xla')),
    # Lengths.
    ({'t': 25, 's': 25}, ('cudnn', 'xla')),
    ({'t': 1, 's': 1}, ('cudnn', 'xla')),
    ({'t': 9, 's': 32}, ('cudnn', 'xla')),
    ({'t': 4096, 's': 257}, ('cudnn', 'xla')),
    ({'t': 2, 's': 2}, ('cudnn', 'cudnn')),
    # Layout.
    ({'rows_local': False}, ('xla', 'xla')),
    # Memory.
    ({'logits': attention.LOGITS_LIMIT}, ('cudnn', 'cudnn')),
    ({'target': Target('tpu'), 'logits': attention.LOGITS_LIMIT}, ('xla', 'xla')),
    (
      {'target': Target('tpu'), 'logits': attention.LOGITS_LIMIT + 1},
      ('chunked', 'chunked'),
    ),
    ({'t': 25, 'logits': attention.LOGITS_LIMIT + 1}, ('cudnn', 'chunked')),
  ],
)
def test_choice(changes, expected):
  assert chosen(**changes) == expected


def draw(b, t, s, heads=2, d=8, dtype=jnp.bfloat16):
  rng = np.random.default_rng(0)
  shapes = (b, t, heads, d), (b, s, heads, d), (b, s, heads, d)
  return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def value_and_grads(attend, *qkv):
  def loss(*qkv):
    out = attend(*qkv)
    return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

  (_, out), grads = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(*qkv)
  return out, *grads


def assert_near(got, expected):
  for x, y in zip(got, expected, strict=True):
    x, y = (np.asarray(x, np.float32) for x in (x, y))
    # A few roundings of bfloat16, which keeps 8 bits.
    np.testing.assert_allclose(x, y, rtol=0, atol=2e-2 * np.abs(y).max())


LENGTHS = [(25, 25), (1, 1), (1, 6), (6, 1), (25, 32), (32, 25), (9, 9), (16, 6)]


@jax.jit
def plain_value_and_grads(*qkv):
  return value_and_grads(functools.partial(attend, implementation='xla'), *qkv)


@pytest.mark.parametrize(('t', 's'), LENGTHS)
@pytest.mark.parametrize('wrap', [lambda f: f, jax.checkpoint])
def test_every_length_can_be_trained_on_nvidia(monkeypatch, t, s, wrap):
  cudnn.detect(monkeypatch)
  program = jax.jit(lambda *qkv: value_and_grads(wrap(attend), *qkv))
  with compiling_for('cuda'):
    traced = program.trace(*draw(3, t, s))
    text = traced.lower(lowering_platforms=('cuda',)).as_text()
  fused = t % 2 == s % 2 == 0
  assert ('__cudnn$fmhaSoftmaxBackward' in text) == fused
  assert ('__cudnn$fmhaSoftmax' in text) == fused


@pytest.mark.parametrize(('t', 's'), [(25, 25), (1, 6), (16, 6)])
def test_gradients_for_nvidia_are_right(monkeypatch, t, s):
  cudnn.stand_in(monkeypatch)
  qkv = draw(3, t, s)
  with compiling_for('cuda'):
    got = jax.jit(lambda *qkv: value_and_grads(attend, *qkv))(*qkv)
  assert_near(got, plain_value_and_grads(*qkv))


@pytest.mark.parametrize(('t', 's'), LENGTHS)
def test_without_a_gradient_every_length_is_fused(monkeypatch, t, s):
  cudnn.detect(monkeypatch)
  with compiling_for('cuda'):
    traced = jax.jit(attend).trace(*draw(3, t, s))
    text = traced.lower(lowering_platforms=('cuda',)).as_text()
  assert text.count('__cudnn$fmhaSoftmax') == 1


def test_what_jax_refuses_is_still_refused(monkeypatch):
  """Should this fail, `choose_kernel` may take cuDNN where lengths are odd."""
  cudnn.detect(monkeypatch)
  forced = functools.partial(attend, implementation='cudnn')
  with pytest.raises(NotImplementedError, match='Unsupported sequence length Q 25'):
    jax.eval_shape(functools.partial(value_and_grads, forced), *draw(1, 25, 25))


def layouts():
  """Queries and keys as devices may share them, each on 2 x 4 devices."""
  return {
    'rows': (8, ROWS, ROWS),
    'keys on all devices': (8, ROWS, P()),
    'keys elsewhere': (8, P('data'), P('fsdp')),
    'heads': (8, P(None, None, 'data'), P()),
    'channels': (8, P(None, None, None, 'fsdp'), P(None, None, None, 'fsdp')),
    # The emotion bank, which all clips of a batch share.
    'queries of one row': (1, P(None, ('data', 'fsdp')), P()),
    'rows that do not divide': (3, P(None, 'data'), P()),
  }


@pytest.mark.parametrize('name', layouts())
@pytest.mark.parametrize('gradient', [False, True])
def test_cudnn_gets_no_layout_that_it_refuses(monkeypatch, mesh, name, gradient):
  cudnn.stand_in(monkeypatch)
  b, queries, keys = layouts()[name]
  qkv = draw(b, 16, 6)
  run = functools.partial(value_and_grads, attend) if gradient else attend
  expected = plain_value_and_grads(*qkv)
  placed = [
    jax.device_put(x, jax.NamedSharding(mesh, spec))
    for x, spec in zip(qkv, (queries, keys, keys))
  ]
  with compiling_for('cuda'):
    program = jax.jit(run)
    lowered = program.lower(*placed)
    got = jax.tree.leaves(program(*placed))
    if name == 'rows':  # as in training and sampling: nothing is sent around
      compiled = lowered.compile().as_text()
      assert not re.search(r'all-gather|all-to-all|collective-permute', compiled)
  assert_near(got, expected[: len(got)])
  assert ('CustomSPMDPartitioning' in lowered.as_text()) == (b == 8)


@pytest.mark.parametrize(
  ('inference', 'training'), itertools.permutations(('xla', 'chunked'), 2)
)
def test_the_kernel_depends_on_whether_there_is_a_gradient(
  monkeypatch, inference, training
):
  monkeypatch.setattr(attention, 'LOGITS_LIMIT', 4 * 4 * 3 * 2 * 21)  # four queries
  qkv = draw(3, 37, 21, dtype=jnp.float32)
  run = functools.partial(
    attention._attend_with_own_training_kernel, inference, training
  )
  got = jax.jit(functools.partial(value_and_grads, run))(*qkv)
  for x, y in zip(got, plain_value_and_grads(*qkv), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)

  # Chunks are a loop.
  def loops(function):
    return 'while' in jax.jit(function).lower(*qkv).as_text()

  assert loops(run) == (inference == 'chunked')
  assert loops(functools.partial(value_and_grads, run)) == (training == 'chunked')
