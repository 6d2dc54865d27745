"""The streams of all loaders: resume, processes, mixtures, refusals."""

import dataclasses
import functools

import numpy as np
import pytest

from dicetalk_jax.data import mixture
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
def test_a_resumed_stream_continues_exactly(part, name):
  batches = functools.partial(LOADERS[name], part, seed=3)
  stream = iter(batches())
  for _ in range(8):  # 32 clips: into the second epoch of 24
    next(stream)
  state = stream.get_state()
  want = [next(stream) for _ in range(5)]
  again = iter(batches(threads=1))
  again.set_state(state)
  for batch in want:
    assert_same_batch(batch, next(again))


@pytest.mark.parametrize('name', LOADERS)
def test_seed_and_position_decide(part, name):
  stream, same, other = (take(LOADERS[name](part, seed=seed), 7) for seed in (3, 3, 4))
  for a, b in zip(stream, same):
    assert_same_batch(a, b)
  assert any(differs(a, b) for a, b in zip(stream, other))
  assert differs(stream[0], stream[6])  # of the next epoch


def differs(a, b):
  return any((a[name] != b[name]).any() for name in a)


def assert_together(whole, shards):
  """The batches of one process are those of several, one after another."""
  for batch, *parts in zip(whole, *shards, strict=True):
    joined = {name: np.concatenate([part[name] for part in parts]) for name in batch}
    assert_same_batch(batch, joined)


@pytest.mark.parametrize('count', [2, 4])
def test_processes_together_read_what_one_alone_would(part, count):
  whole = take(diffusion_batches(part, batch=20), 4)  # over epochs of 24 clips
  shards = [
    take(diffusion_batches(part, batch=20 // count, shard=(i, count)), 4)
    for i in range(count)
  ]
  assert_together(whole, shards)
  assert sorted([*clip_of(whole[0]), *clip_of(whole[1])[:4]]) == list(range(24))


def test_processes_together_read_the_mixture_of_one(part, regular):
  parts = [dataclasses.replace(part, weight=3.0), regular]  # of 24 and 12 clips
  for batches in (diffusion_batches, frame_batches):
    whole = take(batches(parts, batch=10), 5)
    shards = [take(batches(parts, batch=2, shard=(i, 5)), 5) for i in range(5)]
    assert_together(whole, shards)


def test_another_number_of_processes_continues_where_the_first_stopped(part):
  stream = iter(diffusion_batches(part, batch=10, shard=(1, 2)))
  for _ in range(3):
    next(stream)
  alone = iter(diffusion_batches(part, batch=20))
  alone.set_state(stream.get_state())
  assert_same_batch(next(alone), take(diffusion_batches(part, batch=20), 4)[3])


def test_a_mixture_by_weight(part, regular):
  parts = [dataclasses.replace(part, weight=3.0), regular]
  for batch in take(diffusion_batches(parts, batch=8), 6):
    assert (batch['emotion_class'] == -1).sum() == 2


def test_without_weights_labelled_and_unlabelled_clips_are_one_to_one(part, regular):
  """Whatever the sizes and the number of the data sets."""
  emotional, other = (dataclasses.replace(x, weight=None) for x in (part, regular))
  for parts in ([emotional, other, other, other], [emotional, emotional, other]):
    labels = [
      batch['emotion_class'] for batch in take(diffusion_batches(parts, batch=12), 4)
    ]
    assert (np.concatenate(labels) == -1).sum() == 24
  assert mixture.weights([emotional, other, other]) == [1, 0.5, 0.5]
  assert mixture.weights([other, other]) == [0.5, 0.5]
  chosen = dataclasses.replace(emotional, weight=3.0)
  assert mixture.weights([chosen, other, other]) == [3, 1, 1]


def test_clips_that_are_left_out_are_not_drawn(part, regular):
  less = dataclasses.replace(part, left_out=frozenset(range(0, 24, 3)))
  drawn = np.concatenate([clip_of(b) for b in take(diffusion_batches(less), 8)])
  assert sorted(set(drawn)) == [clip for clip in range(24) if clip % 3]
  fewer = dataclasses.replace(regular, left_out=frozenset({0, 1, 4, 5}))
  batches = embedder_batches([less, fewer], emotions=2, videos=2)
  rows = np.concatenate([b['expr'][:, 0, 0][8:] for b in take(batches, 12)])
  # Expressions name the clip.
  assert set(rows) == {2, 3, 6, 7, 8, 9, 10, 11}


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

  def part_with(name, rows):
    latents = FeatureStore(tmp_path, 'data').write('latents', name, rows)
    return dataclasses.replace(part, features={**part.features, 'latents': latents})

  short = part_with('short', counting_rows(len(part.source), LENGTH - 1, 4, 4, 4))
  with pytest.raises(
    DataError, match='latents of clip synthetic0 has 19 rows, but its frames ask for 20'
  ):
    diffusion_batches(short)
  few = part_with('few', counting_rows(2, LENGTH, 4, 4, 4))
  with pytest.raises(DataError, match='no clip 2'):
    diffusion_batches(few)
