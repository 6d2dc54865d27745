"""VoxCeleb2: speech of thousands of people, in small frames, without emotion labels.

{dev,test}/mp4/<idNNNNN>/<video>/<nnnnn>.mp4
{dev,test}/aac/<idNNNNN>/<video>/<nnnnn>.m4a
"""

from collections.abc import Iterator
import re

from data_pipelines.corpora import file_tree
from data_pipelines.corpora.clip_file import AUDIO, FEATURES, VIDEO, ClipFile, Skipped
from data_pipelines.corpora.file_tree import Tree

LAYOUT = '{dev,test}/mp4/<idNNNNN>/<video>/<nnnnn>.mp4'
_TAIL = re.compile(r'(id\d{5})/([^/]+)/(\d+)$')


def walk(tree: Tree, expressions: Tree | None = None) -> Iterator[ClipFile | Skipped]:
  """Finds all utterances; the audio comes from the `aac` folders.

  Files without `dev` or `test` in their path count as dev.
  """
  audio = _audio_files(tree)
  for path in tree.files:
    ending = file_tree.extension(path)
    if ending in (*AUDIO, *FEATURES):
      continue
    if ending not in VIDEO:
      yield Skipped(path, 'not a video file', ending)
      continue
    stem = path[: -len(ending)]
    tail = _TAIL.search(stem)
    if tail is None:
      yield Skipped(path, 'path not understood', f'expected {LAYOUT}')
      continue
    person, video, number = tail.groups()
    clip_id = f'{person}_{video}_{number}'
    expression = ''
    if expressions:
      expression = expressions.find(stem, FEATURES) or expressions.find(
        clip_id, FEATURES
      )
    yield ClipFile(
      clip_id=clip_id,
      video_id=f'{person}/{video}',
      identity=f'vox2/{person}',
      dataset='voxceleb2',
      video=path,
      audio=audio.get((_part(path), tail.group()), ''),
      split='test' if _part(path) == 'test' else '',
      expression=expression,
    )


def _audio_files(tree: Tree) -> dict[tuple[str, str], str]:
  """Finds audio files, by part and by person, video and number."""
  found = {}
  for path in tree.files:
    ending = file_tree.extension(path)
    if ending in AUDIO:
      tail = _TAIL.search(path[: -len(ending)])
      if tail:
        found[_part(path), tail.group()] = path
  return found


def _part(path: str) -> str:
  """Gives the part of the corpus that a path belongs to: dev or test."""
  for folder in path.split('/')[:-1]:
    if folder in ('dev', 'test'):
      return folder
  return 'dev'
