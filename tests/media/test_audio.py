"""Recordings as waves, log-mel windows, and the positions around each frame."""

import pathlib
import struct
import tracemalloc
import warnings
import wave as wave_file

import av
import librosa
import numpy as np
import pytest
import soundfile

from dicetalk_jax.errors import InputError, Note
from dicetalk_jax.media import audio

FIELD_INPUTS = pathlib.Path(__file__).parents[1] / 'field_inputs'


def tone(seconds=0.5, rate=16000, hertz=440.0):
  time = np.arange(round(seconds * rate)) / rate
  return (0.3 * np.sin(2 * np.pi * hertz * time)).astype(np.float32)


def write_container(path, codec, wave=None, rate=44100):
  """An mp4 or m4a with an audio track, or without a wave with a video track only."""
  with av.open(str(path), 'w') as container:
    if wave is None:
      stream = container.add_stream('mpeg4', rate=25)
      stream.width = stream.height = 32
      black = np.zeros((32, 32, 3), np.uint8)
      frame = av.VideoFrame.from_ndarray(black, format='rgb24')
    else:
      stream = container.add_stream(codec, rate=rate)
      channels = np.stack([wave, wave])
      frame = av.AudioFrame.from_ndarray(channels, format='fltp', layout='stereo')
      frame.sample_rate = rate
    for packet in (*stream.encode(frame), *stream.encode(None)):
      container.mux(packet)


@pytest.mark.parametrize('rate', [16000, 44100, 22050])
@pytest.mark.parametrize('channels', [1, 2])
@pytest.mark.parametrize(
  'name', ['speech.wav', 'speech.flac', 'speech.ogg', 'speech.mp3']
)
def test_reads_as_librosa_does(tmp_path, name, rate, channels):
  wave = np.stack([tone(2.1, rate, 300.0 * (i + 1)) for i in range(channels)], axis=1)
  path = tmp_path / name
  soundfile.write(path, wave, rate)
  expected, _ = librosa.load(path, sr=16000)
  ours = audio.load_audio(path)
  assert ours.dtype == np.float32
  np.testing.assert_array_equal(ours, expected)


def test_int16_is_divided_by_32768(tmp_path):
  samples = np.array([0, 1, -32768, 32767, 16384] * 100, np.int16)
  with wave_file.open(str(tmp_path / 'x.wav'), 'wb') as file:
    file.setparams((1, 2, 16000, 0, 'NONE', ''))
    file.writeframes(samples.tobytes())
  np.testing.assert_array_equal(
    audio.load_audio(str(tmp_path / 'x.wav')), samples / np.float32(32768)
  )


@pytest.mark.parametrize('name', ['speech.m4a', 'speech.mp4'])
def test_audio_of_a_video_container(tmp_path, name):
  write_container(tmp_path / name, 'aac', tone(0.5, 44100))
  wave = audio.load_audio(tmp_path / name)
  assert wave.dtype == np.float32 and wave.ndim == 1
  # AAC works in blocks of 1024 samples, so the ends move by up to two of them.
  assert abs(len(wave) - 8000) < 2 * 1024 * 16000 / 44100
  spectrum = np.abs(np.fft.rfft(wave[2000:6000]))
  assert abs(spectrum.argmax() * 4 - 440) <= 4
  np.testing.assert_allclose(np.abs(wave[2000:6000]).max(), 0.3, rtol=0.1)


def missing(path):
  pass


def not_audio(path):
  path.write_text('these are words, not audio')


def a_folder(path):
  path.mkdir()


def no_audio_track(path):
  write_container(path, None)


def empty(path):
  soundfile.write(path, np.zeros(0, np.float32), 16000, format='WAV')


def silent(path):
  soundfile.write(path, np.full(16000, 2e-4, np.float32), 16000, format='WAV')


def not_numbers(path):
  soundfile.write(
    path, np.full(160, np.nan, np.float32), 16000, format='WAV', subtype='FLOAT'
  )


