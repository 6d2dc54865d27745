"""Text files of all systems are read alike."""

import codecs
import json

import pytest

from convert import torch_files
from data_pipelines.corpora import hdtf
from data_pipelines.corpora.file_tree import Tree
from dicetalk_jax import bundle, text_files
from tests.data_pipelines.made_clips import touch

TEXT = 'file,identity\nzoë/a.mp4,Zoë\nb.mp4,Анна\n'
ENCODINGS = {
  'UTF-8': TEXT.encode(),
  'UTF-8 with a mark': TEXT.encode('utf-8-sig'),
  'UTF-16 little': codecs.BOM_UTF16_LE + TEXT.encode('utf-16-le'),
  'UTF-16 big': codecs.BOM_UTF16_BE + TEXT.encode('utf-16-be'),
  'UTF-16 little without a mark': TEXT.encode('utf-16-le'),
  'UTF-16 big without a mark': TEXT.encode('utf-16-be'),
  'UTF-32 little': codecs.BOM_UTF32_LE + TEXT.encode('utf-32-le'),
  'UTF-32 big': codecs.BOM_UTF32_BE + TEXT.encode('utf-32-be'),
}


@pytest.mark.parametrize('name', ENCODINGS)
def test_encodings(name):
  assert text_files.decode(ENCODINGS[name]) == TEXT


def test_western_text_that_is_not_unicode():
  assert text_files.decode('Zoë – “ja”'.encode('cp1252')) == 'Zoë – “ja”'


@pytest.mark.parametrize('line_end', ['\n', '\r\n', '\r'])
def test_line_ends(line_end):
  assert text_files.decode(TEXT.replace('\n', line_end).encode()) == TEXT


@pytest.mark.parametrize('delimiter', [',', ';', '\t'])
def test_delimiters(delimiter):
  text = TEXT.replace(',', delimiter) + f'c.mp4{delimiter} "x, ""y"" "\n{delimiter}\n'
  assert [*text_files.read_csv(text.encode('utf-16'))] == [
    ['file', 'identity'],
    ['zoë/a.mp4', 'Zoë'],
    ['b.mp4', 'Анна'],
    ['c.mp4', 'x, "y"'],
  ]


def test_descriptions_in_json(tmp_path):
  """Editors of Windows add a byte-order mark."""
  for encoding in ('utf-8-sig', 'utf-16'):
    (tmp_path / 'config.json').write_text('{"a": "ë"}', encoding)
    assert torch_files.read_json(tmp_path / 'config.json') == {'a': 'ë'}
    index = {'format': 2, 'components': {}, 'settings': {'shift': 1}}
    (tmp_path / 'bundle.json').write_text(json.dumps(index), encoding)
    assert bundle.settings(tmp_path) == {'shift': 1}


@pytest.mark.parametrize('encoding', ['utf-16', 'cp1252'])
def test_tables_of_a_corpus(tmp_path, encoding):
  """Those of HDTF, with the line ends of old systems."""
  touch(tmp_path, 'x')
  tables = {
    'video_url': 'Ben\u00e9_0.mp4 https://www.youtube.com/watch?v=abc',
    'annotion_time': 'Ben\u00e9_0.mp4 00:01-00:05',
  }
  for kind, line in tables.items():
    (tmp_path / f'RD_{kind}.txt').write_bytes(f'{line}\r{line}\r'.encode(encoding))
  table = hdtf._read_table(Tree(tmp_path), 'RD', 'annotion_time')
  assert table == {'Bené_0': ['00:01-00:05']}
