"""Reading at a constant rate: which frame is shown when."""

import fractions
import pathlib

import av
import numpy as np
import pytest

from dicetalk_jax.errors import InputError
from dicetalk_jax.media import video, video_reader

FIELD_INPUTS = pathlib.Path(__file__).parents[1] / 'field_inputs'


def _numbered(path, count, fps, audio=None):
  """A video whose frame i has brightness 20 + 3 i."""
  brightness = 20 + 3 * np.arange(count, dtype=np.uint8)
  frames = np.broadcast_to(brightness[:, None, None, None], (count, 32, 48, 3))
  video.write_video(path, frames, fps, audio)
  return path


def _numbers(frames):
  return [round((float(frame.mean()) - 20) / 3) for frame in frames]


@pytest.mark.parametrize(
  ('fps', 'count'), [(25, 40), (30, 60), (50, 76), (12.5, 20), (29.97, 61), (24, 37)]
)
def test_each_moment_shows_the_frame_that_is_due(tmp_path, fps, count):
  path = _numbered(tmp_path / 'a.mp4', count, fps)
  numbers = _numbers(video_reader.frames(path))
  assert len(numbers) == round(count / fps * 25)
  want = [
    max(i for i in range(count) if i / fps < (k + 0.5) / 25 - 1e-6)
    for k in range(len(numbers))
  ]
  assert numbers == want
  assert video_reader.probe(path).fps == pytest.approx(fps, abs=0.01)


def test_a_part_is_the_same_as_in_the_whole(tmp_path):
  path = _numbered(tmp_path / 'a.mp4', 70, 30)
  whole = _numbers(video_reader.frames(path))
  for first, count in ((0, 5), (13, 20), (40, 10), (50, None)):
    part = _numbers(video_reader.frames(path, 25, first / 25, count))
    assert part == whole[first:][:count]
  beyond_the_end = list(video_reader.frames(path, 25, 2, 1000))
  assert len(beyond_the_end) == len(whole) - 50 == 8
  with pytest.raises(InputError, match='no frames at 9 s'):
    list(video_reader.frames(path, 25, 9))


def test_the_rotation_of_phones_is_applied(tmp_path):
  frames = np.zeros((3, 32, 64, 3), np.uint8)
  frames[:, :, :16] = 200  # left
  with av.open(str(tmp_path / 'a.mp4'), 'w') as container:
    track = container.add_stream('libx264', rate=25)
    track.width, track.height, track.pix_fmt = 64, 32, 'yuv420p'
    track.set_display_rotation(-90)  # shown a quarter turn clockwise: left becomes top
    for frame in frames:
      container.mux(track.encode(av.VideoFrame.from_ndarray(frame, format='rgb24')))
    container.mux(track.encode(None))
  info = video_reader.probe(tmp_path / 'a.mp4')
  first = next(video_reader.frames(tmp_path / 'a.mp4'))
  whole = video.read_video(tmp_path / 'a.mp4').frames
  assert (info.height, info.width) == first.shape[:2] == whole.shape[1:3] == (64, 32)
  assert first[:12].mean() > 150 and first[20:].mean() < 50
  np.testing.assert_array_equal(whole[0], first)


def test_pixels_that_are_not_square_are_stretched():
  """128x256 pixels that are twice as wide as high: of a square picture."""
  path = FIELD_INPUTS / 'anamorphic.mp4'
  info = video_reader.probe(path)
  assert (info.height, info.width) == (256, 256)
  first = next(video_reader.frames(path))
  assert first.shape == (256, 256, 3)
  with av.open(str(path)) as container:
    squeezed = next(container.decode(video=0)).to_ndarray(format='rgb24')
  assert squeezed.shape == (256, 128, 3)
  again = first.reshape(256, 128, 2, 3).mean(axis=2)
  assert np.abs(again - squeezed).mean() < 2


@pytest.mark.parametrize(
  ('aspect', 'turned', 'shape'),
  [
    ((8, 9), False, (36, 48)),
    ((16, 15), False, (32, 51)),
    ((2, 1), True, (96, 32)),
    ((1, 1), False, (32, 48)),
  ],
)
def test_every_reader_gives_the_shape_that_players_show(
  tmp_path, aspect, turned, shape
):
  with av.open(str(tmp_path / 'a.mp4'), 'w') as container:
    track = container.add_stream('libx264', rate=25)
    track.width, track.height, track.pix_fmt = 48, 32, 'yuv420p'
    track.sample_aspect_ratio = fractions.Fraction(*aspect)
    if turned:
      track.set_display_rotation(90)
    for value in (60, 120):
      grey = np.full((32, 48, 3), value, np.uint8)
      container.mux(track.encode(av.VideoFrame.from_ndarray(grey, format='rgb24')))
    container.mux(track.encode(None))
  info = video_reader.probe(tmp_path / 'a.mp4')
  assert (info.height, info.width) == shape
  for frames in (
    [*video_reader.frames(tmp_path / 'a.mp4')],
    video.read_video(tmp_path / 'a.mp4').frames,
  ):
    assert [frame.shape for frame in frames] == [(*shape, 3)] * 2
    np.testing.assert_allclose([f.mean() for f in frames], [60, 120], atol=4)


def test_frames_of_too_many_pixels_are_refused(tmp_path, monkeypatch):
  """Whether the header says so, or only the frames."""
  path = _numbered(tmp_path / 'a.mp4', 5, 25)
  monkeypatch.setattr(video_reader, 'MAX_PIXELS', 1000)
  for read in (video_reader.probe, video.read_video):
    with pytest.raises(InputError, match='a.mp4 has frames of 48x32 pixels; scale it'):
      read(path)
  monkeypatch.setattr(video_reader, '_square_pixels', lambda *_: (1, 1))
  for read in (video_reader.probe, video.read_video):
    with pytest.raises(InputError, match='cannot be read'):
      read(path)


def test_audio_tracks_are_noticed(tmp_path):
  silent = video_reader.probe(_numbered(tmp_path / 'a.mp4', 10, 25))
  assert silent.sound_delay is None
  audible = video_reader.probe(_numbered(tmp_path / 'b.mp4', 10, 25, np.zeros(6400)))
  assert audible.sound_delay == pytest.approx(0, abs=0.07)


def test_broken_files_are_refused(tmp_path):
  whole = _numbered(tmp_path / 'a.mp4', 100, 25).read_bytes()
  (tmp_path / 'cut.mp4').write_bytes(whole[: len(whole) * 2 // 3])
  (tmp_path / 'text.mp4').write_text('not found')
  with pytest.raises(InputError, match='cut.mp4'):
    list(video_reader.frames(tmp_path / 'cut.mp4'))
  with pytest.raises(InputError, match='cannot be read as a video'):
    video_reader.probe(tmp_path / 'text.mp4')
  with pytest.raises(InputError, match='does not exist'):
    video_reader.probe(tmp_path / 'none.mp4')


def test_a_name_is_never_interpreted(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  _numbered(tmp_path / 'other.mp4', 20, 25)
  for name in ('concat:other.mp4', 'http:x.mp4'):
    _numbered(tmp_path / 'this.mp4', 5, 25).rename(name)
    assert _numbers(video_reader.frames(name)) == [0, 1, 2, 3, 4]
    assert len(video.read_video(name).frames) == 5
