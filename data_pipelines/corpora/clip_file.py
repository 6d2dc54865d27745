"""The output of a corpus walker: clips to be prepared, and files it leaves out.

To add a corpus, write a module next to this one with `LAYOUT`, a description of its
files for error messages, and

    def walk(tree: Tree, expressions: Tree | None) -> Iterator[ClipFile | Skipped]

Then list it in `WALKERS` (builders/corpus_plan.py), `BUILDERS` (builders/corpus.py) and
`CORPORA` (prepare.py). `voxceleb2.py` is a short example.
"""

import collections
from collections.abc import Iterable
import dataclasses

from dicetalk_jax.data.clip_record import UNKNOWN

VIDEO = ('.mp4', '.mov', '.mkv', '.avi', '.webm', '.m4v', '.mpg')
AUDIO = ('.m4a', '.wav', '.aac', '.mp3', '.flac', '.ogg')
FEATURES = ('.npy', '.npz', '.mat', '.txt', '.csv')
# The reason of a clip that may be good: the next run tries it again.
UNEXPECTED = 'unexpected error'


@dataclasses.dataclass(frozen=True)
class ClipFile:
  """One clip as it lies on disk.

  Paths are relative to the root of the corpus, with '/'.

  Attributes:
    clip_id: unique in the corpus.
    video_id: the recording that it belongs to.
    identity: global key of the person, such as 'mead/M003'.
    dataset: one of `clip_record.DATASETS`.
    video: the file with the frames.
    emotion, intensity, text: the label, if there is one.
    audio: the file with the audio; '' takes the audio track of the video.
    start, end: seconds of the video; None is its end. A separate audio file is cut in
      the same way.
    crop: (left, top, width, height) in pixels, if the corpus says which part of the
      frames to take.
    crop_height: height of the frames that `crop` refers to; 0 is their actual height.
    expression: file of expression features, relative to their root; '' if there is
      none.
    expression_of_video: whether its rows begin with the video or with the clip.
    split: the split that the corpus itself assigns, or ''.
  """

  clip_id: str
  video_id: str
  identity: str
  dataset: str
  video: str
  emotion: str = UNKNOWN
  intensity: int = 0
  text: str = ''
  audio: str = ''
  start: float = 0.0
  end: float | None = None
  crop: tuple[int, int, int, int] | None = None
  crop_height: int = 0
  expression: str = ''
  expression_of_video: bool = True
  split: str = ''


@dataclasses.dataclass(frozen=True)
class Skipped:
  """A file or clip that is left out.

  Attributes:
    clip: its id or path.
    reason: a few words, the same for all similar cases.
    detail: what is particular to this one.
  """

  clip: str
  reason: str
  detail: str = ''


def reasons(skipped: Iterable[Skipped]) -> str:
  """Counts the reasons, in words."""
  counts = collections.Counter(skip.reason for skip in skipped)
  listed = [f'{count} x {reason}' for reason, count in counts.most_common()]
  return ', '.join(listed) or 'nothing was left out'
