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
    'dataset': ((18,), 'int32'),
    'identity': ((18,), 'int32'),
    'emotion': ((18,), 'int32'),
    'level': ((18,), 'int32'),
    'video': ((18,), 'int32'),
  }
  assert batch['has_video'].all() and batch['has_audio'].all()
  datasets = [clip_record.DATASETS[number] for number in batch['dataset']]
  assert datasets == ['synthetic'] * 12 + ['hdtf'] * 6
  assert (batch['emotion'][:12] >= 0).all()
  assert (batch['emotion'][12:] == -1).all()


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
  """Clips without pixels have no rows; the rest of the stream stays the same."""
  rows = []
  for clip in range(len(part.source)):
    count = LENGTH if clip % 4 else 0
    brightness = np.arange(count, dtype=np.uint8) + clip
    crops = np.broadcast_to(brightness[:, None, None, None], (count, 4, 4, 3))
    rows.append((clip, crops))
  stored = FeatureStore(tmp_path, 'x').write('crops_4', 'x1.2', rows)
  seeing = dataclasses.replace(part, features={**part.features, 'crops_4': stored})
  for batch, plain in zip(
    take(embedder_batches(seeing, visual='crops_4'), 5), take(embedder_batches(part), 5)
  ):
    assert batch['expr'].shape == (12, 12, 4, 4, 3) and batch['expr'].dtype == np.uint8
    clip = plain['expr'][:, 0, 0].astype(int)
    np.testing.assert_array_equal(batch['has_video'], clip % 4 > 0)
    shown = plain['frame_mask'] & batch['has_video'][:, None]
    brightness = np.where(shown, plain['expr'][..., 1] + clip[:, None], 0)
    want = np.broadcast_to(brightness[..., None, None, None], batch['expr'].shape)
    np.testing.assert_array_equal(batch['expr'], want)
    other = plain | {name: batch[name] for name in ('expr', 'has_video')}
    assert_same_batch(batch, other)
  with pytest.raises(DataError, match='has no crops_8; compute this feature'):
    embedder_batches(seeing, visual='crops_8')


def test_groups_have_positives_and_negatives(part, regular):
  for batch in take(embedder_batches([part, regular], videos=3), 10):
    identity = batch['identity'][:12]
    emotion = batch['emotion'][:12]
    groups = list(zip(identity, emotion))
    assert [groups.count(group) for group in groups] == [2] * 12
    assert len(set(identity)) == 2
    for one in set(identity):
      assert len(set(emotion[identity == one])) == 3
    assert not set(identity) & set(batch['identity'][12:])
    videos = list(batch['video'][12:])
    assert [videos.count(video) for video in videos] == [2] * 6


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
  for record in source.records:
    record['expression'] = np.zeros((0, width), np.float32)
  unseen = with_features(source, tmp_path)
  (batch,) = take(embedder_batches([part, unseen], videos=3, visual_shape=(2,)), 1)
  assert batch['expr'].shape == (18, 12, 2) and not batch['expr'][12:].any()
  np.testing.assert_array_equal(batch['has_video'], np.arange(18) < 12)


def test_processes_share_the_groups_of_one_batch(part):
  whole = take(embedder_batches(part), 2)
  shards = [take(embedder_batches(part, shard=(i, 2)), 2) for i in (0, 1)]
  for batch, *halves in zip(whole, *shards, strict=True):
    joined = {name: np.concatenate([half[name] for half in halves]) for name in batch}
    assert_same_batch(batch, joined)


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
  owners = [window.part for _ in range(400) for window in groups.plan(rng)]
  counts = np.bincount(owners, minlength=4)
  emotional, of_videos = counts[[0, 2]], counts[[1, 3]]
  # Not 3 : 9, the ratio of identities, nor 6 : 16, that of recordings.
  np.testing.assert_allclose(emotional / emotional.sum(), [0.5, 0.5], atol=0.06)
  np.testing.assert_allclose(of_videos / of_videos.sum(), [0.25, 0.75], atol=0.06)
  batch = next(iter(embedder_batches([part, regular, second, other], videos=2)))
  assert len(set(batch['identity'][:12])) == 2
  assert (batch['emotion'][12:] == -1).all()


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
