"""Measures conversion and export at full size, and checks that they are inverse.

  python -m benchmarks.convert_full_size

Writes random files with the published names and shapes into a temporary folder,
converts and exports them by the command line, checks that what comes back is equal to
the bit, and prints the peak memory of each command against its largest file. Takes
about 20 GB of disk in float16, all of which is deleted at the end. Linux only.
"""

import argparse
import pathlib
import tempfile

import torch

from benchmarks.processes import run_module
from benchmarks.published_files import write_downloads
from convert import published_layouts, torch_files


def report(largest: pathlib.Path, command: str, *args: object) -> None:
  """Runs `python -m convert command`; prints its time, and its peaks of memory.

  Args:
    largest: the largest file that it reads.
    command: of `convert`.
    args: what follows the command.
  """
  usage = run_module('convert', command, *args)
  size = largest.stat().st_size
  print(
    f'>>> {command}: {usage.seconds:.0f} s; largest file {size / 1e9:.2f} GB; peak of '
    f'own memory {usage.own / 1e9:.2f} GB ({usage.own / size:.2f} of it), with pages '
    f'of mapped files {usage.with_files / 1e9:.2f} GB',
    flush=True,
  )


def compare(first: pathlib.Path, second: pathlib.Path) -> None:
  """Raises AssertionError unless two files hold the same tensors."""
  expected = torch_files.load(first)
  actual = torch_files.load(second)
  assert expected.keys() == actual.keys(), (first, second)
  for key, value in expected.items():
    assert value.dtype == actual[key].dtype, key
    assert torch.equal(value, actual[key]), key
  print(f'{second.name}: {len(expected)} tensors equal to the bit', flush=True)


def convert_and_export(folder: pathlib.Path, dtype: torch.dtype) -> None:
  """Writes, converts, exports and compares, all inside `folder`."""
  dicetalk = folder / 'dicetalk'
  svd = folder / 'svd'
  whisper = folder / 'whisper'
  model = folder / 'model'
  exported = folder / 'out'

  # 1. Write what a user would download
  write_downloads(folder, dtype)
  unet = dicetalk / published_layouts.DICETALK['unet']

  # 2. Convert it, part by part and as a whole, and export it again
  report(torch_files.weights_in(whisper), 'whisper', whisper, model)
  report(torch_files.weights_in(svd / 'unet'), 'svd', svd, model, '--overwrite')
  bases = ('--svd', svd, '--whisper', whisper)
  report(unet, 'dicetalk', dicetalk, model, '--overwrite', *bases)
  report(unet, 'export', model, exported)

  # 3. Compare what came back
  for file in published_layouts.DICETALK.values():
    compare(dicetalk / file, exported / file)
  exported_svd = exported / 'stable-video-diffusion-img2vid-xt'
  for name in ('vae', 'image_encoder'):
    compare(
      torch_files.weights_in(svd / name), torch_files.weights_in(exported_svd / name)
    )


def main() -> None:
  parser = argparse.ArgumentParser(
    prog='python -m benchmarks.convert_full_size', description=__doc__.split('\n')[0]
  )
  parser.add_argument(
    '--dtype',
    choices=('float16', 'float32'),
    default='float16',
    help='type of the published files (default: %(default)s)',
  )
  parser.add_argument('--folder', help='where to make the temporary folder')
  args = parser.parse_args()
  with tempfile.TemporaryDirectory(dir=args.folder) as folder:
    convert_and_export(pathlib.Path(folder), getattr(torch, args.dtype))


if __name__ == '__main__':
  main()
