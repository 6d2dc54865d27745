"""Part `goldens`: every module against reference outputs, in float32 and bfloat16."""

from collections.abc import Iterable
import pathlib
import time
from typing import Any

import jax
import numpy as np

from benchmarks.device_check import report, run_part
from benchmarks.device_check.parts import Context, Unavailable
from convert.verify import comparison, registry
from convert.verify.golden import Case

FOLDER = report.ROOT / 'tests' / 'goldens'
REDUCED = (
  'audio_proj',
  'clip_vision',
  'emotion_model',
  'mask_downsample',
  'pose_guider',
  'scheduler',
  'fullsize_seeded/pose_guider',
  'whisper/encoder',
)
LOWEST = 25.0  # dB: rounding to bfloat16 leaves about 50
# Networks that compute in bfloat16 in generation or training.
HALF = (
  'audio_proj',
  'clip_vision',
  'emotion_model',
  'end_to_end',
  'pipeline',
  'pose_guider',
  'unet',
  'vae',
  'full_audio_linear',
  'full_clip_vision',
  'full_emo_model',
  'full_pose_guider',
  'full_vae',
)


def run(context: Context) -> dict[str, Any]:
  """One entry per golden, saved as soon as it is known."""
  if not FOLDER.is_dir():
    raise Unavailable(
      f'{FOLDER} is missing; run the check in a checkout of the project'
    )
  places = [FOLDER / name for name in REDUCED] if context.reduced else [FOLDER]
  paths = [path for place in places for path in registry.descriptions(place)]
  paths.sort(key=lambda path: path.stat().st_size)
  entries: dict[str, dict[str, Any]] = {'float32': {}, 'bfloat16': {}}

  for path in paths:
    entries['float32'][name_of(path)] = attempt(path, None)
    context.save(entries)
  for path in paths:
    if registry.recognise(path) in HALF:
      entries['bfloat16'][name_of(path)] = attempt(path, 'bfloat16')
      context.save(entries)

  return entries | {'summary': verdict(entries)}


def verdict(entries: dict[str, dict[str, dict[str, Any]]]) -> str:
  """One line for all goldens.

  Raises:
    ArithmeticError: one exceeds its limit, or ended in a traceback.
    Unavailable: none could be computed.
  """
  every = {
    f'{name} ({dtype})': entry
    for dtype, group in entries.items()
    for name, entry in group.items()
  }
  computed = {k: x for k, x in every.items() if 'error' not in x or 'traceback' in x}
  lacking = [k for k in every if k not in computed]
  wrong = [name for name, entry in computed.items() if not entry.get('passed')]
  if wrong:
    raise ArithmeticError(f'{len(wrong)} goldens fail: {", ".join(wrong)}')
  if not computed:
    raise Unavailable(next(iter(every.values()))['error'])
  ratios = [entry['psnr'] for entry in computed.values() if 'psnr' in entry]
  said = f'{len(computed) - len(ratios)} goldens within their limits in float32'
  if ratios:
    said += f'; bfloat16: lowest PSNR {min(ratios):.1f} dB of {len(ratios)}'
  if lacking:
    said += f'; not computed: {", ".join(lacking)}'
  return said


def name_of(path: pathlib.Path) -> str:
  """Such as 'vae' or 'fullsize_seeded/rife'."""
  named = path.relative_to(FOLDER)
  return str(named.parent if named.name == 'config.json' else named.with_suffix(''))


def attempt(path: pathlib.Path, dtype: str | None) -> dict[str, Any]:
  """The entry of one golden: its errors, or why it could not be computed."""
  start = time.perf_counter()
  # For every thread, unlike the context of the same name. Float32 must not become TF32.
  jax.config.update('jax_default_matmul_precision', None if dtype else 'highest')
  try:
    name, golden = registry.load(path, dtype)
    cases = comparison.run_cases(name, golden)
    entry = signal(cases) if dtype else errors(name, cases)
  except Exception as error:
    entry = run_part.described(error)
  return entry | {'seconds': time.perf_counter() - start}


def errors(name: str, cases: Iterable[Case]) -> dict[str, Any]:
  """The case that comes closest to its limit, or exceeds it most."""
  results = [
    comparison.compare(name, c.name, c.actual, c.expected, c.limit) for c in cases
  ]
  worst = max(results, key=lambda r: (not r.passed, r.relative / (r.limit or 1)))
  return {
    'cases': len(results),
    'passed': all(result.passed for result in results),
    'worst_case': worst.case,
    'relative_error': worst.relative,
    'limit': worst.limit,
  }


def signal(cases: Iterable[Case]) -> dict[str, Any]:
  """The case with the lowest PSNR, of those that need not be exact."""
  ratios = {case.name: psnr(case.actual, case.expected) for case in cases if case.limit}
  worst = min(ratios, key=lambda name: (ratios[name] == ratios[name], ratios[name]))
  return {
    'cases': len(ratios),
    'passed': ratios[worst] >= LOWEST,  # False for NaN
    'worst_case': worst,
    'psnr': ratios[worst],
  }


def psnr(actual: np.ndarray, expected: np.ndarray) -> float:
  """In dB; the peak is the range of the reference, or the size of a single number."""
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
  error = np.sqrt(np.mean(np.square(actual - expected)))
  peak = np.ptp(expected) or np.abs(expected).max() or 1.0
  return float(20 * np.log10(peak / error)) if error else 200.0
