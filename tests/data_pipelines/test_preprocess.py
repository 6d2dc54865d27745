"""Records of clip files: how they are cut, and which clips are left out."""

import dataclasses
import errno
import functools

import av
import numpy as np
import pytest
from skimage import data
import soundfile

from data_pipelines import preprocess
from data_pipelines.corpora import clip_file
from data_pipelines.corpora.clip_file import ClipFile, Skipped
from data_pipelines.corpora.file_tree import Tree
from data_pipelines.preprocess import CorpusConfig
from dicetalk_jax.data import clip_record
from dicetalk_jax.errors import ConfigError
from dicetalk_jax.media import audio, video, video_reader
from dicetalk_jax.media.face_tracking import one_by_one
from dicetalk_jax.media.image import crop_square
from tests.data_pipelines import made_clips
from tests.data_pipelines.made_clips import pictures, tone

CONFIG = CorpusConfig('folder', size=32, min_seconds=0.4)


def _records(root, config=CONFIG, expressions=None, detector=None, **clip):
  clip = ClipFile(
    **{
      'clip_id': 'a',
      'video_id': 'a',
      'identity': 'folder/x',
      'dataset': 'other',
      'video': 'a.mp4',
      **clip,
    }
  )
  found = list(
    preprocess.records(
      clip,
      config,
      Tree(root),
      expressions and Tree(expressions),
      detector or one_by_one(made_clips.red()),
    )
  )
  return (
    [example for example in found if not isinstance(example, Skipped)],
    [(skip.clip, skip.reason) for skip in found if isinstance(skip, Skipped)],
  )


def _overlaps(clip):
  """Checks that the boxes of a record are where its frames are red."""
  for frame, place in zip(clip_record.decode_frames(clip), clip['bbox'] * 32):
    left, top, width, height = made_clips.red()(frame)
    np.testing.assert_allclose(place, [left, top, left + width, top + height], atol=2)


def test_a_clip_becomes_a_square_around_the_face(tmp_path):
  made_clips.write(tmp_path / 'a.mp4', 1.2, fps=30, step=0.5)
  ((key, clip),) = _records(tmp_path, emotion='happy', intensity=2, text='Hello')[0]
  assert key == clip['clip_id'] == 'a' and clip['num_frames'] == 30 == len(
    clip['frames']
  )
  assert (
    clip['emotion'] == 'happy' and clip['intensity'] == 2 and clip['text'] == 'Hello'
  )
  assert (
    clip['dataset'] == 'other'
    and clip['has_video']
    and clip['has_audio']
    and not clip['has_expression']
  )
  frames = clip_record.decode_frames(clip)
  assert frames.shape == (30, 32, 32, 3)
  _overlaps(clip)
  # The face moves in a window that does not.
  assert clip['bbox'][:, 0].max() > clip['bbox'][:, 0].min() + 0.2
  assert clip['motion_head'] > 0.1
  decoded = clip_record.decode_audio(clip)
  assert len(decoded) == 30 * 640
  np.testing.assert_allclose(np.corrcoef(decoded, tone(1.2))[0, 1], 1, atol=0.03)


def test_the_crop_is_that_of_the_reference_implementation(tmp_path):
  made_clips.write(tmp_path / 'a.mp4', 1.0)
  ((_, clip),) = _records(tmp_path)[0]
  x0, y0, x1, y1 = crop_square((30, 20, 54, 44), 96, 72)
  np.testing.assert_allclose(
    clip['bbox'][5],
    np.array([30 - x0, 20 - y0, 54 - x0, 44 - y0]) / (x1 - x0),
    atol=0.05,
  )
  ((_, wide),) = _records(tmp_path, dataclasses.replace(CONFIG, expand=2.0))[0]
  assert np.ptp(wide['bbox'][5, ::2]) < np.ptp(clip['bbox'][5, ::2])


