"""Unseen people who say unseen sentences: rendered, and as the model shows them."""

import dataclasses

import numpy as np

from dicetalk_jax.pipeline import Pipeline
from examples.demo_data import Case, cases

EMOTIONS = ('happy', 'angry', 'sad', 'surprised')
SEED = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Person:
  """Someone whom the model has never seen.

  Attributes:
    identity: seed of the person.
    portrait: neutral, uint8 `[H,W,3]`: what the model is given.
    face: `[4]` outline of the face there, x0, y0, x1, y1 in [0,1].
    cases: what the person says, one for each of `EMOTIONS`.
  """

  identity: int
  portrait: np.ndarray
  face: np.ndarray
  cases: list[Case]


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
  """One sentence in one emotion; all videos have the same N frames.

  Attributes:
    case: who says what, and how.
    text: the sentence.
    audio: float32 `[samples]`, 16 kHz.
    fps: frames per second.
    videos: uint8 `[N,H,W,3]` each: `generated`, the `truth` and the truth after the
      autoencoder, `autoencoded`, which is the best that the model could draw.
    opening: `[N]` true opening of the mouth.
    face: `[4]` mean outline of the face in the truth, in [0,1].
  """

  case: Case
  text: str
  audio: np.ndarray
  fps: float
  videos: dict[str, np.ndarray]
  opening: np.ndarray
  face: np.ndarray


def first_people(count: int, size: int) -> list[Person]:
  """The first of the people that the model is tested on.

  Args:
    count: how many.
    size: side of the frames in pixels; portraits are four times as wide.
  """
  by_identity: dict[int, list[Case]] = {}
  for case in cases(count):
    if case.emotion in EMOTIONS:
      by_identity.setdefault(case.identity, []).append(case)
  people = []
  for identity, said in by_identity.items():
    said.sort(key=lambda case: EMOTIONS.index(case.emotion))
    portrait, face = said[0].portrait(4 * size)
    people.append(Person(identity, portrait, face, said))
  return people


def make_clip(pipe: Pipeline, person: Person, case: Case) -> Clip:
  """Renders the truth and generates the same from portrait, speech and emotion."""
  truth = case.truth(pipe.settings.image_size)
  height, width = person.portrait.shape[:2]
  left, top, right, bottom = person.face * [width, height, width, height]
  generated, fps = pipe.generate(
    person.portrait,
    truth.audio,
    emotion=case.prior,
    face_box=(left, top, right - left, bottom - top),
    seed=SEED,
    interpolate=False,
  )
  # The frames of the truth that fall on the same times.
  step = pipe.settings.frame_step
  frames = truth.frames[::step][: len(generated)]
  count = len(frames)
  return Clip(
    case=case,
    text=truth.text,
    audio=truth.audio,
    fps=fps,
    videos={
      'generated': generated[:count],
      'truth': frames,
      'autoencoded': pipe.reconstruct(frames),
    },
    opening=truth.opening[::step][:count],
    face=truth.bbox[::step][:count].mean(0),
  )
