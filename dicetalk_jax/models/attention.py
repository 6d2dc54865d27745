"""Attention: the choice of its kernel, and the two attention layers of the UNet."""

from collections.abc import Callable, Sequence
import functools
import math
from typing import Literal, NamedTuple

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dicetalk_jax.models import fused, fused_cross_attention
from dicetalk_jax.models.target import Target, current, shared_axes

# Bytes of float32 logits that may exist on a device at once. Beyond that, queries are
# processed in chunks.
LOGITS_LIMIT = 2**29

Kernel = Literal[
  'cudnn',  # fused: logits are never stored
  'xla',  # all logits in memory
  'chunked',  # the logits of some queries at a time: bounded memory
]


class KeyValue(NamedTuple):
  """Keys and values of the S tokens of a context; F is 1 if all frames share it."""

  key: Float[Array, 'B F S C']
  value: Float[Array, 'B F S C']


def choose_kernel(
  target: Target,
  dtype: DTypeLike,
  t: int,
  s: int,
  d: int,
  *,
  logits: int,
  rows_local: bool,
  training: bool,
) -> Kernel:
  """Chooses the kernel for attention of `t` queries to `s` keys of `d` channels.

  Args:
    target: the devices that the program is compiled for.
    dtype: of queries, keys and values.
    t: number of queries.
    s: number of keys.
    d: channels of a head.
    logits: bytes of all float32 logits on one device.
    rows_local: each device holds whole rows, with all their tokens.
    training: whether there will be a gradient.
  """
  ampere = target.platform == 'cuda' and target.capability >= 8
  half_precision = dtype in (jnp.bfloat16, jnp.float16)
  fits = d % 8 == 0 and d <= 128 and rows_local
  # JAX refuses the gradient of cuDNN's attention if a length is odd.
  differentiable = t % 2 == 0 and s % 2 == 0
  if ampere and half_precision and fits and (differentiable or not training):
    return 'cudnn'
  return 'xla' if logits <= LOGITS_LIMIT else 'chunked'


def attend(
  q: Float[Array, 'b t heads d'],
  k: Float[Array, 'b s heads d'],
  v: Float[Array, 'b s heads d'],
  *,
  implementation: Kernel | Literal['auto'] = 'auto',
) -> Float[Array, 'b t heads d']:
  """Computes softmax(q k^T / sqrt(d)) v for each head, with the softmax in float32.

  Args:
    q: queries.
    k: keys.
    v: values.
    implementation: 'auto' uses the kernel that `choose_kernel` returns; the name of a
      kernel forces it. 'cudnn' raises where it cannot run.
  """
  if implementation != 'auto':
    return _attend_with(implementation, q, k, v)
  rows, t, _, d = q.shape
  choose = functools.partial(
    choose_kernel,
    current(),
    q.dtype,
    t,
    k.shape[1],
    d,
    logits=t * _bytes_per_query(q, k),
    rows_local=rows % _device_count() == 0 and not _image_rows_are_split(),
  )
  inference_kernel = choose(training=False)
  training_kernel = choose(training=True)
  if inference_kernel == training_kernel:
    return _attend_with(inference_kernel, q, k, v)
  return _attend_with_own_training_kernel(inference_kernel, training_kernel, q, k, v)


def _device_count() -> int:
  """The number of devices over which the visible arrays are spread."""
  return math.prod(shared_axes().values())


def _image_rows_are_split() -> bool:
  """Whether devices split the height of every image, and so the tokens of a frame."""
  devices: int = jax.sharding.get_abstract_mesh().shape.get('sequence', 1)
  return devices > 1


