"""The check of new devices: its parts and records; two parts really run."""

from collections.abc import Callable
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from benchmarks import denoising_step
from benchmarks.denoising_step import STEP_TFLOP
from benchmarks.device_check import __main__ as command
from benchmarks.device_check import failures, floors, goldens, networks, report
from benchmarks.device_check.failures import Unavailable
from benchmarks.device_check.parts import PARTS, Context, Result, choose
from benchmarks.device_check.run_part import load_or_run
from benchmarks.device_check.torch_twin import Twin
from benchmarks.timing import Laps
from convert.verify.golden import Case
from dicetalk_jax.errors import ConfigError, DataError
from dicetalk_jax.models import parameters


class FakePart:
  """The function of a part; counts how often it is called."""

  def __init__(self, function: Callable[[Context], Result]):
    self.function = function
    self.calls = 0

  def load(self) -> 'FakePart':
    return self

  def __call__(self, context: Context) -> Result:
    self.calls += 1
    return self.function(context)


def working_part() -> FakePart:
  return FakePart(lambda context: {'summary': 'fine'})


def failing_part(error: Exception) -> FakePart:
  """A part that saves something, then raises."""

  def save_and_raise(context):
    context.save({'until': 'here'})
    raise error

  return FakePart(save_and_raise)


def run_as_device(part: FakePart, out: pathlib.Path, force: bool = False) -> str:
  """Runs a fake in place of the part `device`; its status."""
  return load_or_run('device', out, reduced=True, force=force, load=part.load)


# Parts and records


def test_every_part_can_be_imported_and_says_how_long_it_may_take():
  for part in PARTS.values():
    assert callable(part.load())
    assert 0 < part.minutes <= 4
    assert part.description


def test_parts_are_chosen_by_name_and_run_in_their_own_order():
  assert choose('tiny, device') == ['device', 'tiny']
  assert choose(','.join(PARTS)) == list(PARTS)
  with pytest.raises(ConfigError, match="'denoising' is unknown; choose from device,"):
    choose('device,denoising')
  with pytest.raises(ConfigError, match='--parts is empty'):
    choose(',')


def test_a_result_of_the_same_code_and_device_is_not_computed_again(
  tmp_path, monkeypatch
):
  part = working_part()
  assert run_as_device(part, tmp_path) == 'ok'
  assert run_as_device(part, tmp_path) == 'ok'
  assert part.calls == 1
  assert run_as_device(part, tmp_path, force=True) == 'ok'
  assert part.calls == 2

  origin = report.origin(True)
  for key in ('sources', 'revision', 'device', 'jax', 'reduced'):
    other = origin | {key: 'other'}
    monkeypatch.setattr(report, 'origin', lambda reduced, other=other: other)
    calls = part.calls
    run_as_device(part, tmp_path)
    run_as_device(part, tmp_path)
    assert part.calls == calls + 1, key


def test_failed_and_unfinished_parts_are_repeated(tmp_path):
  assert run_as_device(failing_part(ValueError('once')), tmp_path) == 'failed'
  part = working_part()
  assert run_as_device(part, tmp_path) == 'ok'
  assert part.calls == 1

  unfinished = report.read(tmp_path, 'device') | {'status': 'running'}
  report.write(tmp_path, 'device', unfinished)
  assert run_as_device(part, tmp_path) == 'ok'
  assert part.calls == 2

  report.record_path(tmp_path, 'device').write_text('{"status": "o')
  assert run_as_device(part, tmp_path) == 'ok'
  assert part.calls == 3


def test_a_failure_keeps_what_was_saved_and_the_end_of_its_traceback(tmp_path):
  part = failing_part(ValueError('first line\nsecond'))
  assert run_as_device(part, tmp_path) == 'failed'
  record = json.loads((tmp_path / 'device.json').read_text())
  assert record['error'] == 'ValueError: first line'
  assert 'raise error' in ' '.join(record['traceback'])
  assert len(record['traceback']) <= failures.TRACEBACK_LINES
  assert record['result'] == {'until': 'here'}
  assert 'failed' in report.table(tmp_path, ['device'])


