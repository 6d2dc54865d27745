"""Which clips are for training, validation and test: no person is in two of them."""

from collections.abc import Iterable, Sequence
import hashlib

from data_pipelines.corpora.clip_file import ClipFile

SPLITS = ('train', 'val', 'test')
MEAD_TEST = tuple(
  f'mead/{person}' for person in ('M003', 'M030', 'W009', 'W015', 'M037')
)

_HDTF_TEST_VIDEOS = 20  # of the paper
_VAL_SHARE, _TEST_SHARE = 0.05, 0.1


def assign(corpus: str, clips: Sequence[ClipFile], seed: int = 0) -> dict[str, str]:
  """The split of every clip, by its id.

  Test: MEAD's five actors, 20 videos of HDTF (at most a fifth of those there) and the
  test part of VoxCeleb2. In a user's folder, clips with a split of their own keep it;
  where none has, a tenth of the people is for test. Validation: a twentieth of the
  people who remain, at least one of two. People are drawn in an order that depends on
  `seed` and their names alone, so that more clips change little.
  """
  split = {}
  for clip in clips:
    if clip.split:
      split[clip.clip_id] = clip.split
  rest = [clip for clip in clips if clip.clip_id not in split]
  people = _sizes(rest, videos=corpus == 'hdtf')
  if corpus == 'mead':
    test = set(MEAD_TEST)
  elif corpus == 'hdtf':
    test = _draw(people, min(_HDTF_TEST_VIDEOS, sum(people.values()) // 5), seed)
  elif corpus == 'folder' and not split:
    test = _draw(people, int(_TEST_SHARE * len(people)), seed)
  else:
    test = set()
  people = {person: size for person, size in people.items() if person not in test}
  val = set()
  if len(people) > 1 and 'val' not in split.values():
    val = _draw(
      people,
      max(min(people.values()), int(_VAL_SHARE * sum(people.values()))),
      seed + 1,
    )
  for clip in rest:
    split[clip.clip_id] = (
      'test' if clip.identity in test else 'val' if clip.identity in val else 'train'
    )
  return split


def shared_people(clips: Iterable[ClipFile], split: dict[str, str]) -> list[str]:
  """People in more than one split, which only a user's own column of splits can
  bring about.
  """
  places: dict[str, set[str]] = {}
  for clip in clips:
    places.setdefault(clip.identity, set()).add(split[clip.clip_id])
  return sorted(person for person, splits in places.items() if len(splits) > 1)


def _sizes(clips: Iterable[ClipFile], videos: bool) -> dict[str, int]:
  """How much each person counts: by videos, or one each."""
  found: dict[str, set[str]] = {}
  for clip in clips:
    found.setdefault(clip.identity, set()).add(clip.video_id if videos else '')
  return {person: len(videos) for person, videos in found.items()}


def _draw(sizes: dict[str, int], total: int, seed: int) -> set[str]:
  """People in random order as long as together they do not exceed `total`; who
  would, is passed over.
  """
  drawn = set()
  for person in sorted(
    sizes, key=lambda person: hashlib.sha256(f'{seed}/{person}'.encode()).digest()
  ):
    if sizes[person] <= total:
      drawn.add(person)
      total -= sizes[person]
  return drawn
