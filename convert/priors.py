"""`python -m convert priors`: emotion priors into a model folder, or out of it.

Outside of model folders, priors are .npy files of the reference implementation.
"""

import argparse
from collections.abc import Sequence
import pathlib
from typing import NamedTuple

from convert import summary, torch_files
from dicetalk_jax import bundle, published_priors
from dicetalk_jax.errors import InputError, WeightsError
from dicetalk_jax.files import atomic_folder, refuse_existing

EXAMPLE = """examples:
  .npy files, or folders of them, into a model folder:
    python -m convert priors examples/emo models/dicetalk
  the priors of a model folder into a new folder of .npy files:
    python -m convert priors models/dicetalk priors

The name of a file is the name of its emotion. Published files hold a mean only: their
deviation becomes 0."""

# A prior, with the fingerprint of its embedder, or ''.
Labelled = tuple[bundle.Prior, str]


class Found(NamedTuple):
  """Priors that were read."""

  priors: dict[str, Labelled] = {}
  files: tuple[pathlib.Path, ...] = ()
  left_over: tuple[str, ...] = ()  # other entries of the files

  def row(self) -> summary.Row:
    """Makes the row of the summary.

    A deviation of zeros stands for a file without one, so it is not counted.
    """
    mapped = {}
    for emotion, (prior, _) in self.priors.items():
      mu, sigma = prior
      mapped[f'{emotion}.{published_priors.MU}'] = mu
      if sigma.any():
        mapped[f'{emotion}.{published_priors.SIGMA}'] = sigma
    return summary.row('priors', len(mapped) + len(self.left_over), mapped)


def read(paths: Sequence[pathlib.Path], width: int | None) -> Found:
  """Reads priors of files and folders.

  Args:
    paths: `.npy` files, or folders of them.
    width: size that a mean must have; None if that is unknown.

  Raises:
    InputError, WeightsError: a file cannot be used, or two have the same name.
  """
  priors: dict[str, Labelled] = {}
  left_over: list[str] = []
  files = tuple(file for path in paths for file in _files(path))
  for path in files:
    prior, embedder, others = published_priors.read(path)
    left_over += others
    if width not in (None, len(prior[0])):
      raise WeightsError(
        f'{path} has {len(prior[0])} numbers, the model wants {width}; '
        'use priors of the same embedder'
      )
    if path.stem in priors:
      raise InputError(
        f'two files are named {path.name}, so two priors have one emotion; rename one'
      )
    priors[path.stem] = prior, embedder
  return Found(priors, files, tuple(left_over))


def _files(path: pathlib.Path) -> list[pathlib.Path]:
  if not path.is_dir():
    return [path]
  if files := sorted(path.glob('*.npy')):
    return files
  raise InputError(f'{path} has no .npy files; give the folder of the emotion priors')


def save(folder: pathlib.Path, found: Found, default_embedder: str = '') -> None:
  """Saves priors in a model folder.

  Args:
    folder: the model folder.
    found: the priors.
    default_embedder: the embedder of files that do not name theirs.

  Raises:
    WeightsError: one would replace the prior of another embedder. Nothing is written
      then.
  """
  for emotion, (_, embedder) in found.priors.items():
    bundle.check_replaceable(folder, [emotion], embedder or default_embedder)
  for emotion, (prior, embedder) in found.priors.items():
    bundle.save_priors(folder, {emotion: prior}, embedder or default_embedder)


def for_files(model: pathlib.Path) -> dict[str, Labelled]:
  """Reads the priors of a model folder, with the embedder that their files name.

  Files of the released embedder do not name it.
  """
  priors = {}
  for emotion in bundle.emotions(model):
    prior, embedder = bundle.read_prior(model, emotion)
    priors[emotion] = prior, '' if embedder == bundle.RELEASED else embedder
  return priors


def run(args: argparse.Namespace) -> int:
  if (args.sources[0] / bundle.INDEX).exists():
    _from_model(args)
  else:
    _to_model(args)
  return 0


def _to_model(args: argparse.Namespace) -> None:
  """Reads files into the model folder `args.destination`."""
  # 1. Read the files and refuse those that do not fit
  known = bundle.require(args.destination)
  width = None
  if bundle.EMOTION_MODEL in known:
    width = known[bundle.EMOTION_MODEL]['config'].get('prior_dim')
  found = read(args.sources, width)
  taken = sorted(found.priors.keys() & set(bundle.emotions(args.destination)))
  if taken and not args.overwrite:
    raise InputError(
      f'{args.destination} has {", ".join(taken)} already; add --overwrite to replace'
    )

  # 2. Save them. Files that name no embedder come from the release
  learned_on = bundle.learned_priors(args.destination)
  default_embedder = learned_on if learned_on == bundle.RELEASED else ''
  save(args.destination, found, default_embedder)

  # 3. Say what was written, and what the model cannot use
  summary.show([found.row()], torch_files.sha256(found.files), [])
  print(
    f'wrote {len(found.priors)} priors to {args.destination}: {", ".join(found.priors)}'
  )
  unusable = [
    emotion
    for emotion, (_, embedder) in found.priors.items()
    if not bundle.readable(embedder, learned_on)
  ]
  if unusable:
    print(
      'the emotion model there learned on priors of another embedder and cannot use '
      f'{", ".join(unusable)}'
    )


def _from_model(args: argparse.Namespace) -> None:
  """Writes the priors of the model folder `args.sources[0]` to files."""
  model = args.sources[0]
  refuse_existing(args.destination, overwrite=False, mark='')
  priors = for_files(model)
  if not priors:
    raise InputError(f'{model} has no priors; add some with python -m convert priors')
  if len(args.sources) > 1:
    raise InputError('several sources are given; give one model folder at a time')
  with atomic_folder(args.destination) as folder:
    published_priors.write_all(folder, priors)
  sources = sorted((model / bundle.PRIORS).glob('[!.]*.npz'))
  summary.show([Found(priors).row()], torch_files.sha256(sources), [])
  print(f'wrote {len(priors)} files to {args.destination}: {", ".join(priors)}')


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
    '--overwrite', action='store_true', help='replace emotions that the model has'
  )
  parser.set_defaults(run=run)
