"""Results of the device check: one JSON file per part, and a table of them."""

from collections.abc import Iterable
import functools
import hashlib
import json
import math
import pathlib
import subprocess
from typing import Any

import jax

ROOT = pathlib.Path(__file__).parents[2]
SOURCES = ('benchmarks', 'configs', 'convert', 'data_pipelines', 'dicetalk_jax')

# Values of `status`
RUNNING = 'running'
OK = 'ok'
FAILED = 'failed'
UNAVAILABLE = 'not run'

Record = dict[str, Any]


def record_path(out: pathlib.Path, part: str) -> pathlib.Path:
  """The file of a part in the folder of results."""
  return out / f'{part}.json'


def read(out: pathlib.Path, part: str) -> Record:
  """The record of a part; empty if it is missing or damaged."""
  try:
    return json.loads(record_path(out, part).read_text())
  except (OSError, ValueError):
    return {}


def write(out: pathlib.Path, part: str, record: Record) -> None:
  """Writes or replaces the record of a part, atomically."""
  out.mkdir(parents=True, exist_ok=True)
  target = record_path(out, part)
  temporary = target.with_suffix('.tmp')
  temporary.write_text(json.dumps(_plain(record), indent=2, allow_nan=False) + '\n')
  temporary.replace(target)


def _plain(value: Any) -> Any:
  """JSON without NaN and infinity, and with six digits."""
  if isinstance(value, dict):
    return {str(key): _plain(x) for key, x in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(x) for x in value]
  if value is None or isinstance(value, (bool, int, str)):
    return value
  number = float(value)
  if not math.isfinite(number):
    return str(number)
  return float(f'{number:.6g}')


@functools.cache
def code_version() -> dict[str, str]:
  """The git revision if it is known, and a digest of the sources as they are."""
  command = ['git', '-C', str(ROOT), 'rev-parse', '--short', 'HEAD']
  try:
    git = subprocess.run(command, capture_output=True, text=True, check=False)
    revision = git.stdout.strip()
  except OSError:
    revision = ''
  digest = hashlib.sha256()
  for folder in SOURCES:
    for file in sorted((ROOT / folder).rglob('*.py')):
      digest.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
  return {'revision': revision or 'unknown', 'sources': digest.hexdigest()[:12]}


def origin(reduced: bool) -> dict[str, Any]:
  """Everything that a result depends on: code, device, version of JAX, sizes."""
  device = jax.devices()[0]
  return code_version() | {
    'device': device.device_kind,
    'devices': jax.device_count(),
    'jax': jax.__version__,
    'reduced': reduced,
  }


def is_done(record: Record, wanted: dict[str, Any]) -> bool:
  """Whether a record is a result of that origin."""
  return record.get('status') == OK and record.get('origin') == wanted


def table(out: pathlib.Path, parts: Iterable[str]) -> str:
  """A line per part, for the terminal."""
  lines = [f'{"part":8} {"status":8} {"seconds":>8}  result']
  for part in parts:
    record = read(out, part)
    status = record.get('status', 'absent')
    seconds = record.get('seconds', 0)
    summary = record.get('result', {}).get('summary', '')
    text = record.get('error') or summary
    lines.append(f'{part:8} {status:8} {seconds:8.1f}  {text}')
  return '\n'.join(lines)
