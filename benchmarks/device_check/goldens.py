"""Part `goldens`: every module against reference outputs, in float32 and bfloat16."""

from collections.abc import Iterable
import pathlib
from typing import Any

import jax
import numpy as np

from benchmarks.device_check import failures, report
from benchmarks.device_check.failures import Unavailable
from benchmarks.device_check.parts import Context, Result
from benchmarks.timing import timed
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
LOWEST_PSNR = 25.0  # dB: rounding to bfloat16 leaves about 50
EQUAL_PSNR = 200.0  # dB, in place of infinity

Entry = dict[str, Any]  # of one golden


def check_goldens(context: Context) -> Result:
  """One entry per golden, saved as soon as it is known."""
  if not FOLDER.is_dir():
    raise Unavailable(
      f'{FOLDER} is missing; run the check in a checkout of the project'
    )
  folders = [FOLDER / name for name in REDUCED] if context.reduced else [FOLDER]
  paths = [path for folder in folders for path in registry.descriptions(folder)]
  paths.sort(key=lambda path: path.stat().st_size)
  entries: dict[str, dict[str, Entry]] = {'float32': {}, 'bfloat16': {}}

  for path in paths:
    entries['float32'][golden_name(path)] = check_golden(path, None)
    context.save(entries)
  for path in paths:
    if registry.recognise(path) in HALF:
      entries['bfloat16'][golden_name(path)] = check_golden(path, 'bfloat16')
      context.save(entries)

  return entries | {'summary': verdict(entries)}


def verdict(entries: dict[str, dict[str, Entry]]) -> str:
  """One line for all goldens.

  Raises:
    ArithmeticError: one exceeds its limit, or ended in a traceback.
    Unavailable: none could be computed.
  """
  # 1. Sort them
  computed: dict[str, Entry] = {}
  skipped: dict[str, Entry] = {}
  for dtype, by_name in entries.items():
    for name, entry in by_name.items():
      # An error without traceback is a missing package or file.
      is_skipped = 'error' in entry and 'traceback' not in entry
      group = skipped if is_skipped else computed
      group[f'{name} ({dtype})'] = entry

  # 2. Refuse what is wrong
  wrong = [name for name, entry in computed.items() if not entry.get('passed')]
  if wrong:
    raise ArithmeticError(f'{len(wrong)} goldens fail: {", ".join(wrong)}')
  if not computed:
    raise Unavailable(next(iter(skipped.values()))['error'])

  # 3. Sum up the rest
  psnrs = [entry['psnr'] for entry in computed.values() if 'psnr' in entry]
  line = f'{len(computed) - len(psnrs)} goldens within their limits in float32'
  if psnrs:
    line += f'; bfloat16: lowest PSNR {min(psnrs):.1f} dB of {len(psnrs)}'
  if skipped:
    line += f'; not computed: {", ".join(skipped)}'
  return line


def golden_name(path: pathlib.Path) -> str:
  """Such as 'vae' or 'fullsize_seeded/rife'."""
  relative = path.relative_to(FOLDER)
  if relative.name == 'config.json':
    return str(relative.parent)
  return str(relative.with_suffix(''))


def check_golden(path: pathlib.Path, dtype: str | None) -> Entry:
  """The entry of one golden: its errors, or why it could not be computed."""

  def check() -> Entry:
    try:
      name, golden = registry.load(path, dtype)
      cases = comparison.run_cases(name, golden)
      return bfloat16_entry(cases) if dtype else float32_entry(name, cases)
    except Exception as error:
      return failures.describe(error)

  # For every thread, unlike the context of the same name. Float32 must not become TF32.
  jax.config.update('jax_default_matmul_precision', None if dtype else 'highest')
  entry, seconds = timed(check)
  return entry | {'seconds': seconds}


def float32_entry(name: str, cases: Iterable[Case]) -> Entry:
  """The case that comes closest to its limit, or exceeds it most."""
  results = [
    comparison.compare(name, case.name, case.actual, expected_of(case), case.limit)
    for case in cases
  ]

  def badness(result: comparison.Result) -> tuple[bool, float]:
    return not result.passed, result.relative / (result.limit or 1)

  worst = max(results, key=badness)
  return {
    'cases': len(results),
    'passed': all(result.passed for result in results),
    'worst_case': worst.case,
    'relative_error': worst.relative,
    'limit': worst.limit,
  }


def bfloat16_entry(cases: Iterable[Case]) -> Entry:
  """The case with the lowest PSNR, of those that need not be exact."""
  psnrs = {
    case.name: psnr(case.actual, expected_of(case)) for case in cases if case.limit
  }

  def goodness(name: str) -> tuple[bool, float]:
    return not np.isnan(psnrs[name]), psnrs[name]  # NaN is the worst

  worst = min(psnrs, key=goodness)
  return {
    'cases': len(psnrs),
    'passed': psnrs[worst] >= LOWEST_PSNR,  # False for NaN
    'worst_case': worst,
    'psnr': psnrs[worst],
  }


def expected_of(case: Case) -> np.ndarray:
  """The reference output, which `comparison.run_cases` always sets."""
  assert case.expected is not None, case.name
  return case.expected


def psnr(actual: np.ndarray, expected: np.ndarray) -> float:
  """In dB; the peak is the range of the reference, or the size of a single number."""
  expected = np.asarray(expected, np.float64)
  difference = np.asarray(actual, np.float64) - expected
  error = np.sqrt(np.mean(np.square(difference)))
  if error == 0:
    return EQUAL_PSNR
  peak = np.ptp(expected) or np.abs(expected).max() or 1.0
  return float(20 * np.log10(peak / error))
