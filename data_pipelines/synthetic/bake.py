"""Paints what does not move on its own: head, hair, glasses, body and backdrop.

It is painted once per person, at twice the resolution. Head and hair are textures over
the face plane. The renderer only warps and lights them, so their detail is free.
"""

import dataclasses
import functools

import numpy as np

from data_pipelines.synthetic import geometry, hair, projection
from data_pipelines.synthetic.identity import Identity
from data_pipelines.synthetic.painting import (
  Texture,
  band,
  bump,
  dots,
  noise,
  smooth,
  tint,
)

# The rectangle of the face plane that textures cover.
_LEFT, _TOP = -1.4, -1.45
_WIDTH, _HEIGHT = 2.8, 3.0
BEHIND_Z = -0.20  # depth of ears and back hair


@dataclasses.dataclass(frozen=True)
class Layers:
  """Static layers of one person at one image size."""

  backdrop: np.ndarray  # [3, S, S]
  body: np.ndarray  # [3, S - row, S] premultiplied
  body_alpha: np.ndarray  # [S - row, S]
  body_row: int  # first image row of the body
  behind: Texture  # distance, r, g, b: ears and back hair, on the plane BEHIND_Z
  skin: Texture  # distance, slope x, slope y, r, g, b: resting head
  front: Texture | None  # distance, r, g, b: front hair
  # centre and half-extent of the front hair
  front_window: tuple[float, float, float, float]
  glasses: Texture | None  # distance to the frame, distance to the lenses
  grain: np.ndarray  # [3, 2 S, 2 S] standard normal, windows of it are the sensor noise


@functools.lru_cache(maxsize=8)
def bake(person: Identity, size: int) -> Layers:
  """Paints all static layers for square images of `size` pixels."""
  resolution = size * projection.SCALE * 1.1
  columns, rows = int(_WIDTH * resolution), int(_HEIGHT * resolution)

  def axis(n, start):
    return np.float32(start) + (np.arange(2 * n, dtype=np.float32) + 0.5) / np.float32(
      2 * resolution
    )

  x, y = np.meshgrid(axis(columns, _LEFT), axis(rows, _TOP))
  step = 1 / (2 * resolution)

  def texture(channels):
    return Texture(_halve(np.stack(channels)), (_LEFT, _TOP), resolution)

  head = _distance(geometry.outline_field(person, x, y), step)
  front = hair.front(person, x, y, head)
  shadow = 1.0
  front_window = (0.0, 0.0, 0.0, 0.0)
  if front is not None:
    shadow = 1 - 0.34 * smooth(0.10, -0.02, front[0]) * smooth(0.04, -0.03, head)
    front_window = _extent(front[0] < 0.02, x, y)
  body, alpha, row = _body(person, size)
  return Layers(
    backdrop=_backdrop(person, size),
    body=body,
    body_alpha=alpha,
    body_row=row,
    behind=texture(_behind(person, x, y)),
    skin=texture([head, *_skin(person, x, y, head, shadow, step)]),
    front=None if front is None else texture(front),
    front_window=front_window,
    glasses=None if person.glasses == 'none' else texture(_glasses(person, x, y)),
    grain=_grain(size),
  )


@functools.lru_cache(maxsize=4)
def _grain(size: int) -> np.ndarray:
  return np.random.default_rng(0x6A1).standard_normal(
    (3, 2 * size, 2 * size), np.float32
  )


def _extent(mask, x, y) -> tuple[float, float, float, float]:
  """Gives centre and half-extent of a region, with a margin for the head's rotation."""
  (left, right), (top, bottom) = (
    (float(t[mask].min()), float(t[mask].max())) for t in (x, y)
  )
  return (
    0.5 * (left + right),
    0.5 * (top + bottom),
    0.5 * (right - left) + 0.08,
    0.5 * (bottom - top) + 0.08,
  )


