"""Runs a TFDS builder of this project; the result is a folder for `ClipSource`."""

from collections.abc import Iterable, Iterator
import contextlib
import fcntl
import os
import pathlib
import shutil
import tempfile
from typing import Any

from etils import epath
import tensorflow_datasets as tfds
import tqdm

from dicetalk_jax.data.clip_source import ClipSource
from dicetalk_jax.errors import InputError


def make_root(data_dir: str | os.PathLike) -> str:
  """Makes the root of all data sets, and returns its absolute path.

  Raises:
    InputError: the root cannot be written.
  """
  if '://' in os.fspath(data_dir):
    return os.fspath(data_dir)
  try:
    pathlib.Path(data_dir).mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise InputError(
      f'data_dir {data_dir} cannot be made: {error.strerror}; choose a folder that you '
      'can write'
    ) from error
  if not os.access(data_dir, os.W_OK):
    raise InputError(f'data_dir {data_dir} cannot be written; choose another folder')
  return os.path.abspath(data_dir)


@contextlib.contextmanager
def locked(folder: str, leftovers: str) -> Iterator[None]:
  """Removes what killed runs left below a folder, unless another run works there.

  The lock of this run lives as long as its process. In buckets, and on file systems
  without locks, nothing is removed.

  Args:
    folder: of a corpus; it is made if it does not exist.
    leftovers: pattern of the folders to remove, relative to `folder`.
  """
  if '://' in folder:
    yield
    return
  os.makedirs(folder, exist_ok=True)
  handle = os.open(folder, os.O_RDONLY)
  try:
    with contextlib.suppress(OSError):
      fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
      for left in pathlib.Path(folder).glob(leftovers):
        shutil.rmtree(left)
    with contextlib.suppress(OSError):
      fcntl.flock(handle, fcntl.LOCK_SH)
    yield
  finally:
    os.close(handle)


class _ScannedSource(ClipSource):
  """Shows a bar while it is read."""

  def __iter__(self) -> Iterator[dict[str, Any]]:
    return iter(
      tqdm.tqdm(
        super().__iter__(),
        f'table of {self.split}',
        len(self),
        unit='clip',
        mininterval=1,
      )
    )


def write(
  builder: tfds.core.DatasetBuilder, splits: Iterable[str], **download_config: Any
) -> epath.Path:
  """Generates the records of a builder, unless they have been generated before.

  Returns:
    The folder of the data set. It appears when it is whole: a killed run leaves only a
    folder that is marked as incomplete.
  """
  tfds.disable_progress_bar()  # our own bars know the total
  config = tfds.download.DownloadConfig(try_download_gcs=False, **download_config)
  # TFDS makes a folder for downloads, although there are none.
  with tempfile.TemporaryDirectory() as unused:
    builder.download_and_prepare(download_dir=unused, download_config=config)
  if '://' not in str(builder.data_dir):
    for split in splits:
      # This also stores the table next to the records, while only we work there.
      _ = _ScannedSource(builder.data_dir, split).table
  return epath.Path(builder.data_dir)
