"""Runs modules in processes of their own and measures them. Linux only."""

import pathlib
import subprocess
import sys
import threading
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
INTERVAL = 0.05  # seconds between two looks at the memory

# Fields of /proc/PID/status: memory of its own, and the highest total.
OWN = 'RssAnon'
TOTAL = 'VmHWM'


class Usage(NamedTuple):
  """Time and peak memory of a process.

  Attributes:
    seconds: wall time.
    own: bytes of its own memory.
    with_files: bytes including pages of mapped files, which the system may drop.
  """

  seconds: float
  own: int
  with_files: int


def run_module(name: str, *args: object) -> Usage:
  """Runs `python -m name *args` from the root of the repository.

  If it fails, this process exits with the same code.
  """
  command = [sys.executable, '-m', name, *map(str, args)]
  start = time.perf_counter()
  process = subprocess.Popen(command, cwd=ROOT)
  peaks = {OWN: 0, TOTAL: 0}
  watcher = threading.Thread(target=_watch, args=(process, peaks))
  watcher.start()
  process.wait()
  watcher.join()
  if process.returncode:
    sys.exit(process.returncode)
  return Usage(time.perf_counter() - start, peaks[OWN], peaks[TOTAL])


def _watch(process: subprocess.Popen[bytes], peaks: dict[str, int]) -> None:
  """Raises `peaks` to what the process uses, until it ends."""
  while process.poll() is None:
    try:
      memory = _memory(process.pid)
    except OSError:  # it has just ended
      return
    for field, value in memory.items():
      peaks[field] = max(peaks[field], value)
    time.sleep(INTERVAL)


def _memory(pid: int) -> dict[str, int]:
  """The bytes in `OWN` and `TOTAL`; an ending process lacks them."""
  memory = {}
  for line in pathlib.Path(f'/proc/{pid}/status').read_text().splitlines():
    field, _, value = line.partition(':')
    if field in (OWN, TOTAL):
      memory[field] = 1024 * int(value.split()[0])  # given in kB
  return memory
