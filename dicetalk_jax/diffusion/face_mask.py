"""The face mask on the token grid of each UNet level, as weights of the adapters'
attention.
"""

import math

import jax
import jax.numpy as jnp


def token_grid(tokens: int, height: int, width: int) -> tuple[int, int]:
  """Rows and columns that the published program assigns to a number of tokens of a
  `height` x `width` mask.

  In double precision, and with its rounding: nearly always the latent grid, but not for
  every aspect ratio. (Sonic takes the root in single precision, which is always right;
  no size with a shorter side of 512 tells the two apart.)
  """
  rows = math.floor(math.sqrt(tokens / (width / height)))
  rows += tokens % rows != 0
  return rows, tokens // rows


def resample_mask(mask: jax.Array, tokens: int) -> jax.Array:
  """Resamples a mask to the tokens of one level.

  Bicubic with a = -0.75, half-pixel centres, no antialiasing; values may leave [0,1] a
  little at edges.

  Args:
    mask: `[B,H,W]`.
    tokens: number of tokens q of the level.

  Returns:
    float32 `[B,q]`, row-major, cut or zero-padded where the grid does not have q cells.
  """
  rows, columns = token_grid(tokens, *mask.shape[1:])
  mask = jnp.asarray(mask, jnp.float32)
  grid = jax.image.resize(
    mask,
    (len(mask), rows, columns),
    jax.image.ResizeMethod.CUBIC_PYTORCH,
    antialias=False,
  )
  flat = grid.reshape(len(mask), -1)[:, :tokens]
  return jnp.pad(flat, ((0, 0), (0, tokens - flat.shape[1])))


def mask_pyramid(
  mask: jax.Array, latent_size: tuple[int, int], levels: int
) -> tuple[jax.Array, ...]:
  """The masks for the UNet: mask `[B,H,W]`, latents h x w; returns
  `[B,(h/2**i)*(w/2**i)]` for each level i.
  """
  height, width = latent_size
  return tuple(resample_mask(mask, (height >> i) * (width >> i)) for i in range(levels))
