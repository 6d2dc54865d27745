"""Makes one synthetic clip: audio, frames and the truth about every frame."""

import dataclasses
import zlib

import numpy as np

from data_pipelines.synthetic import emotions, phonemes, speech, visemes
from data_pipelines.synthetic.emotions import AU
from data_pipelines.synthetic.geometry import make_face
from data_pipelines.synthetic.identity import make_identity
from data_pipelines.synthetic.landmarks import face_box, landmarks
from data_pipelines.synthetic.motion import blinks, head_motion, loudness
from data_pipelines.synthetic.projection import Pose
from data_pipelines.synthetic.renderer import Renderer
from dicetalk_jax.data.clip_record import EMOTIONS, FPS, LEVELS, SAMPLES_PER_FRAME
from dicetalk_jax.errors import InputError

_BROW_FLASH = 0.15  # how far brows rise on loud syllables
# Where the camera's frame lies in the whole image: from left to right, top to bottom.
_VIEW = (0.5, 0.5)


@dataclasses.dataclass(frozen=True)
class Clip:
  """N frames: 25 per second, or `every` so many-th of them.

  All truth comes from the geometry that was painted, never from a detector.
  """

  frames: np.ndarray  # uint8 [N, size, size, 3]; N = 0 without rendering
  audio: np.ndarray  # float32, 16 kHz: 640 samples for each frame at 25 per second
  expression: np.ndarray  # float32 [N, 64]
  bbox: np.ndarray  # float32 [N, 4] x1, y1, x2, y2 in [0, 1]
  landmarks: np.ndarray  # float32 [N, 68, 2] in [0, 1]
  au: np.ndarray  # float32 [N, 26] activations that were painted, speech included
  opening: np.ndarray  # float32 [N] true mouth opening, face units
  viseme: np.ndarray  # float32 [N, 6]
  phoneme: np.ndarray  # int32 [N] index into PHONEMES
  pose: np.ndarray  # float32 [N, 5] yaw, pitch, roll, tx, ty
  blink: np.ndarray  # float32 [N]
  text: str

  @property
  def lips_touch(self) -> np.ndarray:
    """bool [N]: frames of P, B and M."""
    return np.isin(self.phoneme, [phonemes.INDEX[name] for name in visemes.BILABIALS])


def make_clip(
  identity: int,
  emotion: str,
  level: int,
  sentence: int,
  *,
  size: int = 64,
  take: int = 0,
  motion: float = 1.0,
  articulation: float = 1.0,
  zoom: float = 1.0,
  drift: float = 0.0,
  max_seconds: float | None = None,
  every: int = 1,
  render: bool = True,
) -> Clip:
  """Makes the clip of a person who says a sentence in an emotion.

  Every value is a function of the arguments.

  Args:
    identity: seed of the person.
    emotion: one of the eight emotions.
    level: intensity 1, 2 or 3; neutral has none.
    sentence: seed of the words.
    size: height and width of the frames in pixels.
    take: another performance of the same words.
    motion: factor on head motion; 0 leaves only the posture of the emotion.
    articulation: factor on how far speech opens the mouth.
    zoom: of the camera; 1 shows head and shoulders, 1.25 the head alone.
    drift: slow errors of the face tracker, in units of activations, see
      `emotions.expression`.
    max_seconds: cuts the finished clip after this time, to whole frames.
    every: keeps the first of every so many frames, and the whole audio; 2 gives 12.5
      frames per second.
    render: False leaves `frames` empty, which is several times faster.

  Raises:
    InputError: the emotion or level is unknown, or no frame is left after the cut.
  """
  _check(emotion, level)
  level = 0 if emotion == 'neutral' else level
  performance = (identity, EMOTIONS.index(emotion), level, sentence, take)

  def stream(name):
    return np.random.default_rng([zlib.crc32(name.encode()), *performance])

  # 1. Speak
  person = make_identity(identity)
  strength = emotions.intensity(emotion, level)
  words = phonemes.sentence(sentence)
  utterance = speech.synthesise(
    words, person.voice, speech.prosody(emotion, strength), stream('speech')
  )

  # 2. Move the face
  track = visemes.viseme_track(utterance)
  loud = loudness(utterance.audio)
  strengths = emotions.envelope(utterance.frames, stream('envelope'))[:, None]
  jaw_gain = articulation * person.jaw_gain * emotions.speech_jaw(emotion, level)
  au = activations(strengths * emotions.preset(emotion, level), track, loud, jaw_gain)
  pose = head_motion(
    strengths * emotions.head_pose(emotion, level), loud, motion, stream('pose')
  )
  blink = blinks(utterance.frames, stream('blink'))
  expression = emotions.expression(identity, au, stream('tracker'), drift=drift)

  # 3. Cut
  n = utterance.frames
  if max_seconds is not None:
    n = min(n, int(max_seconds * FPS + 1e-6))
  if n < 1:
    raise InputError(
      f'max_seconds={max_seconds} leaves no frame; ask for at least {1 / FPS} s'
    )

  # 4. Paint
  kept = range(0, n, every)
  poses = [Pose(*pose[i].tolist()) for i in kept]
  faces = [
    make_face(person, au[i], track.viseme[i], blink[i], _gaze(at))
    for i, at in zip(kept, poses)
  ]
  frames = np.zeros((len(kept) if render else 0, size, size, 3), np.uint8)
  camera = _Camera(size, zoom)
  if render:
    draw = Renderer(person, camera.rendered)
    first = int(stream('grain').integers(1 << 16))
    for k, (i, face, at) in enumerate(zip(kept, faces, poses)):
      frames[k] = camera.cut(draw(face, at, first + i))
  return Clip(
    frames=frames,
    audio=utterance.audio[: n * SAMPLES_PER_FRAME],
    expression=expression[:n:every],
    bbox=camera.see(np.stack([face_box(f, at) for f, at in zip(faces, poses)])),
    landmarks=camera.see(np.stack([landmarks(f, at) for f, at in zip(faces, poses)])),
    au=au[:n:every],
    opening=np.array([f.mouth.opening for f in faces], np.float32),
    viseme=track.viseme[:n:every],
    phoneme=track.phoneme[:n:every],
    pose=pose[:n:every],
    blink=blink[:n:every],
    text=phonemes.text(words),
  )


