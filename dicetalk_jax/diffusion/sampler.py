"""The denoising loop: cyclic windows, three guidance branches and Euler steps.

`make_sampler` returns one compiled program; read it first. The formulas that it uses
are in `edm` (preconditioning), `guidance`, `schedule` (noise levels, Euler step) and
`windows` (window positions and their shift).

Clip lengths are data: a batch is padded to a common number of audio frames (its
bucket), each clip carries its own length, and other lengths in the same bucket compile
nothing. Source: the sampling pipeline of the reference implementation, without its
redundant work (keys and values of the conditions are projected once per call, instead
of once per step, window and pixel).
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import typing
from typing import Any, NamedTuple

from flax import nnx, struct
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, ArrayLike, Float, Int, Key
import numpy as np

from dicetalk_jax import parallel
from dicetalk_jax.diffusion import edm, guidance, schedule, windows
from dicetalk_jax.errors import ConfigError
from dicetalk_jax.models import parameters, target
from dicetalk_jax.models.attention import KeyValue

# Keys and values by layer. Their axis 1 counts unique tokens or, once gathered, the
# frames of a window.
Tables = dict[str, tuple[KeyValue, ...]]


@dataclasses.dataclass(frozen=True)
class SamplerConfig(parameters.ModelConfig):
  """How to sample; the defaults are the settings of the reference implementation.

  Attributes:
    num_steps: noise levels from `sigma_max` to `sigma_min`.
    frames: window length F.
    overlap: frames that neighbouring windows of a step share.
    shift: how far the windows move from one step to the next.
    padding: append `frames` padding frames to every clip, and shift modulo `frames`.
      Sonic does neither: its windows wrap from the end of a clip to its start.
    g_image, g_condition: guidance weights of the image, and of audio with emotion; a
      pair changes linearly from the first step to the last.
    strength: 1 runs all steps; less starts from the portrait with less noise and runs
      the last `num_steps * strength`.
    scaling_factor: of the autoencoder; sampled latents are scaled by it, reference
      latents are not.
    adapter_scales: weights of the audio and the emotion attention.
    windows_per_call: windows per clip that one call of the network sees, to bound
      memory; None = all of a step.
  """

  num_steps: int = 25
  frames: int = 25
  overlap: int = 0
  shift: int = 7
  padding: bool = True
  g_image: float | tuple[float, float] = 3.0
  g_condition: float | tuple[float, float] = 6.0
  sigma_min: float = 0.002
  sigma_max: float = 700.0
  strength: float = 1.0
  scaling_factor: float = 0.18215
  adapter_scales: tuple[float, float] = (1.0, 1.0)
  windows_per_call: int | None = None

  def __post_init__(self) -> None:
    if not 0 < self.strength <= 1 or self.steps_run < 1:
      raise ConfigError(
        f'num_steps={self.num_steps} with strength={self.strength} leaves nothing to '
        'do; use at least one step and a strength of at most 1'
      )
    if not 0 <= self.overlap < self.frames:
      raise ConfigError(
        f'overlap={self.overlap} must be at least 0 and less than frames={self.frames}'
      )
    if self.windows_per_call is not None and self.windows_per_call < 1:
      raise ConfigError(
        f'windows_per_call={self.windows_per_call} must be at least 1, or None for all'
      )

  @property
  def steps_run(self) -> int:
    """The number of steps that are run: all, unless `strength` is below 1."""
    return int(self.num_steps * self.strength)

  @property
  def padding_frames(self) -> int:
    """The number of padding frames after every clip."""
    return self.frames if self.padding else 0


@struct.dataclass
@typing.no_type_check  # JAX also builds it of shapes, shardings and axes
class Conditions:
  """Everything that steers a batch of clips, computed once per clip.

  N counts audio frames of the bucket, K tokens, D their width; h, w is the latent size.

  Attributes:
    reference_latents: mode of the portrait's posterior, not multiplied by the
      autoencoder's scaling factor.
    image_token: the portrait's CLIP token.
    audio_tokens: tokens of each frame; frames beyond a clip's length are ignored.
    null_audio: tokens of silence, a constant of the weights.
    emotion_tokens: None for a network without emotions.
    null_emotion: tokens of "no emotion", a constant of the weights.
    masks: the face mask at each level of the network.
    spatial: pose guider features.
    added_time_ids: three numbers per clip, or per frame: a window gets the mean over
      its frames (without padding).
  """

  reference_latents: Float[Array, 'B h w C']
  image_token: Float[Array, 'B 1 D']
  audio_tokens: Float[Array, 'B N K D']
  null_audio: Float[Array, 'K D']
  emotion_tokens: Float[Array, 'B K D'] | None
  null_emotion: Float[Array, 'K D'] | None
  masks: tuple[Float[Array, 'B tokens'], ...] | None
  spatial: Float[Array, 'B h w C0'] | None
  added_time_ids: Float[Array, 'B 3'] | Float[Array, 'B N 3']


def join_conditions(clips: Sequence[Conditions]) -> Conditions:
  """Makes one batch of the conditions of several clips, padded to the same bucket."""
  joined: Conditions = jax.tree.map(lambda *parts: jnp.concatenate(parts), *clips)
  return dataclasses.replace(
    joined, null_audio=clips[0].null_audio, null_emotion=clips[0].null_emotion
  )


def draw_noise(
  keys: Key[Array, ' B'], conditions: Conditions, padding: int
) -> Float[Array, 'B T h w C']:
  """Draws the start noise, float32, from one key per clip; T = N + `padding`.

  Each frame folds its number into its clip's key, so neither the bucket nor the rest of
  the batch matters.
  """
  frames = conditions.audio_tokens.shape[1] + padding
  frame_shape = conditions.reference_latents.shape[1:]

  def draw_frame(key: Array, frame: Array) -> Array:
    return jax.random.normal(jax.random.fold_in(key, frame), frame_shape)

  def draw_clip(key: Array) -> Array:
    return jax.vmap(functools.partial(draw_frame, key))(jnp.arange(frames))

  return jax.vmap(draw_clip)(keys)


class Step(NamedTuple):
  """The values that change from step to step."""

  sigma: Float[Array, '']
  sigma_next: Float[Array, '']
  timestep: Float[Array, '']
  g_image: Float[Array, '']
  g_condition: Float[Array, '']
  shift: Int[Array, '']


class Plan(NamedTuple):
  """The values of all steps; fields as in `Step`."""

  sigma: Float[np.ndarray, ' steps']
  sigma_next: Float[np.ndarray, ' steps']
  timestep: Float[np.ndarray, ' steps']
  g_image: Float[np.ndarray, ' steps']
  g_condition: Float[np.ndarray, ' steps']
  shift: Int[np.ndarray, ' steps']

  def step(self, i: Int[ArrayLike, '']) -> Step:
    """The values of step i."""
    return Step(*(jnp.asarray(values)[i] for values in self))


def make_plan(config: SamplerConfig) -> Plan:
  """Computes noise levels, guidance weights and window shifts of the steps to run."""
  steps = config.steps_run
  sigmas = schedule.karras_sigmas(config.num_steps, config.sigma_min, config.sigma_max)
  sigmas = sigmas[-steps - 1 :]
  return Plan(
    sigma=sigmas[:-1],
    sigma_next=sigmas[1:],
    timestep=schedule.timesteps(sigmas),
    g_image=guidance.weights(config.g_image, steps),
    g_condition=guidance.weights(config.g_condition, steps),
    shift=windows.shifts(
      steps, config.shift, config.frames if config.padding else None
    ),
  )


def make_sampler(
  graphdef: nnx.GraphDef[Any], config: SamplerConfig, mesh: Mesh | None = None
) -> Callable[..., Array]:
  """Compiles the sampler of one network.

  Args:
    graphdef: structure of the network, from `parameters.abstract` or
      `parameters.split`. Any module with the UNet's `context_kv` and `__call__` will
      do.
    config: see `SamplerConfig`.
    mesh: from `parallel.make_mesh`; the windows of a step are spread over its devices.

  Returns:
    Jitted `sample(params, x, conditions, lengths, first=0, last=steps_run) -> latents`:
    * params: the network's flat parameters.
    * x: standard normal noise `[B, T, h, w, C]`, see `draw_noise`. T = N +
      padding_frames, where N counts the audio frames of `conditions`.
    * conditions: see `Conditions`.
    * lengths: int `[B]`, frames of each clip, at most N.
    * latents: float32 like x, still scaled; a clip's own frames come first, then its
      padding frames, which the last decoded frames need; the rest is zero.
    * first, last: the steps to run. They are data: a caller who shows progress runs one
      step at a time, passing the result back as x, with the same program and the same
      result. Each call projects the conditions again.
  """
  plan = make_plan(config)

  # Return latents replicated, as they came in, so the next call reuses the program.
  replicated = None if mesh is None else NamedSharding(mesh, PartitionSpec())

  @functools.partial(
    jax.jit, out_shardings=replicated, compiler_options=target.compiler_options()
  )
  def sample(
    params: parameters.Params,
    x: Float[Array, 'B T h w C'],
    conditions: Conditions,
    lengths: Int[Array, ' B'],
    first: Int[ArrayLike, ''] = 0,
    last: Int[ArrayLike, ''] = config.steps_run,
  ) -> Float[Array, 'B T h w C']:
    # 1. Project the conditions to keys and values, once per call, for all its steps and
    # windows.
    unet = parameters.merge(graphdef, params)
    tables = context_tables(unet, conditions)

    # 2. Count the frames of each clip, and the calls of the network per step.
    totals = lengths + config.padding_frames
    per_call = _windows_per_call(config, x.shape[0], x.shape[1], mesh)
    most_windows = windows.count(totals.max(), config.frames, config.overlap)
    calls = -(-most_windows // per_call)

    # 3. Start from the portrait's latents under noise of the first level.
    x = x.astype(jnp.float32)
    portrait = conditions.reference_latents.astype(jnp.float32)[:, None]
    start = config.scaling_factor * portrait + x * plan.sigma[0]
    latents = jnp.where(first == 0, start, x)

    # 4. Denoise, from noise level to noise level.
    def denoise(i: Array, latents: Array) -> Array:
      """Steps each window independently, then averages overlaps."""
      now = plan.step(i)

      def add_windows(n: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        # 4a. Cut windows out of the clips, shifted by this step's shift.
        numbers = n * per_call + jnp.arange(per_call)
        index, exists = jax.vmap(
          lambda total: windows.indices(
            numbers, now.shift, total, config.frames, config.overlap
          )
        )(totals)
        z = jax.vmap(lambda clip, frames: clip[frames])(latents, index)

        # 4b. Run the network on the guidance branches, and combine them.
        v = guided_output(
          unet, config, now, z, index, tables, conditions, lengths, mesh
        )

        # 4c. Step to the next noise level.
        stepped = schedule.euler_step(z, v, now.sigma, now.sigma_next)
        return jax.vmap(windows.accumulate)(*sums, stepped, index, exists)

      # 4d. Average the frames that several windows visited.
      zeros = jnp.zeros_like(latents), jnp.zeros(latents.shape[:2], jnp.int32)
      return windows.average(*lax.fori_loop(0, calls, add_windows, zeros))

    denoised: Array = lax.fori_loop(first, last, denoise, latents)
    return denoised

  return sample


def guided_output(
  unet: Callable[..., tuple[Array, Any]],
  config: SamplerConfig,
  now: Step,
  z: Float[Array, 'B W F h w C'],
  index: Int[Array, 'B W F'],
  tables: Tables,
  conditions: Conditions,
  lengths: Int[Array, ' B'],
  mesh: Mesh | None,
) -> Float[Array, 'B W F h w C']:
  """Computes the network's guided output for windows of all clips.

  Args:
    unet: the network.
    config: see `SamplerConfig`.
    now: the values of this step.
    z: the noisy windows.
    index: their frames.
    tables: from `context_tables`.
    conditions: see `Conditions`.
    lengths: frames of each clip.
    mesh: over whose devices the rows are spread.

  Returns:
    float32.
  """
  batch, count, frames, *size = z.shape
  needed = guidance.needed(config.g_image)
  shape = (batch, count, len(needed), frames, *size)

  # 1. Put the branches side by side: noisy latents, then reference latents.
  scaled = (z * edm.c_in(now.sigma))[:, :, None]
  has_image = guidance.HAS_IMAGE[needed, None, None, None, None]
  reference = conditions.reference_latents[:, None, None, None] * has_image
  noisy = jnp.broadcast_to(scaled, shape)
  sample = jnp.concatenate([noisy, jnp.broadcast_to(reference, shape)], axis=-1)
  sample = _spread(_rows(sample), mesh)

  # 2. Give each row the conditions of its frames and its branch.
  branches = len(needed)
  kv = _spread(gather_contexts(tables, index, lengths, needed), mesh)
  ids = _spread(_time_ids(conditions.added_time_ids, index, branches), mesh)
  spatial = None
  if conditions.spatial is not None:
    spatial = _spread(_repeat(conditions.spatial[:, None], count, branches), mesh)
  masks = None
  if conditions.masks is not None:
    masks = tuple(
      _spread(_repeat(mask, count, branches), mesh) for mask in conditions.masks
    )

  # 3. Run the network.
  v, _ = unet(
    sample,
    now.timestep,
    kv,
    ids,
    spatial_condition=spatial,
    masks=masks,
    adapter_scales=config.adapter_scales,
  )

  # 4. Combine the branches.
  v = v.astype(jnp.float32).reshape(shape)
  return guidance.combine(v, now.g_image, now.g_condition, axis=2)


def context_tables(unet: Any, conditions: Conditions) -> Tables:
  """Computes cross-attention keys and values of the unique tokens, for every layer.

  Axis 1 of a table counts the tokens' variants. Image: nothing, portrait. Audio: the N
  frames, silence. Emotion: none, the wanted one.
  """
  image_token = conditions.image_token
  audio_tokens = conditions.audio_tokens
  batch = len(image_token)

  def null(tokens: Array) -> Array:
    tokens = jnp.broadcast_to(tokens, (batch, 1, *tokens.shape))
    return tokens.astype(audio_tokens.dtype)

  image = jnp.stack([jnp.zeros_like(image_token), image_token], axis=1)
  audio = jnp.concatenate([audio_tokens, null(conditions.null_audio)], axis=1)
  contexts = [image, audio]
  if conditions.emotion_tokens is not None:
    assert conditions.null_emotion is not None, 'both or neither'
    wanted = conditions.emotion_tokens[:, None].astype(audio.dtype)
    none = null(conditions.null_emotion)
    contexts.append(jnp.concatenate([none, wanted], axis=1))
  tables: Tables = unet.context_kv(*contexts)
  return tables


def gather_contexts(
  tables: Tables,
  index: Int[Array, 'B W F'],
  lengths: Int[Array, ' B'],
  branches: Sequence[int] | Int[np.ndarray, ' branches'] = range(guidance.BRANCHES),
) -> Tables:
  """Looks up the keys and values of each window's frames, for all branches.

  Args:
    tables: from `context_tables`.
    index: frames of each window.
    lengths: frames of each clip; later ones are padding.
    branches: those that run, see `guidance.needed`.

  Returns:
    By layer, keys and values `[rows, F or 1, K, channels]` of each context.
  """
  batch, count, _ = index.shape
  needed = np.asarray(branches)
  is_padding = (index >= lengths[:, None, None])[:, :, None]  # [B, W, 1, F]
  has_no_audio_emotion = guidance.HAS_AUDIO_EMOTION[needed, None] == 0
  unconditional = is_padding | has_no_audio_emotion  # [B, W, branch, F]
  image_variant = jnp.broadcast_to(
    guidance.HAS_IMAGE[needed, None], (batch, count, len(needed), 1)
  )

  def pick(table: Array, variant: Array) -> Array:
    return _rows(jax.vmap(lambda entries, i: entries[i])(table, variant))

  def gather_layer(contexts: Sequence[KeyValue]) -> tuple[KeyValue, ...]:
    silence = contexts[1].key.shape[1] - 1
    audio_variant = jnp.where(unconditional, silence, index[:, :, None])
    emotion_variant = jnp.where(unconditional, 0, 1)
    variants = (image_variant, audio_variant, emotion_variant)
    return tuple(
      KeyValue(pick(context.key, variant), pick(context.value, variant))
      for context, variant in zip(contexts, variants)
    )

  return {name: gather_layer(contexts) for name, contexts in tables.items()}


def _time_ids(
  ids: Array, index: Int[Array, 'B W F'], branches: int
) -> Float[Array, 'rows 3']:
  """The time ids of each row; see `Conditions`."""
  if ids.ndim == 2:
    return _repeat(ids, index.shape[1], branches)
  means = jax.vmap(lambda clip, frames: clip[frames].mean(-2))(ids, index)  # [B, W, 3]
  batch, count, width = means.shape
  shape = (batch, count, branches, width)
  return _rows(jnp.broadcast_to(means[:, :, None], shape))


def _windows_per_call(
  config: SamplerConfig, batch: int, total: int, mesh: Mesh | None
) -> int:
  """Windows per call: `config.windows_per_call`, or all, rounded up so that windows x
  clips x branches divide over the devices.
  """
  devices = 1 if mesh is None else parallel.batch_devices(mesh)
  count = windows.count(total, config.frames, config.overlap)
  if config.windows_per_call is not None:
    count = min(count, config.windows_per_call)
  branches = len(guidance.needed(config.g_image))
  while count * batch * branches % devices:
    count += 1
  return count


def _rows(x: Float[Array, 'B W branch *shape']) -> Float[Array, 'rows *shape']:
  """Joins clips, windows and branches to the network's batch."""
  return x.reshape(-1, *x.shape[3:])


def _repeat(
  x: Float[Array, 'B *shape'], count: int, branches: int
) -> Float[Array, 'rows *shape']:
  """Repeats what all windows and branches of a clip share."""
  shape = (len(x), count, branches, *x.shape[1:])
  return _rows(jnp.broadcast_to(x[:, None, None], shape))


def _spread(rows: Any, mesh: Mesh | None) -> Any:
  """Lays rows out over the mesh."""
  if mesh is None:
    return rows
  return lax.with_sharding_constraint(rows, parallel.batch_sharding(mesh))
