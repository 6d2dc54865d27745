"""Errors of a part, described for its record."""

import traceback
from typing import Any

from dicetalk_jax.errors import UserError

TRACEBACK_LINES = 12
LINE_LENGTH = 300

# A missing module of these is a mistake of ours.
OWN = ('benchmarks', 'configs', 'convert', 'data_pipelines', 'dicetalk_jax')
# Module -> package, where the names differ.
PACKAGES = {
  'cv2': 'opencv-python-headless',
  'ml_collections': 'ml-collections',
  'PIL': 'pillow',
  'sklearn': 'scikit-learn',
  'tensorflow_datasets': 'tensorflow-datasets',
}


class Unavailable(Exception):
  """A part cannot run here; the message is one sentence."""


def missing_package(error: Exception) -> str:
  """The package to install if that is what is wrong, else an empty string."""
  if not isinstance(error, ModuleNotFoundError) or not error.name:
    return ''
  module = error.name.partition('.')[0]
  return '' if module in OWN else PACKAGES.get(module, module)


def describe(error: Exception) -> dict[str, Any]:
  """An error as part of a record.

  Returns:
    `error`, one line; and `traceback`, the end of it, unless the user can mend what is
    wrong.
  """
  package = missing_package(error)
  if package:
    return {'error': f'the package {package} is missing here; pip install {package}'}
  if isinstance(error, UserError):
    return {'error': str(error)}
  first_line = str(error).strip().partition('\n')[0]
  lines = ''.join(traceback.format_exception(error)).splitlines()
  return {
    'error': f'{type(error).__name__}: {first_line[:LINE_LENGTH]}',
    'traceback': [line[:LINE_LENGTH] for line in lines[-TRACEBACK_LINES:]],
  }
