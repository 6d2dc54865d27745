"""Copies a model folder with everything that it refers to into one portable folder.

python -m dicetalk_jax.pack --model=runs/diffusion/model --output=models/mine
"""

from etils import epath
from tqdm import tqdm

from dicetalk_jax import bundle, cli, model_references

USAGE = """\
usage: python -m dicetalk_jax.pack --model=DIR --output=DIR [--overwrite]
  --model      model folder, such as the one in the work directory of a training run
  --output     the portable copy: it refers to no other folder
  --overwrite  replace a model folder that is there already
"""


def _expanded(text: str) -> epath.Path:
  return epath.Path(text).expanduser()


def main(argv: list[str]) -> None:
  """Packs one model folder."""
  parser = cli.Parser('dicetalk_jax.pack', USAGE)
  parser.add_argument('--model', required=True, type=_expanded)
  parser.add_argument('--output', required=True, type=_expanded)
  parser.add_argument('--overwrite', action='store_true')
  flags = parser.parse_args(argv)

  with tqdm(desc='packing', unit='file', disable=None) as bar:

    def progress(stage: str, done: int, total: int) -> None:
      bar.total = total
      bar.update(done - bar.n)

    model_references.pack(
      flags.model, flags.output, overwrite=flags.overwrite, progress=progress
    )
  components = ', '.join(sorted(bundle.components(flags.output)))
  print(f'wrote {flags.output}: {components}')


def run() -> None:
  """Console entry."""
  cli.run(main, USAGE)


if __name__ == '__main__':
  run()
