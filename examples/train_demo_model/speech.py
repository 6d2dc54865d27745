"""Task: a small speech encoder that recognises phonemes.

The published model hears through Whisper, which was trained to recognise speech. The
demo model's encoder has the same structure in small, and learns the same of the
synthetic voices: which phoneme is spoken when. A random encoder would pass on far less.
"""

import dataclasses
import os
from typing import Any

import grain
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
import optax

from data_pipelines.synthetic.phonemes import PHONEMES
from dicetalk_jax import bundle, parallel
from dicetalk_jax.data import clip_record, mixture
from dicetalk_jax.data.mixture import DatasetPart
from dicetalk_jax.media import audio
from dicetalk_jax.models import parameters, registry
from dicetalk_jax.models.parameters import Params
from dicetalk_jax.training import config_checks, datasets
from dicetalk_jax.training.run_log import Picture
from dicetalk_jax.training.task import Task

HEAD = 'phonemes.kernel'  # dropped after training
UNKNOWN = -1  # the label of positions after the end
POSITIONS = audio.WINDOW // clip_record.SAMPLES_PER_FRAME * 2  # of a window of 30 s


@dataclasses.dataclass(frozen=True)
class SpeechExamples:
  """Joins some clips of a data set to a window of 30 s.

  One clip alone, as the encoder will mostly hear it, would waste its window; a full
  window alone would hide what silence sounds like. So their number is drawn.
  """

  part: DatasetPart

  def __call__(self, clip: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    longest = int(self.part.source.table.num_frames.max())
    room = POSITIONS // (2 * longest)
    others = rng.integers(len(self.part.source), size=rng.integers(room))
    waves = []
    labels = []
    for index in (clip, *others):
      record = self.part.source[int(index)]
      waves.append(clip_record.decode_audio(record))
      labels.append(np.repeat(record['phoneme'], 2))  # frames to positions
    heard = np.concatenate(labels)
    label = np.pad(heard, (0, POSITIONS - len(heard)), constant_values=UNKNOWN)
    (log_mel,) = audio.log_mel(np.concatenate(waves))
    return {'log_mel': log_mel, 'label': label.astype(np.int32)}


class SpeechTask(Task):
  """Cross-entropy of the phoneme at every position, read off every state."""

  name = 'speech'

  def __init__(self, config: Any, mesh: Mesh, workdir: os.PathLike | str):
    super().__init__(config, mesh, workdir)
    self.build, self.graphdef, _ = config_checks.structure(config, 'whisper')
    self.train, self.val = datasets.open_train_and_val(config, self.data_dir)
    self._right = jax.jit(self._count_right)

  def trained(self) -> tuple[str, ...]:
    return ('whisper',)

  def init(self, key: jax.Array) -> Params:
    """Returns parameters `whisper.*`, and the head `[states,D,phonemes]`."""
    encoder = parameters.init_params(self.build, key)
    whisper = self.config.whisper
    shape = (whisper.encoder_layers + 1, whisper.d_model, len(PHONEMES))
    return parameters.add_prefix('whisper', encoder) | {HEAD: jnp.zeros(shape)}

  def loss(
    self, params: Params, batch: Any, key: jax.Array, step: jax.Array
  ) -> tuple[jax.Array, dict[str, Any]]:
    """Returns the loss, and how often the last state shows the right phoneme."""
    del key, step
    logits = self._logits(params, batch['log_mel'])
    label = batch['label']
    known = label != UNKNOWN
    entropy = optax.softmax_cross_entropy_with_integer_labels(
      logits, jnp.maximum(label, 0)[:, :, None]
    )
    loss = jnp.where(known[:, :, None], entropy, 0).sum() / known.sum()
    right = (logits[:, :, -1].argmax(-1) == label).sum() / known.sum()
    return loss, {'accuracy': right}

  def batches(self) -> grain.DatasetIterator:
    index, count = parallel.batch_shard(self.mesh)
    return iter(
      mixture.example_batches(
        self.train,
        SpeechExamples,
        batch=self.config.batch_size // count,
        seed=self.config.seed,
        shard=(index, count),
        threads=2,
        workers=self.config.data.workers,
      )
    )

  def evaluate(self, params: Params) -> tuple[dict[str, float], dict[str, Picture]]:
    """Returns the share of right phonemes in single clips of unseen people."""
    right = 0
    total = 0
    for part in self.val:
      for record in part.source:
        (log_mel,) = audio.log_mel(clip_record.decode_audio(record))
        phoneme = np.repeat(record['phoneme'], 2)
        label = np.pad(phoneme, (0, POSITIONS - len(phoneme)), constant_values=UNKNOWN)
        right += int(self._right(params, log_mel[None], label[None]))
        total += len(phoneme)
    return {'accuracy': right / total}, {}

  def export(self, params: Params) -> None:
    """Writes `whisper`; the head stays behind."""
    encoder = {
      name: value for name, value in params.items() if name.startswith('whisper.')
    }
    bundle.save_component(
      self.model_dir,
      'whisper',
      registry.config_of('whisper', self.config.whisper.to_dict()).to_json(),
      parameters.strip_prefix('whisper', encoder),
      {'source': 'trained to recognise the phonemes of synthetic speech'},
    )

  def _logits(self, params: Params, log_mel: jax.Array) -> jax.Array:
    """`[B,positions,states,phonemes]`."""
    encoder = parameters.merge(
      self.graphdef, parameters.strip_prefix('whisper', params)
    )
    states = encoder(log_mel)
    return jnp.einsum('btsd,sdp->btsp', states, params[HEAD])

  def _count_right(
    self, params: Params, log_mel: jax.Array, label: jax.Array
  ) -> jax.Array:
    logits = self._logits(params, log_mel)
    return (logits[:, :, -1].argmax(-1) == label).sum()
