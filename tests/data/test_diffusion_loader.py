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
    found = part.source[clip]
    assert batch['emotion_class'][b] == clip_record.emotion_class(
      found['emotion'], found['intensity']
    )
    assert (batch['mu'][b] == clip).all() and (batch['sigma'][b] == 0.5).all()


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


def test_reference_of_the_identity_comes_from_all_clips_of_the_person(part):
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
    rows, reference = (
      batch['latents'][:, :, 0, 0, 0] % 1000,
      batch['reference'][:, 0, 0, 0],
    )
    own = reference // 1000 == clip_of(batch)
    same += own.sum()
    assert ((reference % 1000 < rows[:, 0]) | (reference % 1000 > rows[:, -1]))[
      own
    ].all()
  assert same > 20


def test_prior_of_another_clip_shows_the_same_emotion_and_level_of_the_same_person(
  regular, tmp_path
):
  source = ClipsInMemory()
  for i, r in enumerate(
    source.records
  ):  # of eight clips of a person four are happy: two levels, twice each
    r['emotion'], r['intensity'] = ('happy', 'sad')[i % 8 // 4], 1 + i % 2
  part = with_features(source, tmp_path)
  table, plain = part.source.table, take(diffusion_batches(part), 5)
  for batch, same in zip(take(diffusion_batches(part, emotion='other_clip'), 5), plain):
    clip, other = clip_of(batch), batch['mu'][:, 0].astype(int)
    assert (other != clip).all()
    for of in (table.identity, table.emotion, table.intensity):
      np.testing.assert_array_equal(of[other], of[clip])
    np.testing.assert_array_equal(
      same['latents'], batch['latents']
    )  # nothing else of the stream changes before it
  for batch in take(
    diffusion_batches(regular, emotion='other_clip'), 3
  ):  # without labels nothing is known to be alike
    np.testing.assert_array_equal(batch['mu'][:, 0], clip_of(batch))


def test_clips_without_priors(part):
  bare = dataclasses.replace(
    part, features={k: v for k, v in part.features.items() if k != 'prior'}
  )
  with pytest.raises(DataError, match='prior'):
    diffusion_batches(bare)
  assert {'mu', 'sigma'} == next(iter(diffusion_batches(part))).keys() - next(
    iter(diffusion_batches(bare, emotion='none'))
  ).keys()


def test_unknown_reference_is_refused(part):
  with pytest.raises(ConfigError, match='reference'):
    diffusion_batches(part, reference='nobody')


def test_the_reference_falls_back_to_the_window_and_keeps_to_clip_tokens():
  rng = np.random.default_rng(0)
  assert {example_sampling.reference_row(rng, 3, np.arange(3)) for _ in range(50)} == {
    0,
    1,
    2,
  }
  assert {
    example_sampling.reference_row(rng, 20, np.arange(4, 9), stride=5)
    for _ in range(50)
  } == {0, 10, 15}


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
    np.testing.assert_array_equal(
      heard, np.where(inside, positions + 1000 * clip_of(batch)[:, None, None], 0)
    )
  assert not inside.all()  # the borders were seen


def test_the_mask_covers_every_box_and_little_more(part):
  for batch in take(diffusion_batches(part, area=(1.0, 1.0)), 10):
    for b, clip in enumerate(clip_of(batch)):
      start, stop = (batch['latents'][b, [0, -1], 0, 0, 0] % 1000).astype(int)
      seen = (
        part.source[clip]['bbox'][
          [*range(start, stop + 1), int(batch['reference'][b, 0, 0, 0] % 1000)]
        ]
        * 32
      )
      low, high = seen[:, :2].min(axis=0), seen[:, 2:].max(axis=0)
      ys, xs = np.nonzero(batch['mask'][b])
      assert xs.min() <= low[0] < xs.min() + 1 and xs.max() < high[0] <= xs.max() + 1
      assert ys.min() <= low[1] < ys.min() + 1 and ys.max() < high[1] <= ys.max() + 1
      assert batch['mask'][b].sum() == (np.ptp(xs) + 1) * (np.ptp(ys) + 1)


def test_the_mask_is_scaled_about_its_centre():
  box = np.array([[0.25, 0.25, 0.5, 0.75]])
  rows, columns = (
    np.flatnonzero(example_sampling.face_mask(box, 100, 1.2).any(axis=axis))
    for axis in (1, 0)
  )
  assert (rows[0], rows[-1], columns[0], columns[-1]) == (20, 79, 22, 52)
  assert (
    not example_sampling.face_mask(box, 8, 2.0).all()
    and example_sampling.face_mask(box, 8, 9.0).all()
  )  # clipped to the picture
  assert example_sampling.face_mask(np.zeros((0, 4)), 8, 1.1).all()


def test_area_and_drop_are_uniform(part):
  batches = take(diffusion_batches(part, batch=100), 3)
  drop = np.sort(np.concatenate([b['drop'] for b in batches]))
  assert (
    np.abs(drop - np.linspace(0, 1, len(drop))).max() < 1.63 / len(drop) ** 0.5
  )  # Kolmogorov-Smirnov, 1 %
  fixed = np.concatenate(
    [
      b['mask'].sum(axis=(1, 2))
      for b in take(diffusion_batches(part, batch=100, area=(1.0, 1.0)), 3)
    ]
  )
  grown = np.concatenate([b['mask'].sum(axis=(1, 2)) for b in batches])
  assert (grown >= fixed).all() and 1.2 < (
    grown / fixed
  ).mean() < 1.45  # E[area^2] = 1.33


def test_motion_buckets(part):
  batch = next(iter(diffusion_batches(part)))
  for b, clip in enumerate(clip_of(batch)):
    start = int(batch['latents'][b, 0, 0, 0, 0] % 1000)
    box = part.source[clip]['bbox'][start : start + 9]
    head = (
      np.sqrt(((box[:, :2] + box[:, 2:]) / 2).var(axis=0).sum())
      / (box[:, 2:] - box[:, :2]).mean()
    )
    face = (
      np.arange(9).std() / 2
    )  # one of two dimensions counts frames, the other is constant
    np.testing.assert_allclose(
      batch['buckets'][b], [16 * head / 0.1, 16 * face / 0.5], rtol=1e-5
    )
  assert (
    next(iter(diffusion_batches(part, measured_buckets=False)))['buckets'] == [8, 16]
  ).all()
  assert (
    example_sampling.motion_bucket(1e9, 1.0, 8.0) == 127
    and example_sampling.motion_bucket(1.0, 0.0, 8.0) == 8
  )


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
  def draw(**kw):
    return np.stack(
      [batch['drop'] for batch in take(diffusion_batches(part, **kw), 12)]
    )

  drop = draw()
  np.testing.assert_array_equal(drop, draw(threads=1))
  assert len(np.unique(drop)) == drop.size  # another step, epoch or row, another draw
  assert not np.isin(draw(seed=8), drop).any()
  stream = iter(diffusion_batches(part))
  next(stream)
  state = stream.get_state()
  again = iter(diffusion_batches(part))
  again.set_state(state)
  np.testing.assert_array_equal(next(again)['drop'], drop[1])