@pytest.mark.parametrize(
  'error, status, sentence',
  [
    (
      ModuleNotFoundError('x', name='cv2'),
      'not run',
      'the package opencv-python-headless is missing here; pip install '
      'opencv-python-headless',
    ),
    (
      ModuleNotFoundError('x', name='diffusers.models'),
      'not run',
      'the package diffusers is missing here; pip install diffusers',
    ),
    (
      Unavailable('PyTorch finds no CUDA device here'),
      'not run',
      'PyTorch finds no CUDA device here',
    ),
    (
      DataError('a clip is too short; record more'),
      'failed',
      'a clip is too short; record more',
    ),
  ],
)
def test_errors_that_a_user_can_mend_are_one_sentence_without_traceback(
  tmp_path, error, status, sentence
):
  assert run_as_device(failing_part(error), tmp_path) == status
  record = report.read(tmp_path, 'device')
  assert record['error'] == sentence
  assert 'traceback' not in record


def test_a_missing_module_of_our_own_is_a_failure(tmp_path):
  missing = ModuleNotFoundError('gone', name='dicetalk_jax.gone')
  assert run_as_device(failing_part(missing), tmp_path) == 'failed'
  assert 'traceback' in report.read(tmp_path, 'device')


def test_records_are_json_whatever_the_numbers(tmp_path):
  values = {
    'a': float('nan'),
    'b': np.float32(1 / 3),
    'c': [jnp.inf],
    'd': None,
    'e': True,
  }
  report.write(tmp_path, 'x', values)
  assert report.read(tmp_path, 'x') == {
    'a': 'nan',
    'b': 0.333333,
    'c': ['inf'],
    'd': None,
    'e': True,
  }


# Processes


def test_a_part_that_takes_too_long_is_stopped_and_the_next_one_runs(tmp_path, capfd):
  flags = [f'--out={tmp_path}', '--reduced', '--parts=device,denoise', '--limit=0.05']
  assert command.main(flags) == 1
  for name in ('device', 'denoise'):
    record = report.read(tmp_path, name)
    assert record['status'] == 'failed'
    assert record['error'] == 'it was stopped after 0.05 s'
  assert '[2/2] denoise' in capfd.readouterr().out


def test_a_process_that_crashes_has_failed(tmp_path, monkeypatch):
  monkeypatch.setattr(command.sys, 'executable', '/bin/false')
  report.write(tmp_path, 'device', {'status': 'running', 'result': {'until': 'here'}})
  assert command.main([f'--out={tmp_path}', '--parts=device']) == 1
  record = report.read(tmp_path, 'device')
  assert record['error'] == 'its process ended with code 1'
  assert record['result'] == {'until': 'here'}


def test_device_part_really_runs_in_its_own_process_and_is_there_the_next_time(
  tmp_path, capfd
):
  flags = [f'--out={tmp_path}', '--reduced', '--parts=device']
  assert command.main(flags) == 0
  record = report.read(tmp_path, 'device')
  assert record['status'] == 'ok'
  # Unlike this process, the part has not simulated more devices.
  assert record['origin'] == {**report.origin(True), 'devices': 1}
  result = record['result']
  assert result['packages']['jax'] == jax.__version__
  assert result['product_tflops'] > 0
  assert result['copy_gbytes'] > 0
  assert result['summary'] in capfd.readouterr().out
  assert command.main(flags) == 0
  assert 'already there' in capfd.readouterr().out


# Floors


def test_floors_follow_from_the_stated_and_the_measured_device():
  assert floors.floor_ms(STEP_TFLOP, floors.H200) == pytest.approx(121.1, abs=0.1)
  laps = Laps(median=0.2, fastest=0.1, slowest=0.3)
  values = floors.compare_with_floors(79.0, laps, floors.Rates(395.0, 1.0))
  assert values['floor_ms_h200'] == pytest.approx(100)
  assert values['floor_ms_here'] == 200
  assert values['share_of_h200'] == pytest.approx(0.5)
  assert values['share_of_here'] == pytest.approx(1)
  assert values['achieved_tflops'] == pytest.approx(395)
  assert 'floor_ms_here' not in floors.compare_with_floors(79.0, laps, None)


