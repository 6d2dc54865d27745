"""Task: the disentangled emotion embedder (paper section 3.1), trained by InfoNCE on
its Gaussian prior.
"""

from collections.abc import Iterable
import dataclasses
import os
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from dicetalk_jax import bundle, parallel
from dicetalk_jax.component import Component
from dicetalk_jax.data import example_sampling, face_crops, feature_extraction
from dicetalk_jax.data.clip_record import UNKNOWN
from dicetalk_jax.data.embedder_loader import embedder_loader
from dicetalk_jax.data.mixture import DatasetPart
from dicetalk_jax.errors import ConfigError, DataError
from dicetalk_jax.metrics import clustering, tsne
from dicetalk_jax.models import parameters
from dicetalk_jax.models.embedder import EmbedderConfig
from dicetalk_jax.models.parameters import Params
from dicetalk_jax.models.whisper import WhisperConfig
from dicetalk_jax.training import (
  config_checks,
  contrastive,
  datasets,
  gathering,
  init_from,
)
from dicetalk_jax.training.mean_priors import mean_gaussians
from dicetalk_jax.training.run_log import Picture
from dicetalk_jax.training.task import Task

BATCH = 64  # clips embedded at a time in evaluation


class Labelled(NamedTuple):
  """Data sets with emotion labels, and the labels of all their clips.

  Attributes:
    parts: the data sets.
    identity, emotion, level: `[clips]`.
  """

  parts: list[DatasetPart]
  identity: np.ndarray
  emotion: np.ndarray
  level: np.ndarray


