"""Rendered faces that the judges learn from, and are tested on.

The people, and the sentences of the test, are in no other data set. A clip is rendered
as the training set of the demo shows faces, or with natural motion, articulation and
framing.
"""

from collections.abc import Iterable
import concurrent.futures
import dataclasses
import multiprocessing

import numpy as np
from PIL import Image
from scipy import ndimage

from data_pipelines.builders.synthetic_clips import Job, jobs
from data_pipelines.synthetic import emotions
from data_pipelines.synthetic.clip import Clip, make_clip
from data_pipelines.synthetic.emotions import AU
from data_pipelines.synthetic.projection import SCALE
from dicetalk_jax.data.clip_record import EMOTIONS
from dicetalk_jax.metrics import face_features
from examples.demo_data import JUDGES_SEED, SECONDS, SHARD

_CLIPS = 24  # per person: eight emotions at three levels
_LEARNED_SECONDS = 1.4
_LEARNED_EVERY = 5  # frames
_CORNERS = (48, 54)  # landmarks of the mouth
# Framing of natural clips, and how far boxes are from the outline of the face, in parts
# of its sides.
_ZOOMS = (1.0, 1.25)
_MOTIONS = (0.15, 1.2)
_ARTICULATIONS = (1.0, 2.0)
_SHIFT = 0.03
_STRETCH = 0.06
# The largest degradations. Blur and pixels are those of a frame of 64 pixels.
_BLUR = 1.6
_REDUCTION = 0.45  # to this part of the side, and back
_NOISE = 8.0  # grey levels


@dataclasses.dataclass(frozen=True)
class Faces:
  """N faces, clip after clip.

  Attributes:
    expression, identity: float16 [N,D], features of `face_features`.
    measures: float32 [N,4], the truth of `judges.MEASURES`.
    emotion: [N] index of the emotion.
    level: [N] 1 to 3, 0 for neutral.
    person: [N] number of the person.
    clip: [N] number of the clip.
  """

  expression: np.ndarray
  identity: np.ndarray
  measures: np.ndarray
  emotion: np.ndarray
  level: np.ndarray
  person: np.ndarray
  clip: np.ndarray


def learned(people: int, workers: int) -> Faces:
  """Training faces: clean, and mirrored and degraded copies; frames are far apart."""
  return _faces(_jobs('train', people), _learn, workers)


def tested(people: int, workers: int) -> Faces:
  """Clean faces of people and sentences that are not learned, 12.5 a second."""
  return _faces(_jobs('val', people), _test, workers)


def degrade(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Blurs, shrinks and enlarges again, and adds noise, as much as the generator says.

  Args:
    frames: uint8 [N,S,S,3] of one clip; all are degraded alike.
    rng: draws how much.
  """
  side = frames.shape[1]
  blur = rng.uniform(0, _BLUR) * side / SHARD.size
  small = round(side * rng.uniform(_REDUCTION, 1))
  noise = rng.uniform(0, _NOISE)
  if rng.random() < 0.5:
    blurred = ndimage.gaussian_filter(frames, (0, blur, blur, 0))
  else:
    blurred = np.stack([_resampled(frame, small) for frame in frames])
  grain = noise * rng.standard_normal(frames.shape, np.float32)
  return (blurred + grain + 0.5).clip(0, 255).astype(np.uint8)


def _resampled(frame: np.ndarray, side: int) -> np.ndarray:
  bilinear = Image.Resampling.BILINEAR
  small = Image.fromarray(frame).resize((side, side), bilinear)
  return np.asarray(small.resize(frame.shape[1::-1], bilinear))


def _jobs(split: str, people: int) -> list[Job]:
  sizes = {'train': 1, split: people}
  seconds = SECONDS if split == 'val' else _LEARNED_SECONDS
  settings = {'clips': _CLIPS, 'seconds': seconds, 'seed': JUDGES_SEED}
  return jobs(dataclasses.replace(SHARD, **sizes, **settings), split)


def _faces(clips: list[Job], read, workers: int) -> Faces:
  """Renders the clips in processes; the result does not depend on how many."""
  with concurrent.futures.ProcessPoolExecutor(
    workers, multiprocessing.get_context('spawn')
  ) as pool:
    parts = list(pool.map(read, clips, range(len(clips)), chunksize=8))
  return Faces(
    **{
      field.name: np.concatenate([getattr(part, field.name) for part in parts])
      for field in dataclasses.fields(Faces)
    }
  )


def _learn(job: Job, number: int) -> Faces:
  rng = np.random.default_rng([JUDGES_SEED, job.identity, job.take])
  config = job.config
  if rng.random() < 0.5:
    config = dataclasses.replace(
      config,
      motion=rng.uniform(*_MOTIONS),
      articulation=rng.uniform(*_ARTICULATIONS),
      zoom=rng.uniform(*_ZOOMS),
    )
  job = dataclasses.replace(job, config=config)
  clip = _render(job, _LEARNED_EVERY)
  flipped = clip.frames[:, :, ::-1]
  box = clip.bbox.mean(0)
  flipped_box = np.array([1 - box[2], box[1], 1 - box[0], box[3]])
  copies = [
    (clip.frames, box),
    (clip.frames, _moved(box, rng)),
    (degrade(clip.frames, rng), _moved(box, rng)),
    (degrade(flipped, rng), _moved(flipped_box, rng)),
  ]
  return _label(job, number, clip, copies)


def _test(job: Job, number: int) -> Faces:
  clip = _render(job, 2)
  return _label(job, number, clip, [(clip.frames, clip.bbox)])


def _render(job: Job, every: int) -> Clip:
  config = job.config
  return make_clip(
    job.identity,
    job.emotion,
    job.level,
    job.sentence(),
    size=config.size,
    take=job.take,
    motion=config.motion,
    articulation=config.articulation,
    zoom=config.zoom,
    max_seconds=config.seconds,
    every=every,
  )


def _moved(box: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """A box as a detector might see it."""
  centre = (box[:2] + box[2:]) / 2
  sides = box[2:] - box[:2]
  centre = centre + sides * rng.uniform(-_SHIFT, _SHIFT, 2)
  half = sides / 2 * rng.uniform(1 - _STRETCH, 1 + _STRETCH, 2)
  return np.concatenate([centre - half, centre + half])


def _label(
  job: Job, number: int, clip: Clip, copies: Iterable[tuple[np.ndarray, np.ndarray]]
) -> Faces:
  crops = np.concatenate(
    [face_features.crop_faces(frames, box) for frames, box in copies]
  )
  level = 0 if job.emotion == 'neutral' else job.level
  unit = SCALE * round(job.config.size * job.config.zoom) / job.config.size
  left, right = (clip.landmarks[:, corner] for corner in _CORNERS)
  measures = np.stack(
    [
      np.full(len(clip.opening), emotions.intensity(job.emotion, level)),
      clip.opening,
      clip.au[:, AU['26']],
      np.linalg.norm(right - left, axis=1) / unit,
    ],
    axis=1,
  )
  n = len(crops)
  return Faces(
    expression=face_features.expression_features(crops).astype(np.float16),
    identity=face_features.identity_features(crops).astype(np.float16),
    measures=np.resize(measures.astype(np.float32), (n, measures.shape[1])),
    emotion=np.full(n, EMOTIONS.index(job.emotion), np.int32),
    level=np.full(n, level, np.int32),
    person=np.full(n, job.identity % 1_000_000, np.int32),
    clip=np.full(n, number, np.int32),
  )
