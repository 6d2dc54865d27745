"""`python -m convert verify`: our numbers against reference outputs, with published
weights converted.
"""

import argparse
from collections.abc import Iterable, Iterator
import pathlib
from typing import NamedTuple

import jax
import numpy as np

from convert.verify import registry
from convert.verify.golden import Case, Golden

EXAMPLE = """example:
  python -m convert verify tests/goldens/vae tests/goldens/fullsize_seeded/rife tests/goldens

A folder stands for all golden files in it and below. Prints the largest error of every case, absolute and relative to
the standard deviation of the reference. Exit code 1 if a case exceeds its limit, 2 if a folder cannot be used."""


class Result(NamedTuple):
  """One case: `relative` is the error over the deviation of the reference."""

  component: str
  case: str
  error: float
  relative: float
  limit: float

  @property
  def passed(self) -> bool:
    return self.relative <= self.limit  # False for NaN


def compare(
  component: str, case: str, actual: np.ndarray, expected: np.ndarray, limit: float
) -> Result:
  """The largest difference of two arrays; infinite where shapes differ."""
  if actual.shape != expected.shape:
    return Result(component, case, np.inf, np.inf, limit)
  expected = np.asarray(expected, np.float64)
  error = float(np.abs(np.asarray(actual, np.float64) - expected).max())
  # A single number has no deviation: then its size counts, or 1 for zero.
  scale = expected.std() or np.abs(expected).max() or 1.0
  return Result(component, case, error, float(error / scale), limit)


def results(folders: Iterable[pathlib.Path]) -> Iterator[Result]:
  """Runs all cases of golden folders in float32.

  Raises:
    InputError: a folder is of no known component or lacks a file; nothing has run then.
    WeightsError: weights do not fit the module.
  """
  paths = dict.fromkeys(
    path for folder in folders for path in registry.descriptions(folder)
  )
  for name, golden in [registry.load(path) for path in paths]:
    with jax.default_matmul_precision('highest'):
      for case in cases(name, golden):
        yield compare(name, case.name, case.actual, case.expected, case.limit)


def cases(name: str, golden: Golden) -> Iterator[Case]:
  """Runs all cases of golden files of kind `name`; `expected` is always set."""
  for case in registry.KINDS[name].cases(golden):
    if case.expected is None:
      case = case._replace(expected=golden.outputs[case.name])
    yield case


def run(args: argparse.Namespace) -> int:
  """Prints the table; returns the exit code."""
  print(
    f'{"component":17} {"case":34} {"max error":>10} {"relative":>10} {"limit":>10}'
  )
  failed = count = 0
  for result in results(args.folders):
    verdict = 'pass' if result.passed else 'FAIL'
    print(
      f'{result.component:17} {result.case:34} {result.error:10.1e} '
      f'{result.relative:10.1e} {result.limit:10.1e}  {verdict}',
      flush=True,
    )
    failed, count = failed + (not result.passed), count + 1
  print(f'{count - failed} of {count} cases pass')
  return 1 if failed else 0


def add_parser(commands) -> None:
  parser = commands.add_parser(
    'verify',
    help='check the modules against golden files',
    description='Checks modules and whole programs against golden files: builds them '
    'from their description, converts their weights, runs every case.',
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
