"""The features that move: eyes, brows, mouth and expression lines, painted into small patches."""

import numpy as np

from data_pipelines.synthetic import projection
from data_pipelines.synthetic.geometry import Brow, Eye, Face
from data_pipelines.synthetic.raster import Patch, band, bump, noise, smooth, tint, unit

_WHITE = tint((.955, .945, .93))
_LASH = (.10, .07, .06)


def eye_window(eye: Eye) -> tuple[float, float, float, float]:
  """Centre and half-extent of what `paint_eye` touches."""
  return eye.side * eye.x, eye.y, eye.width + .07, .20


def paint_eye(patch: Patch, face: Face, eye: Eye) -> None:
  """Lid folds, eyeball with iris and two highlights, lashes."""
  p = face.person
  offset = eye.side * patch.x - eye.x                                    # grows outward
  u = offset * (1 / eye.width)
  v = patch.y - eye.y + eye.tilt * offset
  inside = np.clip(u, -1, 1)
  upper, lower = eye.lids(inside)
  beyond = .6 * eye.width * (abs(u) - 1)                                  # distance past the corners
  slope = 1 / np.sqrt(1 + (2.3 * p.eye_height / eye.width * abs(inside) ** 1.3) ** 2)
  above, below = (upper - v) * slope, (v - lower) * slope
  soft = 1 / (patch.pixel + .006)

  patch.shade(1 - .20 * band(v - upper + .045, .016) * smooth(1.1, .6, abs(u)))                         # crease
  patch.shade(1 - .12 * band(v - upper + .02, .03) * smooth(1.15, .8, abs(u)))                          # lid
  pouch = .10 + .22 * eye.pouch
  patch.shade(1 - pouch * band(v - lower - .040 - .015 * eye.pouch, .014) * smooth(1.0, .5, abs(u)))    # lower lid

  opening = patch.inside(np.maximum(np.maximum(above, below), beyond))
  depth = unit((v - upper) * (1 / .075))
  ball = _WHITE * ((.60 + .40 * depth) * (1 - .16 * inside * inside))
  ball += tint((.05, -.10, -.10)) * smooth(-.78, -.95, u)                                               # inner corner

  radius = .56 * p.eye_width
  dx = patch.x - eye.side * eye.x - eye.gaze[0] * eye.width
  dy = v + .004 - eye.gaze[1] * eye.width
  r = np.sqrt(dx * dx + dy * dy) * (1 / radius)
  edge = radius * soft
  glow = .62 + .55 * unit(.5 + .75 * dy * (1 / radius)) - .50 * smooth(.72, 1.0, r)
  iris = tint(p.iris) * (1.25 * glow * (.55 + .45 * depth))
  ball += unit(.5 + (1 - r) * edge) * (iris - ball)
  ball *= 1 - .93 * unit(.5 + (.45 - r) * edge)                                                # pupil
  glint = lambda gx, gy, size: unit(
      .5 + (size * radius - np.sqrt((dx - gx * radius) ** 2 + (dy - gy * radius) ** 2)) * soft)
  lit = .36 if p.light[0] > 0 else -.36
  ball += .95 * glint(lit, -.34, .25) * (1 - ball)
  ball += .28 * glint(-.9 * lit, .42, .17) * (1 - ball)
  patch.paint(ball, opening)

  outer = smooth(-.9, .9, u)
  flick = .22 if p.female else .06                                        # reach of the lashes past the outer corner
  thick = (.006 + .010 * outer) * (1.15 if p.female else .75) * smooth(1 + flick, .85, u)
  rise = np.maximum(u - 1, 0) * (.5 * eye.width)
  lash = np.maximum(abs(above - rise - .6 * thick) - thick, .6 * eye.width * np.maximum(u - 1 - flick, -u - 1))
  patch.paint(_LASH, .92 * unit(.5 - lash * soft))
  patch.paint(tuple(.45 * c for c in p.skin), .40 * unit(.5 - np.maximum(abs(below) - .004, beyond) * soft))


def brow_window(brow: Brow) -> tuple[float, float, float, float]:
  """Centre and half-extent of what `paint_brow` touches."""
  xs, ys = zip(brow.inner, brow.middle, brow.outer)
  middle, top, bottom = brow.side * .5 * (xs[0] + xs[2]), min(ys), max(ys)
  return middle, .5 * (top + bottom), .5 * (xs[2] - xs[0]) + .04, .5 * (bottom - top) + .08


