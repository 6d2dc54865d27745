"""Every import is declared in setup.cfg.

Imports at the top of a file of the library are in `install_requires`; the others are
there or in an extra.
"""

import ast
import configparser
import functools
import importlib.metadata
import pathlib
import sys

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
import pytest

ROOT = pathlib.Path(__file__).parents[1]
TOOLS = ('configs', 'convert', 'data_pipelines', 'benchmarks', 'examples', 'tools')
OURS = {'dicetalk_jax', *TOOLS}


def names(requirements: str) -> set[str]:
  lines = [line for line in requirements.splitlines() if line.strip()]
  return {
    canonicalize_name(Requirement(line).name)
    for line in lines
    if not line.startswith('#')
  }


def declared() -> tuple[set[str], set[str]]:
  """The distributions of `install_requires`, and those of all extras and of Beam."""
  setup = configparser.ConfigParser()
  setup.read(ROOT / 'setup.cfg')
  required = names(setup['options']['install_requires'])
  beam = names((ROOT / 'requirements' / 'beam.txt').read_text())
  extras = setup['options.extras_require'].values()
  return required, set.union(beam, *map(names, extras))


def imports(node: ast.AST, lazy: bool) -> set[str]:
  """Packages of others that are imported below a node; `lazy`: within functions too."""
  found = set()
  for child in ast.iter_child_nodes(node):
    if isinstance(child, ast.Import):
      found |= {alias.name.partition('.')[0] for alias in child.names}
    elif isinstance(child, ast.ImportFrom):
      found.add(child.module.partition('.')[0])
    elif lazy or not isinstance(child, ast.FunctionDef):
      found |= imports(child, lazy)
  return found - OURS - sys.stdlib_module_names


@functools.cache
def distributions() -> dict[str, list[str]]:
  """Package to the distributions that provide it here."""
  return dict(importlib.metadata.packages_distributions())


def undeclared(folder: str, lazy: bool, allowed: set[str]) -> list[str]:
  missing = []
  for path in sorted((ROOT / folder).rglob('*.py')):
    for package in imports(ast.parse(path.read_text()), lazy):
      # A package that is not installed here, such as Beam, is looked up by its name.
      providers = distributions().get(package, [package])
      if not {canonicalize_name(name) for name in providers} & allowed:
        missing.append(f'{path.relative_to(ROOT)}: {package}')
  return missing


def test_the_library_requires_what_it_imports_at_once():
  required, _ = declared()
  assert not undeclared('dicetalk_jax', lazy=False, allowed=required)


@pytest.mark.parametrize('folder', ['dicetalk_jax', *TOOLS])
def test_everything_imported_is_declared(folder):
  required, extras = declared()
  assert not undeclared(folder, lazy=True, allowed=required | extras)


def test_an_import_that_is_not_declared_is_named():
  required, _ = declared()
  missing = undeclared('dicetalk_jax', lazy=False, allowed=required - {'scipy'})
  assert missing
  assert all(line.endswith(': scipy') for line in missing)
