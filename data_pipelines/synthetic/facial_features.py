"""Paints what moves in a face into small patches: eyes, brows, mouth and folds."""

import numpy as np

from data_pipelines.synthetic import projection
from data_pipelines.synthetic.geometry import Brow, Eye, Face
from data_pipelines.synthetic.painting import (
  Patch,
  band,
  bump,
  noise,
  smooth,
  tint,
  unit,
)

_WHITE = tint((0.955, 0.945, 0.93))
_LASH = (0.10, 0.07, 0.06)


def eye_window(eye: Eye) -> tuple[float, float, float, float]:
  """Gives centre and half-extent of what `paint_eye` touches."""
  return eye.side * eye.x, eye.y, eye.width + 0.07, 0.20


def paint_eye(patch: Patch, face: Face, eye: Eye) -> None:
  """Paints lid folds, eyeball with iris and two highlights, and lashes."""
  p = face.person
  offset = eye.side * patch.x - eye.x  # grows outward
  u = offset * (1 / eye.width)
  v = patch.y - eye.y + eye.tilt * offset
  inside = np.clip(u, -1, 1)
  upper, lower = eye.lids(inside)
  beyond = 0.6 * eye.width * (abs(u) - 1)  # distance past the corners
  slope = 1 / np.sqrt(1 + (2.3 * p.eye_height / eye.width * abs(inside) ** 1.3) ** 2)
  above, below = (upper - v) * slope, (v - lower) * slope
  soft = 1 / (patch.pixel + 0.006)

  # Crease, upper and lower lid
  patch.shade(1 - 0.20 * band(v - upper + 0.045, 0.016) * smooth(1.1, 0.6, abs(u)))
  patch.shade(1 - 0.12 * band(v - upper + 0.02, 0.03) * smooth(1.15, 0.8, abs(u)))
  pouch = 0.10 + 0.22 * eye.pouch
  patch.shade(
    1
    - pouch
    * band(v - lower - 0.040 - 0.015 * eye.pouch, 0.014)
    * smooth(1.0, 0.5, abs(u))
  )

  # Eyeball
  opening = patch.inside(np.maximum(np.maximum(above, below), beyond))
  depth = unit((v - upper) * (1 / 0.075))
  ball = _WHITE * ((0.60 + 0.40 * depth) * (1 - 0.16 * inside * inside))
  ball += tint((0.05, -0.10, -0.10)) * smooth(-0.78, -0.95, u)  # inner corner

  # Iris, pupil and highlights
  radius = 0.56 * p.eye_width
  dx = patch.x - eye.side * eye.x - eye.gaze[0] * eye.width
  dy = v + 0.004 - eye.gaze[1] * eye.width
  r = np.sqrt(dx * dx + dy * dy) * (1 / radius)
  edge = radius * soft
  glow = (
    0.62 + 0.55 * unit(0.5 + 0.75 * dy * (1 / radius)) - 0.50 * smooth(0.72, 1.0, r)
  )
  iris = tint(p.iris) * (1.25 * glow * (0.55 + 0.45 * depth))
  ball += unit(0.5 + (1 - r) * edge) * (iris - ball)
  ball *= 1 - 0.93 * unit(0.5 + (0.45 - r) * edge)  # pupil

  def glint(gx, gy, size):
    return unit(
      0.5
      + (size * radius - np.sqrt((dx - gx * radius) ** 2 + (dy - gy * radius) ** 2))
      * soft
    )

  lit = 0.36 if p.light[0] > 0 else -0.36
  ball += 0.95 * glint(lit, -0.34, 0.25) * (1 - ball)
  ball += 0.28 * glint(-0.9 * lit, 0.42, 0.17) * (1 - ball)
  patch.paint(ball, opening)

  # Lashes and the edge of the lower lid
  outer = smooth(-0.9, 0.9, u)
  flick = 0.22 if p.female else 0.06  # reach of the lashes past the outer corner
  thick = (
    (0.006 + 0.010 * outer) * (1.15 if p.female else 0.75) * smooth(1 + flick, 0.85, u)
  )
  rise = np.maximum(u - 1, 0) * (0.5 * eye.width)
  lash = np.maximum(
    abs(above - rise - 0.6 * thick) - thick,
    0.6 * eye.width * np.maximum(u - 1 - flick, -u - 1),
  )
  patch.paint(_LASH, 0.92 * unit(0.5 - lash * soft))
  patch.paint(
    tuple(0.45 * c for c in p.skin),
    0.40 * unit(0.5 - np.maximum(abs(below) - 0.004, beyond) * soft),
  )


