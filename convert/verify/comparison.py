"""Compares the results of our modules with the recorded ones of golden files."""

from collections.abc import Iterable, Iterator
import pathlib
from typing import NamedTuple

import jax
import numpy as np

from convert.verify import registry
from convert.verify.golden import Case, Golden


class Result(NamedTuple):
  """The errors of one case."""

  component: str
  case: str
  error: float  # largest absolute difference
  relative: float  # the same, over the standard deviation of the reference
  limit: float  # of `relative`

  @property
  def passed(self) -> bool:
    return self.relative <= self.limit  # False for NaN


def compare(
  component: str, case: str, actual: np.ndarray, expected: np.ndarray, limit: float
) -> Result:
  """Finds the largest difference of two arrays; it is infinite if shapes differ."""
  if actual.shape != expected.shape:
    return Result(component, case, np.inf, np.inf, limit)
  expected = np.asarray(expected, np.float64)
  error = float(np.abs(np.asarray(actual, np.float64) - expected).max())
  # A single number has no deviation: then its size counts, or 1 for zero.
  scale = expected.std() or np.abs(expected).max() or 1.0
  return Result(component, case, error, float(error / scale), limit)


def compare_all(folders: Iterable[pathlib.Path]) -> Iterator[Result]:
  """Runs all cases of golden folders in float32.

  Raises:
    InputError: a folder is of unknown kind or lacks a file; nothing has run then.
    WeightsError: weights do not fit the module.
  """
  paths = dict.fromkeys(
    path for folder in folders for path in registry.descriptions(folder)
  )
  for name, golden in [registry.load(path) for path in paths]:
    with jax.default_matmul_precision('highest'):
      for case in run_cases(name, golden):
        assert case.expected is not None  # `run_cases` sets it
        yield compare(name, case.name, case.actual, case.expected, case.limit)


def run_cases(name: str, golden: Golden) -> Iterator[Case]:
  """Runs all cases of golden files of kind `name`; `expected` is always set."""
  for case in registry.KINDS[name].cases(golden):
    if case.expected is None:
      case = case._replace(expected=golden.outputs[case.name])
    yield case
