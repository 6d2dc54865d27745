"""The denoising loop in the order of the reference implementation: slow and plain.

It is the oracle of `dicetalk_jax.diffusion.sampler`. One window follows the other, each
with the contexts of its own frames, which every call projects again: spatial layers
project the tokens of every frame, temporal layers the mean of the window's tokens. The
sampler projects each distinct token once per clip and averages projections, which
agrees up to rounding because projections are linear.
"""

from collections.abc import Callable
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from dicetalk_jax.diffusion import edm, guidance, schedule
from dicetalk_jax.diffusion.sampler import Conditions, SamplerConfig, Step, make_plan
from dicetalk_jax.models import parameters

TEMPORAL = 'temporal_transformer_blocks'


def make_reference_sampler(
  graphdef: nnx.GraphDef[Any], config: SamplerConfig
) -> Callable[..., jax.Array]:
  """Returns a function like that of `sampler.make_sampler`, on one device.

  `conditions.spatial` may have one entry per frame, `[B,T,h,w,C0]`.
  """
  plan = make_plan(config)

  @jax.jit
  def step_window(
    params: parameters.Params, z: jax.Array, now: Step, window: dict[str, Any]
  ) -> jax.Array:
    """Steps the samples `[F,h,w,C]` of one window; contexts are `[3,F,K,D]` each."""
    unet = parameters.merge(graphdef, params)

    # 1. Project the contexts of every frame, and their means.
    contexts = window['contexts']
    means = [tokens.mean(1, keepdims=True) for tokens in contexts]
    of_frames = unet.context_kv(*contexts)
    of_means = unet.context_kv(*means)
    kv = {
      name: of_means[name] if TEMPORAL in name else of_frames[name]
      for name in of_frames
    }

    # 2. Run the three branches, and combine them.
    def branches(x: jax.Array) -> jax.Array:
      return jnp.broadcast_to(x, (guidance.BRANCHES, *x.shape))

    noisy = branches(z * edm.c_in(now.sigma))
    v, _ = unet(
      jnp.concatenate([noisy, window['reference']], axis=-1),
      now.timestep,
      kv,
      branches(window['ids']),
      spatial_condition=jax.tree.map(branches, window['spatial']),
      masks=jax.tree.map(branches, window['masks']),
      adapter_scales=config.adapter_scales,
    )
    v = guidance.combine(v.astype(jnp.float32), now.g_image, now.g_condition)

    # 3. Step.
    return schedule.euler_step(z, v, now.sigma, now.sigma_next)

  def sample_clip(
    params: parameters.Params,
    x: jax.Array,
    clip: Conditions,
    length: int,
    first: int,
    last: int,
  ) -> np.ndarray:
    """Samples one clip; `clip` has no batch axis, `x [T,h,w,C]` no unused frames."""
    total = len(x)

    # 1. Repeat the conditions for every frame and branch.
    contexts = branch_contexts(clip, length, total)
    latents = jnp.broadcast_to(
      clip.reference_latents, (total, *clip.reference_latents.shape)
    )
    reference = jnp.stack([jnp.zeros_like(latents), latents, latents])
    spatial = clip.spatial
    if spatial is not None:
      spatial = jnp.broadcast_to(spatial, (total, *spatial.shape[-3:]))
    ids = clip.added_time_ids

    # 2. Start from the portrait's latents under noise of the first level.
    if first == 0:
      x = config.scaling_factor * latents.astype(jnp.float32) + x * plan.sigma[0]

    # 3. Denoise: step every window, and average the frames of several windows.
    for i in range(first, last):
      now = plan.step(i)
      sums = np.zeros_like(x)
      counts = np.zeros(total, np.int32)
      for start in range(0, total, config.frames - config.overlap):
        index = (start - plan.shift[i] + np.arange(config.frames)) % total
        window = {
          'contexts': [tokens[:, index] for tokens in contexts],
          'reference': reference[:, index],
          'spatial': None if spatial is None else spatial[index],
          'masks': clip.masks,
          'ids': ids if ids.ndim == 1 else ids[index].mean(0),
        }
        stepped = step_window(params, x[index], now, window)
        np.add.at(sums, index, stepped)
        np.add.at(counts, index, 1)
      x = jnp.asarray(sums / counts[:, None, None, None])
    return np.asarray(x)

  def sample(
    params: parameters.Params,
    x: jax.Array,
    conditions: Conditions,
    lengths: jax.Array,
    first: int = 0,
    last: int = config.steps_run,
  ) -> jax.Array:
    x = jnp.asarray(x, jnp.float32)
    out = np.zeros(x.shape, np.float32)
    for b, length in enumerate(map(int, lengths)):
      total = length + config.padding_frames
      clip = clip_of_batch(conditions, b)
      out[b, :total] = sample_clip(params, x[b, :total], clip, length, first, last)
    return jnp.asarray(out)

  return sample


def clip_of_batch(conditions: Conditions, b: int) -> Conditions:
  """One clip of a batch, without the batch axis; the null tokens have none."""
  shared = {
    'null_audio': conditions.null_audio,
    'null_emotion': conditions.null_emotion,
  }
  own = conditions.replace(null_audio=None, null_emotion=None)
  return jax.tree.map(lambda x: x[b], own).replace(**shared)


def branch_contexts(clip: Conditions, length: int, total: int) -> list[jax.Array]:
  """The context tokens `[3,total,K,D]` of a clip and its padding frames.

  Branches: nothing, the image, the image with audio and emotion.
  """

  def every_frame(tokens: jax.Array) -> jax.Array:
    return jnp.broadcast_to(tokens, (total, *tokens.shape[-2:]))

  def up_to_length(tokens: jax.Array, null: jax.Array) -> jax.Array:
    return jnp.where(np.arange(total)[:, None, None] < length, tokens, null)

  no_image = every_frame(jnp.zeros_like(clip.image_token))
  image = every_frame(clip.image_token)
  silence = every_frame(clip.null_audio)
  audio = jnp.pad(clip.audio_tokens[:length], ((0, total - length), (0, 0), (0, 0)))
  contexts = [
    jnp.stack([no_image, image, image]),
    jnp.stack([silence, silence, up_to_length(audio, clip.null_audio)]),
  ]
  if clip.emotion_tokens is not None:
    none = every_frame(clip.null_emotion)
    emotion = up_to_length(clip.emotion_tokens, clip.null_emotion)
    contexts.append(jnp.stack([none, none, emotion]))
  return contexts
