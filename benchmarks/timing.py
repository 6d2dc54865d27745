"""Clocks for benchmarks: medians, alternating runs; compile time apart."""

from collections.abc import Callable
import statistics
import time
from typing import NamedTuple


def seconds(call: Callable[[], object]) -> float:
  """Wall time of one call, which must not return before its work is done."""
  start = time.perf_counter()
  call()
  return time.perf_counter() - start


class Laps(NamedTuple):
  """Seconds of the same call, made several times."""

  median: float
  fastest: float
  slowest: float


def laps(call: Callable[[], object], repeats: int) -> Laps:
  """Times a call that has been warmed up, and that must not return early."""
  times = [seconds(call) for _ in range(repeats)]
  return Laps(statistics.median(times), min(times), max(times))


def alternate(
  first: Callable[[], object],
  second: Callable[[], object],
  repeats: int,
) -> tuple[float, float]:
  """Median seconds of both, in turn, so that a busy machine slows both alike.

  Warm them up before.
  """
  pairs = [(seconds(first), seconds(second)) for _ in range(repeats)]
  ours, theirs = zip(*pairs)
  return statistics.median(ours), statistics.median(theirs)
