"""One part in a process of its own: `python -m benchmarks.device_check.run_part NAME`.

A process per part keeps peak memory apart, frees the device, and survives a crash.
"""

import argparse
import pathlib
import time
import traceback
from typing import Any

from benchmarks.device_check import report
from benchmarks.device_check.parts import PARTS, Context, Part, Unavailable
from dicetalk_jax.errors import UserError

TAIL = 12  # lines of a traceback
OWN = ('benchmarks', 'configs', 'convert', 'data_pipelines', 'dicetalk_jax')
PACKAGES = {
  'cv2': 'opencv-python-headless',
  'ml_collections': 'ml-collections',
  'PIL': 'pillow',
  'sklearn': 'scikit-learn',
  'tensorflow_datasets': 'tensorflow-datasets',
}


def run(
  name: str,
  out: pathlib.Path,
  *,
  reduced: bool,
  force: bool = False,
  part: Part | None = None,
) -> str:
  """Runs a part unless its result is there; writes its record, returns its status."""
  origin = report.origin(reduced)
  if not force and report.is_done(report.read(out, name), origin):
    print(f'{name}: already there for this code and device; --force repeats it')
    return report.OK
  start = time.perf_counter()

  def write(status: str, **more: Any) -> None:
    seconds = time.perf_counter() - start
    record = {'part': name, 'status': status, 'origin': origin, 'seconds': seconds}
    report.write(out, name, record | more)

  write(report.RUNNING)
  saved: dict[str, Any] = {}

  def save(result: dict[str, Any]) -> None:
    saved.update(result)
    write(report.RUNNING, result=saved)

  status, more = attempt(part or PARTS[name], Context(out, reduced, save))
  result = more.pop('result', saved)
  write(status, **({'result': result} if result else {}), **more)
  return status


def attempt(part: Part, context: Context) -> tuple[str, dict[str, Any]]:
  """(status, `result` or `error`) of a part; whatever goes wrong."""
  try:
    return report.OK, {'result': part.load()(context)}
  except Unavailable as reason:
    return report.UNAVAILABLE, {'error': str(reason)}
  except ModuleNotFoundError as error:
    missing = missing_package(error)
    status = report.UNAVAILABLE if missing else report.FAILED
    return status, described(error)
  except Exception as error:
    return report.FAILED, described(error)


def missing_package(error: Exception) -> str:
  """The package to install, where that is what is wrong; else empty."""
  module = (getattr(error, 'name', '') or '').partition('.')[0]
  if not isinstance(error, ModuleNotFoundError) or module in OWN:
    return ''
  return PACKAGES.get(module, module)


def described(error: Exception) -> dict[str, Any]:
  """One sentence; with the end of the traceback, where it is not the user's to mend."""
  if missing := missing_package(error):
    return {'error': f'the package {missing} is missing here; pip install {missing}'}
  if isinstance(error, UserError):
    return {'error': str(error)}
  first = str(error).strip().splitlines() or ['']
  lines = ''.join(traceback.format_exception(error)).splitlines()
  return {
    'error': f'{type(error).__name__}: {first[0][:300]}',
    'traceback': [line[:300] for line in lines[-TAIL:]],
  }


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('name', choices=PARTS)
  parser.add_argument('--out', type=pathlib.Path, required=True)
  parser.add_argument('--reduced', action='store_true')
  parser.add_argument('--force', action='store_true')
  args = parser.parse_args()
  run(args.name, args.out, reduced=args.reduced, force=args.force)


if __name__ == '__main__':
  main()
