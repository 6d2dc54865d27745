"""Writes of Orbax that go on in threads after a failure or an interruption: what they
print, and how they end.

TensorStore cannot be told to stop, and creates missing folders again. So a file takes
the place of the folder that they write to until the process ends, which it then does at
once.
"""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import shutil
import sys
import time

from absl import logging

GRACE = 0.5  # seconds for what is just about to write to fail

_in_the_way: list[pathlib.Path] = []


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Silences the two things that a failed write prints besides being raised, and
  nothing else.

  Each thread of Orbax logs the error with its traceback; each write under way then
  finds the event loop closed, which Python reports as unraisable.
  """
  log, hook = logging.get_absl_logger(), sys.unraisablehook

  def other(record):
    return '_SignalingThread.run() raised' not in record.getMessage()

  log.addFilter(other)
  sys.unraisablehook = lambda what: (
    None if str(what.exc_value) == 'Event loop is closed' else hook(what)
  )
  try:
    yield
  finally:
    sys.unraisablehook = hook
    log.removeFilter(other)


def remove(folder: pathlib.Path) -> None:
  """Removes a folder that threads may still write to, and keeps it away until
  `make_way`.
  """
  for _ in range(100):  # they may be faster
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
      folder.touch(exist_ok=False)
      break
  _in_the_way.append(folder)


def make_way() -> None:
  """Removes what `remove` put in the way: the last thing to do."""
  if _in_the_way:
    time.sleep(GRACE)
  while _in_the_way:
    path = _in_the_way.pop()
    path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)


def leave(code: int) -> None:
  """Ends the process; after a failure at once, together with writes that are still
  going on.
  """
  if code:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
  sys.exit(code)
