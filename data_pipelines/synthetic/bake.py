"""What does not move on its own, painted once per clip at twice the resolution: head, hair, glasses, body, backdrop.

Head and hair are textures over the face plane. The renderer only warps and lights them, so their detail is free.
"""

import dataclasses
import functools

import numpy as np

from data_pipelines.synthetic import geometry, hair, projection
from data_pipelines.synthetic.identity import Identity
from data_pipelines.synthetic.raster import Texture, band, bump, dots, noise, smooth, tint

_LEFT, _TOP, _WIDTH, _HEIGHT = -1.4, -1.45, 2.8, 3.0       # the rectangle of the face plane that textures cover
BEHIND_Z = -.20                                             # depth of ears and back hair


@dataclasses.dataclass(frozen=True)
class Layers:
  """Static layers of one person at one image size."""
  backdrop: np.ndarray         # [3, S, S]
  body: np.ndarray             # [3, S - row, S] premultiplied
  body_alpha: np.ndarray       # [S - row, S]
  body_row: int                # first image row of the body
  behind: Texture              # distance, r, g, b: ears and back hair, on the plane BEHIND_Z
  skin: Texture                # distance, slope x, slope y, r, g, b: resting head
  front: Texture | None        # distance, r, g, b: front hair
  front_window: tuple[float, float, float, float]   # centre and half-extent of the front hair
  glasses: Texture | None      # distance to the frame, distance to the lenses
  grain: np.ndarray            # [3, 2 S, 2 S] standard normal, windows of it are the sensor noise


@functools.lru_cache(maxsize=8)
def bake(person: Identity, size: int) -> Layers:
  """All static layers for square images of `size` pixels."""
  resolution = size * projection.SCALE * 1.1
  columns, rows = int(_WIDTH * resolution), int(_HEIGHT * resolution)
  axis = lambda n, start: np.float32(start) + (np.arange(2 * n, dtype=np.float32) + .5) / np.float32(2 * resolution)
  x, y = np.meshgrid(axis(columns, _LEFT), axis(rows, _TOP))
  step = 1 / (2 * resolution)
  texture = lambda channels: Texture(_halve(np.stack(channels)), (_LEFT, _TOP), resolution)
  head = _distance(geometry.outline_field(person, x, y), step)
  front = hair.front(person, x, y, head)
  shadow = 1. if front is None else 1 - .34 * smooth(.10, -.02, front[0]) * smooth(.04, -.03, head)
  body, alpha, row = _body(person, size)
  return Layers(
      backdrop=_backdrop(person, size), body=body, body_alpha=alpha, body_row=row,
      behind=texture(_behind(person, x, y)), skin=texture([head, *_skin(person, x, y, head, shadow, step)]),
      front=None if front is None else texture(front),
      front_window=(0., 0., 0., 0.) if front is None else _extent(front[0] < .02, x, y),
      glasses=None if person.glasses == 'none' else texture(_glasses(person, x, y)),
      grain=_grain(size))


@functools.lru_cache(maxsize=4)
def _grain(size: int) -> np.ndarray:
  return np.random.default_rng(0x6A1).standard_normal((3, 2 * size, 2 * size), np.float32)


def _extent(mask, x, y) -> tuple[float, float, float, float]:
  """Centre and half-extent of a region, with a margin for the head's rotation."""
  (left, right), (top, bottom) = ((float(t[mask].min()), float(t[mask].max())) for t in (x, y))
  return .5 * (left + right), .5 * (top + bottom), .5 * (right - left) + .08, .5 * (bottom - top) + .08


