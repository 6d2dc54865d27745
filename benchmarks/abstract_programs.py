"""Programs as training and sampling make them, on shapes of the published sizes.

Nothing is allocated, compiled or run. Devices need not be there, and are not asked.
"""

import contextlib
import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import ml_collections

from benchmarks.memory_table import abstract_step, batch_shapes, diffusion_task
from dicetalk_jax import component, parallel
from dicetalk_jax.diffusion import sampler
from dicetalk_jax.diffusion.face_mask import mask_pyramid
from dicetalk_jax.models import parameters, registry, target
from dicetalk_jax.pipeline import IN_COMPUTE_DTYPE, Pipeline
from dicetalk_jax.settings import INTERPOLATION, KINDS, Settings
from dicetalk_jax.training.autoencoder import AutoencoderTask
from dicetalk_jax.training.embedder import EmbedderTask

Shape = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class Program:
  """A jitted function with the shapes of its arguments, and the mesh it runs on."""

  run: Any
  args: tuple[Any, ...]
  mesh: Any = None

  def lower(self, platform: str) -> tuple[str, Any]:
    """The program as StableHLO for that platform, and the shapes of its results."""
    with self.context(), target.compiling_for(platform):
      traced = self.run.trace(*self.args)
      lowered = traced.lower(lowering_platforms=(platform,))
      return lowered.as_text(), traced.out_info

  def context(self) -> contextlib.AbstractContextManager:
    """Sets the mesh."""
    return _set(self.mesh)


def _set(mesh: Any) -> contextlib.AbstractContextManager:
  if mesh is None:
    return contextlib.nullcontext()
  if isinstance(mesh, jax.sharding.AbstractMesh):
    return jax.sharding.use_abstract_mesh(mesh)
  return jax.set_mesh(mesh)


def training(make: Any, config: ml_collections.ConfigDict, mesh: Any) -> Program:
  """The training step of the task that `make(config)` returns with its parameters."""
  with _set(mesh):
    return Program(*abstract_step(*make(config), mesh), mesh)


def diffusion(
  config: ml_collections.ConfigDict,
) -> tuple[Any, parameters.Abstract, Any]:
  """Task, parameters and batch."""
  return *diffusion_task(config), batch_shapes(config)


def autoencoder(
  config: ml_collections.ConfigDict,
) -> tuple[Any, parameters.Abstract, Any]:
  """Task, parameters and batch."""
  task = AutoencoderTask.__new__(AutoencoderTask)  # without data
  task.config = config
  task.graphdef, params = parameters.abstract(
    registry.builder('vae', config.vae.to_dict(), config.dtype)
  )
  video = Shape((config.batch_size, config.data.frames, 512, 512, 3), jnp.float32)
  return task, parameters.add_prefix('vae', params), {'video': video}


def embedder(config: ml_collections.ConfigDict) -> tuple[Any, parameters.Abstract, Any]:
  """Task, parameters and batch."""
  task = EmbedderTask.__new__(EmbedderTask)  # without data and Whisper
  task.config = config
  task.graphdef, params = parameters.abstract(
    registry.builder('embedder', config.embedder.to_dict(), config.dtype)
  )
  model = registry.config_of('embedder', config.embedder.to_dict())
  frames = config.data.max_len
  seen = jnp.uint8 if model.visual == 'crops' else jnp.float32
  batch = {
    'expr': ((frames, *model.visual_shape), seen),
    'whisper': ((2 * frames, model.whisper_states, model.whisper_dim), jnp.float16),
    'frame_mask': ((frames,), bool),
    'has_video': ((), bool),
    'has_audio': ((), bool),
  }
  for name in ('dataset', 'identity', 'emotion', 'level', 'video'):
    batch[name] = (), jnp.int32
  rows = {
    name: Shape((config.batch_size, *shape), dtype)
    for name, (shape, dtype) in batch.items()
  }
  return task, parameters.add_prefix('embedder', params), rows


def pipeline(kind: str, mesh: jax.sharding.Mesh | None) -> Pipeline:
  """A pipeline of the published sizes in bfloat16 whose parameters are shapes."""
  configs = {'unet': {'adapters': 1}} if kind == 'sonic' else {}
  networks = {
    name: _network(
      name,
      configs.get(name, {}),
      mesh,
      jnp.bfloat16 if name in IN_COMPUTE_DTYPE else None,
    )
    for name in (*KINDS[kind], INTERPOLATION)
  }
  padding = kind == 'dicetalk'
  settings = Settings(
    kind=kind,
    upcast_vae=padding,
    sampler=sampler.SamplerConfig(windows_per_call=1, padding=padding),
  )
  return Pipeline('nowhere', networks, settings, mesh, jnp.bfloat16)


