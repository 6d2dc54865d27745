"""Task: the diffusion model (paper sections 3.2 and 3.3): denoising, emotion
discrimination, emotion bank.
"""

import dataclasses
import functools
import os
from typing import Any

import grain
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from dicetalk_jax import bundle, parallel
from dicetalk_jax.component import Component
from dicetalk_jax.data import clip_record, example_sampling, feature_extraction
from dicetalk_jax.data.diffusion_loader import DiffusionExamples, diffusion_loader
from dicetalk_jax.data.mixture import DatasetPart
from dicetalk_jax.diffusion import sampler
from dicetalk_jax.errors import ConfigError, WeightsError
from dicetalk_jax.media import contact_sheet
from dicetalk_jax.media.video import Video
from dicetalk_jax.models import parameters, registry
from dicetalk_jax.models.clip import CLIPVisionConfig
from dicetalk_jax.models.embedder import EmbedderConfig
from dicetalk_jax.models.parameters import Params
from dicetalk_jax.models.unet import init_adapters_from_image, zero_residuals
from dicetalk_jax.models.vae import VAEConfig
from dicetalk_jax.models.whisper import WhisperConfig
from dicetalk_jax.training import (
  codebook,
  config_checks,
  datasets,
  init_from,
  metric_means,
)
from dicetalk_jax.training.diffusion_loss import DiffusionLoss, model_fps
from dicetalk_jax.training.run_log import Picture
from dicetalk_jax.training.state import TrainState, partition
from dicetalk_jax.training.task import Task

TRAINED = ('unet', 'audio_linear', 'pose_guider', 'emo_model')  # Sonic: the first two
NEW = (r'^(audio_linear|pose_guider|emo_model)\.', r'\.to_[kv]_ip\.')

