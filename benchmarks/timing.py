"""Clocks for benchmarks: ratios in one run, alternating, medians; compile time apart."""

from collections.abc import Callable
import statistics
import time


def seconds(call: Callable[[], object]) -> float:
  """Wall time of one call, which must not return before its work is done."""
  start = time.perf_counter()
  call()
  return time.perf_counter() - start


def alternate(first: Callable[[], object], second: Callable[[], object], repeats: int) -> tuple[float, float]:
  """Median seconds of both, measured in turn so that a busy machine slows both alike. Warm them up before."""
  pairs = [(seconds(first), seconds(second)) for _ in range(repeats)]
  return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)