def test_measured_rates_are_those_of_this_device_only(tmp_path):
  assert floors.measured_rates(tmp_path) is None
  result = {'product_tflops': 7.0, 'copy_gbytes': 8.0}
  origin = report.origin(True)
  record = {'status': 'ok', 'origin': origin, 'result': result}
  report.write(tmp_path, 'device', record)
  assert floors.measured_rates(tmp_path) == (7.0, 8.0)
  report.write(tmp_path, 'device', {**record, 'origin': origin | {'device': 'x'}})
  assert floors.measured_rates(tmp_path) is None


# Goldens


@pytest.fixture
def golden_path(goldens):
  yield goldens / 'audio_proj' / 'config.json'
  jax.config.update('jax_default_matmul_precision', None)


def test_goldens_have_their_errors_in_float32_and_their_psnr_in_bfloat16(golden_path):
  exact = goldens.check_golden(golden_path, None)
  assert exact['passed']
  assert exact['cases'] == 3
  assert 0 < exact['relative_error'] <= exact['limit']

  half = goldens.check_golden(golden_path, 'bfloat16')
  assert half['passed']
  assert half['cases'] == 3
  assert 30 < half['psnr'] < 80

  assert goldens.golden_name(golden_path) == 'audio_proj'


def test_a_golden_that_cannot_be_computed_says_why(tmp_path):
  path = tmp_path / 'config.json'
  path.write_text('{}')
  entry = goldens.check_golden(path, None)
  assert 'is of unknown kind' in entry['error']


def test_goldens_fail_by_number_and_not_for_a_package_that_is_missing():
  exact: dict[str, Any] = {'passed': True}
  half = {'passed': True, 'psnr': 55.0}
  lacking = {'error': 'drawn with diffusers, which is missing'}
  both = {'float32': {'vae': exact, 'unet': lacking}, 'bfloat16': {'vae': half}}
  assert goldens.verdict(both) == (
    '1 goldens within their limits in float32; bfloat16: lowest PSNR 55.0 dB of 1; '
    'not computed: unet (float32)'
  )

  inexact = {'passed': False, 'relative_error': 1.0}
  crashed = {'error': 'ValueError: x', 'traceback': ['x']}
  for wrong in (inexact, crashed):
    with pytest.raises(ArithmeticError, match=r'1 goldens fail: rife \(float32\)'):
      goldens.verdict({'float32': {'vae': exact, 'rife': wrong}, 'bfloat16': {}})

  with pytest.raises(Unavailable, match='which is missing'):
    goldens.verdict({'float32': {'unet': lacking}, 'bfloat16': {}})


@pytest.mark.parametrize('actual', [np.full(100, np.nan), np.zeros(100)])
def test_lost_signals_do_not_pass_in_bfloat16(actual):
  fine = Case('fine', np.ones(3), 1.0, np.ones(3))
  lost = Case('lost', actual, 1.0, np.linspace(-1, 1, 100))
  entry = goldens.bfloat16_entry([fine, lost])
  assert not entry['passed']
  assert entry['worst_case'] == 'lost'


def test_psnr_is_that_of_a_known_error():
  expected = np.linspace(0, 2, 100)
  assert goldens.psnr(expected + 0.02, expected) == pytest.approx(40)
  assert goldens.psnr(expected, expected) == 200


# PyTorch


def test_pytorch_twin_computes_our_step_with_adapters_masks_and_guide():
  sizes = networks.REDUCED._replace(frames=3, side=8)
  step = denoising_step.make_step(sizes, parameters.numpy_params)
  keys = jax.random.split(jax.random.key(7), len(step.inputs.masks))
  masks = tuple(
    jax.random.uniform(key, x.shape) for key, x in zip(keys, step.inputs.masks)
  )
  step = step._replace(inputs=step.inputs._replace(masks=masks))
  ours = np.asarray(step.call(step.params, *step.inputs))

  twin = Twin(sizes.config, step, 'cpu', torch.float32)
  # Transposed weights would make it several times slower, and the ratio meaningless.
  assert all(weight.is_contiguous() for weight in twin.unet.parameters())
  theirs = twin.prediction()
  assert np.abs(theirs - ours).max() < 1e-4 * ours.std()

  no_masks = step.inputs._replace(masks=tuple(0 * x for x in masks))
  without = step._replace(inputs=no_masks)
  other = Twin(sizes.config, without, 'cpu', torch.float32).prediction()
  assert np.abs(other - ours).max() > 0.01 * ours.std()