def _network(
  name: str, config: dict[str, Any], mesh: jax.sharding.Mesh | None, dtype: Any
) -> component.Component:
  graphdef, params = _abstract(name, tuple(config.items()), dtype)
  if dtype is not None:
    params = {key: Shape(x.shape, dtype) for key, x in params.items()}
  if mesh is not None:
    params = parallel.with_shardings(params, parallel.shardings(params, mesh))
  return component.Component(
    registry.config_of(name, config), graphdef, params, mesh or component.NO_MESH
  )


@functools.cache
def _abstract(
  name: str, config: tuple, dtype: Any
) -> tuple[nnx.GraphDef, parameters.Abstract]:
  return parameters.abstract(registry.builder(name, dict(config), dtype))


class Stages:
  """The stages of a pipeline, one after the other, each as it is called.

  Attributes:
    pipe: from `pipeline`.
    programs: by name of the stage.
  """

  def __init__(self, pipe: Pipeline):
    self.pipe = pipe
    self.programs: dict[str, Program] = {}

  def stage(self, name: str, stage: Any, component: str, *args: Any) -> Any:
    """Adds a stage of a component; returns the shapes of its results."""
    (run,) = stage.args
    return self.add(name, run, self.pipe.networks[component].params, *args)

  def sample(self, conditions: sampler.Conditions) -> Any:
    """Adds the sampler."""
    settings = self.pipe.settings.sampler
    frames = conditions.audio_tokens.shape[1] + settings.padding_frames
    sharding = self.pipe._place if self.pipe.mesh else None
    x = Shape(
      (1, frames, *conditions.reference_latents.shape[1:]),
      jnp.float32,
      sharding=sharding,
    )
    lengths = Shape((1,), jnp.int32)
    sample = self.pipe._sample
    return self.add(
      'sample', sample.func, *sample.args, x, conditions, lengths, 0, settings.steps_run
    )

  def conditions(self, frames: int) -> sampler.Conditions:
    """Adds what makes the conditions of a clip at 512 pixels; returns their shapes."""
    pipe = self.pipe
    size = pipe.settings.image_size
    sonic = pipe.settings.kind == 'sonic'

    def stage(name: str, component: str, *args: Any) -> Any:
      return self.stage(name, pipe.encoder.stages[component], component, *args)

    # Image.
    pixels = functools.partial(Shape, dtype=jnp.float32)
    latents = stage('encode', 'vae', pixels((1, size, size, 3)))
    side = pipe.networks['image_encoder'].config.image_size
    token = stage('image_token', 'image_encoder', pixels((1, side, side, 3)))
    mask = pixels((1, size, size))
    masks = jax.eval_shape(
      lambda mask: mask_pyramid(
        mask, latents.shape[1:3], pipe.networks['unet'].config.levels
      ),
      mask,
    )
    spatial = None if sonic else stage('guide', 'pose_guider', mask)

    # Audio.
    states = stage('states', 'whisper', pixels((1, 3000, 80)))
    *_, layers, width = states.shape
    audio, silence = stage(
      'audio_tokens', 'audio_linear', pixels((1, frames, 10, layers, width))
    )
    ids = pixels((1, 3))
    if sonic:
      motion = stage('motion', 'audio2bucket', pixels((1, frames, 50, 1, width)), token)
      ids = pixels((*motion.shape[:2], 3))

    # Emotion.
    emotion = nothing = None
    if not sonic:
      emotion, nothing = stage('emotion_tokens', 'emo_model', pixels((1, 256)))
    return sampler.Conditions(
      reference_latents=latents,
      image_token=token,
      audio_tokens=audio,
      null_audio=silence,
      emotion_tokens=emotion,
      null_emotion=nothing,
      masks=masks,
      spatial=spatial,
      added_time_ids=ids,
    )

  def decode(self, latents: jax.ShapeDtypeStruct) -> None:
    """Adds the decoder of frames, and what doubles them."""
    groups = parallel.batch_devices(self.pipe.mesh) if self.pipe.mesh else 1
    chunk = self.pipe.settings.decode_chunk
    clips = Shape((groups, chunk, *latents.shape[2:]), jnp.float32)
    decoder = self.pipe.decoder
    frames = self.stage('decode', decoder.decode_chunks, 'vae', clips)
    frames = Shape((groups * chunk, *frames.shape[2:]), frames.dtype)
    before = Shape((1, *frames.shape[1:]), frames.dtype)
    self.stage('double', decoder.double, INTERPOLATION, before, frames)

  def add(self, name: str, run: Any, *args: Any) -> Any:
    """Adds a program; returns the shapes of its results."""
    program = Program(run, args, self.pipe.mesh)
    self.programs[name] = program
    return self.shapes(name, program)

  def shapes(self, name: str, program: Program) -> Any:
    """The shapes of the results of a program."""
    with program.context():
      shapes = jax.eval_shape(program.run, *program.args)
    return jax.tree.map(lambda x: Shape(x.shape, x.dtype), shapes)
