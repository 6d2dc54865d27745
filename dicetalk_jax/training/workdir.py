"""A work directory belongs to one run: `config.json` records its task and its
configuration.
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
from dicetalk_jax.training import init_from

# How long, how often, where, and how much is kept in memory: keys that may change when
# a run resumes. Not `accum`, since each micro-batch draws its own noise, nor
# `data.workers`, which is part of the position in the data.
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
  'fused_kernels',
)

# Sections of older versions. The data set itself records how it was made.
GONE = ('data.synthetic.',)

# Values that older versions recorded for what has another name, or had no name, now.
RENAMED = {
  ('init_from', ''): init_from.RANDOM,
  ('data.corpora', 'absent'): [],
}


def open_workdir(path: os.PathLike | str) -> epath.Path:
  """Creates the directory if it does not exist.

  Raises:
    InputError: it cannot be created.
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
    resuming: there is a checkpoint to resume from. Without one, any configuration of
      the same task may begin.

  Raises:
    ConfigError: the directory belongs to another task, a value differs that would
      change the run, or processes disagree.
  """
  record = workdir / 'config.json'
  mine = json.loads(json.dumps(config.to_dict()))  # tuples become lists, as in the file
  _check_agreement(workdir, mine, resuming)
  if record.exists():
    recorded = json.loads(record.read_text())
    if recorded['task'] != mine['task']:
      raise ConfigError(
        f"{workdir} belongs to task '{recorded['task']}'; choose another --workdir "
        f"for task '{mine['task']}'"
      )
    changes = _changes(recorded, mine)
    if resuming and changes:
      raise ConfigError(
        f'{workdir} holds a run with other values of {", ".join(changes)}; '
        'give the old values or choose another --workdir'
      )
  if jax.process_index() == 0:
    temporary = workdir / 'config.json.tmp'
    temporary.write_text(json.dumps(mine, indent=2) + '\n')
    temporary.replace(record)


def _check_agreement(workdir: epath.Path, mine: dict[str, Any], resuming: bool) -> None:
  """Raises ConfigError unless all processes have the same configuration and see the
  same checkpoints.
  """
  if jax.process_count() == 1:
    return
  digest = zlib.crc32(json.dumps([mine, resuming], sort_keys=True).encode())
  digests = multihost_utils.process_allgather(np.uint32(digest))
  if len(np.unique(digests)) > 1:
    raise ConfigError(
      f'the {jax.process_count()} processes have different configurations, or '
      f'{workdir} is not the same directory for all; give all the same flags and a '
      'work directory that they share'
    )


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
  """Describes the values that differ and may not."""
  old = _flat(old)
  new = _flat(new)
  changes = []
  for key in sorted(old.keys() | new.keys()):
    if key in FREE or key.startswith(GONE):
      continue
    was = _current_name(key, old.get(key, 'absent'))
    now = _current_name(key, new.get(key, 'absent'))
    if was != now:
      changes.append(f'{key} (was {was}, now {now})')
  return changes


def _current_name(key: str, value: Any) -> Any:
  """A value as this version records it."""
  if isinstance(value, str):
    return RENAMED.get((key, value), value)
  return value


def _flat(tree: dict[str, Any], prefix: str = '') -> dict[str, Any]:
  """Dotted key to value."""
  out: dict[str, Any] = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      out |= _flat(value, f'{prefix}{key}.')
    else:
      out[prefix + key] = value
  return out
