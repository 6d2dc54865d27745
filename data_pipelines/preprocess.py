"""From a clip file to records: constant rate, one face followed, square crop, sound
and expression cut alike.
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
from dicetalk_jax.errors import ConfigError, DataError, InputError, UserError
from dicetalk_jax.media import audio, face, face_tracking, video_reader
from dicetalk_jax.media.face_tracking import Detector, Track
from dicetalk_jax.media.image import crop_square
from dicetalk_jax.media.video import fit_length

# seconds of sound that a clip may lack at its end; recorders stop the two tracks at
# slightly other times
_LATE = 0.2
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)  # a disk is full, or a user's share of it
WILD = (
  'hdtf',
  'voxceleb2',
  'folder',
)  # corpora whose videos may hold cuts between shots


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
  """How the clips of a corpus become records.

  Attributes:
    corpus: 'mead', 'hdtf', 'voxceleb2' or 'folder'.
    content: which blocks the records carry, see `record.RecordSpec`.
    size: side of the square picture in pixels.
    min_face: least side of the face before resizing, in pixels; -1 is half of `size`,
      or 0 for VoxCeleb2, whose faces are small.
    min_seconds: shorter clips are left out; 0 is 2 for MEAD (a training window), 2.5
      otherwise.
    max_seconds: longer clips are cut into equal pieces.
    expand: the crop reaches this many sides of the face beyond it, on every side.
    detector: 'haar', or 'package.module:function' where the function returns a
      detector: a function from a picture uint8 [H,W,3] to (left, top, width, height) of
      its largest face, or None.
    detect_every: faces are looked for in every n-th frame, and interpolated in between.
    expression_key, expression_columns: which array of a feature file, and which of its
      columns.
    expression_fps: rows per second of feature files; 0 is the rate of the video.
    expression_dim: columns that are left.
  """

  corpus: str
  content: str = 'full'
  size: int = 512
  min_face: int = -1
  min_seconds: float = 0.0
  max_seconds: float = 20.0
  expand: float = 0.5
  detector: str = 'haar'
  detect_every: int = 1
  expression_key: str = ''
  expression_columns: tuple[int, int] | None = None
  expression_fps: float = 0.0
  expression_dim: int = 64

  def __post_init__(self):
    if self.min_face < 0:
      object.__setattr__(
        self, 'min_face', 0 if self.corpus == 'voxceleb2' else self.size // 2
      )
    if not self.min_seconds:
      object.__setattr__(self, 'min_seconds', 2.0 if self.corpus == 'mead' else 2.5)
    columns = self.expression_columns
    for name, (good, choice) in {
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
    }.items():
      if not good:
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
  """'haar', or what 'package.module:function' returns.

  Raises:
    ConfigError: it cannot be imported.
  """
  if name == 'haar':
    return face.haar_detector()
  module, _, function = name.partition(':')
  try:
    return getattr(importlib.import_module(module), function)()
  except (ImportError, AttributeError, ValueError) as error:
    raise ConfigError(
      f'detector={name} cannot be imported ({error}); use haar or '
      'package.module:function'
    ) from error


class _Unusable(DataError):
  """This clip, or this piece of it, is left out: (reason, detail)."""


def records(
  clip: ClipFile,
  config: CorpusConfig,
  tree: Tree,
  expressions: Tree | None,
  detector: Detector,
) -> Iterator[tuple[str, dict[str, Any]] | Skipped]:
  """The records of one clip file, or why there are none.

  Every face that is followed for long enough gives one, cut into pieces of at most
  `max_seconds`. Only one is in memory at a time.

  Yields:
    (key, record), or `Skipped` for the clip or a piece of it; its reason is
    `UNEXPECTED` where the fault may not be the clip's.

  Raises:
    OSError: a disk is full (`NO_ROOM`); every other clip would fail alike.
  """
  try:
    with tree.local(clip.video) as video:
      yield from _Clip(clip, config, tree, expressions, video, detector).pieces()
  except FileNotFoundError as error:
    yield Skipped(clip.clip_id, 'file missing', str(error))
  except ConfigError:
    raise
  # one odd file among a million must not end the work of days; the report shows it
  except Exception as error:
    if isinstance(error, OSError) and error.errno in NO_ROOM:
      raise
    if not isinstance(error, UserError) or _of_the_machine(error):
      yield Skipped(clip.clip_id, UNEXPECTED, f'{type(error).__name__}: {error}')
    elif isinstance(error, _Unusable):
      yield Skipped(clip.clip_id, *error.args)
    else:
      reason = (
        'silent' if isinstance(error, audio.SilentError) else 'file cannot be read'
      )
      yield Skipped(clip.clip_id, reason, str(error))


def _of_the_machine(error: BaseException | None) -> bool:
  """Whether memory, a disk or a network failed below an error; readers of damaged
  files give no error number.
  """
  while error:
    if isinstance(error, MemoryError) or isinstance(error, OSError) and error.errno:
      return True
    error = error.__cause__
  return False


class _Clip:
  """One clip file being read."""

  def __init__(
    self,
    clip: ClipFile,
    config: CorpusConfig,
    tree: Tree,
    expressions: Tree | None,
    video: str,
    detector: Detector,
  ):
    self.clip, self.config, self.video = clip, config, video
    self.facts = video_reader.probe(video)
    self.region = self._region()
    self.height, self.width = (
      len(range(n)[part])
      for n, part in zip((self.facts.height, self.facts.width), self.region)
    )
    self.wave = self._sound(tree)
    boxes, cuts = face_tracking.detect(
      self._pictures(), detector, config.detect_every, shots=config.corpus in WILD
    )
    self.frames = len(boxes)
    if self.frames < self._frames(config.min_seconds):
      raise _Unusable('clip too short', f'{self.frames / clip_record.FPS:.2f} s')
    self.tracks = face_tracking.tracks(boxes, cuts)
    if not self.tracks:
      raise _Unusable('no face found', f'{self.frames} frames')
    self.expression = (
      self._expression(expressions) if expressions and clip.expression else None
    )

  def pieces(self) -> Iterator[tuple[str, dict[str, Any]] | Skipped]:
    """Records of all tracks."""
    least, most = (
      self._frames(self.config.min_seconds),
      self._frames(self.config.max_seconds),
    )
    pieces = []
    for track in self.tracks:
      count = math.ceil(len(track.boxes) / most)
      places = np.linspace(0, len(track.boxes), count + 1).round().astype(int)
      pieces += [
        Track(track.first + a, track.boxes[a:b]) for a, b in zip(places, places[1:])
      ]
    for i, piece in enumerate(pieces):
      key = f'{self.clip.clip_id}_p{i:02d}' if len(pieces) > 1 else self.clip.clip_id
      try:
        if len(piece.boxes) < least:
          raise _Unusable(
            'face seen too shortly', f'{len(piece.boxes) / clip_record.FPS:.2f} s'
          )
        yield key, self._record(key, piece)
      except _Unusable as error:
        yield Skipped(key, *error.args)

  def _frames(self, seconds: float) -> int:
    return math.floor(seconds * clip_record.FPS + 1e-6)

  def _region(self) -> tuple[slice, slice]:
    """Rows and columns of the picture that the corpus asks for."""
    if not self.clip.crop:
      return slice(None), slice(None)
    scale = self.facts.height / (self.clip.crop_height or self.facts.height)
    left, top, width, height = (round(scale * number) for number in self.clip.crop)
    if left + width > self.facts.width + 2 or top + height > self.facts.height + 2:
      raise _Unusable(
        'crop box outside of the picture',
        f'{self.facts.width}x{self.facts.height} pixels',
      )
    return slice(top, top + height), slice(left, left + width)

  def _pictures(self, first: int = 0, count: int | None = None) -> Iterator[np.ndarray]:
    clip = self.clip
    if count is None and clip.end is not None:
      count = round((clip.end - clip.start) * clip_record.FPS)
    for picture in video_reader.frames(
      self.video, clip_record.FPS, clip.start + first / clip_record.FPS, count
    ):
      yield picture[self.region]

  def _sound(self, tree: Tree) -> np.ndarray:
    """The sound from the first frame of the clip on, float32 at 16 kHz."""
    clip = self.clip
    if clip.audio:
      with tree.local(clip.audio) as path:
        return self._sound_from(path, clip.start)
    if self.facts.sound_delay is None:
      raise _Unusable('no sound', 'neither a sound file nor a sound track')
    return self._sound_from(self.video, clip.start - self.facts.sound_delay)

  def _sound_from(self, path: str, skip: float) -> np.ndarray:
    if self.clip.end is None:
      return audio.begin_at(audio.load_audio(path), skip)
    first = max(0.0, skip)
    last = (
      skip + self.clip.end - self.clip.start + 1
    )  # frames are rounded; what is too much is cut with them
    return audio.begin_at(audio.load_span(path, first, last), skip - first)

  def _expression(self, expressions: Tree) -> np.ndarray:
    """Features of every frame of the clip, `[frames,D]`."""
    config = self.config
    try:
      with expressions.local(self.clip.expression) as path:
        rows = expression_files.read_expression(
          path, config.expression_key, config.expression_columns
        )
      if rows.shape[1] != config.expression_dim:
        raise DataError(
          f'{self.clip.expression} has {rows.shape[1]} columns, others '
          f'{config.expression_dim}; choose --expression_columns that all have'
        )
      rows = expression_files.resample(rows, config.expression_fps or self.facts.fps)
      first = (
        round(self.clip.start * clip_record.FPS) if self.clip.expression_of_video else 0
      )
      cut = self.clip.expression_of_video and (first or self.clip.end is not None)
      return expression_files.fit(
        rows[first : first + self.frames] if cut else rows, self.frames
      )
    except DataError as error:
      raise _Unusable('expression features do not fit', str(error)) from error

  def _record(self, key: str, piece: Track) -> dict[str, Any]:
    clip, config = self.clip, self.config
    count, rows = len(piece.boxes), slice(piece.first, piece.end)
    sides = np.sqrt(np.prod(piece.boxes[:, 2:] - piece.boxes[:, :2], axis=1))
    if np.median(sides) < config.min_face:
      raise _Unusable(
        'face too small',
        f'{np.median(sides):.0f} pixels; --min_face is {config.min_face}',
      )
    wave, samples = (
      self.wave[piece.first * clip_record.SAMPLES_PER_FRAME :],
      count * clip_record.SAMPLES_PER_FRAME,
    )
    if samples - len(wave) > _LATE * audio.RATE:
      raise _Unusable(
        'sound ends early', f'{(samples - len(wave)) / audio.RATE:.2f} s are missing'
      )
    wave = fit_length(wave, samples)
    if np.abs(wave).max() < audio.SILENCE:
      raise _Unusable('silent')
    union = np.concatenate(
      [piece.boxes[:, :2].min(axis=0), piece.boxes[:, 2:].max(axis=0)]
    )
    window = (
      (0, 0, self.width, self.height)
      if clip.crop
      else crop_square(tuple(union), self.width, self.height, config.expand)
    )
    corner, side = np.array(window[:2]), np.array(window[2:]) - np.array(window[:2])
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
      expression=None if self.expression is None else self.expression[rows],
      bbox=np.clip((piece.boxes - np.tile(corner, 2)) / np.tile(side, 2), 0, 1),
    )

  def _crops(self, piece: Track, window: tuple[int, int, int, int]) -> list[bytes]:
    """Pictures of a piece as JPEG, read a second time so that none had to be kept."""
    size = (self.config.size,) * 2
    return [
      clip_record.encode_jpeg(
        np.asarray(
          Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS, window)
        )
      )
      for picture in self._pictures(piece.first, len(piece.boxes))
    ]


def expression_dim(
  paths: Iterator[str], config: CorpusConfig, expressions: Tree
) -> int:
  """Number of columns of the first feature file that can be read, 64 where there is
  none.
  """
  for path in paths:
    try:
      with expressions.local(path) as local:
        return expression_files.read_expression(
          local, config.expression_key, config.expression_columns
        ).shape[1]
    except (DataError, InputError, FileNotFoundError):
      continue
  return config.expression_dim
