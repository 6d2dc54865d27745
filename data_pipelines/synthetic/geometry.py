"""Turns action units and visemes into the curves of a face, in face units.

The renderer paints these curves and the landmarks lie on them, so image and truth agree
by construction.
"""

import dataclasses

import numpy as np

from data_pipelines.synthetic.emotions import AUS
from data_pipelines.synthetic.identity import Identity
from data_pipelines.synthetic.visemes import FV, PRESS, ROUND, TONGUE, WIDE

JAW_DROP = 0.19  # way of the chin at jaw = 1
JAW_GAP = 0.27  # opening of the mouth at jaw = 1
CROWN_Y = -1.15
HINGE_Y = 0.40  # the face above this line does not follow the jaw


@dataclasses.dataclass(frozen=True)
class Eye:
  """Lid curves over u, from -1 (inner corner) to 1 (outer corner).

  `side` is -1 for the viewer's left.
  """

  side: float
  x: float  # distance of the centre from the midline
  y: float
  width: float  # half-width
  tilt: float  # slope, outer corner up
  up: float  # height of the upper lid above the corner line
  down: float  # depth of the lower lid below it
  skew: float  # raises the inner half of the upper lid, lowers the outer half
  gaze: tuple[float, float]
  pouch: float  # cheek pushed up against the lower lid

  def lids(self, u):
    """Gives (upper, lower) lid, y relative to the corner line, for |u| <= 1."""
    power = abs(u) ** 2.3
    return -self.up * (1 - power) + self.skew * u * (1 - u * u), self.down * (1 - power)


@dataclasses.dataclass(frozen=True)
class Brow:
  """Quadratic Bezier curve from the inner to the outer end.

  x is the distance from the midline.
  """

  side: float
  inner: tuple[float, float]
  middle: tuple[float, float]  # control point
  outer: tuple[float, float]
  thickness: float

  def curve(self, t):
    """Gives y at t, from 0 (inner) to 1 (outer); x is linear in t."""
    return (
      (1 - t) ** 2 * self.inner[1]
      + 2 * t * (1 - t) * self.middle[1]
      + t * t * self.outer[1]
    )


@dataclasses.dataclass(frozen=True)
class Mouth:
  """Lip edges over u, from -1 (the viewer's left corner) to 1.

  Left and right differ in width and corner height.
  """

  y: float
  width: tuple[float, float]  # half-widths, left and right
  corner: tuple[float, float]  # y of the corners relative to the centre
  gap_up: float
  gap_down: float
  sneer: float  # lifts the middle of the upper lip
  follow: float  # share of the sneer that the lower lip follows
  square: float  # exponent of the aperture: 2 round .. 4.5 square
  upper: float  # thickness of the lips
  lower: float
  teeth: float  # how much of the lower teeth shows
  tongue: float

  @property
  def opening(self) -> float:
    """True opening at the midline, face units."""
    return self.gap_up + self.gap_down + self.sneer * (1 - self.follow)

  def inner(self, u, corner):
    """Gives (upper, lower) edge of the aperture, y relative to the mouth's centre.

    `corner` is that of u's side.
    """
    a = abs(u)
    line = corner * a**1.7
    aperture = (1 - a**self.square) ** 0.8
    lift = self.sneer * (1 - u * u)
    return (
      line - self.gap_up * aperture - lift,
      line + self.gap_down * aperture - self.follow * lift,
    )

  def thickness(self, u):
    """Gives (upper, lower) lip thickness, with a cupid's bow."""
    a = abs(u)
    taper = (1 - a**2.2) ** 0.75
    bow = (
      1 - 0.26 * np.exp(-((u / 0.13) ** 2)) + 0.06 * np.exp(-(((a - 0.28) / 0.16) ** 2))
    )
    return self.upper * taper * bow, self.lower * taper


