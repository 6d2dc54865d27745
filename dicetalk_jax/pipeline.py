"""A model in memory: portrait, speech and emotion become a video.

    pipe = Pipeline.load('model')
    image, wave = load_image('face.jpg'), load_audio('speech.wav')
    frames, fps = pipe.generate(image, wave, emotion='happy')

A request passes through four stages, one call each: `job` -> `conditions` -> `sample`
-> `decode`.

The stages after `job` run compiled functions of fixed shapes; clip lengths are rounded
up to buckets, so that clip after clip compiles nothing new. Frames come at the model's
own rate, 12.5 per second as published, or, where the model folder has a `flownet`, at
twice that. A folder of Sonic, DICE-Talk's predecessor, is used the same way, but
without an emotion.
"""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from dicetalk_jax.bundle import Folder, ModelFolder
from dicetalk_jax.component import Component
from dicetalk_jax.conditioning import ConditionEncoder
from dicetalk_jax.decoding import VideoDecoder
from dicetalk_jax.diffusion.sampler import Conditions, draw_noise, make_sampler
from dicetalk_jax.job import Job
from dicetalk_jax.models import parameters, registry
from dicetalk_jax.progress import Progress, silent
from dicetalk_jax.settings import INTERPOLATION, Settings

# Components whose parameters are cast to `dtype`. All others keep float32 parameters;
# of them only the autoencoder computes in `dtype`: its decoder, and its encoder too
# unless `Settings.upcast_vae`.
IN_COMPUTE_DTYPE = ('unet', 'image_encoder', 'pose_guider')


