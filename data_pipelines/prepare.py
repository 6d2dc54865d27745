"""Prepares a data set: `python -m data_pipelines.prepare CORPUS --out=DIR ...`.

The corpus is synthetic, mead, hdtf, voxceleb2 or folder (your own clips).
"""

import argparse
from collections.abc import Sequence
import dataclasses
from typing import Any

from data_pipelines.builders.synthetic_clips import TINY, SyntheticConfig
from data_pipelines.corpora import folder, mead
from data_pipelines.preprocess import CorpusConfig
from dicetalk_jax import cli
from dicetalk_jax.data.expression_files import parse_columns
from dicetalk_jax.errors import ConfigError

SYNTHETIC = 'synthetic'
CORPORA = {
  'mead': 'eight emotions at three levels, acted',
  'hdtf': 'speeches in high resolution',
  'voxceleb2': 'thousands of people, small frames',
  'folder': 'your own clips, with a CSV of labels',
}


def _integers(text: str) -> tuple[int, ...]:
  return tuple(int(part) for part in text.split(','))


def _views(text: str) -> tuple[str, ...]:
  views = tuple(text.split(','))
  for view in views:
    if view not in mead.VIEWS:
      raise ConfigError(
        f'--views={text}: {view} is not known; choose some of {",".join(mead.VIEWS)}'
      )
  return views


