"""The page of the demo: one file that shows the videos next to it.

Everything that it says comes from the report, `report.json`.
"""

import pathlib
import shlex
from typing import Any

import jinja2

from dicetalk_jax.files import atomic_file

KINDS = {
  'generated': 'Generated',
  'truth': 'Truth',
  'autoencoded': 'Truth through the autoencoder',
}


def render(report: dict[str, Any]) -> str:
  """The page as HTML, with styles and script inside; names are escaped.

  Args:
    report: as `__main__` writes it. Its paths are relative to the page.
  """
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters['shell'] = shlex.quote
  return environment.get_template('page.html').render(report, kinds=KINDS)


def write(folder: pathlib.Path, report: dict[str, Any]) -> pathlib.Path:
  """Writes `index.html` into the folder of the videos, and returns its path."""
  path = folder / 'index.html'
  with atomic_file(path) as part:
    part.write_text(render(report), encoding='utf-8')
  return path