def _halve(image: np.ndarray) -> np.ndarray:
  """Averages over 2 x 2 blocks: [C, 2h, 2w] -> [C, h, w]."""
  c, h, w = image.shape
  return image.reshape(c, h // 2, 2, w // 2, 2).mean((2, 4))


def _distance(field: np.ndarray, step: float) -> np.ndarray:
  """Makes an implicit function a signed distance: divides it by its gradient's norm."""
  gy, gx = np.gradient(field, step)
  return field / np.maximum(np.sqrt(gx * gx + gy * gy), 0.35)


def _skin(p: Identity, x, y, head, shadow, step: float) -> list[np.ndarray]:
  """Computes slopes of the shading height, and the albedo, of the resting face."""
  slope_y, slope_x = np.gradient(_height(p, x, y, head), step)
  return [slope_x, slope_y, *(_albedo(p, x, y) * shadow)]


def _height(p: Identity, x, y, head) -> np.ndarray:
  """Makes a height map for light only; it is softer and richer than `depth`."""
  side = abs(x)
  tip = projection.nose_tip(p)
  h = 0.60 * (1 - (x / (1.16 * p.face_width)) ** 2 - ((y + 0.06) / 1.24) ** 2)
  h -= 0.13 * np.exp(np.minimum(head, 0) / 0.075)  # rounds the silhouette off
  h -= 0.060 * bump(side, y, p.eye_x, p.eye_y - 0.01, 0.17, 0.12)  # sockets
  h += 0.034 * bump(side, y, 0.24, p.brow_y + 0.03, 0.26, 0.065)  # brow ridge
  h += 0.045 * bump(side, y, 0.40, tip - 0.08, 0.19, 0.20)  # cheeks
  h += 0.050 * bump(x, y, 0, p.mouth_y, 0.26, 0.16)  # muzzle
  h -= 0.020 * bump(x, y, 0, p.mouth_y + 0.155, 0.17, 0.05)  # dip under the lip
  h += 0.050 * bump(x, y, 0, p.chin - 0.13, 0.17, 0.11)  # chin
  h -= (
    0.012
    * band(x, 0.028)
    * smooth(tip + 0.07, tip + 0.12, y)
    * smooth(p.mouth_y - 0.04, p.mouth_y - 0.09, y)
  )
  ridge = np.clip((y - p.brow_y) / (tip - p.brow_y), 0, 1) ** 1.5 * smooth(
    tip + 0.13, tip - 0.02, y
  )
  h += p.nose_depth * (
    0.080 * band(x, 0.85 * p.nose_width) * ridge
    + 0.066 * bump(x, y, 0, tip, 0.100, 0.090)
  )
  wings = bump(side, y, 0.78 * p.nose_width, tip + 0.035, 0.050, 0.052)
  h += 0.048 * p.nose_depth * wings
  return h


def _albedo(p: Identity, x, y) -> np.ndarray:
  """Makes the colour of the skin, with beard."""
  side = abs(x)
  tip = projection.nose_tip(p)
  skin = tint(p.skin)
  blush = tint(p.blush)
  redness = 0.75 * bump(side, y, 0.42, tip - 0.02, 0.19, 0.15) + 0.55 * bump(
    x, y, 0, tip + 0.01, 0.10, 0.08
  )
  redness += 0.30 * bump(x, y, 0, p.chin - 0.08, 0.16, 0.10)
  colour = skin + np.minimum(redness, 1) * (blush - skin)
  colour *= 0.985 + 0.03 * noise(x * 9, y * 9, p.seed)

  # Shadows: under brow, eyes and nose, next to its wings, and under the lip
  occlusion = 1 - 0.16 * bump(side, y, p.eye_x - 0.03, p.eye_y - 0.05, 0.17, 0.10)
  occlusion -= 0.10 * bump(side, y, p.eye_x - 0.02, p.eye_y + 0.13, 0.12, 0.035)
  occlusion -= 0.12 * bump(x, y, 0, tip + 0.12, 0.85 * p.nose_width, 0.045)
  occlusion -= 0.16 * bump(side, y, p.nose_width + 0.015, tip + 0.035, 0.028, 0.05)
  occlusion -= 0.16 * bump(x, y, 0, p.mouth_y + 0.13, 0.15, 0.035)
  colour *= occlusion
  nostrils = bump(side, y - 0.25 * side, 0.48 * p.nose_width, tip + 0.065, 0.036, 0.018)
  colour *= 1 - 0.70 * nostrils
  if p.freckles:
    where = bump(side, y, 0.30, tip - 0.10, 0.24, 0.13)
    colour *= 1 - tint((0.18, 0.28, 0.32)) * dots(x * 27, y * 27, p.seed) * where
  return hair.beard(p, x, y, colour)


def _behind(p: Identity, x, y) -> list[np.ndarray]:
  """Makes ears and the hair behind the head: distance and colour."""
  cx, cy = p.face_width + 0.005, p.eye_y + 0.14
  side = abs(x)
  ear = np.sqrt(
    ((side - cx) / 0.10) ** 2 + ((y - cy + 0.35 * (side - cx)) / 0.185) ** 2
  )
  distance = (ear - 1) * 0.105
  rim = 0.80 + 0.24 * smooth(0.35, 0.85, ear) - 0.28 * band(ear - 0.55, 0.22)
  colour = tint(p.skin) * tint((0.93, 0.86, 0.84)) * rim
  back = hair.back(p, x, y)
  if back is not None:
    cover = np.clip(0.5 - distance / 0.012, 0, 1)
    colour = back[1] + cover * (colour - back[1])
    distance = np.minimum(distance, back[0])
  return [distance, *colour]


def _glasses(p: Identity, x, y) -> list[np.ndarray]:
  """Computes signed distances to the frame and to the lenses."""
  side = abs(x)
  cx, cy = p.eye_x + 0.005, p.eye_y + 0.02
  if p.glasses == 'round':
    lens = np.sqrt((side - cx) ** 2 + (y - cy) ** 2) - 0.215
  else:
    qx, qy = abs(side - cx) - 0.15, abs(y - cy) - 0.105
    lens = (
      np.sqrt(np.maximum(qx, 0) ** 2 + np.maximum(qy, 0) ** 2)
      + np.minimum(np.maximum(qx, qy), 0)
      - 0.065
    )
  bridge = np.maximum(abs(y - cy + 0.045 + 0.5 * (side**2)) - 0.014, side - (cx - 0.20))
  temple = np.maximum(
    abs(y - cy + 0.05) - 0.014, np.maximum(cx + 0.19 - side, side - p.face_width - 0.02)
  )
  return [np.minimum(abs(lens) - 0.015, np.minimum(bridge, temple)), lens]


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
  """Gives face coordinates of an unposed image, two samples per pixel and axis."""
  t = (np.arange(2 * size, dtype=np.float32) + 0.5) / (2 * size)
  x, y = ((t - o) / np.float32(projection.SCALE) for o in projection.ORIGIN)
  return np.meshgrid(x, y)


def _backdrop(p: Identity, size: int) -> np.ndarray:
  x, y = _grid(size)
  bright, dark = (tint(c) for c in p.backdrop)
  side = 1.0 if p.light[0] > 0 else -1.0
  glow = np.exp(-((x - 0.35 * side) ** 2 + (y + 0.25) ** 2) * 0.55)
  t = np.clip(
    0.12 + 0.80 * glow + 0.10 * (noise(x * 1.3, y * 1.3, p.seed + 11) - 0.5) - 0.08 * y,
    0,
    1,
  )
  return _halve(dark + t * (bright - dark))


def _body(p: Identity, size: int) -> tuple[np.ndarray, np.ndarray, int]:
  """Paints neck and clothes, premultiplied; gives their first row as well."""
  x, y = _grid(size)
  pixel = 1 / (projection.SCALE * size)

  def cover(d):
    return np.clip(0.5 - d / pixel, 0, 1)

  # Neck, with the shadow of the chin and its two muscles
  side = abs(x)
  lit = 1.0 if p.light[0] > 0 else -1.0
  half = 0.37 if p.female else 0.45
  neck = side - half - 0.75 * np.maximum(y - 0.96, 0) ** 2
  neck = np.maximum(neck, 0.5 - y)
  turn = np.clip(x / half, -1.2, 1.2)
  light = 0.84 - 0.28 * turn**2 + 0.16 * lit * turn
  light *= 1 - 0.36 * np.exp(-np.maximum(y - p.chin + 0.02, 0) / 0.14)
  muscles = band(abs(x) - 0.16 - 0.35 * (1.4 - y), 0.05)
  light *= 1 - 0.10 * muscles * smooth(1.0, 1.3, y)
  colour = tint(p.skin) * tint((1.02, 0.95, 0.93)) * light
  alpha = cover(neck)

  # Shape of the clothes
  slope = 1.13 if p.female else 1.09
  shoulders = slope + 0.20 * np.maximum(side - half, 0) ** 1.25 - y
  if p.neckline == 'v':
    opening = side - (half + 0.10) * np.clip((1.44 - y) / 0.36, 0, 1.3) ** 0.85
  elif p.neckline == 'crew':
    opening = (np.sqrt((x / (half + 0.07)) ** 2 + ((y - 1.02) / 0.24) ** 2) - 1) * 0.24
  else:
    opening = (np.sqrt((x / (half + 0.02)) ** 2 + ((y - 0.98) / 0.15) ** 2) - 1) * 0.15
  cloth = np.maximum(shoulders, -opening)
  if p.neckline == 'collar':  # a roll that stands up the neck
    roll = np.maximum(
      side - half - 0.045 - 0.25 * np.maximum(y - 1.12, 0),
      1.075 + 0.10 * (1 - turn**2) - y,
    )
    cloth = np.minimum(cloth, roll)

  # Their colour
  folds = noise(x * 3.2, y * 2.2, p.seed + 3) - 0.5
  shading = (
    0.86
    + 0.22 * lit * np.clip(x / 1.2, -1, 1)
    + 0.18 * folds
    - 0.20 * smooth(0.06, 0, -shoulders)
  )
  if p.neckline == 'collar':
    hem = band(y - 1.17 - 0.12 * (1 - turn**2), 0.03)
  else:
    hem = band(opening - 0.035, 0.035)
  fabric = tint(p.clothes) * shading * (1 - 0.20 * hem)
  cloth_alpha = cover(cloth)
  if p.neckline != 'collar':
    colour = colour * (1 - 0.25 * smooth(0.07, 0, opening))
  colour = colour + cloth_alpha * (fabric - colour)
  alpha = np.maximum(alpha, cloth_alpha)
  colour, alpha = _halve(colour * alpha), _halve(alpha[None])[0]
  row = int(np.argmax(alpha.any(axis=1)))
  return np.ascontiguousarray(colour[:, row:]), np.ascontiguousarray(alpha[row:]), row
