"""`python -m convert priors`: emotion priors into a model folder, or out of it as
files of the original program.
"""

import argparse
from collections.abc import Sequence
import itertools
import pathlib
from typing import NamedTuple

from convert import summary, torch_files
from dicetalk_jax import bundle, published_priors
from dicetalk_jax.errors import InputError, WeightsError
from dicetalk_jax.files import atomic_folder, refuse_existing

EXAMPLE = """examples:
  python -m convert priors examples/emo models/dicetalk           .npy files (or folders of them) into a model folder
  python -m convert priors models/dicetalk priors                 a model folder's into a new folder of .npy files

The name of a file is the name of its emotion. Published files hold a mean only: their deviation becomes 0."""


class Found(NamedTuple):
  """Priors that were read."""

  priors: dict[
    str, tuple[bundle.Prior, str]
  ] = {}  # with the fingerprint of the embedder, or ''
  files: tuple[pathlib.Path, ...] = ()
  left_over: tuple[str, ...] = ()  # what else the files hold

  def row(self) -> summary.Row:
    """Of the report; a deviation that is zero everywhere was not read."""
    mapped = {
      f'{emotion}.{name}': x
      for emotion, (prior, _) in self.priors.items()
      for name, x in zip((published_priors.MU, published_priors.SIGMA), prior)
      if name == published_priors.MU or x.any()
    }
    return summary.row('priors', len(mapped) + len(self.left_over), mapped)


def read(paths: Sequence[pathlib.Path], width: int | None) -> Found:
  """Priors of files and folders.

  Args:
    paths: `.npy` files, or folders of them.
    width: how many numbers a mean must have; None if that is unknown.

  Raises:
    InputError, WeightsError: a file cannot be used, or two have the same name.
  """
  out: dict[str, tuple[bundle.Prior, str]] = {}
  left_over: list[str] = []
  files = tuple(itertools.chain.from_iterable(map(_files, paths)))
  for path in files:
    prior, embedder, others = published_priors.read(path)
    left_over += others
    if width not in (None, len(prior[0])):
      raise WeightsError(
        f'{path} has {len(prior[0])} numbers, the model wants {width}; '
        'use priors of the same embedder'
      )
    if path.stem in out:
      raise InputError(
        f"two files are named {path.name}; the name is the emotion's, so rename one"
      )
    out[path.stem] = prior, embedder
  return Found(out, files, tuple(left_over))


def save(folder: pathlib.Path, found: Found, untold: str = '') -> None:
  """Puts priors into a model folder; `untold` is the embedder of files that do not name
  theirs.

  Raises:
    WeightsError: one would replace the prior of another embedder. Nothing is written
      then.
  """
  for emotion, (_, embedder) in found.priors.items():
    bundle.check_replaceable(folder, [emotion], embedder or untold)
  for emotion, (prior, embedder) in found.priors.items():
    bundle.save_priors(folder, {emotion: prior}, embedder or untold)


def for_files(model: pathlib.Path) -> dict[str, tuple[bundle.Prior, str]]:
  """Priors of a model folder with what their files say of their embedder: nothing of
  the release's.
  """
  priors = {}
  for emotion in bundle.emotions(model):
    prior, embedder = bundle.read_prior(model, emotion)
    priors[emotion] = prior, '' if embedder == bundle.RELEASED else embedder
  return priors


def _files(path: pathlib.Path) -> list[pathlib.Path]:
  if not path.is_dir():
    return [path]
  if files := sorted(path.glob('*.npy')):
    return files
  raise InputError(f'{path} has no .npy files; give the folder of the emotion priors')


def run(args: argparse.Namespace) -> int:
  if (args.sources[0] / bundle.INDEX).exists():
    return _from_model(args)
  known = bundle.require(args.destination)
  width = (
    known['emo_model']['config'].get('prior_dim') if 'emo_model' in known else None
  )
  found = read(args.sources, width)
  if (
    taken := sorted(found.priors.keys() & set(bundle.emotions(args.destination)))
  ) and not args.overwrite:
    raise InputError(
      f'{args.destination} has {", ".join(taken)} already; add --overwrite to replace'
    )
  learned_on = bundle.learned_priors(args.destination)
  # Files that name no embedder are those of the release.
  save(
    args.destination, found, untold=learned_on if learned_on == bundle.RELEASED else ''
  )
  summary.show([found.row()], torch_files.sha256(found.files), [])
  print(
    f'wrote {len(found.priors)} priors to {args.destination}: {", ".join(found.priors)}'
  )
  misread = [
    name
    for name, (_, embedder) in found.priors.items()
    if not bundle.readable(embedder, learned_on)
  ]
  if misread:
    print(
      'the emotion model there learned on priors of another embedder and cannot use '
      f'{", ".join(misread)}'
    )
  return 0


def _from_model(args: argparse.Namespace) -> int:
  refuse_existing(args.destination, overwrite=False, mark='')
  priors = for_files(args.sources[0])
  if len(args.sources) > 1 or not priors:
    raise InputError(
      f'{args.sources[0]} has no priors'
      if not priors
      else 'give one model folder at a time'
    )
  with atomic_folder(args.destination) as folder:
    published_priors.write_all(folder, priors)
  sources = sorted((args.sources[0] / bundle.PRIORS).glob('[!.]*.npz'))
  summary.show([Found(priors).row()], torch_files.sha256(sources), [])
  print(f'wrote {len(priors)} files to {args.destination}: {", ".join(priors)}')
  return 0


def add_parser(commands) -> None:
  parser = commands.add_parser(
    'priors',
    help='convert emotion priors, both ways',
    description='Converts emotion priors between .npy files and a model folder.',
    epilog=EXAMPLE,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    'sources',
    metavar='SRC',
    nargs='+',
    type=pathlib.Path,
    help='.npy files or folders of them, or one model folder',
  )
  parser.add_argument(
    'destination',
    metavar='DST',
    type=pathlib.Path,
    help='the model folder, or the folder to make',
  )
  parser.add_argument(
    '--overwrite',
    action='store_true',
    help='replace emotions that the model has already',
  )
  parser.set_defaults(run=run)
