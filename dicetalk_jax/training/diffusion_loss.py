"""The loss of the diffusion task, as a pure function of parameters and a batch
(paper equation 15).
"""

from collections.abc import Mapping
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import optax

from dicetalk_jax import parallel
from dicetalk_jax.diffusion import edm, sampler
from dicetalk_jax.diffusion.condition_dropout import Dropped, condition_dropout
from dicetalk_jax.diffusion.face_mask import mask_pyramid
from dicetalk_jax.models import parameters
from dicetalk_jax.training import metric_means

FPS = 12.5
REF_NOISE = (
  -3.0,
  0.5,
  # mean and deviation of the logarithm of the noise's strength, as common in training SVD
)


class DiffusionLoss:
  """L = L_denoise + lambda_cls L_cls + lambda_vq L_vq; without an emotion model
  L_denoise alone.
  """

  def __init__(
    self, config: Any, graphs: Mapping[str, nnx.GraphDef], scaling_factor: float
  ):
    """`config` as in `configs/diffusion.py`; `graphs` by component, without
    'pose_guider' and 'emo_model' for Sonic.
    """
    self.config, self.graphs, self.scaling_factor = config, graphs, scaling_factor

  def models(self, params: parameters.Params) -> dict[str, Any]:
    """The trained components by name."""
    return {
      name: parameters.merge(graph, parameters.strip_prefix(name, params))
      for name, graph in self.graphs.items()
    }

  def __call__(
    self, params, batch, key, step, train: bool = True
  ) -> tuple[jax.Array, dict[str, Any]]:
    """Loss and its parts for a batch of `dicetalk_jax.data.diffusion_loader`.

    Without `train` the network is judged as it is: no dropout in the classifier, and
    the bank is not chosen by chance. Noise and the draw from the prior remain; they
    derive from `key`.
    """
    c, model = self.config, self.models(params)
    sigma_key, noise_key, prior_key, bank_key, head_key = jax.random.split(key, 5)
    if not train:
      bank_key = head_key = None
    dropped = condition_dropout(batch['drop'], c.drop)

    x = batch['latents'] * self.scaling_factor
    sigma = edm.draw_sigma(
      sigma_key, (len(x),), **{k: v for k, v in c.noise.items() if k != 'ref_aug'}
    )
    level = sigma[:, None, None, None, None]
    noise = jax.random.normal(noise_key, x.shape)
    z = x + level * noise
    if c.noise.ref_aug == 'lognormal':
      batch = batch | {
        'reference': self._disturbed(
          batch['reference'], jax.random.fold_in(noise_key, 1)
        )
      }

    emotion, vq = None, None
    if 'emo_model' in model:
      prior = batch['mu']
      # a fresh draw from the clip's Gaussian each time: the mean alone leaks identity
      if c.emotion.sample:
        prior = prior + batch['sigma'] * jax.random.normal(prior_key, prior.shape)
      emotion, vq = self._emotion_tokens(model['emo_model'], prior, dropped, bank_key)
    face = self.face(model, batch, x.shape[2:4])
    v, mid = self.denoise(
      model, batch, dropped, z * edm.c_in(level), edm.c_noise(sigma), emotion, face
    )

    error = jnp.square(v.astype(jnp.float32) - edm.v_target(x, noise, level))
    if c.loss.face_weight or c.loss.mouth_weight:
      error = error * self._weight(batch['mask'], face[1][0].reshape(-1, *x.shape[2:4]))
    denoise = jnp.mean(error)
    parts = {
      'denoise': denoise,
      **metric_means.split_by_sigma(
        'denoise', jnp.mean(error, axis=(1, 2, 3, 4)), sigma
      ),
    }
    if vq is None:
      return denoise, parts

    label, logits = (
      batch['emotion_class'],
      self._logits(model['emo_model'], mid, head_key),
    )
    classify, accuracy = emotion_discrimination(logits, label, dropped.emotion)
    each, _ = jax.vmap(emotion_discrimination)(
      logits[:, None], label[:, None], dropped.emotion[:, None]
    )
    warm = jnp.minimum(1.0, (step + 1) / max(c.loss.cls_warmup, 1))
    total = denoise + c.loss.lambda_cls * warm * classify + c.loss.lambda_vq * vq.loss
    parts |= {
      'cls': classify,
      'cls_accuracy': accuracy,
      **metric_means.split_by_sigma(
        'cls', each, sigma, (label >= 0) & ~dropped.emotion
      ),
    }
    if c.emo_model.mode == 'bank':
      parts |= {
        'vq': vq.loss,
        'vq_error': vq.error,
        'z_rms': jnp.sqrt(jnp.square(vq.z).mean()),
        'codes_used': jnp.zeros(c.emo_model.codebook_size)
        .at[vq.indices]
        .set(1.0)
        .sum(),
        'per_row': {'code': vq.indices, 'z': vq.z, 'emotion_class': label},
      }
    return total, parts

  def _disturbed(self, reference, key):
    """Reference latents, which are unscaled, with noise whose strength is that of
    scaled ones.
    """
    mean, deviation = REF_NOISE
    strength_key, noise_key = jax.random.split(key)
    strength = jnp.exp(
      mean + deviation * jax.random.normal(strength_key, (len(reference), 1, 1, 1))
    )
    return reference + strength / self.scaling_factor * jax.random.normal(
      noise_key, reference.shape
    )

  def _emotion_tokens(self, emo_model, prior, dropped: Dropped, key):
    """Tokens [B,T,D].

    With probability `p_whole_bank` a step attends to the whole bank, as sampling does.

    Without a key it always does, unless training never does.
    """
    retrieved, vq = emo_model(prior, retrieval=True, drop=dropped.emotion)
    p = self.config.emotion.p_whole_bank
    if p == 0:
      return retrieved, vq
    # Dropped clips get what sampling uses for "no emotion".
    whole, _ = emo_model(prior, retrieval=False)
    whole = jnp.where(dropped.emotion[:, None, None], emo_model.null_tokens(), whole)
    if key is None:
      return whole, vq
    return jnp.where(jax.random.bernoulli(key, p), whole, retrieved), vq

  def _logits(self, emo_model, mid, key):
    """Of the classes `[B,F,classes]`, from features [B,F,h,w,C]; per frame, or one of
    their mean over the clip.

    A key turns dropout on.
    """
    if self.config.loss.cls_pool == 'clip':
      mid = mid.mean(1, keepdims=True)
    logits = emo_model.classify(mid.reshape(-1, *mid.shape[2:]), key=key)
    return logits.reshape(*mid.shape[:2], -1)

  def denoise(self, model, batch, dropped: Dropped, scaled, timestep, emotion, face):
    """One UNet call on scaled noisy latents [B,F,h,w,c] with the conditions of the
    batch.
    """

    def keep(mask, value):
      return jnp.where(mask.reshape(-1, *[1] * (value.ndim - 1)), 0, value)

    image = keep(dropped.image, batch['image_token'])
    reference = keep(dropped.image, batch['reference'])
    audio = model['audio_linear'](keep(dropped.audio, batch['audio']))
    kv = model['unet'].context_kv(
      image[:, None], audio, None if emotion is None else emotion[:, None]
    )
    reference = jnp.broadcast_to(reference[:, None], scaled.shape)
    spatial, masks, ids = face
    sample = parallel.split_pictures(jnp.concatenate([scaled, reference], axis=-1))
    return model['unet'](
      sample,
      timestep,
      kv,
      ids,
      spatial_condition=None if spatial is None else spatial[:, None],
      masks=masks,
      remat=self.config.remat,
    )

  def _weight(self, mask, face) -> jax.Array:
    """Weight of each latent pixel in the denoising loss, [B,1,h,w,1]: more in face
    [B,h,w] and mouth, 1 on average.
    """
    mouth = mask_pyramid(mouth_region(mask), face.shape[1:], 1)[0].reshape(face.shape)
    weight = (
      1 + self.config.loss.face_weight * face + self.config.loss.mouth_weight * mouth
    )
    return (weight / weight.mean((1, 2), keepdims=True))[:, None, ..., None]

  def face(self, model, batch, latent_hw):
    """Pose guider features (None without a guider), mask pyramid and time ids of a
    batch.
    """
    mask, spatial = batch['mask'], None
    if 'pose_guider' in model:
      spatial = model['pose_guider'](
        jnp.broadcast_to(mask[..., None], (*mask.shape, 3))
      )
    masks = mask_pyramid(mask, latent_hw, len(self.config.unet.block_out_channels))
    ids = jnp.concatenate([jnp.full((len(mask), 1), FPS), batch['buckets']], axis=-1)
    return spatial, masks, ids

  def conditions(self, params, batch) -> sampler.Conditions:
    """The sampler's conditions for windows of a batch, with the mean of each clip's
    prior.
    """
    model = self.models(params)
    spatial, masks, ids = self.face(model, batch, batch['reference'].shape[1:3])
    emotion, nothing = None, None
    if 'emo_model' in model:
      emotion, _ = model['emo_model'](batch['mu'], retrieval=False)
      nothing = model['emo_model'].null_tokens()
    return sampler.Conditions(
      reference_latents=batch['reference'],
      image_token=batch['image_token'],
      audio_tokens=model['audio_linear'](batch['audio']),
      null_audio=model['audio_linear'](jnp.zeros_like(batch['audio'][:1, :1]))[0, 0],
      emotion_tokens=emotion,
      null_emotion=nothing,
      masks=masks,
      spatial=spatial,
      added_time_ids=ids,
    )


