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

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from dicetalk_jax import device_memory, parallel, sampler_file
from dicetalk_jax.bundle import Folder, ModelFolder
from dicetalk_jax.component import Component
from dicetalk_jax.conditioning import ConditionEncoder
from dicetalk_jax.decoding import PreviewDecoder, VideoDecoder
from dicetalk_jax.diffusion.sampler import Conditions, draw_noise, make_sampler
from dicetalk_jax.errors import ConfigError
from dicetalk_jax.job import Job
from dicetalk_jax.models import parameters, registry, target
from dicetalk_jax.progress import Progress, silent
from dicetalk_jax.sampler_file import ExportedSampler
from dicetalk_jax.settings import INTERPOLATION, PREVIEW, Settings

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
    previewer: the same with TAESDV, or None.
  """

  def __init__(
    self,
    folder: Folder,
    networks: dict[str, Component],
    settings: Settings,
    mesh: Mesh | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    samplers: Sequence[ExportedSampler] = (),
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

    self.previewer = None
    if PREVIEW in networks:
      self.previewer = PreviewDecoder(networks[PREVIEW], settings)

    unet = networks['unet']
    self._sample = functools.partial(
      make_sampler(unet.graphdef, settings.sampler, mesh), unet.params
    )
    self._exported = [
      (sampler, functools.partial(sampler, unet.params)) for sampler in samplers
    ]
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
    samplers: Sequence[str | os.PathLike] = (),
    fill_memory: bool = False,
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
      samplers: files of `python -m dicetalk_jax.export_sampler`. Clips of their shapes
        are sampled without tracing, all others as without them.
      fill_memory: let a call of the network take as many windows as the memory of the
        devices holds by prediction, instead of the model's `windows_per_call`. Results
        differ by rounding. Without effect on devices that do not report their memory.
      **sampling: changes to the folder's `SamplerConfig`.

    Raises:
      ConfigError: the folder is of an unknown kind, the sampler cannot work as asked,
        or an exported one was made for something else.
      InputError: the file of an exported sampler is missing or damaged.
      WeightsError: a component is missing or damaged.
    """
    folder = ModelFolder.open(folder)
    settings = Settings.of(folder, **sampling)
    folder.require(*settings.components)
    if samplers and fill_memory:
      raise ConfigError(
        f'{samplers[0]} has its number of windows already; leave out fill_memory, or '
        'the exported sampler'
      )
    exported = _exported(samplers, folder, settings, mesh, dtype)
    names = [*settings.components]
    names += [name for name in (INTERPOLATION, PREVIEW) if name in folder.components]
    networks = {}
    for done, name in enumerate(names):
      progress('loading', done, len(names))
      networks[name] = Component.load(folder, name, mesh, **_types(name, dtype))
    progress('loading', len(names), len(names))
    if fill_memory:
      settings = _filling_memory(settings, networks, mesh)
    return cls(folder, networks, settings, mesh, dtype, exported)

  @classmethod
  def abstract(
    cls,
    folder: Folder,
    dtype: jax.typing.DTypeLike | None = None,
    **sampling: Any,
  ) -> 'Pipeline':
    """Like `load`, with shapes for parameters: to trace with, not to generate."""
    folder = ModelFolder.open(folder)
    settings = Settings.of(folder, **sampling)
    folder.require(*settings.components)
    networks = {
      name: Component.abstract(folder, name, **_types(name, dtype))
      for name in settings.components
    }
    return cls(folder, networks, settings, dtype=dtype)

  def export_sampler(
    self, platform: str, batch: int, length: int, size: tuple[int, int]
  ) -> ExportedSampler:
    """The sampler of one shape, for a file; see `sampler_file`.

    Args:
      platform: 'cpu', 'cuda' or 'tpu', whatever this machine has.
      batch: number of clips.
      length: frames of the longest; others of its bucket are served too.
      size: (width, height) of the frames.
    """
    unet = self.networks['unet']
    with target.compiling_for('cpu'):  # shapes are the same on all platforms
      conditions = self.encoder.shapes(batch, length, size)
    return sampler_file.export_sampler(
      unet.graphdef,
      unet.params,
      self.settings.sampler,
      conditions,
      platform,
      sampler_file.fingerprint(self.folder),
    )

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
      **options: `prior`, `face_box`, `face_index`, `seed`, `noise`, `interpolate`,
        `preview`; see `Job.check`.

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
      interpolation and in previews.
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
    if job.preview:
      return self.preview(latents[0], length, progress), self.settings.fps
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
      sample = self._sampler_for(x)
      progress('sampling', 0, steps)
      if progress is silent:  # one call instead of many, of the same program
        return jax.block_until_ready(sample(x, conditions, clip_lengths, 0, steps))
      for step in range(steps):
        x = sample(x, conditions, clip_lengths, step, step + 1)
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

  def preview(
    self, latents: jax.typing.ArrayLike, length: int, progress: Progress = silent
  ) -> np.ndarray:
    """All frames of one clip, roughly; see `PreviewDecoder`."""
    assert self.previewer is not None, f'the model folder has no {PREVIEW}'
    return np.concatenate([*self.previewer.frames(latents, length, progress)])

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

  def _sampler_for(self, noise: jax.Array) -> Callable[..., jax.Array]:
    """An exported sampler of this shape, or else the traced one."""
    for exported, sample in self._exported:
      if exported.fits(noise):
        return sample
    return self._sample

  def _on_mesh(self) -> contextlib.AbstractContextManager[Any]:
    return jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext()


