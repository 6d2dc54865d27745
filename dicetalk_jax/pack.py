"""Copies a model folder with everything that it refers to into one portable folder.

python -m dicetalk_jax.pack --model=runs/diffusion/model --output=models/mine
"""

import argparse

from etils import epath
from tqdm import tqdm

from dicetalk_jax import bundle, cli, model_references


def _parser() -> argparse.ArgumentParser:
  parser = cli.OptionParser(
    prog='python -m dicetalk_jax.pack',
    description='Copies a model folder with everything that it refers to.',
  )
  add = parser.add_argument
  add(
    '--model',
    required=True,
    type=_expanded,
    metavar='DIR',
    help='model folder, such as the one in the work directory of a training run',
  )
  add(
    '--output',
    required=True,
    type=_expanded,
    metavar='DIR',
    help='the portable copy: it refers to no other folder',
  )
  add(
    '--overwrite',
    action='store_true',
    help='replace a model folder that is there already',
  )
  add(
    '--half',
    action='store_true',
    help='store parameters as float16, in half the space (all but the embedder)',
  )
  return parser


def _expanded(text: str) -> epath.Path:
  return epath.Path(text).expanduser()


def main(argv: list[str]) -> None:
  """Packs one model folder."""
  flags = _parser().parse_args(argv)

  with tqdm(desc='packing', unit='file', disable=None) as bar:

    def progress(stage: str, done: int, total: int) -> None:
      bar.total = total
      bar.update(done - bar.n)

    model_references.pack(
      flags.model,
      flags.output,
      overwrite=flags.overwrite,
      half=flags.half,
      progress=progress,
    )
  components = ', '.join(sorted(bundle.components(flags.output)))
  print(f'wrote {flags.output}: {components}')


def run() -> None:
  """Console entry."""
  cli.run(main, _parser())


if __name__ == '__main__':
  run()