@pytest.mark.parametrize(
  'write, sentence',
  [
    (missing, 'there is no recording at'),
    (a_folder, 'there is no recording at'),
    (not_audio, 'cannot be decoded'),
    (no_audio_track, 'no audio track'),
    (empty, 'is empty'),
    (silent, 'is silent'),
    (not_numbers, 'not numbers'),
  ],
)
def test_bad_recordings_end_in_one_sentence(tmp_path, write, sentence):
  path = tmp_path / 'speech.mp4'
  write(path)
  with pytest.raises(InputError, match=sentence) as info:
    audio.load_audio(path)
  message = str(info.value)
  assert str(path) in message and '\n' not in message
  assert not message.endswith('.')
  assert message[0].islower() or message.startswith(str(path))


@pytest.mark.parametrize('rate', [8000, 44099, 44100, 48000])
def test_a_long_recording_is_resampled_in_pieces(tmp_path, rate):
  """Where they meet, the result is that of librosa for the whole, to rounding."""
  wave = np.random.default_rng(0).normal(scale=0.1, size=round(19.3 * rate))
  soundfile.write(tmp_path / 'x.wav', wave, rate)
  expected, _ = librosa.load(tmp_path / 'x.wav', sr=16000)
  ours = audio.load_audio(tmp_path / 'x.wav')
  # Rates without a common divisor make soxr interpolate its filter.
  atol = 2e-6 if rate == 44099 else 3e-7
  np.testing.assert_allclose(ours, expected, rtol=0, atol=atol)


@pytest.mark.parametrize('samples', [100, 16000, 479_600, 480_000, 480_001])
def test_log_mel_equals_the_extractor(samples, monkeypatch):
  """The shortcut over padding changes nothing: ends near, at and beyond a window."""
  import transformers
  from transformers.models.whisper import feature_extraction_whisper

  # With torch, its results differ by rounding.
  monkeypatch.setattr(feature_extraction_whisper, 'is_torch_available', lambda: False)
  wave = np.random.default_rng(0).normal(scale=0.1, size=samples).astype(np.float32)
  extract = transformers.WhisperFeatureExtractor()
  windows = [*np.split(wave, range(audio.WINDOW, samples, audio.WINDOW))]
  mel = extract(windows, sampling_rate=16000, return_tensors='np').input_features
  np.testing.assert_array_equal(audio.log_mel(wave), mel.swapaxes(1, 2))


def test_the_loudest_of_channels_of_opposite_sign_is_heard():
  """This file holds speech, and the same speech with its sign turned around."""
  path = FIELD_INPUTS / 'antiphase.wav'
  channels, _ = soundfile.read(path, dtype='float32')
  assert not channels.mean(axis=1).any()
  sentence = 'the channels of .*antiphase.wav cancel each other out; .* channel 1'
  with pytest.warns(Note, match=sentence):
    recording = audio.load_recording(path)
  np.testing.assert_array_equal(recording.wave, channels[:, 0])
  assert recording.loudest == {2: 0}
  with pytest.warns(Note, match=sentence):
    np.testing.assert_array_equal(
      audio.load_span(path, 0.5, 1), channels[8000:16000, 0]
    )


def write_gains(path, gains, rate=16000):
  """Writes a tone to several channels, at a gain for each."""
  tones = [gain * tone(1.0, rate) for gain in gains]
  soundfile.write(path, np.stack(tones, axis=1), rate, subtype='FLOAT')


@pytest.mark.parametrize(
  ('gains', 'loudest'),
  [([-0.9, 1], 1), ([1, -1, 1e-3], 0), ([0.2, -0.5, 0.5, -0.2, 0, 0], 1)],
)
@pytest.mark.parametrize('rate', [16000, 48000])
def test_channels_that_cancel(tmp_path, gains, loudest, rate):
  path = tmp_path / 'x.wav'
  write_gains(path, gains, rate)
  with pytest.warns(Note, match=f'channel {loudest + 1}$'):
    wave = audio.load_audio(path)
  expected = gains[loudest] * tone(1.0)
  np.testing.assert_allclose(wave[500:-500], expected[500:-500], atol=1e-4)


