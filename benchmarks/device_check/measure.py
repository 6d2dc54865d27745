"""Shared by the timed parts: compiling, memory, and a check of the numbers."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.timing import seconds

GIB = 2**30


class Compiled(NamedTuple):
  """A compiled function, and the seconds of tracing and of compiling."""

  call: Callable[..., Any]
  trace_seconds: float
  compile_seconds: float

  def facts(self) -> dict[str, float]:
    """Seconds, and GiB of memory as the compiler counts it, for the record."""
    stats = self.call.memory_analysis()
    facts = {
      'trace_seconds': self.trace_seconds,
      'compile_seconds': self.compile_seconds,
    }
    if stats is None:
      return facts
    return facts | {
      'arguments_gib': stats.argument_size_in_bytes / GIB,
      'temporaries_gib': stats.temp_size_in_bytes / GIB,
    }


def compiled(jitted: Any, *args: Any) -> Compiled:
  """Traces and compiles; `args` are arrays or shapes."""
  results = []
  tracing = seconds(lambda: results.append(jitted.lower(*args)))
  compiling = seconds(lambda: results.append(results[0].compile()))
  return Compiled(results[1], tracing, compiling)


def peak_gib() -> dict[str, float]:
  """The most memory of the device that this process has used; empty where unknown."""
  stats = jax.local_devices()[0].memory_stats() or {}
  peak = stats.get('peak_bytes_in_use')
  return {'peak_gib': peak / GIB} if peak else {}


def check_finite(values: Any, name: str) -> None:
  """Raises FloatingPointError where a result has NaN or infinity."""
  for value in jax.tree.leaves(values):
    if not np.isfinite(np.asarray(value, np.float32)).all():
      raise FloatingPointError(f'{name} is not finite')