def paint_brow(patch: Patch, face: Face, brow: Brow) -> None:
  """A tapering stroke of hairs along the brow's curve."""
  p = face.person
  side = brow.side * patch.x
  length = brow.outer[0] - brow.inner[0]
  t = (side - brow.inner[0]) * (1 / length)
  inside = unit(t)
  rise = brow.middle[1] - brow.inner[1], brow.outer[1] - brow.middle[1]
  slope = ((1 - inside) * rise[0] + inside * rise[1]) * (2 / length)
  d = patch.y - brow.curve(inside)
  half = brow.thickness * (1 - .62 * inside) * (.62 + .38 * smooth(0, .16, inside))
  beyond = length * abs(t - inside)
  distance = np.sqrt(d * d / (1 + slope * slope) + beyond * beyond) - half
  hairs = noise(side * 46 - d * 30, d * 14, p.seed + 8)
  alpha = unit(.5 - (distance + .012 * (hairs - .5)) * (1 / (patch.pixel + .010)))
  colour = tint(p.hair) * (.52 + .28 * hairs)
  patch.paint(colour, .90 * alpha)
  patch.shade(1 - .10 * band(d - half - .02, .03) * (beyond < .02))


def mouth_window(face: Face) -> tuple[float, float, float, float]:
  """Centre and half-extent of what `paint_mouth` touches."""
  m = face.mouth
  top = min(min(m.corner), -m.sneer) - m.gap_up - m.upper - .05
  bottom = max(max(m.corner), m.gap_down) + m.lower + .11
  half = max(m.width) + .07
  return 0., m.y + .5 * (top + bottom), half, .5 * (bottom - top)


def paint_mouth(patch: Patch, face: Face) -> None:
  """Lips, the seam between them or what shows in the opening."""
  p, m = face.person, face.mouth
  right = patch.x > 0
  u = patch.x * np.where(right, np.float32(1 / m.width[1]), np.float32(1 / m.width[0]))
  corner = np.where(right, np.float32(m.corner[1]), np.float32(m.corner[0]))
  inside = np.clip(u, -1, 1)
  v = patch.y - m.y
  top, bottom = m.inner(inside, corner)
  upper, lower = m.thickness(inside)
  beyond = .5 * (abs(u) - 1) * (m.width[0] + m.width[1]) * .8
  soft = 1 / (patch.pixel + .004)
  cover = lambda d: unit(.5 - np.maximum(d, beyond) * soft)

  patch.shade(1 - .20 * band(v - bottom - lower - .022, .026) * smooth(1.0, .4, abs(u)))                # under the lip
  corners = np.exp(-((abs(u) - 1) * (m.width[0] / .045)) ** 2 - ((v - corner) * (1 / .024)) ** 2)
  patch.shade(1 - (.38 + .12 * face.folds['droop']) * corners)

  # Lips: lit from above, so the upper one is dark and the lower one carries the gloss.
  lips = tint(p.lips)
  fold = unit((v - top + upper) * (1 / np.maximum(upper, .01)))
  streaks = .97 + .06 * noise(u * 17, v * 3, p.seed + 6)
  patch.paint(lips * ((.98 - .24 * fold) * streaks), .90 * cover(np.maximum(top - upper - v, v - top)))
  fold = unit((v - bottom) * (1 / np.maximum(lower, .01)))
  gloss = .24 * band(fold - .36, .22) * bump(u, v, .12 if p.light[0] > 0 else -.12, m.gap_down + .4 * m.lower, .48, .2)
  patch.paint(lips * ((1.08 - .20 * fold) * streaks) + gloss, .90 * cover(np.maximum(bottom - v, v - bottom - lower)))

  aperture = cover(np.maximum(top - v, v - bottom))
  if m.opening > .004:
    _paint_inside(patch, face, u, v, top, bottom, aperture)
  seam = band(v - .5 * (top + bottom), .010 + .3 * patch.pixel) * smooth(1.04, .9, abs(u))
  patch.shade(1 - .62 * seam * max(0., 1 - m.opening / .035))


def _paint_inside(patch: Patch, face: Face, u, v, top, bottom, aperture) -> None:
  """Cavity, tongue and teeth behind the aperture."""
  m = face.mouth
  height = max(m.opening, .02)
  deep = unit((v - top) * (1 / height))
  inside = tint((.30, .08, .09)) * (.45 + .55 * deep)
  soft = 1 / (patch.pixel + .010)
  ty = m.gap_down - m.follow * m.sneer + .03 - .055 * m.tongue
  tongue = np.sqrt((u / .66) ** 2 + ((v - ty) / (.035 + .30 * height)) ** 2) - 1
  wet = tint((.74, .32, .35)) * (.72 + .28 * band(u, .45))
  inside += unit(.5 - .08 * tongue * soft) * (wet - inside)
  enamel = tint((.97, .955, .92)) * (.74 + .26 * unit((v - top) * (1 / .03))) * (1 - .34 * u * u)
  enamel *= 1 - .13 * band((abs(patch.x) % .058) - .029, .004 + .2 * patch.pixel) * smooth(.02, .008, patch.pixel) \
      if patch.pixel < .02 else 1.
  edge = min(.062, .85 * height) * (1 - .35 * u * u)
  visible = unit(.5 - (v - top - edge) * soft) * smooth(.96, .70, abs(u))
  inside += visible * (enamel - inside)
  if m.teeth > .05:
    rim = .045 * m.teeth
    visible = unit(.5 - (bottom - rim - v) * soft) * smooth(.80, .55, abs(u)) * min(1., height / .05)
    inside += visible * (.90 * enamel - inside)
  inside *= .62 + .38 * smooth(0, .028, v - top)                                                        # lip's shadow
  patch.paint(inside, aperture)


