"""Clocks for benchmarks: single calls, medians, and two calls in turn."""

from collections.abc import Callable
import statistics
import time
from typing import NamedTuple, TypeVar

Result = TypeVar('Result')


def timed(call: Callable[[], Result]) -> tuple[Result, float]:
  """Result and wall time of one call, which must not return before its work is done.

  Returns:
    The result, and seconds.
  """
  start = time.perf_counter()
  result = call()
  return result, time.perf_counter() - start


def seconds(call: Callable[[], object]) -> float:
  """Wall time of one call, which must not return before its work is done."""
  _, duration = timed(call)
  return duration


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
  """Median seconds of two calls, made in turn: a busy machine slows both alike.

  Warm both up before.
  """
  pairs = [(seconds(first), seconds(second)) for _ in range(repeats)]
  first_times, second_times = zip(*pairs)
  return statistics.median(first_times), statistics.median(second_times)
