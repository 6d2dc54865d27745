"""Checkpoint folders of any name: how Orbax is given them, and old ones are mended.

Orbax writes arrays through TensorStore, which turns a backslash in a file name into a
slash and so writes into another folder. There is no way to quote it, so Orbax is given
a symbolic link to the folder. The same serves libraries that read UTF-8 names only.

Before `literal_glob` and this link, checkpoints below folders with `[`, `*`, `?` or a
backslash in their names were left without the index of their arrays. The arrays are
there, and `mend` writes the index that Orbax would have written.
"""

import functools
import os
import pathlib
import shutil
import tempfile
from typing import Any
import uuid

from etils import epath
import tensorstore as ts

from dicetalk_jax.files import printable

INDEX = 'manifest.ocdbt'
PARTS = 'ocdbt.process_*'  # what each process wrote; the index joins them
_UNFINISHED = '.orbax-checkpoint-tmp'
# Orbax's values: small arrays lie in the index, which is one node.
_CONFIG = {'max_inline_value_bytes': 1024, 'max_decoded_node_bytes': 100_000_000}


def plain(path: os.PathLike | str) -> epath.Path:
  """The same place under a name that every library reads.

  Args:
    path: absolute, or an address (`gs://`), which is returned as it is. The folder
      with the last name that is not plain must exist.
  """
  if '://' in os.fspath(path):
    return epath.Path(path)
  parts = pathlib.PurePath(path).parts
  odd = [i for i, name in enumerate(parts) if not _is_plain(name)]
  if not odd:
    return epath.Path(path)
  end = odd[-1] + 1
  return epath.Path(link(os.path.join(*parts[:end])), *parts[end:])


def _is_plain(name: str) -> bool:
  return '\\' not in name and printable(name) == name


@functools.cache
def _links() -> tempfile.TemporaryDirectory:
  """A folder for symbolic links, removed when the process ends."""
  return tempfile.TemporaryDirectory(prefix='dicetalk_jax-')


@functools.cache
def link(path: str) -> str:
  """A symbolic link to a file or folder, under a name without any ending."""
  name = os.path.join(_links().name, uuid.uuid4().hex)
  os.symlink(path, name)
  return name


def mend(checkpoint: os.PathLike | str) -> None:
  """Writes the index of arrays where an older version of this program left it out.

  Several processes may do so at the same time: each writes all of the same index, and
  it appears whole. A checkpoint that is not there, or has its index, stays as it is.

  Raises:
    OSError, ValueError: the folder cannot be written, or its arrays are damaged.
  """
  if '://' in os.fspath(checkpoint) or not os.path.isdir(checkpoint):
    return
  checkpoint = pathlib.Path(checkpoint).absolute()
  for item in sorted(checkpoint.iterdir()):
    if (item / '_METADATA').exists() and not (item / INDEX).exists():
      _fetch_astray(checkpoint, item)
      _write_index(item)


def _fetch_astray(checkpoint: pathlib.Path, item: pathlib.Path) -> None:
  """Copies what TensorStore wrote where backslashes of the name were slashes."""
  if '\\' not in str(checkpoint):
    return
  astray = pathlib.Path(str(checkpoint).replace('\\', '/') + _UNFINISHED)
  # The item is called NAME or NAME.orbax-checkpoint-tmp there.
  for source in astray.glob(f'{item.name}*/{PARTS}'):
    target = item / source.name
    if target.exists():
      continue
    copy = item / f'.{source.name}.{uuid.uuid4().hex}'
    try:
      shutil.copytree(source, copy)
      copy.rename(target)
    except OSError:
      if not target.exists():  # nor has another process just made it
        raise
    finally:
      shutil.rmtree(copy, ignore_errors=True)


def _write_index(item: pathlib.Path) -> None:
  """Joins what each process wrote."""
  parts = [plain(part) for part in sorted(item.glob(PARTS))]
  if not parts:
    return
  # One context for all: only then are entries taken over without their arrays.
  context = ts.Context()
  whole = _open_store(plain(item), context, config=_CONFIG)
  with ts.Transaction(atomic=True) as transaction:
    for part in parts:
      target = whole.with_transaction(transaction)
      _open_store(part, context).experimental_copy_range_to(target).result()


def _open_store(folder: epath.Path, context: ts.Context, **options: Any) -> ts.KvStore:
  base = {'driver': 'file', 'path': f'{folder}/'}
  spec = {'driver': 'ocdbt', 'base': base, **options}
  return ts.KvStore.open(spec, context=context).result()
