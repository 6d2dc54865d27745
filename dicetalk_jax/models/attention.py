"""Attention: the choice of its kernel, and the two layers of the UNet built on it."""

from collections.abc import Sequence
import functools
import math

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp

from dicetalk_jax.models.target import Target, current

# Bytes of float32 logits that may exist at once on a device; beyond that, queries are
# taken in chunks.
LOGITS_LIMIT = 2**29

KeyValue = tuple[jax.Array, jax.Array]


def choose(
  target: Target,
  dtype: jnp.dtype,
  t: int,
  s: int,
  d: int,
  *,
  logits: int,
  whole: bool,
  training: bool,
) -> str:
  """The kernel for attention of `t` queries to `s` keys in heads of `d` channels.

  Args:
    target: the devices that the program is compiled for.
    dtype: of queries, keys and values.
    t: number of queries.
    s: number of keys.
    d: channels of a head.
    logits: bytes of all float32 logits on one device.
    whole: whether each device can have rows of its own, with all their tokens.
    training: whether there will be a gradient.

  Returns:
    'cudnn' (fused), 'xla' (whole logits in memory) or 'chunked' (bounded memory).
  """
  ampere = target.platform == 'cuda' and target.capability >= 8
  half = dtype in (jnp.bfloat16, jnp.float16)
  fits = d % 8 == 0 and d <= 128 and whole
  # jax refuses the gradient of cuDNN's attention where a length is odd.
  differentiable = t % 2 == 0 and s % 2 == 0
  if ampere and half and fits and (differentiable or not training):
    return 'cudnn'
  return 'xla' if logits <= LOGITS_LIMIT else 'chunked'


