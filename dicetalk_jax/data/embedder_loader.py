"""Batches of groups of windows, for training the emotion embedder."""

from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from dicetalk_jax.data import clip_record, example_sampling, mixture
from dicetalk_jax.data.mixture import Batch, DatasetPart, DatasetParts
from dicetalk_jax.errors import ConfigError, DataError


class EmbedderGroups:
  """Draws one global batch of groups, and reads the share of this process.

  See `embedder_loader`.
  """

  def __init__(
    self,
    parts: Sequence[DatasetPart],
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
  parts: DatasetParts,
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
    mixture.as_list(parts),
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
  return mixture.read_ahead(
    grain.MapDataset.range(1).seed(seed).random_map(groups).repeat(), threads, workers
  )
