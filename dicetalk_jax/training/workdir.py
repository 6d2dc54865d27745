"""A work directory belongs to one run: its task and its configuration are recorded
in `config.json`.
"""

import json
import os
from typing import Any
import zlib

from etils import epath
import jax
from jax.experimental import multihost_utils
import ml_collections
import numpy as np

from dicetalk_jax.errors import ConfigError, InputError

# How long, how often, where, and how much is kept in memory: keys that may change
# between the parts of one run. Not `accum`, since each micro-batch draws its own noise,
# nor `data.workers`, which is part of the position in the data.
FREE = (
  'total_steps',
  'log_every',
  'eval_every',
  'checkpoint_every',
  'keep',
  'model',
  'data.dir',
  'multihost',
  'mesh.data',
  'mesh.fsdp',
  'mesh.sequence',
  'remat',
)

# Sections of older versions: the data set itself says how it was made.
GONE = ('data.synthetic.',)


def open_workdir(path: os.PathLike | str) -> epath.Path:
  """Creates the directory where it is missing.

  Raises InputError where that is impossible.
  """
  workdir = epath.Path(path).expanduser().resolve()  # Orbax wants it absolute
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise InputError(
      f'cannot use {workdir} as work directory ({error.strerror}); choose another '
      '--workdir'
    ) from error
  return workdir


def claim(
  workdir: epath.Path, config: ml_collections.ConfigDict, *, resuming: bool
) -> None:
  """Records task and configuration, or checks them against the record.

  Args:
    workdir: an existing directory.
    config: the resolved configuration.
    resuming: there is a checkpoint to go on from. Without one, any configuration of the
      same task may begin.

  Raises:
    ConfigError: the directory belongs to another task, a value differs that would make
      another run of this one, or processes disagree.
  """
  record = workdir / 'config.json'
  mine = json.loads(json.dumps(config.to_dict()))  # tuples become lists, as in the file
  if jax.process_count() > 1:
    digest = zlib.crc32(json.dumps([mine, resuming], sort_keys=True).encode())
    if len(np.unique(multihost_utils.process_allgather(np.uint32(digest)))) > 1:
      raise ConfigError(
        f'the {jax.process_count()} processes have different configurations, or '
        f'{workdir} is not the same directory for all; give all the same flags and a '
        'work directory that they share'
      )
  if record.exists():
    theirs = json.loads(record.read_text())
    if theirs['task'] != mine['task']:
      raise ConfigError(
        f"{workdir} belongs to task '{theirs['task']}'; choose another --workdir "
        f"for task '{mine['task']}'"
      )
    changes = _changes(theirs, mine)
    if resuming and changes:
      raise ConfigError(
        f'{workdir} holds a run with other values of {", ".join(changes)}; '
        'give the old values or choose another --workdir'
      )
  if jax.process_index() == 0:
    aside = workdir / 'config.json.tmp'
    aside.write_text(json.dumps(mine, indent=2) + '\n')
    aside.replace(record)


def _flat(tree: dict[str, Any], prefix: str = '') -> dict[str, Any]:
  out = {}
  for key, value in tree.items():
    out |= (
      _flat(value, f'{prefix}{key}.')
      if isinstance(value, dict)
      else {prefix + key: value}
    )
  return out


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
  old, new = _flat(old), _flat(new)
  return [
    f'{key} (was {old.get(key, "absent")}, now {new.get(key, "absent")})'
    for key in sorted(old.keys() | new.keys())
    if key not in FREE
    and not key.startswith(GONE)
    and old.get(key, 'absent') != new.get(key, 'absent')
  ]
