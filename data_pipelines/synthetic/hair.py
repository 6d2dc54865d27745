"""Hair and beards as textures over the face plane: signed distance and colour."""

import numpy as np

from data_pipelines.synthetic import projection
from data_pipelines.synthetic.identity import Identity
from data_pipelines.synthetic.painting import band, bump, noise, smooth, tint

_VOLUME = {
  'short': 0.100,
  'long': 0.105,
  'bob': 0.115,
  'cropped': 0.035,
  'receding': 0.030,
}


def front(p: Identity, x, y, head) -> list[np.ndarray] | None:
  """Makes the hair in front of the head: [distance, r, g, b], or None for the bald.

  `head` is the signed distance to the head.
  """
  if p.hair_style == 'bald':
    return None
  side = abs(x) / p.face_width
  strand = _strands(p, x, y)
  ragged = 0.035 * (strand - 0.5)
  outer = head - _VOLUME[p.hair_style] * smooth(0.55, -0.75, y) * (
    1 + 0.25 * (noise(x * 4, y * 4, p.seed + 2) - 0.5)
  )

  # Sideburns narrow towards their end.
  def sideburn(bottom):
    return (
      np.maximum(
        y - bottom, (0.97 - side) * p.face_width - 0.16 * smooth(bottom, -0.75, y)
      )
      + ragged
    )

  if p.hair_style == 'short':
    outer -= 0.07 * bump(x, y, 0.8 * p.parting, -1.15, 0.42, 0.35)
    sweep = (
      0.10
      * np.tanh((x - p.parting) * (4.0 if p.parting < 0 else -4.0))
      * smooth(0.75, 0.35, side)
    )
    line = y + 0.76 - 0.42 * np.maximum(side - 0.42, 0) ** 1.5 - sweep + 1.8 * ragged
    edge = np.minimum(line * 0.85, sideburn(p.eye_y + 0.14))
  elif p.hair_style == 'cropped':
    line = y + 0.76 - 0.42 * np.maximum(side - 0.50, 0) ** 1.3 + 0.5 * ragged
    edge = np.minimum(line * 0.9, sideburn(p.eye_y + 0.10))
  elif p.hair_style == 'receding':
    corners = 0.30 * band(side - 0.52, 0.22)
    line = y + 0.72 + corners - 0.95 * np.maximum(side - 0.66, 0) + 0.4 * ragged
    edge = np.minimum(line * 0.8, sideburn(p.eye_y + 0.12))
  elif p.hair_style == 'long':
    edge = _curtain(p, x, y, ragged, ends=1.28)
  else:
    edge = _fringe(p, x, y, ragged, ends=0.62)
  if p.hair_style in ('long', 'bob'):
    outer = (
      _mane(p, x, y, head, ends=1.30 if p.hair_style == 'long' else 0.66) + 0.6 * ragged
    )
  distance = np.maximum(outer, edge)
  return [distance, *_colour(p, x, y, strand, outer, distance)]


def back(p: Identity, x, y) -> tuple[np.ndarray, np.ndarray] | None:
  """Makes the hair behind neck and ears: (distance, colour), or None."""
  if p.hair_style == 'long':
    ends = 1.34
    width = p.face_width + 0.10
  elif p.hair_style == 'bob':
    ends = 0.78
    width = p.face_width + 0.07
  else:
    return None
  strand = _strands(p, x, y)
  half = width - 0.30 * smooth(0.1, -0.8, y)
  distance = np.maximum(_rounded(abs(x) - half, y - ends, 0.14), -0.8 - y) + 0.04 * (
    strand - 0.5
  )
  return distance, tint(p.hair) * (0.34 + 0.22 * strand)


