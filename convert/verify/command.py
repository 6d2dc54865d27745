"""`python -m convert verify`: checks our modules against the reference implementation.

The reference outputs and weights lie in golden files, such as those in `tests/goldens`.
"""

import argparse
import pathlib

from convert.verify import comparison

EXAMPLE = """example:
  python -m convert verify tests/goldens/vae tests/goldens/fullsize_seeded/rife

A folder stands for all golden files in it and below. Prints the largest error of every
case: absolute, and relative to the standard deviation of the reference. The exit code
is 1 if a case exceeds its limit, and 2 if a folder cannot be used."""


def run(args: argparse.Namespace) -> int:
  """Prints the table of errors, and returns the exit code."""
  print(
    f'{"component":17} {"case":34} {"max error":>10} {"relative":>10} {"limit":>10}'
  )
  count = 0
  failed = 0
  for result in comparison.compare_all(args.folders):
    verdict = 'pass' if result.passed else 'FAIL'
    print(
      f'{result.component:17} {result.case:34} {result.error:10.1e} '
      f'{result.relative:10.1e} {result.limit:10.1e}  {verdict}',
      flush=True,
    )
    count += 1
    failed += not result.passed
  print(f'{count - failed} of {count} cases pass')
  return 1 if failed else 0


def add_parser(commands) -> None:
  parser = commands.add_parser(
    'verify',
    help='check the modules against golden files',
    description='Checks modules and whole pipelines against golden files.',
    epilog=EXAMPLE,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    'folders',
    metavar='DIR',
    nargs='+',
    type=pathlib.Path,
    help='golden files: a folder, or one description',
  )
  parser.set_defaults(run=run)
