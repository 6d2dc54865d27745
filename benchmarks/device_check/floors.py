"""The shortest times that arithmetic allows, on stated and on measured devices."""

import pathlib
from typing import Any, NamedTuple

from benchmarks.device_check import report
from benchmarks.timing import Laps


class Rates(NamedTuple):
  """Products in 1e12 operations, and copies in 1e9 bytes, per second."""

  tflops: float
  gbytes: float


H200 = Rates(790.0, 4300.0)  # measured, bfloat16


def measured_rates(out: pathlib.Path) -> Rates | None:
  """The rates that part `device` measured on this device; None if it has not run."""
  record = report.read(out, 'device')
  reduced = record.get('origin', {}).get('reduced')
  if reduced is None or not report.is_done(record, report.origin(reduced)):
    return None
  result = record['result']
  return Rates(result['product_tflops'], result['copy_gbytes'])


def floor_ms(tflop: float, rates: Rates) -> float:
  """Milliseconds of so much arithmetic and nothing else."""
  return 1e3 * tflop / rates.tflops


def compare_with_floors(
  tflop: float, laps: Laps, measured: Rates | None
) -> dict[str, Any]:
  """Times of a call, what it achieved, and the share of the floors in its median.

  Args:
    tflop: its arithmetic, in 1e12 operations.
    laps: its times in seconds.
    measured: the rates of this device, if they are known.
  """
  median = 1e3 * laps.median
  values = {
    'median_ms': median,
    'fastest_ms': 1e3 * laps.fastest,
    'slowest_ms': 1e3 * laps.slowest,
    'tflop': tflop,
    'achieved_tflops': tflop / laps.median,
    'floor_ms_h200': floor_ms(tflop, H200),
    'share_of_h200': floor_ms(tflop, H200) / median,
  }
  if measured:
    floor = floor_ms(tflop, measured)
    values['floor_ms_here'] = floor
    values['share_of_here'] = floor / median
  return values


def summary(values: dict[str, Any]) -> str:
  """One line of what `compare_with_floors` returned."""
  line = f'{values["median_ms"]:.1f} ms, {values["achieved_tflops"]:.3g} TFLOP/s'
  if 'share_of_here' in values:
    line += f', {values["share_of_here"]:.0%} of what this device can do'
  return line
