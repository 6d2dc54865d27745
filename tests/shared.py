"""Makes what takes long and is only read once, for all tests and workers."""

from collections.abc import Callable
import os
import pathlib
import shutil

import filelock
import pytest


def made_once(
  tmp_path_factory: pytest.TempPathFactory,
  name: str,
  make: Callable[[pathlib.Path], None],
) -> pathlib.Path:
  """A folder that `make` fills for whoever asks first; the others wait for it."""
  root = tmp_path_factory.getbasetemp()
  if 'PYTEST_XDIST_WORKER' in os.environ:
    root = root.parent  # of all workers
  folder = root / name
  done = root / f'{name}.done'
  with filelock.FileLock(root / f'{name}.lock'):
    if not done.exists():
      shutil.rmtree(folder, ignore_errors=True)  # of an attempt that failed
      folder.mkdir()
      make(folder)
      done.touch()
  return folder