def beard(p: Identity, x, y, skin: np.ndarray) -> np.ndarray:
  """Adds stubble, a full beard or a moustache to the albedo [3, h, w]."""
  if p.beard == 'none':
    return skin
  side, tip = abs(x), projection.nose_tip(p)
  above = tip + 0.11
  soft = 0.10 if p.beard == 'stubble' else 0.05
  jawline = smooth(-soft, soft, y - (p.eye_y + 0.24) - 0.34 * smooth(0.66, 0.24, side))
  lip = smooth(0.05, -0.02, abs(y - above - 0.05 - 0.35 * side**2) - 0.035)
  lip *= smooth(p.mouth_width + 0.06, p.mouth_width - 0.03, side)
  grain = noise(x * 34 + 6 * y, y * 16, p.seed + 9)
  if p.beard == 'moustache':
    amount = lip * (0.80 + 0.3 * grain)
  else:
    # Lips, and the skin right under them, stay bare.
    bare = bump(x, y, 0, p.mouth_y + 0.01, 0.80 * p.mouth_width, 0.085)
    amount = np.maximum(jawline * (1 - 0.9 * bare), 0.9 * lip)
    amount *= 0.26 + 0.20 * grain if p.beard == 'stubble' else 0.78 + 0.30 * grain
  colour = tint(tuple(0.75 * c for c in p.hair)) * (0.70 + 0.55 * grain)
  return skin + np.minimum(amount, 1) * (colour - skin)


def _strands(p: Identity, x, y) -> np.ndarray:
  """Makes streaks in [0, 1] that fan out from the parting."""
  angle = np.arctan2(x - p.parting * 0.5, y + 1.9)
  fine = noise(angle * 62, y * 1.1, p.seed + 1)
  broad = noise(angle * 17, y * 0.8, p.seed + 4)
  return 0.55 * fine + 0.45 * broad


def _colour(p: Identity, x, y, strand, outer, distance) -> np.ndarray:
  """Lights the hair: strands, a soft band of gloss, darker roots and rims."""
  lit = np.clip(0.80 + 0.34 * p.light[0] * x - 0.16 * y, 0.45, 1.15)
  shade = (
    lit
    * (0.62 + 0.58 * strand)
    * (1 - 0.30 * smooth(-0.10, 0, outer))
    * (1 - 0.18 * smooth(-0.07, 0, distance))
  )
  gloss = band(y + 0.88 - 0.42 * (x - 0.25 * p.light[0]) ** 2, 0.085) * (
    0.25 + 0.75 * strand
  )
  strength = 0.10 if p.hair_style in ('cropped', 'receding') else 0.20
  return tint(p.hair) * shade + strength * gloss * (0.45 + 0.55 * tint(p.hair))


def _mane(p: Identity, x, y, head, ends: float) -> np.ndarray:
  """Makes the outer edge of long hair.

  It is the enlarged head above, and falls straight and slightly outward below the
  temples.
  """
  volume = _VOLUME[p.hair_style]
  width = (
    p.face_width
    + volume * (0.85 + 0.55 * smooth(-0.2, 0.6, y))
    - 0.30 * smooth(-0.05, -0.65, y)
  )
  fall = _rounded(abs(x) - width, y - ends, 0.17)
  cap, fall = head - volume, np.maximum(fall, p.eye_y - 0.40 - y)
  blend = np.maximum(0.16 - abs(cap - fall), 0) / 0.16
  return np.minimum(cap, fall) - 0.04 * blend * blend  # smooth union


def _rounded(dx, dy, radius: float) -> np.ndarray:
  """Intersects two half-planes with a round corner."""
  qx, qy = np.maximum(dx + radius, 0), np.maximum(dy + radius, 0)
  return (
    np.sqrt(qx * qx + qy * qy)
    + np.minimum(np.maximum(dx + radius, dy + radius), 0)
    - radius
  )


def _curtain(p: Identity, x, y, ragged, ends: float) -> np.ndarray:
  """Makes hair on both sides of a parted opening for the face."""
  lean = x - 0.55 * p.parting * smooth(0.1, -0.9, y)
  window = (
    np.sqrt((lean / (0.83 * p.face_width)) ** 2 + (np.minimum(y - 0.25, 0) / 1.06) ** 2)
    - 1
  )
  return np.maximum(-window * 0.75 + 0.7 * ragged, y - ends)


def _fringe(p: Identity, x, y, ragged, ends: float) -> np.ndarray:
  """Makes a straight fringe above the brows, and sides down to the jaw."""
  brow = y - (p.brow_y - 0.15) + 1.1 * ragged + 0.06 * (abs(x) / p.face_width) ** 2
  sides = np.maximum((0.86 - 0.03 * y) * p.face_width - abs(x), y - ends) + 0.3 * ragged
  return np.minimum(brow, sides)
