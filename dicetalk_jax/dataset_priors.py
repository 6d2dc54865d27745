"""Makes emotion priors from data sets.

    python -m dicetalk_jax.dataset_priors --model=DIR --data=DIR

A prior is the mean Gaussian of an emotion over all its clips (paper section 4.1), or
over those of one level.
"""

import argparse
import pathlib

import numpy as np

from dicetalk_jax import bundle, cli, published_priors
from dicetalk_jax.compiled import keep_programs
from dicetalk_jax.component import Component
from dicetalk_jax.data import feature_extraction
from dicetalk_jax.data.clip_record import UNKNOWN
from dicetalk_jax.data.clip_source import ClipSource, data_sets
from dicetalk_jax.errors import DataError
from dicetalk_jax.training.mean_priors import averaged_clips, mean_gaussians


def _parser() -> argparse.ArgumentParser:
  parser = cli.OptionParser(
    prog='python -m dicetalk_jax.dataset_priors',
    description='Makes the emotion priors of a model folder from data sets: the mean '
    'of all clips that show an emotion.',
  )
  add = parser.add_argument
  add(
    '--model',
    required=True,
    type=pathlib.Path,
    metavar='DIR',
    help='model folder with embedder and whisper; gets one prior per emotion, in place '
    'of older ones of this embedder (those of another are never replaced)',
  )
  add(
    '--data',
    required=True,
    type=pathlib.Path,
    metavar='DIR',
    help='root of the data sets, as config.data.dir; the priors of their clips are '
    'kept below it',
  )
  add(
    '--datasets',
    type=_comma_separated,
    metavar='DIR,DIR',
    help='folders of prepared data sets (default: all that are below --data)',
  )
  add('--split', default='train', help='train, val or test')
  add(
    '--by_intensity',
    action='store_true',
    help='also make one prior for each level, such as happy_3, which shows the '
    'emotion more clearly than happy, the mean of all levels',
  )
  add(
    '--output',
    type=pathlib.Path,
    metavar='DIR',
    help='also write one .npy file per emotion, as the reference implementation reads '
    'them',
  )
  return parser


def _comma_separated(text: str) -> list[str]:
  return text.split(',')


def main(argv: list[str]) -> None:
  """Embeds every clip that has not been embedded before, and averages per emotion."""
  flags = _parser().parse_args(argv)
  keep_programs()

  # 1. Check everything that can be wrong.
  bundle.require(flags.model, 'embedder', 'whisper')
  folders = flags.datasets or data_sets(flags.data)
  sources = [ClipSource(folder, flags.split) for folder in folders]
  labelled = [source for source in sources if (source.table.emotion != UNKNOWN).any()]
  if not labelled:
    raise DataError(
      f'no clip of {", ".join(map(str, folders))} has an emotion label, which priors '
      'need'
    )
  if flags.output:
    published_priors.make_folder(flags.output)
  networks = {
    'embedder': Component.load(flags.model, 'embedder'),
    'whisper': Component.load_frozen(flags.model, 'whisper'),
  }
  embedder = networks['embedder'].fingerprint
  tables = [source.table for source in labelled]
  clips = averaged_clips(tables, flags.by_intensity)
  bundle.check_replaceable(flags.model, clips, embedder)
  published_priors.make_folder(flags.model / bundle.PRIORS)

  # 2. Embed the clips, and average.
  store = flags.data / 'features'
  features = []
  for source in labelled:
    extractor = feature_extraction.FeatureExtractor(networks, source, store)
    features.append(extractor.load_or_compute('prior')['prior'])
  priors = mean_gaussians(features, tables, flags.by_intensity)

  # 3. Write the priors.
  bundle.save_priors(flags.model, priors, embedder)
  count = np.any([*clips.values()], axis=0).sum()
  print(
    f'wrote {len(priors)} priors of {count} clips to {flags.model}: {", ".join(priors)}'
  )
  if flags.output:
    published_priors.write_all(
      flags.output, {name: (prior, embedder) for name, prior in priors.items()}
    )
    print(f'wrote {len(priors)} files to {flags.output}')


def run() -> None:
  """Console entry."""
  cli.run(main, _parser())


if __name__ == '__main__':
  run()
