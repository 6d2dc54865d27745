"""Task: the diffusion model (paper sections 3.2 and 3.3): denoising, emotion
discrimination, emotion bank.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from dicetalk_jax import bundle, parallel
from dicetalk_jax.component import Component
from dicetalk_jax.data import clip_record, feature_extraction
from dicetalk_jax.data.diffusion_loader import DiffusionExamples, diffusion_loader
from dicetalk_jax.data.mixture import DatasetPart
from dicetalk_jax.diffusion import sampler
from dicetalk_jax.errors import ConfigError, WeightsError
from dicetalk_jax.media import contact_sheet
from dicetalk_jax.media.video import Video
from dicetalk_jax.models import parameters, registry
from dicetalk_jax.models.unet import init_adapters_from_image, zero_residuals
from dicetalk_jax.training import (
  codebook,
  config_checks,
  datasets,
  init_from,
  metric_means,
)
from dicetalk_jax.training.diffusion_loss import FPS, DiffusionLoss
from dicetalk_jax.training.run_log import Picture
from dicetalk_jax.training.state import partition
from dicetalk_jax.training.task import Task

TRAINED = (
  'unet',
  'audio_linear',
  'pose_guider',
  'emo_model',
)  # Sonic has the first two only
NEW = (r'^(audio_linear|pose_guider|emo_model)\.', r'\.to_[kv]_ip\.')
SAMPLE_FRAMES, SHEET_COLUMNS = (
  50,
  8,
)  # longest sample, 4 s, and how many of its frames the sheet shows
SWAPPED = {'audio_effect': ('audio',), 'emotion_effect': ('mu', 'sigma')}


class DiffusionTask(Task):
  """L = L_denoise + lambda_cls L_cls + lambda_vq L_vq (paper equation 15).

  Everything frozen (latents, CLIP tokens, Whisper states, emotion priors) is computed
  once, before training. Components that the configuration lacks are left out: without
  `emo_model` there is no emotion at all.
  """

  name = 'diffusion'
  sets = {
    'all': ('.*',),
    'adapters': NEW,
    'adapters_temporal': (*NEW, r'\.temporal_transformer_blocks\.'),
  }
  new_modules = NEW

  def __init__(self, config, mesh, workdir):
    super().__init__(config, mesh, workdir)
    config_checks.diffusion(config)
    self.builds = {
      name: registry.builder(name, config[name].to_dict(), config.dtype)
      for name in TRAINED
      if name in config
    }
    abstract = {name: parameters.abstract(build) for name, build in self.builds.items()}
    self.targets = {name: target for name, (_, target) in abstract.items()}
    self._check_held()
    self.has_emotion = 'emo_model' in config
    self.prior_of = config.emotion.emo_ref if self.has_emotion else 'none'
    self._check_model()  # before data is made
    self.train, self.val = datasets.open_train_and_val(config, self.data_dir)
    random = config.get('frozen', {})
    self.vae = Component.load(self.model_dir, 'vae')
    self.whisper = Component.load_or_random(
      self.model_dir, 'whisper', random.get('whisper'), seed=1
    )
    self.tower = Component.load_or_random(
      self.model_dir, 'image_encoder', random.get('image_encoder'), seed=2
    )
    self.embedder = (
      Component.load(self.model_dir, 'embedder') if self.has_emotion else None
    )
    self._check_fit()
    self._check_priors()
    self._loss = DiffusionLoss(
      config,
      {name: graph for name, (graph, _) in abstract.items()},
      self.scaling_factor,
    )
    self.parts = {
      split: [self._part(part) for part in parts]
      for split, parts in (('train', self.train), ('val', self.val))
    }
    self._decode = self.vae.stage(lambda model, z: model.decode(z))
    self._eval_loss = jax.jit(functools.partial(self._loss, train=False))
    self._sampling = sampler.SamplerConfig(
      **config.sample.to_dict(),
      frames=config.data.frames,
      scaling_factor=self.scaling_factor,
    )
    self._sampler = sampler.make_sampler(abstract['unet'][0], self._sampling, mesh)
    self._sample_inputs = jax.jit(self._loss.conditions)

  @property
  def scaling_factor(self) -> float:
    return self.vae.config.scaling_factor

  def trained(self) -> tuple[str, ...]:
    return tuple(name for name in TRAINED if name in self.config)

  def needed(self) -> tuple[str, ...]:
    names = ('vae', 'whisper', 'image_encoder')
    return (*names, 'embedder') if 'emo_model' in self.config else names

  def _check_model(self):
    """Refuses to start without the components that are never drawn at random."""
    names = ('vae', 'embedder') if self.has_emotion else ('vae',)
    if not self.config.model:
      raise ConfigError(
        'config.model is missing: the diffusion task needs the '
        f'{" and the ".join(names)} of a model folder; name one, such as '
        '--config.model=runs/embedder/model'
      )
    bundle.require(self.config.model, *names)

  def _check_held(self):
    """Refuses to hold parameters at random values."""
    c = self.config
    known = bundle.components(c.init_from) if c.init_from else {}
    held = self._held()
    if random := [name for name in held if name.partition('.')[0] not in known]:
      raise ConfigError(
        f'config.trainable={c.trainable} would hold {len(random)} parameters, such as '
        f"'{random[0]}', at random values; name a model folder that has them with "
        'config.init_from, or train all'
      )

  def _held(self) -> list[str]:
    """Names of the parameters that are not trained."""
    names = [f'{name}.{key}' for name, target in self.targets.items() for key in target]
    if not self.config.trainable:
      return names
    return list(
      partition(dict.fromkeys(names), self.config.trainable, sets=self.sets)[1]
    )

  def _check_priors(self):
    """Refuses an emotion model that stays as it is, but learned on the priors of
    another embedder.
    """
    if not self.has_emotion:
      return
    learned_on = self._learned_on()
    if not bundle.readable(self.embedder.fingerprint, learned_on):
      raise WeightsError(
        f'the emotion model of {self.config.init_from} learned on priors of another '
        f'embedder ({learned_on}) than that of {self.config.model} '
        f'({self.embedder.fingerprint}); train it too with config.trainable, or name a '
        'model folder with its embedder in config.model'
      )

  def _learned_on(self) -> str:
    """The embedder whose priors the emotion model learns on here, or did before if
    it is frozen; '' if unknown.
    """
    own = {
      f'{bundle.EMOTION_MODEL}.{key}' for key in self.targets[bundle.EMOTION_MODEL]
    }
    if own <= set(self._held()):
      return bundle.learned_priors(self.config.init_from)
    return self.embedder.fingerprint

  def _check_fit(self):
    """Refuses parts that do not fit each other, before anything is computed."""
    c = self.config
    wanted = {
      'unet.out_channels': (c.unet.out_channels, self.vae.config.latent_channels),
      'unet.in_channels': (c.unet.in_channels, 2 * self.vae.config.latent_channels),
      'unet.cross_attention_dim': (
        c.unet.cross_attention_dim,
        self.tower.config.projection_dim,
      ),
      'audio_linear.output_dim': (
        c.audio_linear.output_dim,
        c.unet.cross_attention_dim,
      ),
      'audio_linear.channels': (c.audio_linear.channels, self.whisper.config.d_model),
      'audio_linear.blocks': (
        c.audio_linear.blocks,
        self.whisper.config.encoder_layers + 1,
      ),
    }
    if 'pose_guider' in c:
      wanted['pose_guider.conditioning_embedding_channels'] = (
        c.pose_guider.conditioning_embedding_channels,
        c.unet.block_out_channels[0],
      )
    if self.has_emotion:
      wanted |= {
        'emo_model.prior_dim': (c.emo_model.prior_dim, self.embedder.config.width),
        'emo_model.classifier_in': (
          c.emo_model.classifier_in,
          c.unet.block_out_channels[-1],
        ),
        'emo_model.dim': (c.emo_model.dim, c.unet.cross_attention_dim),
      }
    for key, (value, fitting) in wanted.items():
      if value != fitting:
        raise ConfigError(
          f'config.{key}={value} does not fit the other parts of the model, which need '
          f'{fitting}'
        )

  def _part(self, part: DatasetPart) -> DatasetPart:
    frozen = dict(vae=self.vae, image_encoder=self.tower, whisper=self.whisper)
    if self.has_emotion:
      frozen['embedder'] = self.embedder
    features = feature_extraction.FeatureExtractor(
      frozen, part.source, self.data_dir / 'features', self.config.data.clip_stride
    )
    return dataclasses.replace(
      part,
      features=features.load_or_compute(
        'latents', 'clip_embed', 'whisper', *['prior'] * self.has_emotion
      ),
    )

  def _loader(self, split: str, **kwargs):
    data = self.config.data
    return iter(
      diffusion_loader(
        self.parts[split],
        frames=data.frames,
        step=data.step,
        mask_size=data.size,
        measured_buckets=data.buckets == 'measured',
        clip_stride=data.clip_stride,
        reference=data.reference,
        emotion=self.prior_of,
        **kwargs,
      )
    )

  def batches(self):
    index, count = parallel.batch_shard(self.mesh)
    return self._loader(
      'train',
      batch=self.config.batch_size // count,
      seed=self.config.seed,
      shard=(index, count),
      area=self.config.data.area,
      workers=self.config.data.workers,
    )

  def init(self, key: jax.Array) -> parameters.Params:
    """Parameters of all trained components: from `init_from`, or drawn.

    Adapters begin as copies of the image's projections, those that a UNet in
    `init_from` lacks too: it may be plain SVD, or Sonic. Each device reads or draws its
    own part only.
    """
    params = {}
    shardings = functools.partial(parallel.shardings, mesh=self.mesh)
    for i, (name, build) in enumerate(self.builds.items()):
      if self.config.init_from and name in bundle.components(self.config.init_from):
        part = init_from.load_initial(self.config, name, self.targets[name], shardings)
      else:
        part = parameters.init_params(
          build, jax.random.fold_in(key, i), shardings=shardings(self.targets[name])
        )
        part = (
          zero_residuals(init_adapters_from_image(part)) if name == 'unet' else part
        )
        if (
          name == 'emo_model'
          and self.config.emo_model.mode == 'bank'
          and self.config.emotion.bank_init == 'kmeans'
        ):
          part = codebook.fit_codes(part, self.parts['train'], self.config.seed)
      params |= parameters.add_prefix(name, part)
    return params

  def loss(self, params, frozen, batch, key, step):
    """See `DiffusionLoss`."""
    return self._loss(params, batch, key, step)

  def extra_state(self, params):
    """How the codes of the emotion bank are used."""
    return codebook.extra_state(params, self.config) if self.has_emotion else {}

  def after_update(self, state, rows, key):
    """Moves codes that no gradient moves."""
    return codebook.after_update(state, rows, key, self.config)

  def evaluate(self, params, frozen):
    """Loss parts on unseen identities (fixed noise), and samples beside the truth for
    two of their clips.

    `audio_effect` and `emotion_effect` tell how much the denoising error rises, in
    percent, when each window gets the sound or the emotion of another: 0 where the
    model ignores them.
    """
    parts, swapped = (
      [],
      {
        effect: []
        for effect in SWAPPED
        if self.has_emotion or effect != 'emotion_effect'
      },
    )
    batches = self._loader('val', batch=4, seed=1, area=(1.1, 1.1))
    for i in range(4):
      batch = next(batches)
      batch['drop'] = np.ones_like(batch['drop'])  # nothing is dropped

      def loss(batch):
        return self._eval_loss(params, batch, jax.random.key(i), jnp.array(10**9))[1]  # noqa: B023

      parts.append(
        parallel.to_host(
          {name: value for name, value in loss(batch).items() if name != 'per_row'}
        )
      )
      for effect, losses in swapped.items():
        other = batch | {
          name: np.roll(batch[name], 1, axis=0) for name in SWAPPED[effect]
        }
        losses.append(float(loss(other)['denoise']))
    metrics = metric_means.aggregate(parts)
    for effect, losses in swapped.items():
      metrics[effect] = 100 * (np.mean(losses) / metrics['denoise'] - 1)
    return metrics, self._samples(params)

  def _samples(self, params) -> dict[str, Picture]:
    """The beginnings of two clips of unseen people: videos of truth and sample with
    sound, and a sheet of frames.
    """
    parts, data = self.parts['val'], self.config.data
    clips = [(parts[0], 0), (parts[-1], len(parts[-1].source) - 1)]
    frames = min(
      SAMPLE_FRAMES,
      *(
        (part.source.table.num_frames[clip] - 1) // data.step + 1
        for part, clip in clips
      ),
    )
    rows = data.step * np.arange(frames)
    windows = []
    for part, clip in clips:
      examples = DiffusionExamples(
        part,
        data.frames,
        data.step,
        data.size,
        (1.1, 1.1),
        False,
        data.clip_stride,
        data.reference,
        self.prior_of,
      )
      windows.append(examples.window(clip, np.random.default_rng(0), rows))
    batch = {
      name: np.stack([window[name] for window in windows]) for name in windows[0]
    }
    conditions = self._sample_inputs(params, batch)
    noise = sampler.draw_noise(
      jax.random.split(jax.random.key(0), 2), conditions, self._sampling.padding_frames
    )
    out = self._sampler(
      parameters.strip_prefix('unet', params), noise, conditions, jnp.full(2, frames)
    )[:, :frames]
    pictures, sheet_rows = {}, []
    for (part, clip), *latents in zip(
      clips, batch['latents'], np.asarray(out) / self.scaling_factor
    ):
      record = part.source[clip]
      truth, sample = (self._pixels(z) for z in latents)
      emotion = clip_record.decode_emotion(record)
      pictures[f'sample_{len(pictures)}'] = Video(
        contact_sheet.side_by_side([truth, sample], [f'{emotion}: truth', 'sample']),
        FPS,
        clip_record.decode_audio(record),
      )
      shown = np.linspace(0, frames - 1, min(frames, SHEET_COLUMNS)).round().astype(int)
      sheet_rows += [(f'{emotion}: truth', truth[shown]), ('sample', sample[shown])]
    return pictures | {'sample': contact_sheet.contact_sheet(sheet_rows)}

  def _pixels(self, latents: np.ndarray) -> np.ndarray:
    """Unscaled latents `[N,h,w,c]` to uint8 `[N,H,W,3]`, a window at a time, to
    bound memory.
    """
    size = self.config.data.frames
    padded = np.pad(latents, ((0, -len(latents) % size), *[(0, 0)] * 3), mode='edge')
    video = np.concatenate(
      [
        np.asarray(self._decode(padded[None, i : i + size]))[0]
        for i in range(0, len(padded), size)
      ]
    )
    return np.round((np.clip(video[: len(latents)], -1, 1) + 1) * 127.5).astype(
      np.uint8
    )

  def export(self, params) -> None:
    """Writes the trained components, and the settings that sampling needs."""
    for name in self.builds:
      bundle.save_component(
        self.model_dir,
        name,
        registry.config_of(name, self.config[name].to_dict()).to_json(),
        parameters.strip_prefix(name, params),
        init_from.provenance(self),
        priors=self._learned_on() if name == bundle.EMOTION_MODEL else None,
      )
    data = self.config.data
    downsampling = 2 ** (len(self.vae.config.block_out_channels) - 1)
    bundle.save_settings(
      self.model_dir,
      {
        'kind': 'dicetalk' if self.has_emotion else 'sonic',
        'image_size': data.size,
        'multiple': downsampling * 2 ** (len(self.config.unet.block_out_channels) - 1),
        'sampler': self.config.sample.to_dict() | {'frames': data.frames},
      },
    )
