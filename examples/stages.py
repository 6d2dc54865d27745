"""Progress of the examples: what is being done, and how long it took."""

from collections.abc import Iterator
import contextlib
import time


@contextlib.contextmanager
def stage(name: str, seconds: dict[str, float] | None = None) -> Iterator[None]:
  """Prints when a stage begins, and how long it took.

  Args:
    name: what is being done.
    seconds: is told the duration too, by name, if the stage ends well.
  """
  print(f'\n== {name}', flush=True)
  started = time.monotonic()
  yield
  duration = time.monotonic() - started
  print(f'== {name}: {duration:.0f} s', flush=True)
  if seconds is not None:
    seconds[name] = round(duration, 1)
