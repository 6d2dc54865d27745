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
  """The measures, in the order of the table; None if not counted.

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
  conditionals: float | None
  packings: float | None
  longest: float


class Row(NamedTuple):
  """A row of the table: its label, and how its values are written."""

  label: str
  form: str


ROWS = {
  'nodes_median': Row('AST nodes per line, median function', '.1f'),
  'nodes_p90': Row('the same, 90th percentile', '.1f'),
  'line_length': Row('characters per line, mean', '.0f'),
  'wide': Row('lines over 100 characters', '%'),
  'comments': Row('lines that are only a comment', '%'),
  'docstrings': Row('lines of docstrings', '%'),
  'lambdas': Row('"name = lambda" per 1,000 lines', '.1f'),
  'conditionals': Row('"a if b else c" per 1,000 lines', '.0f'),
  'packings': Row('"a, b = x, y" per 1,000 lines', '.1f'),
  'longest': Row('lines of the longest function', '.0f'),
}
LABEL_WIDTH = 36


class CodeBase(NamedTuple):
  """Another code base: where it was read, and what was measured."""

  source: str
  density: Density


# Measured once, at these commits, by a script that counts the same way.
OTHERS = {
  'big_vision': CodeBase(
    'google-research/big_vision 0127fb6, core files',
    Density(7.6, 11.2, 43, 0.004, 0.13, 0.16, 1.1, 6, 2, 443),
  ),
  'bonsai': CodeBase(
    'jax-ml/bonsai 3628425',
    Density(7.8, 12.2, 44, 0.04, 0.07, 0.05, 0.3, 7, 3, 581),
  ),
  'gemma': CodeBase(
    'google-deepmind/gemma 7691fd4, folder gm',
    Density(5.7, 8.7, 38, 0.005, 0.14, 0.15, 0, 3, 0.2, 190),
  ),
  'kauldron': CodeBase(
    'google-research/kauldron c9b3ec8',
    Density(6.0, 8.9, 39, 0.006, 0.13, 0.16, 0.7, 4, 0.5, 266),
  ),
  'alphafold3': CodeBase(
    'google-deepmind/alphafold3 c0f97ed',
    Density(6.2, 8.9, 41, 0.003, 0.09, 0.15, 0.1, 3, 0.2, 340),
  ),
  'edm2': CodeBase(
    'NVlabs/edm2 4bf8162',
    Density(10.9, 14.2, 53, 0.08, 0.12, 0.09, 0.6, 16, 0, 185),
  ),
  'maxdiffusion': CodeBase(
    'AI-Hypercomputer/maxdiffusion 7cfb880',
    Density(6.8, 10.7, 42, 0.04, 0.06, 0.10, 0, None, None, 698),
  ),
}


def measure(sources: Iterable[str]) -> Density:
  """The density of Python sources, taken together."""
  all_lines = 0
  lengths: list[int] = []  # of the lines that are not blank
  ratios: list[float] = []  # AST nodes per line of each function
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
        longest = max(longest, _lines(node, node))
        ratios += _nodes_per_line(node)

  nodes_median, nodes_p90 = np.percentile(ratios or [np.nan], [50, 90])
  per_thousand = 1000 / len(lengths)
  return Density(
    nodes_median=nodes_median,
    nodes_p90=nodes_p90,
    line_length=float(np.mean(lengths)),
    wide=sum(length > WIDE for length in lengths) / len(lengths),
    comments=comments / all_lines,
    docstrings=docstrings / all_lines,
    lambdas=lambdas * per_thousand,
    conditionals=conditionals * per_thousand,
    packings=packings * per_thousand,
    longest=longest,
  )


def _lines(first: ast.stmt, last: ast.stmt) -> int:
  """The number of lines from one statement to the end of another."""
  assert last.end_lineno is not None  # the parser sets it
  return last.end_lineno - first.lineno + 1


def _nodes_per_line(function: ast.FunctionDef) -> Iterator[float]:
  """At most one ratio: short functions have none."""
  body = function.body[1:] if ast.get_docstring(function) else function.body
  if not body:
    return
  lines = _lines(body[0], function)
  if lines >= MIN_LINES:
    yield sum(1 for statement in body for _ in ast.walk(statement)) / lines


def _docstring_lines(node: ast.AST) -> int:
  documented = ast.Module | ast.ClassDef | ast.FunctionDef
  if not isinstance(node, documented) or not ast.get_docstring(node):
    return 0
  docstring = node.body[0]
  return _lines(docstring, docstring)


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
  """A column for this code and for each of the others, and where those were read."""
  names = ['here', *OTHERS]
  columns = [ours, *(other.density for other in OTHERS.values())]
  widths = [max(8, len(name) + 2) for name in names]

  def line(label: str, cells: Iterable[str]) -> str:
    aligned = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
    return label.ljust(LABEL_WIDTH) + ''.join(aligned)

  lines = [line('', names)]
  for field, row in ROWS.items():
    values = [getattr(column, field) for column in columns]
    lines.append(line(row.label, [_cell(value, row.form) for value in values]))
  lines += ['', 'Read at:']
  lines += [f'  {name:12}  {other.source}' for name, other in OTHERS.items()]
  return '\n'.join(lines)


def _cell(value: float | None, form: str) -> str:
  if value is None:
    return '-'
  if form == '%':
    return f'{100 * value:.2g} %'
  return format(value, form)


def python_files(paths: Iterable[pathlib.Path]) -> Iterator[pathlib.Path]:
  """The files among the paths, and all Python files below the folders."""
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
