"""MEAD: sentences acted in 8 emotions, at 3 levels, filmed from 7 views.

    <ID>/video/<view>/<emotion>/level_<1|2|3>/<nnn>.mp4
    <ID>/audio/<emotion>/level_<1|2|3>/<nnn>.m4a

Paths are read by their words and not by their depth. So other trees are found as well:
with an extra `<ID>_video/`, audio by view, `.wav`, `<emotion>_level_<k>`, and the flat
names of other projects (`M003_ang_3_004`, `M003_front_angry_level3_004`).
"""

from collections.abc import Iterator, Sequence
import re
from typing import NamedTuple

from data_pipelines.corpora import file_tree
from data_pipelines.corpora.clip_file import AUDIO, FEATURES, VIDEO, ClipFile, Skipped
from data_pipelines.corpora.file_tree import Tree
from dicetalk_jax.data.clip_record import EMOTIONS

LAYOUT = '<ID>/video/<view>/<emotion>/level_<1|2|3>/<nnn>.mp4'
VIEWS = ('front', 'down', 'top', 'left_30', 'left_60', 'right_30', 'right_60')

_OTHER_NAMES = {
  'anger': 'angry',
  'disgust': 'disgusted',
  'happiness': 'happy',
  'sadness': 'sad',
  'surprise': 'surprised',
}
# Emotions by full name, other name, and first three letters.
_NAMES = (
  {emotion: emotion for emotion in EMOTIONS}
  | _OTHER_NAMES
  | {emotion[:3]: emotion for emotion in EMOTIONS}
)
_PERSON = re.compile(r'(?<![A-Za-z0-9])([MW]\d{3})(?![A-Za-z0-9])')
_EMOTION = re.compile(
  rf'(?<![a-z])({"|".join(sorted(_NAMES, key=len, reverse=True))})(?![a-z])'
)
_LEVEL = re.compile(r'level_?([123])(?!\d)')
_FLAT_LEVEL = re.compile(r'[a-z]_([123])_\d+$')
_VIEW = re.compile(r'(?<![a-z])(?:(left|right)_?(30|60)|front|down|top)(?![a-z0-9])')
_NUMBER = re.compile(r'(\d+)$')


class Take(NamedTuple):
  """The labels of a clip as its path gives them; `view` is '' if there is none."""

  person: str
  emotion: str
  level: int
  number: str
  view: str


def parse(path: str) -> Take | None:
  """Reads a path without its extension.

  The result is None if person, emotion, level or number is missing.
  """
  lower = path.lower()
  person = _PERSON.search(path)
  emotions = _EMOTION.findall(lower)
  level = _LEVEL.search(lower) or _FLAT_LEVEL.search(lower)
  number = _NUMBER.search(path)
  if not (person and emotions and level and number):
    return None
  return Take(
    person=person[1],
    emotion=_NAMES[emotions[-1]],
    level=int(level[1]),
    number=number[1].zfill(3),
    view=_view(lower),
  )


def _view(path: str) -> str:
  """Reads the view of a path in lower case; '' if it names none."""
  found = _VIEW.search(path)
  if not found:
    return ''
  side, degrees = found.groups()
  return f'{side}_{degrees}' if side else found[0]


def _index(tree: Tree, extensions: Sequence[str]) -> dict[Take, str]:
  """Finds the files with these extensions, by what their paths say."""
  found = {}
  for path in tree.files:
    ending = file_tree.extension(path)
    if ending in extensions:
      take = parse(path[: -len(ending)])
      if take:
        found[take] = path
  return found


def walk(
  tree: Tree, expressions: Tree | None = None, views: Sequence[str] = ('front',)
) -> Iterator[ClipFile | Skipped]:
  """Finds the clips of these views; other views are left out silently.

  The audio comes from the audio tree, which holds one file for all views, or else from
  the video.
  """
  audio = _index(tree, AUDIO)
  features = _index(expressions, FEATURES) if expressions else {}
  for path in tree.files:
    ending = file_tree.extension(path)
    if ending in (*AUDIO, *FEATURES):
      continue
    if ending not in VIDEO:
      yield Skipped(path, 'not a video file', ending)
      continue
    take = parse(path[: -len(ending)])
    if take is None:
      yield Skipped(path, 'path not understood', f'expected {LAYOUT}')
      continue
    take = take._replace(view=take.view or 'front')
    if take.view not in views:
      continue
    any_view = take._replace(view='')
    recording = f'{take.person}_{take.emotion}_{take.level}_{take.number}'
    yield ClipFile(
      clip_id=f'{take.person}_{take.view}_{take.emotion}_{take.level}_{take.number}',
      video_id=recording,
      identity=f'mead/{take.person}',
      dataset='mead',
      emotion=take.emotion,
      intensity=take.level,
      video=path,
      audio=audio.get(take) or audio.get(any_view, ''),
      expression=features.get(take) or features.get(any_view, ''),
    )
