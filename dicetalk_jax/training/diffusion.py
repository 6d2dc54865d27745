"""Task: the diffusion model (paper sections 3.2 and 3.3): denoising, emotion discrimination, emotion bank."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from data_pipelines import compute, loader
from dicetalk_jax import bundle, parallel
from dicetalk_jax.diffusion import edm, sampler
from dicetalk_jax.diffusion.condition_dropout import Dropped, condition_dropout
from dicetalk_jax.errors import ConfigError
from dicetalk_jax.media.sheet import grid
from dicetalk_jax.models import core, registry
from dicetalk_jax.models.face_mask import mask_pyramid
from dicetalk_jax.models.unet import init_adapters_from_image, zero_residuals
from dicetalk_jax.network import Network
from dicetalk_jax.training import bank, sources
from dicetalk_jax.training import frozen as networks
from dicetalk_jax.training.task import Task

TRAINED = ('unet', 'audio_linear', 'pose_guider', 'emo_model')
FPS = 12.5
SWAPPED = {'audio_effect': ('audio',), 'emotion_effect': ('mu', 'sigma')}


class DiffusionTask(Task):
  """L = L_denoise + lambda_cls L_cls + lambda_vq L_vq (paper equation 15).

  Everything frozen (latents, CLIP tokens, Whisper states, emotion priors) is computed once, before training.
  """

  name = 'diffusion'

  def __init__(self, config, mesh, workdir):
    super().__init__(config, mesh, workdir)
    bundle.require(self.model_dir, 'vae', 'embedder')  # before data is made
    self.train, self.val = sources.train_and_val(config, self.data_dir)
    random = config.get('frozen', {})
    self.vae = Network.load(self.model_dir, 'vae')
    self.whisper = networks.ensure(self.model_dir, 'whisper', random.get('whisper'), seed=1)
    self.tower = networks.ensure(self.model_dir, 'image_encoder', random.get('image_encoder'), seed=2)
    self.embedder = Network.load(self.model_dir, 'embedder')
    self._check()
    self.builds = {name: registry.builder(name, config[name].to_dict(), config.dtype) for name in TRAINED}
    self.graphs = {name: core.abstract(build)[0] for name, build in self.builds.items()}
    self.parts = {split: [self._part(part) for part in parts]
                  for split, parts in (('train', self.train), ('val', self.val))}
    self._decode = self.vae.stage(lambda model, z: model.decode(z))
    self._eval_loss = jax.jit(self.loss)
    self._sampler = sampler.make_sampler(self.graphs['unet'], sampler.SamplerConfig(
        **config.sample.to_dict(), frames=config.data.frames, scaling_factor=self.scaling_factor), mesh)
    self._sample_inputs = jax.jit(self._conditions)

  @property
  def scaling_factor(self) -> float:
    return self.vae.config.scaling_factor

  def _check(self):
    """Refuses combinations that cannot work, before anything is computed."""
    c = self.config
    wanted = {
        'unet.out_channels': (c.unet.out_channels, self.vae.config.latent_channels),
        'unet.in_channels': (c.unet.in_channels, 2 * self.vae.config.latent_channels),
        'emo_model.prior_dim': (c.emo_model.prior_dim, self.embedder.config.width),
        'emo_model.classifier_in': (c.emo_model.classifier_in, c.unet.block_out_channels[-1]),
        'emo_model.dim': (c.emo_model.dim, c.unet.cross_attention_dim),
        'audio_linear.output_dim': (c.audio_linear.output_dim, c.unet.cross_attention_dim),
        'audio_linear.channels': (c.audio_linear.channels, self.whisper.config.d_model),
        'audio_linear.blocks': (c.audio_linear.blocks, self.whisper.config.encoder_layers + 1),
        'pose_guider.conditioning_embedding_channels':
            (c.pose_guider.conditioning_embedding_channels, c.unet.block_out_channels[0]),
    }
    for key, (value, fitting) in wanted.items():
      if value != fitting:
        raise ConfigError(f'config.{key}={value} does not fit the other parts of the model, which need {fitting}')

  def _part(self, part: loader.Part) -> loader.Part:
    frozen = dict(vae=self.vae, image_encoder=self.tower, whisper=self.whisper, embedder=self.embedder)
    features = compute.Features(frozen, part.source, self.data_dir / 'features', self.config.data.clip_stride)
    return dataclasses.replace(part, features=features.ready('latents', 'clip_embed', 'whisper', 'prior'))

  def _loader(self, split: str, **kwargs):
    data = self.config.data
    return iter(loader.diffusion_loader(self.parts[split], frames=data.frames, step=data.step, mask_size=data.size,
                                        measured_buckets=False, clip_stride=data.clip_stride, reference=data.reference,
                                        **kwargs))

  def batches(self):
    index, count = parallel.batch_shard(self.mesh)
    return self._loader('train', batch=self.config.batch_size // count, seed=self.config.seed, shard=(index, count),
                        area=self.config.data.area, workers=self.config.data.workers)

  def init(self, key: jax.Array) -> core.Params:
    """Parameters of all trained components: from `init_from`, or drawn; adapters begin as copies of the image's."""
    params = {}
    for i, (name, build) in enumerate(self.builds.items()):
      if self.config.init_from and name in bundle.components(self.config.init_from):
        part = bundle.load_component(self.config.init_from, name)[1]
      else:
        part = core.init_params(build, jax.random.fold_in(key, i))
        part = zero_residuals(init_adapters_from_image(part)) if name == 'unet' else part
        if name == 'emo_model' and self.config.emo_model.mode == 'bank' and self.config.emotion.bank_init == 'kmeans':
          part = bank.fit_codes(part, self.parts['train'], self.config.seed)
      params |= core.prefixed(name, part)
    return params

  def _models(self, params):
    return {name: core.merge(graph, core.under(name, params)) for name, graph in self.graphs.items()}

  def loss(self, params, frozen, batch, key, step):
    """Loss and its parts for a batch of `data_pipelines.loader.diffusion_loader`."""
    c, model = self.config, self._models(params)
    sigma_key, noise_key, prior_key, bank_key, head_key = jax.random.split(key, 5)
    dropped = condition_dropout(batch['drop'], c.drop)

    x = batch['latents'] * self.scaling_factor
    sigma = edm.draw_sigma(sigma_key, (len(x),), **c.noise)
    level = sigma[:, None, None, None, None]
    noise = jax.random.normal(noise_key, x.shape)
    z = x + level * noise

    prior = batch['mu']
    if c.emotion.sample:  # a fresh draw from the clip's Gaussian each time: the mean alone leaks identity
      prior = prior + batch['sigma'] * jax.random.normal(prior_key, prior.shape)
    emotion, look_up = self._emotion_tokens(model['emo_model'], prior, dropped, bank_key)
    face = self._face(model, batch, x.shape[2:4])
    v, mid = self._denoise(model, batch, dropped, z * edm.c_in(level), edm.c_noise(sigma), emotion, face)

    error = jnp.square(v.astype(jnp.float32) - edm.v_target(x, noise, level))
    if c.loss.face_weight or c.loss.mouth_weight:
      error = error * self._weight(batch['mask'], face[1][0].reshape(-1, *x.shape[2:4]))
    denoise = jnp.mean(error)
    logits = model['emo_model'].classify(mid.reshape(-1, *mid.shape[2:]), key=head_key)
    classify, accuracy = emotion_discrimination(logits.reshape(*mid.shape[:2], -1), batch['emotion_class'],
                                                dropped.emotion)
    warm = jnp.minimum(1.0, (step + 1) / max(c.loss.cls_warmup, 1))
    total = denoise + c.loss.lambda_cls * warm * classify + c.loss.lambda_vq * look_up.loss
    codes = jnp.zeros(c.emo_model.codebook_size).at[look_up.indices].set(1.0).sum()
    return total, {'denoise': denoise, 'cls': classify, 'cls_accuracy': accuracy, 'vq': look_up.loss,
                   'codes_used': codes}

  def _emotion_tokens(self, emo_model, prior, dropped: Dropped, key):
    """Tokens [B,T,D]. With probability `p_whole_bank` a step attends to the whole bank, as sampling does."""
    retrieved, look_up = emo_model(prior, retrieval=True, drop=dropped.emotion)
    p = self.config.emotion.p_whole_bank
    if p == 0:
      return retrieved, look_up
    # Dropped clips get what sampling uses for "no emotion": the zero prior against the whole bank.
    whole, _ = emo_model(jnp.where(dropped.emotion[:, None], 0, prior), retrieval=False)
    return jnp.where(jax.random.bernoulli(key, p), whole, retrieved), look_up

  def _denoise(self, model, batch, dropped: Dropped, scaled, timestep, emotion, face):
    """One UNet call on scaled noisy latents [B,F,h,w,c] with the conditions of the batch."""
    keep = lambda mask, value: jnp.where(mask.reshape(-1, *[1] * (value.ndim - 1)), 0, value)
    image = keep(dropped.image, batch['image_token'])
    reference = keep(dropped.image, batch['reference'])
    audio = model['audio_linear'](keep(dropped.audio, batch['audio']))
    kv = model['unet'].context_kv(image[:, None], audio, emotion[:, None])
    reference = jnp.broadcast_to(reference[:, None], scaled.shape)
    spatial, masks, ids = face
    return model['unet'](jnp.concatenate([scaled, reference], axis=-1), timestep, kv, ids,
                         spatial_condition=spatial[:, None], masks=masks, remat=self.config.remat)

  def _weight(self, mask, face) -> jax.Array:
    """Weight of each latent pixel in the denoising loss, [B,1,h,w,1]: more in face [B,h,w] and mouth, 1 on average."""
    mouth = mask_pyramid(mouth_region(mask), face.shape[1:], 1)[0].reshape(face.shape)
    weight = 1 + self.config.loss.face_weight * face + self.config.loss.mouth_weight * mouth
    return (weight / weight.mean((1, 2), keepdims=True))[:, None, ..., None]

  def _face(self, model, batch, latent_hw):
    """Pose guider features, mask pyramid and time ids of a batch."""
    mask = batch['mask']
    spatial = model['pose_guider'](jnp.broadcast_to(mask[..., None], (*mask.shape, 3)))
    masks = mask_pyramid(mask, latent_hw, len(self.config.unet.block_out_channels))
    ids = jnp.concatenate([jnp.full((len(mask), 1), FPS), batch['buckets']], axis=-1)
    return spatial, masks, ids

  def _conditions(self, params, batch) -> sampler.Conditions:
    """The sampler's conditions for windows of a batch, with the mean of each clip's prior."""
    model = self._models(params)
    spatial, masks, ids = self._face(model, batch, batch['reference'].shape[1:3])
    emotion, _ = model['emo_model'](batch['mu'], retrieval=False)
    return sampler.Conditions(
        reference_latents=batch['reference'], image_token=batch['image_token'],
        audio_tokens=model['audio_linear'](batch['audio']),
        null_audio=model['audio_linear'](jnp.zeros_like(batch['audio'][:1, :1]))[0, 0],
        emotion_tokens=emotion, null_emotion=model['emo_model'].null_tokens(),
        masks=masks, spatial=spatial, added_time_ids=ids)

  def evaluate(self, params, frozen):
    """Loss parts on unseen identities (fixed noise), and truth above samples for two of their windows.

    `audio_effect` and `emotion_effect` tell how much the denoising error rises, in percent, when each window gets the
    sound or the emotion of another: 0 where the model ignores them.
    """
    totals: collections.Counter[str] = collections.Counter()
    batches = self._loader('val', batch=4, seed=1, area=(1.1, 1.1))
    for i in range(4):
      batch = next(batches)
      batch['drop'] = np.ones_like(batch['drop'])  # nothing is dropped
      loss = lambda batch: self._eval_loss(params, frozen, batch, jax.random.key(i), jnp.array(10**9))[1]  # noqa: B023
      totals.update({name: float(value) / 4 for name, value in loss(batch).items()})
      for effect, names in SWAPPED.items():
        other = batch | {name: np.roll(batch[name], 1, axis=0) for name in names}
        totals[effect] += float(loss(other)['denoise']) / 4
    for effect in SWAPPED:
      totals[effect] = 100 * (totals[effect] / totals['denoise'] - 1)
    two = {name: value[:2] for name, value in batch.items()}
    conditions = self._sample_inputs(params, two)
    frames = self.config.data.frames
    noise = sampler.draw_noise(jax.random.split(jax.random.key(0), 2), conditions, frames)
    out = self._sampler(core.under('unet', params), noise, conditions, jnp.full(2, frames))[:, :frames]
    both = np.concatenate([two['latents'], np.asarray(out) / self.scaling_factor])
    truth, video = np.split(np.asarray(self._decode(both)), 2)
    rows = [row for pair in zip(truth, video) for row in pair]
    return dict(totals), {'sample': grid([np.clip(row, -1, 1) for row in rows])}

  def export(self, params) -> None:
    """Writes the trained components, and the settings that sampling needs."""
    for name in TRAINED:
      bundle.save_component(self.model_dir, name, registry.config_of(name, self.config[name].to_dict()).to_json(),
                            core.under(name, params), sources.provenance(self))
    data = self.config.data
    downsampling = 2 ** (len(self.vae.config.block_out_channels) - 1)
    bundle.save_settings(self.model_dir, {
        'image_size': data.size, 'multiple': downsampling * 2 ** (len(self.config.unet.block_out_channels) - 1),
        'sampler': self.config.sample.to_dict() | {'frames': data.frames}})


