"""Makes a person from an integer: face shape, colours, hair, clothes, light and voice.

Lengths are in face units (head half-height about 1, x right, y down, chin near 1, crown
near -1.15), angles in radians, colours are RGB in [0, 1]. Every number is a Python
float: a numpy scalar would promote float32 images to float64.
"""

import dataclasses

import numpy as np

from data_pipelines.synthetic.speech import Voice

Colour = tuple[float, float, float]

NECKLINES = ('crew', 'v', 'collar')

_SKIN = (
  (250, 208, 180),
  (240, 192, 158),
  (224, 172, 134),
  (196, 143, 104),
  (148, 101, 70),
  (110, 73, 53),
)
_HAIR = (
  (44, 32, 28),
  (72, 48, 34),
  (104, 66, 40),
  (150, 104, 60),
  (206, 166, 104),
  (158, 74, 38),
  (150, 148, 148),
)
_DARK_HAIR = ((34, 28, 28), (50, 36, 30), (70, 46, 34))
_IRIS = (
  (96, 62, 36),
  (122, 84, 44),
  (92, 108, 62),
  (70, 112, 150),
  (104, 124, 140),
  (72, 122, 104),
)
_CLOTHES = (
  (196, 72, 64),
  (58, 96, 150),
  (52, 120, 104),
  (226, 170, 70),
  (96, 76, 132),
  (70, 78, 92),
  (222, 216, 206),
  (188, 104, 128),
  (96, 132, 82),
)
_BACKDROP = (
  (164, 196, 214),
  (214, 196, 170),
  (176, 200, 176),
  (206, 182, 196),
  (186, 186, 206),
  (150, 176, 190),
  (222, 206, 160),
)


@dataclasses.dataclass(frozen=True)
class Identity:
  """Everything about a person and their studio that does not change."""

  seed: int
  female: bool
  # skull
  face_width: float  # half-width
  jaw: float  # exponent of the jaw line: large = square
  chin: float  # y of the chin
  # eyes and brows
  eye_x: float
  eye_y: float
  eye_width: float  # half-width
  eye_height: float  # half-height
  eye_tilt: float  # outer corner up
  brow_height: float  # above the eye line
  brow_thickness: float
  brow_arch: float
  # nose and mouth
  nose_length: float
  nose_width: float  # half-width
  nose_depth: float
  mouth_y: float
  mouth_width: float  # half-width
  upper_lip: float
  lower_lip: float
  # surface
  skin: Colour
  lips: Colour
  blush: Colour
  iris: Colour
  wrinkles: float
  freckles: bool
  # hair
  hair_style: str
  hair: Colour
  parting: float
  beard: str
  glasses: str
  # studio
  neckline: str
  clothes: Colour
  backdrop: tuple[Colour, Colour]
  light: tuple[float, float, float]  # unit vector towards the light; y points down
  ambient: float
  cast: Colour
  # voice and manner
  voice: Voice
  jaw_gain: float

  @property
  def brow_y(self) -> float:
    """Height of the resting brows."""
    return self.eye_y - self.brow_height


def _blend(a: Colour, b: Colour, t: float) -> Colour:
  red, green, blue = (x + t * (y - x) for x, y in zip(a, b))
  return red, green, blue


def make_identity(seed: int) -> Identity:
  """Makes the person with this seed, which is the same on every machine."""
  rng = np.random.default_rng([0xFACE, seed])

  def between(low, high):
    return float(rng.uniform(low, high))

  def chance(p):
    return bool(rng.random() < p)

  def pick(options):
    return options[int(rng.integers(len(options)))]

  def colour(rgb):
    return tuple(c / 255 for c in rgb)

  female = chance(0.5)
  tone = between(0, len(_SKIN) - 1)
  lower = min(int(tone), len(_SKIN) - 2)
  skin = _blend(colour(_SKIN[lower]), colour(_SKIN[lower + 1]), tone - lower)
  dark = tone > 3.2
  redness = between(0.30, 0.62) if female else between(0.15, 0.38)
  pale_lips = (skin[0] * 0.90, skin[1] * 0.66, skin[2] * 0.68)
  lips = _blend(pale_lips, (0.70, 0.20, 0.24), redness * (0.7 if dark else 1.0))
  blush = _blend(skin, (0.86, 0.30, 0.28), between(0.10, 0.26))
  side = 1.0 if chance(0.5) else -1.0
  light = np.array([side * between(0.30, 0.62), -between(0.45, 0.70), 1.0])
  backdrop = pick(_BACKDROP)
  semitones = between(-3, 3)
  brightness = between(0.72, 1.02)
  return Identity(
    seed=seed,
    female=female,
    face_width=between(0.70, 0.77) if female else between(0.73, 0.80),
    jaw=between(1.65, 2.15) if female else between(1.95, 2.6),
    chin=between(0.96, 1.03) if female else between(0.98, 1.06),
    eye_x=between(0.285, 0.335),
    eye_y=between(-0.13, -0.06),
    eye_width=between(0.152, 0.182),
    eye_height=between(0.080, 0.100),
    eye_tilt=between(-0.06, 0.16),
    brow_height=between(0.165, 0.225),
    brow_thickness=between(0.024, 0.034) if female else between(0.030, 0.042),
    brow_arch=between(0.015, 0.045) if female else between(0, 0.03),
    nose_length=between(0.36, 0.45),
    nose_width=between(0.10, 0.135) if female else between(0.115, 0.155),
    nose_depth=between(0.8, 1.2),
    mouth_y=between(0.53, 0.60),
    mouth_width=between(0.22, 0.285),
    upper_lip=between(0.050, 0.068) if female else between(0.040, 0.056),
    lower_lip=between(0.060, 0.085) if female else between(0.050, 0.072),
    skin=skin,
    lips=lips,
    blush=blush,
    iris=colour(_IRIS[0] if dark else pick(_IRIS)),
    wrinkles=between(0.5, 1.1),
    freckles=chance(0.3) and tone < 3,
    hair_style=pick(
      ('short', 'long', 'bob', 'long', 'bob', 'cropped')
      if female
      else ('bald', 'short', 'short', 'cropped', 'receding', 'short')
    ),
    hair=colour(pick(_DARK_HAIR if dark else _HAIR)),
    parting=between(-0.4, 0.4),
    beard='none' if female else pick(('none', 'none', 'stubble', 'full', 'moustache')),
    glasses=pick(('none', 'none', 'none', 'round', 'square')),
    neckline=pick(NECKLINES),
    clothes=tuple(c * brightness for c in colour(pick(_CLOTHES))),
    backdrop=(
      colour(backdrop),
      tuple(c * between(0.55, 0.75) for c in colour(backdrop)),
    ),
    light=tuple((light / np.linalg.norm(light)).tolist()),
    ambient=between(0.42, 0.58) + (0.10 if dark else 0.0),
    cast=tuple(between(0.95, 1.05) for _ in range(3)),
    voice=Voice(
      (205.0 if female else 112.0) * 2 ** (semitones / 12),
      (1.12 if female else 0.97) * between(0.97, 1.03),
    ),
    jaw_gain=between(0.85, 1.15),
  )
