"""Runs one part of the device check in this process.

  python -m benchmarks.device_check.run_part NAME --out=DIR

Only the device check itself calls this. A process per part keeps their peaks of memory
apart, frees the device, and survives a crash.
"""

import argparse
from collections.abc import Callable
import pathlib
import time
from typing import Any

from benchmarks.device_check import report
from benchmarks.device_check.failures import Unavailable, describe, missing_package
from benchmarks.device_check.parts import PARTS, Context, Result

Loader = Callable[[], Callable[[Context], Result]]


def load_or_run(
  name: str,
  out: pathlib.Path,
  *,
  reduced: bool,
  force: bool = False,
  load: Loader | None = None,
) -> str:
  """Runs a part unless its result is there.

  Args:
    name: of the part.
    out: the folder of results.
    reduced: at sizes for a CPU.
    force: repeat a part whose result is there.
    load: returns the function to run; default that of the part.

  Returns:
    Its status, which the record has too.
  """
  origin = report.origin(reduced)
  if not force and report.is_done(report.read(out, name), origin):
    print(f'{name}: already there for this code and device; --force repeats it')
    return report.OK

  start = time.perf_counter()

  def write(status: str, **more: Any) -> None:
    seconds = time.perf_counter() - start
    record = {'part': name, 'status': status, 'origin': origin, 'seconds': seconds}
    report.write(out, name, record | more)

  saved: Result = {}

  def save(result: Result) -> None:
    saved.update(result)
    write(report.RUNNING, result=saved)

  write(report.RUNNING)
  status, entry = attempt(load or PARTS[name].load, Context(out, reduced, save))
  if saved:
    entry = {'result': saved} | entry
  write(status, **entry)
  return status


def attempt(load: Loader, context: Context) -> tuple[str, dict[str, Any]]:
  """Imports and runs a part, and catches whatever goes wrong.

  Returns:
    The status, and what the record gets: `result`, or `error` and perhaps `traceback`.
  """
  try:
    return report.OK, {'result': load()(context)}
  except Unavailable as reason:
    return report.UNAVAILABLE, {'error': str(reason)}
  except Exception as error:
    status = report.UNAVAILABLE if missing_package(error) else report.FAILED
    return status, describe(error)


def main() -> None:
  parser = argparse.ArgumentParser(
    prog='python -m benchmarks.device_check.run_part',
    description=__doc__.split('\n')[0],
  )
  parser.add_argument('name', choices=PARTS)
  parser.add_argument(
    '--out', type=pathlib.Path, required=True, help='folder of results'
  )
  parser.add_argument(
    '--reduced', action='store_true', help='use small sizes, for a CPU'
  )
  parser.add_argument(
    '--force', action='store_true', help='repeat a part whose result is there already'
  )
  args = parser.parse_args()
  load_or_run(args.name, args.out, reduced=args.reduced, force=args.force)


if __name__ == '__main__':
  main()
