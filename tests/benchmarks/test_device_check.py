"""The check for new devices: its parts, records, floors, and two parts really run."""

import functools
import json
from unittest import mock

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from benchmarks import arithmetic, denoising_step
from benchmarks.denoising_step import FULL, PUBLISHED_TFLOP, STEP_TFLOP, make_inputs
from benchmarks.device_check import __main__ as command
from benchmarks.device_check import floors, goldens, networks, report, run_part
from benchmarks.device_check.parts import PARTS, Unavailable, chosen
from benchmarks.device_check.torch_twin import Twin
from benchmarks.timing import Laps
from convert.verify.golden import Case
from dicetalk_jax.errors import ConfigError, DataError
from dicetalk_jax.models import parameters
from dicetalk_jax.models.unet import UNet


class Fake:
  """A part that calls `function` and counts how often."""

  def __init__(self, function=lambda context: {'summary': 'fine'}):
    self.function, self.calls = function, 0

  def load(self):
    return self

  def __call__(self, context):
    self.calls += 1
    return self.function(context)


def run(part, out, **options):
  return run_part.run('device', out, reduced=True, part=part, **options)


def raising(error):
  def function(context):
    context.save({'until': 'here'})
    raise error

  return Fake(function)


def test_every_part_can_be_imported_and_says_how_long_it_may_take():
  for part in PARTS.values():
    assert callable(part.load())
    assert 0 < part.minutes <= 4 and part.says


def test_parts_are_chosen_by_name_and_run_in_their_own_order():
  assert chosen('tiny, device') == ['device', 'tiny']
  assert chosen(','.join(PARTS)) == list(PARTS)
  with pytest.raises(ConfigError, match="'denoising' is unknown; choose from device,"):
    chosen('device,denoising')
  with pytest.raises(ConfigError, match='--parts is empty'):
    chosen(',')


def test_a_result_of_the_same_code_and_device_is_not_computed_again(
  tmp_path, monkeypatch
):
  part = Fake()
  assert [run(part, tmp_path) for _ in range(2)] == ['ok', 'ok'] and part.calls == 1
  assert run(part, tmp_path, force=True) == 'ok' and part.calls == 2
  origin = report.origin(True)
  for key in ('sources', 'revision', 'device', 'jax', 'reduced'):
    monkeypatch.setattr(
      report, 'origin', lambda reduced, key=key: origin | {key: 'other'}
    )
    before = part.calls
    run(part, tmp_path)
    run(part, tmp_path)
    assert part.calls == before + 1, key


def test_failed_and_unfinished_parts_are_repeated(tmp_path):
  assert run(raising(ValueError('once')), tmp_path) == 'failed'
  assert run(part := Fake(), tmp_path) == 'ok' and part.calls == 1
  report.write(
    tmp_path, 'device', report.read(tmp_path, 'device') | {'status': 'running'}
  )
  assert run(part, tmp_path) == 'ok' and part.calls == 2
  report.path(tmp_path, 'device').write_text('{"status": "o')
  assert run(part, tmp_path) == 'ok' and part.calls == 3


def test_a_failure_keeps_what_was_saved_and_the_end_of_its_traceback(tmp_path):
  assert run(raising(ValueError('first line\nsecond')), tmp_path) == 'failed'
  record = json.loads((tmp_path / 'device.json').read_text())
  assert record['error'] == 'ValueError: first line'
  assert 'raise error' in ' '.join(record['traceback'])
  assert len(record['traceback']) <= run_part.TAIL
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
def test_what_a_person_can_mend_is_one_sentence_without_traceback(
  tmp_path, error, status, sentence
):
  assert run(raising(error), tmp_path) == status
  record = report.read(tmp_path, 'device')
  assert record['error'] == sentence and 'traceback' not in record


def test_a_missing_module_of_our_own_is_a_failure(tmp_path):
  missing = ModuleNotFoundError('gone', name='dicetalk_jax.gone')
  assert run(raising(missing), tmp_path) == 'failed'
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


def test_a_part_that_takes_too_long_is_stopped_and_the_next_one_runs(tmp_path, capfd):
  flags = [f'--out={tmp_path}', '--reduced', '--parts=device,denoise', '--limit=0.05']
  assert command.main(flags) == 1
  for name in ('device', 'denoise'):
    record = report.read(tmp_path, name)
    assert (
      record['status'] == 'failed' and record['error'] == 'it was stopped after 0.05 s'
    )
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
  assert record['status'] == 'ok' and record['origin'] == report.origin(True) | {
    'devices': 1
  }
  result = record['result']
  assert result['packages']['jax'] == jax.__version__
  assert result['product_tflops'] > 0 and result['copy_gbytes'] > 0
  assert result['summary'] in capfd.readouterr().out
  assert command.main(flags) == 0
  assert 'already there' in capfd.readouterr().out


