"""The denoising loop: windows with cyclic wrap, three guidance branches, Euler steps;
one compiled program.

Clip lengths are data: a batch is padded to a common number of audio frames (its
bucket), each clip carries its own length, and other lengths in the same bucket compile
nothing. Source: the published sampling pipeline, with its redundant work removed (keys
and values of the conditions are projected once, not per step, window and pixel).
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

from flax import nnx, struct
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dicetalk_jax import parallel
from dicetalk_jax.diffusion import edm, guidance, schedule, windows
from dicetalk_jax.errors import ConfigError
from dicetalk_jax.models import parameters


@dataclasses.dataclass(frozen=True)
class SamplerConfig(parameters.ModelConfig):
  """How to sample; the defaults are the published settings.

  Attributes:
    num_steps: noise levels from `sigma_max` to `sigma_min`.
    frames: window length F.
    overlap: frames that neighbouring windows of a step share.
    shift: how far the windows move from one step to the next.
    padding: put `frames` padding frames behind every clip, and shift modulo `frames`.
      Sonic does neither: its windows wrap from the end of a clip to its start.
    g_image, g_condition: guidance weights of appearance, and of audio with emotion; a
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

  def __post_init__(self):
    if not 0 < self.strength <= 1 or int(self.num_steps * self.strength) < 1:
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
    """How many steps are run: all, unless `strength` is below 1."""
    return int(self.num_steps * self.strength)

  @property
  def padding_frames(self) -> int:
    """How many frames are sampled behind every clip."""
    return self.frames if self.padding else 0


@struct.dataclass
class Conditions:
  """Everything that steers a batch of clips, computed once per clip.

  N counts audio frames of the bucket, K tokens, D their width, h, w the latent size.
  """

  reference_latents: (
    jax.Array
  )  # [B, h, w, C] mode of the portrait's posterior, unscaled
  image_token: jax.Array  # [B, 1, D]
  audio_tokens: jax.Array  # [B, N, K, D]; frames beyond a clip's length are ignored
  null_audio: jax.Array  # [K, D] tokens of silence, a constant of the weights
  emotion_tokens: jax.Array | None  # [B, K, D]; None for a network without emotions
  null_emotion: jax.Array | None  # [K, D]
  masks: (
    tuple[jax.Array, ...] | None
  )  # face mask at each level of the network, [B, tokens]
  spatial: jax.Array | None  # [B, h, w, C0] pose guider features
  added_time_ids: (
    jax.Array
  )  # [B, 3], or [B, N, 3]: a window gets the mean over its frames (without padding)


def draw_noise(keys: jax.Array, conditions: Conditions, padding: int) -> jax.Array:
  """Start noise, float32 `[B, N + padding, h, w, C]`, from one key per clip, `[B]`.

  Each frame folds its number into its clip's key, so neither the bucket nor the rest of
  the batch matters.
  """
  total, shape = (
    conditions.audio_tokens.shape[1] + padding,
    conditions.reference_latents.shape[1:],
  )

  def frame(key, t):
    return jax.random.normal(jax.random.fold_in(key, t), shape)

  return jax.vmap(lambda key: jax.vmap(lambda t: frame(key, t))(jnp.arange(total)))(
    keys
  )


def context_tables(unet: nnx.Module, c: Conditions) -> dict[str, tuple]:
  """Cross-attention keys and values of the unique tokens, for every layer: tables over
  axis 1.

  Image: nothing, portrait. Audio: N frames, silence. Emotion: none, wanted.
  """
  batch = len(c.image_token)

  def null(tokens):
    return jnp.broadcast_to(tokens, (batch, 1, *tokens.shape)).astype(
      c.audio_tokens.dtype
    )

  image = jnp.stack([jnp.zeros_like(c.image_token), c.image_token], axis=1)
  audio = jnp.concatenate([c.audio_tokens, null(c.null_audio)], axis=1)
  if c.emotion_tokens is None:
    return unet.context_kv(image, audio)
  emotion = jnp.concatenate(
    [null(c.null_emotion), c.emotion_tokens[:, None].astype(audio.dtype)], axis=1
  )
  return unet.context_kv(image, audio, emotion)


def _rows(x: jax.Array) -> jax.Array:
  """`[B, W, branch, ...]` -> `[B * W * branch, ...]`, the network's batch."""
  return x.reshape(-1, *x.shape[3:])


def _repeat(x: jax.Array, count: int) -> jax.Array:
  """`[B, ...]` -> `[B * W * branch, ...]`: the same for all windows and branches."""
  return _rows(
    jnp.broadcast_to(x[:, None, None], (len(x), count, guidance.BRANCHES, *x.shape[1:]))
  )


def _gather(
  tables: dict[str, tuple], index: jax.Array, lengths: jax.Array
) -> dict[str, tuple]:
  """Keys and values for windows with frame `index [B, W, F]`: per layer `[rows, F or
  1, K, channels]` each.
  """
  batch, count, _ = index.shape
  padding = (index >= lengths[:, None, None])[:, :, None]  # [B, W, 1, F]
  silent = padding | (guidance.HAS_MOTION[:, None] == 0)  # [B, W, branch, F]
  image = jnp.broadcast_to(
    guidance.HAS_APPEARANCE[:, None], (batch, count, guidance.BRANCHES, 1)
  )

  def pick(table, frames):
    return _rows(jax.vmap(lambda t, i: t[i])(table, frames))

  def layer(image_kv, audio_kv, *emotion_kv):
    audio = jnp.where(silent, audio_kv[0].shape[1] - 1, index[:, :, None])
    frames = image, audio, jnp.where(silent, 0, 1)
    return tuple(
      tuple(pick(t, i) for t in kv)
      for kv, i in zip((image_kv, audio_kv, *emotion_kv), frames)
    )

  return {name: layer(*kv) for name, kv in tables.items()}


