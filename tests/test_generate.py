"""The command that generates: a video with audio for good inputs; one sentence and
exit code 2 for each bad one.
"""

import os
import shutil
import sys

import av
import jax
import jax.numpy as jnp
import librosa
import numpy as np
from PIL import Image
import pytest
import soundfile

from data_pipelines.synthetic.clip import make_portrait
from dicetalk_jax import bundle, generate
from dicetalk_jax.bundle import ModelFolder
from dicetalk_jax.diffusion.sampler import draw_noise
from dicetalk_jax.errors import InputError
from dicetalk_jax.media.video import read_video
from dicetalk_jax.models import fused
from dicetalk_jax.models.target import compiling_for
from dicetalk_jax.pipeline import Pipeline
from dicetalk_jax.settings import Settings
from tests import tiny


@pytest.fixture(scope='module', autouse=True)
def quick_compilation():
  with tiny.quick_compilation(), tiny.shared_programs():
    yield


@pytest.fixture(scope='module')
def inputs(tmp_path_factory):
  """Flags that work."""
  folder = tmp_path_factory.mktemp('inputs')
  Image.fromarray(tiny.portrait()).save(folder / 'face.png')
  tiny.write_speech(folder / 'speech.wav')
  x, y, width, height = tiny.FACE_BOX
  return dict(
    model=tiny.shared_model(tmp_path_factory),
    image=folder / 'face.png',
    audio=folder / 'speech.wav',
    emotion='happy',
    face_box=f'{x},{y},{x + width},{y + height}',
  )


def command(monkeypatch, **flags):
  """Runs the command like a shell does."""

  def spelled(name, value):
    return f'--{name}' if value is True else f'--{name}={value}'

  argv = [spelled(*flag) for flag in flags.items() if flag[1] is not None]
  monkeypatch.setattr(sys, 'argv', ['generate', *argv])
  generate.run()


def test_which_of_several_faces(inputs, tmp_path):
  """The number of the flag counts from left to right; the largest is the default."""
  image = np.full((128, 256, 3), 110, np.uint8)
  image[:100, :100] = make_portrait(1, 100)[0]
  image[:128, 128:] = make_portrait(2, 128)[0]
  Image.fromarray(image).save(tmp_path / 'two.png')

  def box(**flags):
    flags = {**inputs, 'face_box': None, 'image': tmp_path / 'two.png', **flags}
    argv = [f'--{name}={value}' for name, value in flags.items() if value is not None]
    parsed = generate._parser().parse_args([*argv, '--output=a.mp4'])
    model = ModelFolder.open(parsed.model)
    wave = tiny.speech()
    return generate._job(parsed, model, Settings.of(model), wave).face_box

  assert box()[0] > 128 and box() == box(face_index=2) == box(face_index='published')
  assert box(face_index=1)[0] < 100
  with pytest.raises(InputError, match='--face_index=3, but 2 faces were found'):
    box(face_index=3)


def test_writes_a_video_with_audio(inputs, tmp_path, monkeypatch, capsys):
  """With the sound of the recording, from and to relative names that hold colons."""
  assert generate._mesh().size == 8  # all devices
  # Here one, whose programs other tests have compiled.
  monkeypatch.setattr(generate, '_mesh', lambda: None)
  monkeypatch.chdir(tmp_path)
  shutil.copy(inputs['image'], 'face:1.png')
  shutil.copytree(inputs['model'], 'model:1')
  left = librosa.resample(tiny.speech(), orig_sr=16000, target_sr=48000)
  soundfile.write('rec:1.flac', np.stack([left, 0.5 * left], axis=1), 48000)
  named = dict(image='face:1.png', model='model:1', audio='rec:1.flac')
  output = 'new:1/12:30.mp4'
  command(monkeypatch, **{**inputs, **named}, output=output, seed=3)
  captured = capsys.readouterr()
  assert captured.out == f'{output}: 0.8 s, 16x20, 19 frames at 25 per second\n'
  for stage in ('loading', 'sampling', 'decoding'):
    assert f'{stage}: 100%' in captured.err
  assert captured.err.count('\n') == 3  # a bar each
  assert os.listdir('new:1') == ['12:30.mp4']
  with av.open(os.path.abspath(output)) as container:
    track = container.streams.audio[0]
    assert (track.rate, track.layout.name) == (48000, 'stereo')
    assert float(track.duration * track.time_base) == pytest.approx(0.76, abs=1e-3)
  video = read_video(output)
  assert video.frames.shape == (19, 20, 16, 3) and video.fps == 25
  wave = video.audio  # ends with the last frame, half a frame before the recording
  assert np.corrcoef(wave, tiny.speech()[: len(wave)])[0, 1] > 0.9


def test_what_is_done_about_channels_that_cancel_is_said_in_a_line(
  inputs, tmp_path, monkeypatch, capsys
):
  wave = tiny.speech()
  soundfile.write(tmp_path / 'x.flac', np.stack([wave, -wave], axis=1), 16000)
  flags = {**inputs, 'audio': tmp_path / 'x.flac', 'emotion': 'hungry'}
  with pytest.raises(SystemExit):
    command(monkeypatch, **flags, output=tmp_path / 'out.mp4')
  note, error = capsys.readouterr().err.splitlines()
  assert note.startswith(f'note: the channels of {tmp_path}/x.flac cancel each other')
  assert error.startswith('error: ')