def test_a_photograph_is_found_by_the_detector_that_comes_along(tmp_path):
  image = data.astronaut()
  video.write_video(
    tmp_path / 'a.mp4',
    np.stack([np.roll(image, i, 1) for i in range(10)]),
    25,
    tone(0.4),
  )
  ((_, clip),) = _records(
    tmp_path,
    dataclasses.replace(CONFIG, detect_every=5),
    detector=preprocess.make_detector('mtcnn'),
  )[0]
  left, top, right, bottom = clip['bbox'][0]
  assert (
    0.15 < left < 0.4
    and 0.6 < right < 0.85
    and 0.15 < top < 0.4
    and 0.6 < bottom < 0.85
  )
  assert np.unique(clip_record.decode_frames(clip)).size > 100


def test_interval_and_box_of_the_corpus(tmp_path):
  made_clips.write(tmp_path / 'a.mp4', 3.0, step=0.4)
  # The box refers to a frame of twice the height.
  ((_, clip),) = _records(
    tmp_path, start=1.0, end=2.0, crop=(60, 20, 120, 120), crop_height=144
  )[0]
  assert clip['num_frames'] == 25
  _overlaps(clip)
  np.testing.assert_allclose(clip['bbox'][6, 0], (30 + 0.4 * 31 - 30) / 60, atol=0.04)
  np.testing.assert_allclose(
    clip_record.decode_audio(clip)[3000:9000], tone(3.0)[19000:25000], atol=0.05
  )
  assert _records(tmp_path, crop=(60, 20, 220, 120), crop_height=144)[1] == [
    ('a', 'crop box outside of the frame')
  ]
  assert _records(tmp_path, start=50.0, end=60.0)[1] == [('a', 'file cannot be read')]


def test_long_clips_are_cut_into_equal_pieces(tmp_path):
  made_clips.write(tmp_path / 'a.mp4', 2.6, step=0.3)
  config = dataclasses.replace(CONFIG, max_seconds=1.0, expression_dim=1)
  np.save(tmp_path / 'a.npy', np.arange(65)[:, None])
  clips, _ = _records(tmp_path, config, tmp_path, expression='a.npy', video_id='v')
  assert [(key, clip['num_frames'], clip['video_id']) for key, clip in clips] == [
    ('a_p00', 22, 'v'),
    ('a_p01', 21, 'v'),
    ('a_p02', 22, 'v'),
  ]
  assert np.concatenate([clip['expression'] for _, clip in clips])[
    :, 0
  ].tolist() == list(range(65))
  whole = np.concatenate([clip_record.decode_audio(clip) for _, clip in clips])
  np.testing.assert_allclose(whole[4000:38000], tone(2.6)[4000:38000], atol=0.05)
  for _, clip in clips:
    _overlaps(clip)


def test_shots_are_divided_in_the_wild_only(tmp_path):
  frames = np.concatenate(
    [
      pictures(15),
      pictures(12, light=170, face=(60, 40)),
      pictures(5),
    ]
  )
  video.write_video(tmp_path / 'a.mp4', frames, 25, tone(1.28))
  clips, skipped = _records(tmp_path)
  assert [(key, clip['num_frames']) for key, clip in clips] == [
    ('a_p00', 15),
    ('a_p01', 12),
  ]
  assert skipped == [('a_p02', 'face visible too briefly')]
  studio, _ = _records(tmp_path, CorpusConfig('mead', size=32, min_seconds=0.4))
  # No frame is lost: faces are followed as they move.
  assert sum(clip['num_frames'] for _, clip in studio) == 32


def test_content_without_pixels(tmp_path):
  made_clips.write(tmp_path / 'a.mp4', 1.0)
  ((_, clip),) = _records(tmp_path, dataclasses.replace(CONFIG, content='embedder'))[0]
  assert 'frames' not in clip and not clip['has_video'] and len(clip['bbox']) == 25
  ((_, clip),) = _records(tmp_path, dataclasses.replace(CONFIG, content='latents'))[0]
  assert clip['latents'].shape == (0, 4, 4, 4)


