"""Prepares a data set: `python -m data_pipelines.prepare
synthetic|mead|hdtf|voxceleb2|folder --out=DIR ...`.
"""

import argparse
from collections.abc import Sequence
import dataclasses
import sys

from data_pipelines.builders.synthetic_clips import TINY, SyntheticConfig
from data_pipelines.corpora import folder, mead
from data_pipelines.preprocess import CorpusConfig
from dicetalk_jax import cli
from dicetalk_jax.data.expression_files import parse_columns
from dicetalk_jax.errors import ConfigError, one_sentence

CORPORA = {
  'mead': 'eight emotions at three levels, acted',
  'hdtf': 'speeches in high resolution',
  'voxceleb2': 'thousands of people, small pictures',
  'folder': 'your own clips, with a CSV of labels',
}


def _integers(text: str) -> tuple[int, ...]:
  return tuple(int(part) for part in text.split(','))


def _views(text: str) -> tuple[str, ...]:
  if unknown := set(text.split(',')) - set(mead.VIEWS):
    raise ConfigError(
      f'--views={text}: {sorted(unknown)[0]} is not known; choose some of '
      f'{",".join(mead.VIEWS)}'
    )
  return tuple(text.split(','))


def _parser(tiny: bool) -> argparse.ArgumentParser:
  """`tiny` decides which defaults the settings of synthetic data have."""
  parser = cli.OptionParser(
    prog='python -m data_pipelines.prepare',
    description='Prepares a data set of talking clips.',
  )
  corpora = parser.add_subparsers(
    dest='corpus', required=True, metavar='corpus', parser_class=cli.OptionParser
  )

  def corpus(name: str, what: str) -> argparse.ArgumentParser:
    ours = corpora.add_parser(
      name, help=what, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    ours.add_argument(
      '--out',
      '--data_dir',
      dest='data_dir',
      required=True,
      help='root of all data sets',
    )
    ours.add_argument(
      '--content',
      choices=('embedder', 'full'),
      default='full',
      help='embedder leaves out the pixels (latents instead: data_pipelines.precompute '
      '--records)',
    )
    ours.add_argument(
      '--workers',
      type=int,
      default=None,
      help='processes that work; all cores if not given',
    )
    return ours

  _add_synthetic(
    corpus('synthetic', 'procedural talking faces, nothing is downloaded').add_argument,
    TINY if tiny else SyntheticConfig(),
  )
  for name, what in CORPORA.items():
    _add_real(name, corpus(name, what).add_argument)
  return parser


def _add_synthetic(add, default: SyntheticConfig):
  add(
    '--tiny',
    action='store_true',
    help="start from the settings of the presets 'tiny' in configs/",
  )
  add('--size', type=int, default=default.size, help='side of the picture in pixels')
  add('--train', type=int, default=default.train, help='people in the training split')
  add('--val', type=int, default=default.val, help='people in the validation split')
  add('--test', type=int, default=default.test, help='people in the test split')
  add('--clips', type=int, default=default.clips, help='clips per person')
  add('--seconds', type=float, default=default.seconds, help='longest clip')
  add(
    '--levels',
    type=_integers,
    default=default.levels,
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
    help='of the camera: 1 = head and shoulders, 1.25 = the head alone',
  )
  add(
    '--drift',
    type=float,
    default=default.drift,
    help='slow errors of the face tracker; 1 is a whole expression',
  )
  add(
    '--seed',
    type=int,
    default=default.seed,
    help='another seed gives other people and sentences',
  )


def _add_real(corpus: str, add):
  default = CorpusConfig(corpus)
  add('--root', required=True, help='folder of the corpus; layouts are in docs/data.md')
  add('--size', type=int, default=default.size, help='side of the picture in pixels')
  add(
    '--min_face',
    type=int,
    default=-1,
    help='least side of the face in pixels; -1: half of --size, VoxCeleb2: 0',
  )
  add(
    '--min_seconds',
    type=float,
    default=default.min_seconds,
    help='shorter clips are left out',
  )
  add(
    '--max_seconds',
    type=float,
    default=default.max_seconds,
    help='longer clips are cut into equal pieces',
  )
  add(
    '--expand',
    type=float,
    default=default.expand,
    help='crop: sides of the face beyond it, on every side',
  )
  add(
    '--detector',
    default=default.detector,
    help='of faces: haar, or package.module:function',
  )
  add(
    '--detect_every',
    type=int,
    default=default.detect_every,
    help='faces are looked for in every n-th frame',
  )
  add('--expression', default='', help='folder of expression features')
  add('--expression_key', default='', help='name of the array in .mat and .npz files')
  add(
    '--expression_columns',
    type=parse_columns,
    default=None,
    metavar='80:144',
    help='columns that are used',
  )
  add(
    '--expression_fps',
    type=float,
    default=0.0,
    help='rows per second; 0 is the rate of the video',
  )
  add('--dry_run', action='store_true', help='only says what would be prepared')
  add(
    '--keep_work',
    action='store_true',
    help='keeps the finished clips for another run with the same settings',
  )
  add(
    '--beam_runner',
    default='',
    help='prepares with Apache Beam, such as DirectRunner; see docs/data.md',
  )
  add('--beam_options', default='', help='flags of the Beam pipeline, in one string')
  if corpus == 'mead':
    add(
      '--views', type=_views, default=('front',), help=f'some of {",".join(mead.VIEWS)}'
    )
  if corpus == 'folder':
    add('--labels', default=folder.LABELS, help='CSV in the folder')


def _prepare_real(args: argparse.Namespace):
  from data_pipelines.builders import corpus_plan

  config = CorpusConfig(
    **{
      f.name: getattr(args, f.name)
      for f in dataclasses.fields(CorpusConfig)
      if hasattr(args, f.name)
    }
  )
  walk = {
    name: getattr(args, name) for name in ('views', 'labels') if hasattr(args, name)
  }
  plan = corpus_plan.make_plan(config, args.root, args.expression, **walk)
  if args.dry_run:
    print(plan.summary())
    return
  from data_pipelines.builders.corpus import (
    prepare_corpus,
  )  # TFDS takes seconds: not for --help or a typo

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


def main(argv: Sequence[str]):
  """Prepares and prints the folder of the data set."""
  args = _parser(tiny='--tiny' in argv).parse_args(argv)
  if args.workers is not None and args.workers < 1:
    raise ConfigError(f'--workers={args.workers} renders nothing; give 1 or more')
  if args.corpus != 'synthetic':
    _prepare_real(args)
    return
  from data_pipelines.builders.synthetic import prepare_synthetic

  config = SyntheticConfig(
    **{f.name: getattr(args, f.name) for f in dataclasses.fields(SyntheticConfig)}
  )
  print(prepare_synthetic(args.data_dir, config, workers=args.workers))


if __name__ == '__main__':
  with one_sentence():
    main(sys.argv[1:])
