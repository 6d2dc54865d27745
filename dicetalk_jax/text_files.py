"""Text files as editors and spreadsheets of all systems write them."""

import codecs
from collections.abc import Iterator
import csv
import io

# UTF-32 begins like UTF-16, so it comes first.
_MARKS = [
  (codecs.BOM_UTF8, 'utf-8-sig'),
  (codecs.BOM_UTF32_LE, 'utf-32'),
  (codecs.BOM_UTF32_BE, 'utf-32'),
  (codecs.BOM_UTF16_LE, 'utf-16'),
  (codecs.BOM_UTF16_BE, 'utf-16'),
]
_DELIMITERS = ',;\t'


def decode(data: bytes) -> str:
  """Decodes a text file, and ends all its lines with a line feed.

  The byte-order mark decides, as far as there is one. Without it, zero bytes at every
  other place show UTF-16. All else is UTF-8 or, where it cannot be, the encoding of
  Windows for western languages.
  """
  text = data.decode(_encoding(data), errors='replace')
  return text.replace('\r\n', '\n').replace('\r', '\n')


def _encoding(data: bytes) -> str:
  for mark, encoding in _MARKS:
    if data.startswith(mark):
      return encoding
  first, second = data[0::2].count(0), data[1::2].count(0)
  if max(first, second) > len(data) / 8:
    return 'utf-16-be' if first > second else 'utf-16-le'
  try:
    data.decode()
  except UnicodeDecodeError:
    return 'cp1252'
  return 'utf-8'


def read_csv(data: bytes) -> Iterator[list[str]]:
  """Yields the cells of every line that has any, without spaces around them.

  Cells are separated by comma, semicolon or tab: by what the first line has most of.

  Raises:
    ValueError: a cell or line is too damaged for a CSV file.
  """
  text = decode(data)
  header = text.partition('\n')[0]
  delimiter = max(_DELIMITERS, key=header.count)  # the first of equals
  lines = csv.reader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True)
  try:
    for line in lines:
      cells = [cell.strip() for cell in line]
      if any(cells):
        yield cells
  except csv.Error as error:
    raise ValueError(f'line {lines.line_num}: {error}') from error
