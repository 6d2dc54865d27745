"""Measures what the emotion embedder learns on synthetic data.

  python -m benchmarks.embedder_synthetic

Trains `configs/embedder.py:tiny` on procedural talking faces and measures it on
identities, and sentences, that training never saw. Identity enters the expression
vectors by construction, and a voice gives away who speaks: a disentangled prior keeps
the emotion and loses the identity (paper sections 3.1 and 4.5). The tracker that the
expressions come from errs for a second at a time, as real ones do: if they were exact,
the voice could add nothing. `--presets` chooses the rule for pairs:
`tiny,identity_free`, or `tiny`, the published one.
"""

import argparse
import dataclasses
import pathlib

import numpy as np

from configs import embedder as embedder_config
from data_pipelines.builders.synthetic import prepare_synthetic
from data_pipelines.builders.synthetic_clips import TINY
from dicetalk_jax.component import Component
from dicetalk_jax.data import clip_record, feature_extraction
from dicetalk_jax.data.clip_source import ClipSource
from dicetalk_jax.errors import one_sentence
from dicetalk_jax.metrics import clustering
from dicetalk_jax.training import loop
from dicetalk_jax.training.embedder import EmbedderTask

TRAINING = {
  'total_steps': 3000,
  'eval_every': 1500,
  'checkpoint_every': 1500,
  'embedder.dropout': 0.1,
  'embedder.lambda_ca': 4.0,
}
DATA = dataclasses.replace(
  TINY,
  train=256,
  val=4,
  test=16,
  clips=24,
  seconds=2.4,
  levels=(1, 2, 3),
  drift=0.17,
  content='embedder',
)

RAW = 'raw expressions'
# Row of the table -> whether the embedder is given (video, audio).
MODALITIES = {'both': (True, True), 'video': (True, False), 'audio': (False, True)}


def measure(
  features: np.ndarray, identity: np.ndarray, emotion: np.ndarray
) -> dict[str, float]:
  """One row of the table.

  Centroids and the emotion probe are made from all identities but the one that is
  judged. The identity probes are linear. For unseen emotions, the probe knows all
  identities in all emotions but the one that it is asked about; for seen emotions, it
  knows the other two thirds of the clips of each.

  Args:
    features: `[clips, D]` of unseen identities.
    identity: label per clip.
    emotion: label per clip.

  Returns:
    Value by column; the clustering strength of each emotion comes last.
  """
  pairs = np.stack([identity, emotion], axis=1)
  _, pair_of_clip = np.unique(pairs, axis=0, return_inverse=True)
  thirds = clustering.folds_within(pair_of_clip.ravel(), 3)
  strength = clustering.clustering_strength(features, identity, emotion)
  centroid = clustering.nearest_centroid_accuracy
  probe = clustering.linear_probe_accuracy
  return {
    'emotion, nearest centroid': centroid(features, emotion, identity),
    'emotion, linear probe': probe(features, emotion, identity),
    'identity, unseen emotions': probe(features, identity, emotion),
    'identity, seen emotions': probe(features, identity, thirds),
    'clustering strength': float(np.mean(list(strength.values()))),
    **strength,
  }


def measure_all(model: pathlib.Path, source: ClipSource) -> dict[str, dict[str, float]]:
  """The table: raw expressions (their mean over time), and priors by modality."""
  embedder = Component.load(model, 'embedder')
  whisper = Component.load(model, 'whisper')

  features: dict[str, list[np.ndarray]] = {name: [] for name in (RAW, *MODALITIES)}
  for record in source:
    expression = record['expression']
    wave = clip_record.decode_audio(record)
    states = feature_extraction.speech_states(whisper, wave, len(expression))
    features[RAW].append(expression.mean(0))
    for name, (has_video, has_audio) in MODALITIES.items():
      # No rows stand for a missing modality.
      seen = expression if has_video else expression[:0]
      heard = states if has_audio else states[:0]
      mu, _ = feature_extraction.gaussian(embedder, seen, heard)
      features[name].append(mu)

  labels = source.table
  return {
    name: measure(np.stack(rows), labels.identity, labels.emotion)
    for name, rows in features.items()
  }


def markdown(table: dict[str, dict[str, float]]) -> str:
  """The table as Markdown, a line per row."""
  columns = list(table['both'])
  lines = ['| from | ' + ' | '.join(columns) + ' |']
  lines.append('|' + ' --- |' * (len(columns) + 1))
  for name, values in table.items():
    cells = ' | '.join(f'{values[column]:.2f}' for column in columns)
    lines.append(f'| {name} | {cells} |')
  return '\n'.join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(
    prog='python -m benchmarks.embedder_synthetic', description=__doc__.split('\n')[0]
  )
  parser.add_argument(
    '--folder',
    default='runs/embedder_synthetic',
    type=pathlib.Path,
    help='where data, run and model go (default: %(default)s)',
  )
  parser.add_argument(
    '--presets',
    default='tiny,identity_free',
    help='presets of configs/embedder.py (default: %(default)s)',
  )
  args = parser.parse_args()

  config = embedder_config.get_config(args.presets)
  config.update_from_flattened_dict(TRAINING)
  config.data.dir = str(args.folder / 'data')
  data = prepare_synthetic(config.data.dir, DATA)
  run = args.folder / args.presets / 'embedder'
  loop.train(EmbedderTask, config, run)
  print(markdown(measure_all(run / 'model', ClipSource(data, 'test'))))


if __name__ == '__main__':
  with one_sentence():
    main()
