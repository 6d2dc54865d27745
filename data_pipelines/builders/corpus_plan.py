"""What a preparation will do, before a single video is opened: which clips, in which
split, under which name.
"""

import collections
from collections.abc import Callable, Iterator, Mapping
import dataclasses
import functools
import hashlib
import itertools
import json
import re
from typing import Any

from data_pipelines import preprocess, splits
from data_pipelines.builders.corpus_workers import sizes
from data_pipelines.corpora import folder, hdtf, mead, voxceleb2
from data_pipelines.corpora.clip_file import ClipFile, Skipped, reasons
from data_pipelines.corpora.file_tree import Tree
from data_pipelines.preprocess import CorpusConfig
from dicetalk_jax.errors import InputError

WALKERS = {'mead': mead, 'hdtf': hdtf, 'voxceleb2': voxceleb2, 'folder': folder}
_PIECE = re.compile(r'(.+)_p\d{2,}')  # what `preprocess` calls the pieces of a clip


@dataclasses.dataclass(frozen=True)
class Plan:
  """The clips of a corpus.

  Attributes:
    clips: by split.
    skipped: what the walker left out.
    notes: what the user should know.
  """

  config: CorpusConfig
  tree: Tree
  expressions: Tree | None
  clips: Mapping[str, list[ClipFile]]
  skipped: tuple[Skipped, ...]
  notes: tuple[str, ...] = ()

  @functools.cached_property
  def work_name(self) -> str:
    """Different for different settings."""
    return _digest(dataclasses.asdict(self.config))

  @functools.cached_property
  def name(self) -> str:
    """Of the data set: readable, and different for different settings, clips, splits
    and sizes of their files.
    """
    clips = {
      split: [
        [dataclasses.asdict(clip), sizes(clip, self.tree, self.expressions)]
        for clip in clips
      ]
      for split, clips in self.clips.items()
    }
    return f'{self.config.content}_{self.config.size}px_{_digest([dataclasses.asdict(self.config), clips])}'

  def summary(self) -> str:
    """A few lines for the terminal."""
    lines = [
      f'{split:5} {len(clips):7} clips {len({clip.identity for clip in clips}):5} '
      'people'
      for split, clips in self.clips.items()
    ]
    return '\n'.join(
      [
        *lines,
        f'left out: {reasons(self.skipped)}',
        *(f'note: {note}' for note in self.notes),
      ]
    )


def _digest(value: Any) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def make_plan(
  config: CorpusConfig, root: str, expression_root: str = '', **walk: Any
) -> Plan:
  """Walks a corpus.

  Args:
    config: how clips are prepared; `expression_dim` is set to the width of the features
      that are found.
    root: folder of the corpus.
    expression_root: folder of expression features; '' for none.
    **walk: settings of the corpus' walker.

  Raises:
    InputError: there is no such folder, or nothing in it that is known.
  """
  tree = Tree(root)
  expressions = Tree(expression_root, '--expression') if expression_root else None
  walker = WALKERS[config.corpus]
  clips, skipped = _unique(walker.walk, tree, expressions, **walk)
  if not clips:
    first = (
      f'; of {len(skipped)} passed over, the first is {skipped[0].clip} '
      f'({skipped[0].reason})'
      if skipped
      else ''
    )
    raise InputError(
      f'no clip of {config.corpus} was found in {root}; expected {walker.LAYOUT}{first}'
    )
  if config.corpus == 'folder' and expressions is None:
    expressions = tree  # features that the labels name lie in the folder itself
  notes = (
    [str(counts) for counts in hdtf.metadata(tree)[1]]
    if config.corpus == 'hdtf'
    else []
  )
  paths = [clip.expression for clip in clips if clip.expression]
  if expression_root and not paths:
    raise InputError(
      f'--expression={expression_root} holds features of none of the {len(clips)} '
      'clips; name them as the videos or as the clips, see docs/data.md'
    )
  if paths:
    width = preprocess.expression_dim(itertools.islice(paths, 100), config, expressions)
    config = dataclasses.replace(config, expression_dim=width)
    if len(paths) < len(clips):
      notes.append(
        f'{len(clips) - len(paths)} of {len(clips)} clips have no expression features'
      )
  split = splits.assign(config.corpus, clips)
  if shared := splits.shared_people(clips, split):
    notes.append(
      f'{len(shared)} people are in more than one split: {", ".join(shared[:3])}'
    )
  by_split = {
    name: ours
    for name in splits.SPLITS
    if (ours := [clip for clip in clips if split[clip.clip_id] == name])
  }
  if 'train' not in by_split:
    raise InputError(
      f'all {len(clips)} clips in {root} belong to {" and ".join(by_split)}, none to '
      'training; add other people'
    )
  if 'val' not in by_split:
    notes.append(
      'there is no validation split, which training asks for; add another person'
    )
  return Plan(config, tree, expressions, by_split, tuple(skipped), tuple(notes))


def _unique(
  walk: Callable[..., Iterator[ClipFile | Skipped]], *args, **kwargs
) -> tuple[list[ClipFile], list[Skipped]]:
  """The first of each clip; ids that clips of several recordings share get a hash of
  the recording.
  """
  clips: dict[tuple[str, str], ClipFile] = {}
  skipped = []
  for found in walk(*args, **kwargs):
    if isinstance(found, Skipped):
      skipped.append(found)
    elif (key := (found.clip_id, found.video_id)) in clips:
      skipped.append(Skipped(found.video, 'the same clip twice', clips[key].video))
    else:
      clips[key] = found
  counts = collections.Counter(clip_id for clip_id, _ in clips)

  def told_apart(clip: ClipFile) -> ClipFile:
    piece = _PIECE.fullmatch(clip.clip_id)
    if counts[clip.clip_id] == 1 and not (piece and piece[1] in counts):
      return clip
    return dataclasses.replace(clip, clip_id=f'{clip.clip_id}_{_digest(clip.video_id)}')

  return [told_apart(clip) for clip in clips.values()], skipped