def _bytes_per_query(q: Array, k: Array) -> int:
  """Bytes of float32 logits on one device for one query position."""
  return -(-4 * q.shape[0] * q.shape[2] * k.shape[1] // _device_count())


def _attend_with(kernel: Kernel, q: Array, k: Array, v: Array) -> Array:
  """Runs attention with the kernel of that name."""
  if kernel == 'chunked':
    room = max(1, LOGITS_LIMIT // _bytes_per_query(q, k))
    return _attend_in_chunks(q, k, v, chunk=min(q.shape[1], room))
  if kernel == 'cudnn' and _device_count() > 1:
    # cuDNN refuses tokens or heads that devices share, and keys laid out unlike
    # queries.
    rows = jax.P(tuple(shared_axes()))
    q, k, v = (lax.with_sharding_constraint(x, rows) for x in (q, k, v))
  return jax.nn.dot_product_attention(q, k, v, implementation=kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend_with_own_training_kernel(
  inference_kernel: Kernel, training_kernel: Kernel, q: Array, k: Array, v: Array
) -> Array:
  """Runs one kernel without a gradient, and another one if there is a gradient."""
  return _attend_with(inference_kernel, q, k, v)


# The function that maps the gradient of the output to those of q, k and v.
_Pullback = Callable[[Array], tuple[Array, Array, Array]]


def _training_forward(
  inference_kernel: Kernel, training_kernel: Kernel, q: Array, k: Array, v: Array
) -> tuple[Array, _Pullback]:
  return jax.vjp(functools.partial(_attend_with, training_kernel), q, k, v)


def _training_backward(
  inference_kernel: Kernel,
  training_kernel: Kernel,
  pullback: _Pullback,
  gradient: Array,
) -> tuple[Array, Array, Array]:
  return pullback(gradient)


_attend_with_own_training_kernel.defvjp(_training_forward, _training_backward)


def _attend_in_chunks(q: Array, k: Array, v: Array, *, chunk: int) -> Array:
  """Keeps the logits of `chunk` queries at a time, in the backward pass too.

  Query `i` is in chunk `i % count`: devices that share the queries keep their own in
  every chunk.
  """
  b, t, heads, d = q.shape
  count = -(-t // chunk)
  # Equal chunks need the least padding.
  chunk = -(-t // count)

  @jax.checkpoint
  def attend_chunk(q: Array) -> Array:
    return jax.nn.dot_product_attention(q, k, v, implementation='xla')

  q = jnp.pad(q, ((0, 0), (0, count * chunk - t), (0, 0), (0, 0)))
  chunks = jnp.moveaxis(q.reshape(b, chunk, count, heads, d), 2, 0)
  out = lax.map(attend_chunk, chunks)
  return jnp.moveaxis(out, 0, 2).reshape(b, count * chunk, heads, d)[:, :t]


class SelfAttention(nnx.Module):
  """Multi-head attention of tokens to each other (published name `attn1`)."""

  def __init__(
    self,
    channels: int,
    heads: int,
    *,
    dtype: DTypeLike | None = None,
    rngs: nnx.Rngs,
  ):
    linear = functools.partial(nnx.Linear, dtype=dtype, rngs=rngs)
    self.to_q = linear(channels, channels, use_bias=False)
    self.to_k = linear(channels, channels, use_bias=False)
    self.to_v = linear(channels, channels, use_bias=False)
    self.to_out = nnx.List([linear(channels, channels)])
    self.heads = heads

  def __call__(self, x: Float[Array, '*rows T C']) -> Float[Array, '*rows T C']:
    """Attends along T; the residual is left to the caller."""

    def split_heads(y: Array) -> Array:
      return y.reshape(-1, y.shape[-2], self.heads, y.shape[-1] // self.heads)

    q = split_heads(self.to_q(x))
    k = split_heads(self.to_k(x))
    v = split_heads(self.to_v(x))
    return self.to_out[0](attend(q, k, v).reshape(x.shape))


class Adapters(nnx.Module):
  """The adapters' key and value projections (published name `processor`)."""

  def __init__(
    self,
    context_dim: int,
    channels: int,
    count: int,
    *,
    dtype: DTypeLike | None = None,
    rngs: nnx.Rngs,
  ):
    linear = functools.partial(
      nnx.Linear, context_dim, channels, use_bias=False, dtype=dtype, rngs=rngs
    )
    self.to_k_ip = nnx.List([linear() for _ in range(count)])
    self.to_v_ip = nnx.List([linear() for _ in range(count)])


class CrossAttention(nnx.Module):
  """Attention to the image, plus one decoupled attention per adapter (`attn2`).

  All share their queries:
  u = SDPA(q, K_image, V_image) + sum_i M SDPA(q, K_i, V_i); output to_out(u). Adapter 0
  is audio, adapter 1 is emotion (paper equation 14; the scheme is IP-Adapter's). SDPA
  is scaled dot-product attention (`attend`). M = `mask`; adapter scales are applied to
  the values by the UNet.

  Keys and values come from `context_kv`. They depend neither on the noise nor on the
  pixel, so they are computed once per clip.
  """

  def __init__(
    self,
    channels: int,
    heads: int,
    context_dim: int,
    adapters: int,
    *,
    dtype: DTypeLike | None = None,
    rngs: nnx.Rngs,
  ):
    linear = functools.partial(nnx.Linear, dtype=dtype, rngs=rngs)
    self.to_q = linear(channels, channels, use_bias=False)
    self.to_k = linear(context_dim, channels, use_bias=False)
    self.to_v = linear(context_dim, channels, use_bias=False)
    self.to_out = nnx.List([linear(channels, channels)])
    self.processor = Adapters(context_dim, channels, adapters, dtype=dtype, rngs=rngs)
    self.heads = heads

  def context_kv(
    self, contexts: Sequence[Float[Array, 'B _ _ D'] | None]
  ) -> tuple[KeyValue | None, ...]:
    """Projects context tokens to keys and values.

    Args:
      contexts: the image's tokens, then those of each adapter, `[B,F',S,D]`. None turns
        an adapter off.

    Returns:
      Keys and values `[B,F',S,C]` of each context; None where the context is None.
    """
    projections = [
      (self.to_k, self.to_v),
      *zip(self.processor.to_k_ip, self.processor.to_v_ip),
    ]
    return tuple(
      None if tokens is None else KeyValue(to_k(tokens), to_v(tokens))
      for (to_k, to_v), tokens in zip(projections, contexts, strict=True)
    )

  def __call__(
    self,
    x: Float[Array, 'B F T C'],
    kv: Sequence[KeyValue | None],
    mask: Float[Array, '#B T'] | None = None,
  ) -> Float[Array, '#B #F #T C']:
    """Attends to the contexts.

    Args:
      x: tokens of each frame.
      kv: `context_kv` of image and adapters, `[B,F',S,C]`; F' is F, or 1 if all frames
        share it.
      mask: weights of the adapters' contribution, or None for 1.

    Returns:
      An array that broadcasts to the shape of x: if all queries get the same answer, it
      is not repeated.
    """
    image, *adapters = kv
    assert image is not None, 'only adapters can be turned off'
    used = [context for context in adapters if context is not None]
    q = self.to_q(x)
    if fused_cross_attention.fits(q, self.heads, image.value, used):
      u = fused.with_plain_gradient(
        functools.partial(_attend_in_one_kernel, self.heads),
        functools.partial(_attend_to_each, self.heads),
        q,
        image,
        used,
        mask,
      )
    else:
      u = _attend_to_each(self.heads, q, image, used, mask)
    return self.to_out[0](u)


def _attend_in_one_kernel(
  heads: int,
  q: Array,
  image: KeyValue,
  adapters: Sequence[KeyValue],
  mask: Array | None,
) -> Array:
  """Like `_attend_to_each`; see `fused_cross_attention`."""
  return fused_cross_attention.attend_to_adapters(q, image.value, adapters, mask, heads)


def _attend_to_each(
  heads: int,
  q: Array,
  image: KeyValue,
  adapters: Sequence[KeyValue],
  mask: Array | None,
) -> Array:
  """Attends to the image and to the adapters, one after the other."""
  if image.value.shape[2] == 1:
    # Attention to a single token is its value, whatever the query.
    u = image.value
  else:
    u = _attend_to(heads, q, image)
  for context in adapters:
    y = _attend_to(heads, q, context)
    if mask is not None:
      y = y * mask[:, None, :, None].astype(y.dtype)
    u = u + y
  return u


def _attend_to(heads: int, q: Array, context: KeyValue) -> Array:
  """Attends to one context.

  Frames that share keys become more queries to the same keys: nothing is copied.
  """
  b, frames, _, c = context.key.shape
  # Joining frames and tokens would gather tokens that devices share, unless the tokens
  # come first.
  tokens_first = frames == 1 and _image_rows_are_split()
  if tokens_first:
    q = q.swapaxes(1, 2)

  def split_heads(y: Array) -> Array:
    return y.reshape(b * frames, -1, heads, c // heads)

  queries = split_heads(q)
  keys = split_heads(context.key)
  values = split_heads(context.value)
  y = attend(queries, keys, values).reshape(q.shape)
  return y.swapaxes(1, 2) if tokens_first else y