def emotion_discrimination(logits: jax.Array, label: jax.Array, dropped: jax.Array) -> tuple[jax.Array, jax.Array]:
  """L_cls (paper equation 16): cross-entropy per frame over clips with a label whose emotion was not dropped.

  Args:
    logits: [B,F,classes].
    label: int32 [B], -1 where unknown.
    dropped: bool [B]: the unconditional branch must stay free of emotion.

  Returns:
    Mean loss and accuracy over the counted clips; both 0 where there is none.
  """
  counted = (label >= 0) & ~dropped
  target = jnp.broadcast_to(jnp.maximum(label, 0)[:, None], logits.shape[:2])
  entropy = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), target).mean(1)
  hit = (logits.argmax(-1) == target).mean(1)
  mean = lambda values: jnp.where(counted, values, 0).sum() / jnp.maximum(counted.sum(), 1)
  return mean(entropy), mean(hit)


def mouth_region(mask: jax.Array) -> jax.Array:
  """The part of a rectangular face mask `[B,H,W]` where the mouth is: half its width, a third of its height."""
  def inside(axis: int, low: float, high: float) -> jax.Array:
    rows = mask.max(axis) > 0  # [B,n], the extent of the rectangle along the other axis
    centre = (jnp.cumsum(rows, -1) - .5) / jnp.maximum(rows.sum(-1, keepdims=True), 1)
    return rows & (centre > low) & (centre < high)
  return (inside(2, .56, .90)[:, :, None] & inside(1, .25, .75)[:, None]).astype(mask.dtype)