def test_a_separate_audio_file(tmp_path):
  made_clips.write(tmp_path / 'a.mp4', 1.0)
  video.write_video(tmp_path / 'b.mp4', pictures(25), 25, tone(1.0, 440.0))
  ((_, clip),) = _records(tmp_path, audio='b.mp4')[0]
  np.testing.assert_allclose(
    np.corrcoef(clip_record.decode_audio(clip), tone(1.0, 440.0))[0, 1], 1, atol=0.03
  )


def test_an_interval_has_the_same_audio_however_it_is_read(tmp_path, monkeypatch):
  made_clips.write(tmp_path / 'a.mp4', 4.0)
  soundfile.write(tmp_path / 'b.wav', tone(4.0 * 44100 / 16000, 100.0), 44100)
  load_span = audio.load_span
  for file, start, end in (
    ('', 1.0, 3.0),
    ('', 0.0, 2.03),
    ('', 1.5, 4.0),
    ('b.wav', 0.31, 2.0),
    ('b.wav', 2.0, 9.0),
  ):
    clip = {'audio': file, 'start': start, 'end': end}
    ((_, ours),) = _records(tmp_path, **clip)[0]
    with monkeypatch.context() as patch:
      patch.setattr(
        audio,
        'load_span',
        lambda path, start, end: audio.begin_at(load_span(path), start),
      )
      ((_, whole),) = _records(tmp_path, **clip)[0]
    np.testing.assert_array_equal(
      clip_record.decode_audio(ours), clip_record.decode_audio(whole)
    )


def test_a_joined_recording_is_kept_whole(tmp_path):
  made_clips.write(tmp_path / 'a.mp4', 3.0)
  wave = tone(1.5, 100.0)
  soundfile.write(tmp_path / 'half.mp3', wave, 16000)
  (tmp_path / 'b.mp3').write_bytes((tmp_path / 'half.mp3').read_bytes() * 2)
  ((_, clip),) = _records(tmp_path, audio='b.mp3')[0]
  decoded = clip_record.decode_audio(clip)
  assert len(decoded) == 48000
  for half in (decoded[:24000], decoded[24000:]):
    np.testing.assert_allclose(np.corrcoef(half, wave)[0, 1], 1, atol=0.03)


def test_audio_must_last_as_long_as_the_frames(tmp_path):
  made_clips.write(tmp_path / 'a.mp4', 2.0)
  for name, seconds in (('nearly', 1.85), ('half', 1.0), ('none', 0.01)):
    soundfile.write(tmp_path / f'{name}.wav', tone(seconds), 16000)
  ((_, clip),) = _records(tmp_path, audio='nearly.wav')[0]
  decoded = clip_record.decode_audio(clip)
  assert (
    len(decoded) == 32000
    and np.abs(decoded[:29600]).max() > 0.3
    and not decoded[29600:].any()
  )
  for name in ('half', 'none'):
    assert _records(tmp_path, audio=f'{name}.wav') == ([], [('a', 'audio ends early')])
  pieces, left = _records(
    tmp_path, dataclasses.replace(CONFIG, max_seconds=1.0), audio='half.wav'
  )
  assert [key for key, _ in pieces] == ['a_p00'] and left == [
    ('a_p01', 'audio ends early')
  ]


def test_expression_features_at_the_rate_of_the_video(tmp_path):
  made_clips.write(tmp_path / 'a.mp4', 2.0, fps=30)
  np.save(
    tmp_path / 'a.npy', np.stack([np.arange(60) / 30, np.ones(60), np.ones(60)], axis=1)
  )
  read = functools.partial(_records, tmp_path, expressions=tmp_path, expression='a.npy')
  config = dataclasses.replace(CONFIG, expression_columns=(0, 2), expression_dim=2)
  ((_, clip),) = read(config)[0]
  np.testing.assert_allclose(clip['expression'][:49, 0], np.arange(49) / 25, atol=1e-6)
  assert (
    clip['has_expression']
    and clip['motion_exp'] > 0
    and clip['expression'].shape == (50, 2)
  )
  ((_, part),) = read(config, start=0.6, end=1.4)[0]
  np.testing.assert_allclose(
    part['expression'][:, 0], 0.6 + np.arange(20) / 25, atol=1e-6
  )
  assert read(dataclasses.replace(config, expression_fps=25.0))[1] == [
    ('a', 'expression features do not fit')
  ]
  # The file has 3 columns, not 64.
  assert read(CONFIG)[1] == [('a', 'expression features do not fit')]


