"""Batches of the diffusion model: windows and the conditions that belong to them."""

import dataclasses
import functools

import numpy as np
import pytest

from dicetalk_jax.data import clip_record, example_sampling
from dicetalk_jax.data.feature_store import FeatureStore
from dicetalk_jax.data.mixture import DatasetPart
from dicetalk_jax.errors import ConfigError, DataError
from tests.data.memory_clips import (
  LENGTH,
  WIDTH,
  ClipsInMemory,
  clip_of,
  counting_rows,
  diffusion_batches,
  take,
  with_features,
)


def test_a_diffusion_batch(part):
  batch = next(iter(diffusion_batches(part)))
  shapes = {name: (value.shape, value.dtype.name) for name, value in batch.items()}
  assert shapes == {
    'latents': ((4, 5, 4, 4, 4), 'float32'),
    'reference': ((4, 4, 4, 4), 'float32'),
    'image_token': ((4, 1, WIDTH), 'float32'),
    'audio': ((4, 5, 10, 2, WIDTH), 'float32'),
    'mu': ((4, WIDTH), 'float32'),
    'sigma': ((4, WIDTH), 'float32'),
    'mask': ((4, 32, 32), 'float32'),
    'emotion_class': ((4,), 'int32'),
    'buckets': ((4, 2), 'float32'),
    'drop': ((4,), 'float32'),
  }
  for b, clip in enumerate(clip_of(batch)):
    record = part.source[clip]
    want = clip_record.emotion_class(record['emotion'], record['intensity'])
    assert batch['emotion_class'][b] == want
    assert (batch['mu'][b] == clip).all()
    assert (batch['sigma'][b] == 0.5).all()