def brow_window(brow: Brow) -> tuple[float, float, float, float]:
  """Gives centre and half-extent of what `paint_brow` touches."""
  xs, ys = zip(brow.inner, brow.middle, brow.outer)
  middle, top, bottom = brow.side * 0.5 * (xs[0] + xs[2]), min(ys), max(ys)
  return (
    middle,
    0.5 * (top + bottom),
    0.5 * (xs[2] - xs[0]) + 0.04,
    0.5 * (bottom - top) + 0.08,
  )


def paint_brow(patch: Patch, face: Face, brow: Brow) -> None:
  """Paints a tapering stroke of hairs along the brow's curve."""
  p = face.person
  side = brow.side * patch.x
  length = brow.outer[0] - brow.inner[0]
  t = (side - brow.inner[0]) * (1 / length)
  inside = unit(t)
  rise = brow.middle[1] - brow.inner[1], brow.outer[1] - brow.middle[1]
  slope = ((1 - inside) * rise[0] + inside * rise[1]) * (2 / length)
  d = patch.y - brow.curve(inside)
  half = brow.thickness * (1 - 0.62 * inside) * (0.62 + 0.38 * smooth(0, 0.16, inside))
  beyond = length * abs(t - inside)
  distance = np.sqrt(d * d / (1 + slope * slope) + beyond * beyond) - half
  hairs = noise(side * 46 - d * 30, d * 14, p.seed + 8)
  alpha = unit(0.5 - (distance + 0.012 * (hairs - 0.5)) * (1 / (patch.pixel + 0.010)))
  colour = tint(p.hair) * (0.52 + 0.28 * hairs)
  patch.paint(colour, 0.90 * alpha)
  patch.shade(1 - 0.10 * band(d - half - 0.02, 0.03) * (beyond < 0.02))


def mouth_window(face: Face) -> tuple[float, float, float, float]:
  """Gives centre and half-extent of what `paint_mouth` touches."""
  m = face.mouth
  top = min(min(m.corner), -m.sneer) - m.gap_up - m.upper - 0.05
  bottom = max(max(m.corner), m.gap_down) + m.lower + 0.11
  half = max(m.width) + 0.07
  return 0.0, m.y + 0.5 * (top + bottom), half, 0.5 * (bottom - top)


def paint_mouth(patch: Patch, face: Face) -> None:
  """Paints the lips, and the seam between them or what shows in the opening."""
  p, m = face.person, face.mouth
  right = patch.x > 0
  u = patch.x * np.where(right, np.float32(1 / m.width[1]), np.float32(1 / m.width[0]))
  corner = np.where(right, np.float32(m.corner[1]), np.float32(m.corner[0]))
  inside = np.clip(u, -1, 1)
  v = patch.y - m.y
  top, bottom = m.inner(inside, corner)
  upper, lower = m.thickness(inside)
  beyond = 0.5 * (abs(u) - 1) * (m.width[0] + m.width[1]) * 0.8
  soft = 1 / (patch.pixel + 0.004)

  def cover(d):
    return unit(0.5 - np.maximum(d, beyond) * soft)

  # Shadows under the lip and in the corners
  patch.shade(
    1 - 0.20 * band(v - bottom - lower - 0.022, 0.026) * smooth(1.0, 0.4, abs(u))
  )
  corners = np.exp(
    -(((abs(u) - 1) * (m.width[0] / 0.045)) ** 2) - ((v - corner) * (1 / 0.024)) ** 2
  )
  patch.shade(1 - (0.38 + 0.12 * face.folds['droop']) * corners)

  # Lips: lit from above, so the upper one is dark and the lower one carries the gloss.
  lips = tint(p.lips)
  fold = unit((v - top + upper) * (1 / np.maximum(upper, 0.01)))
  streaks = 0.97 + 0.06 * noise(u * 17, v * 3, p.seed + 6)
  patch.paint(
    lips * ((0.98 - 0.24 * fold) * streaks),
    0.90 * cover(np.maximum(top - upper - v, v - top)),
  )
  fold = unit((v - bottom) * (1 / np.maximum(lower, 0.01)))
  gloss = (
    0.24
    * band(fold - 0.36, 0.22)
    * bump(
      u, v, 0.12 if p.light[0] > 0 else -0.12, m.gap_down + 0.4 * m.lower, 0.48, 0.2
    )
  )
  patch.paint(
    lips * ((1.08 - 0.20 * fold) * streaks) + gloss,
    0.90 * cover(np.maximum(bottom - v, v - bottom - lower)),
  )

  aperture = cover(np.maximum(top - v, v - bottom))
  if m.opening > 0.004:
    _paint_inside(patch, face, u, v, top, bottom, aperture)
  seam = band(v - 0.5 * (top + bottom), 0.010 + 0.3 * patch.pixel) * smooth(
    1.04, 0.9, abs(u)
  )
  patch.shade(1 - 0.62 * seam * max(0.0, 1 - m.opening / 0.035))


