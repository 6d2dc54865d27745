"""One run at a time in a work directory: real processes, kills, and hosts that died."""

import contextlib
import json
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from dicetalk_jax.errors import ConfigError, InputError
from dicetalk_jax.files import atomic_file
from dicetalk_jax.training import lock
from tests.training import toy
from tests.training.test_loop import (
  PATIENCE,
  ROOT,
  TOTAL,
  finish,
  losses,
  start,
  start_two,
  wait_until,
)

REFUSAL = (
  r'is in use by process (\d+) on \S+ since \d{4}-.*; '
  'wait for that run to end, stop it, or choose'
)
HOLD = """
import sys
from etils import epath
from dicetalk_jax.errors import one_sentence
from dicetalk_jax.training import lock
lock.BEAT = .05
with one_sentence(), lock.hold(epath.Path(sys.argv[1])):
  print('held', flush=True)
  sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  """Short times. Those who live have `lock.PATIENCE` to show it on a busy machine."""
  monkeypatch.setattr(lock, 'BEAT', 0.05)
  monkeypatch.setattr(lock, 'SETTLE', 0.15)


@pytest.fixture
def impatient(monkeypatch):
  """For tests in which nobody lives."""
  monkeypatch.setattr(lock, 'PATIENCE', 0.6)


def holder(workdir):
  """A process that only holds the lock, until its input ends."""
  return subprocess.Popen(
    [sys.executable, '-c', HOLD, str(workdir)],
    cwd=ROOT,
    text=True,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )


@contextlib.contextmanager
def held(workdir):
  process = holder(workdir)
  try:
    assert process.stdout.readline() == 'held\n'
    yield process
  finally:
    process.kill()
    process.communicate()


@pytest.fixture
def workdir(tmp_path):
  return lock.epath.Path(tmp_path)


def content(workdir, **changes):
  """Of a lock file as another host writes it."""
  return json.dumps(
    dict(
      host='node7',
      process=1,
      kernel='other',
      since='2026-01-01 10:00:00 +0000',
      token='t',
      beat=1,
    )
    | changes
  )


def take_over(workdir, noticed):
  """As another host, until the holder has noticed; returns the content.

  Once might not do: the holder may be just before its next beat.
  """
  theirs = content(workdir)
  deadline = time.monotonic() + PATIENCE
  while not noticed():
    assert time.monotonic() < deadline
    (workdir / lock.NAME).write_text(theirs)
    time.sleep(lock.BEAT)
  return theirs


def has_ended(process):
  return process.poll() is not None


class Bucket(lock._Remote):
  """A bucket in which, as in all, nobody finds half an object."""

  def write(self, content):
    with atomic_file(self._path) as part:
      part.write_text(content)


class Elsewhere(lock._Local):
  """A disk whose locks, if any, end at the host."""

  locks = None

  def lock(self):
    super().lock()
    return self.locks


def test_a_second_start_is_refused_and_the_first_does_not_notice(tmp_path):
  run, whole = tmp_path / 'run', tmp_path / 'whole'
  first = start(1, 0.1, run)
  wait_until(lambda: first.stdout.readline().startswith('step'), first)
  before = (run / 'config.json').stat()
  first.send_signal(signal.SIGSTOP)  # it must not end before the second begins
  second = start(1, 0, run)
  output, _ = second.communicate(timeout=PATIENCE)
  first.send_signal(signal.SIGCONT)
  assert second.returncode == 2
  (sentence,) = (line for line in output.splitlines() if line.startswith('error: '))
  assert re.search(REFUSAL, sentence)[1] == str(first.pid)
  assert 'step' not in output and (run / 'config.json').stat() == before
  finish(first)
  finish(start(1, 0, whole))
  assert losses(run) == losses(whole) and list(losses(run)) == list(range(1, TOTAL + 1))
  assert (run / lock.NAME).read_text() == ''


def test_two_processes_are_refused_together_and_resume_after_a_kill(tmp_path):
  run = tmp_path / 'run'
  first = start_two(0.1, run)
  wait_until(lambda: first[0].stdout.readline().startswith('step'), first[0])
  for process in first:
    process.send_signal(signal.SIGSTOP)  # it must not end before the second begins
  second = start_two(0, run)
  for process in second:
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2, output[-3000:]
    (sentence,) = (line for line in output.splitlines() if line.startswith('error: '))
    assert re.search(REFUSAL, sentence)[1] == str(first[0].pid)
  for process in first:
    assert process.poll() is None
    process.kill()
    process.communicate()
  for process in start_two(0, run):
    finish(process)
  assert list(losses(run)) == list(range(1, TOTAL + 1))


def test_a_killed_run_leaves_the_directory_free_at_once(workdir):
  for number in (signal.SIGKILL, signal.SIGTERM):
    with held(workdir) as process:
      with pytest.raises(ConfigError, match=REFUSAL) as info:
        lock.Lock(workdir).attempt()
      assert re.search(REFUSAL, str(info.value))[1] == str(process.pid)
      process.send_signal(number)
      process.wait()
    assert (workdir / lock.NAME).read_text()
    mine = lock.Lock(workdir)
    assert mine.attempt()
    mine.release()


def test_of_two_starts_in_the_same_instant_one_wins(workdir):
  processes = [holder(workdir) for _ in range(2)]
  deadline = time.monotonic() + PATIENCE
  while not any(map(has_ended, processes)):
    assert time.monotonic() < deadline
    time.sleep(0.01)
  outputs = [process.communicate() for process in processes]
  assert sorted(process.returncode for process in processes) == [0, 2]
  assert sorted(out for out, _ in outputs) == ['', 'held\n']


def test_an_error_frees_the_directory(workdir):
  with pytest.raises(ZeroDivisionError), lock.hold(workdir):
    assert (workdir / lock.NAME).read_text()
    raise ZeroDivisionError
  assert (workdir / lock.NAME).read_text() == ''


def test_a_host_that_died_is_noticed_by_its_heartbeat(workdir, impatient, capsys):
  (workdir / lock.NAME).write_text(content(workdir))
  began = time.monotonic()
  with lock.hold(workdir):
    assert time.monotonic() - began > lock.PATIENCE
    assert 'node7' not in (workdir / lock.NAME).read_text()
  assert re.fullmatch(
    r'.* is in use by process 1 on node7 since .*; waiting up to 0.6 s to see whether '
    r'that is still alive\n',
    capsys.readouterr().out,
  )


@pytest.mark.parametrize('locks', [None, True, False])
def test_a_host_that_lives_is_noticed_by_its_heartbeat(workdir, monkeypatch, locks):
  """Whatever the disk says about locks."""
  monkeypatch.setattr(Elsewhere, 'locks', locks)
  monkeypatch.setattr(lock, '_Local', Elsewhere)
  with held(workdir) as process:
    monkeypatch.setattr(lock, '_kernel', lambda: 'another')
    with pytest.raises(ConfigError, match=REFUSAL) as info, lock.hold(workdir):
      pass
    assert str(process.pid) in str(info.value)


def test_buckets_have_the_heartbeat_alone(workdir, monkeypatch):
  monkeypatch.setattr(lock, '_Local', Bucket)
  with lock.hold(workdir):
    # Refused because of a beat.
    with pytest.raises(ConfigError, match=REFUSAL), lock.hold(workdir):
      pass
    assert json.loads((workdir / lock.NAME).read_text())['beat'] > 1
  with lock.hold(workdir):
    pass
  assert (workdir / lock.NAME).read_text() == ''


def test_of_two_that_take_over_without_locks_one_wins(workdir, monkeypatch):
  monkeypatch.setattr(lock, '_Local', Elsewhere)
  first, second = lock.Lock(workdir), lock.Lock(workdir)
  with monkeypatch.context() as patch:
    patch.setattr(Elsewhere, 'read', lambda self: '')
    # Both find nobody, and both write.
    assert not first.attempt()
    assert not second.attempt()
  time.sleep(2 * lock.SETTLE)
  with pytest.raises(ConfigError, match=REFUSAL):
    first.attempt()
  assert second.attempt()
  second.release()
  assert (workdir / lock.NAME).read_text() == ''


def test_a_holder_that_was_taken_for_dead_ends(workdir):
  with lock.hold(workdir) as mine:
    mine.check()
    theirs = take_over(workdir, noticed=lambda: mine._lost)
    with pytest.raises(ConfigError, match='another run took over'):
      mine.check()
  assert (workdir / lock.NAME).read_text() == theirs


def test_damaged_locks_are_taken_over_in_the_end(workdir, impatient):
  (workdir / lock.NAME).write_text('{"host": ')
  with lock.hold(workdir):
    assert json.loads((workdir / lock.NAME).read_text())['beat'] == 1


def test_a_directory_that_cannot_be_written_is_refused(workdir):
  (workdir / lock.NAME).mkdir()
  with (
    pytest.raises(InputError, match=r'cannot read or write .* \(Is a directory\); '),
    lock.hold(workdir),
  ):
    pass


class Failing:
  """The path of an object in a bucket whose library raises errors of its own."""

  def __init__(self, fails):
    self.fails = fails

  def exists(self):
    return True

  def read_text(self):
    if self.fails == 'read':
      raise RuntimeError('403: no permission\nrequest 17 of many')
    return ''

  def write_text(self, text):
    raise RuntimeError('403: no permission\nrequest 17 of many')


@pytest.mark.parametrize('fails', ['read', 'write'])
def test_whatever_a_bucket_raises_is_one_sentence(workdir, monkeypatch, fails):
  remote = lock._Remote(Failing(fails))
  monkeypatch.setattr(lock, '_Local', lambda path: remote)
  with pytest.raises(InputError) as info, lock.hold(workdir):
    pass
  assert str(info.value) == (
    f'cannot read or write {workdir / lock.NAME} (403: no permission); make it '
    'writable or choose another --workdir'
  )


def test_two_processes_that_cannot_lock_say_so_together(tmp_path):
  run = tmp_path / 'run'
  (run / lock.NAME).mkdir(parents=True)
  for process in start_two(0, run):
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2, output[-3000:]
    (sentence,) = (line for line in output.splitlines() if line.startswith('error: '))
    assert sentence.startswith('error: cannot read or write ')
    assert '(Is a directory); make it writable or choose another' in sentence


def test_two_processes_that_were_taken_for_dead_end_together(tmp_path):
  run = tmp_path / 'run'
  processes = start_two(0.5, run)  # 12 s for all steps; ten beats in that time
  wait_until(lambda: processes[0].stdout.readline().startswith('step'), processes[0])
  theirs = take_over(run, noticed=lambda: all(map(has_ended, processes)))
  outputs = [process.communicate()[0] for process in processes]
  for process, output in zip(processes, outputs, strict=True):
    assert process.returncode == 2, output[-3000:]
    (sentence,) = (line for line in output.splitlines() if line.startswith('error: '))
    assert sentence.startswith(f'error: another run took over {run}, ')
  assert max(losses(run)) < TOTAL
  assert (run / lock.NAME).read_text() == theirs


def test_a_run_that_is_taken_over_in_its_last_evaluation_exports_nothing(workdir):
  class Suspended(toy.ToyTask):
    def evaluate(self, params):
      beating = next(t for t in threading.enumerate() if t.name == 'lock')
      take_over(self.workdir, noticed=lambda: not beating.is_alive())
      return super().evaluate(params)

  config = toy.get_config(total_steps=2, eval_every=2, checkpoint_every=2)
  with pytest.raises(ConfigError, match='another run took over'):
    toy.train(Suspended, config, workdir)
  assert max(losses(workdir)) == 2
  assert not (workdir / 'model').exists()


def test_nothing_is_touched_before_the_lock_is_held(workdir):
  run = workdir / 'run'
  run.mkdir()
  (run / 'checkpoints' / '8.orbax-checkpoint-tmp').mkdir(parents=True)
  with held(run):
    with pytest.raises(ConfigError, match=REFUSAL):
      toy.train(toy.ToyTask, toy.get_config(), run)
    assert sorted(path.name for path in run.iterdir()) == ['checkpoints', lock.NAME]
    assert (run / 'checkpoints' / '8.orbax-checkpoint-tmp').exists()
