"""Streams of all loaders: resume, processes, mixtures, refusals."""

import dataclasses
import functools

import numpy as np
import pytest

from dicetalk_jax.data.feature_store import FeatureStore
from dicetalk_jax.data.mixture import DatasetPart
from dicetalk_jax.errors import DataError
from tests.data.memory_clips import (
  LENGTH,
  assert_same_batch,
  clip_of,
  counting_rows,
  diffusion_batches,
  embedder_batches,
  frame_batches,
  take,
)

LOADERS = {
  'frames': frame_batches,
  'diffusion': diffusion_batches,
  'embedder': embedder_batches,
}


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
    assert_same_batch(batch, next(again))


@pytest.mark.parametrize('name', LOADERS)
def test_seed_and_position_decide(part, name):
  a, b, c = (take(LOADERS[name](part, seed=seed), 7) for seed in (3, 3, 4))
  for x, y in zip(a, b):
    assert_same_batch(x, y)
  assert any((x[k] != y[k]).any() for x, y in zip(a, c) for k in x)
  assert any((a[0][k] != a[6][k]).any() for k in a[0])  # the next epoch is not the same


@pytest.mark.parametrize('count', [2, 4])
def test_processes_together_read_what_one_alone_would(part, count):
  whole = take(
    diffusion_batches(part, batch=20), 4
  )  # batches that span epochs of 24 clips
  shards = [
    take(diffusion_batches(part, batch=20 // count, shard=(i, count)), 4)
    for i in range(count)
  ]
  for step, batch in enumerate(whole):
    assert_same_batch(
      batch, {k: np.concatenate([s[step][k] for s in shards]) for k in batch}
    )
  assert sorted([*clip_of(whole[0]), *clip_of(whole[1])[:4]]) == list(range(24))


def test_processes_together_read_the_mixture_of_one(part, regular):
  parts, steps = (
    [dataclasses.replace(part, weight=3.0), regular],
    5,
  )  # of 24 and 12 clips
  for make in (diffusion_batches, frame_batches):
    whole = take(make(parts, batch=10), steps)
    shards = [take(make(parts, batch=2, shard=(i, 5)), steps) for i in range(5)]
    for step, batch in enumerate(whole):
      assert_same_batch(
        batch, {k: np.concatenate([s[step][k] for s in shards]) for k in batch}
      )


def test_another_number_of_processes_goes_on_where_the_first_stopped(part):
  stream = iter(diffusion_batches(part, batch=10, shard=(1, 2)))
  for _ in range(3):
    next(stream)
  alone = iter(diffusion_batches(part, batch=20))
  alone.set_state(stream.get_state())
  assert_same_batch(next(alone), take(diffusion_batches(part, batch=20), 4)[3])


def test_a_mixture_by_weight(part, regular):
  batches = take(
    diffusion_batches([dataclasses.replace(part, weight=3.0), regular], batch=8), 6
  )
  assert [int((b['emotion_class'] == -1).sum()) for b in batches] == [2] * 6


def test_short_clips_are_refused_by_name(part):
  with pytest.raises(
    DataError,
    match='clip synthetic0 has 20 frames, but a window of 11 frames at step 2 needs 21',
  ):
    diffusion_batches(part, frames=11)
  with pytest.raises(DataError, match='needs 21'):
    frame_batches(part, frames=21)


def test_features_that_do_not_fit_are_refused(part, tmp_path):
  with pytest.raises(DataError, match='has no latents'):
    diffusion_batches(DatasetPart(part.source))
  store = FeatureStore(tmp_path, 'data')
  short = store.write(
    'latents', 'x', counting_rows(len(part.source), LENGTH - 1, 4, 4, 4)
  )
  with pytest.raises(
    DataError, match='latents of clip synthetic0 has 19 rows, but its frames ask for 20'
  ):
    diffusion_batches(
      dataclasses.replace(part, features={**part.features, 'latents': short})
    )
  few = store.write('latents', 'few', counting_rows(2, LENGTH, 4, 4, 4))
  with pytest.raises(DataError, match='no clip 2'):
    diffusion_batches(
      dataclasses.replace(part, features={**part.features, 'latents': few})
    )