def _time_ids(ids: jax.Array, index: jax.Array) -> jax.Array:
  """`[rows, 3]` for windows with frame `index [B, W, F]`; see `Conditions`."""
  if ids.ndim == 2:
    return _repeat(ids, index.shape[1])
  means = jax.vmap(lambda clip, i: clip[i].mean(-2))(ids, index)  # [B, W, 3]
  return _rows(
    jnp.broadcast_to(
      means[:, :, None], (*means.shape[:2], guidance.BRANCHES, means.shape[-1])
    )
  )


def make_sampler(
  graphdef: nnx.GraphDef, config: SamplerConfig, mesh: Mesh | None = None
) -> Callable[..., jax.Array]:
  """Compiles the sampler of one network.

  Args:
    graphdef: structure of the network, from `core.abstract` or `core.split`. Any module
      with the UNet's `context_kv` and `__call__` will do.
    config: see `SamplerConfig`.
    mesh: from `parallel.make_mesh`; the windows of a step are spread over its devices.

  Returns:
    Jitted `sample(params, x, conditions, lengths, first=0, last=steps_run) -> latents`:
    * params: the network's flat parameters.
    * x: standard normal noise `[B, N + padding_frames, h, w, C]`, see `draw_noise`.
    * conditions: see `Conditions`.
    * lengths: int `[B]`, frames of each clip, at most N.
    * latents: float32 like x, still scaled; a clip's own frames come first, then its
      padding frames, which the last decoded frames need; what lies behind is zero.
    * first, last: the steps to run. They are data: a caller who shows progress runs one
      step at a time, passing the result back as x, with the same program and the same
      result.
  """
  sigmas = schedule.karras_sigmas(config.num_steps, config.sigma_min, config.sigma_max)[
    -config.steps_run - 1 :
  ]
  plan = dict(
    sigma=sigmas[:-1],
    sigma_next=sigmas[1:],
    timestep=schedule.timesteps(sigmas),
    g_image=guidance.weights(config.g_image, config.steps_run),
    g_condition=guidance.weights(config.g_condition, config.steps_run),
    shift=windows.shifts(
      config.steps_run, config.shift, config.frames if config.padding else None
    ),
  )

  devices = 1 if mesh is None else parallel.batch_devices(mesh)

  def spread(rows: Any) -> Any:
    """Lays rows out over the mesh."""
    return (
      rows
      if mesh is None
      else lax.with_sharding_constraint(rows, parallel.batch_sharding(mesh))
    )

  def windows_per_call(batch: int, total: int) -> int:
    """As configured, rounded up until the rows divide over the devices."""
    count = windows.count(total, config.frames, config.overlap)
    count = min(count, config.windows_per_call or count)
    while count * batch * guidance.BRANCHES % devices:
      count += 1
    return count

  def guided(unet, z, index, tables, c, lengths, now):
    """The network's guided output for the noisy windows `z [B, W, F, h, w, C]`."""
    batch, count, frames, *size = z.shape
    noisy = jnp.broadcast_to(
      (z * edm.c_in(now['sigma']))[:, :, None],
      (batch, count, guidance.BRANCHES, frames, *size),
    )
    reference = (
      c.reference_latents[:, None, None, None]
      * guidance.HAS_APPEARANCE[:, None, None, None, None]
    )
    sample = jnp.concatenate([noisy, jnp.broadcast_to(reference, noisy.shape)], axis=-1)
    v, _ = unet(
      spread(_rows(sample)),
      now['timestep'],
      spread(_gather(tables, index, lengths)),
      spread(_time_ids(c.added_time_ids, index)),
      spatial_condition=None
      if c.spatial is None
      else spread(_repeat(c.spatial[:, None], count)),
      masks=None
      if c.masks is None
      else tuple(spread(_repeat(m, count)) for m in c.masks),
      adapter_scales=config.adapter_scales,
    )
    v = v.astype(jnp.float32).reshape(batch, count, guidance.BRANCHES, frames, *size)
    return guidance.combine(v, now['g_image'], now['g_condition'], axis=2)

  # Latents leave as they came, on every device, so that they can come again: see
  # `first`.
  @functools.partial(
    jax.jit,
    out_shardings=None if mesh is None else NamedSharding(mesh, PartitionSpec()),
  )
  def sample(params, x, conditions, lengths, first=0, last=config.steps_run):
    unet = parameters.merge(graphdef, params)
    tables = context_tables(unet, conditions)
    per_call = windows_per_call(*x.shape[:2])
    totals = lengths + config.padding_frames
    calls = -(-windows.count(totals.max(), config.frames, config.overlap) // per_call)

    def step(i, latents):
      now = {name: jnp.asarray(values)[i] for name, values in plan.items()}

      def call(n, sums):
        numbers = n * per_call + jnp.arange(per_call)
        index, exists = jax.vmap(
          lambda total: windows.indices(
            numbers, now['shift'], total, config.frames, config.overlap
          )
        )(totals)
        z = jax.vmap(lambda clip, i: clip[i])(latents, index)
        v = guided(unet, z, index, tables, conditions, lengths, now)
        stepped = schedule.euler_step(z, v, now['sigma'], now['sigma_next'])
        return jax.vmap(windows.accumulate)(*sums, stepped, index, exists)

      zeros = jnp.zeros_like(latents), jnp.zeros(latents.shape[:2], jnp.int32)
      return windows.average(*lax.fori_loop(0, calls, call, zeros))

    x = x.astype(jnp.float32)
    start = (
      config.scaling_factor * conditions.reference_latents.astype(jnp.float32)[:, None]
      + x * sigmas[0]
    )
    return lax.fori_loop(first, last, step, jnp.where(first == 0, start, x))

  return sample
