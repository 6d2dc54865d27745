"""Makes records of a clip file.

Frames at a constant rate are cropped to a square around one face that is followed;
audio and expression features are cut to the same frames.
"""

from collections.abc import Iterator
import dataclasses
import errno
import importlib
import math
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.corpora.clip_file import UNEXPECTED, ClipFile, Skipped
from data_pipelines.corpora.file_tree import Tree
from dicetalk_jax.data import clip_record, expression_files
from dicetalk_jax.detect.mtcnn import largest_faces
from dicetalk_jax.errors import ConfigError, DataError, InputError, UserError
from dicetalk_jax.media import audio, face_tracking, video_reader
from dicetalk_jax.media.face_tracking import Detector, Track
from dicetalk_jax.media.image import crop_square
from dicetalk_jax.media.video import fit_length

# Seconds of audio that a clip may lack at its end: recorders stop the two tracks at
# slightly different times.
_LATE = 0.2
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)  # a disk is full, or a user's share of it
MTCNN = 'mtcnn'  # the detector that comes with the library
# Corpora whose videos may contain cuts between shots.
WILD = ('hdtf', 'voxceleb2', 'folder')


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
  """How the clips of a corpus become records.

  Attributes:
    corpus: 'mead', 'hdtf', 'voxceleb2' or 'folder'.
    content: blocks that the records carry, see `clip_record.RecordSpec`.
    size: side of the square frames in pixels.
    min_face: smallest side of the face before resizing, in pixels. -1 is half of
      `size`, or 0 for VoxCeleb2, whose faces are small.
    min_seconds: shorter clips are left out. The default 0 means 2 for MEAD (a training
      window), and 2.5 otherwise.
    max_seconds: longer clips are cut into equal pieces. At most 60.
    expand: how far the crop reaches beyond the face on every side, in sides of the
      face.
    detector: 'mtcnn', or 'package.module:function'. The function returns a detector: a
      function from an image, uint8 [H,W,3], to (left, top, width, height) of its
      largest face, or None.
    detect_every: faces are detected in every n-th frame, and interpolated in between.
    expression_key, expression_columns: the array of a feature file, and its columns
      that are used.
    expression_fps: rows per second of feature files; 0 is the rate of the video.
    expression_dim: number of columns that are used.
  """

  corpus: str
  content: str = 'full'
  size: int = 512
  min_face: int = -1
  min_seconds: float = 0.0
  max_seconds: float = 20.0
  expand: float = 0.5
  detector: str = MTCNN
  detect_every: int = 1
  expression_key: str = ''
  expression_columns: tuple[int, int] | None = None
  expression_fps: float = 0.0
  expression_dim: int = 64

  def __post_init__(self):
    # 1. Defaults that depend on other fields
    if self.min_face < 0:
      min_face = 0 if self.corpus == 'voxceleb2' else self.size // 2
      object.__setattr__(self, 'min_face', min_face)
    if not self.min_seconds:
      min_seconds = 2.0 if self.corpus == 'mead' else 2.5
      object.__setattr__(self, 'min_seconds', min_seconds)

    # 2. Checks
    columns = self.expression_columns
    checks = {
      'size': (
        16 <= self.size <= 2048 and self.size % 8 == 0,
        '16 to 2048, a multiple of 8',
      ),
      'min_seconds': (
        0 < self.min_seconds <= self.max_seconds,
        'more than 0, at most max_seconds',
      ),
      'max_seconds': (self.max_seconds <= 60, 'at most 60'),
      'expand': (0 <= self.expand <= 5, '0 to 5'),
      'detect_every': (
        1 <= self.detect_every <= face_tracking.GAP,
        f'1 to {face_tracking.GAP}',
      ),
      'expression_columns': (
        columns is None or 0 <= columns[0] < columns[1],
        'FIRST:END, such as 80:144',
      ),
      'expression_fps': (
        self.expression_fps >= 0,
        'rows per second, or 0 for the rate of the video',
      ),
    }
    for name, (valid, choice) in checks.items():
      if not valid:
        raise ConfigError(
          f'{name}={getattr(self, name)} cannot be prepared; choose {choice}'
        )

  @property
  def spec(self) -> clip_record.RecordSpec:
    return clip_record.RecordSpec(
      self.content,
      expression_dim=self.expression_dim,
      latent_shape=(self.size // 8, self.size // 8, 4),
    )


def make_detector(name: str) -> Detector:
  """Makes a face detector.

  Args:
    name: 'mtcnn', or 'package.module:function' for what the function returns.

  Raises:
    ConfigError: the function cannot be imported.
  """
  if name == MTCNN:
    return largest_faces
  module, _, function = name.partition(':')
  try:
    find = getattr(importlib.import_module(module), function)()
  except (ImportError, AttributeError, ValueError) as error:
    raise ConfigError(
      f'detector={name} cannot be imported ({error}); use {MTCNN} '
      'or package.module:function'
    ) from error
  return face_tracking.one_by_one(find)


class _Unusable(DataError):
  """The clip, or a piece of it, is left out; its arguments are (reason, detail)."""


def records(
  clip: ClipFile,
  config: CorpusConfig,
  tree: Tree,
  expressions: Tree | None,
  detector: Detector,
) -> Iterator[tuple[str, dict[str, Any]] | Skipped]:
  """Makes the records of one clip file.

  Every face that is followed for long enough gives one record, or several pieces of at
  most `max_seconds`. Only one is in memory at a time.

  Yields:
    (key, record), or `Skipped` for the clip or a piece of it. The reason is
    `UNEXPECTED` if the fault may not be the clip's.

  Raises:
    OSError: a disk is full (`NO_ROOM`), so every other clip would fail as well.
  """
  try:
    with tree.local(clip.video) as video:
      yield from _Clip(clip, config, tree, expressions, video, detector).pieces()
  except FileNotFoundError as error:
    yield Skipped(clip.clip_id, 'file missing', str(error))
  except ConfigError:
    raise
  # One odd file among a million must not end the work of days; the report shows it.
  except Exception as error:
    if isinstance(error, OSError) and error.errno in NO_ROOM:
      raise
    yield _skipped(clip.clip_id, error)


def _skipped(clip_id: str, error: Exception) -> Skipped:
  """Says why an error leaves out a clip."""
  if not isinstance(error, UserError) or _is_of_the_machine(error):
    return Skipped(clip_id, UNEXPECTED, f'{type(error).__name__}: {error}')
  if isinstance(error, _Unusable):
    return Skipped(clip_id, *error.args)
  if isinstance(error, audio.SilentError):
    return Skipped(clip_id, 'silent', str(error))
  return Skipped(clip_id, 'file cannot be read', str(error))


def _is_of_the_machine(error: BaseException) -> bool:
  """Whether memory, a disk or a network caused an error, and not a damaged file.

  Readers of damaged files raise errors without a number.
  """
  cause: BaseException | None = error
  while cause:
    if isinstance(cause, MemoryError):
      return True
    if isinstance(cause, OSError) and cause.errno:
      return True
    cause = cause.__cause__
  return False


class _Clip:
  """One clip file: its face tracks, audio and expression, read when it is made."""

  def __init__(
    self,
    clip: ClipFile,
    config: CorpusConfig,
    tree: Tree,
    expressions: Tree | None,
    video: str,
    detector: Detector,
  ):
    self.clip = clip
    self.config = config
    self.video = video

    # 1. What the file holds
    self.facts = video_reader.probe(video)
    self.region = self._region()
    rows, columns = self.region
    self.height = len(range(self.facts.height)[rows])
    self.width = len(range(self.facts.width)[columns])
    self.wave = self._read_audio(tree)

    # 2. Where the faces are
    boxes, cuts = face_tracking.detect(
      self._read_frames(), detector, config.detect_every, shots=config.corpus in WILD
    )
    self.frames = len(boxes)
    if self.frames < self._frame_count(config.min_seconds):
      raise _Unusable('clip too short', f'{self.frames / clip_record.FPS:.2f} s')
    self.tracks = face_tracking.tracks(boxes, cuts)
    if not self.tracks:
      raise _Unusable('no face found', f'{self.frames} frames')

    # 3. Expression features
    self.expression = None
    if expressions and clip.expression:
      self.expression = self._read_expression(expressions)

  def pieces(self) -> Iterator[tuple[str, dict[str, Any]] | Skipped]:
    """Yields the records of all tracks."""
    pieces = [piece for track in self.tracks for piece in self._pieces_of(track)]
    shortest = self._frame_count(self.config.min_seconds)
    for i, piece in enumerate(pieces):
      key = self.clip.clip_id
      if len(pieces) > 1:
        key = f'{key}_p{i:02d}'
      try:
        if len(piece.boxes) < shortest:
          seconds = len(piece.boxes) / clip_record.FPS
          raise _Unusable('face visible too briefly', f'{seconds:.2f} s')
        yield key, self._record(key, piece)
      except _Unusable as error:
        yield Skipped(key, *error.args)

  def _pieces_of(self, track: Track) -> list[Track]:
    """Cuts a track into equal pieces of at most `max_seconds`."""
    longest = self._frame_count(self.config.max_seconds)
    count = math.ceil(len(track.boxes) / longest)
    places = np.linspace(0, len(track.boxes), count + 1).round().astype(int)
    return [
      Track(track.first + start, track.boxes[start:end])
      for start, end in zip(places, places[1:])
    ]

  def _frame_count(self, seconds: float) -> int:
    return math.floor(seconds * clip_record.FPS + 1e-6)

  def _region(self) -> tuple[slice, slice]:
    """Gives the rows and columns of the frames that the corpus asks for."""
    if not self.clip.crop:
      return slice(None), slice(None)
    scale = self.facts.height / (self.clip.crop_height or self.facts.height)
    left, top, width, height = (round(scale * number) for number in self.clip.crop)
    if left + width > self.facts.width + 2 or top + height > self.facts.height + 2:
      raise _Unusable(
        'crop box outside of the frame',
        f'{self.facts.width}x{self.facts.height} pixels',
      )
    return slice(top, top + height), slice(left, left + width)

  def _read_frames(
    self, first: int = 0, count: int | None = None
  ) -> Iterator[np.ndarray]:
    """Yields frames of the clip, all by default, at the rate of the records."""
    clip = self.clip
    if count is None and clip.end is not None:
      count = round((clip.end - clip.start) * clip_record.FPS)
    start = clip.start + first / clip_record.FPS
    for frame in video_reader.frames(self.video, clip_record.FPS, start, count):
      yield frame[self.region]

  def _read_audio(self, tree: Tree) -> np.ndarray:
    """Reads the audio from the first frame of the clip on, float32 at 16 kHz."""
    clip = self.clip
    if clip.audio:
      with tree.local(clip.audio) as path:
        return self._read_audio_file(path, clip.start)
    if self.facts.sound_delay is None:
      raise _Unusable('no audio', 'neither an audio file nor an audio track')
    return self._read_audio_file(self.video, clip.start - self.facts.sound_delay)

  def _read_audio_file(self, path: str, skip: float) -> np.ndarray:
    """Reads audio from `skip` seconds on; negative ones are filled with silence."""
    if self.clip.end is None:
      return audio.begin_at(audio.load_audio(path), skip)
    first = max(0.0, skip)
    # One second more, because the number of frames is rounded. It is cut with them.
    last = skip + self.clip.end - self.clip.start + 1
    return audio.begin_at(audio.load_span(path, first, last), skip - first)

  def _read_expression(self, expressions: Tree) -> np.ndarray:
    """Reads the features of every frame of the clip, `[frames,D]`."""
    config = self.config
    try:
      with expressions.local(self.clip.expression) as path:
        rows = expression_files.read_expression(
          path, config.expression_key, config.expression_columns
        )
      if rows.shape[1] != config.expression_dim:
        raise DataError(
          f'{self.clip.expression} has {rows.shape[1]} columns, others have '
          f'{config.expression_dim}; choose --expression_columns that all files have'
        )
      rows = expression_files.resample(rows, config.expression_fps or self.facts.fps)
      first = round(self.clip.start * clip_record.FPS)
      is_part = first > 0 or self.clip.end is not None
      if self.clip.expression_of_video and is_part:
        rows = rows[first : first + self.frames]
      return expression_files.fit(rows, self.frames)
    except DataError as error:
      raise _Unusable('expression features do not fit', str(error)) from error

  def _record(self, key: str, piece: Track) -> dict[str, Any]:
    """Makes the record of a piece of a track.

    Raises:
      _Unusable: the face is too small, or the audio is too short or silent.
    """
    clip = self.clip
    config = self.config

    # 1. Check the face
    sides = np.sqrt(np.prod(piece.boxes[:, 2:] - piece.boxes[:, :2], axis=1))
    side = np.median(sides)
    if side < config.min_face:
      raise _Unusable(
        'face too small', f'{side:.0f} pixels; --min_face is {config.min_face}'
      )

    # 2. Cut the audio
    count = len(piece.boxes)
    samples = count * clip_record.SAMPLES_PER_FRAME
    wave = self.wave[piece.first * clip_record.SAMPLES_PER_FRAME :]
    missing = (samples - len(wave)) / audio.RATE
    if missing > _LATE:
      raise _Unusable('audio ends early', f'{missing:.2f} s are missing')
    wave = fit_length(wave, samples)
    if np.abs(wave).max() < audio.SILENCE:
      raise _Unusable('silent')

    # 3. Crop a square around the face in all frames, unless the corpus names a crop
    window = (0, 0, self.width, self.height)
    if not clip.crop:
      left, top = piece.boxes[:, :2].min(axis=0)
      right, bottom = piece.boxes[:, 2:].max(axis=0)
      face_area = (left, top, right, bottom)
      window = crop_square(face_area, self.width, self.height, config.expand)
    corner = np.array(window[:2])
    extent = np.array(window[2:]) - corner
    optional = {}
    if self.expression is not None:
      optional['expression'] = self.expression[piece.first : piece.end]
    return clip_record.encode_example(
      config.spec,
      clip_id=key,
      video_id=clip.video_id,
      identity=clip.identity,
      dataset=clip.dataset,
      num_frames=count,
      emotion=clip.emotion,
      intensity=clip.intensity,
      text=clip.text,
      frames=self._crops(piece, window) if config.content == 'full' else (),
      audio=wave,
      bbox=np.clip((piece.boxes - np.tile(corner, 2)) / np.tile(extent, 2), 0, 1),
      **optional,
    )

  def _crops(self, piece: Track, window: tuple[int, int, int, int]) -> list[bytes]:
    """Encodes the frames of a piece as JPEG.

    They are read a second time, so that none has to stay in memory.
    """
    size = (self.config.size, self.config.size)
    crops = []
    for frame in self._read_frames(piece.first, len(piece.boxes)):
      image = Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS, window)
      crops.append(clip_record.encode_jpeg(np.asarray(image)))
    return crops


def expression_dim(
  paths: Iterator[str], config: CorpusConfig, expressions: Tree
) -> int:
  """Gives the number of columns of the first feature file that can be read.

  If there is none, `config` stays as it is.
  """
  for path in paths:
    try:
      with expressions.local(path) as local:
        rows = expression_files.read_expression(
          local, config.expression_key, config.expression_columns
        )
        return rows.shape[1]
    except (DataError, InputError, FileNotFoundError):
      continue
  return config.expression_dim
