"""Batches of the emotion embedder: groups of windows."""

import dataclasses

import numpy as np
import pytest

from dicetalk_jax.data import clip_record, example_sampling
from dicetalk_jax.data.embedder_loader import EmbedderGroups
from dicetalk_jax.data.feature_store import FeatureStore
from dicetalk_jax.data.mixture import DatasetPart
from dicetalk_jax.errors import ConfigError, DataError
from tests.data.memory_clips import (
  LENGTH,
  WIDTH,
  ClipsInMemory,
  assert_same_batch,
  diffusion_batches,
  embedder_batches,
  take,
  with_features,
)


def test_an_embedder_batch(part, regular):
  batch = next(iter(embedder_batches([part, regular], videos=3)))
  shapes = {name: (value.shape, value.dtype.name) for name, value in batch.items()}
  assert shapes == {
    'expr': ((18, 12, 2), 'float32'),
    'whisper': ((18, 24, 2, WIDTH), 'int64'),
    'frame_mask': ((18, 12), 'bool'),
    'has_video': ((18,), 'bool'),
    'has_audio': ((18,), 'bool'),
    **{
      name: ((18,), 'int32')
      for name in ('dataset', 'identity', 'emotion', 'level', 'video')
    },
  }
  assert batch['has_video'].all() and batch['has_audio'].all()
  assert [clip_record.DATASETS[d] for d in batch['dataset']] == ['synthetic'] * 12 + [
    'hdtf'
  ] * 6
  assert (batch['emotion'][12:] == -1).all() and (batch['emotion'][:12] >= 0).all()


def test_expression_audio_and_mask_are_of_the_same_frames(part):
  lengths = []
  for batch in take(embedder_batches(part), 10):
    for expr, whisper, mask in zip(
      batch['expr'], batch['whisper'][..., 0, 0], batch['frame_mask']
    ):
      n = int(mask.sum())
      lengths.append(n)
      assert mask[:n].all() and not expr[n:].any() and not whisper[2 * n :].any()
      np.testing.assert_array_equal(np.diff(expr[:n, 1]), 1)
      np.testing.assert_array_equal(
        whisper[: 2 * n], 1000 * expr[0, 0] + 2 * expr[0, 1] + np.arange(2 * n)
      )
  assert set(lengths) == set(range(4, 13))


def test_crops_in_place_of_expressions(part, tmp_path):
  """Clips without pixels have no rows; all else of the stream is what it was."""
  rows = [
    (
      c,
      np.broadcast_to(
        np.arange(bool(c % 4) * LENGTH, dtype=np.uint8)[:, None, None, None] + c,
        (bool(c % 4) * LENGTH, 4, 4, 3),
      ),
    )
    for c in range(len(part.source))
  ]
  stored = FeatureStore(tmp_path, 'x').write('crops_4', 'x1.2', rows)
  seeing = dataclasses.replace(part, features={**part.features, 'crops_4': stored})
  for batch, plain in zip(
    take(embedder_batches(seeing, visual='crops_4'), 5), take(embedder_batches(part), 5)
  ):
    assert batch['expr'].shape == (12, 12, 4, 4, 3) and batch['expr'].dtype == np.uint8
    clip = plain['expr'][:, 0, 0].astype(int)
    np.testing.assert_array_equal(batch['has_video'], clip % 4 > 0)
    frame = np.where(
      plain['frame_mask'] & batch['has_video'][:, None],
      plain['expr'][..., 1] + clip[:, None],
      0,
    )
    np.testing.assert_array_equal(
      batch['expr'], np.broadcast_to(frame[..., None, None, None], batch['expr'].shape)
    )
    assert_same_batch(
      *(
        {k: v for k, v in b.items() if k not in ('expr', 'has_video')}
        for b in (batch, plain)
      )
    )
  with pytest.raises(DataError, match='has no crops_8; compute this feature'):
    embedder_batches(seeing, visual='crops_8')


def test_groups_have_positives_and_negatives(part, regular):
  for batch in take(embedder_batches([part, regular], videos=3), 10):
    group = list(zip(batch['identity'][:12], batch['emotion'][:12]))
    assert sorted(map(group.count, group)) == [2] * 12
    assert len(set(batch['identity'][:12])) == 2
    for person in set(batch['identity'][:12]):
      assert len(set(batch['emotion'][:12][batch['identity'][:12] == person])) == 3
    assert not set(batch['identity'][:12]) & set(batch['identity'][12:])
    videos = list(batch['video'][12:])
    assert sorted(map(videos.count, videos)) == [2] * 6


def test_small_groups_give_different_windows():
  rng = np.random.default_rng(0)
  for _ in range(50):
    picks = example_sampling.draw_group(rng, [5, 6], 5)
    assert sorted({pick.clip for pick in picks}) == [5, 6]
    assert len({(pick.clip, pick.number) for pick in picks}) == 5  # one in each third
    assert all(0 <= pick.number < pick.parts == 3 for pick in picks)


