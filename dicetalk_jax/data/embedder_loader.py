"""Batches of groups of windows, for training the emotion embedder."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from dicetalk_jax.data import clip_record, example_sampling, mixture
from dicetalk_jax.data.example_sampling import Pick
from dicetalk_jax.data.mixture import Batch, DatasetPart, DatasetParts
from dicetalk_jax.errors import ConfigError, DataError


class Window(NamedTuple):
  """Consecutive frames of one clip."""

  part: int
  clip: int
  start: int
  length: int


class _Identity(NamedTuple):
  """An identity of an emotional data set."""

  part: int
  emotions: list[np.ndarray]  # the clips of each emotion


class _Recording(NamedTuple):
  """A recording of a regular data set."""

  part: int
  clips: np.ndarray


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
    self._parts = list(parts)
    self._num_identities = identities
    self._num_emotions = emotions
    self._num_clips = clips
    self._num_videos = videos
    self._min_len = min_len
    self._max_len = max_len
    self._visual = visual
    self._visual_shape = visual_shape

    # 1. Find the groups that batches are drawn from.
    for part in self._parts:
      num_frames = part.source.table.num_frames
      part.check_feature('whisper', 2 * num_frames, optional=True)
      if visual != 'expression':
        part.check_feature(visual, num_frames, optional=True)
    self._identities = self._find_identities()
    self._recordings = self._find_recordings()
    self._check_groups()
    self._identity_odds = self._odds([group.part for group in self._identities])
    self._recording_odds = self._odds([group.part for group in self._recordings])

    # 2. Take the share of this process.
    total = (identities * emotions + videos) * clips
    index, count = shard
    if total % count:
      raise ConfigError(
        f'a batch of {total} windows does not divide among {count} processes; change '
        'the group sizes'
      )
    self._mine = slice(index * total // count, (index + 1) * total // count)

    # 3. Number identities and recordings over all parts, for each clip of each part.
    # Equal numbers mean the same identity or recording.
    tables = [part.source.table for part in self._parts]
    self._identity_codes = _numbered([table.identity for table in tables])
    self._video_codes = _numbered([table.video_id for table in tables])

  def _find_identities(self) -> list[_Identity]:
    """The identities of emotional data sets that show enough emotions."""
    found = []
    for i, part in enumerate(self._parts):
      if not part.labelled:
        continue
      table = part.source.table
      labelled = part.clips[table.emotion[part.clips] != clip_record.UNKNOWN]
      for places in _grouped(table.identity[labelled]):
        clips = labelled[places]
        emotions = [clips[group] for group in _grouped(table.emotion[clips])]
        if len(emotions) >= self._num_emotions:
          found.append(_Identity(i, emotions))
    return found

  def _find_recordings(self) -> list[_Recording]:
    """The recordings of regular data sets."""
    return [
      _Recording(i, part.clips[places])
      for i, part in enumerate(self._parts)
      if not part.labelled
      for places in _grouped(part.source.table.video_id[part.clips])
    ]

  def _check_groups(self) -> None:
    if len(self._identities) < self._num_identities:
      raise DataError(
        f'a batch asks for {self._num_identities} identities with '
        f'{self._num_emotions} emotions each, but {self._names(labelled=True)} has '
        f'only {len(self._identities)}; ask for fewer identities or emotions'
      )
    if len(self._recordings) < self._num_videos:
      raise DataError(
        f'a batch asks for {self._num_videos} regular videos, but there are '
        f'{len(self._recordings)} in {self._names(labelled=False)}; ask for fewer'
      )

  def _names(self, labelled: bool) -> str:
    """The data sets with or without labels, for error messages."""
    names = [str(part.source) for part in self._parts if part.labelled == labelled]
    if names:
      return ', '.join(names)
    return f'no data set {"with" if labelled else "without"} emotion labels'

  def _odds(self, owners: Sequence[int]) -> np.ndarray | None:
    """Probability of each group, by the weight of its part, not by the part's size.

    Args:
      owners: the part of each group.

    Returns:
      `[len(owners)]`, or None if all are equal.
    """
    sizes = np.bincount(owners, minlength=len(self._parts))
    if np.count_nonzero(sizes) < 2:
      return None
    weights = mixture.weights(self._parts)
    odds = np.array([weights[owner] / sizes[owner] for owner in owners])
    return odds / odds.sum()

  def plan(self, rng: np.random.Generator) -> list[Window]:
    """Draws the windows of a global batch, group after group."""
    # 1. Draw groups, and clips of each.
    picks: list[tuple[int, Pick]] = []
    for drawn in rng.choice(
      len(self._identities), self._num_identities, replace=False, p=self._identity_odds
    ):
      part, groups = self._identities[drawn]
      for emotion in rng.choice(len(groups), self._num_emotions, replace=False):
        group = example_sampling.draw_group(rng, groups[emotion], self._num_clips)
        picks += [(part, pick) for pick in group]
    if self._num_videos:
      for drawn in rng.choice(
        len(self._recordings), self._num_videos, replace=False, p=self._recording_odds
      ):
        part, clips = self._recordings[drawn]
        group = example_sampling.draw_group(rng, clips, self._num_clips)
        picks += [(part, pick) for pick in group]

    # 2. Draw the length of each window.
    windows = []
    for part, pick in picks:
      have = int(self._parts[part].source.table.num_frames[pick.clip])
      length = int(rng.integers(self._min_len, self._max_len + 1))
      start, length = example_sampling.group_window(have, length, self._min_len, pick)
      windows.append(Window(part, pick.clip, start, length))
    return windows

  def __call__(self, _: int, rng: np.random.Generator) -> Batch:
    rows = [self._read(window) for window in self.plan(rng)[self._mine]]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

  def _read(self, window: Window) -> dict[str, Any]:
    part, clip, start, length = window
    end = start + length
    data = self._parts[part]
    record = data.source[clip]
    seen = data.rows(self._visual, clip, record, slice(start, end))
    if self._visual_shape is not None:
      seen = example_sampling.visual_rows(seen, self._visual_shape)
    whisper = data.rows('whisper', clip, record, slice(2 * start, 2 * end))
    emotion = clip_record.decode_emotion(record)
    known = emotion != clip_record.UNKNOWN
    return {
      'expr': _padded(seen, length, self._max_len),
      'whisper': _padded(whisper, 2 * length, 2 * self._max_len),
      'frame_mask': np.arange(self._max_len) < length,
      'has_video': np.bool_(len(seen)),
      'has_audio': np.bool_(len(whisper)),
      'dataset': np.int32(record['dataset']),
      'identity': self._identity_codes[part][clip],
      'emotion': np.int32(clip_record.EMOTIONS.index(emotion) if known else -1),
      'level': np.int32(record['intensity']),
      'video': self._video_codes[part][clip],
    }


def _grouped(keys: np.ndarray) -> list[np.ndarray]:
  """The indices of equal keys, group after group."""
  order = np.argsort(keys, kind='stable')
  return np.split(order, np.flatnonzero(keys[order][1:] != keys[order][:-1]) + 1)


def _numbered(columns: list[np.ndarray]) -> list[np.ndarray]:
  """One number for each different value, the same in all columns: int32."""
  _, codes = np.unique(np.concatenate(columns), return_inverse=True)
  ends = np.cumsum([len(column) for column in columns])
  return np.split(codes.astype(np.int32), ends[:-1])


def _padded(rows: np.ndarray, length: int, total: int) -> np.ndarray:
  """Rows with zeros after them.

  Args:
    rows: `[length, ...]`, or none where the clip lacks them.
    length: of the window.
    total: rows of the result.
  """
  out = np.zeros((total, *rows.shape[1:]), rows.dtype)
  if len(rows):
    out[:length] = rows
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
  """Loads groups of windows, for the contrastive loss of the emotion embedder.

  A batch of the whole job holds `identities * emotions * clips` windows of emotional
  data sets and `videos * clips` of regular ones, group after group; processes read
  equal consecutive shares of it.

  Args:
    parts: data sets with the feature 'whisper' `[2N,S,D]`; those with labels are
      emotional, those without are regular and grouped by recording. Among several of a
      kind, groups are drawn by weight.
    identities: identities per batch.
    emotions: emotions of each, any level.
    clips: windows of each group; groups with fewer clips give several windows of one
      clip, at most half of it each.
    videos: regular recordings per batch.
    min_len, max_len: window length in frames, drawn uniformly; shorter clips are used
      whole.
    visual: the visual input: 'expression', or the feature 'crops_64' uint8
      `[N,64,64,3]` (any size).
    visual_shape: of one frame of it, for clips that have none; by default their own.
    seed: of everything drawn.
    shard: (index, count) of this process.
    threads: batches read at a time.
    workers: processes that read; 0 = threads of this one.

  Returns:
    Batches with N = `max_len`, zero beyond a window's length: 'expr' float32 [B,N,D]
    (or crops), 'whisper' [B,2N,S,D] as stored, 'frame_mask' bool [B,N], 'has_video' and
    'has_audio' bool [B], and int32 [B]: 'dataset' (index in `clip_record.DATASETS`),
    'identity', 'video' (equal numbers = equal), 'emotion' (index in
    `clip_record.EMOTIONS`, -1 unlabelled), 'level' (0 unknown).

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
  batches = grain.MapDataset.range(1).seed(seed).random_map(groups).repeat()
  return mixture.read_ahead(batches, threads, workers)
