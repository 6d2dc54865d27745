"""Runs a TFDS builder of this project; the result is a folder for `ClipSource`."""

from collections.abc import Iterable, Iterator
import contextlib
import os
import pathlib
import shutil
import tempfile
from typing import Any

from etils import epath
import tensorflow_datasets as tfds
import tqdm

from dicetalk_jax import files
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
  if files.printable(os.path.abspath(data_dir)) != os.path.abspath(data_dir):
    raise InputError(
      f'data_dir {data_dir} has a name that is not UTF-8, which records cannot be '
      'written to; choose another folder'
    )
  if not os.access(data_dir, os.W_OK):
    raise InputError(f'data_dir {data_dir} cannot be written; choose another folder')
  return os.path.abspath(data_dir)


@contextlib.contextmanager
def locked(folder: str, prepared: str) -> Iterator[bool]:
  """Lets one process at a time work in a folder; others wait, and say so.

  Args:
    folder: made if it does not exist. There are no locks in buckets (`gs://`).
    prepared: what is prepared there, for the message.

  Gives whether it is locked.
  """
  if '://' in folder:
    yield False
    return
  waiting = f'another process is preparing {prepared}; waiting until it ends'
  with files.lock_folder(folder, waiting) as is_locked:
    yield is_locked


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

  Whoever calls this while another process does waits, and finds the finished set.

  Returns:
    The folder of the data set. It appears when it is whole: a killed run leaves only a
    folder that is marked as incomplete, which the next run removes.
  """
  tfds.disable_progress_bar()  # our own bars know the total
  config = tfds.download.DownloadConfig(try_download_gcs=False, **download_config)
  folder = epath.Path(builder.data_dir)
  with locked(os.fspath(folder.parent), os.fspath(folder)) as is_locked:
    if is_locked:  # so whoever began these was killed
      for left in pathlib.Path(folder.parent).glob(f'incomplete.*_{folder.name}'):
        shutil.rmtree(left)
    # TFDS makes a folder for downloads, although there are none.
    with tempfile.TemporaryDirectory() as unused:
      builder.download_and_prepare(download_dir=unused, download_config=config)
    if '://' not in os.fspath(folder):
      for split in splits:
        # This also stores the table next to the records, while only we work there.
        _ = _ScannedSource(folder, split).table
  return folder
