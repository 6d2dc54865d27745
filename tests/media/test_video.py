"""MP4 files: frames and audio in sync, colours, tags, failures."""

import os

import av
import numpy as np
import pytest

from dicetalk_jax.errors import InputError
from dicetalk_jax.media import video
from dicetalk_jax.media.audio import RATE


def _flash_and_beep(fps, length, at, size=(48, 64)):
  frames = np.full((length, *size, 3), 40, np.uint8)
  frames[at] = 220
  audio = np.zeros(round(length / fps * RATE), np.float32)
  onset = round(at / fps * RATE)
  audio[onset : onset + 480] = 0.6 * np.sin(2 * np.pi * 1000 * np.arange(480) / RATE)
  return frames, audio


def _onset(audio):
  return int(np.argmax(np.abs(audio) > 0.1))


@pytest.mark.parametrize(
  ('fps', 'length', 'at'), [(25, 60, 31), (12.5, 20, 7), (29.97, 40, 39)]
)
def test_flash_and_beep_stay_together(tmp_path, fps, length, at):
  frames, audio = _flash_and_beep(fps, length, at)
  video.write_video(tmp_path / 'new' / 'clip.mp4', frames, fps, audio)
  seen = video.read_video(tmp_path / 'new' / 'clip.mp4')
  assert seen.fps == fps
  assert seen.frames.shape == frames.shape
  assert np.flatnonzero(seen.frames.mean((1, 2, 3)) > 130).tolist() == [at]
  assert len(seen.audio) == round(length / fps * RATE)
  assert abs(_onset(seen.audio) - _onset(audio)) <= 0.002 * RATE
  assert np.corrcoef(seen.audio, audio)[0, 1] > 0.99


@pytest.mark.parametrize('samples', [RATE // 2, 3 * RATE])
def test_audio_takes_the_length_of_the_frames(tmp_path, samples):
  frames, _ = _flash_and_beep(25, 25, 5)
  video.write_video(tmp_path / 'a.mp4', frames, 25, np.full(samples, 0.1, np.float32))
  with av.open(str(tmp_path / 'a.mp4')) as container:
    assert container.duration == pytest.approx(1_000_000, abs=1000)  # microseconds
  assert len(video.read_video(tmp_path / 'a.mp4').audio) == RATE


def test_colours_survive_and_odd_sizes_grow(tmp_path):
  colours = np.array(
    [[200, 30, 30], [30, 200, 60], [40, 60, 210], [128, 128, 128]], np.uint8
  )
  row = np.repeat(colours, 16, axis=0)
  frames = np.broadcast_to(row, (5, 33, 64, 3))[:, :, :63]
  video.write_video(tmp_path / 'a.mp4', frames, 25)
  seen = video.read_video(tmp_path / 'a.mp4')
  assert seen.audio is None
  assert seen.frames.shape == (5, 34, 64, 3)
  # Away from the edges of the stripes: chroma has half the resolution.
  inside = np.arange(64) % 16 // 4 == 1
  error = np.abs(seen.frames.astype(int) - row.astype(int))
  assert error[:, :, inside].max() <= 4


def test_frames_are_scaled_to_the_size_of_the_file(tmp_path):
  """Bicubic, which keeps a ramp a ramp; the default quality is that of the reference
  implementation.
  """
  ramp = np.linspace(30, 220, 64).astype(np.uint8)
  frames = np.broadcast_to(ramp[:, None], (3, 48, 64, 3))
  video.write_video(tmp_path / 'a.mp4', frames, 25, size=(128, 70))
  seen = video.read_video(tmp_path / 'a.mp4').frames
  assert seen.shape == (3, 70, 128, 3)
  expected = np.interp(np.arange(128), 2 * np.arange(64) + 0.5, ramp)
  assert np.abs(seen - expected[:, None]).max() <= 4
  assert b'crf=18.0' in (tmp_path / 'a.mp4').read_bytes()


def test_files_say_that_they_are_generated(tmp_path):
  frames, _ = _flash_and_beep(25, 3, 1)
  video.write_video(tmp_path / 'a.mp4', frames, 25)
  with av.open(str(tmp_path / 'a.mp4')) as container:
    assert container.metadata['comment'] == 'AI-generated'
    assert container.metadata['ai_generated'] == 'true'


def test_failure_leaves_nothing_behind_and_keeps_the_old_file(tmp_path, monkeypatch):
  frames, _ = _flash_and_beep(25, 8, 1)
  path = tmp_path / 'a.mp4'
  path.write_bytes(b'old')
  from_ndarray = av.VideoFrame.from_ndarray
  calls = []

  def fail_late(*args, **kwargs):
    calls.append(args)
    if len(calls) == 5:
      raise MemoryError
    return from_ndarray(*args, **kwargs)

  monkeypatch.setattr(
    video.av,
    'VideoFrame',
    type('Frames', (), {'from_ndarray': staticmethod(fail_late)}),
  )
  with pytest.raises(MemoryError):
    video.write_video(path, frames, 25)
  assert os.listdir(tmp_path) == ['a.mp4']
  assert path.read_bytes() == b'old'


def test_bad_places_are_explained(tmp_path):
  frames, _ = _flash_and_beep(25, 2, 1)
  (tmp_path / 'file').write_text('')
  (tmp_path / 'folder.mp4').mkdir()
  for path, words in [
    ('a.avi', '.mp4'),
    ('folder.mp4', 'folder'),
    ('file/a.mp4', 'cannot write'),
  ]:
    with pytest.raises(InputError, match=words):
      video.write_video(tmp_path / path, frames, 25)
  assert sorted(os.listdir(tmp_path)) == ['file', 'folder.mp4']


def test_broken_files_are_refused(tmp_path):
  frames = np.random.default_rng(0).integers(0, 255, (30, 64, 64, 3), dtype=np.uint8)
  video.write_video(tmp_path / 'whole.mp4', frames, 25, np.zeros(RATE, np.float32))
  whole = (tmp_path / 'whole.mp4').read_bytes()
  (tmp_path / 'half.mp4').write_bytes(whole[: len(whole) // 2])
  (tmp_path / 'text.mp4').write_text('not a video')
  for name in ('missing.mp4', 'half.mp4', 'text.mp4'):
    with pytest.raises(InputError, match=name):
      video.read_video(tmp_path / name)


def test_frames_of_a_wrong_type_are_refused(tmp_path):
  with pytest.raises(ValueError, match='uint8'):
    video.write_video(tmp_path / 'a.mp4', np.zeros((2, 8, 8, 3), np.float32), 25)
  assert not os.listdir(tmp_path)
