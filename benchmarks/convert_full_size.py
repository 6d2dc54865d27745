"""Conversion at full size: `python -m benchmarks.convert_full_size`.

Writes random files with the published names and shapes into a temporary folder,
converts and exports them by the command line, checks that what comes back is equal to
the bit, and prints the peak memory of each command against its largest file. Takes
about 20 GB of disk in float16, all of which is deleted at the end. Linux only.
"""

import argparse
import pathlib
import tempfile

import torch

from benchmarks.processes import measure
from benchmarks.published_files import write_downloads
from convert import published_layouts, torch_files


def report(largest: pathlib.Path, *args) -> None:
  """Runs one command; prints its seconds and peaks."""
  peak, size = measure('convert', *args), largest.stat().st_size
  print(
    f'>>> {args[0]}: {peak.seconds:.0f} s; largest file {size / 1e9:.2f} GB; peak of '
    f'own memory {peak.own / 1e9:.2f} GB ({peak.own / size:.2f} of it), with pages of '
    f'mapped files {peak.with_files / 1e9:.2f} GB',
    flush=True,
  )


def compare(first: pathlib.Path, second: pathlib.Path) -> None:
  """Raises AssertionError unless two files hold the same tensors."""
  a, b = torch_files.load(first), torch_files.load(second)
  assert a.keys() == b.keys(), (first, second)
  for key, value in a.items():
    assert value.dtype == b[key].dtype and torch.equal(value, b[key]), key
  print(f'{second.name}: {len(a)} tensors equal to the bit', flush=True)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument(
    '--dtype',
    choices=('float16', 'float32'),
    default='float16',
    help='of the published files',
  )
  parser.add_argument('--folder', help='where to put the temporary folder')
  args = parser.parse_args()
  with tempfile.TemporaryDirectory(dir=args.folder) as place:
    folder = pathlib.Path(place)
    write_downloads(folder, getattr(torch, args.dtype))
    unet, base = (
      folder / 'dicetalk/unet.pth',
      torch_files.weights_in(folder / 'svd/unet'),
    )
    report(
      torch_files.weights_in(folder / 'whisper'),
      'whisper',
      folder / 'whisper',
      folder / 'model',
    )
    report(base, 'svd', folder / 'svd', folder / 'model', '--overwrite')
    report(
      unet,
      'dicetalk',
      folder / 'dicetalk',
      folder / 'model',
      '--overwrite',
      '--svd',
      folder / 'svd',
      '--whisper',
      folder / 'whisper',
    )
    report(unet, 'export', folder / 'model', folder / 'out')
    svd = folder / 'out/stable-video-diffusion-img2vid-xt'
    for file in published_layouts.DICETALK.values():
      compare(folder / 'dicetalk' / file, folder / 'out' / file)
    for name in ('vae', 'image_encoder'):
      compare(
        torch_files.weights_in(folder / 'svd' / name),
        torch_files.weights_in(svd / name),
      )


if __name__ == '__main__':
  main()
