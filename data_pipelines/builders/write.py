"""How a TFDS builder of this project becomes a folder for `ClipSource`."""

from collections.abc import Iterable
import os
import pathlib
import tempfile
from typing import Any

from etils import epath
import tensorflow_datasets as tfds

from data_pipelines.source import ClipSource
from dicetalk_jax.errors import InputError


def make_root(data_dir: str | os.PathLike) -> str:
  """Makes the root of all data sets, and returns its whole path.

  Raises:
    InputError: it cannot be written.
  """
  if '://' in os.fspath(data_dir):
    return os.fspath(data_dir)
  try:
    pathlib.Path(data_dir).mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise InputError(f'data_dir {data_dir} cannot be made: {error.strerror}; choose a folder you can write') from error
  if not os.access(data_dir, os.W_OK):
    raise InputError(f'data_dir {data_dir} cannot be written; choose another folder')
  return os.path.abspath(data_dir)


def write(builder: tfds.core.DatasetBuilder, splits: Iterable[str], **download_config: Any) -> epath.Path:
  """Generates the records of a builder, or finds them where they have been generated before.

  Returns:
    The folder of the data set. It appears when whole: a killed run leaves only a folder marked incomplete.
  """
  tfds.disable_progress_bar()  # ours knows how much there is to do
  with tempfile.TemporaryDirectory() as unused:  # TFDS makes a folder for downloads, and there are none
    builder.download_and_prepare(
        download_dir=unused,
        download_config=tfds.download.DownloadConfig(try_download_gcs=False, **download_config))
  if '://' not in str(builder.data_dir):
    for split in splits:
      len(ClipSource(builder.data_dir, split).table)  # written beside the records now, while the folder is ours
  return epath.Path(builder.data_dir)
