"""Assigns clips to training, validation and test: no person is in two of them."""

from collections.abc import Iterable, Mapping, Sequence
import hashlib

from data_pipelines.corpora.clip_file import ClipFile

SPLITS = ('train', 'val', 'test')
MEAD_TEST = ('mead/M003', 'mead/M030', 'mead/W009', 'mead/W015', 'mead/M037')

_HDTF_TEST_VIDEOS = 20  # of the paper
_VAL_SHARE = 0.05  # of the people
_TEST_SHARE = 0.1


def assign(corpus: str, clips: Sequence[ClipFile], seed: int = 0) -> dict[str, str]:
  """Gives the split of every clip, by its id.

  Test: MEAD's five actors; 20 videos of HDTF (at most a fifth of them); the test part
  of VoxCeleb2. Clips of a user's folder keep a split of their own. If no clip has one,
  a tenth of the people is for test.

  Validation: a twentieth of the other people, and at least one person of two. People
  are drawn in an order that depends on `seed` and their names alone, so more clips
  change little.
  """
  split = {clip.clip_id: clip.split for clip in clips if clip.split}
  rest = [clip for clip in clips if not clip.split]
  people = _sizes(rest, count_videos=corpus == 'hdtf')

  # 1. Test
  test: set[str] = set()
  if corpus == 'mead':
    test = set(MEAD_TEST)
  elif corpus == 'hdtf':
    test = _draw(people, min(_HDTF_TEST_VIDEOS, sum(people.values()) // 5), seed)
  elif corpus == 'folder' and not split:
    test = _draw(people, int(_TEST_SHARE * len(people)), seed)

  # 2. Validation
  people = {person: size for person, size in people.items() if person not in test}
  val: set[str] = set()
  if len(people) > 1 and 'val' not in split.values():
    share = int(_VAL_SHARE * sum(people.values()))
    val = _draw(people, max(min(people.values()), share), seed + 1)

  # 3. Training: all others
  for clip in rest:
    if clip.identity in test:
      split[clip.clip_id] = 'test'
    elif clip.identity in val:
      split[clip.clip_id] = 'val'
    else:
      split[clip.clip_id] = 'train'
  return split


def shared_people(clips: Iterable[ClipFile], split: Mapping[str, str]) -> list[str]:
  """Finds people in more than one split.

  Only splits that a user's own CSV assigns can share people.
  """
  splits_of: dict[str, set[str]] = {}
  for clip in clips:
    splits_of.setdefault(clip.identity, set()).add(split[clip.clip_id])
  return sorted(person for person, splits in splits_of.items() if len(splits) > 1)


def _sizes(clips: Iterable[ClipFile], count_videos: bool) -> dict[str, int]:
  """Gives how much each person counts: the number of their videos, or one."""
  videos: dict[str, set[str]] = {}
  for clip in clips:
    videos.setdefault(clip.identity, set()).add(clip.video_id if count_videos else '')
  return {person: len(theirs) for person, theirs in videos.items()}


def _draw(sizes: Mapping[str, int], total: int, seed: int) -> set[str]:
  """Draws people in random order; anyone who would exceed `total` is passed over."""
  drawn = set()
  shuffled = sorted(
    sizes, key=lambda person: hashlib.sha256(f'{seed}/{person}'.encode()).digest()
  )
  for person in shuffled:
    if sizes[person] <= total:
      drawn.add(person)
      total -= sizes[person]
  return drawn