def _paint_inside(patch: Patch, face: Face, u, v, top, bottom, aperture) -> None:
  """Paints cavity, tongue and teeth behind the aperture."""
  m = face.mouth
  height = max(m.opening, 0.02)
  deep = unit((v - top) * (1 / height))
  inside = tint((0.30, 0.08, 0.09)) * (0.45 + 0.55 * deep)
  soft = 1 / (patch.pixel + 0.010)
  ty = m.gap_down - m.follow * m.sneer + 0.03 - 0.055 * m.tongue
  tongue = np.sqrt((u / 0.66) ** 2 + ((v - ty) / (0.035 + 0.30 * height)) ** 2) - 1
  wet = tint((0.74, 0.32, 0.35)) * (0.72 + 0.28 * band(u, 0.45))
  inside += unit(0.5 - 0.08 * tongue * soft) * (wet - inside)
  enamel = (
    tint((0.97, 0.955, 0.92))
    * (0.74 + 0.26 * unit((v - top) * (1 / 0.03)))
    * (1 - 0.34 * u * u)
  )
  enamel *= (
    1
    - 0.13
    * band((abs(patch.x) % 0.058) - 0.029, 0.004 + 0.2 * patch.pixel)
    * smooth(0.02, 0.008, patch.pixel)
    if patch.pixel < 0.02
    else 1.0
  )
  edge = min(0.062, 0.85 * height) * (1 - 0.35 * u * u)
  visible = unit(0.5 - (v - top - edge) * soft) * smooth(0.96, 0.70, abs(u))
  inside += visible * (enamel - inside)
  if m.teeth > 0.05:
    rim = 0.045 * m.teeth
    visible = (
      unit(0.5 - (bottom - rim - v) * soft)
      * smooth(0.80, 0.55, abs(u))
      * min(1.0, height / 0.05)
    )
    inside += visible * (0.90 * enamel - inside)
  inside *= 0.62 + 0.38 * smooth(0, 0.028, v - top)  # lip's shadow
  patch.paint(inside, aperture)


