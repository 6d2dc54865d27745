"""The loss of the diffusion task, as a pure function of parameters and a batch
(paper equation 15).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from dicetalk_jax import parallel
from dicetalk_jax.data import clip_record
from dicetalk_jax.diffusion import edm, sampler
from dicetalk_jax.diffusion.condition_dropout import Dropped, condition_dropout
from dicetalk_jax.diffusion.face_mask import mask_pyramid
from dicetalk_jax.models import fused, parameters
from dicetalk_jax.models.emotion import VQ
from dicetalk_jax.models.parameters import Params
from dicetalk_jax.training import gathering, metric_means

# Logarithm of the strength of noise on reference latents, as common in training SVD.
REF_NOISE_MEAN = -3.0
REF_NOISE_STD = 0.5

Batch = Mapping[str, jax.Array]
Models = Mapping[str, Any]  # trained components by name


class FaceConditions(NamedTuple):
  """Conditions that do not change over a clip, and are never dropped.

  Attributes:
    spatial: pose guider features [B,h,w,C]; None without a guider.
    masks: face mask pyramid, one array [B,h*w/4^i] for each level of the UNet.
    time_ids: frame rate and two amounts of motion [B,3].
  """

  spatial: jax.Array | None
  masks: tuple[jax.Array, ...]
  time_ids: jax.Array


class Keys(NamedTuple):
  """Random keys; None makes that choice deterministic."""

  sigma: jax.Array
  noise: jax.Array
  prior: jax.Array
  bank: jax.Array | None
  classifier: jax.Array | None


class DiffusionLoss:
  """L = L_denoise + lambda_cls L_cls + lambda_vq L_vq; without an emotion model
  L_denoise alone.
  """

  def __init__(
    self, config: Any, graphs: Mapping[str, nnx.GraphDef], scaling_factor: float
  ):
    """Takes the structure of all trained components.

    Args:
      config: as in `configs/diffusion.py`.
      graphs: by component, without 'pose_guider' and 'emo_model' for Sonic.
      scaling_factor: of the latents.
    """
    self.config = config
    self.graphs = graphs
    self.scaling_factor = scaling_factor

  def models(self, params: Params) -> dict[str, Any]:
    """Returns the trained components by name."""
    return {
      name: gathering.merge(graph, parameters.strip_prefix(name, params))
      for name, graph in self.graphs.items()
    }

  def __call__(
    self,
    params: Params,
    batch: Batch,
    key: jax.Array,
    step: jax.Array,
    train: bool = True,
  ) -> tuple[jax.Array, dict[str, Any]]:
    """Computes the loss and its parts.

    Args:
      params: of all trained components.
      batch: of `data.diffusion_loader`.
      key: of noise levels, noise, priors, and of the choices that only training makes.
      step: updates made so far.
      train: False computes under the conditions of sampling: the mean of each prior,
        the whole bank, no noise on the reference, no dropout in the classifier. The
        look-up is still there to be logged.

    Returns:
      The loss, and its parts to log; see `Task.loss`.
    """
    config = self.config
    model = self.models(params)
    keys = Keys(*jax.random.split(key, 5))
    if not train:
      keys = keys._replace(bank=None, classifier=None)

    # 1. Add noise to the latents
    x = batch['latents'] * self.scaling_factor
    sigma = self._draw_sigma(keys.sigma, len(x))
    broadcast_sigma = sigma[:, None, None, None, None]
    noise = jax.random.normal(keys.noise, x.shape)
    z = x + broadcast_sigma * noise

    # 2. Prepare the conditions; some are dropped, the face never
    dropped = condition_dropout(batch['drop'], config.drop)
    if train and config.noise.ref_aug == 'lognormal':
      # `keys.noise` has drawn the noise already. Folding a number into it gives another
      # key, and leaves all other draws the same with and without `ref_aug`.
      reference_key = jax.random.fold_in(keys.noise, 1)
      reference = self._disturbed(batch['reference'], reference_key)
      batch = {**batch, 'reference': reference}
    emotion = None
    vq = None
    if 'emo_model' in model:
      prior = self._draw_prior(batch, keys.prior) if train else batch['mu']
      emotion, vq = self._emotion_tokens(model['emo_model'], prior, dropped, keys.bank)
    height, width = x.shape[2:4]
    face = self.face_conditions(model, batch, (height, width))

    # 3. Denoise
    scaled = z * edm.c_in(broadcast_sigma)
    timestep = edm.c_noise(sigma)
    v, mid = self.predict(model, batch, dropped, scaled, timestep, emotion, face)

    # 4. The error of denoising
    target = edm.v_target(x, noise, broadcast_sigma)
    error = jnp.square(v.astype(jnp.float32) - target)
    if config.loss.face_weight or config.loss.mouth_weight:
      face_mask = face.masks[0].reshape(-1, height, width)
      error = error * self._weight(batch['mask'], face_mask)
    denoise_loss = jnp.mean(error)
    denoise_per_clip = jnp.mean(error, axis=(1, 2, 3, 4))
    parts = {
      'denoise': denoise_loss,
      **metric_means.split_by_sigma('denoise', denoise_per_clip, sigma),
    }
    if vq is None:
      return denoise_loss, parts

    # 5. Emotion discrimination
    label = batch['emotion_class']
    logits = self._logits(model['emo_model'], mid, keys.classifier)
    cls_loss, accuracy = emotion_discrimination(logits, label, dropped.emotion)
    counted = (label >= 0) & ~dropped.emotion
    cls_per_clip, _ = jax.vmap(emotion_discrimination)(
      logits[:, None], label[:, None], dropped.emotion[:, None]
    )
    parts |= {
      'cls': cls_loss,
      'cls_accuracy': accuracy,
      **metric_means.split_by_sigma('cls', cls_per_clip, sigma, counted),
    }

    # 6. Sum (paper equation 15)
    warm = jnp.minimum(1.0, (step + 1) / max(config.loss.cls_warmup, 1))
    total = (
      denoise_loss
      + config.loss.lambda_cls * warm * cls_loss
      + config.loss.lambda_vq * vq.loss
    )
    if config.emo_model.mode == 'bank':
      parts |= self._bank_parts(vq, label)
    return total, parts

  def _draw_sigma(self, key: jax.Array, count: int) -> jax.Array:
    noise = self.config.noise
    return edm.draw_sigma(
      key,
      (count,),
      p_mean=noise.p_mean,
      p_std=noise.p_std,
      sigma_min=noise.sigma_min,
      sigma_max=noise.sigma_max,
    )

  def _draw_prior(self, batch: Batch, key: jax.Array) -> jax.Array:
    """Draws from the Gaussian of each clip: the mean alone would leak identity."""
    prior_mean = batch['mu']
    if not self.config.emotion.sample:
      return prior_mean
    prior_std = batch['sigma']  # of the prior; the noise level is another sigma
    return prior_mean + prior_std * jax.random.normal(key, prior_mean.shape)

  def _disturbed(self, reference: jax.Array, key: jax.Array) -> jax.Array:
    """Adds noise to reference latents. They are unscaled; the strength of the noise is
    that for scaled ones.
    """
    strength_key, noise_key = jax.random.split(key)
    normal = jax.random.normal(strength_key, (len(reference), 1, 1, 1))
    strength = jnp.exp(REF_NOISE_MEAN + REF_NOISE_STD * normal)
    noise = jax.random.normal(noise_key, reference.shape)
    return reference + strength / self.scaling_factor * noise

  def _emotion_tokens(
    self, emo_model: Any, prior: jax.Array, dropped: Dropped, key: jax.Array | None
  ) -> tuple[jax.Array, VQ]:
    """Computes emotion tokens [B,T,D], and the look-up.

    With probability `p_whole_bank` a step attends to the whole bank, as sampling does.
    Without a key it always does.
    """
    retrieved, vq = emo_model(prior, retrieval=True, drop=dropped.emotion)
    probability = self.config.emotion.p_whole_bank
    has_bank = self.config.emo_model.mode == 'bank'
    if not has_bank or (key is not None and probability == 0):
      return retrieved, vq
    # Dropped clips get what sampling uses for "no emotion".
    whole, _ = emo_model(prior, retrieval=False)
    whole = jnp.where(dropped.emotion[:, None, None], emo_model.null_tokens(), whole)
    if key is None:
      return whole, vq
    return jnp.where(jax.random.bernoulli(key, probability), whole, retrieved), vq

  def _logits(self, emo_model: Any, mid: jax.Array, key: jax.Array | None) -> jax.Array:
    """Classifies features [B,F,h,w,C]: logits [B,F,classes], or [B,1,classes] of the
    mean over the clip. A key turns dropout on.
    """
    if self.config.loss.cls_pool == 'clip':
      mid = mid.mean(1, keepdims=True)
    logits = emo_model.classify(mid.reshape(-1, *mid.shape[2:]), key=key)
    return logits.reshape(*mid.shape[:2], -1)

  def _bank_parts(self, vq: VQ, label: jax.Array) -> dict[str, Any]:
    used = jnp.zeros(self.config.emo_model.codebook_size).at[vq.indices].set(1.0)
    return {
      'vq': vq.loss,
      'vq_error': vq.error,
      'z_rms': jnp.sqrt(jnp.square(vq.z).mean()),
      'codes_used': used.sum(),
      'per_row': {'code': vq.indices, 'z': vq.z, 'emotion_class': label},
    }

  def predict(
    self,
    model: Models,
    batch: Batch,
    dropped: Dropped,
    scaled: jax.Array,
    timestep: jax.Array,
    emotion: jax.Array | None,
    face: FaceConditions,
  ) -> tuple[jax.Array, jax.Array]:
    """Calls the UNet once, with the conditions of a batch.

    Args:
      model: see `models`.
      batch: see `__call__`.
      dropped: conditions to replace by their null values.
      scaled: noisy latents times c_in [B,F,h,w,c].
      timestep: c_noise [B].
      emotion: tokens [B,T,D], or None.
      face: see `face_conditions`.

    Returns:
      The prediction v, and features of the middle block [B,F,h,w,C].
    """

    def drop(mask, value):
      return jnp.where(mask.reshape(-1, *[1] * (value.ndim - 1)), 0, value)

    # 1. Context tokens
    image = drop(dropped.image, batch['image_token'])[:, None]
    audio = model['audio_linear'](drop(dropped.audio, batch['audio']))
    if emotion is not None:
      emotion = emotion[:, None]
    kv = model['unet'].context_kv(image, audio, emotion)

    # 2. Channels: noisy latents and reference latents
    reference = drop(dropped.image, batch['reference'])
    reference = jnp.broadcast_to(reference[:, None], scaled.shape)
    sample = jnp.concatenate([scaled, reference], axis=-1)

    # 3. The network
    spatial = None if face.spatial is None else face.spatial[:, None]
    with fused.kernels(self.config.fused_kernels):
      return model['unet'](
        parallel.split_pictures(sample),
        timestep,
        kv,
        face.time_ids,
        spatial_condition=spatial,
        masks=face.masks,
        remat=self.config.remat,
      )

  def _weight(self, mask: jax.Array, face: jax.Array) -> jax.Array:
    """Weighs each latent pixel in the denoising loss [B,1,h,w,1]: more in face and
    mouth, 1 on average.

    Args:
      mask: of the face, at full size [B,H,W].
      face: the same at the size of the latents [B,h,w].
    """
    loss = self.config.loss
    _, height, width = face.shape
    (mouth,) = mask_pyramid(mouth_region(mask), (height, width), levels=1)
    mouth = mouth.reshape(face.shape)
    weight = 1 + loss.face_weight * face + loss.mouth_weight * mouth
    weight = weight / weight.mean((1, 2), keepdims=True)
    return weight[:, None, ..., None]

  def face_conditions(
    self, model: Models, batch: Batch, latent_size: tuple[int, int]
  ) -> FaceConditions:
    """Computes pose guider features, mask pyramid and time ids of a batch."""
    mask = batch['mask']
    spatial = None
    if 'pose_guider' in model:
      image = jnp.broadcast_to(mask[..., None], (*mask.shape, 3))
      spatial = model['pose_guider'](image)
    levels = len(self.config.unet.block_out_channels)
    fps = jnp.full((len(mask), 1), model_fps(self.config))
    return FaceConditions(
      spatial=spatial,
      masks=mask_pyramid(mask, latent_size, levels),
      time_ids=jnp.concatenate([fps, batch['buckets']], axis=-1),
    )

  def conditions(self, params: Params, batch: Batch) -> sampler.Conditions:
    """Computes the sampler's conditions for windows of a batch, with the mean of each
    clip's prior.
    """
    model = self.models(params)
    audio = batch['audio']
    _, height, width, _ = batch['reference'].shape
    face = self.face_conditions(model, batch, (height, width))
    emotion = None
    no_emotion = None
    if 'emo_model' in model:
      emotion, _ = model['emo_model'](batch['mu'], retrieval=False)
      no_emotion = model['emo_model'].null_tokens()
    silence = jnp.zeros_like(audio[:1, :1])
    return sampler.Conditions(
      reference_latents=batch['reference'],
      image_token=batch['image_token'],
      audio_tokens=model['audio_linear'](audio),
      null_audio=model['audio_linear'](silence)[0, 0],
      emotion_tokens=emotion,
      null_emotion=no_emotion,
      masks=face.masks,
      spatial=face.spatial,
      added_time_ids=face.time_ids,
    )


def model_fps(config: Any) -> float:
  """Returns the frames per second of the model, which the time ids state: 12.5 as
  released, where `config.data.step` is 2.
  """
  return clip_record.FPS / config.data.step


def emotion_discrimination(
  logits: jax.Array, label: jax.Array, dropped: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Computes L_cls (paper equation 16): cross-entropy per frame over clips with a label
  whose emotion was not dropped.

  Where the emotion is known and its level is not, the probability is that of all
  levels together.

  Args:
    logits: [B,F,classes].
    label: int32 [B], as of `clip_record.emotion_class`; -1 where unknown.
    dropped: bool [B]: the unconditional branch must stay free of emotion.

  Returns:
    Mean loss and accuracy over the counted clips; both 0 if there are none.
  """
  counted = (label >= 0) & ~dropped
  logits = logits.astype(jnp.float32)
  right = jnp.asarray(clip_record.CLASSES_OF_LABEL)[jnp.maximum(label, 0)][:, None]
  of_right = jax.nn.logsumexp(logits, axis=-1, where=right)
  entropy = jax.nn.logsumexp(logits, axis=-1) - of_right
  best = jax.nn.one_hot(logits.argmax(-1), clip_record.CLASSES, dtype=bool)
  hit = (best & right).any(-1)

  def mean_over_counted(frames):
    clips = frames.mean(1)
    return jnp.where(counted, clips, 0).sum() / jnp.maximum(counted.sum(), 1)

  return mean_over_counted(entropy), mean_over_counted(hit)


def mouth_region(mask: jax.Array) -> jax.Array:
  """Returns the part of a rectangular face mask `[B,H,W]` where the mouth is: half its
  width, a third of its height.
  """

  def between(extent: jax.Array, low: float, high: float) -> jax.Array:
    """The part of an interval, bool [B,n], between two fractions of its length."""
    length = jnp.maximum(extent.sum(-1, keepdims=True), 1)
    centre = (jnp.cumsum(extent, -1) - 0.5) / length
    return extent & (centre > low) & (centre < high)

  rows = between(mask.max(2) > 0, 0.56, 0.90)
  columns = between(mask.max(1) > 0, 0.25, 0.75)
  return (rows[:, :, None] & columns[:, None]).astype(mask.dtype)
