"""Latents become frames: decoded in chunks, and doubled if asked; or previewed."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from dicetalk_jax import parallel
from dicetalk_jax.component import Component
from dicetalk_jax.models import rife
from dicetalk_jax.models.taesdv import TAESDV, blank_memory
from dicetalk_jax.progress import Progress, silent
from dicetalk_jax.settings import Settings


class VideoDecoder:
  """Decodes the latents of one clip.

  Attributes:
    decode_chunks: compiled: latents `[chunks, frames, h, w, C]` to images in [0, 1].
    double: compiled: the previous frame `[1, H, W, 3]` and frames `[N, H, W, 3]` to
      `[2N + 1, H, W, 3]`, all of them with those between. None for a model that cannot.
  """

  def __init__(
    self,
    vae: Component,
    flownet: Component | None,
    settings: Settings,
    mesh: Mesh | None = None,
  ):
    self.settings = settings
    self.mesh = mesh
    self.decode_chunks = vae.stage(self._decode_chunks)
    self.double = None if flownet is None else flownet.stage(self._double)
    self._to_uint8 = jax.jit(_to_uint8)

  def frames(
    self,
    latents: jax.typing.ArrayLike,
    length: int,
    progress: Progress = silent,
    *,
    interpolate: bool = False,
    rounded: bool = True,
  ) -> Iterator[np.ndarray]:
    """Yields the frames of one clip, a few chunks at a time.

    Chunks do not see each other. The last frames share theirs with padding frames,
    which therefore are decoded too; without padding the last chunk is shorter, and one
    more program for each such length.

    Args:
      latents: `[T, h, w, C]`, T at least `length`; see `Pipeline.sample`.
      length: frames to decode.
      progress: called after every call of the decoder.
      interpolate: put a frame between every two; the model must have a `flownet`.
      rounded: to pixels, `255 x` truncated as published.

    Yields:
      `[n, H, W, 3]`, uint8, or if not rounded float32 in [0, 1]: `length` frames in
      all or, interpolated, `2 length - 1`.
    """
    z = np.asarray(latents)
    calls = self._plan(len(z), length)
    left = 2 * length - 1 if interpolate else length
    previous = None
    for done, call in enumerate(calls):
      progress('decoding', done, len(calls))

      # 1. Decode.
      count = call.last - call.first
      kept = slice(count)
      padding = ((0, call.size - count), (0, 0), (0, 0), (0, 0))
      padded = np.pad(z[call.first : call.last], padding)
      chunk = min(self.settings.decode_chunk, call.size)
      decoded = self.decode_chunks(padded.reshape(-1, chunk, *z.shape[1:]))
      decoded = decoded.reshape(-1, *decoded.shape[2:])

      # 2. Double: before each frame comes the one between it and its predecessor.
      if interpolate:
        assert self.double is not None
        if previous is None:  # the very first frame has no predecessor
          previous = decoded[:1]
          kept = slice(2, 2 * count + 1)
        else:
          kept = slice(1, 2 * count + 1)
        last = decoded[count - 1 : count]
        decoded = self.double(previous, decoded)
        previous = last

      # 3. Hand out what belongs to the clip.
      if rounded:
        decoded = self._to_uint8(decoded)
      frames = np.asarray(decoded)[kept][:left]
      left -= len(frames)
      yield frames
    progress('decoding', len(calls), len(calls))

  def _plan(self, total: int, length: int) -> list['_Call']:
    """The calls of the decoder for `length` of `total` latents."""
    chunk = self.settings.decode_chunk
    whole_chunks = -(-length // chunk) * chunk
    padded = length + self.settings.sampler.padding_frames
    wanted = min(total, padded, whole_chunks)
    end = wanted - wanted % chunk
    size = chunk * (parallel.batch_devices(self.mesh) if self.mesh else 1)
    calls = [
      _Call(first, min(first + size, end), size) for first in range(0, end, size)
    ]
    if wanted > end:
      calls.append(_Call(end, wanted, wanted - end))
    return calls

  def _decode_chunks(self, vae: Any, latents: jax.Array) -> jax.Array:
    """[-1, 1] comes out of the autoencoder; float32 in [0, 1] is returned."""
    scaled = latents / self.settings.sampler.scaling_factor
    images = vae.decode(self._spread(scaled))
    return jnp.clip(images.astype(jnp.float32) * 0.5 + 0.5, 0, 1)

  def _double(self, flownet: Any, previous: jax.Array, frames: jax.Array) -> jax.Array:
    sequence = jnp.concatenate([previous, frames])
    return rife.double(flownet, sequence, len(frames), self._spread)

  def _spread(self, x: jax.Array) -> jax.Array:
    """Lays chunks out over the mesh, if they divide over its devices."""
    if self.mesh is None or len(x) % parallel.batch_devices(self.mesh):
      return x
    return jax.lax.with_sharding_constraint(x, parallel.batch_sharding(self.mesh))


class PreviewDecoder:
  """Decodes the latents of one clip with TAESDV: quickly and roughly.

  Attributes:
    decode: compiled: latents `[1, frames, h, w, C]` and the memory of those before to
      frames, uint8 `[frames, H, W, 3]`, and the memory for those after.
  """

  def __init__(self, taesdv: Component, settings: Settings):
    self.settings = settings
    self.config = taesdv.config
    self.decode = taesdv.stage(_decode_preview)

  def frames(
    self, latents: jax.typing.ArrayLike, length: int, progress: Progress = silent
  ) -> Iterator[np.ndarray]:
    """Yields the frames of one clip, uint8 `[n, H, W, 3]`, a few at a time.

    Each call remembers the frames of the call before, so that nothing is seen of where
    one ends. Arguments as of `VideoDecoder.frames`.
    """
    z = np.asarray(latents)[:length]
    _, height, width, _ = z.shape
    memory = blank_memory(self.config, 1, height, width)
    chunk = min(self.settings.decode_chunk, length)
    starts = range(0, length, chunk)
    for done, first in enumerate(starts):
      progress('decoding', done, len(starts))
      kept = z[first : first + chunk]
      padding = ((0, chunk - len(kept)), (0, 0), (0, 0), (0, 0))
      frames, memory = self.decode(np.pad(kept, padding)[None], memory)
      yield np.asarray(frames)[: len(kept)]
    progress('decoding', len(starts), len(starts))


def _decode_preview(
  taesdv: TAESDV, latents: jax.Array, memory: Sequence[jax.Array]
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  frames, memory = taesdv.decode(latents, memory)
  levels = jnp.round(255 * jnp.clip(frames[0], 0, 1))
  return levels.astype(jnp.uint8), memory


class _Call(NamedTuple):
  """One call of the decoder: frames `first` to `last`, padded to `size`."""

  first: int
  last: int
  size: int


def _to_uint8(images: jax.Array) -> jax.Array:
  """[0, 1] to pixels, truncated as published."""
  return (255 * images).astype(jnp.uint8)