def emotion_discrimination(
  logits: jax.Array, label: jax.Array, dropped: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """L_cls (paper equation 16): cross-entropy per frame over clips with a label whose
  emotion was not dropped.

  Args:
    logits: [B,F,classes].
    label: int32 [B], -1 where unknown.
    dropped: bool [B]: the unconditional branch must stay free of emotion.

  Returns:
    Mean loss and accuracy over the counted clips; both 0 where there is none.
  """
  counted = (label >= 0) & ~dropped
  target = jnp.broadcast_to(jnp.maximum(label, 0)[:, None], logits.shape[:2])
  entropy = optax.softmax_cross_entropy_with_integer_labels(
    logits.astype(jnp.float32), target
  ).mean(1)
  hit = (logits.argmax(-1) == target).mean(1)

  def mean(values):
    return jnp.where(counted, values, 0).sum() / jnp.maximum(counted.sum(), 1)

  return mean(entropy), mean(hit)


def mouth_region(mask: jax.Array) -> jax.Array:
  """The part of a rectangular face mask `[B,H,W]` where the mouth is: half its
  width, a third of its height.
  """

  def inside(axis: int, low: float, high: float) -> jax.Array:
    rows = mask.max(axis) > 0  # [B,n], the extent of the rectangle along the other axis
    centre = (jnp.cumsum(rows, -1) - 0.5) / jnp.maximum(rows.sum(-1, keepdims=True), 1)
    return rows & (centre > low) & (centre < high)

  return (inside(2, 0.56, 0.90)[:, :, None] & inside(1, 0.25, 0.75)[:, None]).astype(
    mask.dtype
  )
