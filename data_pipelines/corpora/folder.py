"""A user's own clips: any folder of videos, and a CSV that says what they are.

    labels.csv:  file,identity,emotion,intensity,split,audio,expression,start,end,text

Only `file` is needed, relative to the folder. Without a CSV every video is a clip of
the person that its folder is named after.
"""

from collections.abc import Iterator, Mapping
import csv
import io
import math
import posixpath

from data_pipelines.corpora import file_tree
from data_pipelines.corpora.clip_file import AUDIO, FEATURES, VIDEO, ClipFile, Skipped
from data_pipelines.corpora.file_tree import Tree
from data_pipelines.splits import SPLITS
from dicetalk_jax.data.clip_record import EMOTIONS, LEVELS, UNKNOWN
from dicetalk_jax.errors import InputError

LAYOUT = 'videos, and labels.csv with a column `file`'
LABELS = 'labels.csv'
PATHS = {'file', 'audio', 'expression'}
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
  """Finds the clips of the CSV, or all videos where there is none.

  Args:
    tree: the user's folder.
    expressions: where files of expression features lie, named as in the CSV or as the
      video; where this is not given, only those that the CSV names are used, from the
      folder.
    labels: the CSV, relative to the folder; it must exist unless it has the default
      name.

  Raises:
    InputError: the CSV is missing or a row cannot be read.
  """
  if labels in tree:
    rows = _rows(tree, labels)
  elif labels == LABELS:
    rows = [{'file': path} for path in tree.files if file_tree.extension(path) in VIDEO]
  else:
    raise InputError(
      f'--labels={labels} is not in {tree.address}; give its path relative to the '
      'folder'
    )
  videos = set()
  for number, row in enumerate(rows, start=2):
    clip = _clip(row, f'{labels}, line {number}', expressions)
    videos.add(clip.video)
    missing = [path for path in (clip.video, clip.audio) if path and path not in tree]
    missing += (
      [clip.expression]
      if clip.expression and clip.expression not in (expressions or tree)
      else []
    )
    yield Skipped(clip.clip_id, 'file missing', ', '.join(missing)) if missing else clip
  for path in tree.files:
    if path not in videos and file_tree.extension(path) in VIDEO:
      yield Skipped(path, 'not in the labels')
    elif file_tree.extension(path) not in (*VIDEO, *AUDIO, *FEATURES):
      yield Skipped(path, 'no video file', file_tree.extension(path))


def _rows(tree: Tree, labels: str) -> list[dict[str, str]]:
  reader = csv.DictReader(io.StringIO(tree.read_text(labels)), skipinitialspace=True)
  names = reader.fieldnames or ()
  if 'file' not in names or (unknown := sorted(set(names) - set(COLUMNS))):
    wrong = (
      f'column {unknown[0]!r} is not known'
      if 'file' in names
      else 'the column `file` is missing'
    )
    raise InputError(f'{labels}: {wrong}; columns are {", ".join(COLUMNS)}')
  rows = [
    {
      key: value.strip()
      for key, value in row.items()
      if key and value and value.strip()
    }
    for row in reader
  ]
  for row in rows:
    for name in PATHS & row.keys():
      if row[name] not in tree:  # a table made on Windows
        row[name] = row[name].replace('\\', '/')
  return rows


def _clip(row: Mapping[str, str], place: str, expressions: Tree | None) -> ClipFile:
  """One row, checked."""

  def refuse(what: str):
    raise InputError(f'{place}: {what}')

  def number(name: str, kind: type) -> float | None:
    try:
      value = kind(row[name]) if name in row else None
    except ValueError:
      value = math.nan
    if value is not None and not math.isfinite(value):
      refuse(f'{name} {row[name]!r} is no number')
    return value

  def path(name: str) -> str:
    return posixpath.normpath(row[name]) if name in row else ''

  if 'file' not in row:
    refuse('no file is named')
  video = path('file')
  stem, folder = (
    posixpath.splitext(video)[0],
    posixpath.basename(posixpath.dirname(video)),
  )
  emotion, split = row.get('emotion', UNKNOWN).lower(), row.get('split', '').lower()
  level = number('intensity', int) or 0
  start, end = number('start', float) or 0.0, number('end', float)
  if emotion not in (*EMOTIONS, UNKNOWN):
    refuse(f'emotion {emotion!r} is not known; choose one of {", ".join(EMOTIONS)}')
  if split not in ('', *SPLITS):
    refuse(f'split {split!r} is not known; choose one of {", ".join(SPLITS)}')
  if level not in (0, *LEVELS):
    refuse(
      f'intensity {level} is not known; choose 1, 2 or 3, or 0 where it is unknown'
    )
  if start < 0 or end is not None and end <= start:
    refuse('the clip must start before it ends')
  clip_id = stem.replace('/', '_') + (f'_{round(1000 * start)}' if start else '')
  expression = path('expression') or (
    expressions.find(stem, FEATURES) if expressions else ''
  )
  return ClipFile(
    clip_id=clip_id,
    video_id=stem,
    identity=f'folder/{row.get("identity") or folder or stem}',
    dataset='other',
    emotion=emotion,
    intensity=level,
    text=row.get('text', ''),
    video=video,
    audio=path('audio'),
    start=start,
    end=end,
    split=split,
    expression=expression,
  )
