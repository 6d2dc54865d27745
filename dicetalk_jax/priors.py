"""Priors of a data set: the mean Gaussian of each emotion, from a trained embedder (paper section 4.1).

    python -m dicetalk_jax.priors --model=DIR --data=DIR
"""

import pathlib

from data_pipelines import compute
from data_pipelines.source import ClipSource
from dicetalk_jax import bundle, command, prior_file
from dicetalk_jax.errors import DataError
from dicetalk_jax.network import Network
from dicetalk_jax.training.priors import mean_gaussians

USAGE = """\
usage: python -m dicetalk_jax.priors --model=DIR --data=DIR [--split=train] [--by_intensity] [--output=DIR]
  --model         model folder with embedder and whisper; gets one prior per emotion, in place of its old ones
  --data          a prepared data set, or the folder of data sets that holds it
  --split         'train' (default), 'val' or 'test'
  --by_intensity  one prior more for each level, such as happy_3
  --output        also one .npy file per emotion, as the original program reads them
"""


def main(argv: list[str]) -> None:
  """Embeds every clip (what has been computed before is found beside the data) and averages per emotion."""
  parser = command.Parser('dicetalk_jax.priors', USAGE)
  for name in ('model', 'data'):
    parser.add_argument(f'--{name}', required=True, type=pathlib.Path)
  parser.add_argument('--split', default='train')
  parser.add_argument('--by_intensity', action='store_true')
  parser.add_argument('--output', type=pathlib.Path)
  flags = parser.parse_args(argv)
  bundle.require(flags.model, 'embedder', 'whisper')
  source = ClipSource(_data_set(flags.data), flags.split)

  networks = {name: Network.load(flags.model, name) for name in ('embedder', 'whisper')}
  statistics = compute.Features(networks, source, flags.data / 'features').ready('prior')['prior']
  priors = mean_gaussians([statistics], [source.table], flags.by_intensity)
  bundle.save_priors(flags.model, priors)
  print(f'wrote {len(priors)} priors of {len(source)} clips to {flags.model}: {", ".join(priors)}')
  if flags.output:
    prior_file.write_all(flags.output, priors)
    print(f'wrote {len(priors)} files to {flags.output}')


def _data_set(folder: pathlib.Path) -> pathlib.Path:
  """The one data set in `folder`, or `folder` itself where it holds none and `ClipSource` will say so."""
  found = [path.parent for path in sorted(folder.rglob('dataset_info.json'))]
  if len(found) > 1:
    raise DataError(f'{folder} holds {len(found)} data sets; give one of them, such as {found[0]}')
  return found[0] if found else folder


if __name__ == '__main__':
  command.run(main, USAGE)
