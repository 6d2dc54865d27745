"""The loop with a small real task: resuming to the bit, devices and processes,
refusals, divergence, signals.
"""

import functools
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time
from unittest import mock

import jax
import numpy as np
from PIL import Image
import pytest

from dicetalk_jax import bundle, parallel
from dicetalk_jax.errors import ConfigError, InputError, MeshError
from dicetalk_jax.training.checkpoint import Checkpoints
from dicetalk_jax.training.loop import train
from dicetalk_jax.training.run_log import DivergedError, read_json_lines
from tests.training import toy

ROOT = pathlib.Path(__file__).parents[2]
TOTAL = 24
PATIENCE = 600  # seconds that a process may take on a busy machine
ONE = parallel.make_mesh(devices=jax.devices()[:1])


def start(devices, delay, *workdirs, **variables):
  env = {
    **os.environ,
    'PYTHONPATH': str(ROOT),
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '',
    'JAX_COMPILATION_CACHE_DIR': jax.config.jax_compilation_cache_dir,
    **variables,
  }
  return subprocess.Popen(
    [
      sys.executable,
      toy.__file__,
      str(devices),
      str(delay),
      str(TOTAL),
      *map(str, workdirs),
    ],
    env=env,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
  )


def start_two(delay, *workdirs):
  """Two processes with four devices each, one mesh."""
  with socket.socket() as s:
    s.bind(('localhost', 0))
    address = f'localhost:{s.getsockname()[1]}'
  return [
    start(4, delay, *workdirs, **dict(zip(parallel.VARIABLES, (address, '2', str(i)))))
    for i in range(2)
  ]


def finish(process):
  output, _ = process.communicate(timeout=PATIENCE)
  assert process.returncode == 0, output[-3000:]
  return output


def wait_until(condition, process):
  deadline = time.monotonic() + PATIENCE
  while not condition():
    assert process.poll() is None, process.communicate()[0][-3000:]
    assert time.monotonic() < deadline
    time.sleep(0.01)


def losses(workdir, prefix='train/'):
  """{step: everything logged except the speed}."""
  rows = read_json_lines(workdir / 'metrics.jsonl')
  return {
    row['step']: {
      k: v for k, v in row.items() if k.startswith(prefix) and 'per_second' not in k
    }
    for row in rows
    if any(k.startswith(prefix) for k in row)
  }


def interrupt(devices, workdir):
  """Ends a run twice at random moments: by SIGKILL, and by SIGTERM where there are
  several devices.
  """
  moments = random.Random(devices)
  for _ in range(2 if devices == 1 else 1):
    process = start(devices, 0.1, workdir)
    wait_until(lambda: process.stdout.readline().startswith('step'), process)  # noqa: B023, used at once
    moment = moments.uniform(0, 0.4)
    print(f'killed {moment:.3f} s after the first steps')
    time.sleep(moment)
    process.kill()
    process.communicate()
    assert max(losses(workdir)) < TOTAL
  if devices > 1:
    stop([start(devices, 0.1, workdir)], moments.uniform(0, 0.2), workdir)


def stop(processes, moment, workdir):
  """SIGTERM to the last of the processes: all end with exit code 0 and a checkpoint
  of the last step.
  """
  wait_until(lambda: processes[0].stdout.readline().startswith('step'), processes[0])
  time.sleep(moment)
  processes[-1].send_signal(signal.SIGTERM)
  outputs = [finish(process) for process in processes]
  assert 'run the same command again' in outputs[0]
  stopped = max(losses(workdir))
  with Checkpoints(workdir / 'checkpoints') as checkpoints:
    assert checkpoints.latest == stopped < TOTAL


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """runs(devices) -> workdirs of a run that was interrupted and resumed, and of an
  uninterrupted one.
  """

  @functools.cache
  def make(devices):
    root = tmp_path_factory.mktemp(f'devices{devices}')
    interrupt(devices, root / 'resumed')
    finish(start(devices, 0, root / 'resumed', root / 'whole'))
    return root / 'resumed', root / 'whole'

  return make


@pytest.mark.parametrize('devices', [1, 8])
def test_resumed_run_equals_an_uninterrupted_one_to_the_bit(runs, devices):
  resumed, whole = runs(devices)
  assert losses(resumed) == losses(whole)
  assert list(losses(whole)) == list(range(1, TOTAL + 1))
  assert losses(resumed, 'eval/') == losses(whole, 'eval/')
  assert list(losses(whole, 'eval/')) == [8, 16, 24]
  exported = [np.load(run / 'model' / f'{run.name}.npz') for run in (resumed, whole)]
  assert set(exported[0]) == {
    'net.hidden.kernel',
    'net.hidden.bias',
    'net.out.kernel',
    'net.out.bias',
    'scale',
  }
  for name in exported[0]:
    np.testing.assert_array_equal(exported[0][name], exported[1][name])