def paint_folds(patch_of, face: Face) -> None:
  """Expression lines as strokes with a dark side and a lit side. `patch_of(window)` cuts the patches."""
  p, f, tip = face.person, face.folds, projection.nose_tip(face.person)
  w = p.wrinkles
  brow = p.brow_y
  if f['forehead'] + f['forehead_wide'] + f['forehead_right'] > .04:
    patch = patch_of((0., brow - .20, .62, .20))
    x, y = patch.x, patch.y
    amount = f['forehead'] * band(x, .22) + f['forehead_wide'] * band(x, .50) + f['forehead_right'] * band(x - .32, .20)
    line = y - brow + .10 * x * x - .05 * f['forehead'] * band(x, .14)
    rows = sum(_crease(line + d, .016) for d in (.115, .195, .275))
    patch.shade(1 - .26 * w * np.minimum(1, amount) * rows)
  if f['frown'] > .04:
    patch = patch_of((0., brow + .09, .16, .19))
    lines = _crease(abs(patch.x) - .052 + .10 * (patch.y - brow - .09), .014) * band(patch.y - brow - .075, .085)
    patch.shade(1 - .46 * w * f['frown'] * lines - .14 * f['frown'] * bump(patch.x, patch.y, 0, brow + .09, .12, .10))
  if f['bridge'] > .04:
    patch = patch_of((0., p.eye_y + .06, .20, .14))
    lines = sum(_crease(patch.y - p.eye_y - d - .8 * patch.x ** 2, .013) for d in (.00, .065)) * band(patch.x, .10)
    side = _crease(abs(patch.x) - .085 - .30 * (patch.y - p.eye_y), .014) * band(patch.y - p.eye_y - .09, .08)
    patch.shade(1 - .38 * w * f['bridge'] * (lines + .8 * side))
  for s, side in (('L', -1.), ('R', 1.)):
    _side_folds(patch_of, face, side, f['nasolabial' + s], f['dimple' + s], tip)
  if f['chin'] > .04:
    y0 = float(face.stretch(p.mouth_y + .155))
    patch = patch_of((0., y0 + .06, .30, .20))
    patch.shade(1 - .34 * w * f['chin'] * _crease(patch.y - y0 + .9 * patch.x ** 2, .022) * band(patch.x, .15))
    pits = noise(patch.x * 24, patch.y * 24, 3) - .5
    patch.shade(1 - .30 * f['chin'] * pits * bump(patch.x, patch.y, 0, y0 + .09, .13, .09))


def _side_folds(patch_of, face: Face, side: float, nasolabial: float, dimple: float, tip: float) -> None:
  p, m, f = face.person, face.mouth, face.folds
  k = 0 if side < 0 else 1
  mx, my = m.width[k], m.y + m.corner[k]
  if nasolabial > .04:
    x0, y0, x1, y1 = p.nose_width + .030, tip - .005, mx + .075, my + .05
    patch = patch_of((side * .5 * (x0 + x1), .5 * (y0 + y1), .5 * (x1 - x0) + .13, .5 * abs(y1 - y0) + .06))
    t = unit((patch.y - y0) * (1 / max(.05, y1 - y0)))
    d = side * patch.x - (x0 + (x1 - x0) * t + .30 * (x1 - x0) * t * (1 - t) * 2)
    along = smooth(-.02, .25, t) * smooth(1.0, .70, t)
    patch.shade(1 - .48 * p.wrinkles * nasolabial * _crease(-d * .75, .018) * along)
  if f['crow'] > .04:
    cx = p.eye_x + p.eye_width
    patch = patch_of((side * (cx + .085), p.eye_y, .09, .11))
    dx, dy = side * patch.x - cx + .02, patch.y - p.eye_y + .01
    rays = sum(_crease(dy - slope * dx, .011) for slope in (-.55, 0., .55))
    patch.shade(1 - .34 * p.wrinkles * f['crow'] * rays * smooth(.03, .06, dx) * smooth(.16, .09, dx))
  if dimple > .04:
    patch = patch_of((side * (mx + .05), my, .09, .11))
    d = side * patch.x - mx - .042 + 3 * (patch.y - my) ** 2
    patch.shade(1 - .50 * dimple * _crease(d, .018) * band(patch.y - my, .058))


def _crease(d, width: float) -> np.ndarray:
  """Profile of a skin fold: dark where d = 0, lit on the side of positive d."""
  return band(d, width) - .26 * band(d - 2.1 * width, 1.5 * width)
