"""Recordings as waves, log-mel windows, and the positions around each frame."""

import tracemalloc
import wave as wave_file

import av
import librosa
import numpy as np
import pytest
import soundfile

from dicetalk_jax.errors import InputError
from dicetalk_jax.media import audio


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


@pytest.mark.parametrize('samples', [100, 16000, 479_600, 480_000, 480_001])
def test_log_mel_equals_the_extractor(samples):
  """The shortcut over padding changes nothing: ends near, at and beyond a window."""
  import transformers

  wave = np.random.default_rng(0).normal(scale=0.1, size=samples).astype(np.float32)
  extractor = transformers.WhisperFeatureExtractor()
  windows = [
    np.pad(w, (0, audio.WINDOW - len(w)))
    for w in np.split(wave, range(audio.WINDOW, samples, audio.WINDOW))
  ]
  expected = extractor._np_extract_fbank_features(windows, device='cpu').swapaxes(1, 2)
  np.testing.assert_array_equal(audio.log_mel(wave), expected)


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