def test_eight_devices_train_as_one(runs):
  one, eight = (losses(runs(devices)[1]) for devices in (1, 8))
  for step, values in one.items():
    np.testing.assert_allclose(
      list(eight[step].values()),
      list(values.values()),
      rtol=1e-5,
      err_msg=f'step {step}',
    )
  assert one[TOTAL]['train/loss'] < 0.2 * one[1]['train/loss']


def test_two_processes_train_as_one_and_continue_each_other(runs, tmp_path):
  """Begun by two processes, carried on by one, finished by two: as one process of
  eight devices, but for rounding.
  """
  run, moments = tmp_path / 'run', random.Random(2)
  stop(start_two(0.1, run), moments.uniform(0, 0.3), run)
  stop([start(8, 0.1, run)], moments.uniform(0, 0.3), run)
  assert max(losses(run)) < TOTAL - 2
  for process in start_two(0, run):
    finish(process)
  one, two = losses(runs(8)[1]), losses(run)
  assert list(two) == list(one)
  for step, values in one.items():
    np.testing.assert_allclose(
      list(two[step].values()), list(values.values()), rtol=1e-5, err_msg=f'step {step}'
    )
  _, saved = bundle.load_component(run / 'model', 'run')
  np.testing.assert_array_equal(saved.pop('own'), np.arange(3))
  jax.tree.map(
    np.testing.assert_array_equal, saved, dict(np.load(run / 'model' / 'run.npz'))
  )


def test_a_run_moves_from_eight_devices_to_two_to_one(tmp_path):
  config = dict(log_every=1, eval_every=9, checkpoint_every=2, accum=1)
  for name, parts in (('moved', {2: 8, 4: 2, 6: 1}), ('stayed', {6: 1})):
    for total, devices in parts.items():
      changed = toy.get_config(**config, total_steps=total)
      changed.optim.schedule = 'constant'
      train(
        toy.ToyTask,
        changed,
        tmp_path / name,
        mesh=parallel.make_mesh(devices=jax.devices()[:devices]),
      )
  moved, stayed = losses(tmp_path / 'moved'), losses(tmp_path / 'stayed')
  assert list(moved) == list(stayed) == [1, 2, 3, 4, 5, 6]
  for step, values in stayed.items():
    np.testing.assert_allclose(
      list(moved[step].values()),
      list(values.values()),
      rtol=1e-5,
      err_msg=f'step {step}',
    )


def test_what_a_run_leaves_behind(runs):
  _, whole = runs(1)
  assert json.loads((whole / 'config.json').read_text())['task'] == 'toy'
  assert sorted(path.name for path in (whole / 'pictures').iterdir()) == [
    'error_0000008.png',
    'error_0000016.png',
    'error_0000024.png',
  ]
  assert Image.open(whole / 'pictures' / 'error_0000008.png').size == (8, 8)
  assert Image.open(whole / 'curves.png').size[0] > 100
  with Checkpoints(whole / 'checkpoints') as checkpoints:
    assert checkpoints.steps == [20, 24]


def test_ctrl_c_saves_the_state_and_interrupts(tmp_path):
  config = toy.get_config(accum=1, total_steps=6)

  def interrupt(step, scalars):
    if step == 2:
      signal.raise_signal(signal.SIGINT)

  writer = mock.Mock(**{'write_scalars.side_effect': interrupt})
  with pytest.raises(KeyboardInterrupt):
    train(toy.ToyTask, config, tmp_path, mesh=ONE, make_writer=lambda _: writer)
  with Checkpoints(tmp_path / 'checkpoints') as checkpoints:
    assert checkpoints.latest == 3
  assert not (tmp_path / 'model').exists()
  train(toy.ToyTask, config, tmp_path, mesh=ONE)
  assert list(losses(tmp_path)) == [1, 2, 3, 4, 5, 6]


def test_divergence_stops_and_keeps_the_last_good_checkpoint(tmp_path):
  """The log keeps the steps that were good."""
  writers = []

  def make_writer(folder):
    return writers.append(mock.Mock()) or writers[-1]

  for name, log_every in (('run', 100), ('each', 1)):
    with pytest.raises(DivergedError, match='at step 7 .*lower optim.lr'):
      train(
        toy.ToyTask,
        toy.get_config(bad_step=6, accum=1, log_every=log_every),
        tmp_path / name,
        mesh=ONE,
        make_writer=make_writer,
      )
    with Checkpoints(tmp_path / name / 'checkpoints') as checkpoints:
      assert checkpoints.steps == [4]
    assert (tmp_path / name / 'curves.png').exists() and writers[-1].flush.called
    assert not (tmp_path / name / 'model').exists()
  logged, each = losses(tmp_path / 'run'), losses(tmp_path / 'each')
  assert list(logged) == [4, 6] and list(each) == [1, 2, 3, 4, 5, 6]
  assert logged[6]['train/loss'] == pytest.approx(
    (each[5]['train/loss'] + each[6]['train/loss']) / 2
  )
  assert logged[6]['train/lr'] == each[6]['train/lr']


