"""`python -m convert inspect`: what a model folder or a published file holds."""

import argparse
from collections.abc import Iterator
import pathlib

from convert import summary, torch_files
from dicetalk_jax import bundle, published_priors
from dicetalk_jax.errors import InputError, WeightsError

EXAMPLE = """examples:
  python -m convert inspect models/dicetalk                 components, types, where they came from, settings, emotions
  python -m convert inspect checkpoints/DICE-Talk           every weight file below a folder
  python -m convert inspect checkpoints/DICE-Talk/unet.pth

Reads no weights but for the digests of files. Nothing in a file is executed."""

# A key that only this component has, but for those further down, in any of the
# published prefixes.
MARKS = {
  'unet': 'time_embedding.linear_1.weight',
  'vae': 'quant_conv.weight',
  'image_encoder': 'visual_projection.weight',
  'whisper': 'encoder.embed_positions.weight',
  'emo_model': 'codebook.codebook.weight',
  'pose_guider': 'blocks.0.weight',
  'flownet': 'block0.conv0.0.0.weight',
  'audio_linear': 'norm.weight',
  'audio2bucket': 'proj1.weight',
}


def run(args: argparse.Namespace) -> int:
  if (args.path / bundle.INDEX).exists():
    _model_folder(args.path)
  else:
    _published(args.path)
  return 0


def _model_folder(folder: pathlib.Path) -> None:
  known = bundle.components(folder)
  rows, sources, notes = [], {}, []
  for name, entry in known.items():
    try:
      shapes = bundle.shapes(folder, name)
      rows.append(summary.row(name, len(shapes), shapes))
    except WeightsError as error:
      notes.append(f'{name}: {error}')
    origin = entry['provenance']
    sources |= {
      f'{file} ({name})': digest for file, digest in origin.get('files', {}).items()
    }
    facts = [f'{key} {value}' for key, value in origin.items() if key != 'files']
    facts += [
      f'{key} {entry[key]}'
      for key in ('fingerprint', 'priors', 'folder')
      if key in entry
    ]
    notes.append(f'{name}: ' + ', '.join(facts))
  notes += [f'settings: {bundle.settings(folder) or "as published"}']
  emotions = [_emotion(folder, name) for name in bundle.emotions(folder)]
  notes += [f'emotions: {", ".join(emotions) or "none"}']
  summary.show(rows, sources, notes)


def _emotion(folder: pathlib.Path, name: str) -> str:
  """Its name, with its embedder if that is known."""
  embedder = bundle.read_prior(folder, name)[1]
  return f'{name} (embedder {embedder})' if embedder else name


def _published(path: pathlib.Path) -> None:
  files = list(_files(path))
  weights = [file for file in files if file.suffix in torch_files.SUFFIXES]
  states = {file: torch_files.load(file) for file in weights}
  rows = [
    summary.row(_component(state), len(state), state) for state in states.values()
  ]
  notes = []
  for file in files:
    if file not in states:
      (mu, sigma), embedder, others = published_priors.read(file)
      notes.append(
        f'{file}: emotion prior of {len(mu)} numbers, '
        f'{"with" if sigma.any() else "without"} deviation'
        + (f', of embedder {embedder}' if embedder else '')
        + (f'; also {", ".join(others)}' if others else '')
      )
  summary.show(rows, torch_files.sha256(weights), notes)


def _files(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A file, or all that can be read below a folder."""
  if not path.exists():
    raise InputError(
      f'{path} does not exist; give a model folder, or a published file or folder'
    )
  if not path.is_dir():
    yield path
    return
  suffixes = (*torch_files.SUFFIXES, '.npy')
  found = [
    file
    for file in sorted(path.rglob('*'))
    if file.suffix in suffixes and file.is_file()
  ]
  if not found:
    raise InputError(
      f'{path} is no model folder and has no files that end in {", ".join(suffixes)}'
    )
  yield from found


def _component(state: torch_files.StateDict) -> str:
  return next(
    (name for name, mark in MARKS.items() if any(key.endswith(mark) for key in state)),
    'unknown',
  )


def add_parser(commands) -> None:
  parser = commands.add_parser(
    'inspect',
    help='list what a folder or file holds',
    description='Lists components, parameters, types and '
    'provenance of a model folder, or the same of published files.',
    epilog=EXAMPLE,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    'path',
    metavar='PATH',
    type=pathlib.Path,
    help='model folder, published file or folder',
  )
  parser.set_defaults(run=run)