def _shared_axes() -> dict[str, int]:
  """Mesh axes over which the arrays that we see are spread, with their sizes.

  Inside `shard_map` arrays are local.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return {
    axis: size for axis, size in mesh.shape.items() if axis not in mesh.manual_axes
  }


def _devices() -> int:
  """Number of devices over which the arrays that we see are spread."""
  return math.prod(_shared_axes().values())


def _pictures_are_split() -> bool:
  """Whether devices share the rows of each picture, and so the tokens of each frame."""
  return jax.sharding.get_abstract_mesh().shape.get('sequence', 1) > 1


def _query_bytes(q: jax.Array, k: jax.Array) -> int:
  """Bytes of float32 logits on one device for each query of a head."""
  return -(-4 * q.shape[0] * q.shape[2] * k.shape[1] // _devices())


def attend(
  q: jax.Array, k: jax.Array, v: jax.Array, *, implementation: str = 'auto'
) -> jax.Array:
  """softmax(q k^T / sqrt(d)) v per head, softmax in float32.

  Args:
    q: `[b,t,heads,d]`.
    k: `[b,s,heads,d]`.
    v: `[b,s,heads,d]`.
    implementation: 'auto', which takes what `choose` says, or the name of a kernel.
      'cudnn' raises where it cannot run.

  Returns:
    `[b,t,heads,d]`.
  """
  if implementation != 'auto':
    return _run(implementation, q, k, v)
  b, t, _, d = q.shape
  kernel = functools.partial(
    choose,
    current(),
    q.dtype,
    t,
    k.shape[1],
    d,
    logits=t * _query_bytes(q, k),
    whole=b % _devices() == 0 and not _pictures_are_split(),
  )
  inference = kernel(training=False)
  training = kernel(training=True)
  if inference == training:
    return _run(inference, q, k, v)
  return _by_use(inference, training, q, k, v)


def _run(kernel: str, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """Attention by the kernel of that name."""
  if kernel == 'chunked':
    room = max(1, LOGITS_LIMIT // _query_bytes(q, k))
    return _chunked(q, k, v, chunk=min(q.shape[1], room))
  if kernel == 'cudnn' and _devices() > 1:
    # It refuses tokens or heads that devices share, and keys laid out unlike queries.
    rows = jax.P(tuple(_shared_axes()))
    q, k, v = (lax.with_sharding_constraint(x, rows) for x in (q, k, v))
  return jax.nn.dot_product_attention(q, k, v, implementation=kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _by_use(inference: str, training: str, q, k, v) -> jax.Array:
  """Attention by one kernel, and by another one where there is a gradient."""
  return _run(inference, q, k, v)


def _by_use_forward(inference: str, training: str, q, k, v):
  return jax.vjp(functools.partial(_run, training), q, k, v)


def _by_use_backward(inference: str, training: str, pullback, gradient):
  return pullback(gradient)


_by_use.defvjp(_by_use_forward, _by_use_backward)


def _chunked(q: jax.Array, k: jax.Array, v: jax.Array, *, chunk: int) -> jax.Array:
  """Logits exist for `chunk` queries at a time, in the backward pass too.

  Query `i` is in chunk `i % count`: devices that share the queries keep their own in
  every chunk.
  """
  b, t, heads, d = q.shape
  count = -(-t // chunk)
  chunk = -(-t // count)  # equal chunks need the least padding
  q = jnp.pad(q, ((0, 0), (0, count * chunk - t), (0, 0), (0, 0)))
  one = jax.checkpoint(
    lambda q: jax.nn.dot_product_attention(q, k, v, implementation='xla')
  )
  out = lax.map(one, jnp.moveaxis(q.reshape(b, chunk, count, heads, d), 2, 0))
  return jnp.moveaxis(out, 0, 2).reshape(b, count * chunk, heads, d)[:, :t]


class SelfAttention(nnx.Module):
  """Multi-head attention of tokens to each other (published name `attn1`)."""

  def __init__(self, channels: int, heads: int, *, dtype=None, rngs):
    linear = functools.partial(nnx.Linear, dtype=dtype, rngs=rngs)
    self.to_q = linear(channels, channels, use_bias=False)
    self.to_k = linear(channels, channels, use_bias=False)
    self.to_v = linear(channels, channels, use_bias=False)
    self.to_out = nnx.List([linear(channels, channels)])
    self.heads = heads

  def __call__(self, x: jax.Array) -> jax.Array:
    """x `[...,T,C]`, attention along T; returns the same shape, without the
    residual.
    """

    def split(y):
      return y.reshape(-1, y.shape[-2], self.heads, y.shape[-1] // self.heads)

    y = attend(split(self.to_q(x)), split(self.to_k(x)), split(self.to_v(x)))
    return self.to_out[0](y.reshape(x.shape))


class Adapters(nnx.Module):
  """Key and value projections of the decoupled adapters (published name
  `processor`).
  """

  def __init__(self, context_dim: int, channels: int, count: int, *, dtype=None, rngs):
    linear = functools.partial(
      nnx.Linear, context_dim, channels, use_bias=False, dtype=dtype, rngs=rngs
    )
    self.to_k_ip = nnx.List([linear() for _ in range(count)])
    self.to_v_ip = nnx.List([linear() for _ in range(count)])


class CrossAttention(nnx.Module):
  """Attention to the image, plus one decoupled attention per adapter with the same
  queries (`attn2`).

  u = SDPA(q, K_image, V_image) + sum_i M SDPA(q, K_i, V_i); output to_out(u). Adapter 0
  is audio, 1 emotion (paper section 3.4; the published scheme is that of IP-Adapter).
  Keys and values come from `context_kv`: they depend neither on the noise nor on the
  pixel, so they are made once per clip.
  """

  def __init__(
    self,
    channels: int,
    heads: int,
    context_dim: int,
    adapters: int,
    *,
    dtype=None,
    rngs,
  ):
    linear = functools.partial(nnx.Linear, dtype=dtype, rngs=rngs)
    self.to_q = linear(channels, channels, use_bias=False)
    self.to_k = linear(context_dim, channels, use_bias=False)
    self.to_v = linear(context_dim, channels, use_bias=False)
    self.to_out = nnx.List([linear(channels, channels)])
    self.processor = Adapters(context_dim, channels, adapters, dtype=dtype, rngs=rngs)
    self.heads = heads

  def context_kv(
    self, contexts: Sequence[jax.Array | None]
  ) -> tuple[KeyValue | None, ...]:
    """Projects the image tokens and each adapter's tokens, all `[B,F',T,D]`, to keys
    and values `[B,F',T,C]`.

    None stays None: that adapter is off.
    """
    projections = [
      (self.to_k, self.to_v),
      *zip(self.processor.to_k_ip, self.processor.to_v_ip),
    ]
    return tuple(
      None if tokens is None else (to_k(tokens), to_v(tokens))
      for (to_k, to_v), tokens in zip(projections, contexts, strict=True)
    )

  def __call__(
    self, x: jax.Array, kv: Sequence[KeyValue | None], mask: jax.Array | None = None
  ) -> jax.Array:
    """Attends to the contexts.

    Args:
      x: `[B,F,T,C]`.
      kv: `context_kv` of image and adapters, `[B,F',S,C]`; F' is F, or 1 if all frames
        share it.
      mask: `[B,T]` weights of the adapters' contribution, or None for 1.

    Returns:
      `[B,F,T,C]`, or something that broadcasts to it when all queries get the same
      answer.
    """
    image, *adapters = kv
    q = self.to_q(x)
    # Attention to one token is its value, whatever the query.
    u = image[1] if image[1].shape[2] == 1 else self._sdpa(q, *image)
    for pair in adapters:
      if pair is not None:
        y = self._sdpa(q, *pair)
        u = u + (y if mask is None else y * mask[:, None, :, None].astype(y.dtype))
    return self.to_out[0](u)

  def _sdpa(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Frames that share keys become more queries to the same keys: nothing is
    copied.
    """
    b, frames, s, c = k.shape
    if (
      turned := _pictures_are_split() and frames == 1
    ):  # what is split goes first, or joining would gather it
      q = q.swapaxes(1, 2)

    def split(y):
      return y.reshape(b * frames, -1, self.heads, c // self.heads)

    y = attend(split(q), split(k), split(v)).reshape(q.shape)
    return y.swapaxes(1, 2) if turned else y
