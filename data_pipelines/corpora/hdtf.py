"""HDTF: speeches in high resolution.

The corpus is metadata, videos come from YouTube; so many are missing.

HDTF_dataset/{RD,WDA,WRA}_{video_url,annotion_time,crop_wh,resolution}.txt
.../<subset>_<name>.mp4, .../<subset>/<name>.mp4 or .../<name>.mp4    whole videos
.../<name>_<i>.mp4                                                    or clips that were cut and cropped before
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import posixpath
import re

from data_pipelines.corpora import file_tree
from data_pipelines.corpora.clip_file import AUDIO, FEATURES, VIDEO, ClipFile, Skipped
from data_pipelines.corpora.file_tree import Tree
from dicetalk_jax.errors import InputError

LAYOUT = '{RD,WDA,WRA}_annotion_time.txt and <subset>_<name>.mp4'
SUBSETS = ('RD', 'WDA', 'WRA')
# URLs, annotated videos, clips and clips with a crop box in the corpus' repository.
PUBLISHED = {
  'RD': (57, 56, 66, 64),
  'WDA': (183, 183, 195, 189),
  'WRA': (130, 130, 175, 168),
}

_START = re.compile(r'&t=.*')  # where in the video to begin watching
_INTERVAL = re.compile(r'((?:\d+:)?\d+:\d+)-((?:\d+:)?\d+:\d+)')


@dataclasses.dataclass(frozen=True)
class Video:
  """One annotated video.

  Attributes:
    intervals: seconds (start, end) of its clips; clip `i` is the i-th, whether or not
      it has a crop box.
    crops: (left, top, width, height) by clip number, in pixels of a picture of `height`
      rows.
    height: 720, 1080 or 2160, rarely another; 0 where it is not listed.
    person: whom it shows.
  """

  subset: str
  name: str
  intervals: tuple[tuple[int, int], ...]
  crops: Mapping[int, tuple[int, int, int, int]]
  height: int
  person: str

  @property
  def identity(self) -> str:
    """Speakers on the radio are not told apart."""
    return f'hdtf/{self.subset}/{"Radio" if self.subset == "RD" else self.person}'


@dataclasses.dataclass(frozen=True)
class Counts:
  """What the metadata of one subset lists."""

  subset: str
  urls: int
  annotated: int
  clips: int
  with_box: int
  hours: float

  def __str__(self) -> str:
    published = PUBLISHED[self.subset]
    other = (self.urls, self.annotated, self.clips, self.with_box) != published
    return (
      f'{self.subset} lists {self.urls} URLs, {self.annotated} annotated videos, '
      f'{self.clips} clips, {self.with_box} with a crop box, {self.hours:.2f} h'
      + f' (the published files: {", ".join(map(str, published))})'
      * other
    )


def metadata(tree: Tree) -> tuple[list[Video], list[Counts]]:
  """Reads the text files of all subsets that are there.

  Raises:
    InputError: there is no file of intervals.
  """
  videos, counts = [], []
  for subset in SUBSETS:
    table = {
      name: _table(tree, subset, name)
      for name in ('video_url', 'annotion_time', 'crop_wh', 'resolution')
    }
    crops = {
      key: (n[0], n[2], n[1], n[3])  # the file has x width y height
      for key, words in table['crop_wh'].items()
      if len(n := _numbers(words)) == 4
    }
    heights = {
      key: n[0] for key, words in table['resolution'].items() if (n := _numbers(words))
    }
    people = _people(table['annotion_time'], table['video_url'])
    ours = [
      _video(subset, name, words, crops, heights.get(name, 0), people[name])
      for name, words in table['annotion_time'].items()
    ]
    if ours:
      videos += ours
      seconds = sum(end - start for video in ours for start, end in video.intervals)
      counts.append(
        Counts(
          subset,
          len(table['video_url']),
          len(ours),
          sum(len(v.intervals) for v in ours),
          sum(len(v.crops) for v in ours),
          seconds / 3600,
        )
      )
  if not videos:
    raise InputError(
      f'{tree.address} holds none of '
      f'{", ".join(f"{s}_annotion_time.txt" for s in SUBSETS)}; put the HDTF_dataset '
      "folder of the corpus' repository beside the videos"
    )
  return videos, counts


def _table(tree: Tree, subset: str, kind: str) -> dict[str, list[str]]:
  """Lines `<name>[.mp4] <value> ...` by name; file names may lack the extension, and
  carry the subset.
  """
  wanted = f'{subset}_{kind}.txt'
  path = next((path for path in tree.files if posixpath.basename(path) == wanted), None)
  lines = [line.split() for line in tree.read_text(path).splitlines()] if path else []
  return {
    words[0].removesuffix('.mp4').removeprefix(f'{subset}_'): words[1:]
    for words in lines
    if len(words) > 1
  }


def _people(
  names: Iterable[str], addresses: Mapping[str, Sequence[str]]
) -> dict[str, str]:
  """By name of a video, whom it shows.

  Names of one person differ by trailing digits only.

  One video is listed twice, under two names of its speaker: whoever shares an address
  is one person.
  """

  def plain(name):
    return name.rstrip('0123456789')

  first, also = {}, {}
  for name, words in addresses.items():
    if (known := first.setdefault(_START.sub('', words[0]), plain(name))) != plain(
      name
    ):
      also[plain(name)] = known
  return {name: also.get(plain(name), plain(name)) for name in names}


def _video(
  subset: str,
  name: str,
  words: Sequence[str],
  crops: Mapping[str, tuple],
  height: int,
  person: str,
) -> Video:
  intervals = tuple(
    (_seconds(start), _seconds(end))
    for start, end in _INTERVAL.findall(' '.join(words))
  )
  boxes = {
    i: crops[f'{name}_{i}'] for i in range(len(intervals)) if f'{name}_{i}' in crops
  }
  return Video(subset, name, intervals, boxes, height, person)


def _numbers(words: Sequence[str]) -> list[int]:
  return [int(word) for word in words if word.isdigit()]


def _seconds(time: str) -> int:
  total = 0
  for part in time.split(':'):
    total = 60 * total + int(part)
  return total


def walk(tree: Tree, expressions: Tree | None = None) -> Iterator[ClipFile | Skipped]:
  """Finds the annotated clips among the videos that are there."""
  found: dict[str, list[str]] = {}
  for path in tree.files:
    ending = file_tree.extension(path)
    if ending in VIDEO:
      found.setdefault(posixpath.basename(path)[: -len(ending)], []).append(path)
    elif ending not in (*AUDIO, *FEATURES):
      yield Skipped(path, 'no video file', ending)
  for video in metadata(tree)[0]:
    yield from _clips(video, found, expressions)
  for name, paths in found.items():
    for path in paths:
      yield Skipped(path, 'not in the metadata', name)


def _clips(
  video: Video, found: dict[str, list[str]], expressions: Tree | None
) -> Iterator[ClipFile | Skipped]:
  """What was found of a video; it is taken out of `found`.

  An interval that covers another is a slip of the annotation. Neighbours may share a
  second: both are kept.
  """
  whole = _take(found, video, '')
  cuts = [
    _take(found, video, f'_{i}') or _take(found, video, f'_{i:03d}')
    for i in range(len(video.intervals))
  ]
  there = [
    (a, b) for (a, b), cut in zip(video.intervals, cuts) if (cut or whole) and a < b
  ]
  taken = set()
  for i, ((start, end), cut) in enumerate(zip(video.intervals, cuts)):
    clip_id = f'{video.subset}_{video.name}_{i}'
    clip = ClipFile(
      clip_id=clip_id,
      video_id=f'{video.subset}_{video.name}',
      identity=video.identity,
      dataset='hdtf',
      video=cut or whole,
    )
    if not clip.video:
      yield Skipped(clip_id, 'video missing', 'not downloaded')
    elif start >= end or any(
      start <= a and b <= end and (a, b) != (start, end) for a, b in there
    ):
      yield Skipped(clip_id, 'interval covers another or is empty', f'{start}-{end} s')
    elif (start, end) in taken:
      yield Skipped(clip_id, 'the same interval twice', f'{start}-{end} s')
    else:
      taken.add((start, end))
      if not cut:
        clip = dataclasses.replace(
          clip,
          start=float(start),
          end=float(end),
          crop=video.crops.get(i),
          crop_height=video.height,
        )
      yield _with_expression(clip, expressions)


def _take(found: dict[str, list[str]], video: Video, suffix: str) -> str:
  """The path of `<subset>_<name><suffix>` or `<name><suffix>`, not one of another
  subset; '' where there is none.
  """
  for name in (f'{video.subset}_{video.name}{suffix}', f'{video.name}{suffix}'):
    for path in found.get(name, ()):
      if not set(path.split('/')[:-1]) & (set(SUBSETS) - {video.subset}):
        found[name].remove(path)
        return path
  return ''


def _with_expression(clip: ClipFile, expressions: Tree | None) -> ClipFile:
  """Features of the clip come before features of the whole video."""
  if not expressions:
    return clip
  if own := expressions.find(clip.clip_id, FEATURES):
    return dataclasses.replace(clip, expression=own, expression_of_video=False)
  stem = posixpath.splitext(clip.video)[0]
  return dataclasses.replace(
    clip,
    expression=expressions.find(stem, FEATURES)
    or expressions.find(posixpath.basename(stem), FEATURES),
  )
