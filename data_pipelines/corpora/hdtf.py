"""HDTF: speeches in high resolution.

The corpus consists of metadata. Its videos come from YouTube, so many are missing.

    HDTF_dataset/{RD,WDA,WRA}_{video_url,annotion_time,crop_wh,resolution}.txt

Next to it, in any folder, whole videos:

    <subset>_<name>.mp4, <subset>/<name>.mp4 or <name>.mp4

or clips that were cut and cropped before:

    <name>_<i>.mp4, with or without the subset
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

_START = re.compile(r'&t=.*')  # in an address: where in the video to start
_YOUTUBE = re.compile(r'(?:[?&]v=|youtu\.be/|/shorts/|/embed/)([\w-]+)')
_INTERVAL = re.compile(r'((?:\d+:)?\d+:\d+)-((?:\d+:)?\d+:\d+)')


@dataclasses.dataclass(frozen=True)
class Video:
  """One annotated video.

  Attributes:
    intervals: seconds (start, end) of its clips; clip `i` is the i-th, whether or not
      it has a crop box.
    crops: (left, top, width, height) by clip number, in pixels of a frame of `height`
      rows.
    height: 720, 1080 or 2160, rarely another; 0 if it is not listed.
    person: the person that it shows.
  """

  subset: str
  name: str
  intervals: tuple[tuple[int, int], ...]
  crops: Mapping[int, tuple[int, int, int, int]]
  height: int
  person: str

  @property
  def identity(self) -> str:
    """Global key of the person. All speakers of the radio count as one."""
    person = 'Radio' if self.subset == 'RD' else self.person
    return f'hdtf/{self.subset}/{person}'


@dataclasses.dataclass(frozen=True)
class Counts:
  """How much the metadata of one subset lists."""

  subset: str
  urls: int
  annotated: int
  clips: int
  with_box: int
  hours: float

  def __str__(self) -> str:
    text = (
      f'{self.subset} lists {self.urls} URLs, {self.annotated} annotated videos, '
      f'{self.clips} clips, {self.with_box} with a crop box, {self.hours:.2f} h'
    )
    published = PUBLISHED[self.subset]
    if (self.urls, self.annotated, self.clips, self.with_box) != published:
      text += f' (the published files: {", ".join(map(str, published))})'
    return text


def metadata(tree: Tree) -> tuple[list[Video], list[Counts]]:
  """Reads the text files of all subsets in a tree.

  Raises:
    InputError: there is no file of intervals.
  """
  videos = []
  counts = []
  for subset in SUBSETS:
    found, addresses = _read_subset(tree, subset)
    if found:
      videos += found
      counts.append(_count(subset, found, addresses))
  if not videos:
    names = [f'{subset}_annotion_time.txt' for subset in SUBSETS]
    raise InputError(
      f'{tree.address} holds none of {", ".join(names)}; put the HDTF_dataset folder '
      "of the corpus' repository next to the videos"
    )
  return videos, counts


def youtube_ids(tree: Tree) -> dict[str, str]:
  """Reads which YouTube video each video of the corpus is, by `video_id` of its clips.

  Addresses of another form are left out.
  """
  found = {}
  for subset in SUBSETS:
    for name, words in _read_table(tree, subset, 'video_url').items():
      video = _YOUTUBE.search(words[0])
      if video:
        found[f'{subset}_{name}'] = video[1]
  return found


def _read_subset(tree: Tree, subset: str) -> tuple[list[Video], int]:
  """Reads the annotated videos of one subset, and its number of addresses."""
  addresses = _read_table(tree, subset, 'video_url')
  times = _read_table(tree, subset, 'annotion_time')
  people = _people(times, addresses)
  crops = {}
  for clip, words in _read_table(tree, subset, 'crop_wh').items():
    numbers = _numbers(words)
    if len(numbers) == 4:
      left, width, top, height = numbers
      crops[clip] = (left, top, width, height)
  heights = {}
  for name, words in _read_table(tree, subset, 'resolution').items():
    numbers = _numbers(words)
    if numbers:
      heights[name] = numbers[0]
  videos = []
  for name, words in times.items():
    intervals = tuple(
      (_seconds(start), _seconds(end))
      for start, end in _INTERVAL.findall(' '.join(words))
    )
    clips = {i: f'{name}_{i}' for i in range(len(intervals))}
    boxes = {i: crops[clip] for i, clip in clips.items() if clip in crops}
    videos.append(
      Video(subset, name, intervals, boxes, heights.get(name, 0), people[name])
    )
  return videos, len(addresses)


def _count(subset: str, videos: Sequence[Video], addresses: int) -> Counts:
  intervals = [interval for video in videos for interval in video.intervals]
  return Counts(
    subset,
    urls=addresses,
    annotated=len(videos),
    clips=len(intervals),
    with_box=sum(len(video.crops) for video in videos),
    hours=sum(end - start for start, end in intervals) / 3600,
  )


def _read_table(tree: Tree, subset: str, kind: str) -> dict[str, list[str]]:
  """Reads lines `<name>[.mp4] <value> ...`, by name without the subset."""
  wanted = f'{subset}_{kind}.txt'
  table = {}
  for path in tree.files:
    if posixpath.basename(path) != wanted:
      continue
    for line in tree.read_text(path).splitlines():
      words = line.split()
      if len(words) > 1:
        name = words[0].removesuffix('.mp4').removeprefix(f'{subset}_')
        table[name] = words[1:]
    break  # copies of the file count once
  return table


def _people(
  names: Iterable[str], addresses: Mapping[str, Sequence[str]]
) -> dict[str, str]:
  """Finds the person that each video shows, by its name.

  Names of videos of one person differ by trailing digits only. One video is listed
  twice, under two names of its speaker: names that share an address are one person.
  """
  first_at: dict[str, str] = {}  # first name at an address
  same_as: dict[str, str] = {}
  for name, words in addresses.items():
    person = _without_digits(name)
    first = first_at.setdefault(_START.sub('', words[0]), person)
    if first != person:
      same_as[person] = first
  people = {}
  for name in names:
    person = _without_digits(name)
    people[name] = same_as.get(person, person)
  return people


def _without_digits(name: str) -> str:
  return name.rstrip('0123456789')


def _numbers(words: Sequence[str]) -> list[int]:
  return [int(word) for word in words if word.isdigit()]


def _seconds(time: str) -> int:
  total = 0
  for part in time.split(':'):
    total = 60 * total + int(part)
  return total


def walk(tree: Tree, expressions: Tree | None = None) -> Iterator[ClipFile | Skipped]:
  """Finds the annotated clips among the videos of a tree."""
  found: dict[str, list[str]] = {}
  for path in tree.files:
    ending = file_tree.extension(path)
    if ending in VIDEO:
      found.setdefault(posixpath.basename(path)[: -len(ending)], []).append(path)
    elif ending not in (*AUDIO, *FEATURES):
      yield Skipped(path, 'not a video file', ending)
  for video in metadata(tree)[0]:
    yield from _clips(video, found, expressions)
  for name, paths in found.items():
    for path in paths:
      yield Skipped(path, 'not in the metadata', name)


def _clips(
  video: Video, found: dict[str, list[str]], expressions: Tree | None
) -> Iterator[ClipFile | Skipped]:
  """Makes the clips of one video.

  An interval that covers another is an error of the annotation, and left out.
  Neighbours may share a second: both are kept.

  Args:
    video: the metadata.
    found: paths by name of the file; those of this video are removed.
    expressions: files of expression features.
  """
  whole = _take(found, video, '')
  cuts = [
    _take(found, video, f'_{i}') or _take(found, video, f'_{i:03d}')
    for i in range(len(video.intervals))
  ]
  available = [
    (start, end)
    for (start, end), cut in zip(video.intervals, cuts)
    if (cut or whole) and start < end
  ]
  taken = set()
  for i, ((start, end), cut) in enumerate(zip(video.intervals, cuts)):
    covers_another = any(
      start <= other_start and other_end <= end
      for other_start, other_end in available
      if (other_start, other_end) != (start, end)
    )
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
    elif start >= end or covers_another:
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
  """Finds the file `<subset>_<name><suffix>` or `<name><suffix>`, and removes it.

  Files in the folder of another subset do not count. The result is '' if there is none.
  """
  other_subsets = set(SUBSETS) - {video.subset}
  for name in (f'{video.subset}_{video.name}{suffix}', f'{video.name}{suffix}'):
    for path in found.get(name, ()):
      folders = set(path.split('/')[:-1])
      if not folders & other_subsets:
        found[name].remove(path)
        return path
  return ''


def _with_expression(clip: ClipFile, expressions: Tree | None) -> ClipFile:
  """Adds features of the clip, or else of the whole video."""
  if not expressions:
    return clip
  of_clip = expressions.find(clip.clip_id, FEATURES)
  if of_clip:
    return dataclasses.replace(clip, expression=of_clip, expression_of_video=False)
  stem = posixpath.splitext(clip.video)[0]
  of_video = expressions.find(stem, FEATURES)
  if not of_video:
    of_video = expressions.find(posixpath.basename(stem), FEATURES)
  return dataclasses.replace(clip, expression=of_video)
