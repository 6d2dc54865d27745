"""Grain pipelines: from prepared clips to endless batches of NumPy arrays.

Every random choice derives from the seed and the position in the stream, never from a
thread or a process. So an iterator restored with `set_state` goes on exactly where
`get_state` was called, the number of workers changes nothing, and the batches of the
whole job, dealt out to processes by `shard`, do not depend on how many there are, nor
does the state. The number of workers must stay the same within a run, since it is part
of the state.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

from absl import flags
import grain
import numpy as np

from dicetalk_jax.data import clip_record, example_sampling
from dicetalk_jax.data.clip_source import ClipSource
from dicetalk_jax.data.feature_store import Feature
from dicetalk_jax.data.process_shard import ProcessShard
from dicetalk_jax.errors import ConfigError, DataError

Batch = dict[str, np.ndarray]
REFERENCES = ('clip', 'identity')
EMOTIONS = ('same_clip', 'other_clip', 'none')


@dataclasses.dataclass(frozen=True)
class Part:
  """One data set of a mixture: its clips, their stored features by name, and its share
  of the mixture.

  Features are looked up here first and in the record second, so a corpus may carry them
  either way.
  """

  source: ClipSource
  features: Mapping[str, Feature] = dataclasses.field(default_factory=dict)
  weight: float = 1.0

  @property
  def labelled(self) -> bool:
    """Whether any clip has an emotion label: an emotional data set, not a regular
    one.
    """
    return bool((self.source.table.emotion != clip_record.UNKNOWN).any())

  def rows(
    self, name: str, clip: int, record: Mapping[str, Any], rows: slice
  ) -> np.ndarray:
    """Rows of one feature of one clip."""
    if name in self.features:
      return self.features[name](clip, rows)
    return record[name][rows]

  def check_feature(self, name: str, lengths: np.ndarray, optional: bool = False):
    """Refuses a feature that is missing or does not have `lengths[clip]` rows (or none,
    where `optional`).

    Raises:
      DataError
    """
    if name not in self.features:
      have = len(self.source[0].get(name, ()))
      if not have:
        raise DataError(
          f'{self.source} has no {name}; compute this feature first or put it into the '
          'records'
        )
      if have != lengths[0]:  # one clip tells: reading all records would take too long
        raise DataError(
          f'{name} in the records of {self.source} has {have} rows in the first clip, '
          f'but its frames ask for {lengths[0]}; use the clip_stride that it was made '
          'with'
        )
      return
    feature = self.features[name]
    for clip, want in enumerate(lengths):
      if feature.length(clip) not in ((want, 0) if optional else (want,)):
        raise DataError(
          f'{name} of clip {self.source.table.clip_id[clip]} has '
          f'{feature.length(clip)} rows, but its frames ask for {want}; delete '
          f'{feature.folder} to compute the feature anew'
        )

  def check_window(self, frames: int, step: int):
    """Refuses clips that are shorter than a window.

    Raises:
      DataError
    """
    table, span = self.source.table, example_sampling.window_span(frames, step)
    shortest = int(np.argmin(table.num_frames))
    if table.num_frames[shortest] < span:
      raise DataError(
        f'clip {table.clip_id[shortest]} has {table.num_frames[shortest]} frames, but '
        f'a window of {frames} frames at step {step} needs {span}; use a shorter '
        'window or prepare longer clips'
      )


Parts = Part | Sequence[Part]


def _sequence(parts: Parts) -> list[Part]:
  return [parts] if isinstance(parts, Part) else list(parts)


def _examples(
  parts: Sequence[Part], example: Callable[[Part], Callable], seed: int
) -> grain.MapDataset:
  """Endless shuffled examples for the whole job, mixed by weight.

  What is drawn for one depends on the seed and on its place in the stream alone, so on
  seed, step and row.
  """
  streams = [
    grain.MapDataset.range(len(part.source))
    .seed(seed + k)
    .shuffle()
    .random_map(example(part))
    .repeat()
    for k, part in enumerate(parts)
  ]
  return (
    grain.MapDataset.mix(streams, weights=[part.weight for part in parts])
    if len(parts) > 1
    else streams[0]
  )


def _dealt(
  stream: grain.MapDataset, batch: int, shard: tuple[int, int]
) -> grain.MapDataset:
  """Batches of one process.

  Drawing comes before dealing, so processes never draw alike.
  """
  return ProcessShard(stream, batch, shard).batch(batch, drop_remainder=True)


def _batches(
  dataset: grain.MapDataset, threads: int, workers: int
) -> grain.IterDataset:
  """Whole batches are read ahead, one per thread."""
  dataset = dataset.to_iter_dataset(
    grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
  )
  if workers:
    if (
      not flags.FLAGS.is_parsed()
    ):  # programs without absl flags: Grain's workers read them
      flags.FLAGS.mark_as_parsed()
    dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
  return dataset


def frames_loader(
  parts: Parts,
  *,
  batch: int,
  frames: int,
  seed: int,
  step: int = 1,
  shard: tuple[int, int] = (0, 1),
  threads: int = 4,
  workers: int = 0,
) -> grain.IterDataset[Batch]:
  """Pixels, for training the autoencoder.

  Args:
    parts: data sets with pixels, mixed by weight.
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
  parts = _sequence(parts)
  for part in parts:
    part.check_window(frames, step)
    if not part.source[0].get('frames'):
      raise DataError(
        f'{part.source} has no pixels; prepare the data set with content=full'
      )

  def examples(part: Part) -> Callable[[int, np.random.Generator], Batch]:
    def example(clip: int, rng: np.random.Generator) -> Batch:
      rows = example_sampling.window_rows(
        rng, int(part.source.table.num_frames[clip]), frames, step
      )
      return {
        'video': clip_record.decode_frames(part.source[clip], rows).astype(np.float32)
        / 127.5
        - 1
      }

    return example

  return _batches(
    _dealt(_examples(parts, examples, seed), batch, shard), threads, workers
  )


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
  emotion: str = 'same_clip'

  def __post_init__(self):
    for name, known in (('reference', REFERENCES), ('emotion', EMOTIONS)):
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
      'audio': example_sampling.audio_windows(
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
  parts: Parts,
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

  return _batches(
    _dealt(_examples(_sequence(parts), examples, seed), batch, shard), threads, workers
  )


class EmbedderGroups:
  """Draws one global batch of groups, and reads the share of this process.

  See `embedder_loader`.
  """

  def __init__(
    self,
    parts: Sequence[Part],
    *,
    identities: int,
    emotions: int,
    clips: int,
    videos: int,
    min_len: int,
    max_len: int,
    shard: tuple[int, int],
    visual: str = 'expression',
    visual_shape: tuple[int, ...] | None = None,
  ):
    self.parts, self.visual, self.visual_shape = list(parts), visual, visual_shape
    self.identities, self.emotions, self.clips, self.videos = (
      identities,
      emotions,
      clips,
      videos,
    )
    self.min_len, self.max_len = min_len, max_len
    self.people: list[
      tuple[int, list[np.ndarray]]
    ] = []  # part, and the clips of each emotion of one person
    self.recordings: list[
      tuple[int, np.ndarray]
    ] = []  # part, and the clips of one regular recording
    for k, part in enumerate(self.parts):
      table = part.source.table
      part.check_feature('whisper', 2 * table.num_frames, optional=True)
      if visual != 'expression':
        part.check_feature(visual, table.num_frames, optional=True)
      if part.labelled:
        labelled = np.flatnonzero(table.emotion != clip_record.UNKNOWN)
        for own in (labelled[person] for person in _grouped(table.identity[labelled])):
          groups = [own[group] for group in _grouped(table.emotion[own])]
          self.people += [(k, groups)] * (len(groups) >= emotions)
      else:
        self.recordings += [(k, recording) for recording in _grouped(table.video_id)]
    if len(self.people) < identities:
      raise DataError(
        f'a batch asks for {identities} identities with {emotions} emotions each, but '
        f'{self._named(labelled=True)} has only {len(self.people)}; ask for fewer '
        'identities or emotions'
      )
    if len(self.recordings) < videos:
      raise DataError(
        f'a batch asks for {videos} regular videos, but there are '
        f'{len(self.recordings)} in {self._named(labelled=False)}; ask for fewer'
      )
    self.person_odds, self.recording_odds = (
      self._odds([k for k, _ in pool]) for pool in (self.people, self.recordings)
    )

    total = (identities * emotions + videos) * clips
    index, count = shard
    if total % count:
      raise ConfigError(
        f'a batch of {total} windows does not divide among {count} processes; change '
        'the group sizes'
      )
    self.mine = slice(index * total // count, (index + 1) * total // count)
    # One numbering over all parts: equal numbers mean the same person or recording.
    self.codes = {
      name: np.split(codes, np.cumsum([len(part.source) for part in self.parts])[:-1])
      for name in ('identity', 'video_id')
      for codes in [
        np.unique(
          np.concatenate([getattr(p.source.table, name) for p in self.parts]),
          return_inverse=True,
        )[1].astype(np.int32)
      ]
    }

  def _named(self, labelled: bool) -> str:
    return ', '.join(
      str(part.source) for part in self.parts if part.labelled == labelled
    ) or (f'no data set {"with" if labelled else "without"} emotion labels')

  def _odds(self, owners: Sequence[int]) -> np.ndarray | None:
    """Probability of each group, by the weight of its part and not by the part's
    size; None: all alike.
    """
    sizes = np.bincount(owners, minlength=len(self.parts))
    if np.count_nonzero(sizes) < 2:
      return None
    odds = np.array([self.parts[k].weight / sizes[k] for k in owners])
    return odds / odds.sum()

  def plan(self, rng: np.random.Generator) -> list[tuple[int, int, int, int]]:
    """The global batch: (part, clip, first frame, number of frames) of every window,
    group after group.
    """
    drawn = []
    for person in rng.choice(
      len(self.people), self.identities, replace=False, p=self.person_odds
    ):
      part, groups = self.people[person]
      for emotion in rng.choice(len(groups), self.emotions, replace=False):
        drawn += [
          (part, *pick)
          for pick in example_sampling.draw_group(rng, groups[emotion], self.clips)
        ]
    for video in (
      rng.choice(
        len(self.recordings), self.videos, replace=False, p=self.recording_odds
      )
      if self.videos
      else ()
    ):
      part, recording = self.recordings[video]
      drawn += [
        (part, *pick)
        for pick in example_sampling.draw_group(rng, recording, self.clips)
      ]
    windows = []
    for part, clip, *where in drawn:
      have = int(self.parts[part].source.table.num_frames[clip])
      length = int(rng.integers(self.min_len, self.max_len + 1))
      windows.append(
        (part, clip, *example_sampling.group_window(have, length, self.min_len, *where))
      )
    return windows

  def __call__(self, _: int, rng: np.random.Generator) -> Batch:
    rows = [self._read(*window) for window in self.plan(rng)[self.mine]]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

  def _read(self, part: int, clip: int, start: int, length: int) -> dict[str, Any]:
    data = self.parts[part]
    record = data.source[clip]
    seen = data.rows(self.visual, clip, record, slice(start, start + length))
    if self.visual_shape is not None:
      seen = example_sampling.visual_rows(seen, self.visual_shape)
    whisper = data.rows('whisper', clip, record, slice(2 * start, 2 * (start + length)))
    emotion = clip_record.decode_emotion(record)
    return {
      'expr': _padded(seen, length, self.max_len),
      'whisper': _padded(whisper, 2 * length, 2 * self.max_len),
      'frame_mask': np.arange(self.max_len) < length,
      'has_video': np.bool_(len(seen)),
      'has_audio': np.bool_(len(whisper)),
      'dataset': np.int32(record['dataset']),
      'identity': self.codes['identity'][part][clip],
      'emotion': np.int32(
        clip_record.EMOTIONS.index(emotion) if emotion != clip_record.UNKNOWN else -1
      ),
      'level': np.int32(record['intensity']),
      'video': self.codes['video_id'][part][clip],
    }


def _grouped(keys: np.ndarray) -> list[np.ndarray]:
  """Where equal keys are, group after group."""
  order = np.argsort(keys, kind='stable')
  return np.split(order, np.flatnonzero(keys[order][1:] != keys[order][:-1]) + 1)


def _padded(rows: np.ndarray, length: int, total: int) -> np.ndarray:
  """`rows` (all of `length`, or none where the clip lacks them), then zeros up to
  `total`.
  """
  out = np.zeros((total, *rows.shape[1:]), rows.dtype)
  out[:length] = rows if len(rows) else 0
  return out


def embedder_loader(
  parts: Parts,
  *,
  identities: int = 8,
  emotions: int = 4,
  clips: int = 4,
  videos: int = 0,
  min_len: int = 32,
  max_len: int = 256,
  visual: str = 'expression',
  visual_shape: tuple[int, ...] | None = None,
  seed: int,
  shard: tuple[int, int] = (0, 1),
  threads: int = 4,
  workers: int = 0,
) -> grain.IterDataset[Batch]:
  """Groups of windows for the contrastive loss of the emotion embedder, so that each
  has its positives.

  A batch of the whole job holds `identities * emotions * clips` windows of emotional
  data sets and `videos * clips` of regular ones, group after group; processes read
  equal consecutive shares of it.

  Args:
    parts: data sets with the feature 'whisper' `[2N,S,D]`; those with labels are
      emotional, those without are regular and grouped by recording. Among several of a
      kind, groups are drawn by weight.
    identities: people per batch.
    emotions: emotions of each, any level.
    clips: windows of each group; groups with fewer clips give several windows of one
      clip, at most half of it each.
    videos: regular recordings per batch.
    min_len, max_len: window length in frames, drawn uniformly; shorter clips are used
      whole.
    visual: what is seen: 'expression', or the feature 'crops_64' uint8 `[N,64,64,3]`
      (any size).
    visual_shape: of one frame of it, for clips that have none; as these are stored by
      default.
    seed: of everything drawn.
    shard: (index, count) of this process.
    threads: batches read at a time.
    workers: processes that read; 0 = threads of this one.

  Returns:
    Batches with N = `max_len`, zero beyond a window's length: 'expr' float32 [B,N,D]
    (or crops), 'whisper' [B,2N,S,D] as stored, 'frame_mask' bool [B,N], 'has_video' and
    'has_audio' bool [B], and int32 [B]: 'dataset' (index in `record.DATASETS`),
    'identity', 'video' (equal numbers = equal), 'emotion' (index in `record.EMOTIONS`,
    -1 unlabelled), 'level' (0 unknown).

  Raises:
    DataError: there are fewer groups than a batch asks for, or Whisper states or crops
      are missing.
    ConfigError: the batch does not divide among the processes.
  """
  groups = EmbedderGroups(
    _sequence(parts),
    identities=identities,
    emotions=emotions,
    clips=clips,
    videos=videos,
    min_len=min_len,
    max_len=max_len,
    shard=shard,
    visual=visual,
    visual_shape=visual_shape,
  )
  return _batches(
    grain.MapDataset.range(1).seed(seed).random_map(groups).repeat(), threads, workers
  )
