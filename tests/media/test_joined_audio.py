"""Files that hold more audio, or other audio, than their first header says."""

import pathlib
import struct

import av
import librosa
import numpy as np
import pytest
import soundfile

from dicetalk_jax.errors import InputError
from dicetalk_jax.media import audio, audio_blocks, mp3
from dicetalk_jax.media.file_part import FilePart

FIELD_INPUTS = pathlib.Path(__file__).parents[1] / 'field_inputs'
OPUS = {'format': 'OGG', 'subtype': 'OPUS'}

ID3_COVER = b'ID3\x03\x00\x00\x00\x00\x10\x00' + b'\xff\xfb\x90\x64' * 512
ID3_V1 = b'TAG'.ljust(128, b'\0')
APE_FOOTER = b'APETAGEX' + struct.pack('<IIII', 2000, 32, 0, 0x80000000) + bytes(8)
APE_HEADER = b'APETAGEX' + struct.pack('<IIII', 2000, 32, 0, 0xA0000000) + bytes(8)
APE = APE_HEADER + APE_FOOTER


def noisy(seconds, rate, channels=1, seed=0):
  """Noise under a slow envelope, so that each moment differs: `[samples,channels]`."""
  samples = round(seconds * rate)
  noise = np.random.default_rng(seed).normal(scale=0.1, size=(samples, channels))
  return (noise * np.hanning(samples)[:, None]).astype(np.float32)


def written(path, wave, rate, **options):
  soundfile.write(path, wave, rate, **options)
  return path.read_bytes()


def contained(path, wave, rate, codec='aac', tracks=1, **options):
  """Writes a file by FFmpeg; each further track holds the wave at half its loudness."""
  with av.open(str(path), 'w', **options) as container:
    layout = 'mono' if wave.shape[1] == 1 else 'stereo'
    streams = [
      container.add_stream(codec, rate=rate, layout=layout) for _ in range(tracks)
    ]
    for i, stream in enumerate(streams):
      planes = np.ascontiguousarray(wave.T / 2**i)
      frame = av.AudioFrame.from_ndarray(planes, format='fltp', layout=layout)
      frame.sample_rate = rate
      for packet in (*stream.encode(frame), *stream.encode(None)):
        container.mux(packet)
  return path.read_bytes()


def mp3_frames(data):
  """Start and size of each frame of a file with MPEG-1 frames at 44.1 kHz only."""
  kbits = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
  position, frames = 0, []
  while position < len(data):
    third = data[position + 2]
    size = 144000 * kbits[third >> 4] // 44100 + (third >> 1 & 1)
    frames.append((position, size))
    position += size
  return frames


def likeness(a, b):
  """Largest correlation of two waves over shifts of up to 0.1 s."""
  samples = min(len(a), len(b)) - 3200
  a = a[1600 : 1600 + samples]
  products = np.correlate(b[: samples + 3200], a)
  energies = np.convolve(b[: samples + 3200] ** 2, np.ones(samples), 'valid')
  return (products / np.sqrt(energies * (a**2).sum())).max()


def test_an_mp3_of_two_is_read_whole():
  path = FIELD_INPUTS / 'joined_same.mp3'
  wave = audio.load_audio(path)
  half, _ = librosa.load(path, sr=None)  # all that librosa reads
  expected = librosa.resample(
    np.concatenate([half, half]), orig_sr=44100, target_sr=16000, res_type='soxr_hq'
  )
  assert len(wave) == round(2 * 3.28 * 16000)
  np.testing.assert_array_equal(wave, expected)


@pytest.mark.parametrize('name', ['mono_then_stereo.aac', 'rate_change.aac'])
def test_a_stream_that_changes_its_format_keeps_its_speed(name):
  """Both halves of these files hold the same speech."""
  wave = audio.load_audio(FIELD_INPUTS / name)
  assert abs(len(wave) / 16000 - 6.65) < 0.02
  middle = len(wave) // 2
  assert likeness(wave[:middle], wave[middle:]) > 0.9
  span = audio.load_span(FIELD_INPUTS / name, 3.0, 4.0)
  np.testing.assert_array_equal(span, wave[48000:64000])


