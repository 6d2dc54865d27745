"""Priors of data sets: the mean Gaussian of each emotion at its strongest level (paper
section 4.1).

python -m dicetalk_jax.dataset_priors --model=DIR --data=DIR
"""

import pathlib

import numpy as np

from dicetalk_jax import bundle, cli, published_priors
from dicetalk_jax.component import Component
from dicetalk_jax.data import feature_extraction
from dicetalk_jax.data.clip_record import UNKNOWN
from dicetalk_jax.data.clip_source import ClipSource, data_sets
from dicetalk_jax.errors import DataError
from dicetalk_jax.training.mean_priors import averaged_clips, mean_gaussians

USAGE = """\
usage: python -m dicetalk_jax.dataset_priors --model=DIR --data=DIR [--datasets=DIR,DIR] [--split=train] [--by_intensity]
           [--output=DIR]
  --model         model folder with embedder and whisper; gets one prior per emotion, in place of older ones of this
                  embedder (those of another are never replaced): the mean of the clips that show it most strongly, as
                  weak levels of different emotions look alike
  --data          root of the data sets, as config.data.dir; the priors of their clips are kept below it
  --datasets      folders of prepared data sets; all that are below --data if not given
  --split         'train' (default), 'val' or 'test'
  --by_intensity  one prior more for each level, such as happy_1
  --output        also one .npy file per emotion, as the original program reads them
"""


def main(argv: list[str]) -> None:
  """Embeds every clip (what has been computed before is found beside the data) and
  averages per emotion.
  """
  parser = cli.Parser('dicetalk_jax.dataset_priors', USAGE)
  for name in ('model', 'data'):
    parser.add_argument(f'--{name}', required=True, type=pathlib.Path)
  parser.add_argument('--datasets', type=lambda text: text.split(','))
  parser.add_argument('--split', default='train')
  parser.add_argument('--by_intensity', action='store_true')
  parser.add_argument('--output', type=pathlib.Path)
  flags = parser.parse_args(argv)
  bundle.require(flags.model, 'embedder', 'whisper')
  sources = [
    ClipSource(folder, flags.split)
    for folder in flags.datasets or data_sets(flags.data)
  ]
  labelled = [source for source in sources if (source.table.emotion != UNKNOWN).any()]
  if not labelled:
    raise DataError(
      f'no clip of {", ".join(map(str, sources))} has an emotion label, which priors '
      'need'
    )
  if flags.output:
    published_priors.make_folder(flags.output)

  networks = {
    name: Component.load(flags.model, name) for name in ('embedder', 'whisper')
  }
  tables = [source.table for source in labelled]
  clips = averaged_clips(tables, flags.by_intensity)
  embedder = networks['embedder'].fingerprint
  bundle.check_replaceable(flags.model, clips, embedder)
  published_priors.make_folder(flags.model / bundle.PRIORS)
  features = [
    feature_extraction.FeatureExtractor(
      networks, source, flags.data / 'features'
    ).load_or_compute('prior')['prior']
    for source in labelled
  ]
  priors = mean_gaussians(features, tables, flags.by_intensity)
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
  cli.run(main, USAGE)


if __name__ == '__main__':
  run()
