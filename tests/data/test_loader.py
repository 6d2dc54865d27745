"""Loaders: what a batch holds, resume, sharing among processes, refusals."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest

from dicetalk_jax.data import clip_record, example_sampling, loader
from dicetalk_jax.data.clip_source import ClipTable
from dicetalk_jax.data.feature_store import FeatureStore
from dicetalk_jax.data.loader import Part
from dicetalk_jax.errors import ConfigError, DataError

LENGTH = 20
WIDTH = 3


class Memory:
  """Clips in memory; everything in them tells which clip and which frame it is."""

  motion_medians = (0.1, 0.5)

  def __init__(
    self, people=3, clips=8, length=LENGTH, dataset='synthetic', labelled=True, **blocks
  ):
    spec = clip_record.RecordSpec(expression_dim=2)
    self.records = [
      clip_record.encode_example(
        spec,
        clip_id=f'{dataset}{i}',
        identity=f'{dataset}/{i // clips}',
        video_id=f'{dataset}/{i // 2}',
        dataset=dataset,
        num_frames=length,
        emotion=clip_record.EMOTIONS[i % clips // 2] if labelled else 'unknown',
        intensity=i % 2 + 1 if labelled else 0,
        audio=np.zeros(640 * length),
        expression=np.stack([np.full(length, i), np.arange(length)], axis=1),
        bbox=boxes(i, length),
        frames=np.broadcast_to(
          np.arange(length, dtype=np.uint8)[:, None, None, None] * 10, (length, 8, 8, 3)
        ),
        **{name: make(i) for name, make in blocks.items()},
      )
      for i in range(people * clips)
    ]

  def __len__(self):
    return len(self.records)

  def __getitem__(self, i):
    return {
      k: clip_record.DATASETS.index(v) if k == 'dataset' else v
      for k, v in self.records[i].items()
    }

  @functools.cached_property
  def table(self):
    return ClipTable.scan(map(self.__getitem__, range(len(self))))


def boxes(clip, length):
  """A face that moves to the right and grows."""
  x = 0.1 + 0.01 * np.arange(length) + 0.001 * clip
  return np.stack(
    [
      x,
      np.full(length, 0.3),
      x + 0.3 + 0.005 * np.arange(length),
      np.full(length, 0.8),
    ],
    axis=1,
  )


def counting(clips, rows, *shape):
  """Row `k` of clip `c` is filled with `1000 c + k`."""
  return [
    (
      c,
      np.broadcast_to(
        (1000 * c + np.arange(rows)).reshape(-1, *[1] * len(shape)), (rows, *shape)
      ),
    )
    for c in range(clips)
  ]


def part_of(source, folder, weight=1.0, length=LENGTH):
  store, n = FeatureStore(folder, source.records[0]['dataset']), len(source)
  prior = [
    (c, np.stack([np.full(WIDTH, float(c)), np.full(WIDTH, 0.5)])[None])
    for c in range(n)
  ]
  return Part(
    source,
    {
      'latents': store.write('latents', 'vae', counting(n, length, 4, 4, 4)),
      'clip_embed': store.write('clip_embed', 'clip', counting(n, length, WIDTH)),
      'whisper': store.write('whisper', 'whisper', counting(n, 2 * length, 2, WIDTH)),
      'prior': store.write('prior', 'embedder', prior),
    },
    weight,
  )


@pytest.fixture(scope='module')
def part(tmp_path_factory):
  return part_of(Memory(), tmp_path_factory.mktemp('features'))


@pytest.fixture(scope='module')
def regular(tmp_path_factory):
  source = Memory(people=2, clips=6, dataset='hdtf', labelled=False)
  return part_of(source, tmp_path_factory.mktemp('features'))


def take(dataset, n):
  return list(itertools.islice(iter(dataset), n))


def assert_equal(a, b):
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def clip_of(batch):
  return (batch['latents'][:, 0, 0, 0, 0] // 1000).astype(int)


diffusion = functools.partial(
  loader.diffusion_loader, batch=4, frames=5, step=2, mask_size=32, seed=7
)
embedder = functools.partial(
  loader.embedder_loader,
  identities=2,
  emotions=3,
  clips=2,
  min_len=4,
  max_len=12,
  seed=7,
)
frames = functools.partial(loader.frames_loader, batch=4, frames=3, seed=7)


# What a batch holds.


def test_frames_are_consecutive_pixels(part):
  for batch in take(frames(part, step=2), 6):
    assert (
      batch['video'].shape == (4, 3, 8, 8, 3) and batch['video'].dtype == np.float32
    )
    assert np.abs(batch['video']).max() <= 1
    rows = np.round((batch['video'].mean(axis=(2, 3, 4)) + 1) * 12.75)
    np.testing.assert_array_equal(np.diff(rows), 2)


def test_a_diffusion_batch(part):
  batch = next(iter(diffusion(part)))
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
  for batch in take(diffusion(part), 30):
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
  for batch in take(diffusion(part, reference='identity'), 20):
    reference = batch['reference'][:, 0, 0, 0]
    seen = (reference // 1000).astype(int)
    identity = part.source.table.identity
    np.testing.assert_array_equal(identity[seen], identity[clip_of(batch).astype(int)])
    np.testing.assert_array_equal(batch['image_token'][:, 0, 0], reference)
    others += (seen != clip_of(batch)).sum()
  assert others


def test_a_reference_of_the_identity_in_the_same_clip_is_outside_the_window(part):
  same = 0
  for batch in take(diffusion(part, batch=24, reference='identity'), 20):
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
  source = Memory()
  for i, r in enumerate(
    source.records
  ):  # of eight clips of a person four are happy: two levels, twice each
    r['emotion'], r['intensity'] = ('happy', 'sad')[i % 8 // 4], 1 + i % 2
  part = part_of(source, tmp_path)
  table, plain = part.source.table, take(diffusion(part), 5)
  for batch, same in zip(take(diffusion(part, emotion='other_clip'), 5), plain):
    clip, other = clip_of(batch), batch['mu'][:, 0].astype(int)
    assert (other != clip).all()
    for of in (table.identity, table.emotion, table.intensity):
      np.testing.assert_array_equal(of[other], of[clip])
    np.testing.assert_array_equal(
      same['latents'], batch['latents']
    )  # nothing else of the stream changes before it
  for batch in take(
    diffusion(regular, emotion='other_clip'), 3
  ):  # without labels nothing is known to be alike
    np.testing.assert_array_equal(batch['mu'][:, 0], clip_of(batch))


def test_clips_without_priors(part):
  bare = dataclasses.replace(
    part, features={k: v for k, v in part.features.items() if k != 'prior'}
  )
  with pytest.raises(DataError, match='prior'):
    diffusion(bare)
  assert {'mu', 'sigma'} == next(iter(diffusion(part))).keys() - next(
    iter(diffusion(bare, emotion='none'))
  ).keys()


def test_unknown_reference_is_refused(part):
  with pytest.raises(ConfigError, match='reference'):
    diffusion(part, reference='nobody')


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
    'clip_embed', 'clip', counting(len(part.source), LENGTH // 4, WIDTH)
  )
  strided = dataclasses.replace(part, features={**part.features, 'clip_embed': sparse})
  for batch in take(diffusion(strided, clip_stride=4), 5):
    reference = batch['reference'][:, 0, 0, 0] % 1000
    np.testing.assert_array_equal(4 * (batch['image_token'][:, 0, 0] % 1000), reference)


def test_each_frame_hears_its_tokens(part):
  for batch in take(diffusion(part), 10):
    heard = batch['audio'][..., 0, 0]
    rows = batch['latents'][:, :, 0, 0, 0] % 1000
    positions = 2 * rows[..., None] - 4 + np.arange(10)
    inside = (positions >= 0) & (positions < 2 * LENGTH)
    np.testing.assert_array_equal(
      heard, np.where(inside, positions + 1000 * clip_of(batch)[:, None, None], 0)
    )
  assert not inside.all()  # the borders were seen


def test_the_mask_covers_every_box_and_little_more(part):
  for batch in take(diffusion(part, area=(1.0, 1.0)), 10):
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
  batches = take(diffusion(part, batch=100), 3)
  drop = np.sort(np.concatenate([b['drop'] for b in batches]))
  assert (
    np.abs(drop - np.linspace(0, 1, len(drop))).max() < 1.63 / len(drop) ** 0.5
  )  # Kolmogorov-Smirnov, 1 %
  fixed = np.concatenate(
    [
      b['mask'].sum(axis=(1, 2))
      for b in take(diffusion(part, batch=100, area=(1.0, 1.0)), 3)
    ]
  )
  grown = np.concatenate([b['mask'].sum(axis=(1, 2)) for b in batches])
  assert (grown >= fixed).all() and 1.2 < (
    grown / fixed
  ).mean() < 1.45  # E[area^2] = 1.33


def test_motion_buckets(part):
  batch = next(iter(diffusion(part)))
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
    next(iter(diffusion(part, measured_buckets=False)))['buckets'] == [8, 16]
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
  source = Memory(
    people=1,
    clips=2,
    emo_mu=lambda i: np.full(256, i),
    emo_sigma=lambda i: np.ones(256),
    **{name: functools.partial(np.full, shape) for name, shape in shapes.items()},
  )
  batch = next(iter(diffusion(Part(source), batch=2)))
  clip = batch['latents'][:, 0, 0, 0, 0]
  assert (clip == batch['mu'].T).all() and (clip == batch['image_token'][:, 0].T).all()
  assert batch['audio'].shape == (2, 5, 10, 5, 384)


# Groups for the embedder.


def test_an_embedder_batch(part, regular):
  batch = next(iter(embedder([part, regular], videos=3)))
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


def test_expression_sound_and_mask_are_of_the_same_frames(part):
  lengths = []
  for batch in take(embedder(part), 10):
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
    take(embedder(seeing, visual='crops_4'), 5), take(embedder(part), 5)
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
    assert_equal(
      *(
        {k: v for k, v in b.items() if k not in ('expr', 'has_video')}
        for b in (batch, plain)
      )
    )
  with pytest.raises(DataError, match='has no crops_8; compute this feature'):
    embedder(seeing, visual='crops_8')


def test_groups_have_positives_and_negatives(part, regular):
  for batch in take(embedder([part, regular], videos=3), 10):
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
    assert sorted({clip for clip, *_ in picks}) == [5, 6]
    assert len({(clip, part) for clip, part, _ in picks}) == 5  # one in each third
    assert all(0 <= number < parts == 3 for _, (number, parts), _ in picks)


@pytest.mark.parametrize('length', [7, 9, LENGTH])
def test_a_clip_that_is_used_again_gives_other_frames(tmp_path, length):
  """Also where every clip is shorter than the longest window."""
  part = part_of(Memory(length=length), tmp_path, length=length)

  def make(clips):
    return loader.EmbedderGroups(
      [part],
      identities=2,
      emotions=3,
      clips=clips,
      videos=0,
      min_len=4,
      max_len=40,
      shard=(0, 1),
    )

  rng, groups, once = np.random.default_rng(0), make(8), make(2)  # of two clips each
  for _ in range(100):
    windows = groups.plan(rng)
    assert len(set(windows)) == len(windows) == 48
    for _, _, start, n in windows:
      assert 4 <= n <= max(4, length // 2) and 0 <= start <= length - n
  plans = [window for _ in range(100) for window in once.plan(rng)]
  assert {n for *_, n in plans} == set(
    range(4, length + 1)
  )  # a clip that is used once may be used whole
  assert {start for _, _, start, _ in plans} == set(range(length - 3))


def test_a_modality_that_is_missing(tmp_path):
  source = Memory()
  for r in source.records[::2]:
    r['expression'], r['has_expression'] = np.zeros((0, 2), np.float32), False
  rows = [
    (c, np.ones(((c % 4 > 0) * 2 * LENGTH, 2, WIDTH), np.float16))
    for c in range(len(source))
  ]
  silent = Part(
    source, {'whisper': FeatureStore(tmp_path, 'x').write('whisper', 'w', rows)}
  )
  for batch in take(embedder(silent), 5):
    assert (batch['has_video'] == batch['expr'].any(axis=(1, 2))).all() and not batch[
      'has_video'
    ].all()
    assert (
      batch['has_audio'] == batch['whisper'].any(axis=(1, 2, 3))
    ).all() and not batch['has_audio'].all()


@pytest.mark.parametrize('width', [2, 5])
def test_clips_without_expressions_take_the_width_of_the_others(part, tmp_path, width):
  source = Memory(people=2, clips=6, dataset='hdtf', labelled=False)
  for r in source.records:
    r['expression'] = np.zeros((0, width), np.float32)
  unseen = part_of(source, tmp_path)
  (batch,) = take(embedder([part, unseen], videos=3, visual_shape=(2,)), 1)
  assert batch['expr'].shape == (18, 12, 2) and not batch['expr'][12:].any()
  np.testing.assert_array_equal(batch['has_video'], np.arange(18) < 12)


# Streams: resume, processes, mixtures.

LOADERS = {'frames': frames, 'diffusion': diffusion, 'embedder': embedder}


@pytest.mark.parametrize('name', LOADERS)
def test_a_resumed_stream_goes_on_exactly(part, name):
  make = functools.partial(LOADERS[name], part, seed=3)
  stream = iter(make())
  for _ in range(8):  # 32 clips: into the second epoch of 24
    next(stream)
  state = stream.get_state()
  want = [next(stream) for _ in range(5)]
  again = iter(make(threads=1))
  again.set_state(state)
  for batch in want:
    assert_equal(batch, next(again))


@pytest.mark.parametrize('name', LOADERS)
def test_seed_and_position_decide(part, name):
  a, b, c = (take(LOADERS[name](part, seed=seed), 7) for seed in (3, 3, 4))
  for x, y in zip(a, b):
    assert_equal(x, y)
  assert any((x[k] != y[k]).any() for x, y in zip(a, c) for k in x)
  assert any((a[0][k] != a[6][k]).any() for k in a[0])  # the next epoch is not the same


@pytest.mark.parametrize('count', [2, 4])
def test_processes_together_read_what_one_alone_would(part, count):
  whole = take(diffusion(part, batch=20), 4)  # batches that span epochs of 24 clips
  shards = [
    take(diffusion(part, batch=20 // count, shard=(i, count)), 4) for i in range(count)
  ]
  for step, batch in enumerate(whole):
    assert_equal(
      batch, {k: np.concatenate([s[step][k] for s in shards]) for k in batch}
    )
  assert sorted([*clip_of(whole[0]), *clip_of(whole[1])[:4]]) == list(range(24))


def test_processes_together_read_the_mixture_of_one(part, regular):
  parts, steps = (
    [dataclasses.replace(part, weight=3.0), regular],
    5,
  )  # of 24 and 12 clips
  for make in (diffusion, frames):
    whole = take(make(parts, batch=10), steps)
    shards = [take(make(parts, batch=2, shard=(i, 5)), steps) for i in range(5)]
    for step, batch in enumerate(whole):
      assert_equal(
        batch, {k: np.concatenate([s[step][k] for s in shards]) for k in batch}
      )


def test_another_number_of_processes_goes_on_where_the_first_stopped(part):
  stream = iter(diffusion(part, batch=10, shard=(1, 2)))
  for _ in range(3):
    next(stream)
  alone = iter(diffusion(part, batch=20))
  alone.set_state(stream.get_state())
  assert_equal(next(alone), take(diffusion(part, batch=20), 4)[3])


def test_condition_dropout_is_drawn_from_seed_step_and_row(part):
  def draw(**kw):
    return np.stack([batch['drop'] for batch in take(diffusion(part, **kw), 12)])

  drop = draw()
  np.testing.assert_array_equal(drop, draw(threads=1))
  assert len(np.unique(drop)) == drop.size  # another step, epoch or row, another draw
  assert not np.isin(draw(seed=8), drop).any()
  stream = iter(diffusion(part))
  next(stream)
  state = stream.get_state()
  again = iter(diffusion(part))
  again.set_state(state)
  np.testing.assert_array_equal(next(again)['drop'], drop[1])


def test_processes_share_the_groups_of_one_batch(part):
  whole = take(embedder(part), 2)
  shards = [take(embedder(part, shard=(i, 2)), 2) for i in (0, 1)]
  for step in (0, 1):
    assert_equal(
      whole[step],
      {k: np.concatenate([s[step][k] for s in shards]) for k in whole[step]},
    )


def test_a_mixture_by_weight(part, regular):
  batches = take(
    diffusion([dataclasses.replace(part, weight=3.0), regular], batch=8), 6
  )
  assert [int((b['emotion_class'] == -1).sum()) for b in batches] == [2] * 6


def test_groups_of_several_data_sets_by_weight(part, regular, tmp_path):
  other = part_of(
    Memory(people=4, clips=8, dataset='voxceleb2', labelled=False), tmp_path, weight=3.0
  )
  second = part_of(Memory(people=9, dataset='mead'), tmp_path)
  groups = loader.EmbedderGroups(
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
  batch = next(iter(embedder([part, regular, second, other], videos=2)))
  assert len(set(batch['identity'][:12])) == 2 and (batch['emotion'][12:] == -1).all()


# What is refused.


def test_short_clips_are_refused_by_name(part):
  with pytest.raises(
    DataError,
    match='clip synthetic0 has 20 frames, but a window of 11 frames at step 2 needs 21',
  ):
    diffusion(part, frames=11)
  with pytest.raises(DataError, match='needs 21'):
    frames(part, frames=21)


def test_features_that_do_not_fit_are_refused(part, tmp_path):
  with pytest.raises(DataError, match='has no latents'):
    diffusion(Part(part.source))
  store = FeatureStore(tmp_path, 'data')
  short = store.write('latents', 'x', counting(len(part.source), LENGTH - 1, 4, 4, 4))
  with pytest.raises(
    DataError, match='latents of clip synthetic0 has 19 rows, but its frames ask for 20'
  ):
    diffusion(dataclasses.replace(part, features={**part.features, 'latents': short}))
  few = store.write('latents', 'few', counting(2, LENGTH, 4, 4, 4))
  with pytest.raises(DataError, match='no clip 2'):
    diffusion(dataclasses.replace(part, features={**part.features, 'latents': few}))


def test_impossible_batches_are_refused(part, regular):
  with pytest.raises(DataError, match='4 identities with 3 emotions'):
    embedder(part, identities=4)
  with pytest.raises(DataError, match='2 identities with 5 emotions'):
    embedder(part, emotions=5)
  with pytest.raises(DataError, match='7 regular videos, but there are 6 in'):
    embedder([part, regular], videos=7)
  with pytest.raises(
    DataError,
    match='2 regular videos, but there are 0 in no data set without emotion labels',
  ):
    embedder(part, videos=2)
  with pytest.raises(ConfigError, match='12 windows does not divide among 5'):
    embedder(part, shard=(0, 5))
  with pytest.raises(ConfigError, match='shard 2 of 2'):
    diffusion(part, shard=(2, 2))
