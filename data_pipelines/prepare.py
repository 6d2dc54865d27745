"""Prepares a data set: `python -m data_pipelines.prepare synthetic --data_dir=DIR [--size=64 ...]`."""

import argparse
from collections.abc import Sequence
import dataclasses
import sys
from typing import NoReturn

from data_pipelines.builders.synthetic_clips import SyntheticConfig
from data_pipelines.record import CONTENTS
from dicetalk_jax.errors import ConfigError, one_sentence


class _Parser(argparse.ArgumentParser):

  def error(self, message: str) -> NoReturn:
    raise ConfigError(f'{message}; see python -m data_pipelines.prepare --help')


def _integers(text: str) -> tuple[int, ...]:
  return tuple(int(part) for part in text.split(','))


def _parser() -> argparse.ArgumentParser:
  default = SyntheticConfig()
  parser = _Parser(prog='data_pipelines.prepare', description='Prepares a data set of talking clips.')
  corpora = parser.add_subparsers(dest='corpus', required=True, metavar='corpus', parser_class=_Parser)
  synthetic = corpora.add_parser(
      'synthetic', help='procedural talking faces, nothing is downloaded',
      formatter_class=argparse.ArgumentDefaultsHelpFormatter)
  add = synthetic.add_argument
  add('--data_dir', required=True, help='root of all data sets')
  add('--size', type=int, default=default.size, help='side of the picture in pixels')
  add('--train', type=int, default=default.train, help='people in the training split')
  add('--val', type=int, default=default.val, help='people in the validation split')
  add('--test', type=int, default=default.test, help='people in the test split')
  add('--clips', type=int, default=default.clips, help='clips per person')
  add('--seconds', type=float, default=default.seconds, help='longest clip')
  add('--levels', type=_integers, default=default.levels, metavar='1,2,3', help='emotion levels')
  add('--motion', type=float, default=default.motion, help='strength of head motion, 1 = natural')
  add('--articulation', type=float, default=default.articulation, help='how far speech opens the mouth, 1 = natural')
  add('--zoom', type=float, default=default.zoom, help='of the camera: 1 = head and shoulders, 1.25 = the head alone')
  add('--seed', type=int, default=default.seed, help='another seed gives other people and sentences')
  add('--content', choices=CONTENTS, default=default.content, help='embedder and latents leave out the pixels')
  add('--workers', type=int, default=None, help='processes that render; all cores if not given')
  return parser


def main(argv: Sequence[str]):
  """Prepares and prints the folder of the data set."""
  args = _parser().parse_args(argv)
  if args.workers is not None and args.workers < 1:
    raise ConfigError(f'--workers={args.workers} renders nothing; give 1 or more')
  from data_pipelines.builders.synthetic import prepare_synthetic  # TFDS takes seconds: not for --help or a typo
  config = SyntheticConfig(**{f.name: getattr(args, f.name) for f in dataclasses.fields(SyntheticConfig)})
  print(prepare_synthetic(args.data_dir, config, workers=args.workers))


if __name__ == '__main__':
  with one_sentence():
    main(sys.argv[1:])