@pytest.mark.parametrize(
  'gains', [[1], [1, 1], [1, 0], [1, -0.4], [0, 0, 0, 0, 0, 0, 0, 1], [1, -1, 1]]
)
def test_other_channels_are_averaged(tmp_path, gains):
  path = tmp_path / 'x.wav'
  write_gains(path, gains)
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    wave = audio.load_audio(path)
  np.testing.assert_allclose(wave, np.mean(gains) * tone(1.0), atol=1e-6)


def test_only_that_recording_of_a_joined_file_counts_whose_channels_cancel(tmp_path):
  files = []
  for gains in ([0.5], [1, -1]):
    write_gains(tmp_path / 'x.wav', gains)
    files.append((tmp_path / 'x.wav').read_bytes())
  (tmp_path / 'x.wav').write_bytes(b''.join(files))
  with pytest.warns(Note):
    wave = audio.load_audio(tmp_path / 'x.wav')
  np.testing.assert_array_equal(wave, np.concatenate([0.5 * tone(1.0), tone(1.0)]))


def write_days(path, days=2.0):
  """A file of silence that takes no room on the disk."""
  size = round(days * 86400 * 8000)
  form = struct.pack('<IHHIIHH', 16, 1, 1, 8000, 8000, 1, 8)
  with open(path, 'wb') as file:
    file.write(b'RIFF' + struct.pack('<I', size + 36) + b'WAVEfmt ' + form)
    file.write(b'data' + struct.pack('<I', size))
    file.truncate(44 + size)


def test_audio_of_days_is_refused(tmp_path, monkeypatch):
  """After as much of it as is allowed; no more is read or held."""
  write_days(tmp_path / 'x.wav')
  monkeypatch.setattr(audio, 'LONGEST', 60)
  librosa.resample(tone(0.1), orig_sr=8000, target_sr=16000)  # imports
  tracemalloc.start()
  with pytest.raises(InputError, match='x.wav is longer than .* hours; cut it into'):
    audio.load_audio(tmp_path / 'x.wav')
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 15e6
  assert len(audio.load_span(tmp_path / 'x.wav', 1.0, 2.0)) == 16000


@pytest.mark.parametrize('rate', [1, 999, 1_000_001, 2**31 - 1])
def test_rates_that_no_recorder_has_are_refused(tmp_path, rate):
  """A piece of a second would fill the memory, or a second take days."""
  soundfile.write(tmp_path / 'x.wav', tone(1.0), rate)
  with pytest.raises(InputError, match=f'x.wav claims {rate} samples per second'):
    audio.load_audio(tmp_path / 'x.wav')


def test_a_thousand_channels_are_read_in_small_blocks(tmp_path):
  wave = np.repeat(tone(1.0, 8000)[:, None], 1000, axis=1)
  soundfile.write(tmp_path / 'x.wav', wave, 8000, subtype='PCM_U8')
  del wave
  librosa.resample(tone(0.1), orig_sr=8000, target_sr=16000)  # imports
  tracemalloc.start()
  assert len(audio.load_audio(tmp_path / 'x.wav')) == 16000
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 5e6


def test_three_hours_are_held():
  assert audio.LONGEST * audio.RATE * 4 < 0.7e9


def test_audio_len_counts_25_per_second():
  assert [audio.audio_len(n) for n in (0, 639, 640, 16000, 52800, 496000)] == [
    0,
    0,
    1,
    25,
    82,
    775,
  ]


def test_pad_states_and_windows():
  states = np.arange(2 * 1500, dtype=np.float32).reshape(2, 1500, 1, 1) + 1
  padded = audio.pad_states(states, audio_len=775)
  assert padded.shape == (1560, 1, 1)
  assert not padded[:4].any() and not padded[-6:].any()
  np.testing.assert_array_equal(padded[4:-6, 0, 0], np.arange(1550) + 1)

  clips = audio.audio_windows(padded)
  assert clips.shape == (387, 10, 1, 1)
  np.testing.assert_array_equal(clips[100, :, 0, 0], 400 - 4 + 1 + np.arange(10))
  np.testing.assert_array_equal(
    audio.audio_windows(padded, start=50, frames=25), clips[50:75]
  )
  np.testing.assert_array_equal(audio.audio_windows(padded, start=380), clips[380:])
  np.testing.assert_array_equal(
    audio.audio_windows(padded, step=1)[::2],
    np.concatenate([clips, padded[None, -12:-2]]),
  )


