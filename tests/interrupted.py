"""Runs commands in processes of their own, and stops each in the middle by a signal.

    python -m tests.interrupted CASES.json

Each case is a fork of this process, so that imports are paid once. It runs until the
function that the case names is called, which says so and waits.
"""

import importlib
import json
import os
import pathlib
import signal
import sys
import time
import types
from typing import Any

import numpy as np

from dicetalk_jax import files

WAITING = b'waiting\n'


def hold(*args: Any, **kwargs: Any) -> None:
  """Stands for work that takes long."""
  os.write(sys.__stdout__.fileno(), WAITING)
  time.sleep(600)


def stuck():
  """Makes a face detector that takes long, for --detector."""
  return hold


class HeldTask:
  """A training task whose preparation takes long."""

  new_modules = ()

  def __init__(self, config, mesh, workdir):
    hold()


class QuickPipeline:
  """Generates grey frames without compiling anything."""

  @classmethod
  def load(cls, *args, **kwargs):
    return cls()

  def run(self, job, progress):
    progress('sampling', 1, 2)  # a bar that stays open
    return np.full((10, 16, 16, 3), 128, np.uint8), 12.5


def _hold_renaming() -> None:
  """Holds atomic files when they are whole and do not have their name yet."""
  files.os = types.SimpleNamespace(**vars(os) | {'replace': hold})


def _hold_attribute(name: str) -> None:
  """Holds a function of a module, `module:name`, or a method, `module:class.name`."""
  module, _, path = name.partition(':')
  *owners, attribute = path.split('.')
  owner: Any = importlib.import_module(module)
  for name in owners:
    owner = getattr(owner, name)
  setattr(owner, attribute, hold)


def _run(module: str, argv: list[str], held: str) -> None:
  if held == 'renaming':
    _hold_renaming()
  elif held == 'renaming of a video':
    importlib.import_module(module).Pipeline = QuickPipeline
    _hold_renaming()
  elif held == 'task':
    main = importlib.import_module('dicetalk_jax.main')
    main.task_class = lambda name: HeldTask
  elif held:
    _hold_attribute(held)
  sys.argv = [module, *argv]
  entry = importlib.import_module(module)
  if module == 'convert.__main__':
    entry.main()
  else:
    entry.run()


def _stopped(case: dict[str, Any], log: pathlib.Path) -> dict[str, Any]:
  """Runs a case in a fork, sends the signal to all its processes as a terminal does."""
  read, write = os.pipe()
  child = os.fork()
  if not child:
    os.setsid()
    os.dup2(write, 1)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    os.close(read)
    os.close(write)
    _run(case['module'], case['argv'], case['held'])
    os._exit(0)
  os.close(write)
  out = b''
  while WAITING not in out:
    part = os.read(read, 1 << 16)
    if not part:
      break
    out += part
  os.killpg(child, case.get('signal', signal.SIGINT))
  code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
  while os.read(read, 1 << 16):  # until its workers have ended, too
    pass
  os.close(read)
  return {'code': code, 'waited': WAITING in out, 'err': log.read_text()}


def main() -> None:
  cases = json.loads(pathlib.Path(sys.argv[1]).read_text())
  for case in cases.values():
    importlib.import_module(case['module'])
  log = pathlib.Path(sys.argv[1]).with_suffix('.log')
  outcomes = {}
  for name, case in cases.items():
    outcomes[name] = _stopped(case, log)
    log.unlink()
  print(json.dumps(outcomes))


if __name__ == '__main__':
  main()