def paint_folds(patch_of, face: Face) -> None:
  """Paints expression lines as strokes with a dark side and a lit side.

  `patch_of(window)` cuts the patches.
  """
  p, f = face.person, face.folds
  tip = projection.nose_tip(p)
  w = p.wrinkles
  brow = p.brow_y
  if f['forehead'] + f['forehead_wide'] + f['forehead_right'] > 0.04:
    patch = patch_of((0.0, brow - 0.20, 0.62, 0.20))
    x, y = patch.x, patch.y
    amount = (
      f['forehead'] * band(x, 0.22)
      + f['forehead_wide'] * band(x, 0.50)
      + f['forehead_right'] * band(x - 0.32, 0.20)
    )
    line = y - brow + 0.10 * x * x - 0.05 * f['forehead'] * band(x, 0.14)
    rows = sum(_crease(line + d, 0.016) for d in (0.115, 0.195, 0.275))
    patch.shade(1 - 0.26 * w * np.minimum(1, amount) * rows)
  if f['frown'] > 0.04:
    patch = patch_of((0.0, brow + 0.09, 0.16, 0.19))
    lines = _crease(
      abs(patch.x) - 0.052 + 0.10 * (patch.y - brow - 0.09), 0.014
    ) * band(patch.y - brow - 0.075, 0.085)
    patch.shade(
      1
      - 0.46 * w * f['frown'] * lines
      - 0.14 * f['frown'] * bump(patch.x, patch.y, 0, brow + 0.09, 0.12, 0.10)
    )
  if f['bridge'] > 0.04:
    patch = patch_of((0.0, p.eye_y + 0.06, 0.20, 0.14))
    lines = sum(
      _crease(patch.y - p.eye_y - d - 0.8 * patch.x**2, 0.013) for d in (0.00, 0.065)
    ) * band(patch.x, 0.10)
    side = _crease(abs(patch.x) - 0.085 - 0.30 * (patch.y - p.eye_y), 0.014) * band(
      patch.y - p.eye_y - 0.09, 0.08
    )
    patch.shade(1 - 0.38 * w * f['bridge'] * (lines + 0.8 * side))
  for s, side in (('L', -1.0), ('R', 1.0)):
    _side_folds(patch_of, face, side, f['nasolabial' + s], f['dimple' + s], tip)
  if f['chin'] > 0.04:
    y0 = float(face.stretch(p.mouth_y + 0.155))
    patch = patch_of((0.0, y0 + 0.06, 0.30, 0.20))
    patch.shade(
      1
      - 0.34
      * w
      * f['chin']
      * _crease(patch.y - y0 + 0.9 * patch.x**2, 0.022)
      * band(patch.x, 0.15)
    )
    pits = noise(patch.x * 24, patch.y * 24, 3) - 0.5
    patch.shade(
      1 - 0.30 * f['chin'] * pits * bump(patch.x, patch.y, 0, y0 + 0.09, 0.13, 0.09)
    )


def _side_folds(
  patch_of, face: Face, side: float, nasolabial: float, dimple: float, tip: float
) -> None:
  p, m, f = face.person, face.mouth, face.folds
  k = 0 if side < 0 else 1
  mx, my = m.width[k], m.y + m.corner[k]
  if nasolabial > 0.04:
    x0, y0, x1, y1 = p.nose_width + 0.030, tip - 0.005, mx + 0.075, my + 0.05
    patch = patch_of(
      (
        side * 0.5 * (x0 + x1),
        0.5 * (y0 + y1),
        0.5 * (x1 - x0) + 0.13,
        0.5 * abs(y1 - y0) + 0.06,
      )
    )
    t = unit((patch.y - y0) * (1 / max(0.05, y1 - y0)))
    d = side * patch.x - (x0 + (x1 - x0) * t + 0.30 * (x1 - x0) * t * (1 - t) * 2)
    along = smooth(-0.02, 0.25, t) * smooth(1.0, 0.70, t)
    patch.shade(1 - 0.48 * p.wrinkles * nasolabial * _crease(-d * 0.75, 0.018) * along)
  if f['crow'] > 0.04:
    cx = p.eye_x + p.eye_width
    patch = patch_of((side * (cx + 0.085), p.eye_y, 0.09, 0.11))
    dx, dy = side * patch.x - cx + 0.02, patch.y - p.eye_y + 0.01
    rays = sum(_crease(dy - slope * dx, 0.011) for slope in (-0.55, 0.0, 0.55))
    patch.shade(
      1
      - 0.34
      * p.wrinkles
      * f['crow']
      * rays
      * smooth(0.03, 0.06, dx)
      * smooth(0.16, 0.09, dx)
    )
  if dimple > 0.04:
    patch = patch_of((side * (mx + 0.05), my, 0.09, 0.11))
    d = side * patch.x - mx - 0.042 + 3 * (patch.y - my) ** 2
    patch.shade(1 - 0.50 * dimple * _crease(d, 0.018) * band(patch.y - my, 0.058))


def _crease(d, width: float) -> np.ndarray:
  """Gives the profile of a skin fold: dark at d = 0, lit on the side of positive d."""
  return band(d, width) - 0.26 * band(d - 2.1 * width, 1.5 * width)