def test_crop_image_size_and_the_settings_of_the_file(
  inputs, tmp_path, monkeypatch, capsys
):
  """The crop of this face is 64x64 pixels; 24 of them are generated, 64 written."""
  monkeypatch.setattr(generate, '_mesh', lambda: None)
  ramp = np.linspace(30, 220, 24).astype(np.uint8)
  frames = np.broadcast_to(ramp[:, None], (10, 24, 24, 3))
  jobs = []
  fused_kernels = []

  def run(self, job, progress):
    jobs.append(job)
    with compiling_for('cuda'):
      fused_kernels.append(fused.can_run(jnp.bfloat16, 3))
    return frames, 12.5

  monkeypatch.setattr(Pipeline, 'run', run)
  output = tmp_path / 'out.mp4'
  flags = dict(crop=True, image_size=24, keep_resolution=True, crf=9)
  command(monkeypatch, **inputs, **flags, output=output)
  command(monkeypatch, **inputs, **flags, output=output, fused_kernels=True)
  assert fused_kernels == [False, True]
  np.testing.assert_array_equal(jobs[0].image, tiny.portrait()[:64])
  assert jobs[0].face_box == tiny.FACE_BOX  # in the square, which is at the top left
  assert jobs[0].image_size == 24

  assert ' 64x64, 10 frames at 12.5 per second\n' in capsys.readouterr().out
  assert b'crf=9.0' in output.read_bytes()  # x264 notes its options in the file
  video = read_video(output)
  assert video.frames.shape == (10, 64, 64, 3) and video.fps == 12.5
  expected = np.interp((np.arange(64) + 0.5) * 24 / 64 - 0.5, np.arange(24), ramp)
  assert np.abs(video.frames - expected[:, None]).max() <= 5


@pytest.mark.parametrize(
  'flags, lines',
  [
    (
      {},
      [
        '10 frames at 12.5 per second',
        'has no flownet, which would double the frame rate',
      ],
    ),
    ({'no-interpolate': True}, ['10 frames at 12.5 per second']),
  ],
)
def test_without_interpolation(inputs, tmp_path, monkeypatch, capsys, flags, lines):
  """A model that cannot says so, unless nobody asked."""
  monkeypatch.setattr(generate, '_mesh', lambda: None)
  (tmp_path / 'model').mkdir()
  model = tiny.model_without(inputs['model'], tmp_path / 'model', 'flownet')
  command(
    monkeypatch, **{**inputs, 'model': model}, **flags, output=tmp_path / 'out.mp4'
  )
  out = capsys.readouterr().out.splitlines()
  assert len(out) == len(lines)
  assert all(map(str.endswith, out, lines))


def test_sonic(inputs, tmp_path, tmp_path_factory, monkeypatch, capsys):
  """Takes no emotion, and says so."""
  sonic = {
    **inputs,
    'model': tiny.shared_sonic(tmp_path_factory),
    'output': tmp_path / 'out.mp4',
  }
  with monkeypatch.context() as patch:
    refuses(patch, capsys, tmp_path, 'has no emotions; leave --emotion out', sonic)
  monkeypatch.setattr(generate, '_mesh', lambda: None)
  command(monkeypatch, **{**sonic, 'emotion': None})
  assert '10 frames at 12.5 per second' in capsys.readouterr().out
  video = read_video(tmp_path / 'out.mp4')
  assert video.frames.shape == (10, 20, 16, 3) and video.audio is not None


def test_noise_of_the_reference_implementation(inputs, tmp_path, monkeypatch):
  """Laid out as there; what is drawn from a seed, given so, makes the same video."""
  pipe = Pipeline.load(inputs['model'])
  job = pipe.job(tiny.portrait(), tiny.speech(), 'happy', face_box=tiny.FACE_BOX)
  conditions, length = pipe.conditions(job)
  padded = np.asarray(draw_noise(jax.random.key(3)[None], conditions, 4))
  noise = padded[:, : length + 4]
  np.save(tmp_path / 'noise.npy', np.moveaxis(noise, -1, 2))
  written = []
  monkeypatch.setattr(generate, '_mesh', lambda: None)
  monkeypatch.setattr(
    generate,
    'write_video',
    lambda path, frames, *args, **kwargs: written.append(frames),
  )
  for flags in (dict(seed=3), dict(noise=tmp_path / 'noise.npy')):
    command(monkeypatch, **inputs, **flags, output=tmp_path / 'out.mp4')
  np.testing.assert_array_equal(*written)
  with pytest.raises(InputError, match=r'this clip needs \(14, 10, 8, 4\)'):
    pipe.job(job.image, job.wave, 'happy', face_box=job.face_box, noise=noise[0, 1:])


