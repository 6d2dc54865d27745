"""Task: the disentangled emotion embedder (paper section 3.1), trained by InfoNCE on
its Gaussian prior.
"""

from collections.abc import Iterable
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from dicetalk_jax import bundle, parallel
from dicetalk_jax.component import Component
from dicetalk_jax.data import example_sampling, face_crops, feature_extraction
from dicetalk_jax.data.clip_record import UNKNOWN
from dicetalk_jax.data.embedder_loader import embedder_loader
from dicetalk_jax.data.mixture import DatasetPart
from dicetalk_jax.errors import ConfigError, DataError
from dicetalk_jax.metrics import clustering, tsne
from dicetalk_jax.models import parameters, registry
from dicetalk_jax.training import config_checks, contrastive, datasets, init_from
from dicetalk_jax.training.mean_priors import mean_gaussians
from dicetalk_jax.training.run_log import Picture
from dicetalk_jax.training.task import Task

BATCH = 64  # clips embedded at a time in evaluation


class EmbedderTask(Task):
  """Clips of one person in one emotion attract each other, all others repel (paper
  equations 7 and 8).
  """

  name = 'embedder'
  constants = (r'\.expr_(mean|std)$',)

  def __init__(self, config, mesh, workdir):
    super().__init__(config, mesh, workdir)
    config_checks.embedder(config)
    self.model_config = registry.config_of('embedder', config.embedder.to_dict())
    self.visual = face_crops.input_name(self.model_config)
    data = config.data
    size = (data.identities * data.emotions + data.videos) * data.clips
    if config.batch_size != size:
      raise ConfigError(
        f'config.batch_size={config.batch_size}, but the groups of config.data make '
        f'{size} windows (identities x emotions x clips + videos x clips); set it to '
        'that'
      )
    self.train, self.val = datasets.open_train_and_val(config, self.data_dir)
    for parts in (self.train, self.val):
      self._labelled(parts)  # refuses data without labels before training
    if (
      self.visual == 'expression'
      and self.model_config.modalities != 'audio'
      and not any(part.source.expression_dim for part in self.train)
    ):
      raise DataError(
        f'no clip of {config.data.dataset} has expressions, and the prior would be '
        'learnt from sound alone; prepare the data with --expression=DIR, or take the '
        "preset 'crops', which sees pictures, or 'audio_only'"
      )
    self.whisper = Component.load_or_random(
      self.model_dir, 'whisper', config.get('frozen', {}).get('whisper'), seed=1
    )
    if self.whisper.config.d_model != config.embedder.whisper_dim:
      raise ConfigError(
        f'config.embedder.whisper_dim={config.embedder.whisper_dim}, but the Whisper '
        f'encoder of {self.model_dir} has width {self.whisper.config.d_model}'
      )
    states = self.whisper.config.encoder_layers + 1
    if config.embedder.whisper_states != states:
      raise ConfigError(
        f'config.embedder.whisper_states={config.embedder.whisper_states}, but the '
        f'Whisper encoder of {self.model_dir} has {states} states, one more than '
        'layers; set it to that'
      )
    for source in [part.source for part in (*self.train, *self.val)]:
      if self.visual == 'expression' and source.expression_dim not in (
        0,
        config.embedder.expr_dim,
      ):
        raise ConfigError(
          f'config.embedder.expr_dim={config.embedder.expr_dim}, but the clips of '
          f'{source} have {source.expression_dim} expression coefficients per frame; '
          'set it to that'
        )
    self.build = registry.builder('embedder', config.embedder.to_dict(), config.dtype)
    self.graphdef, self.target = parameters.abstract(self.build)
    self.parts = {
      split: [self._part(part) for part in parts]
      for split, parts in (('train', self.train), ('val', self.val))
    }
    self._embed = jax.jit(lambda params, *batch: self._model(params)(*batch))

  def _part(self, part: DatasetPart) -> DatasetPart:
    return dataclasses.replace(
      part,
      features=self._features(part, whisper=self.whisper).load_or_compute(
        *feature_extraction.inputs(self.model_config)
      ),
    )

  def _features(
    self, part: DatasetPart, **networks: Component
  ) -> feature_extraction.FeatureExtractor:
    return feature_extraction.FeatureExtractor(
      networks, part.source, self.data_dir / 'features'
    )

  @staticmethod
  def _labelled(
    parts: list[DatasetPart],
  ) -> tuple[list[DatasetPart], np.ndarray, np.ndarray, np.ndarray]:
    """The emotional ones among the parts; person, emotion and level of all their
    clips.
    """
    names, parts = (
      ', '.join(str(part.source) for part in parts),
      [part for part in parts if part.labelled],
    )
    if not parts:
      raise DataError(
        f'no clip of {names} has an emotion label, and the embedder learns from '
        'labels; add a data set that has them to config.data.dataset'
      )
    tables = [part.source.table for part in parts]
    return parts, *(
      np.concatenate([getattr(t, name) for t in tables])
      for name in ('identity', 'emotion', 'intensity')
    )

  def _model(self, params):
    return parameters.merge(self.graphdef, parameters.strip_prefix('embedder', params))

  def needed(self) -> tuple[str, ...]:
    return ('whisper',)

  def init(self, key: jax.Array) -> parameters.Params:
    """Parameters `embedder.*`: from `init_from`, or drawn."""
    if self.config.init_from:
      return parameters.add_prefix(
        'embedder', init_from.load_initial(self.config, 'embedder', self.target)
      )
    params = parameters.init_params(self.build, key)
    if self.config.embedder.expr_norm == 'zscore':
      params['expr_mean'], params['expr_std'] = _moments(
        example_sampling.visual_rows(
          record['expression'], self.model_config.visual_shape
        )
        for part in self.train
        for record in part.source
      )
    return parameters.add_prefix('embedder', params)

  def batches(self):
    data = self.config.data
    return iter(
      embedder_loader(
        self.parts['train'],
        identities=data.identities,
        emotions=data.emotions,
        clips=data.clips,
        videos=data.videos,
        min_len=data.min_len,
        max_len=data.max_len,
        visual=self.visual,
        visual_shape=self.model_config.visual_shape,
        seed=self.config.seed,
        shard=parallel.batch_shard(self.mesh),
        workers=data.workers,
      )
    )

  def loss(self, params, frozen, batch, key, step):
    """InfoNCE between samples of the priors, with modality dropout."""
    c, model = self.config, self._model(params)
    drop_key, sample_key, dropout_key = jax.random.split(key, 3)
    present = contrastive.modality_dropout(
      drop_key, batch['has_video'], batch['has_audio'], **c.drop
    )
    mu, var = model(
      batch['expr'],
      batch['whisper'],
      batch['frame_mask'],
      *present,
      key=dropout_key if c.embedder.dropout else None,
    )
    pairs = contrastive.make_pairs(
      batch['identity'],
      batch['emotion'],
      batch['video'],
      batch['level'] if c.loss.level_aware else None,
      c.loss.other_people,
    )
    prior = model.sample(mu, var, sample_key) if c.loss.use_sample else mu
    loss = contrastive.info_nce(
      prior,
      pairs,
      tau=c.loss.tau,
      sim_offset=c.loss.sim_offset,
      similarity=c.loss.similarity,
    )
    return loss, {'sigma': jnp.sqrt(var).mean()}

  def _embed_all(
    self, params, part: DatasetPart, video: bool = True, audio: bool = True
  ):
    """Means and variances of the priors `[2,clips,D]` of a data set from the
    modalities asked for.
    """
    length, clips, rows = self.config.data.max_len, len(part.source), []
    for start in range(0, clips, BATCH):
      batch = [
        self._example(part, min(i, clips - 1), length)
        for i in range(start, start + BATCH)
      ]
      *inputs, has_video, has_audio = (np.stack(x) for x in zip(*batch))
      rows.append(
        parallel.to_host(
          self._embed(params, *inputs, has_video & video, has_audio & audio)
        )
      )
    return np.concatenate(rows, axis=1)[:, :clips]

  def _example(self, part: DatasetPart, clip: int, length: int):
    record = part.source[clip]
    n = min(int(record['num_frames']), length)

    def pad(x, size):
      return np.pad(x, ((0, size - len(x)), *[(0, 0)] * (x.ndim - 1)))

    seen, heard = (
      part.rows(name, clip, record, slice(rows))
      for name, rows in ((self.visual, n), ('whisper', 2 * n))
    )
    seen = example_sampling.visual_rows(seen, self.model_config.visual_shape)
    return (
      pad(seen, length),
      pad(heard, 2 * length),
      np.arange(length) < n,
      len(seen) > 0,
      len(heard) > 0,
    )

  def evaluate(self, params, frozen) -> tuple[dict[str, float], dict[str, Picture]]:
    """Clustering and probes on unseen people, from both modalities and from each
    alone (paper table 5).
    """
    parts, *labels = self._labelled(self.parts['val'])
    known = labels[1] != UNKNOWN
    people, emotions, level = (label[known] for label in labels)
    metrics, pictures = {}, {}
    alone = (
      (('video_', True, False), ('audio_', False, True))
      if self.config.embedder.modalities == 'both'
      else ()
    )
    for label, video, audio in (('', True, True), *alone):
      mu, var = np.concatenate(
        [self._embed_all(params, part, video, audio) for part in parts], axis=1
      )[:, known]
      scores = clustering.summary(mu, people, emotions) | {
        'sigma': float(np.sqrt(var).mean())
      }
      metrics |= {
        label + name: value
        for name, value in scores.items()
        if not label or name.partition('/')[0] == 'clustering'
      }
      if not label and len(mu) > 1:
        pictures = {'tsne': tsne.picture(mu, people, emotions, level)}
    return metrics, pictures

  def export(self, params) -> None:
    """Writes `embedder`, and as priors the mean Gaussian of each emotion at its
    strongest level in training.
    """
    bundle.save_component(
      self.model_dir,
      'embedder',
      self.model_config.to_json(),
      parameters.strip_prefix('embedder', params),
      init_from.provenance(self),
    )
    embedder = Component.load(self.model_dir, 'embedder')
    parts = self._labelled(self.parts['train'])[0]
    networks = dict(whisper=self.whisper, embedder=embedder)
    statistics = [
      self._features(part, **networks).load_or_compute('prior')['prior']
      for part in parts
    ]
    priors = mean_gaussians(statistics, [part.source.table for part in parts])
    bundle.save_priors(self.model_dir, priors, embedder.fingerprint, replace=True)


def _moments(clips: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
  """Mean and standard deviation over the frames of all clips `[N,D]`: float32 `[D]`;
  1 for what never changes.
  """
  count, total, square = 0, 0.0, 0.0
  for x in clips:
    x = np.float64(x)
    count, total, square = (
      count + len(x),
      total + x.sum(0),
      square + np.square(x).sum(0),
    )
  if not count:
    raise DataError(
      "embedder.expr_norm='zscore' needs expressions, but no training clip has any; "
      "set it to 'none'"
    )
  mean = total / count
  std = np.sqrt(np.maximum(square / count - mean**2, 0))
  return np.float32(mean), np.float32(np.where(std > 1e-6, std, 1))
