"""`python -m convert inspect`: lists what a model folder or a published file holds."""

import argparse
import pathlib

from convert import summary, torch_files
from dicetalk_jax import bundle, published_priors
from dicetalk_jax.errors import InputError, WeightsError
from dicetalk_jax.files import walk

EXAMPLE = """examples:
  components of a model folder, their dtypes and origin, settings, emotions:
    python -m convert inspect models/dicetalk
  every weight file below a folder, or one file:
    python -m convert inspect checkpoints/DICE-Talk
    python -m convert inspect checkpoints/DICE-Talk/unet.pth

Reads weights only for the digests of files. Nothing in a file is executed."""

# A key, without published prefixes, that identifies the component. The first match
# counts: later keys also occur in earlier components.
MARKS = {
  'unet': 'time_embedding.linear_1.weight',
  'vae': 'quant_conv.weight',
  'image_encoder': 'visual_projection.weight',
  'whisper': 'encoder.embed_positions.weight',
  'emo_model': 'codebook.codebook.weight',
  'pose_guider': 'blocks.0.weight',
  'flownet': 'block0.conv0.0.0.weight',
  'taesdv': 'decoder.3.conv.0.weight',
  'audio_linear': 'norm.weight',
  'audio2bucket': 'proj1.weight',
}


def run(args: argparse.Namespace) -> int:
  if (args.path / bundle.INDEX).exists():
    _show_model_folder(args.path)
  else:
    _show_published(args.path)
  return 0


def _show_model_folder(folder: pathlib.Path) -> None:
  rows: list[summary.Row] = []
  sources: dict[str, str] = {}
  notes: list[str] = []
  for name, entry in bundle.components(folder).items():
    try:
      shapes = bundle.shapes(folder, name)
      rows.append(summary.row(name, len(shapes), shapes))
    except WeightsError as error:
      notes.append(f'{name}: {error}')
    origin = entry['provenance']
    for file, digest in origin.get('files', {}).items():
      sources[f'{file} ({name})'] = digest
    facts = [f'{key} {value}' for key, value in origin.items() if key != 'files']
    for key in ('fingerprint', 'priors', 'folder'):
      if key in entry:
        facts.append(f'{key} {entry[key]}')
    notes.append(f'{name}: {", ".join(facts)}')
  notes.append(f'settings: {bundle.settings(folder) or "as published"}')
  emotions = [_emotion(folder, name) for name in bundle.emotions(folder)]
  notes.append(f'emotions: {", ".join(emotions) or "none"}')
  summary.show(rows, sources, notes)


def _emotion(folder: pathlib.Path, name: str) -> str:
  """Gives the name of an emotion, with its embedder if that is known."""
  embedder = bundle.read_prior(folder, name)[1]
  return f'{name} (embedder {embedder})' if embedder else name


def _show_published(path: pathlib.Path) -> None:
  rows = []
  weights = []
  notes = []
  for file in _readable_files(path):
    if file.suffix in torch_files.SUFFIXES:
      state = torch_files.load(file)
      rows.append(summary.row(_component(state), len(state), state))
      weights.append(file)
    else:
      notes.append(f'{file}: {_describe_prior(file)}')
  summary.show(rows, torch_files.sha256(weights), notes)


def _describe_prior(path: pathlib.Path) -> str:
  (mu, sigma), embedder, others = published_priors.read(path)
  deviation = 'with' if sigma.any() else 'without'
  line = f'emotion prior of {len(mu)} numbers, {deviation} deviation'
  if embedder:
    line += f', of embedder {embedder}'
  if others:
    line += f'; also {", ".join(others)}'
  return line


def _readable_files(path: pathlib.Path) -> list[pathlib.Path]:
  """Lists the file, or all files below a folder that can be read."""
  if not path.exists():
    raise InputError(
      f'{path} does not exist; give a model folder, or a published file or folder'
    )
  if not path.is_dir():
    return [path]
  suffixes = (*torch_files.SUFFIXES, '.npy')
  found = sorted(
    pathlib.Path(folder, name)
    for folder, _, names in walk(path)
    for name in names
    if name.endswith(suffixes)
  )
  if not found:
    raise InputError(
      f'{path} has neither a model nor files that end in {", ".join(suffixes)}; check '
      'the path'
    )
  return found


def _component(state: torch_files.StateDict) -> str:
  for name, mark in MARKS.items():
    if any(key.endswith(mark) for key in state):
      return name
  return 'unknown'


def add_parser(commands) -> None:
  parser = commands.add_parser(
    'inspect',
    help='list what a folder or file holds',
    description='Lists what a model folder, or published files, hold.',
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