class EmbedderTask(Task):
  """Clips of one identity in one emotion attract each other, all others repel (paper
  equations 7 and 8).
  """

  name = 'embedder'
  constants = (r'\.expr_(mean|std)$',)

  def __init__(self, config: Any, mesh: Mesh, workdir: os.PathLike | str):
    config_checks.embedder(config)
    super().__init__(config, mesh, workdir)
    self.start = init_from.folder(config, 'embedder')
    self.model_config = EmbedderConfig.from_json(config.embedder.to_dict())
    self.build, self.graphdef, self.target = config_checks.structure(config, 'embedder')
    self.visual = face_crops.input_name(self.model_config)

    # Data.
    self.train, self.val = datasets.open_train_and_val(config, self.data_dir)
    for parts in (self.train, self.val):
      _labelled(parts)  # refuses data without labels before training
    if self.visual == 'expression':
      self._check_expressions()

    # Whisper, and its states for all clips.
    self.whisper: Component[WhisperConfig] = Component.load_or_random(
      self.model_dir, 'whisper', config.get('frozen', {}).get('whisper'), seed=1
    )
    self._check_whisper()
    self.parts = {
      'train': [self._with_features(part) for part in self.train],
      'val': [self._with_features(part) for part in self.val],
    }
    self._embed = jax.jit(lambda params, *batch: self._model(params)(*batch))

  def needed(self) -> tuple[str, ...]:
    return ('whisper',)

  def _check_expressions(self) -> None:
    """Refuses data without expressions, or with those of another tracker."""
    config = self.config
    needs_expressions = self.model_config.modalities != 'audio'
    if needs_expressions and not any(part.source.expression_dim for part in self.train):
      raise DataError(
        f'no clip of {config.data.dataset} has expressions, and the prior would be '
        'learned from audio alone; prepare the data with --expression=DIR, or take the '
        "preset 'crops', which sees images, or 'audio_only'"
      )
    for part in (*self.train, *self.val):
      width = part.source.expression_dim
      if width not in (0, config.embedder.expr_dim):
        raise ConfigError(
          f'config.embedder.expr_dim={config.embedder.expr_dim}, but the clips of '
          f'{part.source} have {width} expression coefficients per frame; set it to '
          'that'
        )

  def _check_whisper(self) -> None:
    """Refuses an embedder that reads the states of another Whisper encoder."""
    embedder = self.config.embedder
    whisper = self.whisper.config
    if embedder.whisper_dim != whisper.d_model:
      raise ConfigError(
        f'config.embedder.whisper_dim={embedder.whisper_dim}, but the Whisper encoder '
        f'of {self.model_dir} has width {whisper.d_model}; set it to that'
      )
    states = whisper.encoder_layers + 1
    if embedder.whisper_states != states:
      raise ConfigError(
        f'config.embedder.whisper_states={embedder.whisper_states}, but the Whisper '
        f'encoder of {self.model_dir} has {states} states, one more than layers; set '
        'it to that'
      )

  def _with_features(self, part: DatasetPart) -> DatasetPart:
    """Adds what the embedder reads to a data set; computes what is missing."""
    extractor = self._extractor(part, {'whisper': self.whisper})
    names = feature_extraction.inputs(self.model_config)
    return dataclasses.replace(part, features=extractor.load_or_compute(*names))

  def _extractor(
    self, part: DatasetPart, networks: dict[str, Component]
  ) -> feature_extraction.FeatureExtractor:
    folder = self.data_dir / 'features'
    return feature_extraction.FeatureExtractor(networks, part.source, folder)

  def _model(self, params: Params) -> Any:
    return gathering.merge(self.graphdef, parameters.strip_prefix('embedder', params))

  def init(self, key: jax.Array) -> Params:
    """Returns parameters `embedder.*`: from `init_from`, or drawn."""
    if self.start:
      loaded = init_from.load_initial(self.config, 'embedder', self.target)
      return parameters.add_prefix('embedder', loaded)
    params: dict[str, Any] = dict(parameters.init_params(self.build, key))
    if self.config.embedder.expr_norm == 'zscore':
      shape = self.model_config.visual_shape
      expressions = (
        example_sampling.visual_rows(record['expression'], shape)
        for part in self.train
        for record in part.source
      )
      params['expr_mean'], params['expr_std'] = _moments(expressions)
    return parameters.add_prefix('embedder', params)

  def batches(self) -> grain.DatasetIterator:
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

  def loss(
    self, params: Params, batch: Any, key: jax.Array, step: jax.Array
  ) -> tuple[jax.Array, dict[str, Any]]:
    """Returns InfoNCE between samples of the priors, with modality dropout."""
    config = self.config
    model = self._model(params)
    drop_key, sample_key, dropout_key = jax.random.split(key, 3)

    # 1. Drop modalities
    has_video, has_audio = contrastive.modality_dropout(
      drop_key, batch['has_video'], batch['has_audio'], **config.drop
    )

    # 2. Embed
    mu, var = model(
      batch['expr'],
      batch['whisper'],
      batch['frame_mask'],
      has_video,
      has_audio,
      key=dropout_key if config.embedder.dropout else None,
    )
    prior = model.sample(mu, var, sample_key) if config.loss.use_sample else mu

    # 3. Compare
    pairs = contrastive.make_pairs(
      batch['identity'],
      batch['emotion'],
      batch['video'],
      level=batch['level'] if config.loss.level_aware else None,
      other_people=config.loss.other_people,
    )
    loss = contrastive.info_nce(
      prior,
      pairs,
      tau=config.loss.tau,
      sim_offset=config.loss.sim_offset,
      similarity=config.loss.similarity,
    )
    return loss, {'sigma': jnp.sqrt(var).mean()}

  def evaluate(self, params: Params) -> tuple[dict[str, float], dict[str, Picture]]:
    """Returns clustering and probes on unseen identities, from both modalities and from
    each alone (paper table 5).
    """
    data = _labelled(self.parts['val'])
    known = data.emotion != UNKNOWN
    identity = data.identity[known]
    emotion = data.emotion[known]

    # 1. From all modalities that the embedder has
    mu, deviation = self._priors(params, data, known)
    metrics = clustering.summary(mu, identity, emotion)
    metrics['sigma'] = float(deviation.mean())
    pictures: dict[str, Picture] = {}
    if len(mu) > 1:
      pictures['tsne'] = tsne.picture(mu, identity, emotion, data.level[known])

    # 2. From each alone
    if self.config.embedder.modalities == 'both':
      for alone in ('video', 'audio'):
        mu, _ = self._priors(
          params, data, known, video=alone == 'video', audio=alone == 'audio'
        )
        for name, value in clustering.summary(mu, identity, emotion).items():
          if name.partition('/')[0] == 'clustering':
            metrics[f'{alone}_{name}'] = value
    return metrics, pictures

  def _priors(
    self,
    params: Params,
    data: Labelled,
    known: np.ndarray,
    video: bool = True,
    audio: bool = True,
  ) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard deviations of the priors `[clips,D]` of labelled clips."""
    statistics = [self._embed_all(params, part, video, audio) for part in data.parts]
    mu, var = np.concatenate(statistics, axis=1)[:, known]
    return mu, np.sqrt(var)

  def _embed_all(
    self, params: Params, part: DatasetPart, video: bool, audio: bool
  ) -> np.ndarray:
    """Means and variances of the priors `[2,clips,D]` of a data set, from the
    modalities asked for.
    """
    clips = len(part.source)
    statistics = []
    for start in range(0, clips, BATCH):
      # The last batch is filled with the last clip: all batches have one size.
      indices = [min(i, clips - 1) for i in range(start, start + BATCH)]
      inputs = [self._inputs(part, i) for i in indices]
      visual, whisper, frame_mask, has_video, has_audio = map(np.stack, zip(*inputs))
      priors = self._embed(
        params, visual, whisper, frame_mask, has_video & video, has_audio & audio
      )
      statistics.append(parallel.to_host(priors))
    return np.concatenate(statistics, axis=1)[:, :clips]

  def _inputs(self, part: DatasetPart, clip: int) -> tuple[Any, ...]:
    """Inputs of the embedder for one clip: visual rows and Whisper states, padded; mask
    of its frames; whether it has video and audio.
    """
    length = self.config.data.max_len
    record = part.source[clip]
    frames = min(int(record['num_frames']), length)
    visual = part.rows(self.visual, clip, record, slice(frames))
    visual = example_sampling.visual_rows(visual, self.model_config.visual_shape)
    whisper = part.rows('whisper', clip, record, slice(2 * frames))
    return (
      _padded(visual, length),
      _padded(whisper, 2 * length),
      np.arange(length) < frames,
      len(visual) > 0,
      len(whisper) > 0,
    )

  def export(self, params: Params) -> None:
    """Writes `embedder`, and as priors the mean Gaussian of each emotion and of each of
    its levels over the training clips.
    """
    bundle.save_component(
      self.model_dir,
      'embedder',
      self.model_config.to_json(),
      parameters.strip_prefix('embedder', params),
      init_from.provenance(self),
    )
    embedder = Component.load(self.model_dir, 'embedder')
    networks = {'whisper': self.whisper, 'embedder': embedder}
    statistics = []
    tables = []
    for part in _labelled(self.parts['train']).parts:
      features = self._extractor(part, networks).load_or_compute('prior')
      statistics.append(features['prior'])
      tables.append(part.source.table)
    priors = mean_gaussians(statistics, tables, by_intensity=True)
    bundle.save_priors(self.model_dir, priors, embedder.fingerprint, replace=True)


def _labelled(parts: list[DatasetPart]) -> Labelled:
  """Chooses the data sets with emotion labels.

  Raises:
    DataError: there are none.
  """
  labelled = [part for part in parts if part.labelled]
  if not labelled:
    names = ', '.join(str(part.source) for part in parts)
    raise DataError(
      f'no clip of {names} has an emotion label, and the embedder learns from labels; '
      'add a data set that has them to config.data.dataset'
    )
  tables = [part.source.table for part in labelled]
  return Labelled(
    parts=labelled,
    identity=np.concatenate([table.identity for table in tables]),
    emotion=np.concatenate([table.emotion for table in tables]),
    level=np.concatenate([table.intensity for table in tables]),
  )


def _padded(rows: np.ndarray, length: int) -> np.ndarray:
  """Appends rows of zeros up to a length."""
  missing = length - len(rows)
  return np.pad(rows, ((0, missing), *[(0, 0)] * (rows.ndim - 1)))


def _moments(clips: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
  """Mean and standard deviation over the frames of all clips `[N,D]`: float32 `[D]`.

  The deviation is 1 for a coefficient that never changes.
  """
  count = 0
  total: Any = 0.0
  square: Any = 0.0
  for x in clips:
    x = x.astype(np.float64)
    count += len(x)
    total = total + x.sum(0)
    square = square + np.square(x).sum(0)
  if not count:
    raise DataError(
      "embedder.expr_norm='zscore' needs expressions, but no training clip has any; "
      "set it to 'none'"
    )
  mean = total / count
  std = np.sqrt(np.maximum(square / count - mean**2, 0))
  std = np.where(std > 1e-6, std, 1)
  return mean.astype(np.float32), std.astype(np.float32)
