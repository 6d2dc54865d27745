"""Grain pipelines: from prepared clips to endless batches of NumPy arrays.

Every random choice derives from the seed and the position in the stream, never from a thread or a process.
So an iterator restored with `set_state` goes on exactly where `get_state` was called, the number of workers
changes nothing, and the stream of the whole job, dealt out to processes by `shard`, does not depend on how
many there are. The number of workers and processes must stay the same within a run, since it is part of the state.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

import grain
import numpy as np

from data_pipelines import record as clip_record
from data_pipelines import sampling
from data_pipelines.features import Feature
from data_pipelines.source import ClipSource
from dicetalk_jax.errors import ConfigError, DataError

Batch = dict[str, np.ndarray]
REFERENCES = ('clip', 'identity')


@dataclasses.dataclass(frozen=True)
class Part:
  """One data set of a mixture: its clips, their stored features by name, and its share of the mixture.

  Features are looked up here first and in the record second, so a corpus may carry them either way.
  """
  source: ClipSource
  features: Mapping[str, Feature] = dataclasses.field(default_factory=dict)
  weight: float = 1.

  def rows(self, name: str, clip: int, record: Mapping[str, Any], rows: slice) -> np.ndarray:
    """Rows of one feature of one clip."""
    if name in self.features:
      return self.features[name](clip, rows)
    return record[name][rows]

  def check_feature(self, name: str, lengths: np.ndarray, optional: bool = False):
    """Refuses a feature that is missing or does not have `lengths[clip]` rows (or none, where `optional`).

    Raises:
      DataError
    """
    if name not in self.features:
      if len(self.source[0].get(name, ())) == 0:
        raise DataError(f'{self.source} has no {name}; compute this feature first or put it into the records')
      return
    feature = self.features[name]
    for clip, want in enumerate(lengths):
      if feature.length(clip) not in ((want, 0) if optional else (want,)):
        raise DataError(
            f'{name} of clip {self.source.table.clip_id[clip]} has {feature.length(clip)} rows, but its frames '
            f'ask for {want}; delete {feature.folder} to compute the feature anew')

  def check_window(self, frames: int, step: int):
    """Refuses clips that are shorter than a window.

    Raises:
      DataError
    """
    table, span = self.source.table, sampling.window_span(frames, step)
    shortest = int(np.argmin(table.num_frames))
    if table.num_frames[shortest] < span:
      raise DataError(
          f'clip {table.clip_id[shortest]} has {table.num_frames[shortest]} frames, but a window of {frames} frames '
          f'at step {step} needs {span}; use a shorter window or prepare longer clips')


def _dealt(source: ClipSource, example: Callable, seed: int, shard: tuple[int, int]) -> grain.MapDataset:
  """Endless shuffled examples of one source. Drawing comes before dealing, so processes never draw alike."""
  index, count = shard
  if not 0 <= index < count:
    raise ConfigError(f'shard {index} of {count} does not exist; shards are 0 to {count - 1}')
  if len(source) < count:
    raise DataError(f'{source} has {len(source)} clips, fewer than the {count} processes that share them')
  return grain.MapDataset.range(len(source)).seed(seed).shuffle().random_map(example)[index::count].repeat()


def _batches(dataset: grain.MapDataset, threads: int, workers: int) -> grain.IterDataset:
  """Whole batches are read ahead, one per thread."""
  dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
  if workers:
    dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
  return dataset


def frames_loader(
    source: ClipSource, *, batch: int, frames: int, seed: int, step: int = 1, shard: tuple[int, int] = (0, 1),
    threads: int = 4, workers: int = 0) -> grain.IterDataset[Batch]:
  """Pixels, for training the autoencoder.

  Args:
    source: clips with pixels.
    batch: clips per batch of this process.
    frames: F, consecutive frames per example.
    seed: of order and windows.
    step: distance of the frames.
    shard: (index, count) of this process.
    threads: batches read at a time.
    workers: processes that read; 0 = threads of this one.

  Returns:
    Batches `{'video': float32 [B,F,H,W,3] in [-1, 1]}`.

  Raises:
    DataError: a clip is shorter than the window, or there are no pixels.
  """
  Part(source).check_window(frames, step)
  if not source[0].get('frames'):
    raise DataError(f'{source} has no pixels; prepare the data set with content=full')

  def example(clip: int, rng: np.random.Generator) -> Batch:
    rows = sampling.window_rows(rng, int(source.table.num_frames[clip]), frames, step)
    return {'video': clip_record.decode_frames(source[clip], rows).astype(np.float32) / 127.5 - 1}

  return _batches(_dealt(source, example, seed, shard).batch(batch, drop_remainder=True), threads, workers)


@dataclasses.dataclass(frozen=True)
class DiffusionExamples:
  """Draws one window of one clip with all its conditions. See `diffusion_loader`."""
  part: Part
  frames: int
  step: int
  mask_size: int
  area: tuple[float, float]
  measured_buckets: bool
  clip_stride: int
  reference: str = 'clip'

  def __post_init__(self):
    if self.reference not in REFERENCES:
      raise ConfigError(f'reference={self.reference!r} is not known; choose one of {", ".join(REFERENCES)}')
    self.part.check_window(self.frames, self.step)
    length = self.part.source.table.num_frames
    self.part.check_feature('latents', length)
    self.part.check_feature('clip_embed', -(-length // self.clip_stride))
    self.part.check_feature('whisper', 2 * length)
    if 'prior' in self.part.features or not self.part.source[0]['has_prior']:
      self.part.check_feature('prior', np.ones_like(length))

  def __call__(self, clip: int, rng: np.random.Generator) -> dict[str, Any]:
    return self.window(clip, rng, sampling.window_rows(
        rng, int(self.part.source.table.num_frames[clip]), self.frames, self.step))

  def window(self, clip: int, rng: np.random.Generator, rows: np.ndarray) -> dict[str, Any]:
    """The example of given frames, ascending by `step`."""
    part, record = self.part, self.part.source[clip]
    length = int(record['num_frames'])
    span = slice(rows[0], rows[-1] + 1)
    if self.reference == 'clip':
      other, seen = clip, record
      reference = sampling.reference_row(rng, length, rows, self.clip_stride)
    else:
      identity = part.source.table.identity
      other = int(rng.choice(np.flatnonzero(identity == identity[clip])))
      seen = part.source[other]
      reference = int(rng.choice(np.arange(0, int(seen['num_frames']), self.clip_stride)))

    token = reference // self.clip_stride
    boxes = np.concatenate([record['bbox'][span], seen['bbox'][reference:reference + 1]])
    mu, sigma = self._prior(clip, record)
    return {
        'latents': part.rows('latents', clip, record, slice(span.start, span.stop, self.step)).astype(np.float32),
        'reference': part.rows('latents', other, seen, slice(reference, reference + 1))[0].astype(np.float32),
        'image_token': part.rows('clip_embed', other, seen, slice(token, token + 1)).astype(np.float32),
        'audio': sampling.audio_windows(lambda s: part.rows('whisper', clip, record, s), 2 * length, rows),
        'mu': mu,
        'sigma': sigma,
        'mask': sampling.face_mask(boxes, self.mask_size, rng.uniform(*self.area)),
        'emotion_class': np.int32(clip_record.emotion_class(
            clip_record.decode_emotion(record), int(record['intensity']))),
        'buckets': self._buckets(record['bbox'][span], record['expression'][span]),
        'drop': np.float32(rng.random(dtype=np.float32)),
    }

  def _prior(self, clip: int, record: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    if 'prior' in self.part.features:
      mu, sigma = self.part.features['prior'](clip)[0].astype(np.float32)
      return mu, sigma
    return record['emo_mu'], record['emo_sigma']

  def _buckets(self, boxes: np.ndarray, expression: np.ndarray) -> np.ndarray:
    head, face = self.part.source.motion_medians if self.measured_buckets else (0., 0.)
    fixed_head, fixed_face = sampling.FALLBACK_BUCKETS
    return np.array([
        sampling.motion_bucket(clip_record.head_motion(boxes), head, fixed_head) if len(boxes) else fixed_head,
        sampling.motion_bucket(clip_record.expression_motion(expression), face, fixed_face)
        if len(expression) else fixed_face], np.float32)


def diffusion_loader(
    parts: Part | Sequence[Part], *, batch: int, frames: int = 25, step: int = 2, mask_size: int = 512, seed: int,
    area: tuple[float, float] = (1., 1.3), measured_buckets: bool = True, clip_stride: int = 1,
    reference: str = 'clip', shard: tuple[int, int] = (0, 1), threads: int = 4,
    workers: int = 0) -> grain.IterDataset[Batch]:
  """Windows with all conditions, for training the diffusion model.

  Args:
    parts: data sets, mixed by weight: in the paper emotional and regular clips 1 : 1. Their features are
      'latents' `[N,h,w,c]` (posterior mean, unscaled), 'clip_embed' `[ceil(N/clip_stride),D]`,
      'whisper' `[2N,S,D]` and 'prior' `[1,2,256]` (mean and standard deviation of the emotion embedder).
    batch: clips per batch of this process.
    frames: F, frames per window.
    step: distance of the frames in the source; 2 is 12.5 per second.
    mask_size: side of the picture in pixels.
    seed: of order and windows.
    area: range of the scale of the face region; `(1.1, 1.1)` for validation.
    measured_buckets: False gives all clips the motion buckets (8, 16) of the published inference.
    clip_stride: every how many frames there is a CLIP token.
    reference: where the reference frame comes from: the same 'clip', or any clip of the same 'identity', so that it
      does not show the emotion that is asked for.
    shard: (index, count) of this process.
    threads: batches read at a time.
    workers: processes that read; 0 = threads of this one.

  Returns:
    Batches of float32 unless noted: 'latents' [B,F,h,w,c] and 'reference' [B,h,w,c], a frame outside the window
    if the clip has one, both unscaled; 'image_token' [B,1,D] of the reference; 'audio' [B,F,10,S,D]; 'mu' and
    'sigma' [B,256]; 'mask' [B,H,W] in {0, 1}; 'emotion_class' int32 [B], -1 where unknown; 'buckets' [B,2]
    (head, expression); 'drop' [B], uniform in [0, 1), decides which conditions are dropped.

  Raises:
    DataError: a clip is shorter than the window, or a feature is missing or does not fit its clip.
  """
  parts = [parts] if isinstance(parts, Part) else list(parts)
  streams = [
      _dealt(part.source, DiffusionExamples(part, frames, step, mask_size, area, measured_buckets, clip_stride,
                                            reference),
             seed + k, shard)
      for k, part in enumerate(parts)]
  mixed = grain.MapDataset.mix(streams, weights=[part.weight for part in parts]) if len(parts) > 1 else streams[0]
  return _batches(mixed.batch(batch, drop_remainder=True), threads, workers)


class EmbedderGroups:
  """Draws one global batch of groups, and reads the share of this process. See `embedder_loader`."""

  def __init__(self, emotional: Part, regular: Part | None, *, identities: int, emotions: int, clips: int,
               videos: int, min_len: int, max_len: int, shard: tuple[int, int]):
    self.parts = [emotional] + ([regular] if regular else [])
    self.identities, self.emotions, self.clips, self.videos = identities, emotions, clips, videos
    self.min_len, self.max_len = min_len, max_len
    for part in self.parts:
      part.check_feature('whisper', 2 * part.source.table.num_frames, optional=True)

    table = emotional.source.table
    labelled = {
        person: {e: np.flatnonzero(own & (table.emotion == e))
                 for e in np.unique(table.emotion[own]) if e != clip_record.UNKNOWN}
        for person in np.unique(table.identity) for own in [table.identity == person]}
    self.people = [groups for groups in labelled.values() if len(groups) >= emotions]
    if len(self.people) < identities:
      raise DataError(
          f'a batch asks for {identities} identities with {emotions} emotions each, but {emotional.source} has only '
          f'{len(self.people)}; ask for fewer identities or emotions')
    names = regular.source.table.video_id if regular else np.zeros(0, str)
    self.recordings = [np.flatnonzero(names == video) for video in np.unique(names)]
    if len(self.recordings) < videos:
      raise DataError(f'a batch asks for {videos} regular videos, but there are {len(self.recordings)}; ask for fewer')

    total = (identities * emotions + videos) * clips
    index, count = shard
    if total % count:
      raise ConfigError(f'a batch of {total} windows does not divide among {count} processes; change the group sizes')
    self.mine = slice(index * total // count, (index + 1) * total // count)
    # One numbering over all parts: equal numbers mean the same person or recording.
    self.codes = {
        name: np.split(codes, np.cumsum([len(part.source) for part in self.parts])[:-1])
        for name in ('identity', 'video_id')
        for codes in [np.unique(np.concatenate([getattr(p.source.table, name) for p in self.parts]),
                                return_inverse=True)[1].astype(np.int32)]}

  def plan(self, rng: np.random.Generator) -> list[tuple[int, int, int, int]]:
    """The global batch: (part, clip, first frame, number of frames) of every window, group after group."""
    drawn = []
    for person in rng.choice(len(self.people), self.identities, replace=False):
      groups = list(self.people[person].values())
      for emotion in rng.choice(len(groups), self.emotions, replace=False):
        drawn += [(0, *pick) for pick in sampling.draw_group(rng, groups[emotion], self.clips)]
    for video in rng.choice(len(self.recordings), self.videos, replace=False) if self.videos else ():
      drawn += [(1, *pick) for pick in sampling.draw_group(rng, self.recordings[video], self.clips)]
    windows = []
    for part, clip, place in drawn:
      have = int(self.parts[part].source.table.num_frames[clip])
      length = min(int(rng.integers(self.min_len, self.max_len + 1)), have)
      windows.append((part, clip, int(place * (have - length + 1)), length))
    return windows

  def __call__(self, _: int, rng: np.random.Generator) -> Batch:
    rows = [self._read(*window) for window in self.plan(rng)[self.mine]]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

  def _read(self, part: int, clip: int, start: int, length: int) -> dict[str, Any]:
    data = self.parts[part]
    record = data.source[clip]
    expression = record['expression'][start:start + length]
    whisper = data.rows('whisper', clip, record, slice(2 * start, 2 * (start + length)))
    emotion = clip_record.decode_emotion(record)
    return {
        'expr': _padded(expression, length, self.max_len),
        'whisper': _padded(whisper, 2 * length, 2 * self.max_len),
        'frame_mask': np.arange(self.max_len) < length,
        'has_video': np.bool_(len(expression)),
        'has_audio': np.bool_(len(whisper)),
        'dataset': np.int32(record['dataset']),
        'identity': self.codes['identity'][part][clip],
        'emotion': np.int32(clip_record.EMOTIONS.index(emotion) if emotion != clip_record.UNKNOWN else -1),
        'level': np.int32(record['intensity']),
        'video': self.codes['video_id'][part][clip],
    }


def _padded(rows: np.ndarray, length: int, total: int) -> np.ndarray:
  """`rows` (all of `length`, or none where the clip lacks them), then zeros up to `total`."""
  out = np.zeros((total, *rows.shape[1:]), rows.dtype)
  out[:length] = rows if len(rows) else 0
  return out


def embedder_loader(
    emotional: Part, regular: Part | None = None, *, identities: int = 8, emotions: int = 4, clips: int = 4,
    videos: int = 0, min_len: int = 32, max_len: int = 256, seed: int, shard: tuple[int, int] = (0, 1),
    threads: int = 4, workers: int = 0) -> grain.IterDataset[Batch]:
  """Groups of windows for the contrastive loss of the emotion embedder, so that each has its positives.

  A batch of the whole job holds `identities * emotions * clips` windows of the emotional data set and
  `videos * clips` of the regular one, group after group; processes read equal consecutive shares of it.

  Args:
    emotional: labelled clips, with the feature 'whisper' `[2N,S,D]`.
    regular: clips without labels, grouped by recording.
    identities: people per batch.
    emotions: emotions of each, any level.
    clips: windows of each group; groups with fewer clips give several windows of one clip.
    videos: recordings of the regular data set per batch.
    min_len, max_len: window length in frames, drawn uniformly; shorter clips are used whole.
    seed: of everything drawn.
    shard: (index, count) of this process.
    threads: batches read at a time.
    workers: processes that read; 0 = threads of this one.

  Returns:
    Batches with N = `max_len`, zero beyond a window's length: 'expr' float32 [B,N,D], 'whisper' [B,2N,S,D] as
    stored, 'frame_mask' bool [B,N], 'has_video' and 'has_audio' bool [B], and int32 [B]: 'dataset' (index in
    `record.DATASETS`), 'identity', 'video' (equal numbers = equal), 'emotion' (index in `record.EMOTIONS`, -1
    unlabelled), 'level' (0 unknown).

  Raises:
    DataError: there are fewer groups than a batch asks for, or Whisper states are missing.
    ConfigError: the batch does not divide among the processes.
  """
  groups = EmbedderGroups(emotional, regular, identities=identities, emotions=emotions, clips=clips, videos=videos,
                          min_len=min_len, max_len=max_len, shard=shard)
  return _batches(grain.MapDataset.range(1).seed(seed).random_map(groups).repeat(), threads, workers)
