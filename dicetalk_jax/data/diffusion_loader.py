"""Batches of windows with all their conditions, for training the diffusion model."""

from collections.abc import Mapping
import dataclasses
from typing import Any

import grain
import numpy as np

from dicetalk_jax.data import clip_record, example_sampling, mixture
from dicetalk_jax.data.mixture import Batch, DatasetPart, DatasetParts
from dicetalk_jax.errors import ConfigError
from dicetalk_jax.media import audio

REFERENCE_SOURCES = ('clip', 'identity')
PRIOR_SOURCES = ('same_clip', 'other_clip', 'none')


@dataclasses.dataclass(frozen=True)
class DiffusionExamples:
  """Draws one window of one clip with all its conditions. See `diffusion_loader`.

  Raises:
    ConfigError: `reference` or `emotion` is not known.
    DataError: the clips are too short, or their features do not fit.
  """

  part: DatasetPart
  frames: int
  step: int
  mask_size: int
  area: tuple[float, float]
  measured_buckets: bool
  clip_stride: int
  reference: str = 'clip'
  emotion: str = 'same_clip'

  def __post_init__(self) -> None:
    _check_known('reference', self.reference, REFERENCE_SOURCES)
    _check_known('emotion', self.emotion, PRIOR_SOURCES)
    part = self.part
    part.check_window(self.frames, self.step)
    length = part.source.table.num_frames
    part.check_feature('latents', length)
    part.check_feature('clip_embed', -(-length // self.clip_stride))
    part.check_feature('whisper', 2 * length)
    in_records = 'prior' not in part.features and part.source[0]['has_prior']
    if self.emotion != 'none' and not in_records:
      part.check_feature('prior', np.ones_like(length))

  def __call__(self, clip: int, rng: np.random.Generator) -> dict[str, Any]:
    length = int(self.part.source.table.num_frames[clip])
    rows = example_sampling.window_rows(rng, length, self.frames, self.step)
    return self.window(clip, rng, rows)

  def window(
    self, clip: int, rng: np.random.Generator, rows: np.ndarray
  ) -> dict[str, Any]:
    """The example of given frames, ascending by `step`."""
    part = self.part
    record = part.source[clip]
    length = int(record['num_frames'])
    span = slice(rows[0], rows[-1] + 1)

    # 1. The reference frame, outside the window or from another clip.
    other = self._reference_clip(clip, rng)
    if other == clip:
      other_record = record
      row = example_sampling.reference_row(rng, length, rows, self.clip_stride)
    else:
      other_record = part.source[other]
      other_length = int(other_record['num_frames'])
      row = int(rng.choice(np.arange(0, other_length, self.clip_stride)))
    token = row // self.clip_stride
    reference = part.rows('latents', other, other_record, slice(row, row + 1))[0]
    image_token = part.rows('clip_embed', other, other_record, slice(token, token + 1))

    # 2. The emotion prior.
    example = self._prior(clip, record, rng)

    # 3. The window: latents, audio, and one mask of the face in all its frames.
    latents = part.rows(
      'latents', clip, record, slice(span.start, span.stop, self.step)
    )
    states = audio.read_windows(
      lambda positions: part.rows('whisper', clip, record, positions), 2 * length, rows
    )
    boxes = np.concatenate([record['bbox'][span], other_record['bbox'][row : row + 1]])
    mask = example_sampling.face_mask(boxes, self.mask_size, rng.uniform(*self.area))

    # 4. Labels, amounts of motion, and which conditions are dropped.
    emotion = clip_record.decode_emotion(record)
    level = int(record['intensity'])
    return example | {
      'latents': latents.astype(np.float32),
      'reference': reference.astype(np.float32),
      'image_token': image_token.astype(np.float32),
      'audio': states,
      'mask': mask,
      'emotion_class': np.int32(clip_record.emotion_class(emotion, level)),
      'buckets': self._buckets(record['bbox'][span], record['expression'][span]),
      'drop': np.float32(rng.random(dtype=np.float32)),
    }

  def _reference_clip(self, clip: int, rng: np.random.Generator) -> int:
    if self.reference == 'clip':
      return clip
    identity = self.part.source.table.identity
    return int(rng.choice(np.flatnonzero(identity == identity[clip])))

  def _prior(
    self, clip: int, record: Mapping[str, Any], rng: np.random.Generator
  ) -> dict[str, np.ndarray]:
    """Mean and standard deviation of the emotion, or nothing."""
    if self.emotion == 'none':
      return {}
    if self.emotion == 'other_clip':
      others = self._clips_alike(clip)
      if len(others):
        clip = int(rng.choice(others))
        record = self.part.source[clip]
    if 'prior' not in self.part.features:
      return {'mu': record['emo_mu'], 'sigma': record['emo_sigma']}
    mu, sigma = self.part.features['prior'](clip)[0].astype(np.float32)
    return {'mu': mu, 'sigma': sigma}

  def _clips_alike(self, clip: int) -> np.ndarray:
    """Other clips of the same identity in the same emotion at the same level.

    There are none where the emotion is unknown.
    """
    table = self.part.source.table
    if table.emotion[clip] == clip_record.UNKNOWN:
      return np.zeros(0, int)
    alike = np.ones(len(table), bool)
    for column in (table.identity, table.emotion, table.intensity):
      alike &= column == column[clip]
    alike[clip] = False
    return np.flatnonzero(alike)

  def _buckets(self, boxes: np.ndarray, expression: np.ndarray) -> np.ndarray:
    """Motion buckets of head and expression, `[2]`."""
    head, face = example_sampling.FALLBACK_BUCKETS
    if self.measured_buckets:
      head_median, face_median = self.part.source.motion_medians
      if len(boxes):
        motion = clip_record.head_motion(boxes)
        head = example_sampling.motion_bucket(motion, head_median, head)
      if len(expression):
        motion = clip_record.expression_motion(expression)
        face = example_sampling.motion_bucket(motion, face_median, face)
    return np.array([head, face], np.float32)


def _check_known(name: str, value: str, known: tuple[str, ...]) -> None:
  if value not in known:
    raise ConfigError(
      f'{name}={value!r} is not known; choose one of {", ".join(known)}'
    )


def diffusion_loader(
  parts: DatasetParts,
  *,
  batch: int,
  frames: int = 25,
  step: int = 2,
  mask_size: int = 512,
  seed: int,
  area: tuple[float, float] = (1.0, 1.3),
  measured_buckets: bool = True,
  clip_stride: int = 1,
  reference: str = 'clip',
  emotion: str = 'same_clip',
  shard: tuple[int, int] = (0, 1),
  threads: int = 4,
  workers: int = 0,
) -> grain.IterDataset[Batch]:
  """Loads windows with all conditions, for training the diffusion model.

  Args:
    parts: data sets, mixed by weight: in the paper emotional and regular clips 1 : 1.
      Their features are 'latents' `[N,h,w,c]` (posterior mean, unscaled), 'clip_embed'
      `[ceil(N/clip_stride),D]`, 'whisper' `[2N,S,D]` and 'prior' `[1,2,256]` (mean and
      standard deviation of the emotion embedder).
    batch: clips per batch of this process.
    frames: F, frames per window.
    step: from one frame to the next in the source; 2 gives 12.5 per second.
    mask_size: side of the image in pixels.
    seed: of order and windows.
    area: range of the scale of the face region; `(1.1, 1.1)` for validation.
    measured_buckets: False gives all clips the motion buckets (8, 16) of the reference
      implementation's inference.
    clip_stride: frames per CLIP token.
    reference: where the reference frame comes from: the same 'clip', or any clip of the
      same 'identity', which may show another emotion than the window.
    emotion: where the prior comes from: the 'same_clip'; an 'other_clip' of the same
      identity, emotion and level if there is one, so that it reveals nothing else of
      the clip; 'none' leaves 'mu' and 'sigma' out.
    shard: (index, count) of this process.
    threads: batches read at a time.
    workers: processes that read; 0 = threads of this one.

  Returns:
    Batches of float32 unless noted: 'latents' [B,F,h,w,c] and 'reference' [B,h,w,c], a
    frame outside the window if the clip has one, both unscaled; 'image_token' [B,1,D]
    of the reference; 'audio' [B,F,10,S,D]; 'mu' and 'sigma' [B,256]; 'mask' [B,H,W] in
    {0, 1}; 'emotion_class' int32 [B], see `clip_record.emotion_class`; 'buckets' [B,2]
    (head, expression); 'drop' [B], uniform in [0, 1), decides which conditions are
    dropped.

  Raises:
    DataError: a clip is shorter than the window, or a feature is missing or does not
      fit its clip.
  """

  def make_example(part: DatasetPart) -> DiffusionExamples:
    return DiffusionExamples(
      part,
      frames,
      step,
      mask_size,
      area,
      measured_buckets,
      clip_stride,
      reference,
      emotion,
    )

  return mixture.example_batches(
    mixture.as_list(parts),
    make_example,
    batch=batch,
    seed=seed,
    shard=shard,
    threads=threads,
    workers=workers,
  )
