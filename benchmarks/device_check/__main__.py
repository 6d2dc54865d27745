"""Checks a new accelerator: results against references, speed against its limits.

  python -m benchmarks.device_check
  python -m benchmarks.device_check --reduced   # everything at sizes for a CPU

The first thing to run on a new device. Times are compared with the floor that the
arithmetic sets. Each part runs in a process of its own and writes one JSON file when it
ends; parts that are already there for the same code and device are skipped. See
docs/benchmarks.md.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import time

from benchmarks.device_check import report
from benchmarks.device_check.parts import PARTS, Part, choose
from dicetalk_jax.cli import OptionParser
from dicetalk_jax.errors import ConfigError, InputError, one_sentence

# Compiles much faster, to slower programs.
QUICK = {
  'XLA_FLAGS': '--xla_backend_optimization_level=0 '
  '--xla_llvm_disable_expensive_passes=true',
  'JAX_DISABLE_MOST_OPTIMIZATIONS': 'true',
}


def main(argv: list[str]) -> int:
  """Runs the chosen parts; returns the exit code: 1 if one has failed."""
  args = parse_args(argv)
  names = choose(args.parts)
  out = results_folder(args)

  for i, name in enumerate(names, 1):
    part = PARTS[name]
    limit = 'a minute' if args.reduced else f'{part.minutes:g} min on a GPU'
    print(f'[{i}/{len(names)}] {name}: {part.description}; up to {limit}', flush=True)
    run_process(name, part, out.resolve(), args)

  print(f'\n{report.table(out, names)}\n\nresults: {out}')
  statuses = [report.read(out, name)['status'] for name in names]
  return 1 if report.FAILED in statuses else 0


def parse_args(argv: list[str]) -> argparse.Namespace:
  parser = OptionParser(
    prog='python -m benchmarks.device_check', description=__doc__.split('\n')[0]
  )
  parser.add_argument(
    '--parts',
    default=','.join(PARTS),
    help='parts to run, separated by commas (default: %(default)s)',
  )
  parser.add_argument(
    '--out',
    type=pathlib.Path,
    help='folder of results (default: runs/device_check or, with --reduced, '
    'runs/device_check_reduced)',
  )
  parser.add_argument(
    '--reduced', action='store_true', help='use small sizes, for a CPU'
  )
  parser.add_argument(
    '--force', action='store_true', help='repeat parts whose result is there already'
  )
  parser.add_argument(
    '--limit',
    type=float,
    default=600,
    help='seconds after which a part is stopped (default: %(default)s)',
  )
  args = parser.parse_args(argv)
  if args.limit <= 0:
    raise ConfigError(f'--limit={args.limit:g} must be more than 0 seconds')
  return args


def results_folder(args: argparse.Namespace) -> pathlib.Path:
  """Creates the folder of results.

  Raises:
    InputError: that is not possible.
  """
  default = 'device_check_reduced' if args.reduced else 'device_check'
  out = args.out or pathlib.Path('runs', default)
  try:
    out.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise InputError(
      f'cannot write results to {out} ({error.strerror}); choose another --out'
    ) from None
  return out


def run_process(
  name: str, part: Part, out: pathlib.Path, args: argparse.Namespace
) -> None:
  """Runs one part; a process that leaves no result, or takes too long, has failed."""
  module = 'benchmarks.device_check.run_part'
  command = [sys.executable, '-m', module, name, f'--out={out}']
  if args.reduced:
    command.append('--reduced')
  if args.force:
    command.append('--force')
  environment = {**os.environ, **part.environment}
  if args.reduced and part.quick:
    environment = QUICK | environment

  start = time.perf_counter()
  failure = ''
  try:
    process = subprocess.run(
      command, cwd=report.ROOT, env=environment, timeout=args.limit, check=False
    )
    if process.returncode:
      failure = f'its process ended with code {process.returncode}'
  except subprocess.TimeoutExpired:
    failure = f'it was stopped after {args.limit:g} s'

  if failure:
    # What the part had saved until then is kept.
    record = report.read(out, name)
    record |= {'part': name, 'status': report.FAILED, 'error': failure}
    record['seconds'] = time.perf_counter() - start
    report.write(out, name, record)


if __name__ == '__main__':
  with one_sentence():
    sys.exit(main(sys.argv[1:]))