EVAL_AREA = (1.1, 1.1)  # enlargement of the face box in evaluation
EVAL_BATCHES = 4
ALL_UPDATES = 10**9  # a step at which every warm-up is over
SAMPLE_SECONDS = 4  # longest sample
SHEET_COLUMNS = 8  # how many of its frames the contact sheet shows
# What each window gets from another one, to see whether the model uses it.
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

  def __init__(self, config: Any, mesh: Mesh, workdir: os.PathLike | str):
    config_checks.diffusion(config)
    super().__init__(config, mesh, workdir)
    self.has_emotion = 'emo_model' in config

    self._check_model()
    self.start = init_from.folder(config, 'unet')

    # Structure of the trained components.
    self.builds = {}
    graphs = {}
    self.targets = {}
    for name in self.trained():
      self.builds[name], graphs[name], self.targets[name] = config_checks.structure(
        config, name
      )
    self._check_frozen()

    # Data and frozen networks.
    self.train, self.val = datasets.open_train_and_val(config, self.data_dir)
    random = config.get('frozen', {})
    self.vae: Component[VAEConfig] = Component.load_frozen(self.model_dir, 'vae')
    self.whisper: Component[WhisperConfig] = Component.load_or_random(
      self.model_dir, 'whisper', random.get('whisper'), seed=1
    )
    self.tower: Component[CLIPVisionConfig] = Component.load_or_random(
      self.model_dir, 'image_encoder', random.get('image_encoder'), seed=2
    )
    self.embedder: Component[EmbedderConfig] | None = None
    if self.has_emotion:
      self.embedder = Component.load(self.model_dir, 'embedder')
    self._check_fit()
    self._check_priors()
    if self.has_emotion:
      datasets.announce_unlabelled(config, self.train)
    self.parts = {
      'train': [self._with_features(part) for part in self.train],
      'val': [self._with_features(part) for part in self.val],
    }

    # Loss and sampler.
    self._loss = DiffusionLoss(config, graphs, self.scaling_factor)
    self._eval_loss = jax.jit(functools.partial(self._loss, train=False))
    self._decode = self.vae.stage(lambda model, z: model.decode(z))
    self._sampling = sampler.SamplerConfig(
      **config.sample.to_dict(),
      frames=config.data.frames,
      scaling_factor=self.scaling_factor,
    )
    self._sampler = sampler.make_sampler(graphs['unet'], self._sampling, mesh)
    self._sample_inputs = jax.jit(self._loss.conditions)

  @property
  def scaling_factor(self) -> float:
    return self.vae.config.scaling_factor

  @property
  def prior_of(self) -> str:
    """The clip whose prior a window gets; see `DiffusionExamples.emotion`."""
    return self.config.emotion.emo_ref if self.has_emotion else 'none'

  def trained(self) -> tuple[str, ...]:
    return tuple(name for name in TRAINED if name in self.config)

  def needed(self) -> tuple[str, ...]:
    names = ('vae', 'whisper', 'image_encoder')
    return (*names, 'embedder') if 'emo_model' in self.config else names

  def _check_model(self) -> None:
    """Refuses to start without the components that are never drawn at random."""
    names = ('vae', 'embedder') if self.has_emotion else ('vae',)
    if not self.config.model:
      raise ConfigError(
        'config.model is missing: the diffusion task needs the '
        f'{" and the ".join(names)} of a model folder; name that of the run before '
        '(configs/embedder.py), such as --config.model=runs/embedder/model'
      )
    bundle.require(self.config.model, *names)

  def _check_frozen(self) -> None:
    """Refuses to freeze parameters at random values."""
    config = self.config
    known = bundle.components(self.start) if self.start else {}
    frozen = self._frozen_names()
    random = [name for name in frozen if name.partition('.')[0] not in known]
    if random:
      raise ConfigError(
        f'config.trainable={config.trainable} would freeze {len(random)} parameters, '
        f"such as '{random[0]}', at random values; name a model folder that has them "
        'with config.init_from, or train all'
      )

  def _frozen_names(self) -> list[str]:
    """Names of the parameters that are not trained."""
    names = [f'{name}.{key}' for name, target in self.targets.items() for key in target]
    if not self.config.trainable:
      return names
    _, frozen = partition(dict.fromkeys(names), self.config.trainable, sets=self.sets)
    return list(frozen)

  def _check_priors(self) -> None:
    """Refuses a frozen emotion model that was trained on the priors of another
    embedder.
    """
    if self.embedder is None:
      return
    trained_on = self._trained_on()
    if not bundle.readable(self.embedder.fingerprint, trained_on):
      raise WeightsError(
        f'the emotion model of {self.config.init_from} learned on priors of another '
        f'embedder ({trained_on}) than that of {self.config.model} '
        f'({self.embedder.fingerprint}); train it too with config.trainable, or name a '
        'model folder with its embedder in config.model'
      )

  def _trained_on(self) -> str:
    """The embedder on whose priors the emotion model is trained here, or was before if
    it is frozen; '' if unknown.
    """
    emo_model = bundle.EMOTION_MODEL
    own = {f'{emo_model}.{key}' for key in self.targets[emo_model]}
    if own <= set(self._frozen_names()):
      return bundle.learned_priors(self.start)
    return self.embedder.fingerprint if self.embedder is not None else ''

  def _check_fit(self) -> None:
    """Refuses frozen networks that do not fit the trained ones."""
    channels = self.vae.config.latent_channels
    sizes = {
      'unet.out_channels': channels,
      'unet.in_channels': 2 * channels,
      'unet.cross_attention_dim': self.tower.config.projection_dim,
      'audio_linear.channels': self.whisper.config.d_model,
      'audio_linear.blocks': self.whisper.config.encoder_layers + 1,
    }
    if self.embedder is not None:
      sizes['emo_model.prior_dim'] = self.embedder.config.width
    config_checks.check_fit(self.config, sizes)

  def _with_features(self, part: DatasetPart) -> DatasetPart:
    """Adds the outputs of the frozen networks to a data set; computes what is
    missing.
    """
    networks: dict[str, Component[Any]] = {
      'vae': self.vae,
      'image_encoder': self.tower,
      'whisper': self.whisper,
    }
    names = ['latents', 'clip_embed', 'whisper']
    if self.embedder is not None:
      networks['embedder'] = self.embedder
      names.append('prior')
    extractor = feature_extraction.FeatureExtractor(
      networks, part.source, self.data_dir / 'features', self.config.data.clip_stride
    )
    return dataclasses.replace(part, features=extractor.load_or_compute(*names))

  def _batches(
    self, split: str, *, batch: int, seed: int, area: tuple[float, float], **settings
  ) -> grain.DatasetIterator:
    data = self.config.data
    return iter(
      diffusion_loader(
        self.parts[split],
        batch=batch,
        seed=seed,
        area=area,
        frames=data.frames,
        step=data.step,
        mask_size=data.size,
        measured_buckets=data.buckets == 'measured',
        clip_stride=data.clip_stride,
        reference=data.reference,
        emotion=self.prior_of,
        **settings,
      )
    )

  def batches(self) -> grain.DatasetIterator:
    index, count = parallel.batch_shard(self.mesh)
    return self._batches(
      'train',
      batch=self.config.batch_size // count,
      seed=self.config.seed,
      area=self.config.data.area,
      shard=(index, count),
      workers=self.config.data.workers,
    )

  def init(self, key: jax.Array) -> Params:
    """Returns parameters of all trained components: from `init_from`, or drawn.

    Adapters begin as copies of the projections of the image, also those that a UNet in
    `init_from` lacks: it may be plain SVD, or Sonic. Each device reads its own slices
    only.
    """
    config = self.config
    known = bundle.components(self.start) if self.start else {}
    shardings = functools.partial(parallel.shardings, mesh=self.mesh)
    params: Params = {}
    for i, name in enumerate(self.builds):
      if name in known:
        component = init_from.load_initial(config, name, self.targets[name], shardings)
      else:
        component = self._drawn(name, jax.random.fold_in(key, i))
      params |= parameters.add_prefix(name, component)
    return params

  def _drawn(self, name: str, key: jax.Array) -> Params:
    """Draws the initial parameters of a component."""
    config = self.config
    params = parameters.init_params(self.builds[name], key)
    params = parallel.put_params(params, self.mesh)
    if name == 'unet':
      return zero_residuals(init_adapters_from_image(params))
    has_bank = name == 'emo_model' and config.emo_model.mode == 'bank'
    if has_bank and config.emotion.bank_init == 'kmeans':
      return codebook.fit_codes(params, self.parts['train'], config.seed)
    return params

  def loss(
    self, params: Params, batch: Any, key: jax.Array, step: jax.Array
  ) -> tuple[jax.Array, dict[str, Any]]:
    """See `DiffusionLoss`."""
    return self._loss(params, batch, key, step)

  def extra_state(self, params: Params) -> Params:
    """Returns statistics of the use of the codes of the emotion bank."""
    return codebook.extra_state(params, self.config) if self.has_emotion else {}

  def after_update(
    self, state: TrainState, rows: dict[str, jax.Array], key: jax.Array
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    """Moves codes that no gradient moves."""
    return codebook.after_update(state, rows, key, self.config)

  def evaluate(self, params: Params) -> tuple[dict[str, float], dict[str, Picture]]:
    """Returns loss parts on unseen identities (fixed noise) under the conditions of
    sampling, and samples next to the truth for two of their clips.

    `audio_effect` and `emotion_effect` are the increase of the denoising error, in
    percent, when each window gets the audio or the emotion of another: 0 if the model
    ignores them.
    """
    parts = []
    effects = dict(SWAPPED)
    if not self.has_emotion:
      del effects['emotion_effect']
    errors: dict[str, list[float]] = {effect: [] for effect in effects}
    batches = self._batches('val', batch=4, seed=1, area=EVAL_AREA)
    for i in range(EVAL_BATCHES):
      batch = next(batches)
      batch['drop'] = np.ones_like(batch['drop'])  # nothing is dropped
      parts.append(self._loss_parts(params, batch, i))
      for effect, names in effects.items():
        others = {name: np.roll(batch[name], 1, axis=0) for name in names}
        swapped = self._loss_parts(params, batch | others, i)
        errors[effect].append(float(swapped['denoise']))
    metrics = metric_means.aggregate(parts)
    for effect, values in errors.items():
      metrics[effect] = 100 * (float(np.mean(values)) / metrics['denoise'] - 1)
    return metrics, self._samples(params)

  def _loss_parts(self, params: Params, batch: Any, seed: int) -> dict[str, np.ndarray]:
    """Parts of the loss to log, with noise of a seed."""
    key = jax.random.key(seed)
    _, parts = self._eval_loss(params, batch, key, jnp.array(ALL_UPDATES))
    return parallel.to_host({k: v for k, v in parts.items() if k != 'per_row'})

  def _samples(self, params: Params) -> dict[str, Picture]:
    """Samples the beginnings of two clips of unseen identities: videos of truth and
    sample with audio, and a sheet of frames.
    """
    # 1. Choose clips: the first of the first data set, the last of the last
    step = self.config.data.step
    first = self.parts['val'][0]
    last = self.parts['val'][-1]
    clips = [(first, 0), (last, len(last.source) - 1)]
    lengths = [part.source.table.num_frames[clip] for part, clip in clips]
    longest = clip_record.FPS * SAMPLE_SECONDS
    frames = min((min(length, longest) - 1) // step + 1 for length in lengths)

    # 2. Sample
    rows = step * np.arange(frames)
    windows = []
    for part, clip in clips:
      rng = np.random.default_rng(0)
      windows.append(self._examples(part).window(clip, rng, rows))
    batch = {name: np.stack([w[name] for w in windows]) for name in windows[0]}
    conditions = self._sample_inputs(params, batch)
    keys = jax.random.split(jax.random.key(0), len(clips))
    noise = sampler.draw_noise(keys, conditions, self._sampling.padding_frames)
    unet = parameters.strip_prefix('unet', params)
    out = self._sampler(unet, noise, conditions, jnp.full(len(clips), frames))
    samples = np.asarray(out[:, :frames]) / self.scaling_factor

    # 3. Decode, and show next to the truth
    pictures: dict[str, Picture] = {}
    sheet = []
    shown = np.linspace(0, frames - 1, min(frames, SHEET_COLUMNS)).round().astype(int)
    for i, (part, clip) in enumerate(clips):
      record = part.source[clip]
      caption = f'{clip_record.decode_emotion(record)}: truth'
      truth = self._pixels(batch['latents'][i])
      sample = self._pixels(samples[i])
      pictures[f'sample_{i}'] = Video(
        contact_sheet.side_by_side([truth, sample], [caption, 'sample']),
        model_fps(self.config),
        clip_record.decode_audio(record),
      )
      sheet += [(caption, truth[shown]), ('sample', sample[shown])]
    pictures['sample'] = contact_sheet.contact_sheet(sheet)
    return pictures

  def _examples(self, part: DatasetPart) -> DiffusionExamples:
    data = self.config.data
    return DiffusionExamples(
      part,
      frames=data.frames,
      step=data.step,
      mask_size=data.size,
      area=EVAL_AREA,
      measured_buckets=False,
      clip_stride=data.clip_stride,
      reference=data.reference,
      emotion=self.prior_of,
    )

  def _pixels(self, latents: np.ndarray) -> np.ndarray:
    """Decodes unscaled latents `[N,h,w,c]` to uint8 `[N,H,W,3]`, a window at a time to
    bound memory.
    """
    size = self.config.data.frames
    padding = -len(latents) % size
    padded = np.pad(latents, ((0, padding), (0, 0), (0, 0), (0, 0)), mode='edge')
    windows = [
      np.asarray(self._decode(padded[None, start : start + size]))[0]
      for start in range(0, len(padded), size)
    ]
    video = np.concatenate(windows)[: len(latents)]
    return np.round((np.clip(video, -1, 1) + 1) * 127.5).astype(np.uint8)

  def export(self, params: Params) -> None:
    """Writes the trained components, and the settings that sampling needs."""
    config = self.config
    for name in self.builds:
      bundle.save_component(
        self.model_dir,
        name,
        registry.config_of(name, config[name].to_dict()).to_json(),
        parameters.strip_prefix(name, params),
        init_from.provenance(self),
        priors=self._trained_on() if name == bundle.EMOTION_MODEL else None,
      )
    # Sides of an image must be multiples of what autoencoder and UNet halve them to.
    halvings = len(self.vae.config.block_out_channels) - 1
    halvings += len(config.unet.block_out_channels) - 1
    bundle.save_settings(
      self.model_dir,
      {
        'kind': 'dicetalk' if self.has_emotion else 'sonic',
        'image_size': config.data.size,
        'multiple': 2**halvings,
        'frame_step': config.data.step,
        'time_ids': (model_fps(config), *example_sampling.FALLBACK_BUCKETS),
        'sampler': config.sample.to_dict() | {'frames': config.data.frames},
      },
    )
