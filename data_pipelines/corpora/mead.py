"""MEAD: 8 emotions at 3 levels in 7 views, said by actors.

    <ID>/video/<view>/<emotion>/level_<1|2|3>/<nnn>.mp4
    <ID>/audio/<emotion>/level_<1|2|3>/<nnn>.m4a

Paths are read by what stands in them and not by their depth, so that trees with an
extra `<ID>_video/`, sound by view, `.wav`, `<emotion>_level_<k>` and the flat names of
other projects (`M003_ang_3_004`, `M003_front_angry_level3_004`) are found alike.
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
_NAMES = {**{e: e for e in EMOTIONS}, **_OTHER_NAMES, **{e[:3]: e for e in EMOTIONS}}
_PERSON = re.compile(r'(?<![A-Za-z0-9])([MW]\d{3})(?![A-Za-z0-9])')
_EMOTION = re.compile(
  rf'(?<![a-z])({"|".join(sorted(_NAMES, key=len, reverse=True))})(?![a-z])'
)
_LEVEL = re.compile(r'level_?([123])(?!\d)')
_FLAT_LEVEL = re.compile(r'[a-z]_([123])_\d+$')
_VIEW = re.compile(r'(?<![a-z])(?:(left|right)_?(30|60)|front|down|top)(?![a-z0-9])')
_NUMBER = re.compile(r'(\d+)$')


class Take(NamedTuple):
  """What a path says; `view` is '' where it says none."""

  person: str
  emotion: str
  level: int
  number: str
  view: str


def parse(path: str) -> Take | None:
  """Reads a path without its extension; None where person, emotion, level or number
  is missing.
  """
  lower = path.lower()
  person, emotion, number = (
    _PERSON.search(path),
    _EMOTION.findall(lower),
    _NUMBER.search(path),
  )
  level = _LEVEL.search(lower) or _FLAT_LEVEL.search(lower)
  if not (person and emotion and level and number):
    return None
  view = _VIEW.search(lower)
  view = '' if not view else f'{view[1]}_{view[2]}' if view[1] else view[0]
  return Take(person[1], _NAMES[emotion[-1]], int(level[1]), number[1].zfill(3), view)


def _index(tree: Tree, extensions: Sequence[str]) -> dict[Take, str]:
  """Files of these kinds by what their paths say."""
  paths = [path for path in tree.files if file_tree.extension(path) in extensions]
  return {
    take: path
    for path in paths
    if (take := parse(path[: -len(file_tree.extension(path))]))
  }


def walk(
  tree: Tree, expressions: Tree | None = None, views: Sequence[str] = ('front',)
) -> Iterator[ClipFile | Skipped]:
  """Finds the clips of these views; other views are left out silently.

  The sound comes from the audio tree, which holds one file for all views, or else from
  the video.
  """
  sounds = _index(tree, AUDIO)
  features = _index(expressions, FEATURES) if expressions else {}
  for path in tree.files:
    ending = file_tree.extension(path)
    if ending in (*AUDIO, *FEATURES):
      continue
    if ending not in VIDEO:
      yield Skipped(path, 'no video file', ending)
      continue
    take = parse(path[: -len(ending)])
    if take is None:
      yield Skipped(path, 'path not understood', f'expected {LAYOUT}')
      continue
    take = take._replace(view=take.view or 'front')
    if take.view not in views:
      continue
    bare = take._replace(view='')
    recording = f'{take.person}_{take.emotion}_{take.level}_{take.number}'
    yield ClipFile(
      clip_id=f'{take.person}_{take.view}_{take.emotion}_{take.level}_{take.number}',
      video_id=recording,
      identity=f'mead/{take.person}',
      dataset='mead',
      emotion=take.emotion,
      intensity=take.level,
      video=path,
      audio=sounds.get(take) or sounds.get(bare, ''),
      expression=features.get(take) or features.get(bare, ''),
    )
