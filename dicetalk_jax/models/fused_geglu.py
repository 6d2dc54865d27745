"""GEGLU in one kernel: its input is read and its output written, nothing else.

XLA writes the product, twice as wide as the output, and reads it again in a second
kernel. It cannot join the two: its products take no epilogue that needs two columns.
"""

import functools
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dicetalk_jax.models import fused
from dicetalk_jax.models.layers import gelu

# A program computes 128 rows of 64 values and their 64 gates. Two programs fit on a
# Hopper's multiprocessor (102 registers for each of 256 threads, 96 KB of shared memory
# for three stages), so that one multiplies while the other evaluates GELU. That takes
# half as long as the product at 320 channels, and one larger program would not hide it.
# On Ampere (154 registers) a program is alone.
ROWS = 128
COLUMNS = 64
DEPTH = 64
WARPS = 8
STAGES = 3
# Wider inputs have more arithmetic for each byte saved. A tile of this size loads 32 KB
# per 2.1 MFLOP, which a Hopper's second-level cache (39 bytes per clock and
# multiprocessor) delivers at 0.6 to 0.7 of the rate of cuBLAS, whose tiles are larger
# and shared by multicast. At that rate 640 channels only break even.
WIDEST = 320


def fits(dtype: DTypeLike, shape: tuple[int, ...], width: int) -> bool:
  """Whether `geglu` takes `[*rows, channels]` to `[*rows, width]`."""
  rows, *_, channels = shape
  return (
    fused.can_run(dtype, rows)
    and channels % DEPTH == 0
    and channels <= WIDEST
    and width % COLUMNS == 0
  )


def geglu(
  x: Float[Array, '*rows cin'],
  kernel: Float[Array, 'cin both'],
  bias: Float[Array, ' both'],
) -> Float[Array, '*rows cout']:
  """Computes a * GELU(g), where a and g are the halves of x @ kernel + bias.

  Sums and GELU are float32, and only the result is rounded.
  """
  out: Array = fused.with_plain_gradient(_fused, _plain, x, kernel, bias)
  return out


def _plain(x: Array, kernel: Array, bias: Array) -> Array:
  a, g = jnp.split(x @ kernel + bias, 2, axis=-1)
  return a * gelu(g)


def _fused(x: Array, kernel: Array, bias: Array) -> Array:
  def run(x: Array, weights: tuple[Array, Array]) -> Array:
    out = _call(x.reshape(-1, x.shape[-1]), *weights)
    return out.reshape(*x.shape[:-1], -1)

  return fused.by_rows(run, x, (kernel, bias))


def _call(x: Array, kernel: Array, bias: Array) -> Array:
  rows, channels = x.shape
  width = kernel.shape[1] // 2
  gates = width // COLUMNS  # blocks before the first gate
  # Columns run fastest: programs that run together share rows of x, and all weights of
  # a layer stay in the second-level cache.
  grid = (width // COLUMNS, pl.cdiv(rows, ROWS))
  weights = (channels, COLUMNS)
  out: Array = pl.pallas_call(
    functools.partial(_kernel, rows=rows),
    name='geglu',
    grid=grid,
    in_specs=[
      pl.BlockSpec((ROWS, channels), lambda j, i: (i, 0)),
      pl.BlockSpec(weights, lambda j, i: (0, j)),
      pl.BlockSpec(weights, lambda j, i: (0, j + gates)),
      pl.BlockSpec((COLUMNS,), lambda j, i: (j,)),
      pl.BlockSpec((COLUMNS,), lambda j, i: (j + gates,)),
    ],
    out_specs=pl.BlockSpec((ROWS, COLUMNS), lambda j, i: (i, j)),
    out_shape=jax.ShapeDtypeStruct((rows, width), x.dtype),
    compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=STAGES),
  )(x, kernel, kernel, bias, bias)
  return out


def _kernel(
  x_ref: Any,
  a_ref: Any,
  g_ref: Any,
  a_bias_ref: Any,
  g_bias_ref: Any,
  out_ref: Any,
  *,
  rows: int,
) -> None:
  """Computes one block of the output."""
  # Only the last block of rows may reach beyond the end.
  first = pl.program_id(1) * ROWS
  inside = (first + lax.iota(jnp.int32, ROWS) < rows)[:, None]
  is_ragged = rows % ROWS > 0

  def load_rows(depth: Any) -> Array:
    if not is_ragged:
      return triton.load(x_ref.at[:, depth])
    mask = jnp.broadcast_to(inside, (ROWS, DEPTH))
    return triton.load(x_ref.at[:, depth], mask=mask, other=0)

  def add_products(i: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
    a, g = sums
    depth = pl.ds(i * DEPTH, DEPTH)
    x = load_rows(depth)
    a += triton.dot(x, triton.load(a_ref.at[depth, :]))
    g += triton.dot(x, triton.load(g_ref.at[depth, :]))
    return a, g

  zeros = jnp.zeros((ROWS, COLUMNS), jnp.float32)
  a, g = lax.fori_loop(0, x_ref.shape[1] // DEPTH, add_products, (zeros, zeros))
  a += a_bias_ref[...].astype(jnp.float32)
  g += g_bias_ref[...].astype(jnp.float32)
  out = (a * exact_gelu(g)).astype(out_ref.dtype)
  if is_ragged:
    mask = jnp.broadcast_to(inside, out.shape)
    triton.store(out_ref, out, mask=mask)
  else:
    out_ref[...] = out


def exact_gelu(x: Float[Array, '*shape']) -> Float[Array, '*shape']:
  """The exact GELU of float32 values, for kernels: Pallas has no erf there.

  Half of erfc(|x| / sqrt 2) by formula 7.1.26 of Abramowitz and Stegun, with an error
  of at most 0.8e-7; half precision rounds at 5e-4.
  """
  t = 1 / (1 + 0.3275911 * 0.5**0.5 * jnp.abs(x))
  sum_of_powers = t * (
    0.254829592
    + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))
  )
  # Powers of two are one instruction: exp(-x**2 / 2).
  tail = 0.5 * sum_of_powers * jnp.exp2(-0.5 * 1.4426950408889634 * jnp.square(x))
  return x * jnp.where(x > 0, 1 - tail, tail)
