"""A user's own clips: any folder of videos, and a CSV that describes them.

    labels.csv:  file,identity,emotion,intensity,split,audio,expression,start,end,text

Only `file` is required, relative to the folder. Without a CSV every video is a clip of
the person that its folder is named after.
"""

from collections.abc import Iterator, Mapping, Sequence
import math
import posixpath
from typing import NoReturn

from data_pipelines.corpora import file_tree
from data_pipelines.corpora.clip_file import AUDIO, FEATURES, VIDEO, ClipFile, Skipped
from data_pipelines.corpora.file_tree import Tree
from data_pipelines.splits import SPLITS
from dicetalk_jax import text_files
from dicetalk_jax.data.clip_record import EMOTIONS, LEVELS, UNKNOWN
from dicetalk_jax.errors import InputError

LAYOUT = 'videos, and labels.csv with a column `file`'
LABELS = 'labels.csv'
PATHS = {'file', 'audio', 'expression'}  # columns
COLUMNS = (
  'file',
  'identity',
  'emotion',
  'intensity',
  'split',
  'audio',
  'expression',
  'start',
  'end',
  'text',
)


def walk(
  tree: Tree, expressions: Tree | None = None, labels: str = LABELS
) -> Iterator[ClipFile | Skipped]:
  """Finds the clips of the CSV, or all videos if there is none.

  Args:
    tree: the user's folder.
    expressions: files of expression features, named as in the CSV or after the video.
      Without it, only features that the CSV names are used, from the user's folder.
    labels: the CSV, relative to the folder. It must exist unless it has the default
      name.

  Raises:
    InputError: the CSV is missing or a row cannot be read.
  """
  if labels in tree:
    rows = _read_rows(tree, labels)
  elif labels == LABELS:
    rows = [{'file': path} for path in tree.files if file_tree.extension(path) in VIDEO]
  else:
    raise InputError(
      f'--labels={labels} is not in {tree.address}; give its path relative to the '
      'folder'
    )
  listed = set()
  for number, row in enumerate(rows, start=2):
    clip = _Row(row, place=f'{labels}, line {number}').clip(expressions)
    listed.add(clip.video)
    missing = [path for path in (clip.video, clip.audio) if path and path not in tree]
    if clip.expression and clip.expression not in (expressions or tree):
      missing.append(clip.expression)
    if missing:
      yield Skipped(clip.clip_id, 'file missing', ', '.join(missing))
    else:
      yield clip
  for path in tree.files:
    ending = file_tree.extension(path)
    if ending in VIDEO and path not in listed:
      yield Skipped(path, 'not in the labels')
    elif ending not in (*VIDEO, *AUDIO, *FEATURES):
      yield Skipped(path, 'not a video file', ending)


def _read_rows(tree: Tree, labels: str) -> list[dict[str, str]]:
  """Reads the CSV, without empty cells."""
  try:
    lines = [*text_files.read_csv(tree.read_bytes(labels))]
  except ValueError as error:
    raise InputError(f'{labels}: {error}; save it as CSV in UTF-8') from error
  names = lines[0] if lines else []
  unknown = sorted(set(names) - set(COLUMNS))
  wrong = ''
  if 'file' not in names:
    wrong = 'the column `file` is missing'
  elif unknown:
    wrong = f'column {unknown[0]!r} is not known'
  if wrong:
    raise InputError(f'{labels}: {wrong}; columns are {", ".join(COLUMNS)}')
  rows = []
  for cells in lines[1:]:
    row = {name: cell for name, cell in zip(names, cells) if cell}
    for name in PATHS & row.keys():
      if row[name] not in tree:  # the table may come from Windows
        row[name] = row[name].replace('\\', '/')
    rows.append(row)
  return rows


class _Row:
  """One row of the CSV; its methods raise InputError for what cannot be read."""

  def __init__(self, cells: Mapping[str, str], place: str):
    self.cells = cells
    self.place = place  # for messages

  def clip(self, expressions: Tree | None) -> ClipFile:
    """Makes the clip of the row."""
    if 'file' not in self.cells:
      self._refuse('the cell of `file` is empty; name a file')
    video = self._path('file')
    stem = posixpath.splitext(video)[0]
    folder = posixpath.basename(posixpath.dirname(video))
    start = self._number('start') or 0.0
    end = self._number('end')
    if start < 0 or (end is not None and end <= start):
      self._refuse('the clip must start before it ends; check start and end')
    expression = self._path('expression')
    if not expression and expressions:
      expression = expressions.find(stem, FEATURES)
    clip_id = stem.replace('/', '_')
    if start:
      clip_id += f'_{round(1000 * start)}'
    return ClipFile(
      clip_id=clip_id,
      video_id=stem,
      identity=f'folder/{self.cells.get("identity") or folder or stem}',
      dataset='other',
      emotion=self._choice('emotion', EMOTIONS, UNKNOWN),
      intensity=self._intensity(),
      text=self.cells.get('text', ''),
      video=video,
      audio=self._path('audio'),
      start=start,
      end=end,
      split=self._choice('split', SPLITS, ''),
      expression=expression,
    )

  def _refuse(self, problem: str) -> NoReturn:
    raise InputError(f'{self.place}: {problem}')

  def _path(self, name: str) -> str:
    return posixpath.normpath(self.cells[name]) if name in self.cells else ''

  def _number(self, name: str) -> float | None:
    if name not in self.cells:
      return None
    try:
      value = float(self.cells[name])
    except ValueError:
      value = math.nan
    if not math.isfinite(value):
      self._refuse(f'{name} must be a number, got {self.cells[name]!r}')
    return value

  def _intensity(self) -> int:
    """Reads the level of an emotion; 0 stands for an unknown one."""
    text = self.cells.get('intensity', '0')
    try:
      level = int(text)
    except ValueError:
      level = -1
    if level not in (0, *LEVELS):
      self._refuse(
        f'intensity {text!r} is not known; choose 1, 2 or 3, or 0 if it is unknown'
      )
    return level

  def _choice(self, name: str, known: Sequence[str], default: str) -> str:
    value = self.cells.get(name, default).lower()
    if value not in (*known, default):
      self._refuse(f'{name} {value!r} is not known; choose one of {", ".join(known)}')
    return value
