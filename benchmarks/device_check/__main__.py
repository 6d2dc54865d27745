"""The first thing to run on a new accelerator: `python -m benchmarks.device_check`.

Checks results against reference outputs, and measures speed against the floor that the
arithmetic sets. Each part runs in a process of its own and writes one JSON file when it
ends; parts that are already there for the same code and device are skipped. See
docs/benchmarks.md. `--reduced` runs everything at sizes for a CPU.
"""

import os
import pathlib
import subprocess
import sys
import time

from benchmarks.device_check import report
from benchmarks.device_check.parts import PARTS, Part, chosen
from dicetalk_jax.cli import OptionParser
from dicetalk_jax.errors import ConfigError, InputError, one_sentence

# Compiles much faster, to slower programs.
QUICK = {
  'XLA_FLAGS': '--xla_backend_optimization_level=0 '
  '--xla_llvm_disable_expensive_passes=true',
  'JAX_DISABLE_MOST_OPTIMIZATIONS': 'true',
}


def main(argv: list[str]) -> int:
  """Runs the chosen parts; returns the exit code: 1 where one has failed."""
  parser = OptionParser(
    prog='python -m benchmarks.device_check', description=__doc__.split('\n')[0]
  )
  parser.add_argument('--parts', default=','.join(PARTS), help='default: %(default)s')
  parser.add_argument(
    '--out', type=pathlib.Path, help='default: runs/device_check[_reduced]'
  )
  parser.add_argument('--reduced', action='store_true', help='small sizes, for a CPU')
  parser.add_argument(
    '--force', action='store_true', help='repeat parts that are there'
  )
  parser.add_argument(
    '--limit',
    type=float,
    default=600,
    help='seconds that a part may take (%(default)s)',
  )
  args = parser.parse_args(argv)
  names = chosen(args.parts)
  if args.limit <= 0:
    raise ConfigError(f'--limit={args.limit:g} must be more than 0 seconds')
  out = args.out or pathlib.Path('runs', f'device_check{"_reduced" * args.reduced}')
  try:
    out.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise InputError(
      f'cannot write results to {out} ({error.strerror}); choose another --out'
    ) from None

  for i, name in enumerate(names, 1):
    part = PARTS[name]
    minutes = 'a minute' if args.reduced else f'{part.minutes:g} min on a GPU'
    print(f'[{i}/{len(names)}] {name}: {part.says}; up to {minutes}', flush=True)
    run_process(name, part, out.resolve(), args)
  print(f'\n{report.table(out, names)}\n\nresults: {out}')
  failed = [name for name in names if report.read(out, name)['status'] == report.FAILED]
  return 1 if failed else 0


def run_process(name: str, part: Part, out: pathlib.Path, args) -> None:
  """Runs one part; a process that leaves no result, or takes too long, has failed."""
  command = [
    sys.executable,
    '-m',
    'benchmarks.device_check.run_part',
    name,
    f'--out={out}',
  ]
  command += ['--reduced'] * args.reduced + ['--force'] * args.force
  environment = os.environ | part.environment
  if args.reduced and part.quick:
    environment = QUICK | environment
  start = time.perf_counter()
  ending = ''
  try:
    process = subprocess.run(
      command, cwd=report.ROOT, env=environment, timeout=args.limit, check=False
    )
    if process.returncode:
      ending = f'its process ended with code {process.returncode}'
  except subprocess.TimeoutExpired:
    ending = f'it was stopped after {args.limit:g} s'
  if ending:
    # What it had saved until then is kept.
    record = report.read(out, name)
    record |= {'part': name, 'status': report.FAILED, 'error': ending}
    report.write(out, name, record | {'seconds': time.perf_counter() - start})


if __name__ == '__main__':
  with one_sentence():
    sys.exit(main(sys.argv[1:]))