def test_an_mp3_longer_than_its_header_is_read_whole(tmp_path):
  path = tmp_path / 'x.mp3'
  data = bytearray(written(path, noisy(3, 44100), 44100))
  expected = audio.load_audio(path)
  place = data.index(b'Xing') + 8
  frames = int.from_bytes(data[place : place + 4])
  for claimed in (1, frames // 3, frames - 1):
    data[place : place + 4] = claimed.to_bytes(4)
    path.write_bytes(data)
    wave = audio.load_audio(path)
    # The encoder's padding at the end, less than two frames, is unknown here.
    assert len(expected) <= len(wave) < len(expected) + 2 * 1152 * 16000 / 44100
    calm = len(expected) - 1000  # the resampler hears what follows
    np.testing.assert_array_equal(wave[:calm], expected[:calm])


@pytest.mark.parametrize('header', ['none', 'VBRI'])
def test_an_mp3_without_a_header_of_lame_is_read_whole(tmp_path, header):
  path = tmp_path / 'x.mp3'
  wave = np.roll(noisy(3, 44100), 66_150)  # loud first: large frames, few are expected
  data = written(path, wave, 44100, bitrate_mode='VARIABLE')
  expected = soundfile.SoundFile(path).read(dtype='float32')
  frames = mp3_frames(data)
  start, size = frames[1]
  count = len(frames) - 1
  delay = 576 + 529  # the encoder's and the decoder's; without a header it stays
  head = b''
  if header == 'VBRI':
    head = data[start : start + 4] + bytes(32) + b'VBRI\0\1' + struct.pack('>I', 75)
    head += struct.pack('>II', len(data), count)
    head = head.ljust(size, b'\0')
    count += 1  # libsndfile hears a frame of silence
    delay += 1152
  path.write_bytes(head + data[start:])
  assert len(audio.load_audio(path)) == -(-1152 * count * 16000 // 44100)
  with audio_blocks.open_recording(path) as file:
    blocks = [block.samples[:, 0] for block in audio_blocks.read_blocks(file, path)]
  heard = np.concatenate(blocks)[delay : delay + len(expected)]
  np.testing.assert_allclose(heard, expected, rtol=0, atol=2e-7)


def test_an_mp3_of_constant_rate_without_header_is_read_as_librosa_does(tmp_path):
  path = tmp_path / 'x.mp3'
  options = {'write_xing': '0', 'id3v2_version': '0'}
  contained(path, noisy(2, 44100, 2), 44100, 'mp3', options=options)
  expected, _ = librosa.load(path, sr=16000)
  np.testing.assert_array_equal(audio.load_audio(path), expected)


def test_an_mp3_from_ffmpeg_is_read_as_librosa_does(tmp_path):
  path = tmp_path / 'x.mp3'
  contained(path, noisy(2, 24000, 1), 24000, 'mp3')
  expected, _ = librosa.load(path, sr=16000)
  np.testing.assert_array_equal(audio.load_audio(path), expected)


@pytest.mark.parametrize(
  'between',
  [b'', ID3_COVER, ID3_V1, APE, ID3_V1 + ID3_COVER, bytes(700)],
  ids=['nothing', 'cover', 'old tag', 'APE tag', 'two tags', 'zeros'],
)
@pytest.mark.parametrize('rate, channels', [(44100, 2), (16000, 1)])
def test_mp3s_are_joined_across_tags_and_formats(tmp_path, between, rate, channels):
  path = tmp_path / 'x.mp3'
  first = written(path, noisy(1, 16000, 1), 16000)
  one = audio.load_audio(path)
  second = written(path, noisy(1.3, rate, channels, seed=1), rate)
  two = audio.load_audio(path)
  path.write_bytes(first + between + second + between)
  np.testing.assert_array_equal(audio.load_audio(path), np.concatenate([one, two]))


def test_an_ape_tag_may_stand_before_an_mp3(tmp_path):
  path = tmp_path / 'x.mp3'
  data = written(path, noisy(1, 44100), 44100)
  expected = audio.load_audio(path)
  path.write_bytes(APE + data)
  np.testing.assert_array_equal(audio.load_audio(path), expected)


@pytest.mark.parametrize('head', [bytes(512), bytes(4096), b'\r\n', b'\xff\xff'])
@pytest.mark.parametrize('header', ['of LAME', 'none'])
def test_bytes_before_the_first_mp3_frame_are_passed_over(tmp_path, head, header):
  path = tmp_path / 'x.mp3'
  if header == 'none':
    options = {'write_xing': '0', 'id3v2_version': '0'}
    data = contained(path, noisy(2, 44100, 2), 44100, 'mp3', options=options)
  else:
    data = written(path, noisy(2, 44100), 44100)
  path.write_bytes(head + data)
  expected, _ = librosa.load(path, sr=16000)
  np.testing.assert_array_equal(audio.load_audio(path), expected)
  path.write_bytes(ID3_COVER + head + data)
  np.testing.assert_array_equal(audio.load_audio(path), expected)


@pytest.mark.parametrize('name', ['x.wav', 'x.w64', 'x.caf', 'x.avi', 'x.mkv', 'x.mp4'])
def test_mp3_frames_in_a_file_of_another_format_do_not_make_it_mp3(tmp_path, name):
  contained(tmp_path / name, noisy(2, 16000), 16000, 'mp3')
  with open(tmp_path / name, 'rb') as file:
    assert not mp3.is_mp3(file)


@pytest.mark.parametrize(
  'name, options',
  [
    ('x.wav', {}),
    ('x.flac', {}),
    ('x.ogg', {}),
    ('x.ogg', OPUS),
    ('x.aiff', {}),
    ('x.m4a', None),
    ('x.mp4', None),
    ('x.mkv', None),
  ],
)
def test_joined_files_are_read_one_after_another(tmp_path, name, options):
  path = tmp_path / name
  write = contained if options is None else written
  options = options or {}
  first = write(path, noisy(0.9, 16000), 16000, **options)
  one = audio.load_audio(path)
  second = write(path, noisy(1.2, 48000, 2, seed=1), 48000, **options)
  two = audio.load_audio(path)
  path.write_bytes(first + second + first)
  wave = audio.load_audio(path)
  np.testing.assert_array_equal(wave, np.concatenate([one, two, one]))
  span = audio.load_span(path, 0.5, 1.7)
  np.testing.assert_array_equal(span, wave[8000:27200])


@pytest.mark.parametrize(
  'name, cut',
  [
    ('x.wav', 30),
    ('x.aiff', 20),
    ('x.flac', 40),
    ('x.ogg', 26),
    ('x.m4a', 40),
    ('x.mkv', 60),
  ],
)
def test_a_cut_beginning_at_the_end_is_passed_over(tmp_path, name, cut):
  path = tmp_path / name
  write = contained if name in ('x.m4a', 'x.mkv') else written
  second = write(path, noisy(1.2, 16000, seed=1), 16000)
  first = write(path, noisy(0.9, 16000), 16000)
  expected = audio.load_audio(path)
  path.write_bytes(first + second[:cut])
  np.testing.assert_array_equal(audio.load_audio(path), expected)


@pytest.mark.parametrize(
  'name, cut', [('x.wav', 30), ('x.aiff', 20), ('x.flac', 40), ('x.ogg', 26)]
)
def test_what_follows_a_cut_beginning_is_read(tmp_path, name, cut):
  path = tmp_path / name
  first = written(path, noisy(0.9, 16000), 16000)
  one = audio.load_audio(path)
  second = written(path, noisy(3, 16000, seed=1), 16000)
  two = audio.load_audio(path)
  path.write_bytes(first + second[:cut] + second)
  np.testing.assert_array_equal(audio.load_audio(path), np.concatenate([one, two]))


@pytest.mark.parametrize('name', ['x.wav', 'x.rf64', 'x.aiff'])
def test_a_beginning_within_the_length_of_a_file_is_part_of_it(tmp_path, name):
  path = tmp_path / name
  data = written(path, noisy(1, 16000), 16000)
  expected = audio.load_audio(path)
  inner = data[:200]
  # A chunk of no meaning behind the format, and one behind the samples.
  order, letters = ('big', b'SSND') if name == 'x.aiff' else ('little', b'data')
  chunk = b'junk' + len(inner).to_bytes(4, order) + inner
  place = data.index(letters)
  whole = bytearray(data[:place] + chunk + data[place:] + chunk)
  length = len(whole) - 8
  if name == 'x.rf64':
    whole[20:28] = length.to_bytes(8, order)
  else:
    whole[4:8] = length.to_bytes(4, order)
  path.write_bytes(whole + whole)
  np.testing.assert_array_equal(
    audio.load_audio(path), np.concatenate([expected, expected])
  )


@pytest.mark.parametrize('length', [0, 0xFFFFFFFF, 1 << 20, 32044])
def test_joined_wav_files_are_cut_apart_whatever_their_length_says(tmp_path, length):
  """Unknown, beyond the end, or the whole file instead of what follows the length."""
  path = tmp_path / 'x.wav'
  data = bytearray(written(path, noisy(1, 16000), 16000))
  expected = audio.load_audio(path)
  data[4:8] = struct.pack('<I', length)
  path.write_bytes(data + data)
  np.testing.assert_array_equal(
    audio.load_audio(path), np.concatenate([expected, expected])
  )


def test_a_track_that_changes_its_format_keeps_its_speed(tmp_path):
  path = tmp_path / 'x.ts'
  first = contained(path, noisy(1, 16000), 16000)
  time = np.arange(48000) / 48000
  sweep = 0.3 * np.sin(2 * np.pi * (200 + 400 * time) * time).astype(np.float32)
  second = contained(path, np.stack([sweep, sweep], axis=1), 48000)
  expected = audio.load_audio(path)
  path.write_bytes(first + second)
  wave = audio.load_audio(path)
  assert abs(len(wave) - 16000 - len(expected)) < 2 * 1024
  assert likeness(expected, wave[-len(expected) :]) > 0.99


def test_tags_around_flac_files_are_passed_over(tmp_path):
  path = tmp_path / 'x.flac'
  data = written(path, noisy(1, 16000), 16000)
  path.write_bytes(ID3_COVER + data + ID3_COVER + data + ID3_V1)
  assert len(audio.load_audio(path)) == 32000


@pytest.mark.parametrize('length', [0, 0xFFFFFFFF])
@pytest.mark.parametrize('whole', [False, True])
def test_a_wav_file_of_unknown_length_is_read_to_its_end(tmp_path, length, whole):
  """As writers to a pipe leave it, with or without the length of the file."""
  path = tmp_path / 'x.wav'
  data = bytearray(written(path, noisy(1, 16000) + 1e-3, 16000))
  expected = audio.load_audio(path)
  data[40:44] = struct.pack('<I', length)
  if not whole:
    data[4:8] = data[40:44]
  path.write_bytes(data)
  np.testing.assert_array_equal(audio.load_audio(path), expected)


def test_chunks_and_garbage_behind_the_samples_are_not_heard(tmp_path):
  path = tmp_path / 'x.wav'
  data = written(path, noisy(1, 16000), 16000)
  expected = audio.load_audio(path)
  chunk = b'LIST' + struct.pack('<I', 400) + bytes(range(100)) * 4
  path.write_bytes(data + chunk + b'garbage' * 1000)
  np.testing.assert_array_equal(audio.load_audio(path), expected)

  header = data[:40] + bytes(4)
  path.write_bytes(header + chunk)
  with pytest.raises(InputError, match='is empty'):
    audio.load_audio(path)


@pytest.mark.parametrize('name', ['x.mp3', 'x.wav', 'x.ogg'])
def test_what_is_left_of_a_file_is_read(tmp_path, name):
  path = tmp_path / name
  data = written(path, noisy(4, 44100), 44100)
  expected = audio.load_audio(path)
  path.write_bytes(data[: len(data) // 2])
  wave = audio.load_audio(path)
  assert 20_000 < len(wave) < 40_000
  calm = len(wave) - 1000
  np.testing.assert_array_equal(wave[:calm], expected[:calm])


@pytest.mark.parametrize('name', ['x.flac', 'x.m4a'])
def test_or_one_sentence_says_that_the_rest_is_missing(tmp_path, name):
  path = tmp_path / name
  write = contained if name == 'x.m4a' else written
  data = write(path, noisy(4, 44100), 44100)
  path.write_bytes(data[: len(data) // 2])
  with pytest.raises(InputError, match='check that it is whole'):
    audio.load_audio(path)


def test_the_first_of_several_tracks_is_read(tmp_path):
  wave = noisy(1, 48000)
  contained(tmp_path / 'one.mkv', wave, 48000)
  contained(tmp_path / 'two.mkv', wave, 48000, tracks=2)
  np.testing.assert_array_equal(
    audio.load_audio(tmp_path / 'two.mkv'), audio.load_audio(tmp_path / 'one.mkv')
  )


def test_tags_in_other_encodings_are_ignored(tmp_path):
  path = tmp_path / 'x.mkv'
  wave = noisy(1, 16000)
  data = contained(path, wave, 16000)
  path.write_bytes(data.replace(b'Lavf', b'L\xe4vf'))
  assert len(audio.load_audio(path)) > 16000


def test_a_later_start_in_the_container_loses_nothing(tmp_path):
  wave = noisy(1, 48000)
  contained(tmp_path / 'now.ts', wave, 48000)
  contained(tmp_path / 'later.ts', wave, 48000, options={'output_ts_offset': '7'})
  np.testing.assert_array_equal(
    audio.load_audio(tmp_path / 'later.ts'), audio.load_audio(tmp_path / 'now.ts')
  )


@pytest.mark.parametrize(
  'name', ['concat:other.m4a', 'http:x.m4a', 'file:other.m4a', 'x.raw']
)
def test_a_name_is_never_interpreted(tmp_path, monkeypatch, name):
  monkeypatch.chdir(tmp_path)
  contained(tmp_path / 'this.m4a', noisy(1, 16000), 16000)
  contained(tmp_path / 'other.m4a', noisy(2, 16000), 16000)
  expected = audio.load_audio('this.m4a')
  (tmp_path / 'this.m4a').rename(name)
  np.testing.assert_array_equal(audio.load_audio(name), expected)


def test_a_disk_that_fails_is_not_the_end_of_the_recording(tmp_path, monkeypatch):
  path = tmp_path / 'x.wav'
  size = len(written(path, noisy(20, 16000), 16000))

  class Broken:
    """Fails behind the first 100 kB."""

    def __init__(self, file):
      self.file = file

    def seek(self, position):
      if position > 100_000:
        raise OSError(5, 'Input/output error')
      self.file.seek(position)

    def readinto(self, view):
      return self.file.readinto(view)

  monkeypatch.setattr(
    audio_blocks.joined, 'parts', lambda file: [FilePart(Broken(file), 0, size)]
  )
  with pytest.raises(InputError, match='Input/output error') as info:
    audio.load_audio(path)
  assert info.value.__cause__.errno == 5  # preparation counts it as the machine's fault