@pytest.mark.parametrize('clip', [2, 6, 10])
def test_training_and_sampling_cut_the_same_windows(clip):
  states = np.random.default_rng(0).normal(size=(1, 1500, 2, 3)).astype(np.float32)
  padded = audio.pad_states(states, audio_len=12, clip=clip)
  recording = states[0, :24]
  for first, step, count in [(0, 1, 12), (0, 2, 6), (3, 2, 4), (5, 1, 1)]:
    read = []

    def read_slice(rows, read=read):
      read.append(rows)
      return recording[rows]

    frames = first + step * np.arange(count)
    sampled = audio.audio_windows(padded, step=1, clip=clip)[frames]
    trained = audio.read_windows(read_slice, len(recording), frames, clip)
    np.testing.assert_array_equal(trained, sampled)
    (rows,) = read
    assert rows.stop - rows.start <= 2 * step * (count - 1) + clip
    if first == 0:
      strided = audio.audio_windows(padded, step=step, frames=count, clip=clip)
      np.testing.assert_array_equal(trained, strided)


def test_states_too_short_for_the_recording():
  with pytest.raises(ValueError, match='cannot hold'):
    audio.pad_states(np.zeros((1, 1500, 1, 1), np.float32), audio_len=775)


@pytest.mark.parametrize(
  ('name', 'rate', 'channels'),
  [
    ('x.wav', 16000, 1),
    ('x.wav', 44100, 2),
    ('x.wav', 22050, 8),
    ('x.flac', 48000, 6),
    ('x.mp4', 44100, 2),
    ('x.m4a', 32000, 2),
    ('x.mp3', 22050, 2),
    ('x.mp3', 16000, 1),
    ('x.ogg', 48000, 2),
  ],
)
def test_a_span_is_cut_from_the_whole_to_the_sample(tmp_path, name, rate, channels):
  noise = (
    np.random.default_rng(0)
    .normal(scale=0.1, size=(round(6.3 * rate), channels))
    .astype(np.float32)
  )
  if name in ('x.mp4', 'x.m4a'):
    write_container(tmp_path / name, 'aac', noise[:, 0], rate)
  else:
    soundfile.write(tmp_path / name, noise, rate)
  whole = audio.load_audio(tmp_path / name)
  for start, end in (
    (0, 1.0),
    (2.5, 4.001),
    (5.9, 9.0),
    (0, 99.0),
    (7.0, 8.0),
    (-2.0, -1.0),
  ):
    part = audio.load_span(tmp_path / name, max(0, start), end)
    np.testing.assert_array_equal(
      part, whole[max(0, round(start * 16000)) : max(0, round(end * 16000))]
    )


@pytest.mark.parametrize(
  'write, sentence',
  [
    (missing, 'there is no recording at'),
    (not_audio, 'cannot be decoded'),
    (no_audio_track, 'no audio track'),
    (not_numbers, 'not numbers'),
  ],
)
def test_bad_recordings_have_no_spans(tmp_path, write, sentence):
  write(tmp_path / 'speech.mp4')
  with pytest.raises(InputError, match=sentence):
    audio.load_span(tmp_path / 'speech.mp4', 0.0, 1.0)


def test_a_span_does_not_hold_the_whole(tmp_path):
  soundfile.write(tmp_path / 'long.wav', np.tile(tone(1.0, 44100), 300), 44100)
  tracemalloc.start()
  part = audio.load_span(tmp_path / 'long.wav', 200.0, 201.0)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert len(part) == 16000 and peak < 5e6  # the whole is 50 MB


def test_beginning_later_or_earlier():
  wave = np.arange(1, 9601, dtype=np.float32)
  np.testing.assert_array_equal(audio.begin_at(wave, 0.1), wave[1600:])
  earlier = audio.begin_at(wave, -0.1)
  assert not earlier[:1600].any() and (earlier[1600:] == wave).all()
