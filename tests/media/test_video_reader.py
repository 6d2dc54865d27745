"""Reading at a constant rate: which frame is shown when."""

import av
import numpy as np
import pytest

from dicetalk_jax.errors import InputError
from dicetalk_jax.media import video, video_reader


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
  assert (info.height, info.width) == first.shape[:2] == (64, 32)
  assert first[:12].mean() > 150 and first[20:].mean() < 50


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


@pytest.mark.parametrize(
  'text',
  [
    'ffconcat version 1.0\nfile other.mp4\n',
    '#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nother.ts\n#EXT-X-ENDLIST\n',
  ],
)
def test_a_playlist_opens_no_other_file(tmp_path, text):
  _numbered(tmp_path / 'other.mp4', 20, 25)
  with (
    av.open(str(tmp_path / 'other.mp4')) as source,
    av.open(str(tmp_path / 'other.ts'), 'w') as copy,
  ):
    track = copy.add_stream_from_template(source.streams.video[0])
    for packet in source.demux(source.streams.video[0]):
      if packet.dts is not None:
        packet.stream = track
        copy.mux(packet)
  (tmp_path / 'list.m3u8').write_text(text)
  for read in (video_reader.probe, video.read_video):
    with pytest.raises(InputError, match='cannot be read as a video'):
      read(tmp_path / 'list.m3u8')
