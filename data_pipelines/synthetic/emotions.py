"""Emotions as facial action units (AUs), and the expression vector of a face tracker.

The vector mixes emotion with identity on purpose: each identity has its own strength
and resting level per AU, and a nuisance code. Removing that mixture is what the emotion
embedder has to learn.
"""

import functools

import numpy as np

from dicetalk_jax.data.clip_record import FPS

# FACS numbers; L and R are the viewer's left and right. 43 droops the lids, 64 lowers
# the gaze. 2 and 10 act on both sides; 2R and 10R add to the right side alone.
AUS = (
  '1',
  '2',
  '2R',
  '4',
  '5',
  '6',
  '7',
  '9',
  '10',
  '10R',
  '12L',
  '12R',
  '14L',
  '14R',
  '15',
  '16',
  '17',
  '18',
  '20',
  '22',
  '23',
  '24',
  '25',
  '26',
  '43',
  '64',
)
AU = {name: i for i, name in enumerate(AUS)}

PRESETS: dict[str, dict[str, float]] = {
  'angry': {
    '4': 1,
    '5': 0.55,
    '7': 0.75,
    '9': 0.3,
    '10': 0.25,
    '23': 0.75,
    '24': 0.5,
    '25': 0.35,
    '17': 0.35,
  },
  'contempt': {
    '14R': 1,
    '12R': 0.95,
    '10R': 0.45,
    '2R': 0.6,
    '43': 0.5,
    '17': 0.3,
    '24': 0.3,
  },
  'disgusted': {
    '9': 1,
    '10': 1,
    '4': 0.55,
    '7': 0.55,
    '15': 0.55,
    '6': 0.35,
    '17': 0.75,
    '16': 0.2,
    '25': 0.12,
  },
  'fear': {
    '1': 0.95,
    '2': 0.55,
    '4': 0.55,
    '5': 1,
    '20': 0.9,
    '25': 0.5,
    '26': 0.3,
    '7': 0.15,
  },
  'happy': {'6': 1, '12L': 1, '12R': 1, '25': 0.65, '26': 0.18},
  'neutral': {},
  'sad': {'1': 1, '4': 0.5, '15': 1, '17': 0.6, '43': 0.28, '64': 0.7},
  'surprised': {'1': 1, '2': 1, '5': 0.95, '25': 0.5, '26': 0.9},
}
# Yaw, pitch and roll in radians at full intensity; positive pitch lowers the head.
HEAD: dict[str, tuple[float, float, float]] = {
  'angry': (0, 0.10, 0),
  'contempt': (0.14, -0.13, 0.08),
  'disgusted': (-0.10, -0.03, 0.05),
  'fear': (0, -0.07, 0),
  'happy': (0, -0.02, 0.05),
  'neutral': (0, 0, 0),
  'sad': (0.04, 0.14, -0.05),
  'surprised': (0, -0.09, 0),
}
_INTENSITY = {1: 0.38, 2: 0.68, 3: 1.0}
_SPEECH_JAW = {
  'angry': 1.1,
  'happy': 1.1,
  'surprised': 1.1,
  'fear': 1.0,
  'neutral': 0.9,
  'disgusted': 0.9,
  'contempt': 0.8,
  'sad': 0.75,
}

LEAKAGE = 1.0  # how strongly identity enters the expression vector (lambda)
EXPRESSION_DIM = 64
_NUISANCE_DIM = 20
_SCALE = 0.72  # brings the standard deviation near 0.5, as in real coefficient files


def intensity(emotion: str, level: int) -> float:
  """Gives the factor of a level (1, 2, 3) on the preset; neutral has none."""
  return 0.0 if emotion == 'neutral' else _INTENSITY[level]


def preset(emotion: str, level: int = 3) -> np.ndarray:
  """Gives the AU activations of an emotion: float32 [26]."""
  au = np.zeros(len(AUS), np.float32)
  for name, value in PRESETS[emotion].items():
    au[AU[name]] = value * intensity(emotion, level)
  return au


def head_pose(emotion: str, level: int = 3) -> np.ndarray:
  """Gives yaw, pitch and roll of an emotion in radians: float32 [3]."""
  return np.array(HEAD[emotion], np.float32) * np.float32(intensity(emotion, level))


def speech_jaw(emotion: str, level: int) -> float:
  """Gives how widely the mouth opens while speaking in an emotion."""
  neutral = _SPEECH_JAW['neutral']
  return neutral + intensity(emotion, level) * (_SPEECH_JAW[emotion] - neutral)


def envelope(frames: int, rng: np.random.Generator) -> np.ndarray:
  """Makes a slow variation of intensity, 1 - .15 sin^2: float32 [frames]."""
  phase = rng.uniform(0, np.pi)
  hertz = rng.uniform(0.15, 0.35)
  return (
    1 - 0.15 * np.sin(phase + np.pi * hertz * np.arange(frames) / FPS) ** 2
  ).astype(np.float32)


@functools.cache
def _basis() -> np.ndarray:
  """Makes the fixed orthonormal matrix that mixes the AUs: [64, 64]."""
  q, r = np.linalg.qr(
    np.random.default_rng(0xD1CE).standard_normal((EXPRESSION_DIM, EXPRESSION_DIM))
  )
  return q * np.sign(np.diag(r))


def _drift(frames: int, rng: np.random.Generator) -> np.ndarray:
  """Draws stationary noise of variance 1 and a correlation of one second.

  Returns:
    [frames, AUs].
  """
  keep = np.exp(-1 / FPS)
  noise = rng.standard_normal((frames, len(AUS)))
  for now, before in zip(noise[1:], noise):
    now *= np.sqrt(1 - keep**2)
    now += keep * before
  return noise


def expression(
  identity: int,
  au: np.ndarray,
  rng: np.random.Generator,
  leakage: float = LEAKAGE,
  drift: float = 0.0,
) -> np.ndarray:
  """Makes the expression vector of a face tracker.

  It is Q [3 (a (1 + l (s - 1)) + l b + d); .45 l v + n1; n2], where s, b and v follow
  from the identity, and n1 and n2 are noise.

  Args:
    identity: seed of the person.
    au: [N, 26] activations a, speech included.
    rng: source of the tracker noise.
    leakage: l; 0 removes identity from the vector.
    drift: standard deviation of d, errors of the tracker. They last about a second, so
      they do not average out.

  Returns:
    float32 [N, 64].
  """
  person = np.random.default_rng([0x1DE7, identity])
  strength = np.exp(person.normal(0, 0.35, len(AUS)))
  rest = np.abs(person.normal(0, 0.10, len(AUS)))
  nuisance = person.standard_normal(_NUISANCE_DIM)
  n = len(au)
  face = (
    au * (1 + leakage * (strength - 1)) + leakage * rest + rng.normal(0, 0.03, au.shape)
  )
  code = 0.45 * leakage * nuisance + rng.normal(0, 0.25, (n, _NUISANCE_DIM))
  other = rng.normal(0, 0.15, (n, EXPRESSION_DIM - len(AUS) - _NUISANCE_DIM))
  if drift:  # drawn last: the other noise does not depend on it
    face += drift * _drift(n, rng)
  return (
    _SCALE * np.concatenate([3 * face, code, other], axis=-1) @ _basis().T
  ).astype(np.float32)
