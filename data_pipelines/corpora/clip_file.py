"""What a walker of a corpus finds: clips to be prepared, and what it passes over."""

import collections
from collections.abc import Iterable
import dataclasses

from dicetalk_jax.data.clip_record import UNKNOWN

VIDEO = ('.mp4', '.mov', '.mkv', '.avi', '.webm', '.m4v', '.mpg')
AUDIO = ('.m4a', '.wav', '.aac', '.mp3', '.flac', '.ogg')
# reason of a clip that may well be good: a next run tries it again
UNEXPECTED = 'unexpected error'
FEATURES = ('.npy', '.npz', '.mat', '.txt', '.csv')


@dataclasses.dataclass(frozen=True)
class ClipFile:
  """One clip as it lies on disk.

  Paths are relative to the root of the corpus, with '/'.

  Attributes:
    clip_id: unique in the corpus.
    video_id: the recording that it belongs to.
    identity: global key of the person, such as 'mead/M003'.
    dataset: one of `record.DATASETS`.
    video: the file with the pictures.
    emotion, intensity, text: the label, where there is one.
    audio: the file with the sound; '' takes the sound track of the video.
    start, end: seconds of the video; None is its end. They cut a separate sound file
      alike.
    crop: (left, top, width, height) in pixels where the corpus says which part of the
      picture to take.
    crop_height: height of the picture that `crop` refers to; 0 is the one at hand.
    expression: file of expression features, relative to their root; '' where there is
      none.
    expression_of_video: whether its rows begin with the video or with the clip.
    split: where the corpus itself says it.
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
  """A file or clip that is left out: a short reason, the same for all alike, and
  what is particular to this one.
  """

  clip: str
  reason: str
  detail: str = ''


def reasons(skipped: Iterable[Skipped]) -> str:
  """How many were left out for which reason, in words."""
  counts = collections.Counter(skip.reason for skip in skipped)
  return (
    ', '.join(f'{n} x {reason}' for reason, n in counts.most_common())
    or 'nothing was left out'
  )