@dataclasses.dataclass(frozen=True)
class Face:
  """Everything that moves in one frame."""

  person: Identity
  drop: float  # how far the chin has gone down
  eyes: tuple[Eye, Eye]
  brows: tuple[Brow, Brow]
  mouth: Mouth
  cheek: tuple[float, float]  # raised cheeks, left and right
  boss: float  # chin boss
  sneer: float  # wrinkled nose
  folds: dict[str, float]  # strengths of the expression lines

  def stretch(self, y):
    """Maps y of the resting face to this frame: the skin follows the jaw."""
    return y + np.maximum(y - HINGE_Y, 0) * (self.drop / (self.person.chin - HINGE_Y))

  def unstretch(self, y):
    """The inverse of `stretch`."""
    span = self.person.chin - HINGE_Y
    return y - np.maximum(y - HINGE_Y, 0) * (self.drop / (span + self.drop))


def make_face(
  person: Identity,
  au,
  viseme,
  blink: float = 0.0,
  gaze: tuple[float, float] = (0.0, 0.0),
) -> Face:
  """Makes the geometry of one frame.

  Args:
    person: the identity.
    au: [26] activations; 25 and 26 already mixed with speech (`visemes.mix`).
    viseme: [6] viseme channels; the jaw channel is ignored because AU 26 contains it.
    blink: from 0 (open) to 1 (closed).
    gaze: direction of the eyes relative to the head, in units of the eye's half-width.
  """
  a = dict(zip(AUS, np.asarray(au).tolist()))
  v = np.asarray(viseme).tolist()
  a['2L'] = a['2']
  a['2R'] = min(1.0, a['2'] + a['2R'])
  a['10L'] = a['10']
  a['10R'] = min(1.0, a['10'] + a['10R'])
  return Face(
    person=person,
    drop=JAW_DROP * a['26'],
    eyes=(
      _eye(person, a, -1.0, float(blink), gaze),
      _eye(person, a, 1.0, float(blink), gaze),
    ),
    brows=(_brow(person, a, -1.0), _brow(person, a, 1.0)),
    mouth=_mouth(person, a, v),
    cheek=tuple(min(1.2, 0.75 * a['6'] + 0.55 * a['12' + s]) for s in 'LR'),
    boss=a['17'],
    sneer=a['9'],
    folds=_folds(a),
  )


def _eye(p: Identity, a: dict, side: float, blink: float, gaze) -> Eye:
  up = (
    p.eye_height
    * (1 + 0.62 * a['5'])
    * (1 - 0.32 * a['7'])
    * (1 - 0.18 * a['6'])
    * (1 - 0.30 * a['9'])
  )
  up *= (1 - 0.55 * a['43']) * (1 - 0.22 * a['64'])
  down = (
    0.78
    * p.eye_height
    * (1 - 0.85 * a['6'])
    * (1 - 0.55 * a['7'])
    * (1 - 0.35 * a['9'])
    * (1 + 0.12 * a['5'])
  )
  brow_lift = a['2L'] if side < 0 else a['2R']
  skew = 0.09 * a['1'] * (1 - brow_lift) - 0.075 * a['4'] * (1 - a['1'])
  closed_at = 0.6 * down + 0.006
  return Eye(
    side=side,
    x=p.eye_x,
    y=p.eye_y,
    width=p.eye_width,
    tilt=p.eye_tilt,
    up=up + blink * (-closed_at - up),
    down=down + blink * (closed_at - down),
    skew=skew * (1 - blink),
    gaze=(gaze[0], gaze[1] + 0.30 * a['64']),
    pouch=min(1.0, a['6'] + 0.4 * a['7']),
  )


def _brow(p: Identity, a: dict, side: float) -> Brow:
  raised = a['2L'] if side < 0 else a['2R']
  inner = -0.10 * a['1'] + 0.105 * a['4'] + 0.035 * a['9']
  middle = -0.03 * a['1'] - 0.085 * raised + 0.065 * a['4'] + 0.015 * a['9']
  outer = -0.10 * raised + 0.03 * a['4']
  y = p.brow_y
  # The Bezier passes half-way between its control point and the chord, hence the
  # doubled arch.
  return Brow(
    side=side,
    inner=(p.eye_x - 0.185 - 0.055 * a['4'], y + 0.022 + inner),
    middle=(p.eye_x + 0.0075, y - 2 * p.brow_arch + 2 * middle - 0.5 * (inner + outer)),
    outer=(p.eye_x + 0.20, y + 0.026 + outer),
    thickness=p.brow_thickness,
  )


