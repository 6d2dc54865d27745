"""Reading compiled programs: kernels, their kinds, bytes and arithmetic."""

import json
import pathlib
import subprocess
import sys

import pytest

from benchmarks.compiled import devices, hlo, kernels, report
from benchmarks.compiled.kernels import Kernel

FOLDER = pathlib.Path(__file__).parent / 'hlo'
GPU = (FOLDER / 'gpu.txt').read_text()
TPU = (FOLDER / 'tpu.txt').read_text()


@pytest.fixture(scope='module')
def gpu():
  return {kernel.name: kernel for kernel in kernels.kernels(hlo.parse(GPU))}


@pytest.mark.parametrize(
  ('name', 'kind', 'nbytes', 'flop'),
  [
    ('wrapped', 'layout', 2 * 2 * 2 * 4, 0),
    ('in_place', 'layout', 4 * 4 + 4 + 4 * 4, 0),
    ('means', 'reduction', 2 * 8 * 4 + 4 * 8, 0),
    ('conv', 'convolution', 2 * (216 + 135 + 360), 2 * 360 * 27),
    # Keys and values are the same array here.
    ('attention', 'attention', 2 * (640 + 384 + 640), 2 * 2 * 640 * 6),
    ('cublas-lt-matmul.1', 'product', 2 * (32 + 64 + 128), 2 * 128 * 4),
    ('gemm_fusion_dot', 'product', 2 * (32 + 64 + 128), 2 * 128 * 4),
    ('all-reduce.1', 'collective', 2 * 4 * 8, 0),
  ],
)
def test_kernels_of_a_gpu_are_counted(gpu, name, kind, nbytes, flop):
  kernel = gpu[name]
  assert (kernel.kind, kernel.flop) == (kind, flop)
  assert kernel.nbytes == nbytes
  assert kernel.count == 1


def test_kernels_in_a_loop_count_as_often_as_it_runs(gpu):
  assert gpu['loop_add_fusion'].count == 25


def test_parameters_and_tuples_are_no_kernels(gpu):
  assert len(gpu) == 9


def test_library_calls_are_known(gpu):
  custom = {name for name, kernel in gpu.items() if kernel.is_custom}
  assert custom == {'conv', 'attention', 'cublas-lt-matmul.1'}


def test_collectives_are_added_up():
  assert kernels.collective_bytes(hlo.parse(GPU)) == {'all-reduce': (1, 64)}


def test_cycles_and_products_of_a_tpu_are_read():
  copy, products = kernels.kernels(hlo.parse(TPU))
  assert (copy.kind, copy.cycles) == ('layout', 1000)
  assert products.cycles == 732978
  # 150 products of 512 x 64 with 64 x 1024, written as one convolution.
  assert products.flop == 2 * 150 * 512 * 64 * 1024


def test_text_that_is_no_program_is_refused():
  with pytest.raises(ValueError, match='no ENTRY'):
    hlo.parse('nothing')


def kernel(**changes):
  values = {
    'name': 'k',
    'kind': 'elementwise',
    'count': 2,
    'nbytes': 0,
    'flop': 0,
    'cycles': None,
    'is_custom': False,
    'source': '',
  }
  return Kernel(**(values | changes))


H200 = devices.known()['h200']


def test_a_kernel_takes_as_long_as_the_slower_of_arithmetic_and_memory():
  busy = report.cost(kernel(flop=790e9, nbytes=43e6), H200)
  assert busy.ideal == pytest.approx(2 * 1.0)
  moving = report.cost(kernel(flop=79e9, nbytes=4.3e9), H200)
  assert moving.ideal == pytest.approx(2 * 1.0)


def test_library_calls_are_derated_and_no_kernel_is_instant():
  call = kernel(kind='attention', is_custom=True, flop=790e9)
  assert report.cost(call, H200).derated == pytest.approx(2 / 0.55)
  assert report.cost(kernel(), H200).derated == pytest.approx(2 * report.LAUNCH)


def test_cycles_become_time_by_the_clock():
  estimated = report.cost(kernel(cycles=1_500_000), devices.known()['v5e'])
  assert estimated.ideal == pytest.approx(2 * 1.0)


def test_a_record_adds_up_and_compares(gpu):
  record = report.summary(gpu.values(), H200, tflop=0.001)
  kinds = record['kinds'].values()
  assert record['kernels'] == sum(row['kernels'] for row in kinds) == 8 + 25
  assert record['predicted_ms'] == pytest.approx(sum(row['ms'] for row in kinds), 1e-3)
  faster = record | {'predicted_ms': 0.0, 'kernels': 1}
  assert 'kernels: 33 before, 1 after' in report.comparison(record, faster)


@pytest.mark.parametrize('name', [d.name for d in devices.known().values() if d.file])
def test_descriptions_of_gpus_are_there(name):
  text = (devices.FOLDER / devices.known()[name].file).read_text()
  assert 'gpu_device_info' in text


def test_a_missing_compiler_is_named():
  run = subprocess.run(
    [sys.executable, '-m', 'benchmarks.compiled', '--target=h200', '--part=denoise'],
    capture_output=True,
    text=True,
  )
  assert run.returncode == 2
  assert run.stderr.count('\n') == 1 and 'make compiler-gpu' in run.stderr


def test_committed_records_say_that_they_are_predicted():
  folder = pathlib.Path(report.__file__).parents[1] / 'results' / 'compiled'
  records = [json.loads(path.read_text()) for path in folder.glob('*.json')]
  assert records
  for record in records:
    assert record['predicted_ms'] > record['floor_ms']
