"""Runs the frozen networks over a data set and stores their outputs.

Rows of consecutive clips share batches, each split over the devices of the network's
mesh; clips are read ahead in threads. `python -m data_pipelines.precompute` does this
on all devices and processes; training does it at its start for whatever is still
missing.
"""

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import os
import time
from typing import Any, NamedTuple, cast

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
from dicetalk_jax.models.clip import CLIPVisionConfig
from dicetalk_jax.models.embedder import EmbedderConfig

# Feature -> the component that computes it; 'prior' is made from what `inputs` names.
# Crops, such as 'crops_64', need none.
NETWORKS = {
  'latents': 'vae',
  'clip_embed': 'image_encoder',
  'whisper': 'whisper',
  'prior': 'embedder',
}
CLIP_STRIDE = 5  # every fifth frame has a CLIP token and may be a reference
BATCH = 16  # rows per device and call

Rows = Any  # one array or a tuple of arrays [n, ...]


class _Recipe(NamedTuple):
  """How a network computes a feature.

  Attributes:
    read: gives a clip's rows from its index and record.
    apply: runs the model on a batch of rows.
    finish: makes the feature from a clip's index and its results.
  """

  read: Callable[[int, Any], Rows]
  apply: Callable[..., jax.Array]
  finish: Callable[[int, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class FeatureExtractor:
  """The features of one data set under the networks of one model.

  Attributes:
    networks: component -> network, at least those that `NETWORKS` names for the
      features asked for and for what these are made from.
    source: the clips.
    folder: root of all features.
    clip_stride: frames per CLIP token.
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
    """Where the features are."""
    return FeatureStore(self.folder, self.source.fingerprint)

  def load_or_compute(self, *names: str) -> dict[str, Feature]:
    """Opens features, after computing this process's share of what is missing and
    waiting for the other processes.

    Args:
      *names: of features; those that the records carry are left out.

    Returns:
      The features by name.

    Raises:
      DataError: see `compute_missing`; or other processes do not do their share.
    """
    stored = [name for name in names if not self.in_records(name)]
    for name in stored:
      self.compute_missing(name)
    clips = len(self.source)
    return {name: self.store.wait(*self._key(name), clips) for name in stored}

  def in_records(self, name: str) -> bool:
    """Whether the feature is in the records.

    Priors are always computed: an embedder that was trained again gives others.

    Raises:
      DataError: the feature in the records is of another network or stride.
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
    """Feature, settings and network: the name of the feature's folder."""
    return '-'.join(self._key(name))

  def compute_missing(self, name: str) -> bool:
    """Computes what is missing of this process's share of one feature.

    Per clip of N frames: 'latents' float16 `[N,h,w,c]`, posterior means, unscaled;
    'clip_embed' float16 `[ceil(N/clip_stride),D]`; 'whisper' float16 `[2N,states,D]` at
    50 Hz, no rows for a clip without audio; 'crops_<S>' uint8 `[N,S,S,3]`, no rows for
    a clip without pixels; 'prior' float32 `[1,2,d_s]`, mean and standard deviation from
    the modalities that the clip has (see `gaussian`), after what it is made from.

    Returns:
      Whether the feature is now complete.

    Raises:
      DataError: see `check`; or a network gives values that are not finite.
    """
    self.check(name)
    if self.in_records(name):
      return True
    index, count = self.shard or (jax.process_index(), jax.process_count())
    clips = len(self.source)
    share = len(range(index, clips, count))
    return self.store.fill(
      *self._key(name),
      clips,
      lambda missing: self._computed(name, missing, share),
      (index, count),
    )

  def _computed(self, name: str, missing: Sequence[int], share: int) -> Iterator[Item]:
    """Computes a feature for missing clips, of a share of so many, and shows progress.

    Raises:
      DataError: a network gives values that are not finite.
    """
    for other in self._made_from(name):
      self.compute_missing(other)
    table = self.source.table
    title = f'{name} ({self.source.split})'
    with _Progress(title, share, share - len(missing)) as progress:
      for clip, rows in self._rows(name, missing):
        if not np.isfinite(rows).all():
          raise DataError(
            f'{name} of clip {table.clip_id[clip]} is not finite in {rows.dtype}; '
            f'check the clip and the weights of {NETWORKS[name]}'
          )
        yield clip, rows
        progress.add(int(table.num_frames[clip]))

  def check(self, name: str) -> None:
    """Refuses a feature that cannot be made from the records.

    Raises:
      DataError: the data set has no pixels, or expressions of another width than the
        embedder reads.
    """
    if self.in_records(name) or self.store.complete(*self._key(name)):
      return
    for other in self._made_from(name):
      self.check(other)
    if name == 'prior':
      self._check_expressions()
    if not self._has_pixels(name):
      raise DataError(
        f'{self.source} has no pixels, which {name} is made from; prepare the data set '
        'with content=full'
      )

  def _check_expressions(self) -> None:
    config = _embedder_config(self.networks['embedder'])
    width = self.source.expression_dim
    if config.visual == 'expression' and width not in (0, config.expr_dim):
      raise DataError(
        f'the clips of {self.source} have {width} expression coefficients per frame, '
        f'but the embedder reads {config.expr_dim}; prepare the data set with those '
        'that it was trained on, or take another embedder'
      )

  def _has_pixels(self, name: str) -> bool:
    """Whether the clips have the pixels that a feature is made from, if any."""
    first = self.source[0].get('frames')
    if name in ('latents', 'clip_embed'):
      return bool(first)
    if face_crops.parse_name(name):  # some of the clips are enough
      return first is not None and any(len(record['frames']) for record in self.source)
    return True

  def _made_from(self, name: str) -> tuple[str, ...]:
    if name != 'prior':
      return ()
    return inputs(_embedder_config(self.networks['embedder']))

  def _key(self, name: str) -> tuple[str, str]:
    """Name and component of the feature in the store."""
    if face_crops.parse_name(name):
      return name, f'x{face_crops.ENLARGE:g}'
    stored_name = f'clip_embed_{self.clip_stride}' if name == 'clip_embed' else name
    return stored_name, self.networks[NETWORKS[name]].fingerprint

  def _rows(self, name: str, clips: Sequence[int]) -> Iterator[Item]:
    """Computes the rows of clips, in their order."""
    if size := face_crops.parse_name(name):
      yield from self._read(
        lambda clip, record: face_crops.of_record(record, size), clips
      )
      return
    network = self.networks[NETWORKS[name]]
    recipe = self._recipe(name)
    batch = self.batch * max(network.mesh.size, 1)
    apply = _on_mesh(network, recipe.apply)
    for clip, rows in _batched(apply, batch, self._read(recipe.read, clips)):
      yield clip, recipe.finish(clip, rows)

  def _read(
    self, read: Callable[[int, Any], Rows], clips: Sequence[int]
  ) -> Iterator[tuple[int, Rows]]:
    """(clip, rows), read ahead in threads."""
    data = (
      grain.MapDataset.source(clips)
      .map(lambda clip: (clip, read(clip, self.source[clip])))
      .to_iter_dataset(
        grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=self.threads)
      )
    )
    with contextlib.closing(iter(data)) as items:
      yield from items

  def _recipe(self, name: str) -> _Recipe:
    if name == 'latents':
      return _Recipe(_read_frames, _mean_latents, _unchanged)
    if name == 'clip_embed':
      return _Recipe(self._read_clip_pixels, _in_half_precision, _unchanged)
    if name == 'whisper':
      return _Recipe(_read_log_mel, _in_half_precision, self._join_states)
    return self._prior_recipe()

  def _read_clip_pixels(self, clip: int, record: Any) -> np.ndarray:
    config = cast(CLIPVisionConfig, self.networks['image_encoder'].config)
    rows = range(0, int(record['num_frames']), self.clip_stride)
    frames = clip_record.decode_frames(record, rows)
    return np.stack([image.clip_pixels(frame, config.image_size) for frame in frames])

  def _join_states(self, clip: int, states: np.ndarray) -> np.ndarray:
    return _joined(states, int(self.source.table.num_frames[clip]))

  def _prior_recipe(self) -> _Recipe:
    config = _embedder_config(self.networks['embedder'])
    stored = {
      name: self.store.read_part(*self._key(name))
      for name in inputs(config)
      if not self.in_records(name)
    }

    def rows_of(name: str, clip: int, record: Any) -> np.ndarray:
      return stored[name](clip) if name in stored else record[name]

    def read(clip: int, record: Any) -> Rows:
      seen = rows_of(face_crops.input_name(config), clip, record)
      seen = example_sampling.visual_rows(seen, config.visual_shape)
      states = rows_of('whisper', clip, record)
      return _windows(seen, states, int(record['num_frames']), config.max_len)

    def average(clip: int, gaussians: np.ndarray) -> np.ndarray:
      return gaussians.mean(0, keepdims=True)

    return _Recipe(read, _gaussian, average)


def inputs(embedder: EmbedderConfig) -> tuple[str, ...]:
  """The features that an embedder reads, besides expressions from the records."""
  if embedder.visual == 'crops':
    return face_crops.input_name(embedder), 'whisper'
  return ('whisper',)


def speech_states(whisper: Component, wave: np.ndarray, frames: int) -> np.ndarray:
  """The feature 'whisper' of a recording.

  Args:
    whisper: the component.
    wave: 16 kHz `[samples]`.
    frames: N, its length at 25 Hz.

  Returns:
    float16 `[2N,states,D]`.
  """
  states = whisper.stage(_in_half_precision)(audio.log_mel(wave))
  return _joined(np.asarray(states), frames)


def gaussian(embedder: Component, seen: np.ndarray, states: np.ndarray) -> np.ndarray:
  """The feature 'prior' of one clip (paper equations 2 to 6).

  A clip longer than `max_len` is embedded in windows of equal length, and their
  Gaussians are averaged.

  Args:
    embedder: the component.
    seen: `[N,*visual_shape]` at 25 frames per second; N = 0 where it is missing.
    states: `[2N,states,D]` from `speech_states`; no rows where there is no audio.

  Returns:
    float32 `[2,d_s]`, mean and standard deviation.
  """
  frames = len(seen) or len(states) // 2
  windows = _windows(seen, states, frames, _embedder_config(embedder).max_len)
  return np.asarray(embedder.stage(_gaussian)(windows)).mean(0)


def _embedder_config(embedder: Component) -> EmbedderConfig:
  """The type of a component's configuration follows from its name."""
  return cast(EmbedderConfig, embedder.config)


def _read_frames(clip: int, record: Any) -> np.ndarray:
  return clip_record.decode_frames(record)


def _read_log_mel(clip: int, record: Any) -> np.ndarray:
  """Windows of 30 s."""
  wave = clip_record.decode_audio(record)
  if not len(wave):
    return np.zeros((0, *audio.MEL_SHAPE), np.float32)
  return audio.log_mel(wave)


def _joined(states: np.ndarray, frames: int) -> np.ndarray:
  """Whisper's windows of 30 s one after another, without what is beyond the clip."""
  return states.reshape(-1, *states.shape[2:])[: 2 * frames]


def _windows(seen: np.ndarray, states: np.ndarray, frames: int, length: int) -> Rows:
  """A clip as the embedder reads it.

  The clip is divided into the fewest windows of at most `length` frames, all about
  equally long.

  Returns:
    Expressions or crops, Whisper states, mask of frames, and whether there are
    expressions or crops, and states; one row per window.
  """
  spans = np.array_split(np.arange(frames), -(-frames // length))

  def padded(x: np.ndarray, rate: int) -> np.ndarray:
    windows = np.zeros((len(spans), rate * length, *x.shape[1:]), x.dtype)
    for window, span in zip(windows, spans):
      rows = x[rate * span[0] : rate * (span[-1] + 1)]
      window[: len(rows)] = rows
    return windows

  mask = np.array([np.arange(length) < len(span) for span in spans])
  has_seen = np.full(len(spans), len(seen) > 0)
  has_states = np.full(len(spans), len(states) > 0)
  return padded(seen, 1), padded(states, 2), mask, has_seen, has_states


def _unchanged(clip: int, rows: np.ndarray) -> np.ndarray:
  return rows


def _mean_latents(model: Any, pixels: jax.Array) -> jax.Array:
  return model.encode(pixels / 127.5 - 1.0)[0].astype(jnp.float16)


def _in_half_precision(model: Any, x: jax.Array) -> jax.Array:
  return model(x).astype(jnp.float16)


def _gaussian(model: Any, inputs: tuple[jax.Array, ...]) -> jax.Array:
  mu, var = model(*inputs)
  return jnp.stack([mu, jnp.sqrt(var)], axis=1)


def _on_mesh(
  network: Component, function: Callable[..., jax.Array]
) -> Callable[[Rows], jax.Array]:
  """`function` of a batch that is split over the network's mesh, if it has one."""
  stage = network.stage(function)
  if network.mesh.empty:
    return stage
  sharding = parallel.batch_sharding(network.mesh)
  return lambda rows: stage(jax.device_put(rows, sharding))


class _Awaited(NamedTuple):
  """A clip whose rows are on their way through the network."""

  clip: int
  rows: int


def _batched(
  apply: Callable[[Rows], Any], size: int, items: Iterable[tuple[int, Rows]]
) -> Iterator[Item]:
  """(clip, rows) to (clip, results `[n, ...]`) in the same order.

  Batches run over the borders of clips, and only the last is padded: one program serves
  all, and a clip of one row costs one row. One batch is computed while the next is
  read.
  """
  awaited: collections.deque[_Awaited] = collections.deque()
  done = None
  for result in _one_ahead(apply, _full_batches(size, items, awaited)):
    done = result if done is None else np.concatenate([done, result])
    while awaited and awaited[0].rows <= len(done):
      clip, rows = awaited.popleft()
      yield clip, done[:rows]
      done = done[rows:]


def _full_batches(
  size: int, items: Iterable[tuple[int, Rows]], awaited: collections.deque[_Awaited]
) -> Iterator[Rows]:
  """Batches of `size` rows; the last is padded. Clips are noted as awaited.

  There is at least one batch if there are any items: the shape of no rows is known from
  its result.
  """
  rest = None
  sent = False
  for clip, rows in items:
    awaited.append(_Awaited(clip, _count(rows)))
    rest = rows if rest is None else _concatenated(rest, rows)
    while _count(rest) >= size:
      yield jax.tree.map(lambda x: x[:size], rest)
      rest = jax.tree.map(lambda x: x[size:], rest)
      sent = True
  if rest is not None and (_count(rest) or not sent):
    yield jax.tree.map(lambda x: _padded(x, size), rest)


def _one_ahead(
  apply: Callable[[Rows], Any], batches: Iterable[Rows]
) -> Iterator[np.ndarray]:
  """Results in order; the next batch is read before one is waited for."""
  running = None
  for batch in batches:
    last = running
    running = apply(batch)
    if last is not None:
      yield np.asarray(last)
  if running is not None:
    yield np.asarray(running)


def _count(rows: Rows) -> int:
  return len(jax.tree.leaves(rows)[0])


def _concatenated(a: Rows, b: Rows) -> Rows:
  return jax.tree.map(lambda x, y: np.concatenate([x, y]), a, b)


def _padded(x: np.ndarray, size: int) -> np.ndarray:
  return np.pad(x, ((0, size - len(x)), *[(0, 0)] * (x.ndim - 1)))


class _Progress(tqdm):
  """A bar of clips that also shows frames per second."""

  def __init__(self, name: str, clips: int, done: int):
    super().__init__(total=clips, initial=done, desc=name, unit='clip', mininterval=1)
    self.frames = 0
    self.began = time.monotonic()

  def add(self, frames: int) -> None:
    """Counts a clip of so many frames."""
    self.frames += frames
    rate = self.frames / (time.monotonic() - self.began)
    self.set_postfix_str(f'{rate:.3g} frames/s', refresh=False)
    self.update()
