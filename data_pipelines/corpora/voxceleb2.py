"""VoxCeleb2: speech of thousands of people, in small pictures, without labels of
emotion.

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
  """Finds all utterances; a part without `dev` or `test` in its path counts as dev.

  The sound comes from `aac`.
  """
  sounds = {
    (_part(path), tail.group()): path
    for path in tree.files
    if file_tree.extension(path) in AUDIO
    for tail in [_TAIL.search(path[: -len(file_tree.extension(path))])]
    if tail
  }
  for path in tree.files:
    ending = file_tree.extension(path)
    if ending in (*AUDIO, *FEATURES):
      continue
    if ending not in VIDEO:
      yield Skipped(path, 'no video file', ending)
      continue
    tail = _TAIL.search(path[: -len(ending)])
    if tail is None:
      yield Skipped(path, 'path not understood', f'expected {LAYOUT}')
      continue
    person, video, number = tail.groups()
    clip_id = f'{person}_{video}_{number}'
    yield ClipFile(
      clip_id=clip_id,
      video_id=f'{person}/{video}',
      identity=f'vox2/{person}',
      dataset='voxceleb2',
      video=path,
      audio=sounds.get((_part(path), tail.group()), ''),
      split='test' if _part(path) == 'test' else '',
      expression=expressions
      and (
        expressions.find(path[: -len(ending)], FEATURES)
        or expressions.find(clip_id, FEATURES)
      )
      or '',
    )


def _part(path: str) -> str:
  return next((part for part in path.split('/')[:-1] if part in ('dev', 'test')), 'dev')
