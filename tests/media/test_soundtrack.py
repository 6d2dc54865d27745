"""The sound of a video is the recording's own."""

import pathlib
import tracemalloc

import av
import librosa
import numpy as np
import pytest
import soundfile

from dicetalk_jax.errors import InputError
from dicetalk_jax.media import audio, video
from dicetalk_jax.media.soundtrack import Soundtrack

FIELD_INPUTS = pathlib.Path(__file__).parents[1] / 'field_inputs'


def frames(seconds):
  return np.full((round(seconds * 25), 16, 16, 3), 90, np.uint8)


def written(path, sound, seconds):
  """(samples `[n,channels]`, rate) of a video that is written with this sound."""
  video.write_video(path, frames(seconds), 25, sound)
  with av.open(str(path)) as container:
    track = container.streams.audio[0]
    assert float(track.duration * track.time_base) == pytest.approx(seconds, abs=1e-3)
    planes = [frame.to_ndarray() for frame in container.decode(track)]
    return np.concatenate(planes, axis=1).T[: round(seconds * track.rate)], track.rate


def likeness(a, b):
  return np.corrcoef(a, b)[0, 1]


@pytest.mark.parametrize('seconds', [0.8, 1.2, 2.0])
def test_rate_and_channels_are_kept(tmp_path, seconds):
  """Cut to the video, or followed by silence."""
  path = FIELD_INPUTS / 'hifi.flac'
  own, rate = soundfile.read(path)
  sound, written_rate = written(tmp_path / 'x.mp4', Soundtrack(path), seconds)
  assert (written_rate, sound.shape) == (48000, (round(seconds * 48000), 2))
  common = min(len(own), len(sound)) - 2048
  for channel in range(2):
    assert likeness(own[:common, channel], sound[:common, channel]) > 0.97
  assert np.abs(sound[len(own) + 2048 :]).max(initial=0) < 1e-3


@pytest.mark.parametrize(
  ('rate', 'kept'), [(8000, 8000), (37800, 44100), (96000, 96000), (192000, 96000)]
)
def test_rates_that_aac_lacks_become_the_next_higher(tmp_path, rate, kept):
  time = np.arange(rate) / rate
  wave = 0.3 * np.sin(2 * np.pi * 440 * time)
  soundfile.write(tmp_path / 'x.wav', wave, rate)
  sound, written_rate = written(tmp_path / 'x.mp4', Soundtrack(tmp_path / 'x.wav'), 1)
  assert written_rate == kept
  spectrum = np.abs(np.fft.rfft(sound[:, 0]))
  assert abs(int(spectrum.argmax()) - 440) <= 1


@pytest.mark.parametrize('channels', range(1, 11))
def test_numbers_of_channels(tmp_path, channels):
  """More than six are mixed into one."""
  time = np.arange(24000) / 24000
  # Low enough for a channel of bass, which the sixth is to AAC.
  waves = [np.sin(2 * np.pi * (60 + 4 * i) * time) for i in range(channels)]
  soundfile.write(tmp_path / 'x.wav', 0.3 * np.stack(waves, axis=1), 24000)
  sound, _ = written(tmp_path / 'x.mp4', Soundtrack(tmp_path / 'x.wav'), 1)
  if channels > 6:
    assert sound.shape == (24000, 1)
    assert likeness(sound[2048:-2048, 0], sum(waves)[2048:-2048]) > 0.9
    return
  assert sound.shape == (24000, channels)
  for i, wave in enumerate(waves):
    assert likeness(sound[2048:-2048, i], wave[2048:-2048]) > 0.9


@pytest.mark.filterwarnings('ignore:the channels')
def test_channels_that_cancel_become_the_loudest(tmp_path):
  path = FIELD_INPUTS / 'antiphase.wav'
  sound = Soundtrack(path, audio.load_recording(path).loudest)
  heard, rate = written(tmp_path / 'x.mp4', sound, 1.6)
  own, _ = soundfile.read(path)
  assert (rate, heard.shape[1]) == (16000, 1)
  assert likeness(heard[:, 0], own[: len(heard), 0]) > 0.97


@pytest.mark.parametrize('name', ['mono_then_stereo.aac', 'rate_change.aac'])
def test_a_recording_that_changes_its_format_keeps_the_first(tmp_path, name):
  path = FIELD_INPUTS / name
  sound, rate = written(tmp_path / 'x.mp4', Soundtrack(path), 6.6)
  wave = audio.load_audio(path)
  own = librosa.resample(sound.mean(axis=1), orig_sr=rate, target_sr=16000)
  common = min(len(own), len(wave))
  assert likeness(own[:common], wave[:common]) > 0.95
  half = common // 2
  assert likeness(own[half:common], wave[half:common]) > 0.9


def test_a_long_recording_is_not_held(tmp_path):
  second = 0.1 * np.random.default_rng(0).normal(size=(48000, 2))
  soundfile.write(tmp_path / 'x.wav', np.tile(second, (60, 1)), 48000)
  sound = Soundtrack(tmp_path / 'x.wav')
  short, long = frames(1), frames(50)
  peaks = []
  for pixels in (short, long):
    tracemalloc.start()
    video.write_video(tmp_path / 'x.mp4', pixels, 25, sound)
    peaks.append(tracemalloc.get_traced_memory()[1] - 2 * pixels.nbytes)
    tracemalloc.stop()
  assert peaks[1] < peaks[0] + 3e6  # 49 more seconds are 19 MB


def test_a_recording_that_was_deleted_meanwhile_is_read(tmp_path):
  path = tmp_path / 'x.flac'
  path.write_bytes((FIELD_INPUTS / 'hifi.flac').read_bytes())
  sound = Soundtrack(path)
  path.unlink()
  heard, _ = written(tmp_path / 'x.mp4', sound, 1)
  assert np.abs(heard).max() > 0.1


def test_bad_recordings_are_refused_at_once(tmp_path):
  (tmp_path / 'x.wav').write_text('words')
  for name, words in [('x.wav', 'cannot be decoded'), ('y.wav', 'no recording at')]:
    with pytest.raises(InputError, match=words):
      Soundtrack(tmp_path / name)
