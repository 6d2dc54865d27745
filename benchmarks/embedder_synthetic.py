"""What the embedder learns on synthetic data: `python -m
benchmarks.embedder_synthetic`.

Trains `configs/embedder.py:tiny` on procedural talking faces and measures it on people,
and sentences, that training never saw. Identity enters the expression vectors by
construction, and a voice tells who speaks: a disentangled prior keeps the emotion and
loses the person (paper sections 3.1 and 4.5). The tracker that the expressions are from
errs for a second at a time, as real ones do: were they exact, the voice could add
nothing. `--presets` chooses the rule for pairs: `tiny,identity_free`, or `tiny`, the
published one.
"""

import argparse
import dataclasses
import importlib
import pathlib

import numpy as np

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
MODALITIES = {'both': (True, True), 'video': (True, False), 'audio': (False, True)}
COLUMNS = (
  'emotion, nearest centroid',
  'emotion, linear probe',
  'identity, unseen emotions',
  'identity, seen emotions',
  'clustering strength',
)


def measure(
  features: np.ndarray, identity: np.ndarray, emotion: np.ndarray
) -> dict[str, float]:
  """One row of the table, for `[clips,D]` of unseen people.

  Centroids and emotion probe are made of all people but the one who is judged. The
  identity probes are linear; one knows everybody in all emotions but the one that it is
  asked about, the other two thirds of the clips of each.
  """
  takes = np.unique(np.stack([identity, emotion], 1), axis=0, return_inverse=True)[
    1
  ].ravel()
  strength = clustering.clustering_strength(features, identity, emotion)
  return (
    dict(
      zip(
        COLUMNS,
        (
          clustering.nearest_centroid_accuracy(features, emotion, identity),
          clustering.linear_probe_accuracy(features, emotion, identity),
          clustering.linear_probe_accuracy(features, identity, emotion),
          clustering.linear_probe_accuracy(
            features, identity, clustering.folds_within(takes, 3)
          ),
          float(np.mean(list(strength.values()))),
        ),
        strict=True,
      )
    )
    | strength
  )


def table(folder: pathlib.Path, source: ClipSource) -> dict[str, dict[str, float]]:
  """Raw expression vectors (their mean over time) and the priors from each choice of
  modalities.
  """
  embedder, whisper = (
    Component.load(folder / 'embedder/model', name) for name in ('embedder', 'whisper')
  )
  rows: dict[str, list[np.ndarray]] = {
    name: [] for name in ('raw expressions', *MODALITIES)
  }
  for record in source:
    expression = record['expression']
    states = feature_extraction.speech_states(
      whisper, clip_record.decode_audio(record), len(expression)
    )
    rows['raw expressions'].append(expression.mean(0))
    for name, (video, audio) in MODALITIES.items():
      seen, heard = expression[: len(expression) * video], states[: len(states) * audio]
      rows[name].append(feature_extraction.gaussian(embedder, seen, heard)[0])
  labels = source.table.identity, source.table.emotion
  return {name: measure(np.stack(features), *labels) for name, features in rows.items()}


def main() -> None:
  parser = argparse.ArgumentParser(
    prog='benchmarks.embedder_synthetic', description=__doc__.split('\n')[0]
  )
  parser.add_argument(
    '--folder',
    default='runs/embedder_synthetic',
    type=pathlib.Path,
    help='data, run and model',
  )
  parser.add_argument(
    '--presets', default='tiny,identity_free', help='of configs/embedder.py'
  )
  args = parser.parse_args()
  config = importlib.import_module('configs.embedder').get_config(args.presets)
  config.update_from_flattened_dict(TRAINING)
  config.data.dir = str(args.folder / 'data')
  data = prepare_synthetic(config.data.dir, DATA)
  folder = args.folder / args.presets
  loop.train(EmbedderTask, config, folder / 'embedder')
  rows = table(folder, ClipSource(data, 'test'))
  names = list(rows['both'])
  print('| from | ' + ' | '.join(names) + ' |\n|' + ' --- |' * (len(names) + 1))
  for name, values in rows.items():
    print(f'| {name} | ' + ' | '.join(f'{values[key]:.2f}' for key in names) + ' |')


if __name__ == '__main__':
  with one_sentence():
    main()