def compute_dtype(platform: str) -> jax.typing.DTypeLike | None:
  """What commands compute in: float32 (None) on CPUs, bfloat16 on accelerators."""
  return None if platform == 'cpu' else jnp.bfloat16


def _types(name: str, dtype: jax.typing.DTypeLike | None) -> dict[str, Any]:
  """How `Component.load` is to load a component."""
  if name in IN_COMPUTE_DTYPE and dtype is not None:
    return {'dtype': dtype, 'param_dtype': dtype}
  return {'param_dtype': jnp.float32}


def _filling_memory(
  settings: Settings, networks: dict[str, Component], mesh: Mesh | None
) -> Settings:
  """Settings with as many windows per call as the devices hold.

  Frames are taken to be up to 16:9. Which of their sides is longer does not matter.
  """
  unet = networks['unet']
  vae = networks['vae'].config
  side = settings.image_size // 2 ** (len(vae.block_out_channels) - 1)
  itemsize = jnp.dtype(sampler_file.params_dtype(unet.params)).itemsize
  size = device_memory.window_bytes(
    unet.config, settings.sampler, side, -(-16 * side // 9), itemsize
  )
  devices = jax.local_devices()[:1] if mesh is None else mesh.local_devices
  fitting = [device_memory.windows_that_fit(device, size) for device in devices]
  known = [windows for windows in fitting if windows is not None]
  if not known:
    return settings
  count = min(known) * (parallel.batch_devices(mesh) if mesh else 1)
  sampler = dataclasses.replace(settings.sampler, windows_per_call=count)
  return dataclasses.replace(settings, sampler=sampler)


def _exported(
  paths: Sequence[str | os.PathLike],
  folder: ModelFolder,
  settings: Settings,
  mesh: Mesh | None,
  dtype: jax.typing.DTypeLike | None,
) -> list[ExportedSampler]:
  """Reads exported samplers, and refuses those that were made for something else."""
  if paths and mesh is not None:
    raise ConfigError(
      f'{paths[0]} runs on one device, the mesh has {mesh.size}; leave out one of them'
    )
  exported = []
  for path in paths:
    sampler = ExportedSampler.load(path)
    wanted = jnp.dtype(_types('unet', dtype)['param_dtype']).name
    sampler.check(path, folder, settings.sampler, wanted)
    exported.append(sampler)
  return exported


def _vae_in(dtype: jax.typing.DTypeLike | None, vae: Component) -> Component:
  """The autoencoder computing in `dtype`, from the same parameters."""
  builder = registry.builder('vae', vae.config.to_json(), dtype)
  graphdef, _ = parameters.abstract(builder)
  return dataclasses.replace(vae, graphdef=graphdef)
