"""Runs the frozen networks over a data set: which features there are, from what, and
how fast.

Rows of consecutive clips share batches, each split over the devices of the network's
mesh; clips are read ahead in threads. `python -m data_pipelines.precompute` does this
on all devices and processes; training does it at its start for whatever is still
missing.
"""

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import os
import time
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from dicetalk_jax import parallel
from dicetalk_jax.component import Component
from dicetalk_jax.data import clip_record, example_sampling, face_crops
from dicetalk_jax.data.clip_source import ClipSource
from dicetalk_jax.data.feature_store import Feature, FeatureStore, Item
from dicetalk_jax.errors import DataError
from dicetalk_jax.media import audio, image
from dicetalk_jax.models.embedder import EmbedderConfig

# Feature -> the component that computes it; 'prior' is made from what `inputs` names.
# Crops, 'crops_64', need none.
NETWORKS = {
  'latents': 'vae',
  'clip_embed': 'image_encoder',
  'whisper': 'whisper',
  'prior': 'embedder',
}
CLIP_STRIDE = 5  # every fifth frame has a CLIP token and may be a reference
BATCH = 16  # rows per device and call

Rows = Any  # one array or a tuple of arrays [n, ...]


@dataclasses.dataclass(frozen=True)
class FeatureExtractor:
  """The features of one data set under the networks of one model.

  Attributes:
    networks: component -> network, at least those that `NETWORKS` names for the
      features asked for and for what these are made from.
    source: the clips.
    folder: root of all features.
    clip_stride: every how many frames there is a CLIP token.
    shard: (index, count) of this process; default as `jax.distributed` counts.
    batch: rows per device and call.
    threads: clips read at a time.
  """

  networks: Mapping[str, Component]
  source: ClipSource
  folder: str | os.PathLike
  clip_stride: int = CLIP_STRIDE
  shard: tuple[int, int] | None = None
  batch: int = BATCH
  threads: int = 4

  @property
  def store(self) -> FeatureStore:
    return FeatureStore(self.folder, self.source.fingerprint)

  def load_or_compute(self, *names: str) -> dict[str, Feature]:
    """Computes this process's share of what is missing, waits for the other processes',
    opens all by name.

    What the records carry themselves is left out.

    Raises:
      DataError: see `compute_missing`; or other processes do not do their share.
    """
    names = [name for name in names if not self.in_records(name)]
    for name in names:
      self.compute_missing(name)
    return {name: self.store.wait(*self._key(name), len(self.source)) for name in names}

  def in_records(self, name: str) -> bool:
    """Whether the feature is in the records.

    Priors are always computed: an embedder trained anew gives others.

    Raises:
      DataError: the records say that it is of another network or stride.
    """
    if name == 'prior' or not len(self.source[0].get(name, ())):
      return False
    have, want = self.source.made_by.get(name), self.fingerprint(name)
    if have not in (None, want):
      raise DataError(
        f'the records of {self.source} carry {have}, but this model and clip_stride '
        f'ask for {want}; use those that the records were made with, or the data set '
        'with pixels'
      )
    return True

  def fingerprint(self, name: str) -> str:
    """Feature, settings and network, as the folder of the feature is called."""
    return '-'.join(self._key(name))

  def compute_missing(self, name: str) -> bool:
    """Computes what is missing of this process's share of one feature; whether the
    feature is now complete.

    Per clip of N frames: 'latents' float16 `[N,h,w,c]`, posterior means, unscaled;
    'clip_embed' float16
    `[ceil(N/clip_stride),D]`; 'whisper' float16 `[2N,states,D]` at 50 Hz, no rows for a
    clip without sound; 'crops_<S>' uint8 `[N,S,S,3]`, no rows for a clip without
    pixels; 'prior' float32 `[1,2,d_s]`, mean and standard deviation from the modalities
    that the clip has (see `gaussian`), after what it is made from.

    Raises:
      DataError: see `check`; or a network gives values that are not finite.
    """
    self.check(name)
    if self.in_records(name):
      return True
    index, count = self.shard or (jax.process_index(), jax.process_count())
    mine = range(len(self.source))[index::count]

    def compute(missing: Sequence[int]) -> Iterator[Item]:
      for other in self._made_from(name):
        self.compute_missing(other)
      with _Progress(
        f'{name} ({self.source.split})', len(mine), len(mine) - len(missing)
      ) as progress:
        for clip, rows in self._rows(name, missing):
          if not np.isfinite(rows).all():
            raise DataError(
              f'{name} of clip {self.source.table.clip_id[clip]} is not finite in '
              f'{rows.dtype}; check the clip and the weights of {NETWORKS[name]}'
            )
          yield clip, rows
          progress.add(int(self.source.table.num_frames[clip]))

    return self.store.fill(*self._key(name), len(self.source), compute, (index, count))

  def check(self, name: str) -> None:
    """Refuses a feature that the records cannot give.

    Raises:
      DataError: the data set has no pixels, or expressions of another width than the
        embedder reads.
    """
    if self.in_records(name) or self.store.complete(*self._key(name)):
      return
    for other in self._made_from(name):
      self.check(other)
    if name == 'prior':
      config, width = self.networks['embedder'].config, self.source.expression_dim
      if config.visual == 'expression' and width not in (0, config.expr_dim):
        raise DataError(
          f'the clips of {self.source} have {width} expression coefficients per frame, '
          f'but the embedder reads {config.expr_dim}; prepare the data set with those '
          'that it was trained on, or take another embedder'
        )
    first = self.source[0].get('frames')
    if (name in ('latents', 'clip_embed') and not first) or (
      face_crops.parse_name(name)
      and (first is None or not any(len(record['frames']) for record in self.source))
    ):
      raise DataError(
        f'{self.source} has no pixels, which {name} is made from; prepare the data set '
        'with content=full'
      )

  def _made_from(self, name: str) -> tuple[str, ...]:
    return inputs(self.networks[NETWORKS[name]].config) if name == 'prior' else ()

  def _key(self, name: str) -> tuple[str, str]:
    if face_crops.parse_name(name):
      return name, f'x{face_crops.ENLARGE:g}'
    shown = f'clip_embed_{self.clip_stride}' if name == 'clip_embed' else name
    return shown, self.networks[NETWORKS[name]].fingerprint

  def _rows(self, name: str, clips: Sequence[int]) -> Iterator[Item]:
    """Computes the rows of clips, in their order."""
    if size := face_crops.parse_name(name):
      yield from self._read(
        lambda clip, record: face_crops.of_record(record, size), clips
      )
      return
    network = self.networks[NETWORKS[name]]
    read, apply, finish = getattr(self, f'_{name}')(network)
    batch = self.batch * max(network.mesh.size, 1)
    for clip, rows in _batched(_on(network, apply), batch, self._read(read, clips)):
      yield clip, finish(clip, rows)

  def _read(
    self, read: Callable[[int, Any], Rows], clips: Sequence[int]
  ) -> Iterator[tuple[int, Rows]]:
    def one(clip):
      return (clip, read(clip, self.source[clip]))

    data = (
      grain.MapDataset.source(clips)
      .map(one)
      .to_iter_dataset(
        grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=self.threads)
      )
    )
    with contextlib.closing(iter(data)) as items:
      yield from items

  # Each feature: how to read a clip's rows, what the network does to a batch, and what
  # of the result is kept.

  def _latents(self, vae: Component):
    return lambda clip, record: clip_record.decode_frames(record), _mean, _all

  def _clip_embed(self, tower: Component):
    def read(clip, record):
      frames = clip_record.decode_frames(
        record, np.arange(0, int(record['num_frames']), self.clip_stride)
      )
      return np.stack(
        [image.clip_pixels(frame, tower.config.image_size) for frame in frames]
      )

    return read, _half, _all

  def _whisper(self, whisper: Component):
    def read(clip, record):  # windows of 30 s
      wave = clip_record.decode_audio(record)
      return (
        audio.log_mel(wave)
        if len(wave)
        else np.zeros((0, *audio.MEL_SHAPE), np.float32)
      )

    return (
      read,
      _half,
      lambda clip, states: _joined(states, int(self.source.table.num_frames[clip])),
    )

  def _prior(self, embedder: Component):
    config = embedder.config
    stored = {
      name: self.store.read_part(*self._key(name))
      for name in inputs(config)
      if not self.in_records(name)
    }

    def read(clip, record):
      seen, states = (
        stored[name](clip) if name in stored else record[name]
        for name in (face_crops.input_name(config), 'whisper')
      )
      seen = example_sampling.visual_rows(seen, config.visual_shape)
      return _windows(seen, states, int(record['num_frames']), config.max_len)

    return read, _gaussian, lambda clip, gaussians: gaussians.mean(0, keepdims=True)