def test_window_reference_and_token_belong_together(part):
  starts = set()
  for batch in take(diffusion_batches(part), 30):
    rows = batch['latents'][:, :, 0, 0, 0] % 1000
    np.testing.assert_array_equal(np.diff(rows), 2)
    reference = batch['reference'][:, 0, 0, 0]
    np.testing.assert_array_equal(reference // 1000, clip_of(batch))
    np.testing.assert_array_equal(batch['image_token'][:, 0, 0], reference)
    assert ((reference % 1000 < rows[:, 0]) | (reference % 1000 > rows[:, -1])).all()
    starts |= set(rows[:, 0])
  assert starts == set(range(LENGTH - 8))


def test_reference_of_the_identity_comes_from_all_its_clips(part):
  others = 0
  for batch in take(diffusion_batches(part, reference='identity'), 20):
    reference = batch['reference'][:, 0, 0, 0]
    seen = (reference // 1000).astype(int)
    identity = part.source.table.identity
    np.testing.assert_array_equal(identity[seen], identity[clip_of(batch).astype(int)])
    np.testing.assert_array_equal(batch['image_token'][:, 0, 0], reference)
    others += (seen != clip_of(batch)).sum()
  assert others


def test_a_reference_of_the_identity_in_the_same_clip_is_outside_the_window(part):
  same = 0
  for batch in take(diffusion_batches(part, batch=24, reference='identity'), 20):
    reference = batch['reference'][:, 0, 0, 0]
    own = reference // 1000 == clip_of(batch)
    same += own.sum()
    rows = batch['latents'][own, :, 0, 0, 0] % 1000
    row = reference[own] % 1000
    assert ((row < rows[:, 0]) | (row > rows[:, -1])).all()
  assert same > 20


def test_prior_of_another_clip_has_the_same_identity_emotion_and_level(
  regular, tmp_path
):
  source = ClipsInMemory()
  # Four of the eight clips of an identity are happy: two levels, twice each.
  for i, record in enumerate(source.records):
    record['emotion'] = 'happy' if i % 8 < 4 else 'sad'
    record['intensity'] = 1 + i % 2
  part = with_features(source, tmp_path)
  table = part.source.table
  plain = take(diffusion_batches(part), 5)
  for batch, same in zip(take(diffusion_batches(part, emotion='other_clip'), 5), plain):
    clip = clip_of(batch)
    other = batch['mu'][:, 0].astype(int)
    assert (other != clip).all()
    for column in (table.identity, table.emotion, table.intensity):
      np.testing.assert_array_equal(column[other], column[clip])
    # What is drawn before the prior does not change.
    np.testing.assert_array_equal(same['latents'], batch['latents'])


def test_clips_without_labels_have_their_own_priors(regular):
  for batch in take(diffusion_batches(regular, emotion='other_clip'), 3):
    np.testing.assert_array_equal(batch['mu'][:, 0], clip_of(batch))


def test_clips_without_priors(part):
  features = dict(part.features)
  del features['prior']
  bare = dataclasses.replace(part, features=features)
  with pytest.raises(DataError, match='prior'):
    diffusion_batches(bare)
  without = next(iter(diffusion_batches(bare, emotion='none')))
  assert next(iter(diffusion_batches(part))).keys() - without.keys() == {'mu', 'sigma'}


def test_unknown_reference_is_refused(part):
  with pytest.raises(ConfigError, match='reference'):
    diffusion_batches(part, reference='nobody')


def test_the_reference_falls_back_to_the_window_and_keeps_to_clip_tokens():
  rng = np.random.default_rng(0)

  def drawn(*args, **kwargs):
    return {example_sampling.reference_row(rng, *args, **kwargs) for _ in range(50)}

  assert drawn(3, np.arange(3)) == {0, 1, 2}
  assert drawn(20, np.arange(4, 9), stride=5) == {0, 10, 15}


def test_clip_tokens_of_every_fourth_frame(part, tmp_path):
  store = FeatureStore(tmp_path, 'strided')
  sparse = store.write(
    'clip_embed', 'clip', counting_rows(len(part.source), LENGTH // 4, WIDTH)
  )
  strided = dataclasses.replace(part, features={**part.features, 'clip_embed': sparse})
  for batch in take(diffusion_batches(strided, clip_stride=4), 5):
    reference = batch['reference'][:, 0, 0, 0] % 1000
    np.testing.assert_array_equal(4 * (batch['image_token'][:, 0, 0] % 1000), reference)


def test_each_frame_hears_its_tokens(part):
  for batch in take(diffusion_batches(part), 10):
    heard = batch['audio'][..., 0, 0]
    rows = batch['latents'][:, :, 0, 0, 0] % 1000
    positions = 2 * rows[..., None] - 4 + np.arange(10)
    inside = (positions >= 0) & (positions < 2 * LENGTH)
    want = np.where(inside, positions + 1000 * clip_of(batch)[:, None, None], 0)
    np.testing.assert_array_equal(heard, want)
  assert not inside.all()  # some windows reach beyond the clip


def test_the_mask_covers_every_box_and_little_more(part):
  for batch in take(diffusion_batches(part, area=(1.0, 1.0)), 10):
    for b, clip in enumerate(clip_of(batch)):
      first, last = (batch['latents'][b, [0, -1], 0, 0, 0] % 1000).astype(int)
      reference = int(batch['reference'][b, 0, 0, 0] % 1000)
      boxes = 32 * part.source[clip]['bbox'][[*range(first, last + 1), reference]]
      low = boxes[:, :2].min(axis=0)
      high = boxes[:, 2:].max(axis=0)
      ys, xs = np.nonzero(batch['mask'][b])
      assert xs.min() <= low[0] < xs.min() + 1 and xs.max() < high[0] <= xs.max() + 1
      assert ys.min() <= low[1] < ys.min() + 1 and ys.max() < high[1] <= ys.max() + 1
      assert batch['mask'][b].sum() == (np.ptp(xs) + 1) * (np.ptp(ys) + 1)


def test_the_mask_is_scaled_about_its_centre():
  box = np.array([[0.25, 0.25, 0.5, 0.75]])
  mask = example_sampling.face_mask(box, 100, 1.2)
  rows = np.flatnonzero(mask.any(axis=1))
  columns = np.flatnonzero(mask.any(axis=0))
  assert (rows[0], rows[-1], columns[0], columns[-1]) == (20, 79, 22, 52)
  assert not example_sampling.face_mask(box, 8, 2.0).all()
  assert example_sampling.face_mask(box, 8, 9.0).all()  # clipped to the image
  assert example_sampling.face_mask(np.zeros((0, 4)), 8, 1.1).all()


def test_area_and_drop_are_uniform(part):
  batches = take(diffusion_batches(part, batch=100), 3)
  drop = np.sort(np.concatenate([batch['drop'] for batch in batches]))
  distance = np.abs(drop - np.linspace(0, 1, len(drop))).max()
  assert distance < 1.63 / len(drop) ** 0.5  # Kolmogorov-Smirnov, 1 %

  def masked(batches):
    return np.concatenate([batch['mask'].sum(axis=(1, 2)) for batch in batches])

  fixed = masked(take(diffusion_batches(part, batch=100, area=(1.0, 1.0)), 3))
  growth = masked(batches) / fixed
  assert growth.min() >= 1
  assert 1.2 < growth.mean() < 1.45  # E[area^2] = 1.33


def test_motion_buckets(part):
  batch = next(iter(diffusion_batches(part)))
  for b, clip in enumerate(clip_of(batch)):
    start = int(batch['latents'][b, 0, 0, 0, 0] % 1000)
    box = part.source[clip]['bbox'][start : start + 9]
    centre = (box[:, :2] + box[:, 2:]) / 2
    head = np.sqrt(centre.var(axis=0).sum()) / (box[:, 2:] - box[:, :2]).mean()
    # One of two dimensions counts frames, the other is constant.
    face = np.arange(9).std() / 2
    want = [16 * head / 0.1, 16 * face / 0.5]
    np.testing.assert_allclose(batch['buckets'][b], want, rtol=1e-5)
  fixed = next(iter(diffusion_batches(part, measured_buckets=False)))
  assert (fixed['buckets'] == [8, 16]).all()
  assert example_sampling.motion_bucket(1e9, 1.0, 8.0) == 127
  assert example_sampling.motion_bucket(1.0, 0.0, 8.0) == 8


def test_features_may_be_in_the_records_instead(tmp_path):
  shapes = {
    'latents': (LENGTH, 64, 64, 4),
    'clip_embed': (LENGTH, 1024),
    'whisper': (2 * LENGTH, 5, 384),
  }
  source = ClipsInMemory(
    people=1,
    clips=2,
    emo_mu=lambda i: np.full(256, i),
    emo_sigma=lambda i: np.ones(256),
    **{name: functools.partial(np.full, shape) for name, shape in shapes.items()},
  )
  batch = next(iter(diffusion_batches(DatasetPart(source), batch=2)))
  clip = batch['latents'][:, 0, 0, 0, 0]
  assert (clip == batch['mu'].T).all() and (clip == batch['image_token'][:, 0].T).all()
  assert batch['audio'].shape == (2, 5, 10, 5, 384)


def test_condition_dropout_is_drawn_from_seed_step_and_row(part):
  def drawn(**options):
    batches = take(diffusion_batches(part, **options), 12)
    return np.stack([batch['drop'] for batch in batches])

  drop = drawn()
  np.testing.assert_array_equal(drop, drawn(threads=1))
  assert len(np.unique(drop)) == drop.size  # each step, epoch and row draws its own
  assert not np.isin(drawn(seed=8), drop).any()
  stream = iter(diffusion_batches(part))
  next(stream)
  state = stream.get_state()
  again = iter(diffusion_batches(part))
  again.set_state(state)
  np.testing.assert_array_equal(next(again)['drop'], drop[1])