@pytest.mark.parametrize('length', [7, 9, LENGTH])
def test_a_clip_that_is_used_again_gives_other_frames(tmp_path, length):
  """Also where every clip is shorter than the longest window."""
  part = with_features(ClipsInMemory(length=length), tmp_path, length=length)

  def groups_of(clips):
    return EmbedderGroups(
      [part],
      identities=2,
      emotions=3,
      clips=clips,
      videos=0,
      min_len=4,
      max_len=40,
      shard=(0, 1),
    )

  rng = np.random.default_rng(0)
  groups = groups_of(8)  # windows, of two clips
  for _ in range(100):
    windows = groups.plan(rng)
    assert len(set(windows)) == len(windows) == 48
    for window in windows:
      assert 4 <= window.length <= max(4, length // 2)
      assert 0 <= window.start <= length - window.length
  # A clip that is used once may be used whole.
  groups = groups_of(2)
  windows = [window for _ in range(100) for window in groups.plan(rng)]
  assert {window.length for window in windows} == set(range(4, length + 1))
  assert {window.start for window in windows} == set(range(length - 3))


def test_a_modality_that_is_missing(tmp_path):
  source = ClipsInMemory()
  for record in source.records[::2]:
    record['expression'] = np.zeros((0, 2), np.float32)
    record['has_expression'] = False
  rows = []
  for clip in range(len(source)):
    count = 0 if clip % 4 == 0 else 2 * LENGTH
    rows.append((clip, np.ones((count, 2, WIDTH), np.float16)))
  whisper = FeatureStore(tmp_path, 'x').write('whisper', 'w', rows)
  part = DatasetPart(source, {'whisper': whisper})
  for batch in take(embedder_batches(part), 5):
    seen = batch['expr'].any(axis=(1, 2))
    heard = batch['whisper'].any(axis=(1, 2, 3))
    np.testing.assert_array_equal(batch['has_video'], seen)
    np.testing.assert_array_equal(batch['has_audio'], heard)
    assert not seen.all() and not heard.all()


@pytest.mark.parametrize('width', [2, 5])
def test_clips_without_expressions_take_the_width_of_the_others(part, tmp_path, width):
  source = ClipsInMemory(people=2, clips=6, dataset='hdtf', labelled=False)
  for r in source.records:
    r['expression'] = np.zeros((0, width), np.float32)
  unseen = with_features(source, tmp_path)
  (batch,) = take(embedder_batches([part, unseen], videos=3, visual_shape=(2,)), 1)
  assert batch['expr'].shape == (18, 12, 2) and not batch['expr'][12:].any()
  np.testing.assert_array_equal(batch['has_video'], np.arange(18) < 12)


def test_processes_share_the_groups_of_one_batch(part):
  whole = take(embedder_batches(part), 2)
  shards = [take(embedder_batches(part, shard=(i, 2)), 2) for i in (0, 1)]
  for step in (0, 1):
    assert_same_batch(
      whole[step],
      {k: np.concatenate([s[step][k] for s in shards]) for k in whole[step]},
    )


def test_groups_of_several_data_sets_by_weight(part, regular, tmp_path):
  other = with_features(
    ClipsInMemory(people=4, clips=8, dataset='voxceleb2', labelled=False),
    tmp_path,
    weight=3.0,
  )
  second = with_features(ClipsInMemory(people=9, dataset='mead'), tmp_path)
  groups = EmbedderGroups(
    [part, regular, second, other],
    identities=2,
    emotions=3,
    clips=2,
    videos=2,
    min_len=4,
    max_len=12,
    shard=(0, 1),
  )
  rng = np.random.default_rng(0)
  counts = np.bincount(
    [row[0] for _ in range(400) for row in groups.plan(rng)], minlength=4
  )
  people, videos = (
    counts[[0, 2]] / counts[[0, 2]].sum(),
    counts[[1, 3]] / counts[[1, 3]].sum(),
  )
  np.testing.assert_allclose(
    people, [0.5, 0.5], atol=0.06
  )  # not 3 : 9, as there are people
  np.testing.assert_allclose(
    videos, [0.25, 0.75], atol=0.06
  )  # not 6 : 16, as there are recordings
  batch = next(iter(embedder_batches([part, regular, second, other], videos=2)))
  assert len(set(batch['identity'][:12])) == 2 and (batch['emotion'][12:] == -1).all()


def test_impossible_batches_are_refused(part, regular):
  with pytest.raises(DataError, match='4 identities with 3 emotions'):
    embedder_batches(part, identities=4)
  with pytest.raises(DataError, match='2 identities with 5 emotions'):
    embedder_batches(part, emotions=5)
  with pytest.raises(DataError, match='7 regular videos, but there are 6 in'):
    embedder_batches([part, regular], videos=7)
  with pytest.raises(
    DataError,
    match='2 regular videos, but there are 0 in no data set without emotion labels',
  ):
    embedder_batches(part, videos=2)
  with pytest.raises(ConfigError, match='12 windows does not divide among 5'):
    embedder_batches(part, shard=(0, 5))
  with pytest.raises(ConfigError, match='shard 2 of 2'):
    diffusion_batches(part, shard=(2, 2))