class Pipeline:
  """A model that is ready to generate. Make it with `Pipeline.load`.

  Attributes:
    folder: where it is from.
    networks: its components by name.
    settings: see `Settings`.
    mesh: the devices that share the windows and the chunks of a clip, or None.
    encoder: from a job to conditions.
    decoder: from latents to frames.
  """

  def __init__(
    self,
    folder: Folder,
    networks: dict[str, Component],
    settings: Settings,
    mesh: Mesh | None = None,
    dtype: jax.typing.DTypeLike | None = None,
  ):
    self.folder = ModelFolder.open(folder)
    self.networks = networks
    self.settings = settings
    self.mesh = mesh

    vae = networks['vae']
    decoding_vae = _vae_in(dtype, vae)
    encoding_vae = vae if settings.upcast_vae else decoding_vae
    self.encoder = ConditionEncoder(networks | {'vae': encoding_vae}, settings)
    self.decoder = VideoDecoder(
      decoding_vae, networks.get(INTERPOLATION), settings, mesh
    )

    unet = networks['unet']
    self._sample = functools.partial(
      make_sampler(unet.graphdef, settings.sampler, mesh), unet.params
    )
    self._draw = jax.jit(draw_noise, static_argnums=2)
    self._place = (
      NamedSharding(mesh, PartitionSpec()) if mesh else jax.local_devices()[0]
    )

  @classmethod
  def load(
    cls,
    folder: Folder,
    mesh: Mesh | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    *,
    progress: Progress = silent,
    **sampling: Any,
  ) -> 'Pipeline':
    """Reads a model folder.

    Args:
      folder: see `bundle`.
      mesh: from `parallel.make_mesh`: the windows of a clip and its chunks are spread
        over it.
      dtype: compute type of UNet, decoder, image encoder and pose guider, such as
        bfloat16 on accelerators; None for float32. Speech, emotion and interpolation
        are always computed in float32, and so is, for DICE-Talk, the encoding of the
        portrait (`Settings.upcast_vae`).
      progress: called after every component.
      **sampling: changes to the folder's `SamplerConfig`.

    Raises:
      ConfigError: the folder is of an unknown kind, or the sampler cannot work as
        asked.
      WeightsError: a component is missing or damaged.
    """
    folder = ModelFolder.open(folder)
    settings = Settings.of(folder, **sampling)
    folder.require(*settings.components)
    names = [*settings.components]
    if INTERPOLATION in folder.components:
      names.append(INTERPOLATION)
    networks = {}
    for done, name in enumerate(names):
      progress('loading', done, len(names))
      if name in IN_COMPUTE_DTYPE and dtype is not None:
        types = {'dtype': dtype, 'param_dtype': dtype}
      else:
        types = {'param_dtype': jnp.float32}
      networks[name] = Component.load(folder, name, mesh, **types)
    progress('loading', len(names), len(names))
    return cls(folder, networks, settings, mesh, dtype)

  def job(
    self,
    image: np.ndarray,
    wave: np.ndarray,
    emotion: str | None = None,
    **options: Any,
  ) -> Job:
    """Checks what a video is to be made from; see `Job.check`."""
    return Job.check(self.folder, self.settings, image, wave, emotion, **options)

  def generate(
    self,
    image: np.ndarray,
    wave: np.ndarray,
    emotion: str | None = None,
    *,
    progress: Progress = silent,
    **options: Any,
  ) -> tuple[np.ndarray, float]:
    """A talking portrait.

    Args:
      image: the portrait, uint8 RGB `[H0, W0, 3]`.
      wave: the speech, float32 `[samples]`, 16 kHz mono.
      emotion: one of the model folder's; a Sonic model takes none.
      progress: called with (stage, done, total) while sampling and decoding.
      **options: `prior`, `face_box`, `face_index`, `seed`, `noise`, `interpolate`; see
        `Job.check`.

    Returns:
      See `run`.

    Raises:
      InputError, WeightsError: see `Job.check`.
    """
    return self.run(self.job(image, wave, emotion, **options), progress)

  def run(self, job: Job, progress: Progress = silent) -> tuple[np.ndarray, float]:
    """Makes the video of a job.

    Returns:
      uint8 `[N, H, W, 3]` and frames per second: as published 25, or 12.5 without
      interpolation.
    """
    conditions, length = self.conditions(job)
    if job.noise is None:
      keys = jax.random.key(job.seed)[None]
      latents = self.sample(conditions, [length], keys, progress)
    else:
      bucket_padding = conditions.audio_tokens.shape[1] - length
      padding = ((0, bucket_padding), (0, 0), (0, 0), (0, 0))
      noise = np.pad(np.float32(job.noise), padding)
      latents = self.denoise(noise[None], conditions, [length], progress)
    frames = self.decode(latents[0], length, progress, interpolate=job.interpolate)
    return frames, self.settings.fps * (2 if job.interpolate else 1)

  def conditions(self, job: Job) -> tuple[Conditions, int]:
    """Everything that steers one clip; see `ConditionEncoder.encode`."""
    with self._on_mesh():
      return self.encoder.encode(job)

  def sample(
    self,
    conditions: Conditions,
    lengths: Sequence[int],
    keys: jax.Array,
    progress: Progress = silent,
  ) -> jax.Array:
    """The latents of a batch of clips; see `make_sampler`.

    Args:
      conditions: one or several clips, padded to the same bucket.
      lengths: int `[B]`, frames of each clip.
      keys: `[B]`, one random key per clip: a clip's result does not depend on its
        neighbours.
      progress: called after every step.

    Returns:
      float32 `[B, N + padding_frames, h, w, C]`.
    """
    with self._on_mesh():
      noise = self._draw(keys, conditions, self.settings.sampler.padding_frames)
    return self.denoise(noise, conditions, lengths, progress)

  def denoise(
    self,
    noise: jax.typing.ArrayLike,
    conditions: Conditions,
    lengths: Sequence[int],
    progress: Progress = silent,
  ) -> jax.Array:
    """Like `sample`, from noise `[B, N + padding_frames, h, w, C]`."""
    with self._on_mesh():
      # Committed to its place, like the result of a step: one program for the first
      # step and the others.
      x = jax.device_put(noise, self._place)
      clip_lengths = jnp.asarray(lengths)
      steps = self.settings.sampler.steps_run
      progress('sampling', 0, steps)
      if progress is silent:  # one call instead of many, of the same program
        return jax.block_until_ready(
          self._sample(x, conditions, clip_lengths, 0, steps)
        )
      for step in range(steps):
        x = self._sample(x, conditions, clip_lengths, step, step + 1)
        jax.block_until_ready(x)
        progress('sampling', step + 1, steps)
      return x

  def frames(
    self,
    latents: jax.typing.ArrayLike,
    length: int,
    progress: Progress = silent,
    **options: bool,
  ) -> Iterator[np.ndarray]:
    """Yields the frames of one clip, `[n, H, W, 3]`; see `VideoDecoder.frames`."""
    return self.decoder.frames(latents, length, progress, **options)

  def decode(
    self,
    latents: jax.typing.ArrayLike,
    length: int,
    progress: Progress = silent,
    **options: bool,
  ) -> np.ndarray:
    """All frames of one clip, `[N, H, W, 3]`; see `VideoDecoder.frames`."""
    return np.concatenate([*self.frames(latents, length, progress, **options)])

  def reconstruct(self, frames: np.ndarray) -> np.ndarray:
    """Frames through the autoencoder and back: the best that the model could draw.

    uint8 `[N, H, W, 3]`, both ways.
    """
    encode = self.encoder.stages['vae']
    with self._on_mesh():
      latents = np.concatenate(
        [encode(frame[None] / np.float32(127.5) - 1) for frame in frames]
      )
    return self.decode(latents * self.settings.sampler.scaling_factor, len(frames))

  def _on_mesh(self) -> contextlib.AbstractContextManager[Any]:
    return jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext()


def _vae_in(dtype: jax.typing.DTypeLike | None, vae: Component) -> Component:
  """The autoencoder computing in `dtype`, from the same parameters."""
  builder = registry.builder('vae', vae.config.to_json(), dtype)
  graphdef, _ = parameters.abstract(builder)
  return dataclasses.replace(vae, graphdef=graphdef)
