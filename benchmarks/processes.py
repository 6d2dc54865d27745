"""Commands in processes of their own, with their time and peak memory. Linux only."""

import pathlib
import subprocess
import sys
import threading
import time
from typing import NamedTuple


class Peak(NamedTuple):
  """Seconds, and bytes: own memory, and with pages of mapped files, which the system
  may drop.
  """

  seconds: float
  own: int
  with_files: int


def measure(*args) -> Peak:
  """Runs `python -m *args` from the root of the repository; leaves with its exit
  code where it fails.
  """
  start = time.perf_counter()
  process = subprocess.Popen(
    [sys.executable, '-m', *map(str, args)], cwd=pathlib.Path(__file__).parents[1]
  )
  peak: dict[str, int] = {}

  def watch():
    while process.poll() is None:
      try:
        peak.update(
          {
            key: max(value, peak.get(key, 0))
            for key, value in _memory(process.pid).items()
          }
        )
      except OSError:  # it has just ended
        return
      time.sleep(0.05)

  watcher = threading.Thread(target=watch)
  watcher.start()
  process.wait()
  watcher.join()
  if process.returncode:
    sys.exit(process.returncode)
  return Peak(time.perf_counter() - start, peak['RssAnon'], peak['VmHWM'])


def _memory(pid: int) -> dict[str, int]:
  lines = pathlib.Path(f'/proc/{pid}/status').read_text().splitlines()
  return {
    key: int(value.split()[0]) * 1024
    for key, _, value in (line.partition(':') for line in lines)
    if key in ('RssAnon', 'VmHWM')
  }
