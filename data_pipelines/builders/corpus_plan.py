"""The plan of a preparation, made before any video is opened.

It states which clips will be prepared, in which split, and the name of the data set.
"""

import collections
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
import dataclasses
import functools
import hashlib
import itertools
import json
import re
from types import ModuleType
from typing import Any

from data_pipelines import preprocess, splits
from data_pipelines.builders.corpus_workers import sizes
from data_pipelines.corpora import folder, hdtf, mead, voxceleb2
from data_pipelines.corpora.clip_file import ClipFile, Skipped, reasons
from data_pipelines.corpora.file_tree import Tree
from data_pipelines.preprocess import CorpusConfig
from dicetalk_jax.errors import InputError

WALKERS: dict[str, ModuleType] = {
  'mead': mead,
  'hdtf': hdtf,
  'voxceleb2': voxceleb2,
  'folder': folder,
}
_PIECE = re.compile(r'(.+)_p\d{2,}')  # how `preprocess` names the pieces of a clip


@dataclasses.dataclass(frozen=True)
class Plan:
  """The clips of a corpus.

  Attributes:
    config: how they are prepared.
    tree: the corpus.
    expressions: files of expression features, if there are any.
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
    """Name of the folder of finished clips; it depends on the settings."""
    return _digest(dataclasses.asdict(self.config))

  @functools.cached_property
  def name(self) -> str:
    """Name of the data set.

    It is readable, and depends on the settings, clips, splits, and sizes of files.
    """
    config = dataclasses.asdict(self.config)
    clips = {
      split: [
        [dataclasses.asdict(clip), sizes(clip, self.tree, self.expressions)]
        for clip in clips
      ]
      for split, clips in self.clips.items()
    }
    readable = f'{self.config.content}_{self.config.size}px'
    return f'{readable}_{_digest([config, clips])}'

  def summary(self) -> str:
    """Describes the plan in a few lines for the terminal."""
    lines = []
    for split, clips in self.clips.items():
      people = {clip.identity for clip in clips}
      lines.append(f'{split:5} {len(clips):7} clips {len(people):5} people')
    lines.append(f'left out: {reasons(self.skipped)}')
    lines += [f'note: {note}' for note in self.notes]
    return '\n'.join(lines)


def _digest(value: Any) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def make_plan(
  config: CorpusConfig, root: str, expression_root: str = '', **walk: Any
) -> Plan:
  """Walks a corpus.

  Args:
    config: how clips are prepared. The width of the features that are found replaces
      `expression_dim`.
    root: folder of the corpus.
    expression_root: folder of expression features; '' if there is none.
    **walk: settings of the walker.

  Raises:
    InputError: there is no such folder, or no clip in it.
  """
  # 1. Find the clips
  tree = Tree(root)
  expressions = Tree(expression_root, '--expression') if expression_root else None
  walker = WALKERS[config.corpus]
  clips, skipped = _unique(walker.walk, tree, expressions, **walk)
  skipped += tree.left_out
  if expressions:
    skipped += expressions.left_out
  if not clips:
    first = ''
    if skipped:
      first = (
        f'; the first of {len(skipped)} left out is {skipped[0].clip} '
        f'({skipped[0].reason})'
      )
    raise InputError(
      f'no clip of {config.corpus} was found in {root}; expected {walker.LAYOUT}{first}'
    )
  notes = []
  if config.corpus == 'hdtf':
    notes += [str(counts) for counts in hdtf.metadata(tree)[1]]

  # 2. Find their expression features
  if config.corpus == 'folder' and expressions is None:
    expressions = tree  # features that the labels name lie in the folder itself
  paths = [clip.expression for clip in clips if clip.expression]
  if expression_root and not paths:
    raise InputError(
      f'--expression={expression_root} holds features of none of the {len(clips)} '
      'clips; name them after the videos or the clips, see docs/data.md'
    )
  if expressions and paths:
    width = preprocess.expression_dim(itertools.islice(paths, 100), config, expressions)
    config = dataclasses.replace(config, expression_dim=width)
    without = len(clips) - len(paths)
    if without:
      notes.append(f'{without} of {len(clips)} clips have no expression features')

  # 3. Split them
  by_split, split_notes = _split(config.corpus, clips, root)
  notes += split_notes
  return Plan(config, tree, expressions, by_split, tuple(skipped), tuple(notes))


def prepared_splits(
  plan: Plan, clip_ids: Collection[str]
) -> tuple[dict[str, list[ClipFile]], list[str]]:
  """Gives the clips that could be prepared by split, and notes for the user.

  They stay in the splits of the plan. If one of these lost all its clips, the splits
  are drawn again among the clips that are left.

  Args:
    plan: the plan.
    clip_ids: of the clips that could be prepared.
  """
  by_split = {
    split: [clip for clip in clips if clip.clip_id in clip_ids]
    for split, clips in plan.clips.items()
  }
  lost = [split for split, clips in by_split.items() if not clips]
  if not lost:
    return by_split, []
  left = [clip for clips in by_split.values() for clip in clips]
  by_split = _grouped(left, splits.assign(plan.config.corpus, left))
  notes = [
    f'all clips of the split {" and ".join(lost)} were left out, so the splits were '
    'drawn again among the others'
  ]
  missing = [split for split in plan.clips if split not in by_split]
  if missing:
    notes.append(
      f'the people that are left do not make the split {" and ".join(missing)}; add '
      'people'
    )
  return by_split, notes


def _grouped(
  clips: Sequence[ClipFile], split: Mapping[str, str]
) -> dict[str, list[ClipFile]]:
  """Gives the clips by split, without empty splits."""
  by_split = {}
  for name in splits.SPLITS:
    chosen = [clip for clip in clips if split[clip.clip_id] == name]
    if chosen:
      by_split[name] = chosen
  return by_split


def _split(
  corpus: str, clips: Sequence[ClipFile], root: str
) -> tuple[dict[str, list[ClipFile]], list[str]]:
  """Gives the clips by split, without empty splits, and notes for the user."""
  notes = []
  split = splits.assign(corpus, clips)
  shared = splits.shared_people(clips, split)
  if shared:
    notes.append(
      f'{len(shared)} people are in more than one split: {", ".join(shared[:3])}'
    )
  by_split = _grouped(clips, split)
  if 'train' not in by_split:
    raise InputError(
      f'all {len(clips)} clips in {root} belong to {" and ".join(by_split)}, none to '
      'training; add other people'
    )
  if 'val' not in by_split:
    notes.append(
      'there is no validation split, which training needs; add another person'
    )
  return by_split, notes


def _unique(
  walk: Callable[..., Iterator[ClipFile | Skipped]], *args, **kwargs
) -> tuple[list[ClipFile], list[Skipped]]:
  """Walks a corpus, and keeps the first of each clip.

  If clips of several recordings share an id, or an id is that of a piece of another
  clip, a hash of the recording is added to it.
  """
  # 1. Leave out clips that come twice
  clips: dict[tuple[str, str], ClipFile] = {}
  skipped = []
  for found in walk(*args, **kwargs):
    if isinstance(found, Skipped):
      skipped.append(found)
      continue
    key = (found.clip_id, found.video_id)
    if key in clips:
      skipped.append(Skipped(found.video, 'the same clip twice', clips[key].video))
    else:
      clips[key] = found

  # 2. Give every clip its own id
  counts = collections.Counter(clip_id for clip_id, _ in clips)
  unique = []
  for clip in clips.values():
    piece = _PIECE.fullmatch(clip.clip_id)
    if counts[clip.clip_id] > 1 or (piece and piece[1] in counts):
      clip_id = f'{clip.clip_id}_{_digest(clip.video_id)}'
      clip = dataclasses.replace(clip, clip_id=clip_id)
    unique.append(clip)
  return unique, skipped
