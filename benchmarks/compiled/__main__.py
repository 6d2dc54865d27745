"""Compiles a program for an accelerator that is not there, and lists its kernels.

  .compiler-gpu/bin/python -m benchmarks.compiled --target=h200 --part=denoise
  .compiler-tpu/bin/python -m benchmarks.compiled --target=v5e --part=denoise --blocks

`make compiler-gpu` and `make compiler-tpu` install the compilers. All times are
predicted, none is measured: of GPU kernels from what they move and compute, of TPU
kernels as their compiler estimates. See docs/compiled.md.
"""

import argparse
import json
import pathlib
import sys
from typing import Any

from benchmarks.compiled import devices
from dicetalk_jax import cli

PARTS = ('denoise', 'sample', 'decode', 'encode', 'train')


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='python -m benchmarks.compiled', description=__doc__.split('\n')[0]
  )
  parser.add_argument('--target', required=True, choices=list(devices.known()))
  parser.add_argument('--part', required=True, choices=PARTS)
  parser.add_argument(
    '--devices', type=int, default=1, metavar='N', help='default: %(default)s'
  )
  parser.add_argument(
    '--mesh',
    default='',
    metavar='AXES',
    help='such as fsdp=4,sequence=2 (default: fsdp=-1 to train, else data=-1)',
  )
  parser.add_argument(
    '--blocks',
    action='store_true',
    help='compile each distinct block once, times its number: for programs that take '
    'too long as a whole',
  )
  parser.add_argument(
    '--fused', action='store_true', help='with the kernels of `models/fused.py`'
  )
  parser.add_argument(
    '--out', type=pathlib.Path, metavar='FILE', help='write the record as JSON'
  )
  parser.add_argument(
    '--compare', type=pathlib.Path, metavar='FILE', help='an older record'
  )
  parser.add_argument(
    '--hlo', type=pathlib.Path, metavar='FILE', help='write the compiled text'
  )
  return parser


def main(argv: list[str]) -> None:
  args = _parser().parse_args(argv)
  device = devices.known()[args.target]
  devices.configure(device)
  from benchmarks.compiled import compile_part, report
  from dicetalk_jax.models import fused

  record: dict[str, Any] = {
    'target': args.target,
    'part': args.part,
    'devices': args.devices,
    'mesh': args.mesh,
    'fused': args.fused,
  }
  with fused.kernels(args.fused):
    record |= compile_part.compile_part(
      device, args.part, args.devices, args.mesh, blocks=args.blocks, hlo_file=args.hlo
    )
  print(report.table(record))
  if args.compare:
    print(report.comparison(json.loads(args.compare.read_text()), record))
  if args.out:
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + '\n')


if __name__ == '__main__':
  with cli.console():
    main(sys.argv[1:])
