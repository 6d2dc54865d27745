"""Shared by the timed parts: compiling, memory, and a check of the numbers."""

from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.timing import timed

GIB = 2**30


class Program(NamedTuple):
  """A compiled function, and the seconds of tracing and of compiling."""

  call: jax.stages.Compiled
  trace_seconds: float
  compile_seconds: float

  def facts(self) -> dict[str, float]:
    """Seconds, and GiB of memory as the compiler counts it, for the record."""
    facts = {
      'trace_seconds': self.trace_seconds,
      'compile_seconds': self.compile_seconds,
    }
    stats = self.call.memory_analysis()
    if stats is not None:
      facts['arguments_gib'] = stats.argument_size_in_bytes / GIB
      facts['temporaries_gib'] = stats.temp_size_in_bytes / GIB
    return facts


def compile_program(jitted: jax.stages.Wrapped, *args: Any) -> Program:
  """Traces and compiles `jitted(*args)`; `args` are arrays or shapes."""
  lowered, trace_seconds = timed(lambda: jitted.lower(*args))
  compiled, compile_seconds = timed(lowered.compile)
  return Program(compiled, trace_seconds, compile_seconds)


def peak_gib() -> dict[str, float]:
  """The most device memory that this process has used; empty if unknown."""
  stats = jax.local_devices()[0].memory_stats() or {}
  peak = stats.get('peak_bytes_in_use')
  return {'peak_gib': peak / GIB} if peak else {}


def check_finite(values: Any, name: str) -> None:
  """Raises FloatingPointError if a tree of arrays has NaN or infinity."""
  for value in jax.tree.leaves(values):
    if not np.isfinite(np.asarray(value, np.float32)).all():
      raise FloatingPointError(f'{name} is not finite')
