"""Prints how dense the code is, next to other JAX code bases.

  python -m tools.density [FILE_OR_FOLDER ...]

Information, not a target. Without arguments it reads this repository without its
tests. Measures over functions leave out docstrings and functions of fewer than 8
lines. A nested function counts alone and as part of the function around it.
"""

import argparse
import ast
from collections.abc import Iterable, Iterator
import io
import pathlib
import string
import tokenize
from typing import NamedTuple

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
CODE = (
  'dicetalk_jax',
  'configs',
  'convert',
  'data_pipelines',
  'benchmarks',
  'examples',
  'tools',
)
MIN_LINES = 8
WIDE = 100


class Density(NamedTuple):
  """The measures, in the order of the table.

  Lines over 100 characters and everything per 1,000 are of the lines that are not
  blank; comments and docstrings are of all lines.
  """

  nodes_median: float
  nodes_p90: float
  line_length: float
  wide: float
  comments: float
  docstrings: float
  lambdas: float
  conditionals: float
  packings: float
  longest: float


# The label of each measure, and how its values are written.
ROWS = Density(
  nodes_median=('AST nodes per line, median function', '.1f'),
  nodes_p90=('the same, 90th percentile', '.1f'),
  line_length=('mean length of non-blank lines', '.0f'),
  wide=('lines over 100 characters', '%'),
  comments=('lines that are only a comment', '%'),
  docstrings=('docstring lines', '%'),
  lambdas=('name = lambda, per 1,000 lines', '.1f'),
  conditionals=('conditional expressions, per 1,000', '.0f'),
  packings=('a, b = x, y, per 1,000 lines', '.1f'),
  longest=('longest function, lines', '.0f'),
)

# Measured once, at these commits, by a script that counts the same way. None: not
# counted.
OTHERS = {
  'google-research/big_vision 0127fb6, core': Density(
    7.6, 11.2, 43, 0.004, 0.13, 0.16, 1.1, 6, 2, 443
  ),
  'jax-ml/bonsai 3628425': Density(7.8, 12.2, 44, 0.04, 0.07, 0.05, 0.3, 7, 3, 581),
  'google-deepmind/gemma 7691fd4, gm': Density(
    5.7, 8.7, 38, 0.005, 0.14, 0.15, 0, 3, 0.2, 190
  ),
  'google-research/kauldron c9b3ec8': Density(
    6.0, 8.9, 39, 0.006, 0.13, 0.16, 0.7, 4, 0.5, 266
  ),
  'google-deepmind/alphafold3 c0f97ed': Density(
    6.2, 8.9, 41, 0.003, 0.09, 0.15, 0.1, 3, 0.2, 340
  ),
  'NVlabs/edm2 4bf8162': Density(10.9, 14.2, 53, 0.08, 0.12, 0.09, 0.6, 16, 0, 185),
  'AI-Hypercomputer/maxdiffusion 7cfb880': Density(
    6.8, 10.7, 42, 0.04, 0.06, 0.10, 0, None, None, 698
  ),
}


def measure(sources: Iterable[str]) -> Density:
  """The density of Python sources, taken together."""
  all_lines = 0
  lengths = []  # of the lines that are not blank
  ratios = []  # AST nodes per line of each function
  longest = 0
  comments = docstrings = 0
  lambdas = conditionals = packings = 0
  for source in sources:
    lines = source.splitlines()
    all_lines += len(lines)
    lengths += [len(line) for line in lines if line.strip()]
    comments += _comment_lines(source)
    for node in ast.walk(ast.parse(source)):
      docstrings += _docstring_lines(node)
      lambdas += isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda)
      conditionals += isinstance(node, ast.IfExp)
      packings += _is_packing(node)
      if isinstance(node, ast.FunctionDef):
        longest = max(longest, node.end_lineno - node.lineno + 1)
        ratios += _nodes_per_line(node)

  nodes_median, nodes_p90 = np.percentile(ratios or [np.nan], [50, 90])
  per_thousand = 1000 / len(lengths)
  return Density(
    nodes_median=nodes_median,
    nodes_p90=nodes_p90,
    line_length=np.mean(lengths),
    wide=sum(length > WIDE for length in lengths) / len(lengths),
    comments=comments / all_lines,
    docstrings=docstrings / all_lines,
    lambdas=lambdas * per_thousand,
    conditionals=conditionals * per_thousand,
    packings=packings * per_thousand,
    longest=longest,
  )


def _nodes_per_line(function: ast.FunctionDef) -> Iterator[float]:
  body = function.body[1:] if ast.get_docstring(function) else function.body
  if not body:
    return
  lines = function.end_lineno - body[0].lineno + 1
  if lines >= MIN_LINES:
    yield sum(1 for statement in body for _ in ast.walk(statement)) / lines


def _docstring_lines(node: ast.AST) -> int:
  documented = ast.Module | ast.ClassDef | ast.FunctionDef
  if not isinstance(node, documented) or not ast.get_docstring(node):
    return 0
  return node.body[0].end_lineno - node.body[0].lineno + 1


def _comment_lines(source: str) -> int:
  tokens = tokenize.generate_tokens(io.StringIO(source).readline)
  return sum(
    token.type == tokenize.COMMENT and token.line.lstrip().startswith('#')
    for token in tokens
  )


def _is_packing(node: ast.AST) -> bool:
  return (
    isinstance(node, ast.Assign)
    and isinstance(node.value, ast.Tuple)
    and isinstance(node.targets[0], ast.Tuple)
  )


def table(ours: Density) -> str:
  """The measures of this code and of the others, one row each."""
  columns = {'this code': ours, **OTHERS}
  letters = string.ascii_uppercase[: len(columns)]
  lines = [f'{letter}  {name}' for letter, name in zip(letters, columns)]
  lines += ['', _row('', letters)]
  for field, (label, form) in ROWS._asdict().items():
    values = [getattr(density, field) for density in columns.values()]
    lines.append(_row(label, [_cell(value, form) for value in values]))
  return '\n'.join(lines)


def _row(label: str, cells: Iterable[str]) -> str:
  return f'{label:36}' + ''.join(f'{cell:>8}' for cell in cells)


def _cell(value: float | None, form: str) -> str:
  if value is None:
    return '-'
  if form == '%':
    return f'{100 * value:.2g} %'
  return format(value, form)


def python_files(paths: Iterable[pathlib.Path]) -> Iterator[pathlib.Path]:
  for path in paths:
    if path.is_dir():
      yield from sorted(path.rglob('*.py'))
    else:
      yield path


def main() -> None:
  parser = argparse.ArgumentParser(
    prog='python -m tools.density', description=__doc__.split('\n')[0]
  )
  parser.add_argument(
    'paths',
    nargs='*',
    type=pathlib.Path,
    default=[ROOT / name for name in CODE],
    help='files and folders (default: this repository without its tests)',
  )
  paths = parser.parse_args().paths
  print(table(measure(path.read_text() for path in python_files(paths))))


if __name__ == '__main__':
  main()
