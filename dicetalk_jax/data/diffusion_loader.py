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
  """Draws one window of one clip with all its conditions. See `diffusion_loader`."""

  part: DatasetPart
  frames: int
  step: int
  mask_size: int
  area: tuple[float, float]
  measured_buckets: bool
  clip_stride: int
  reference: str = 'clip'
  emotion: str = 'same_clip'

  def __post_init__(self):
    for name, known in (('reference', REFERENCE_SOURCES), ('emotion', PRIOR_SOURCES)):
      if (value := getattr(self, name)) not in known:
        raise ConfigError(
          f'{name}={value!r} is not known; choose one of {", ".join(known)}'
        )
    self.part.check_window(self.frames, self.step)
    length = self.part.source.table.num_frames
    self.part.check_feature('latents', length)
    self.part.check_feature('clip_embed', -(-length // self.clip_stride))
    self.part.check_feature('whisper', 2 * length)
    if self.emotion != 'none' and (
      'prior' in self.part.features or not self.part.source[0]['has_prior']
    ):
      self.part.check_feature('prior', np.ones_like(length))

  def __call__(self, clip: int, rng: np.random.Generator) -> dict[str, Any]:
    return self.window(
      clip,
      rng,
      example_sampling.window_rows(
        rng, int(self.part.source.table.num_frames[clip]), self.frames, self.step
      ),
    )

  def window(
    self, clip: int, rng: np.random.Generator, rows: np.ndarray
  ) -> dict[str, Any]:
    """The example of given frames, ascending by `step`."""
    part, record = self.part, self.part.source[clip]
    length = int(record['num_frames'])
    span = slice(rows[0], rows[-1] + 1)
    identity = part.source.table.identity
    other = (
      clip
      if self.reference == 'clip'
      else int(rng.choice(np.flatnonzero(identity == identity[clip])))
    )
    if other == clip:
      seen, reference = (
        record,
        example_sampling.reference_row(rng, length, rows, self.clip_stride),
      )
    else:
      seen = part.source[other]
      reference = int(
        rng.choice(np.arange(0, int(seen['num_frames']), self.clip_stride))
      )

    token = reference // self.clip_stride
    boxes = np.concatenate(
      [record['bbox'][span], seen['bbox'][reference : reference + 1]]
    )
    return self._prior(clip, record, rng) | {
      'latents': part.rows(
        'latents', clip, record, slice(span.start, span.stop, self.step)
      ).astype(np.float32),
      'reference': part.rows('latents', other, seen, slice(reference, reference + 1))[
        0
      ].astype(np.float32),
      'image_token': part.rows(
        'clip_embed', other, seen, slice(token, token + 1)
      ).astype(np.float32),
      'audio': audio.read_windows(
        lambda s: part.rows('whisper', clip, record, s), 2 * length, rows
      ),
      'mask': example_sampling.face_mask(
        boxes, self.mask_size, rng.uniform(*self.area)
      ),
      'emotion_class': np.int32(
        clip_record.emotion_class(
          clip_record.decode_emotion(record), int(record['intensity'])
        )
      ),
      'buckets': self._buckets(record['bbox'][span], record['expression'][span]),
      'drop': np.float32(rng.random(dtype=np.float32)),
    }

  def _prior(
    self, clip: int, record: Mapping[str, Any], rng: np.random.Generator
  ) -> dict[str, np.ndarray]:
    if self.emotion == 'none':
      return {}
    if self.emotion == 'other_clip' and len(others := self._alike(clip)):
      clip = int(rng.choice(others))
      record = self.part.source[clip]
    if 'prior' in self.part.features:
      return dict(
        zip(('mu', 'sigma'), self.part.features['prior'](clip)[0].astype(np.float32))
      )
    return {'mu': record['emo_mu'], 'sigma': record['emo_sigma']}

  def _alike(self, clip: int) -> np.ndarray:
    """Other clips of the same person in the same emotion at the same level; none
    where the emotion is unknown.
    """
    table = self.part.source.table
    if table.emotion[clip] == clip_record.UNKNOWN:
      return np.zeros(0, int)
    alike = np.logical_and.reduce(
      [of == of[clip] for of in (table.identity, table.emotion, table.intensity)]
    )
    return np.setdiff1d(np.flatnonzero(alike), [clip])

  def _buckets(self, boxes: np.ndarray, expression: np.ndarray) -> np.ndarray:
    head, face = (
      self.part.source.motion_medians if self.measured_buckets else (0.0, 0.0)
    )
    fixed_head, fixed_face = example_sampling.FALLBACK_BUCKETS
    return np.array(
      [
        example_sampling.motion_bucket(clip_record.head_motion(boxes), head, fixed_head)
        if len(boxes)
        else fixed_head,
        example_sampling.motion_bucket(
          clip_record.expression_motion(expression), face, fixed_face
        )
        if len(expression)
        else fixed_face,
      ],
      np.float32,
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
  """Windows with all conditions, for training the diffusion model.

  Args:
    parts: data sets, mixed by weight: in the paper emotional and regular clips 1 : 1.
      Their features are 'latents' `[N,h,w,c]` (posterior mean, unscaled), 'clip_embed'
      `[ceil(N/clip_stride),D]`, 'whisper' `[2N,S,D]` and 'prior' `[1,2,256]` (mean and
      standard deviation of the emotion embedder).
    batch: clips per batch of this process.
    frames: F, frames per window.
    step: distance of the frames in the source; 2 is 12.5 per second.
    mask_size: side of the picture in pixels.
    seed: of order and windows.
    area: range of the scale of the face region; `(1.1, 1.1)` for validation.
    measured_buckets: False gives all clips the motion buckets (8, 16) of the published
      inference.
    clip_stride: every how many frames there is a CLIP token.
    reference: where the reference frame comes from: the same 'clip', or any clip of the
      same 'identity', so that it need not show the emotion that is asked for.
    emotion: where the prior comes from: the 'same_clip'; an 'other_clip' of the same
      person, emotion and level if there is one, so that it tells nothing else of the
      clip; 'none' leaves 'mu' and 'sigma' out.
    shard: (index, count) of this process.
    threads: batches read at a time.
    workers: processes that read; 0 = threads of this one.

  Returns:
    Batches of float32 unless noted: 'latents' [B,F,h,w,c] and 'reference' [B,h,w,c], a
    frame outside the window if the clip has one, both unscaled; 'image_token' [B,1,D]
    of the reference; 'audio' [B,F,10,S,D]; 'mu' and 'sigma' [B,256]; 'mask' [B,H,W] in
    {0, 1}; 'emotion_class' int32 [B], -1 where unknown; 'buckets' [B,2] (head,
    expression); 'drop' [B], uniform in [0, 1), decides which conditions are dropped.

  Raises:
    DataError: a clip is shorter than the window, or a feature is missing or does not
      fit its clip.
  """

  def examples(part):
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

  return mixture.read_ahead(
    mixture.process_batches(
      mixture.shuffled_examples(mixture.as_list(parts), examples, seed), batch, shard
    ),
    threads,
    workers,
  )