def inputs(embedder: EmbedderConfig) -> tuple[str, ...]:
  """The features that an embedder reads.

  Expressions are none: they come in the records only.
  """
  return (*[face_crops.input_name(embedder)] * (embedder.visual == 'crops'), 'whisper')


def speech_states(whisper: Component, wave: np.ndarray, frames: int) -> np.ndarray:
  """The feature 'whisper' of a recording, 16 kHz `[samples]`, of so many frames at
  25 Hz: float16 `[2N,states,D]`.
  """
  return _joined(np.asarray(whisper.stage(_half)(audio.log_mel(wave))), frames)


def gaussian(embedder: Component, seen: np.ndarray, states: np.ndarray) -> np.ndarray:
  """The feature 'prior' of one clip (paper equations 2 to 6): float32 `[2,d_s]`, mean
  and standard deviation.

  A clip longer than `max_len` is embedded in windows of equal length, and their
  Gaussians averaged.

  Args:
    embedder: the component.
    seen: `[N,*visual_shape]` at 25 frames per second; N = 0 where it is missing.
    states: `[2N,states,D]` from `speech_states`; none where there is no sound.
  """
  windows = _windows(
    seen, states, len(seen) or len(states) // 2, embedder.config.max_len
  )
  return np.asarray(embedder.stage(_gaussian)(windows)).mean(0)


