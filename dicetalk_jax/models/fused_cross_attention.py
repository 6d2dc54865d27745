"""The cross-attention of the UNet in one kernel, which reads the queries once.

Otherwise each adapter's attention reads the queries and writes its own result, and one
more kernel adds the results. All of them are bound by memory: keys are few.
"""

from collections.abc import Sequence
import functools
import math
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
import jax.numpy as jnp
from jaxtyping import Array, Float

from dicetalk_jax.models import fused

# A program computes this many queries of one head, or SHORT ones if a frame has no
# more. It reads 16 KB of queries, and 16 KB of keys and values of two adapters from the
# second-level cache. Two (Ampere, 106 registers for each of 256 threads) or three
# programs (Hopper, 74) fit on a multiprocessor; 26 KB on the way keep a Hopper's memory
# busy, at a latency of 0.8 us.
QUERIES = 128
SHORT = 64
WARPS = 8
# Matrix units take powers of two from 16 on. More keys would not fit into registers.
KEYS = (16, 32, 64)
HEAD_CHANNELS = (16, 32, 64, 128)

KeysAndValues = tuple[Float[Array, 'B _ _ C'], Float[Array, 'B _ _ C']]
# Queries, value of the image, adapters, and the mask or nothing.
_Arrays = tuple[Array, Array, tuple[KeysAndValues, ...], tuple[Array, ...]]


def fits(
  q: Float[Array, 'B F T C'],
  heads: int,
  image: Float[Array, 'B _ _ C'],
  adapters: Sequence[KeysAndValues],
) -> bool:
  """Whether `attend_to_adapters` takes these arrays."""
  return (
    bool(adapters)
    and image.shape[2] == 1
    and q.shape[-1] // heads in HEAD_CHANNELS
    and all(key.shape[2] in KEYS for key, _ in adapters)
    and fused.can_run(q.dtype, q.shape[0])
  )


def attend_to_adapters(
  q: Float[Array, 'B F T C'],
  image: Float[Array, 'B _ 1 C'],
  adapters: Sequence[KeysAndValues],
  mask: Float[Array, '#B T'] | None,
  heads: int,
) -> Float[Array, 'B F T C']:
  """Computes image + M * sum_i softmax(q K_i^T / sqrt(d)) V_i for heads of d channels.

  Softmax and sums are float32, and only the result is rounded.

  Args:
    q: queries.
    image: the value of the image's only token, for each frame or for all (1).
    adapters: keys and values, for each frame or for all (1).
    mask: M, the weights of the adapters; None for 1.
    heads: number of heads.
  """
  masks: tuple[Array, ...] = ()
  if mask is not None:
    masks = (jnp.broadcast_to(mask.astype(q.dtype), (len(q), q.shape[2])),)

  def run(rows: _Arrays, _: None) -> Array:
    return _call(rows, heads)

  return fused.by_rows(run, (q, image, tuple(adapters), masks), None)


def _call(arrays: _Arrays, heads: int) -> Array:
  q, image, adapters, masks = arrays
  rows, frames, tokens, channels = q.shape
  d = channels // heads
  block = QUERIES if tokens > SHORT else SHORT
  # Heads run fastest: together they read whole rows of q.
  grid = (heads, pl.cdiv(tokens, block), rows * frames)
  queries = pl.BlockSpec(
    (None, None, block, d), lambda h, t, n: (n // frames, n % frames, t, h)
  )

  def context(x: Array) -> pl.BlockSpec:
    """One head of all tokens; an array that frames share has only frame 0."""
    is_shared = x.shape[1] == 1
    return pl.BlockSpec(
      (None, None, x.shape[2], d),
      lambda h, t, n: (n // frames, 0 if is_shared else n % frames, 0, h),
    )

  weights = pl.BlockSpec((None, block), lambda h, t, n: (n // frames, t))
  out: Array = pl.pallas_call(
    functools.partial(_kernel, tokens=tokens),
    name='attend_to_adapters',
    grid=grid,
    in_specs=[
      queries,
      context(image),
      jax.tree.map(context, adapters),
      jax.tree.map(lambda _: weights, masks),
    ],
    out_specs=queries,
    out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
    compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=1),
  )(*arrays)
  return out


def _kernel(
  q_ref: Any,
  image_ref: Any,
  adapter_refs: Any,
  mask_refs: Any,
  out_ref: Any,
  *,
  tokens: int,
) -> None:
  """Computes the result of one block of queries, for one head."""
  block, d = q_ref.shape
  # Only the last block may reach beyond the end of a frame.
  is_ragged = tokens % block > 0
  inside = pl.program_id(1) * block + lax.iota(jnp.int32, block) < tokens

  def load(ref: Any, mask: Array) -> Array:
    if not is_ragged:
      return triton.load(ref)
    return triton.load(ref, mask=jnp.broadcast_to(mask, ref.shape), other=0)

  q = load(q_ref, inside[:, None])
  out = jnp.zeros((block, d), jnp.float32)
  for key_ref, value_ref in adapter_refs:
    logits = triton.dot(q, key_ref[...], trans_b=True)
    # Powers of two are one instruction.
    logits *= 1.4426950408889634 / math.sqrt(d)
    weights = jnp.exp2(logits - logits.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    out += triton.dot(weights.astype(q.dtype), value_ref[...])
  for mask_ref in mask_refs:
    out *= load(mask_ref, inside)[:, None].astype(jnp.float32)
  out = (out + image_ref[...].astype(jnp.float32)).astype(out_ref.dtype)

  if is_ragged:
    triton.store(out_ref, out, mask=jnp.broadcast_to(inside[:, None], out.shape))
  else:
    out_ref[...] = out