# Floors


def test_floors_follow_from_the_stated_and_the_measured_device():
  assert floors.floor_ms(STEP_TFLOP, floors.H200) == pytest.approx(121.1, abs=0.1)
  laps = Laps(median=0.2, fastest=0.1, slowest=0.3)
  values = floors.against(79.0, laps, floors.Rates(395.0, 1.0))
  assert (
    values['floor_ms_h200'] == pytest.approx(100) and values['floor_ms_here'] == 200
  )
  assert values['share_of_h200'] == pytest.approx(0.5)
  assert values['share_of_here'] == pytest.approx(1)
  assert values['achieved_tflops'] == pytest.approx(395)
  assert 'floor_ms_here' not in floors.against(79.0, laps, None)


def test_measured_rates_are_those_of_this_device_only(tmp_path):
  assert floors.here(tmp_path) is None
  result = {'product_tflops': 7.0, 'copy_gbytes': 8.0}
  record = {'status': 'ok', 'origin': report.origin(True), 'result': result}
  report.write(tmp_path, 'device', record)
  assert floors.here(tmp_path) == (7.0, 8.0)
  report.write(
    tmp_path, 'device', record | {'origin': record['origin'] | {'device': 'x'}}
  )
  assert floors.here(tmp_path) is None


# Arithmetic


def count(function, *shapes, dtype=jnp.float32):
  return 1e12 * arithmetic.tflop(
    function, *(jax.ShapeDtypeStruct(s, dtype) for s in shapes)
  )


