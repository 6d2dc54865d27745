"""Tools of the painter: smooth steps, noise, textures and patches of the canvas.

Everything stays float32. A canvas is [3, H, W] with values in [0, 1]; whole planes keep
the inner loops of NumPy long.
"""

import functools

import numpy as np


def unit(x: np.ndarray | float) -> np.ndarray:
  """Clips to [0, 1]; two plain ufuncs cost less than `np.clip` on small arrays."""
  return np.minimum(np.maximum(x, 0), 1)


def smooth(low: float, high: float, x: np.ndarray | float) -> np.ndarray:
  """Makes a smooth step from 0 at `low` to 1 at `high`; low > high reverses it."""
  t = unit((x - low) * (1 / (high - low)))
  return t * t * (3 - 2 * t)


def bump(x, y, cx: float, cy: float, rx: float, ry: float) -> np.ndarray:
  """Makes a Gaussian of height 1 and radii rx, ry."""
  dx, dy = (x - cx) * (1 / rx), (y - cy) * (1 / ry)
  return np.exp(-(dx * dx + dy * dy))


def band(d, width: float) -> np.ndarray:
  """Makes the Gaussian profile of a line; d is the distance from it."""
  d = d * (1 / width)
  return np.exp(-d * d)


@functools.cache
def _lattice() -> np.ndarray:
  """Draws a table of random values.

  With a table instead of a hash function, pixels depend on no maths library.
  """
  return np.random.default_rng(0x5EED).random((256, 256), np.float32)


def noise(x: np.ndarray, y, seed: int) -> np.ndarray:
  """Makes value noise in [0, 1], with a period of 256 cells; x and y are in cells."""
  # The offsets make everything positive, so that truncation is floor.
  x, y = x + np.float32(512.3 + seed % 251), y + np.float32(512.1 + seed % 241)
  ix, iy = x.astype(np.intp), y.astype(np.intp)
  fx, fy = x - ix.astype(np.float32), y - iy.astype(np.float32)
  fx, fy = fx * fx * (3 - 2 * fx), fy * fy * (3 - 2 * fy)
  jx, iy, jy = (ix + 1) & 255, (iy & 255) << 8, ((iy + 1) & 255) << 8
  ix &= 255
  read = _lattice().take
  top, bottom = read(iy | ix), read(jy | ix)
  top += fx * (read(iy | jx) - top)
  bottom += fx * (read(jy | jx) - bottom)
  return top + fy * (bottom - top)


def dots(x: np.ndarray, y: np.ndarray, seed: int) -> np.ndarray:
  """Makes soft spots in [0, 1], at most one per cell; x and y are in cells."""
  table = _lattice()
  ix, iy = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)

  def value(k):
    return table[(iy + 37 * k + seed) & 255, (ix + 91 * k) & 255]

  dx, dy = x - ix - 0.2 - 0.6 * value(0), y - iy - 0.2 - 0.6 * value(1)
  radius = 0.10 + 0.18 * value(2)
  r = np.sqrt(dx * dx + dy * dy) / radius
  return (smooth(1.2, 0.6, r) * (value(3) > 0.45) * (0.4 + 0.6 * value(4))).astype(
    np.float32
  )


def tint(colour) -> np.ndarray:
  """Makes a colour a float32 array that broadcasts over a canvas: [3, 1, 1]."""
  return np.array(colour, np.float32)[:, None, None]


class Texture:
  """Channels over a rectangle of the face plane, read with bilinear interpolation."""

  def __init__(
    self, channels: np.ndarray, origin: tuple[float, float], resolution: float
  ):
    """Stores the channels.

    Args:
      channels: [C, h, w].
      origin: (x, y) of the corner.
      resolution: in texels per face unit.
    """
    self._depth, self._height, self._width = channels.shape
    self._texels = np.ascontiguousarray(channels, np.float32).reshape(self._depth, -1)
    self._origin, self._resolution = origin, resolution

  def sample(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Reads values [C, h, w] at (x, y), both [h, w]; clamped at the border."""
    u = np.clip(
      (x - self._origin[0]) * self._resolution - 0.5, 0, self._width - 1.001
    ).ravel()
    v = np.clip(
      (y - self._origin[1]) * self._resolution - 0.5, 0, self._height - 1.001
    ).ravel()
    iu, iv = u.astype(np.intp), v.astype(np.intp)
    u -= iu.astype(np.float32)
    v -= iv.astype(np.float32)
    here = iv * self._width + iu
    right, below, across = here + 1, here + self._width, here + (self._width + 1)
    out = np.empty((self._depth, here.size), np.float32)
    for texels, top in zip(self._texels, out):
      np.take(texels, here, out=top, mode='clip')
      top += u * (texels.take(right) - top)
      bottom = texels.take(below)
      bottom += u * (texels.take(across) - bottom)
      top += v * (bottom - top)
    return out.reshape(self._depth, *x.shape)


class Patch:
  """A rectangle of the canvas with its face coordinates."""

  def __init__(
    self,
    view: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    corner: tuple[int, int],
    pixel: float,
  ):
    """Makes a patch.

    Args:
      view: [3, h, w] of the canvas, painted in place.
      x, y: [h, w] face coordinates.
      corner: (row, column) of the image where the patch begins.
      pixel: size of a pixel in face units.
    """
    self.view = view
    self.x = x
    self.y = y
    self.corner = corner
    self.pixel = pixel

  def inside(self, distance: np.ndarray) -> np.ndarray:
    """Gives the antialiased coverage of the region of negative signed distance."""
    return unit(0.5 - distance * (1 / self.pixel))

  def part(self, span: tuple[slice, slice]) -> tuple[slice, slice]:
    """Maps rows and columns of the image to those of this patch: at least one pixel."""

    def inside(s, start, n):
      return slice(min(max(s.start - start, 0), n - 1), max(1, min(s.stop - start, n)))

    rows, columns = (
      inside(s, start, n) for s, start, n in zip(span, self.corner, self.x.shape)
    )
    return rows, columns

  def cut(self, span: tuple[slice, slice]) -> 'Patch':
    """Cuts the part of this patch inside these rows and columns of the image."""
    rows, columns = at = self.part(span)
    corner = self.corner[0] + rows.start, self.corner[1] + columns.start
    return Patch(
      self.view[:, rows, columns], self.x[at], self.y[at], corner, self.pixel
    )

  def paint(self, colour, alpha: np.ndarray) -> None:
    """Blends a colour (tuple, or [3, h, w]) over the canvas."""
    colour = tint(colour) if isinstance(colour, tuple) else colour
    self.view += alpha * (colour - self.view)

  def shade(self, factor: np.ndarray) -> None:
    """Multiplies the canvas."""
    self.view *= factor
