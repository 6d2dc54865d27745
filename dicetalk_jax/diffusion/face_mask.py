"""The face mask on the token grid of each UNet level, as weights of the adapters'
attention.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float


def token_grid(tokens: int, height: int, width: int) -> tuple[int, int]:
  """Rows and columns that the reference implementation assigns to a number of tokens.

  It computes them in double precision, with its own rounding: nearly always the latent
  grid, but not for every aspect ratio. (Sonic takes the root in single precision, which
  is always right; the two agree for every size with a shorter side of 512.)

  Args:
    tokens: number of tokens of the level.
    height, width: size of the mask.
  """
  rows = math.floor(math.sqrt(tokens / (width / height)))
  if tokens % rows != 0:
    rows += 1
  return rows, tokens // rows


def resample_mask(
  mask: Float[ArrayLike, 'B H W'], tokens: int
) -> Float[Array, 'B {tokens}']:
  """Resamples a mask to the tokens of one level.

  Bicubic with a = -0.75, half-pixel centres, no antialiasing; values may leave [0,1] a
  little at edges.

  Args:
    mask: weights of pixels.
    tokens: number of tokens of the level.

  Returns:
    float32, row-major, cut or zero-padded if the grid does not have that many cells.
  """
  mask = jnp.asarray(mask, jnp.float32)
  batch, height, width = mask.shape
  rows, columns = token_grid(tokens, height, width)
  grid = jax.image.resize(
    mask,
    (batch, rows, columns),
    jax.image.ResizeMethod.CUBIC_PYTORCH,
    antialias=False,
  )
  flat = grid.reshape(batch, -1)[:, :tokens]
  return jnp.pad(flat, ((0, 0), (0, tokens - flat.shape[1])))


def mask_pyramid(
  mask: Float[ArrayLike, 'B H W'], latent_size: tuple[int, int], levels: int
) -> tuple[Float[Array, 'B _'], ...]:
  """Resamples a mask to every level of the UNet.

  Args:
    mask: weights of pixels.
    latent_size: (h, w).
    levels: number of levels.

  Returns:
    `[B,(h/2**i)*(w/2**i)]` for each level i.
  """
  height, width = latent_size
  return tuple(resample_mask(mask, (height >> i) * (width >> i)) for i in range(levels))