def _mouth(p: Identity, a: dict, v: list[float]) -> Mouth:
  wide, rounded, press, fv, tongue = (v[i] for i in (WIDE, ROUND, PRESS, FV, TONGUE))
  pucker = min(1.0, rounded + a['18'] + a['22'])
  both = 0.5 * (a['12L'] + a['12R'])
  width = (
    p.mouth_width
    * (1 - 0.42 * pucker)
    * (1 + 0.33 * a['20'])
    * (1 - 0.10 * a['23'])
    * (1 - 0.06 * a['24'])
  )
  width *= (1 - 0.10 * min(1.0, a['26'])) * (1 + 0.16 * wide)
  thick = (
    (1 - 0.22 * both)
    * (1 + 0.35 * pucker)
    * (1 - 0.25 * a['20'])
    * (1 - 0.42 * a['23'])
    * (1 - 0.55 * a['24'])
  )
  thick *= 1 - 0.35 * press
  gap = JAW_GAP * a['26'] + 0.035 * a['25']
  contact = 1 - press
  sneer = 0.085 * 0.5 * (a['10L'] + a['10R'])
  return Mouth(
    y=p.mouth_y - 0.035 * a['17'],
    width=tuple(
      width * (1 + 0.30 * a['12' + s]) * (1 + 0.22 * a['14' + s]) for s in 'LR'
    ),
    corner=tuple(
      -0.010
      - 0.125 * a['12' + s]
      - 0.05 * a['14' + s]
      - 0.03 * (a['10' + s] - a['10'])
      + 0.135 * a['15']
      - 0.015 * wide
      for s in 'LR'
    ),
    gap_up=0.28 * gap + 0.022 * fv * contact,
    gap_down=0.72 * gap + 0.075 * a['16'] * contact,
    sneer=sneer,
    follow=1 - 0.30 * contact,
    square=2.2 + 2.0 * min(1.0, a['20'] + 0.7 * a['10'] + 0.8 * both),
    upper=p.upper_lip * thick,
    lower=p.lower_lip * thick * (1 + 0.2 * a['17']) * (1 - 0.45 * fv),
    teeth=min(1.0, a['16'] + 0.5 * a['20'] + 0.3 * a['10']),
    tongue=tongue,
  )


def _folds(a: dict) -> dict[str, float]:
  return {
    'forehead': min(1.0, 0.9 * a['1'] * (1 - 0.5 * a['4'])),
    'forehead_wide': a['2L'],
    'forehead_right': a['2R'] - a['2L'],
    'frown': a['4'],
    'bridge': a['9'],
    'crow': a['6'],
    'chin': a['17'],
    'droop': a['15'],
    **{
      'nasolabial' + s: min(
        1.0, 0.55 * a['10' + s] + 0.65 * a['12' + s] + 0.20 * a['9'] + 0.25 * a['20']
      )
      for s in 'LR'
    },
    **{'dimple' + s: min(1.0, a['14' + s] + 0.25 * a['12' + s]) for s in 'LR'},
  }


def outline(person: Identity, y):
  """Gives the half-width of the resting head at height y, 0 beyond chin and crown.

  It solves (|x|/fw)^2.3 + tl^jaw + tu^2.3 = 1.
  """
  lower, upper = _outline_parameters(person, y)
  return person.face_width * np.maximum(0, 1 - lower**person.jaw - upper**2.3) ** (
    1 / 2.3
  )


def outline_field(person: Identity, x, y):
  """Gives 0 on the resting head's outline, negative inside; grows about linearly."""
  lower, upper = _outline_parameters(person, y)
  return ((abs(x) / person.face_width) ** 2.3 + lower**person.jaw + upper**2.3) ** (
    1 / 2.3
  ) - 1


def _outline_parameters(person: Identity, y):
  """Gives the progress from the eyes down to the chin, and up to the crown."""
  low, high = person.eye_y + 0.12, person.eye_y - 0.16
  return np.maximum(0, (y - low) / (person.chin - low)), np.maximum(
    0, (high - y) / (high - CROWN_Y)
  )
