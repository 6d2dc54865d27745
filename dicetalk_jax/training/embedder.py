"""Task: the disentangled emotion embedder (paper section 3.1), trained by InfoNCE on its Gaussian prior."""

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines import loader
from data_pipelines.features import FeatureStore
from data_pipelines.record import EMOTIONS, UNKNOWN
from data_pipelines.source import ClipSource
from dicetalk_jax import bundle, parallel
from dicetalk_jax.errors import ConfigError
from dicetalk_jax.metrics import clustering, tsne
from dicetalk_jax.models import core, registry
from dicetalk_jax.network import Network
from dicetalk_jax.training import contrastive, sources
from dicetalk_jax.training import frozen as networks
from dicetalk_jax.training.priors import mean_gaussians
from dicetalk_jax.training.task import Task

INPUTS = ('expr', 'whisper', 'frame_mask', 'has_video', 'has_audio')


class EmbedderTask(Task):
  """Clips of one person in one emotion attract each other, all others repel (paper equations 7 and 8)."""

  name = 'embedder'

  def __init__(self, config, mesh, workdir):
    super().__init__(config, mesh, workdir)
    data = config.data
    size = (data.identities * data.emotions + data.videos) * data.clips
    if config.batch_size != size:
      raise ConfigError(f'config.batch_size={config.batch_size}, but the groups of config.data make {size} windows '
                        '(identities x emotions x clips + videos x clips); set it to that')
    self.train, self.val = sources.train_and_val(config, self.data_dir)
    self.whisper = networks.ensure(self.model_dir, 'whisper', config.get('frozen', {}).get('whisper'), seed=1)
    if self.whisper.config.d_model != config.embedder.whisper_dim:
      raise ConfigError(f'config.embedder.whisper_dim={config.embedder.whisper_dim}, but the Whisper encoder of '
                        f'{self.model_dir} has width {self.whisper.config.d_model}')
    self.build = registry.builder('embedder', config.embedder.to_dict(), config.dtype)
    self.graphdef, _ = core.abstract(self.build)
    self.parts = {source.split: self._part(source) for source in (self.train, self.val)}
    self._embed = jax.jit(lambda params, *batch: self._model(params)(*batch)[0])

  def _part(self, source: ClipSource) -> loader.Part:
    store = FeatureStore(self.data_dir / 'features', source.fingerprint)
    return loader.Part(source, {'whisper': networks.whisper_states(self.whisper, source, store)})

  def _model(self, params):
    return core.merge(self.graphdef, core.under('embedder', params))

  def init(self, key: jax.Array) -> core.Params:
    """Parameters `embedder.*`: from `init_from`, or drawn."""
    if self.config.init_from:
      return core.prefixed('embedder', bundle.load_component(self.config.init_from, 'embedder')[1])
    return core.prefixed('embedder', core.init_params(self.build, key))

  def batches(self):
    data = self.config.data
    return iter(loader.embedder_loader(
        self.parts['train'], identities=data.identities, emotions=data.emotions, clips=data.clips, videos=data.videos,
        min_len=data.min_len, max_len=data.max_len, seed=self.config.seed, shard=parallel.batch_shard(self.mesh),
        workers=data.workers))

  def loss(self, params, frozen, batch, key, step):
    """InfoNCE between samples of the priors, with modality dropout."""
    c, model = self.config, self._model(params)
    drop_key, sample_key, dropout_key = jax.random.split(key, 3)
    present = contrastive.modality_dropout(drop_key, batch['has_video'], batch['has_audio'], **c.drop)
    mu, var = model(batch['expr'], batch['whisper'], batch['frame_mask'], *present,
                    key=dropout_key if c.embedder.dropout else None)
    pairs = contrastive.make_pairs(batch['identity'], batch['emotion'], batch['video'],
                                   batch['level'] if c.loss.level_aware else None)
    loss = contrastive.info_nce(model.sample(mu, var, sample_key), pairs, tau=c.loss.tau,
                                sim_offset=c.loss.sim_offset, similarity=c.loss.similarity)
    return loss, {'sigma': jnp.sqrt(var).mean()}

  def _embed_all(self, params, source: ClipSource, video: bool = True, audio: bool = True):
    """Prior means `[clips,D]` of a split from the modalities asked for, and standard deviations."""
    part, length = self.parts[source.split], self.config.data.max_len
    table, rows = source.table, []
    for start in range(0, len(source), networks.BATCH):
      batch = [self._example(part, min(i, len(source) - 1), length) for i in range(start, start + networks.BATCH)]
      expr, whisper, mask = (np.stack(x) for x in zip(*batch))
      rows.append(np.asarray(self._embed(params, expr, whisper, mask, np.full(len(batch), video),
                                         np.full(len(batch), audio))))
    return np.concatenate(rows)[:len(table)]

  @staticmethod
  def _example(part: loader.Part, clip: int, length: int):
    record = part.source[clip]
    n = min(int(record['num_frames']), length)
    pad = lambda x, size: np.pad(x, ((0, size - len(x)), *[(0, 0)] * (x.ndim - 1)))
    return (pad(record['expression'][:n], length), pad(part.rows('whisper', clip, record, slice(2 * n)), 2 * length),
            np.arange(length) < n)

  def evaluate(self, params, frozen) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Clustering and probes on unseen people, from both modalities and from each alone (paper table 5)."""
    table = self.val.table
    identity = np.unique(table.identity, return_inverse=True)[1]
    emotion = np.array([EMOTIONS.index(e) if e != UNKNOWN else -1 for e in table.emotion])
    known = emotion >= 0
    metrics = {}
    for label, video, audio in (('', True, True), ('video_', True, False), ('audio_', False, True)):
      mu = self._embed_all(params, self.val, video, audio)[known]
      scores = clustering.summary(mu, identity[known], emotion[known])
      metrics |= {label + name: value for name, value in scores.items() if not label or name == 'clustering'}
      if not label:
        pictures = {'tsne': tsne.picture(mu, *(x[known] for x in (table.identity, table.emotion, table.intensity)))}
    return metrics, pictures

  def export(self, params) -> None:
    """Writes `embedder`, and the mean Gaussian of each emotion over the training clips as priors."""
    bundle.save_component(self.model_dir, 'embedder', registry.config_of(
        'embedder', self.config.embedder.to_dict()).to_json(), core.under('embedder', params), sources.provenance(self))
    embedder = Network.load(self.model_dir, 'embedder')
    part = self.parts['train']
    statistics = networks.statistics(embedder, part.features['whisper'], self.train,
                                     FeatureStore(self.data_dir / 'features', self.train.fingerprint))
    bundle.save_priors(self.model_dir, mean_gaussians(statistics, self.train.table))