def test_products_count_two_operations_for_each_multiply_add():
  assert count(jnp.matmul, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
  assert count(jax.jit(lambda a, b: (a @ b) + 1), (3, 5), (5, 7)) == 210
  assert (
    count(lambda a, b: jnp.einsum('bij,bjk->bik', a, b), (4, 3, 5), (4, 5, 7)) == 840
  )


def test_convolutions_count_their_kernels():
  def convolve(x, kernel, groups=1):
    return lax.conv_general_dilated(
      x,
      kernel,
      (1, 1),
      'SAME',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      feature_group_count=groups,
    )

  assert count(convolve, (2, 4, 4, 6), (3, 3, 6, 8)) == 2 * (2 * 4 * 4 * 8) * 9 * 6
  grouped = functools.partial(convolve, groups=2)
  assert count(grouped, (2, 4, 4, 6), (3, 3, 3, 8)) == 2 * (2 * 4 * 4 * 8) * 9 * 3


def test_loops_branches_and_recomputation_count():
  def square(x):
    return x @ x

  one = 2 * 4**3
  assert count(lambda x: lax.fori_loop(0, 5, lambda i, y: y @ y, x), (4, 4)) == 5 * one
  assert count(lambda x: lax.cond(x[0, 0] > 0, square, lambda x: x, x), (4, 4)) == one

  def loss(x):
    return jnp.sum(jnp.sin(jnp.sin(x @ x) @ x))

  plain, again = (count(jax.grad(f), (4, 4)) for f in (loss, jax.checkpoint(loss)))
  assert plain == 6 * one and again == 8 * one
  with pytest.raises(ValueError, match='unknown length'):
    count(lambda x: lax.while_loop(lambda y: y[0, 0] < 1, square, x), (4, 4))


def test_fused_attention_of_a_gpu_counts_as_the_plain_one():
  from jax._src.cudnn import fused_attention_stablehlo as fused

  shapes = [(2, 32, 4, 8), (2, 16, 4, 8), (2, 16, 4, 8)]

  def attention(implementation):
    call = functools.partial(
      jax.nn.dot_product_attention, implementation=implementation
    )
    return call, jax.grad(lambda *qkv: call(*qkv).sum(), argnums=(0, 1, 2))

  with mock.patch.object(fused, 'check_cudnn_version', lambda: 91000):
    forward, both = (count(f, *shapes, dtype=jnp.bfloat16) for f in attention('cudnn'))
  product = 2 * (2 * 4 * 32 * 16 * 8)
  plain, plain_both = (count(f, *shapes, dtype=jnp.bfloat16) for f in attention('xla'))
  assert forward == plain == 2 * product
  assert plain_both == 6 * product  # keeps the probabilities
  assert both == 7 * product  # computes them again


def test_full_size_step_is_the_stated_arithmetic():
  build = functools.partial(UNet, FULL.config, dtype=FULL.dtype)
  graphdef, params = parameters.abstract(build)
  inputs, _ = jax.eval_shape(lambda p: make_inputs(graphdef, p, FULL), params)

  def step(params, *inputs):
    return parameters.merge(graphdef, params)(*inputs)[0]

  counted = arithmetic.tflop(step, params, *inputs)
  assert counted == pytest.approx(STEP_TFLOP, rel=0.005)
  assert counted < PUBLISHED_TFLOP


# Parts


def test_goldens_have_their_errors_in_float32_and_their_psnr_in_bfloat16(goldens_path):
  exact, half = (goldens.attempt(goldens_path, dtype) for dtype in (None, 'bfloat16'))
  assert exact['passed'] and exact['cases'] == 3
  assert 0 < exact['relative_error'] <= exact['limit']
  assert half['passed'] and half['cases'] == 3 and 30 < half['psnr'] < 80
  assert goldens.name_of(goldens_path) == 'audio_proj'


@pytest.fixture
def goldens_path(goldens):
  yield goldens / 'audio_proj' / 'config.json'
  jax.config.update('jax_default_matmul_precision', None)


def test_a_golden_that_cannot_be_computed_says_why(tmp_path):
  path = tmp_path / 'config.json'
  path.write_text('{}')
  assert 'describes no known component' in goldens.attempt(path, None)['error']


def test_goldens_fail_by_number_and_not_for_a_package_that_is_missing():
  good, half = {'passed': True}, {'passed': True, 'psnr': 55.0}
  lacking = {'error': 'drawn with diffusers, which is missing'}
  both = {'float32': {'vae': good, 'unet': lacking}, 'bfloat16': {'vae': half}}
  assert goldens.verdict(both) == (
    '1 goldens within their limits in float32; bfloat16: lowest PSNR 55.0 dB of 1; '
    'not computed: unet (float32)'
  )
  broken = {'error': 'ValueError: x', 'traceback': ['x']}
  for wrong in ({'passed': False, 'relative_error': 1.0}, broken):
    with pytest.raises(ArithmeticError, match=r'1 goldens fail: rife \(float32\)'):
      goldens.verdict({'float32': {'vae': good, 'rife': wrong}, 'bfloat16': {}})
  with pytest.raises(Unavailable, match='which is missing'):
    goldens.verdict({'float32': {'unet': lacking}, 'bfloat16': {}})


@pytest.mark.parametrize('actual', [np.full(100, np.nan), np.zeros(100)])
def test_lost_signals_do_not_pass_in_bfloat16(actual):
  fine = Case('fine', np.ones(3), 1.0, np.ones(3))
  lost = Case('lost', actual, 1.0, np.linspace(-1, 1, 100))
  entry = goldens.signal([fine, lost])
  assert not entry['passed'] and entry['worst_case'] == 'lost'


def test_psnr_is_that_of_a_known_error():
  expected = np.linspace(0, 2, 100)
  assert goldens.psnr(expected + 0.02, expected) == pytest.approx(40)
  assert goldens.psnr(expected, expected) == 200


def test_pytorch_twin_computes_our_step_with_adapters_masks_and_guide():
  sizes = networks.REDUCED._replace(frames=3, side=8)
  step = denoising_step.make_step(sizes, parameters.numpy_params)
  sample, timestep, kv, ids, spatial, masks = step.inputs
  keys = jax.random.split(jax.random.key(7), len(masks))
  masks = tuple(jax.random.uniform(k, x.shape) for k, x in zip(keys, masks))
  step = step._replace(inputs=(sample, timestep, kv, ids, spatial, masks))
  ours = np.asarray(step.call(step.params, *step.inputs))
  twin = Twin(sizes.config, step, 'cpu', torch.float32)
  # Transposed weights would make it several times slower, and the ratio meaningless.
  assert all(weight.is_contiguous() for weight in twin.unet.parameters())
  theirs = twin.prediction()
  assert np.abs(theirs - ours).max() < 1e-4 * ours.std()
  without = step._replace(
    inputs=(sample, timestep, kv, ids, spatial, [0 * x for x in masks])
  )
  other = Twin(sizes.config, without, 'cpu', torch.float32).prediction()
  assert np.abs(other - ours).max() > 0.01 * ours.std()