class FailingTask(toy.ToyTask):
  def evaluate(self, params):
    raise RuntimeError('no picture')


def test_a_failing_evaluation_loses_no_steps(tmp_path):
  config = toy.get_config(total_steps=9, accum=1)
  for saved in ([4, 8], [8, 9]):
    with pytest.raises(RuntimeError, match='no picture'):
      train(FailingTask, config, tmp_path / 'run', mesh=ONE)
    with Checkpoints(tmp_path / 'run' / 'checkpoints') as checkpoints:
      assert checkpoints.steps == saved
  train(FailingTask, config, tmp_path / 'run', mesh=ONE)
  assert (tmp_path / 'run' / 'model' / 'run.npz').exists()


def test_refusals_and_free_changes(tmp_path):
  run = tmp_path / 'run'
  config = dict(total_steps=2, checkpoint_every=2, log_every=2, accum=1, remat='none')
  train(toy.ToyTask, toy.get_config(**config), run)
  before = (run / 'config.json').read_text()

  with pytest.raises(
    ConfigError, match="belongs to task 'toy'; choose another --workdir"
  ):
    train(toy.ToyTask, toy.get_config(task='other'), run)
  for key, value in (('accum', 2), ('data', dict(dir='', workers=1))):
    with pytest.raises(ConfigError, match=f'holds a run with other values of {key}'):
      train(toy.ToyTask, toy.get_config(**config | {key: value}), run)
  changed = toy.get_config(**config, batch_size=32)
  changed.optim.lr = 0.5
  with pytest.raises(
    ConfigError, match=r'batch_size \(was 16, now 32\), optim.lr \(was 0.01, now 0.5\)'
  ):
    train(toy.ToyTask, changed, run)
  assert (run / 'config.json').read_text() == before

  longer = toy.get_config(
    total_steps=3,
    checkpoint_every=1,
    log_every=1,
    keep=3,
    accum=1,
    remat='block',
    mesh=dict(data=2, fsdp=-1),
  )
  assert int(train(toy.ToyTask, longer, run).step) == 3
  assert list(losses(run)) == [2, 3]


def test_finished_run_only_exports_again(tmp_path, capsys):
  config = toy.get_config(total_steps=1, accum=1)
  first = train(toy.ToyTask, config, tmp_path / 'run', mesh=ONE)
  rows = (tmp_path / 'run' / 'metrics.jsonl').read_text()
  (tmp_path / 'run' / 'model' / 'run.npz').unlink()
  again = train(toy.ToyTask, config, tmp_path / 'run', mesh=ONE)
  jax.tree.map(np.testing.assert_array_equal, first, again)
  assert (tmp_path / 'run' / 'metrics.jsonl').read_text() == rows
  assert (tmp_path / 'run' / 'model' / 'run.npz').exists()
  assert 'from step 1 to 1' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('changes', 'error', 'sentence'),
  [
    (dict(batch_size=12), MeshError, 'batch_size=12'),
    (dict(mesh=dict(data=3, fsdp=-1)), MeshError, 'data=3'),
    (dict(total_steps=0), ConfigError, 'total_steps=0'),
    (
      dict(lora=dict(rank=-1)),
      ConfigError,
      'config.lora.rank=-1 must be at least 1, or 0',
    ),
    (
      dict(optim=dict(betas=(0.9,))),
      ConfigError,
      r'optim.betas=\(0.9,\) must be two numbers',
    ),
    (dict(trainable=('nett',)), ConfigError, "'nett' matches no parameter"),
  ],
)
def test_impossible_configurations(tmp_path, changes, error, sentence):
  with pytest.raises(error, match=sentence):
    train(toy.ToyTask, toy.get_config(**changes), tmp_path / 'run')
  assert not (
    tmp_path / 'run' / 'checkpoints'
  ).exists()  # nor its tidying in the background, which an exit cuts off


def test_a_file_is_no_workdir(tmp_path):
  (tmp_path / 'run').touch()
  with pytest.raises(InputError, match='choose another --workdir'):
    train(toy.ToyTask, toy.get_config(), tmp_path / 'run')