def test_clips_that_cannot_be_used_are_left_out_with_a_reason(tmp_path):
  made_clips.write(tmp_path / 'a.mp4', 1.0)
  made_clips.write(tmp_path / 'mute.mp4', 1.0, sound=False)
  video.write_video(tmp_path / 'silent.mp4', pictures(25), 25, np.zeros(16000))
  video.write_video(tmp_path / 'nobody.mp4', pictures(25, side=0), 25, tone(1.0))
  whole = made_clips.write(tmp_path / 'long.mp4', 4.0).read_bytes()
  (tmp_path / 'cut.mp4').write_bytes(whole[: len(whole) * 2 // 3])
  (tmp_path / 'text.mp4').write_text('404')
  for name, reason in {
    'mute': 'no audio',
    'silent': 'silent',
    'nobody': 'no face found',
    'cut': 'file cannot be read',
    'text': 'file cannot be read',
    'gone': 'file missing',
  }.items():
    assert _records(tmp_path, video=f'{name}.mp4') == ([], [('a', reason)]), name
  assert _records(tmp_path, audio='gone.m4a')[1] == [('a', 'file missing')]
  assert _records(tmp_path, dataclasses.replace(CONFIG, min_seconds=1.1))[1] == [
    ('a', 'clip too short')
  ]
  assert _records(tmp_path, dataclasses.replace(CONFIG, min_face=40))[1] == [
    ('a', 'face too small')
  ]

  def breaks(image):
    raise RuntimeError('out of order')

  assert _records(tmp_path, detector=breaks)[1] == [('a', 'unexpected error')]


def _raising(error):
  def breaks(*args, **kwargs):
    raise error

  return breaks


def test_faults_of_the_machine_are_not_those_of_the_clip(tmp_path, monkeypatch):
  made_clips.write(tmp_path / 'a.mp4', 1.0)
  np.save(tmp_path / 'a.npy', np.ones((25, 64)))
  read = functools.partial(_records, tmp_path, expressions=tmp_path, expression='a.npy')
  for module, name, error in (
    (Tree, 'local', TimeoutError('bucket')),
    (video_reader.av, 'open', av.error.OSError(errno.EIO, 'Input/output error')),
    (np, 'load', MemoryError()),
    (np, 'load', OSError(errno.ESTALE, 'Stale file handle')),
  ):
    with monkeypatch.context() as patch:
      patch.setattr(module, name, _raising(error))
      assert read()[1] == [('a', clip_file.UNEXPECTED)], error
  with monkeypatch.context() as patch:
    patch.setattr(np, 'load', _raising(OSError('no number: the file is damaged')))
    assert read()[1] == [('a', 'expression features do not fit')]
  with monkeypatch.context() as patch, pytest.raises(OSError, match='No space'):
    patch.setattr(
      Tree, 'local', _raising(OSError(errno.ENOSPC, 'No space left on device'))
    )
    read()


def test_impossible_settings_are_refused():
  for changes in (
    {'size': 30},
    {'min_seconds': 30.0},
    {'max_seconds': 100.0},
    {'detect_every': 0},
    {'expression_columns': (3, 3)},
    {'expand': -1.0},
    {'expression_fps': -1.0},
  ):
    with pytest.raises(ConfigError, match=f'{next(iter(changes))}='):
      dataclasses.replace(CONFIG, **changes)
  with pytest.raises(ConfigError, match='detector=nothing:here cannot be imported'):
    preprocess.make_detector('nothing:here')
  assert (CorpusConfig('mead').min_face, CorpusConfig('voxceleb2').min_face) == (256, 0)
  assert (CorpusConfig('mead').min_seconds, CorpusConfig('hdtf').min_seconds) == (
    2,
    2.5,
  )
