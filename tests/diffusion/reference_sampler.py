"""The denoising loop in the published order of work: slow, plain, and what `sampler` is
measured against.

One window after the other, each with the contexts of its own frames, which are
projected anew in every call: spatial layers project every frame's tokens, temporal
layers the mean of the window's tokens. `sampler` projects each distinct token once per
clip and averages projections, which agrees up to rounding because projections are
linear.
"""

from collections.abc import Callable
import operator

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from dicetalk_jax.diffusion import edm, guidance, schedule, windows
from dicetalk_jax.diffusion.sampler import Conditions, SamplerConfig
from dicetalk_jax.models import parameters

_TEMPORAL = 'temporal_transformer_blocks'


def make_sampler(
  graphdef: nnx.GraphDef, config: SamplerConfig
) -> Callable[..., jax.Array]:
  """Like `sampler.make_sampler`, on one device; clips of other lengths cost no
  compilation either.

  `conditions.spatial` may have one entry per frame, `[B,T,h,w,C0]`.
  """
  sigmas = schedule.karras_sigmas(config.num_steps, config.sigma_min, config.sigma_max)[
    -config.steps_run - 1 :
  ]
  timesteps = schedule.timesteps(sigmas)
  g_image, g_condition = (
    guidance.weights(g, config.steps_run) for g in (config.g_image, config.g_condition)
  )
  shifts = windows.shifts(
    config.steps_run, config.shift, config.frames if config.padding else None
  )

  @jax.jit
  def step_window(
    params,
    z,
    contexts,
    spatial,
    masks,
    ids,
    reference,
    timestep,
    sigma,
    sigma_next,
    g1,
    g2,
  ):
    """The stepped samples `[F,h,w,C]` of one window; contexts are `[3,F,K,D]` each."""
    unet = parameters.merge(graphdef, params)

    def rows(x):
      return jnp.broadcast_to(x, (guidance.BRANCHES, *x.shape))

    sample = jnp.concatenate([rows(z * edm.c_in(sigma)), reference], axis=-1)
    frames, mean = (
      unet.context_kv(*contexts),
      unet.context_kv(*(x.mean(1, keepdims=True) for x in contexts)),
    )
    kv = {name: (mean if _TEMPORAL in name else frames)[name] for name in frames}
    v, _ = unet(
      sample,
      timestep,
      kv,
      rows(ids),
      spatial_condition=None if spatial is None else rows(spatial),
      masks=None if masks is None else tuple(map(rows, masks)),
      adapter_scales=config.adapter_scales,
    )
    v = guidance.combine(v.astype(jnp.float32), g1, g2)
    return schedule.euler_step(z, v, sigma, sigma_next)

  def sample_clip(
    params, x, clip: Conditions, length: int, first: int, last: int
  ) -> np.ndarray:
    """One clip; `clip` has no batch axis, `x [T,h,w,C]` no unused frames."""
    total = len(x)

    def every(tokens):
      return jnp.broadcast_to(tokens, (total, *tokens.shape[-2:]))

    def padded(tokens, null):
      return jnp.where(np.arange(total)[:, None, None] < length, tokens, null)

    audio = jnp.pad(clip.audio_tokens[:length], ((0, total - length), (0, 0), (0, 0)))
    # Rows: nothing, appearance, appearance with audio and emotion.
    image = jnp.stack(
      [every(jnp.zeros_like(clip.image_token)), *[every(clip.image_token)] * 2]
    )
    audio = jnp.stack([*[every(clip.null_audio)] * 2, padded(audio, clip.null_audio)])
    contexts = [image, audio]
    if clip.emotion_tokens is not None:
      contexts += [
        jnp.stack(
          [
            *[every(clip.null_emotion)] * 2,
            padded(clip.emotion_tokens, clip.null_emotion),
          ]
        )
      ]
    latents = jnp.broadcast_to(
      clip.reference_latents, (total, *clip.reference_latents.shape)
    )
    reference = jnp.stack([jnp.zeros_like(latents), latents, latents])
    spatial = clip.spatial
    if spatial is not None:
      spatial = jnp.broadcast_to(spatial, (total, *spatial.shape[-3:]))
    ids = clip.added_time_ids

    def ids_of(index):
      return ids if ids.ndim == 1 else ids[index].mean(0)

    if first == 0:
      x = config.scaling_factor * latents.astype(jnp.float32) + x * sigmas[0]
    for i in range(first, last):
      sums, counts = np.zeros_like(x), np.zeros(total, np.int32)
      for start in range(0, total, config.frames - config.overlap):
        index = (start - shifts[i] + np.arange(config.frames)) % total
        stepped = step_window(
          params,
          x[index],
          [tokens[:, index] for tokens in contexts],
          None if spatial is None else spatial[index],
          clip.masks,
          ids_of(index),
          reference[:, index],
          timesteps[i],
          sigmas[i],
          sigmas[i + 1],
          g_image[i],
          g_condition[i],
        )
        np.add.at(sums, index, stepped)
        np.add.at(counts, index, 1)
      x = jnp.asarray(sums / counts[:, None, None, None])
    return np.asarray(x)

  def sample(params, x, conditions, lengths, first=0, last=config.steps_run):
    x, out = jnp.asarray(x, jnp.float32), np.zeros(x.shape, np.float32)
    for b, length in enumerate(map(int, lengths)):
      clip = jax.tree.map(
        operator.itemgetter(b), conditions.replace(null_audio=None, null_emotion=None)
      )
      clip = clip.replace(
        null_audio=conditions.null_audio, null_emotion=conditions.null_emotion
      )
      total = length + config.padding_frames
      out[b, :total] = sample_clip(params, x[b, :total], clip, length, first, last)
    return jnp.asarray(out)

  return sample
