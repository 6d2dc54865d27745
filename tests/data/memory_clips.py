"""Clips in memory, with features whose values name the clip and frame of each row."""

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
  """A source of clips in memory; their contents name the clip and the frame."""

  motion_medians = (0.1, 0.5)

  def __init__(
    self, people=3, clips=8, length=LENGTH, dataset='synthetic', labelled=True, **blocks
  ):
    """`blocks` make further blocks of a record from the number of the clip."""
    spec = clip_record.RecordSpec(expression_dim=2)
    brightness = 10 * np.arange(length, dtype=np.uint8)
    frames = np.broadcast_to(brightness[:, None, None, None], (length, 8, 8, 3))
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
        frames=frames,
        **{name: make(i) for name, make in blocks.items()},
      )
      for i in range(people * clips)
    ]

  def __len__(self):
    return len(self.records)

  def __getitem__(self, i):
    record = dict(self.records[i])
    record['dataset'] = clip_record.DATASETS.index(record['dataset'])
    return record

  @functools.cached_property
  def table(self):
    return ClipTable.scan(map(self.__getitem__, range(len(self))))


def moving_boxes(clip, length):
  """A face that moves to the right and grows."""
  left = 0.1 + 0.01 * np.arange(length) + 0.001 * clip
  right = left + 0.3 + 0.005 * np.arange(length)
  top = np.full(length, 0.3)
  bottom = np.full(length, 0.8)
  return np.stack([left, top, right, bottom], axis=1)


def counting_rows(clips, rows, *shape):
  """A feature of clips: row `k` of clip `c` is filled with `1000 c + k`."""
  items = []
  for clip in range(clips):
    numbers = 1000 * clip + np.arange(rows)
    columns = numbers.reshape(-1, *[1] * len(shape))
    items.append((clip, np.broadcast_to(columns, (rows, *shape))))
  return items


def with_features(source, folder, weight=1.0, length=LENGTH):
  """The source with stored features; mu of each prior names the clip."""
  store = FeatureStore(folder, source.records[0]['dataset'])
  clips = len(source)
  priors = []
  for clip in range(clips):
    mu = np.full(WIDTH, float(clip))
    sigma = np.full(WIDTH, 0.5)
    priors.append((clip, np.stack([mu, sigma])[None]))
  items = {
    'latents': counting_rows(clips, length, 4, 4, 4),
    'clip_embed': counting_rows(clips, length, WIDTH),
    'whisper': counting_rows(clips, 2 * length, 2, WIDTH),
    'prior': priors,
  }
  features = {name: store.write(name, 'network', rows) for name, rows in items.items()}
  return DatasetPart(source, features, weight)


def take(dataset, n):
  """The first `n` batches."""
  return list(itertools.islice(iter(dataset), n))


def assert_same_batch(a, b):
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def clip_of(batch):
  """The clip of each row of a diffusion batch."""
  return (batch['latents'][:, 0, 0, 0, 0] // 1000).astype(int)
