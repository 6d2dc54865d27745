"""Clips in memory with features that show which clip and frame a row is of."""

import functools
import itertools

import numpy as np

from dicetalk_jax.data import clip_record
from dicetalk_jax.data.autoencoder_loader import frames_loader
from dicetalk_jax.data.clip_source import ClipTable
from dicetalk_jax.data.diffusion_loader import diffusion_loader
from dicetalk_jax.data.embedder_loader import embedder_loader
from dicetalk_jax.data.feature_store import FeatureStore
from dicetalk_jax.data.mixture import DatasetPart

LENGTH = 20
WIDTH = 3

frame_batches = functools.partial(frames_loader, batch=4, frames=3, seed=7)
diffusion_batches = functools.partial(
  diffusion_loader, batch=4, frames=5, step=2, mask_size=32, seed=7
)
embedder_batches = functools.partial(
  embedder_loader, identities=2, emotions=3, clips=2, min_len=4, max_len=12, seed=7
)


class ClipsInMemory:
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
        bbox=moving_boxes(i, length),
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


def moving_boxes(clip, length):
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


def counting_rows(clips, rows, *shape):
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


def with_features(source, folder, weight=1.0, length=LENGTH):
  store, n = FeatureStore(folder, source.records[0]['dataset']), len(source)
  prior = [
    (c, np.stack([np.full(WIDTH, float(c)), np.full(WIDTH, 0.5)])[None])
    for c in range(n)
  ]
  return DatasetPart(
    source,
    {
      'latents': store.write('latents', 'vae', counting_rows(n, length, 4, 4, 4)),
      'clip_embed': store.write('clip_embed', 'clip', counting_rows(n, length, WIDTH)),
      'whisper': store.write(
        'whisper', 'whisper', counting_rows(n, 2 * length, 2, WIDTH)
      ),
      'prior': store.write('prior', 'embedder', prior),
    },
    weight,
  )


def take(dataset, n):
  return list(itertools.islice(iter(dataset), n))


def assert_same_batch(a, b):
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def clip_of(batch):
  return (batch['latents'][:, 0, 0, 0, 0] // 1000).astype(int)