def _halve(image: np.ndarray) -> np.ndarray:
  """Average over 2 x 2 blocks: [C, 2h, 2w] -> [C, h, w]."""
  c, h, w = image.shape
  return image.reshape(c, h // 2, 2, w // 2, 2).mean((2, 4))


def _distance(field: np.ndarray, step: float) -> np.ndarray:
  """An implicit function as a signed distance: divided by its gradient's norm."""
  gy, gx = np.gradient(field, step)
  return field / np.maximum(np.sqrt(gx * gx + gy * gy), .35)


def _skin(p: Identity, x, y, head, shadow, step: float) -> list[np.ndarray]:
  """Slopes of the shading height and the albedo of the resting face."""
  slope_y, slope_x = np.gradient(_height(p, x, y, head), step)
  return [slope_x, slope_y, *(_albedo(p, x, y) * shadow)]


def _height(p: Identity, x, y, head) -> np.ndarray:
  """Height map that is used for light only; softer and richer than `projection.depth`."""
  side, tip = abs(x), projection.nose_tip(p)
  h = .60 * (1 - (x / (1.16 * p.face_width)) ** 2 - ((y + .06) / 1.24) ** 2)
  h -= .13 * np.exp(np.minimum(head, 0) / .075)                                     # rounds the silhouette off
  h -= .060 * bump(side, y, p.eye_x, p.eye_y - .01, .17, .12)                       # sockets
  h += .034 * bump(side, y, .24, p.brow_y + .03, .26, .065)                         # brow ridge
  h += .045 * bump(side, y, .40, tip - .08, .19, .20)                               # cheeks
  h += .050 * bump(x, y, 0, p.mouth_y, .26, .16)                                    # muzzle
  h -= .020 * bump(x, y, 0, p.mouth_y + .155, .17, .05)                             # dip under the lip
  h += .050 * bump(x, y, 0, p.chin - .13, .17, .11)                                 # chin
  h -= .012 * band(x, .028) * smooth(tip + .07, tip + .12, y) * smooth(p.mouth_y - .04, p.mouth_y - .09, y)
  ridge = np.clip((y - p.brow_y) / (tip - p.brow_y), 0, 1) ** 1.5 * smooth(tip + .13, tip - .02, y)
  h += p.nose_depth * (.080 * band(x, .85 * p.nose_width) * ridge + .066 * bump(x, y, 0, tip, .100, .090))
  h += .048 * p.nose_depth * bump(side, y, .78 * p.nose_width, tip + .035, .050, .052)  # wings
  return h


def _albedo(p: Identity, x, y) -> np.ndarray:
  side, tip = abs(x), projection.nose_tip(p)
  skin, blush = tint(p.skin), tint(p.blush)
  redness = .75 * bump(side, y, .42, tip - .02, .19, .15) + .55 * bump(x, y, 0, tip + .01, .10, .08)
  redness += .30 * bump(x, y, 0, p.chin - .08, .16, .10)
  colour = skin + np.minimum(redness, 1) * (blush - skin)
  colour *= .985 + .03 * noise(x * 9, y * 9, p.seed)
  occlusion = 1 - .16 * bump(side, y, p.eye_x - .03, p.eye_y - .05, .17, .10)       # under the brow
  occlusion -= .10 * bump(side, y, p.eye_x - .02, p.eye_y + .13, .12, .035)         # tear trough
  occlusion -= .12 * bump(x, y, 0, tip + .12, .85 * p.nose_width, .045)             # under the nose
  occlusion -= .16 * bump(side, y, p.nose_width + .015, tip + .035, .028, .05)      # beside the wings
  occlusion -= .16 * bump(x, y, 0, p.mouth_y + .13, .15, .035)                      # under the lip
  colour *= occlusion
  colour *= 1 - .70 * bump(side, y - .25 * side, .48 * p.nose_width, tip + .065, .036, .018)  # nostrils
  if p.freckles:
    where = bump(side, y, .30, tip - .10, .24, .13)
    colour *= 1 - tint((.18, .28, .32)) * dots(x * 27, y * 27, p.seed) * where
  return hair.beard(p, x, y, colour)


def _behind(p: Identity, x, y) -> list[np.ndarray]:
  """Ears and the hair behind the head: distance and colour."""
  cx, cy = p.face_width + .005, p.eye_y + .14
  side = abs(x)
  ear = np.sqrt(((side - cx) / .10) ** 2 + ((y - cy + .35 * (side - cx)) / .185) ** 2)
  distance = (ear - 1) * .105
  rim = .80 + .24 * smooth(.35, .85, ear) - .28 * band(ear - .55, .22)
  colour = tint(p.skin) * tint((.93, .86, .84)) * rim
  back = hair.back(p, x, y)
  if back is not None:
    cover = np.clip(.5 - distance / .012, 0, 1)
    colour = back[1] + cover * (colour - back[1])
    distance = np.minimum(distance, back[0])
  return [distance, *colour]


def _glasses(p: Identity, x, y) -> list[np.ndarray]:
  """Signed distances to the frame and to the lenses."""
  side = abs(x)
  cx, cy = p.eye_x + .005, p.eye_y + .02
  if p.glasses == 'round':
    lens = np.sqrt((side - cx) ** 2 + (y - cy) ** 2) - .215
  else:
    qx, qy = abs(side - cx) - .15, abs(y - cy) - .105
    lens = np.sqrt(np.maximum(qx, 0) ** 2 + np.maximum(qy, 0) ** 2) + np.minimum(np.maximum(qx, qy), 0) - .065
  bridge = np.maximum(abs(y - cy + .045 + .5 * (side ** 2)) - .014, side - (cx - .20))
  temple = np.maximum(abs(y - cy + .05) - .014, np.maximum(cx + .19 - side, side - p.face_width - .02))
  return [np.minimum(abs(lens) - .015, np.minimum(bridge, temple)), lens]


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
  """Face coordinates of an unposed image with two samples per pixel and axis."""
  t = (np.arange(2 * size, dtype=np.float32) + .5) / (2 * size)
  x, y = ((t - o) / np.float32(projection.SCALE) for o in projection.ORIGIN)
  return np.meshgrid(x, y)


def _backdrop(p: Identity, size: int) -> np.ndarray:
  x, y = _grid(size)
  bright, dark = (tint(c) for c in p.backdrop)
  side = 1. if p.light[0] > 0 else -1.
  glow = np.exp(-((x - .35 * side) ** 2 + (y + .25) ** 2) * .55)
  t = np.clip(.12 + .80 * glow + .10 * (noise(x * 1.3, y * 1.3, p.seed + 11) - .5) - .08 * y, 0, 1)
  return _halve(dark + t * (bright - dark))


def _body(p: Identity, size: int) -> tuple[np.ndarray, np.ndarray, int]:
  """Neck and clothes, premultiplied, and the first row that they cover."""
  x, y = _grid(size)
  pixel = 1 / (projection.SCALE * size)
  cover = lambda d: np.clip(.5 - d / pixel, 0, 1)
  side, lit = abs(x), 1. if p.light[0] > 0 else -1.
  half = .37 if p.female else .45
  neck = side - half - .75 * np.maximum(y - .96, 0) ** 2
  neck = np.maximum(neck, .5 - y)
  turn = np.clip(x / half, -1.2, 1.2)
  light = .84 - .28 * turn ** 2 + .16 * lit * turn
  light *= 1 - .36 * np.exp(-np.maximum(y - p.chin + .02, 0) / .14)                 # shadow of the chin
  light *= 1 - .10 * band(abs(x) - .16 - .35 * (1.4 - y), .05) * smooth(1.0, 1.3, y)  # the two neck muscles
  colour = tint(p.skin) * tint((1.02, .95, .93)) * light
  alpha = cover(neck)

  slope = 1.13 if p.female else 1.09
  shoulders = slope + .20 * np.maximum(side - half, 0) ** 1.25 - y
  if p.neckline == 'v':
    opening = side - (half + .10) * np.clip((1.44 - y) / .36, 0, 1.3) ** .85
  elif p.neckline == 'crew':
    opening = (np.sqrt((x / (half + .07)) ** 2 + ((y - 1.02) / .24) ** 2) - 1) * .24
  else:
    opening = (np.sqrt((x / (half + .02)) ** 2 + ((y - .98) / .15) ** 2) - 1) * .15
  cloth = np.maximum(shoulders, -opening)
  if p.neckline == 'collar':                                                        # a roll that stands up the neck
    roll = np.maximum(side - half - .045 - .25 * np.maximum(y - 1.12, 0), 1.075 + .10 * (1 - turn ** 2) - y)
    cloth = np.minimum(cloth, roll)
  folds = noise(x * 3.2, y * 2.2, p.seed + 3) - .5
  shading = .86 + .22 * lit * np.clip(x / 1.2, -1, 1) + .18 * folds - .20 * smooth(.06, 0, -shoulders)
  hem = band(opening - .035, .035) if p.neckline != 'collar' else band(y - 1.17 - .12 * (1 - turn ** 2), .03)
  fabric = tint(p.clothes) * shading * (1 - .20 * hem)
  cloth_alpha = cover(cloth)
  if p.neckline != 'collar':
    colour = colour * (1 - .25 * smooth(.07, 0, opening))
  colour = colour + cloth_alpha * (fabric - colour)
  alpha = np.maximum(alpha, cloth_alpha)
  colour, alpha = _halve(colour * alpha), _halve(alpha[None])[0]
  row = int(np.argmax(alpha.any(axis=1)))
  return np.ascontiguousarray(colour[:, row:]), np.ascontiguousarray(alpha[row:]), row