def test_insisting_on_interpolation(inputs, tmp_path, monkeypatch, capsys):
  (tmp_path / 'model').mkdir()
  model = tiny.model_without(inputs['model'], tmp_path / 'model', 'flownet')
  refuses(
    monkeypatch,
    capsys,
    tmp_path,
    'has no flownet',
    {**inputs, 'model': model, 'output': tmp_path / 'out.mp4', 'interpolate': True},
  )


def test_no_arguments_show_the_help(monkeypatch, capsys):
  monkeypatch.setattr(sys, 'argv', ['generate'])
  with pytest.raises(SystemExit) as info:
    generate.run()
  usage = capsys.readouterr().err
  assert info.value.code == 2
  for flag in (
    'model',
    'image',
    'audio',
    'emotion',
    'output',
    'face_box',
    'seed',
    'steps',
  ):
    assert f'--{flag}' in usage
  assert '(default: 0)' in usage


def empty(path):
  path.write_bytes(b'')


def rubbish(path):
  path.write_bytes(b'\x89PNG no image, no audio')


def cut_image(path):
  Image.fromarray(tiny.portrait()).save(path, format='PNG')
  path.write_bytes(path.read_bytes()[:-200])


def silent(path):
  tiny.write_speech(path, np.zeros(16000, np.float32))


def blip(path):
  tiny.write_speech(path, tiny.speech(0.05))


def no_samples(path):
  tiny.write_speech(path, np.zeros(0, np.float32))


def flat_noise(path):
  np.save(path, np.zeros((3, 4)))


def no_components(path):
  bundle.save_settings(path, {})


@pytest.mark.parametrize(
  'flag, make, name, sentence',
  [
    ('image', None, 'none.png', 'does not exist'),
    ('image', rubbish, 'face.png', 'cannot be read'),
    ('image', cut_image, 'face.png', 'cannot be read'),
    ('audio', None, 'none.wav', 'none.wav'),
    ('audio', empty, 'a.wav', 'a.wav'),
    ('audio', rubbish, 'a.wav', 'a.wav'),
    ('audio', silent, 'a.wav', 'silent'),
    ('audio', no_samples, 'a.wav', 'empty'),
    ('audio', blip, 'a.wav', 'less than one frame'),
    ('model', None, 'nowhere', 'is not a model folder'),
    ('model', no_components, 'part', 'has no unet and no vae'),
    ('noise', None, 'none.npy', 'cannot be read as an array'),
    ('noise', rubbish, 'noise.npy', 'cannot be read as an array'),
    ('noise', flat_noise, 'noise.npy', 'has the shape (3, 4) instead of (1, frames'),
    ('output', empty, 'file/out.mp4', 'cannot write'),
    ('output', None, 'out.avi', 'end the name in .mp4'),
  ],
)
def test_bad_files(inputs, tmp_path, monkeypatch, capsys, flag, make, name, sentence):
  path = tmp_path / name
  if make is not None:
    make(path.parent if flag == 'output' else path)
  refuses(
    monkeypatch,
    capsys,
    tmp_path,
    sentence,
    {**inputs, 'output': tmp_path / 'out.mp4', flag: path},
  )


@pytest.mark.parametrize(
  'changes, sentence',
  [
    (dict(emotion='bored'), 'it has: happy, sad'),
    (dict(emotion='../unet'), 'it has: happy, sad'),
    (dict(emotion=None), '--emotion'),
    (dict(face_box=None), 'no face was found'),
    (dict(face_index='1'), 'leave one of them out'),
    (dict(face_box=None, face_index='second'), 'face_index=second is not understood'),
    (dict(face_box='1,2,3'), 'four numbers'),
    (dict(face_box='10,10,900,900'), 'within the image'),
    (dict(steps=0), 'at least one step'),
    (dict(steps='many'), '--steps'),
    (dict(image_size=0), 'an image size of 0 is too small; use a multiple of 2'),
    (dict(image_size=-64), 'an image size of -64 is too small'),
    (dict(image_size='big'), '--image_size'),
    (dict(crop=True, face_box='30,30,50,50'), 'has only 40x40 pixels, each side needs'),
    (dict(crf=52), 'give --crf from 0, the best, to 51'),
    (dict(crf=-1), 'give --crf from 0, the best, to 51'),
    (dict(stepz=5), '--stepz'),
  ],
)
def test_bad_flags(inputs, tmp_path, monkeypatch, capsys, changes, sentence):
  refuses(
    monkeypatch,
    capsys,
    tmp_path,
    sentence,
    {**inputs, 'output': tmp_path / 'out.mp4', **changes},
  )


def refuses(monkeypatch, capsys, folder, sentence, flags):
  """One line, exit code 2, before any weights are read, and no output."""

  def load(*args, **kwargs):
    raise AssertionError('weights were read before the inputs were checked')

  monkeypatch.setattr(Pipeline, 'load', load)
  before = sorted(folder.rglob('*'))
  with pytest.raises(SystemExit) as info:
    command(monkeypatch, **flags)
  message = capsys.readouterr().err
  assert info.value.code == 2
  assert message.startswith('error: ')
  assert message.count('\n') == 1
  assert sentence in message
  assert sorted(folder.rglob('*')) == before
