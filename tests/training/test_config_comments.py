"""Legal values in the comments of `configs/` are those that the library declares."""

import pathlib
import re

import pytest

from dicetalk_jax.training import config_checks

CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'
CHOICES = {
  'common': config_checks.CHOICES,
  'diffusion': config_checks.DIFFUSION_CHOICES,
  'embedder': config_checks.EMBEDDER_CHOICES,
}


def commented(file):
  """Key to legal values: `key='value',  # 'value' | 'other'`, below its section."""
  section = ''
  found = {}
  for line in (CONFIGS / f'{file}.py').read_text().splitlines():
    if opening := re.match(r'  config\.(\w+) = dict\($', line):
      section = f'{opening[1]}.'
    elif line == '  )':
      section = ''
    setting = re.match(
      r"\s+(?:config\.)?([\w.]+) ?= ?'(\w+)',?  # ('\w+'(?: \| '\w+')+)$", line
    )
    if setting:
      key, value, values = setting.groups()
      values = tuple(re.findall(r"'(\w+)'", values))
      assert value in values
      found[section + key] = values
  return found


@pytest.mark.parametrize('file', CHOICES)
def test_comments_list_the_legal_values(file):
  assert commented(file) == CHOICES[file]
