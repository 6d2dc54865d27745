"""Corpora in their published layouts, a few rendered clips each, and the detector that
knows where the renderer puts a face.
"""

import pathlib

import numpy as np
from PIL import Image
import soundfile

from data_pipelines.synthetic.clip import Clip, make_clip
from dicetalk_jax.data.clip_record import SAMPLE_RATE
from dicetalk_jax.media import video

SIZE = 96  # side of the frames in pixels
DETECTOR = 'benchmarks.imitated_corpora:rendered_face'  # for --detector
# Left, top, width and height of a face that does not move, in sides of the frame.
FACE = (0.2, 0.1, 0.63, 0.82)

MEAD_PEOPLE = ('M005', 'M007', 'W011')
MEAD_EMOTIONS = ('happy', 'sad')
MEAD_LEVELS = (1, 3)
# Name, and the video on YouTube.
HDTF_VIDEOS = {
  'AdaLovelace0': 'aaaaaaaaaaa',
  'Bob': 'bbbbbbbbbbb',
  'Eve': 'ccccccccccc',
}


def rendered_face():
  """Makes a detector for rendered frames."""

  def find(image):
    height, width, _ = image.shape
    left, top, across, down = FACE
    return left * width, top * height, across * width, down * height

  return find


# What `prepare` needs to take clips that are so small and short.
FLAGS = (
  '--min_face=1',
  '--min_seconds=0.9',
  '--workers=1',
  f'--detector={DETECTOR}',
)


def write_mead(root: pathlib.Path, expressions: pathlib.Path, seconds: float) -> None:
  """Writes MEAD's tree: people who say a sentence in emotions at levels."""
  for identity, person in enumerate(MEAD_PEOPLE):
    for emotion in MEAD_EMOTIONS:
      for level in MEAD_LEVELS:
        clip = _render(identity, emotion, level, sentence=level, seconds=seconds)
        take = f'{emotion}/level_{level}/001'
        _write(root / person / 'video' / 'front' / f'{take}.mp4', clip)
        _write_expression(expressions / person / f'{take}.npy', clip)


def write_hdtf(root: pathlib.Path, expressions: pathlib.Path, seconds: float) -> None:
  """Writes HDTF's lists of one subset, and its videos."""
  lists = root / 'HDTF_dataset'
  lists.mkdir(parents=True)
  addresses = []
  intervals = []
  for number, (name, youtube) in enumerate(HDTF_VIDEOS.items()):
    clip = _render(10 + number, 'neutral', 1, sentence=number, seconds=seconds)
    _write(root / f'WDA_{name}.mp4', clip)
    _write_expression(expressions / f'WDA_{name}.npy', clip)
    addresses.append(f'{name} https://www.youtube.com/watch?v={youtube}\n')
    intervals.append(f'{name}.mp4 00:00-00:{int(seconds):02d}\n')
  (lists / 'WDA_video_url.txt').write_text(''.join(addresses))
  (lists / 'WDA_annotion_time.txt').write_text(''.join(intervals))


def _render(
  identity: int, emotion: str, level: int, *, sentence: int, seconds: float
) -> Clip:
  """Renders the first seconds of a sentence."""
  return make_clip(
    identity,
    emotion,
    level,
    sentence,
    size=SIZE,
    motion=0.0,
    zoom=1.2,
    max_seconds=seconds,
  )


def _write(path: pathlib.Path, clip: Clip) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  video.write_video(path, clip.frames, 25, clip.audio)


def _write_expression(path: pathlib.Path, clip: Clip) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  np.save(path, clip.expression)


def write_portrait_and_speech(folder: pathlib.Path, seconds: float) -> None:
  """Writes portrait.png and speech.wav of a person whom no corpus has."""
  clip = _render(20, 'neutral', 1, sentence=20, seconds=seconds)
  Image.fromarray(clip.frames[0]).save(folder / 'portrait.png')
  soundfile.write(folder / 'speech.wav', clip.audio, SAMPLE_RATE)
