"""Locks of folders: one holder at a time, free again however the holder ends."""

import pathlib
import subprocess
import sys
import threading

from dicetalk_jax import files

ROOT = pathlib.Path(__file__).parents[1]
HOLDER = """
import sys, time
from dicetalk_jax import files
with files.lock_folder(sys.argv[1], 'waiting'):
  print('held', flush=True)
  time.sleep(600)
"""


def test_a_killed_holder_leaves_the_folder_free(tmp_path, monkeypatch):
  process = subprocess.Popen(
    [sys.executable, '-c', HOLDER, tmp_path / 'work'],
    cwd=ROOT,
    text=True,
    stdout=subprocess.PIPE,
  )
  assert process.stdout.readline() == 'held\n'
  said = []

  def note(text, **kwargs):
    said.append(text)
    process.kill()

  monkeypatch.setattr(files, 'print', note, raising=False)
  with files.lock_folder(tmp_path / 'work', 'someone is there') as held:
    assert held
    assert said == ['someone is there']
  process.communicate()


def test_a_folder_that_its_holder_removes_is_made_again(tmp_path, monkeypatch):
  work = tmp_path / 'work'
  waits = threading.Event()
  monkeypatch.setattr(
    files, 'print', lambda *args, **kwargs: waits.set(), raising=False
  )
  held = []

  def second():
    with files.lock_folder(work, 'waiting') as is_held:
      held.append(is_held and work.is_dir())

  thread = threading.Thread(target=second)
  with files.lock_folder(work, ''):
    thread.start()
    assert waits.wait(timeout=100)
    work.rmdir()
  thread.join()
  assert held == [True]


def test_what_a_disk_without_locks_gives(tmp_path, monkeypatch):
  def no_locks(*args):
    raise OSError(95, 'Operation not supported')

  monkeypatch.setattr(files.fcntl, 'flock', no_locks)
  with files.lock_folder(tmp_path, 'waiting') as held:
    assert not held