def _joined(states: np.ndarray, frames: int) -> np.ndarray:
  """Whisper's windows of 30 s one after another, without what is beyond the clip."""
  return states.reshape(-1, *states.shape[2:])[: 2 * frames]


def _windows(seen: np.ndarray, states: np.ndarray, frames: int, length: int) -> Rows:
  """What the embedder reads of a clip, in the fewest windows of at most `length`
  frames; all about equally long.
  """
  spans = np.array_split(np.arange(frames), -(-frames // length))

  def padded(x, rate):
    return np.stack(
      [
        np.pad(x, ((0, rate * length - len(x)), *[(0, 0)] * (x.ndim - 1)))
        for x in (x[rate * span[0] : rate * (span[-1] + 1)] for span in spans)
      ]
    )

  mask = np.array([np.arange(length) < len(span) for span in spans])
  has = [np.full(len(spans), len(x) > 0) for x in (seen, states)]
  return padded(seen, 1), padded(states, 2), mask, *has


def _all(clip, rows):
  return rows


def _mean(model, pixels):
  return model.encode(pixels / 127.5 - 1.0)[0].astype(jnp.float16)


def _half(model, x):
  return model(x).astype(jnp.float16)


def _gaussian(model, inputs):
  mu, var = model(*inputs)
  return jnp.stack([mu, jnp.sqrt(var)], axis=1)


def _on(
  network: Component, function: Callable[..., jax.Array]
) -> Callable[[Rows], jax.Array]:
  """`function` of a batch that is split over the network's mesh, if it has one."""
  stage = network.stage(function)
  if network.mesh.empty:
    return stage
  return lambda rows: stage(jax.device_put(rows, parallel.batch_sharding(network.mesh)))


def _batched(
  apply: Callable[[Rows], jax.Array], size: int, items: Iterator[tuple[int, Rows]]
) -> Iterator[Item]:
  """(clip, rows) to (clip, results `[n, ...]`) in the same order.

  Batches run over the borders of clips, and only the last is padded: one program serves
  all, and a clip of one row costs one row. One batch is computed while the next is
  read.
  """
  waiting: collections.deque[tuple[int, int]] = (
    collections.deque()
  )  # clips on their way, with their number of rows

  def join(a, b):
    return jax.tree.map(lambda x, y: np.concatenate([x, y]), a, b)

  def count(rows):
    return len(jax.tree.leaves(rows)[0])

  def batches() -> Iterator[Rows]:
    rest, sent = None, False
    for clip, rows in items:
      waiting.append((clip, count(rows)))
      rest = rows if rest is None else join(rest, rows)
      while count(rest) >= size:
        yield jax.tree.map(lambda x: x[:size], rest)
        rest, sent = jax.tree.map(lambda x: x[size:], rest), True
    if rest is not None and (count(rest) or not sent):
      yield jax.tree.map(
        lambda x: np.pad(x, ((0, size - len(x)), *[(0, 0)] * (x.ndim - 1))), rest
      )

  def results() -> Iterator[np.ndarray]:
    running = None
    for batch in batches():
      running, last = apply(batch), running
      if last is not None:
        yield np.asarray(last)
    if running is not None:
      yield np.asarray(running)

  done = None
  for result in results():
    done = result if done is None else np.concatenate([done, result])
    while waiting and waiting[0][1] <= len(done):
      clip, n = waiting.popleft()
      yield clip, done[:n]
      done = done[n:]


class _Progress(tqdm):
  """A bar of clips that also tells frames per second."""

  def __init__(self, name: str, clips: int, done: int):
    super().__init__(total=clips, initial=done, desc=name, unit='clip', mininterval=1)
    self.frames, self.began = 0, time.monotonic()

  def add(self, frames: int) -> None:
    self.frames += frames
    self.set_postfix_str(
      f'{self.frames / (time.monotonic() - self.began):.3g} frames/s', refresh=False
    )
    self.update()
