"""The direction of imports: the library stands alone, and its floors look down only."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
TOOLS = ('benchmarks', 'configs', 'convert', 'data_pipelines', 'examples')

# Each folder of the library may import the folders and files named here, and itself.
FLOORS = {
  'models': ('errors',),
  'media': ('errors', 'files'),
  'metrics': ('data', 'errors', 'media', 'models'),
  'diffusion': ('errors', 'models', 'parallel'),
  'detect': ('bundle', 'component', 'errors', 'media', 'models'),
}


def imports(path: pathlib.Path) -> set[str]:
  """Dotted names of everything that a file imports, at its top or inside functions."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      names |= {f'{node.module}.{alias.name}' for alias in node.names}
  return names


def files(folder: str) -> list[pathlib.Path]:
  found = sorted((ROOT / folder).rglob('*.py'))
  assert found, folder
  return found


def test_the_library_imports_none_of_the_tools():
  for path in files('dicetalk_jax'):
    upward = [name for name in imports(path) if name.split('.')[0] in (*TOOLS, 'tests')]
    assert not upward, (path, upward)


def test_configurations_import_nothing_of_the_project():
  for path in files('configs'):
    for name in imports(path):
      assert name.split('.')[0] not in ('dicetalk_jax', *TOOLS) or name.startswith(
        'configs.'
      ), (path, name)


@pytest.mark.parametrize('tool', ['convert', 'data_pipelines'])
def test_a_tool_imports_no_other_tool(tool):
  others = {name for name in TOOLS if name != tool}
  for path in files(tool):
    assert not {name.split('.')[0] for name in imports(path)} & others, path


@pytest.mark.parametrize('floor', FLOORS)
def test_floors_of_the_library_look_down_only(floor):
  allowed = {floor, *FLOORS[floor]}
  for path in files(f'dicetalk_jax/{floor}'):
    for name in imports(path):
      if name.startswith('dicetalk_jax.'):
        assert name.split('.')[1] in allowed, (path, name)
