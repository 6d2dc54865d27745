"""The files of the demo: videos, their posters, sheets and the moving picture."""

from collections.abc import Sequence
import io
import pathlib

import numpy as np
from PIL import Image
import soundfile

from dicetalk_jax.files import atomic_file
from dicetalk_jax.media import contact_sheet, video
from dicetalk_jax.media.audio import RATE
from examples.demo.clips import Clip, Person

WIDTH = 256  # of the videos in pixels, at least
COLUMNS = 9  # of a sheet
# Of the moving picture: it is small, and what is left of it must be sharp.
CELL = 144
SHOWN_PEOPLE = 2
LARGEST = 700_000  # bytes


def write_person(folder: pathlib.Path, name: str, person: Person) -> str:
  """Writes the portrait; returns its path relative to `folder`."""
  path = f'videos/{name}_portrait.jpg'
  contact_sheet.save_image(folder / path, person.portrait)
  return path


def write_clip(folder: pathlib.Path, name: str, clip: Clip) -> dict[str, dict]:
  """Writes what is generated and the truth, enlarged, with sound.

  Returns:
    Paths of video and poster relative to `folder`, by the kind of video.
  """
  # The same moment for both: the mouth is widest open.
  shown = int(clip.opening.argmax())
  paths = {}
  for kind in ('generated', 'truth'):
    frames = enlarge(clip.videos[kind], WIDTH)
    path = f'videos/{name}_{kind}'
    video.write_video(folder / f'{path}.mp4', frames, clip.fps, audio=clip.audio)
    contact_sheet.save_image(folder / f'{path}.jpg', frames[shown])
    paths[kind] = {'video': f'{path}.mp4', 'poster': f'{path}.jpg'}
  return paths


def write_sheet(folder: pathlib.Path, name: str, clips: Sequence[Clip]) -> str:
  """Writes frames of a person's clips, truth above generated.

  Returns:
    The path relative to `folder`.
  """
  count = min(len(clip.opening) for clip in clips)
  shown = np.linspace(0, count - 1, COLUMNS).round().astype(int)
  rows = [
    (f'{clip.case.emotion}: {kind}', list(clip.videos[kind][shown]))
    for clip in clips
    for kind in ('truth', 'generated')
  ]
  path = f'sheets/{name}.jpg'
  contact_sheet.contact_sheet(
    rows,
    [f'{frame / clips[0].fps:.1f} s' for frame in shown],
    scale=2,
    path=folder / path,
  )
  return path


def write_inputs(folder: pathlib.Path, person: Person, clip: Clip) -> None:
  """Writes a portrait and a recording to try the command with."""
  contact_sheet.save_image(folder / 'portrait.png', person.portrait)
  soundfile.write(folder / 'speech.wav', clip.audio, RATE)


def write_moving_picture(path: pathlib.Path, people: Sequence[Sequence[Clip]]) -> None:
  """Writes an animated WebP of at most `LARGEST` bytes.

  The first people one after the other, emotions side by side, truth above generated.

  Args:
    path: of the file.
    people: the clips of each person, in the same emotions.
  """
  frames = np.concatenate([_side_by_side(clips) for clips in people[:SHOWN_PEOPLE]])
  images = [Image.fromarray(frame) for frame in frames]
  duration = round(1000 / people[0][0].fps)
  for quality in range(80, 0, -10):
    encoded = io.BytesIO()
    images[0].save(
      encoded,
      'WEBP',
      save_all=True,
      append_images=images[1:],
      duration=duration,
      loop=0,
      quality=quality,
    )
    if encoded.tell() <= LARGEST:
      break
  with atomic_file(path) as part:
    part.write_bytes(encoded.getvalue())


def _side_by_side(clips: Sequence[Clip]) -> np.ndarray:
  """uint8 `[N,H,W,3]`: a column for each clip, with its emotion above it."""
  columns = [
    np.concatenate(
      [enlarge(clip.videos[kind], CELL) for kind in ('truth', 'generated')], axis=1
    )
    for clip in clips
  ]
  return contact_sheet.side_by_side(columns, [clip.case.emotion for clip in clips])


def enlarge(frames: np.ndarray, width: int) -> np.ndarray:
  """Square uint8 `[N,size,size,3]` to `[N,width,width,3]`, never smaller."""
  if frames.shape[2] >= width:
    return frames
  bicubic = Image.Resampling.BICUBIC
  images = [Image.fromarray(frame).resize((width, width), bicubic) for frame in frames]
  return np.stack([np.asarray(image) for image in images])
