"""`python -m convert accept`: does this program reproduce a run of the release?"""

import argparse
from collections.abc import Iterable
import pathlib
from typing import NamedTuple

import jax
import numpy as np

from convert.accept.dump import Dump
from convert.accept.stages import Stage, Stages

EXAMPLE = """example:
  python -m convert accept dump models/dicetalk

DUMP is from tools/dump_reference.py, which runs next to the original. Every stage is
computed from the dump's own inputs, and the last row from the first inputs alone.
Prints the differences: largest, mean, and largest over the standard deviation of the
reference, with the limit for that; of frames also the PSNR. The exit code is 1 if a
stage exceeds its limit, and 2 if the dump or the model folder cannot be used."""


class Row(NamedTuple):
  """The differences of one stage.

  Attributes:
    name: of the stage.
    largest: absolute difference.
    mean: of the absolute differences.
    relative: `largest` over the standard deviation of the reference.
    psnr: of images, in dB.
    limit: of `relative`, or, if `wants_psnr`, the least PSNR.
  """

  name: str
  largest: float
  mean: float
  relative: float
  psnr: float | None
  limit: float
  wants_psnr: bool

  @property
  def passed(self) -> bool:
    """Whether the limit is kept; never with NaN."""
    if self.wants_psnr:
      return self.psnr is not None and self.psnr >= self.limit
    return self.relative <= self.limit


def compare(stage: Stage) -> Row:
  """Measures the differences of a stage; they are infinite if shapes differ."""
  wants_psnr = stage.half and stage.limit.psnr is not None
  if wants_psnr:
    assert stage.limit.psnr is not None
    limit = stage.limit.psnr
  else:
    limit = stage.limit.half if stage.half else stage.limit.single
  if stage.ours.shape != stage.reference.shape:
    psnr = 0.0 if stage.is_image else None
    return Row(stage.name, np.inf, np.inf, np.inf, psnr, limit, wants_psnr)
  reference = np.asarray(stage.reference, np.float64)
  difference = np.abs(np.asarray(stage.ours, np.float64) - reference)
  largest = float(difference.max())
  # A constant has no deviation: then its size counts, or 1 for zero.
  scale = reference.std() or np.abs(reference).max() or 1.0
  psnr = None
  if stage.is_image:
    mean_square = float(np.square(difference).mean())
    with np.errstate(divide='ignore'):
      psnr = float(10 * np.log10(2.0**2 / np.float64(mean_square)))
  return Row(
    name=stage.name,
    largest=largest,
    mean=float(difference.mean()),
    relative=float(largest / scale),
    psnr=psnr,
    limit=limit,
    wants_psnr=wants_psnr,
  )


def print_table(stages: Iterable[Stage]) -> list[Row]:
  """Prints a row per stage as it is computed."""
  print(
    f'{"stage":26} {"largest":>9} {"mean":>9} {"relative":>9} {"limit":>9} {"PSNR":>8}'
  )
  rows = []
  for stage in stages:
    row = compare(stage)
    rows.append(row)
    limit = f'{row.limit:.0f} dB' if row.wants_psnr else f'{row.limit:.0e}'
    psnr = '' if row.psnr is None else f'{row.psnr:.1f} dB'
    verdict = 'pass' if row.passed else 'DEPARTS'
    print(
      f'{row.name:26} {row.largest:9.1e} {row.mean:9.1e} {row.relative:9.1e} '
      f'{limit:>9} {psnr:>8}  {verdict}',
      flush=True,
    )
  return rows


def verdict(rows: list[Row]) -> str:
  """One sentence on all rows."""
  departing = [row.name for row in rows if not row.passed]
  if not departing:
    return f'this program reproduces the run: {len(rows)} of {len(rows)} stages pass'
  return (
    f'this program departs from the run, first at: {departing[0]} '
    f'({len(departing)} of {len(rows)} stages depart)'
  )


def run(args: argparse.Namespace) -> int:
  """Prints the table and the verdict, and returns the exit code."""
  stages = Stages(Dump.read(args.dump), args.model)
  with jax.default_matmul_precision('highest'):
    rows = print_table(stages.run())
  print(verdict(rows))
  return 0 if all(row.passed for row in rows) else 1


def add_parser(commands) -> None:
  parser = commands.add_parser(
    'accept',
    help='compare with a recorded run of the release',
    description='Compares this program with a recorded run of the release, stage by '
    'stage.',
    epilog=EXAMPLE,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    'dump', metavar='DUMP', type=pathlib.Path, help='from tools/dump_reference.py'
  )
  parser.add_argument(
    'model',
    metavar='MODEL',
    type=pathlib.Path,
    help='model folder, converted from the weights of that run',
  )
  parser.set_defaults(run=run)