def make_portrait(
  identity: int,
  size: int = 256,
  emotion: str = 'neutral',
  level: int = 3,
  zoom: float = 1.0,
  pose: Pose | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Makes a portrait with open eyes, and a closed mouth if the emotion allows.

  Args:
    identity, size, emotion, level, zoom: as in `make_clip`.
    pose: of the head; frontal by default.

  Returns:
    The image, uint8 [size, size, 3], and the face box, float32 [4], as x1, y1, x2, y2
    in [0, 1].
  """
  _check(emotion, level)
  person = make_identity(identity)
  silent = np.zeros(len(visemes.CHANNELS))
  pose = pose or Pose()
  face = make_face(person, emotions.preset(emotion, level), silent, gaze=_gaze(pose))
  camera = _Camera(size, zoom)
  image = camera.cut(Renderer(person, camera.rendered)(face, pose))
  return image, camera.see(face_box(face, pose))


class _Camera:
  """Cuts the part of the rendered image that is kept; the head stays in view."""

  def __init__(self, size: int, zoom: float):
    self.rendered = max(size, round(size * zoom))
    self._left, self._top = (round(t * (self.rendered - size)) for t in _VIEW)
    self._size = size

  def cut(self, frame: np.ndarray) -> np.ndarray:
    return frame[
      self._top : self._top + self._size, self._left : self._left + self._size
    ]

  def see(self, points: np.ndarray) -> np.ndarray:
    """Maps coordinates (x, y, ...) of the whole image to the part.

    Both are in [0, 1] inside.
    """
    corner = np.resize(
      np.array([self._left, self._top], np.float32) / self.rendered, points.shape[-1]
    )
    return (points - corner) * np.float32(self.rendered / self._size)


def _check(emotion: str, level: int) -> None:
  if emotion not in EMOTIONS:
    raise InputError(
      f'emotion {emotion!r} is not known; choose one of {", ".join(EMOTIONS)}'
    )
  if emotion != 'neutral' and level not in LEVELS:
    raise InputError(f'emotion level {level} is not known; choose 1, 2 or 3')


def activations(
  au: np.ndarray, track: visemes.VisemeTrack, loud: np.ndarray, jaw_gain: float
) -> np.ndarray:
  """Adds speech to the activations [N, 26] of an emotion.

  Jaw and lip parting are mixed, and brows rise on loud syllables.
  """
  au = au.copy()
  flash = _BROW_FLASH * np.clip(2 * loud - 1, 0, 1)
  for name in ('1', '2'):
    au[:, AU[name]] = np.minimum(1, au[:, AU[name]] + flash)
  jaw, parting = visemes.mix(
    au[:, AU['26']], au[:, AU['25']], track.viseme, track.activity, jaw_gain
  )
  au[:, AU['26']], au[:, AU['25']] = jaw, parting
  return au


def _gaze(pose: Pose) -> tuple[float, float]:
  """Keeps the eyes on the camera while the head turns."""
  return -0.7 * pose.yaw, -0.6 * pose.pitch
