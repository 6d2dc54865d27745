"""The documentation names only files, modules and links that exist."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [
  *(ROOT / name for name in ('README.md', 'CONTRIBUTING.md', 'CHANGELOG.md')),
  *sorted((ROOT / 'docs').rglob('*.md')),
]
FOLDERS = (
  'benchmarks',
  'configs',
  'convert',
  'data_pipelines',
  'dicetalk_jax',
  'examples',
  'tests',
  'tools',
)
SOURCES = [
  path.as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob('*.py')
]


def page_name(page: pathlib.Path) -> str:
  return page.relative_to(ROOT).as_posix()


def module_exists(name: str) -> bool:
  path = ROOT / name.replace('.', '/')
  return path.with_suffix('.py').is_file() or (path / '__init__.py').is_file()


@pytest.mark.parametrize('page', PAGES, ids=page_name)
def test_source_files_exist(page):
  # Paths may be relative to a folder that the page names. NAME and TASK stand for any.
  for name in re.findall(r'`([a-z_/]+\.py)`', page.read_text()):
    assert any(path.endswith(f'/{name}') for path in SOURCES), name


@pytest.mark.parametrize('page', PAGES, ids=page_name)
def test_modules_exist(page):
  text = page.read_text()
  names = re.findall(r'python -m ([\w.]+)', text) + re.findall(
    r'^::: (.+)$', text, re.M
  )
  for name in names:
    if name not in ('pip', 'pytest', 'venv'):
      assert module_exists(name), name


@pytest.mark.parametrize('page', PAGES, ids=page_name)
def test_links_to_files_exist(page):
  for target in re.findall(r'\]\(([^)#]+)[^)]*\)', page.read_text()):
    if not target.startswith('https://'):
      assert (page.parent / target).is_file(), target