def _parser(tiny: bool) -> argparse.ArgumentParser:
  """Makes the parser; `tiny` chooses the defaults of synthetic data."""
  parser = cli.OptionParser(
    prog='python -m data_pipelines.prepare',
    description='Prepares a data set of talking clips.',
  )
  corpora = parser.add_subparsers(
    dest='corpus', required=True, metavar='corpus', parser_class=cli.OptionParser
  )
  synthetic = corpora.add_parser(
    SYNTHETIC, help='procedural talking faces, nothing is downloaded'
  )
  _add_common(synthetic)
  _add_synthetic(synthetic, TINY if tiny else SyntheticConfig())
  for name, description in CORPORA.items():
    corpus = corpora.add_parser(name, help=description)
    _add_common(corpus)
    _add_real(corpus, CorpusConfig(name))
  return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of all data sets."""
  add = parser.add_argument
  add(
    '--out',
    '--data_dir',
    dest='data_dir',
    required=True,
    help='root of all data sets',
  )
  add(
    '--content',
    choices=('embedder', 'full'),
    default='full',
    help='embedder leaves out the pixels (latents instead: data_pipelines.precompute '
    '--records)',
  )
  add('--workers', type=int, help='number of processes; all cores if not given')


def _add_synthetic(parser: argparse.ArgumentParser, default: SyntheticConfig) -> None:
  """Adds the flags of synthetic data, one for each setting."""
  add = parser.add_argument
  add(
    '--tiny',
    action='store_true',
    help="start from the settings of the presets 'tiny' in configs/",
  )
  add('--size', type=int, default=default.size, help='side of the frames in pixels')
  add('--train', type=int, default=default.train, help='people in the training split')
  add('--val', type=int, default=default.val, help='people in the validation split')
  add('--test', type=int, default=default.test, help='people in the test split')
  add('--clips', type=int, default=default.clips, help='clips per person')
  add('--seconds', type=float, default=default.seconds, help='longest clip')
  add(
    '--levels',
    type=_integers,
    default=','.join(map(str, default.levels)),
    metavar='1,2,3',
    help='emotion levels',
  )
  add(
    '--motion',
    type=float,
    default=default.motion,
    help='strength of head motion, 1 = natural',
  )
  add(
    '--articulation',
    type=float,
    default=default.articulation,
    help='how far speech opens the mouth, 1 = natural',
  )
  add(
    '--zoom',
    type=float,
    default=default.zoom,
    help='zoom of the camera: 1 = head and shoulders, 1.25 = the head alone',
  )
  add(
    '--drift',
    type=float,
    default=default.drift,
    help='slow errors of the face tracker; 1 is as much as the strongest expression',
  )
  add(
    '--seed',
    type=int,
    default=default.seed,
    help='another seed gives other people and sentences',
  )


def _add_real(parser: argparse.ArgumentParser, default: CorpusConfig) -> None:
  """Adds the flags of a real corpus."""
  add = parser.add_argument
  add('--root', required=True, help='folder of the corpus; layouts are in docs/data.md')

  # Clips
  add('--size', type=int, default=default.size, help='side of the frames in pixels')
  add(
    '--min_face',
    type=int,
    default=-1,
    help='smallest side of the face in pixels; -1 is half of --size, for VoxCeleb2 0',
  )
  add(
    '--min_seconds',
    type=float,
    default=default.min_seconds,
    help='shorter clips are left out; 0 means 2 for MEAD, 2.5 otherwise',
  )
  add(
    '--max_seconds',
    type=float,
    default=default.max_seconds,
    help='longer clips are cut into equal pieces; at most 60',
  )
  add(
    '--expand',
    type=float,
    default=default.expand,
    help='how far the crop reaches beyond the face on every side, in sides of the face',
  )
  add(
    '--detector',
    default=default.detector,
    help='face detector: mtcnn, or package.module:function',
  )
  add(
    '--detect_every',
    type=int,
    default=default.detect_every,
    help='detect faces in every n-th frame',
  )

  # Expression features
  add('--expression', default='', help='folder of expression features')
  add('--expression_key', default='', help='name of the array in .mat and .npz files')
  add(
    '--expression_columns',
    type=parse_columns,
    metavar='80:144',
    help='columns to use; all if not given',
  )
  add(
    '--expression_fps',
    type=float,
    default=0.0,
    help='rows per second; 0 is the rate of the video',
  )

  # The run
  add('--dry_run', action='store_true', help='only print what would be prepared')
  add(
    '--keep_work',
    action='store_true',
    help='keep the finished clips for another run with the same settings',
  )
  add(
    '--beam_runner',
    default='',
    help='prepare with Apache Beam, such as DirectRunner; see docs/data.md',
  )
  add('--beam_options', default='', help='flags of the Beam pipeline, in one string')

  # One corpus alone
  if default.corpus == 'mead':
    add(
      '--views',
      type=_views,
      default='front',
      help=f'some of {",".join(mead.VIEWS)}',
    )
  if default.corpus == 'folder':
    add('--labels', default=folder.LABELS, help='CSV in the folder')


def main(argv: Sequence[str]) -> None:
  """Prepares a data set and prints its folder."""
  args = _parser(tiny='--tiny' in argv).parse_args(argv)
  if args.workers is not None and args.workers < 1:
    raise ConfigError(f'--workers must be at least 1, got {args.workers}')
  if args.corpus == SYNTHETIC:
    _prepare_synthetic(args)
  else:
    _prepare_real(args)


def _prepare_synthetic(args: argparse.Namespace) -> None:
  from data_pipelines.builders.synthetic import prepare_synthetic

  config = SyntheticConfig(**_settings(args, SyntheticConfig))
  print(prepare_synthetic(args.data_dir, config, workers=args.workers))


def _prepare_real(args: argparse.Namespace) -> None:
  from data_pipelines.builders import corpus_plan

  config = CorpusConfig(**_settings(args, CorpusConfig))
  walk = {
    name: getattr(args, name) for name in ('views', 'labels') if hasattr(args, name)
  }
  plan = corpus_plan.make_plan(config, args.root, args.expression, **walk)
  if args.dry_run:
    print(plan.summary())
    return
  # Importing TFDS takes seconds, which --help and wrong flags must not cost.
  from data_pipelines.builders.corpus import prepare_corpus

  made, report = prepare_corpus(
    plan,
    args.data_dir,
    workers=args.workers,
    beam_runner=args.beam_runner,
    beam_options=args.beam_options,
    keep_work=args.keep_work,
  )
  print(report.summary())
  print(made)


def _settings(args: argparse.Namespace, config: type) -> dict[str, Any]:
  """Gives the flags that are fields of a configuration."""
  names = [field.name for field in dataclasses.fields(config)]
  return {name: getattr(args, name) for name in names if hasattr(args, name)}


def run() -> None:
  """Console entry."""
  cli.run(main, _parser(tiny=False))


if __name__ == '__main__':
  run()
