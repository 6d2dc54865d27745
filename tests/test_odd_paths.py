"""Whatever is written or read: it works below folders of any name."""

import os
import pathlib
import pickle
import shutil
import subprocess
import sys

from etils import epath
from etils.epath import gpath
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
from safetensors.torch import save_file
import soundfile
import tensorflow_datasets as tfds
import torch

from convert import __main__ as convert
from convert import torch_files
from data_pipelines import filesystems
from data_pipelines.builders import corpus
from data_pipelines.builders.corpus_plan import make_plan
from data_pipelines.builders.synthetic import prepare_synthetic
from data_pipelines.builders.synthetic_clips import SyntheticConfig
from data_pipelines.preprocess import CorpusConfig
from dicetalk_jax import (
  bundle,
  cli,
  literal_glob,
  orbax_paths,
  pack,
  parallel,
  published_priors,
)
from dicetalk_jax.data.autoencoder_loader import frames_loader
from dicetalk_jax.data.clip_source import ClipSource, data_sets
from dicetalk_jax.data.feature_store import FeatureStore
from dicetalk_jax.data.mixture import DatasetPart
from dicetalk_jax.errors import ConfigError, DataError, InputError, WeightsError
from dicetalk_jax.main import tensorboard_writer
from dicetalk_jax.media import audio, image, video, video_reader
from dicetalk_jax.training.datasets import open_train_and_val
from dicetalk_jax.training.loop import train
from dicetalk_jax.training.run_log import read_json_lines
from tests import tiny
from tests.data_pipelines import made_clips
from tests.training import toy

ONE = parallel.make_mesh(devices=jax.devices()[:1])
NAMES = ['try [1]', 'a*b?', 'back\\slash {x}', '%20 é ü #', '~a, b=c; $HOME\'"']
ALL = 'try [1]/a*b?/back\\slash {x} %20 é ü'
PARAMS = {'kernel': jnp.arange(64 * 128.0).reshape(64, 128), 'bias': jnp.arange(3.0)}


@pytest.fixture(params=NAMES)
def place(request, tmp_path):
  """A folder of each name, next to one that its name matches as a pattern."""
  for decoy in ('try 1', 'aXbY'):
    bundle.save_priors(tmp_path / decoy / 'model', {'decoy': (np.zeros(4), np.ones(4))})
  (folder := tmp_path / request.param).mkdir()
  return folder


@pytest.fixture
def deep(tmp_path):
  """A folder with all of it in its name."""
  (folder := tmp_path / ALL).mkdir(parents=True)
  return folder


@pytest.fixture
def unmended(monkeypatch):
  """Writes as the program did before its paths were mended."""

  def written(write):
    with monkeypatch.context() as patch:
      patch.setattr(gpath.PosixGPath, 'glob', literal_glob._etils_glob)
      patch.setattr(orbax_paths, 'plain', epath.Path)
      write()

  return written


def call(*args) -> int:
  with pytest.raises(SystemExit) as stop:
    convert.run_command([*map(str, args)])
  return stop.value.code


def assert_same(actual, expected):
  assert actual.keys() == expected.keys()
  jax.tree.map(np.testing.assert_array_equal, dict(actual), dict(expected))


def toy_config(total):
  return toy.get_config(total_steps=total, accum=1, checkpoint_every=2, eval_every=4)


def all_losses(workdir):
  return [
    {k: v for k, v in row.items() if 'per_second' not in k}
    for row in read_json_lines(workdir / 'metrics.jsonl')
  ]


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """An uninterrupted run of four steps in a folder of a plain name."""
  run = tmp_path_factory.mktemp('whole') / 'run'
  train(toy.ToyTask, toy_config(4), run, mesh=ONE)
  return run


class Interrupted(toy.ToyTask):
  """Breaks off in the third step."""

  def batches(self):
    return BreaksOff(super().batches())


class BreaksOff:
  def __init__(self, data):
    self.data = data
    self.left = 2
    self.get_state = data.get_state
    self.set_state = data.set_state
    self.close = data.close

  def __iter__(self):
    return self

  def __next__(self):
    if not self.left:
      raise RuntimeError('broken off')
    self.left -= 1
    return next(self.data)


def test_folders_are_searched_literally(place):
  (place / 'x.npz').touch()
  assert [*epath.Path(place).glob('*.npz')] == [epath.Path(place) / 'x.npz']
  assert [*epath.Path(place.parent).glob('*/x.npz')] == [epath.Path(place) / 'x.npz']
  with pytest.raises(NotImplementedError, match='Recursive'):
    [*epath.Path(place).glob('**/x')]


def test_addresses_are_left_alone(monkeypatch):
  searched = []

  def search(path, pattern):
    searched.append(os.fspath(path))
    return []

  monkeypatch.setattr(literal_glob, '_etils_glob', search)
  assert [*epath.Path('gs://bucket/try [1]').glob('*')] == []
  assert searched == ['gs://bucket/try [1]']
  address = 'gs://bucket/back\\slash/model'
  assert os.fspath(orbax_paths.plain(address)) == address
  orbax_paths.mend('gs://bucket/model')


def test_model_folders(place):
  for _ in range(2):  # the second replaces the first
    bundle.save_component(place / 'model', 'vae', {'a': 1}, PARAMS, {})
  config, params = bundle.load_component(place / 'model', 'vae')
  assert config == {'a': 1}
  assert_same(params, PARAMS)
  _, bias = bundle.load_component(place / 'model', 'vae', names=['bias'])
  assert_same(bias, {'bias': PARAMS['bias']})
  bundle.save_priors(place / 'model', {'happy': (np.zeros(4), np.ones(4))})
  assert bundle.emotions(place / 'model') == ['happy']
  written = {path.name for path in (place / 'model').iterdir()}
  assert written == {'bundle.json', 'priors', 'vae.1'}
  assert {path.name for path in place.parent.iterdir()} == {'try 1', 'aXbY', place.name}


def test_model_folders_that_were_copied_there(tmp_path, place):
  bundle.save_component(tmp_path / 'model', 'vae', {}, PARAMS, {})
  bundle.save_priors(tmp_path / 'model', {'sad': (np.zeros(4), np.ones(4))})
  shutil.copytree(tmp_path / 'model', place / 'model')
  assert bundle.emotions(place / 'model') == ['sad']
  assert_same(bundle.load_component(place / 'model', 'vae')[1], PARAMS)


@pytest.mark.parametrize('name', ['try [1]', 'back\\slash', ALL])
def test_model_folders_of_older_versions(tmp_path, unmended, name):
  model = tmp_path / name / 'model'
  mesh = parallel.make_mesh(data=2, fsdp=4)
  unmended(
    lambda: bundle.save_component(
      model, 'vae', {}, parallel.put_params(PARAMS, mesh), {}
    )
  )
  assert not (model / 'vae.0/state' / orbax_paths.INDEX).exists()
  for _ in range(2):
    assert_same(bundle.load_component(model, 'vae')[1], PARAMS)
  written = {path.name for path in (model / 'vae.0/state').iterdir()}
  assert {'_METADATA', orbax_paths.INDEX, 'ocdbt.process_0'} <= written
  assert not [name for name in written if name.startswith('.ocdbt')]
  # Where a backslash led to; now it is all in the model folder.
  shutil.rmtree(tmp_path / 'back', ignore_errors=True)
  shutil.copytree(model, tmp_path / 'plain')
  assert_same(bundle.load_component(tmp_path / 'plain', 'vae')[1], PARAMS)


def test_lost_arrays_are_refused(tmp_path, unmended):
  unmended(lambda: bundle.save_component(tmp_path / '[1]', 'vae', {}, PARAMS, {}))
  shutil.rmtree(tmp_path / '[1]/vae.0/state/ocdbt.process_0/d')
  with pytest.raises(
    WeightsError, match='left incomplete by an older version .* copy the model'
  ):
    bundle.load_component(tmp_path / '[1]', 'vae')


@pytest.mark.parametrize('old', [False, True])
@pytest.mark.parametrize('name', ['try [1]', ALL])
def test_runs_resume_to_the_bit(tmp_path, whole, unmended, name, old):
  """Also those that older versions began."""
  run = tmp_path / name / 'run'

  def begin():
    return train(Interrupted, toy_config(4), run, mesh=ONE)

  with pytest.raises(RuntimeError, match='broken off'):
    unmended(begin) if old else begin()
  assert (run / 'checkpoints/2/state' / orbax_paths.INDEX).exists() is not old
  assert int(train(toy.ToyTask, toy_config(4), run, mesh=ONE).step) == 4
  assert all_losses(run) == all_losses(whole)
  assert sorted(path.name for path in (run / 'checkpoints').iterdir()) == ['2', '4']
  assert sorted(path.name for path in run.iterdir()) == sorted(
    path.name for path in whole.iterdir()
  )
  assert_same(
    bundle.load_component(run / 'model', 'run')[1],
    bundle.load_component(whole / 'model', 'run')[1],
  )


def test_data_sets(deep):
  folder = prepare_synthetic(
    deep / 'data.incomplete.',
    SyntheticConfig(
      size=32, train=2, val=1, test=1, clips=1, seconds=0.4, content='full'
    ),
    workers=2,
  )
  unfinished = folder.with_name(f'incomplete.ABC123_{folder.name}')
  unfinished.mkdir()
  (unfinished / 'dataset_info.json').touch()
  assert data_sets(deep / 'data.incomplete.') == [folder]
  source = pickle.loads(pickle.dumps(ClipSource(folder, 'train')))
  assert len(source) == len(source.table) == 2 and source[1]['num_frames'] > 0
  batch = next(iter(frames_loader(DatasetPart(source), batch=2, frames=4, seed=0)))
  assert batch['video'].shape == (2, 4, 32, 32, 3)
  store = FeatureStore(deep / 'features', source.fingerprint)
  written = store.write('prior', 'net', [(i, np.full((1, 3), i)) for i in range(2)])
  np.testing.assert_array_equal(written(1), np.ones((1, 3)))
  np.testing.assert_array_equal(store.read('prior', 'net')(1), np.ones((1, 3)))


def test_shards_that_beam_writes(deep):
  """Get their names when they are whole, by a search of TFDS."""
  with tfds.core.utils.incomplete_files(epath.Path(deep / 'shard')) as part:
    part.write_text('records')
  assert [path.name for path in deep.iterdir()] == ['shard']


def test_corpora(deep):
  """With worker processes, the cache of finished clips and clips of such names."""
  for person in ('p [1]', 'p{2}', 'p%3', 'p#4'):
    made_clips.write(deep / 'corpus' / person / 'a: b\\c*.mp4', 0.6)
  config = CorpusConfig(
    'folder', size=32, min_seconds=0.4, detector='tests.data_pipelines.made_clips:red'
  )
  folder, report = corpus.prepare_corpus(
    make_plan(config, str(deep / 'corpus')), deep / 'out', workers=2
  )
  assert (
    not report.skipped and sum(part['clips'] for part in report.splits.values()) == 4
  )
  assert len(ClipSource(folder, 'train')) == report.splits['train']['clips']


@pytest.mark.parametrize('name', ['12:30', 'file:x', 'a::b', 'data:,y'])
def test_relative_folders_whose_names_look_like_addresses(tmp_path, monkeypatch, name):
  """In all that reads or writes a folder, worker processes included."""
  monkeypatch.chdir(tmp_path)
  corpus_root, out, model = f'{name}.corpus', f'{name}.out', f'{name}.model'
  for person in ('p:1', 'q::2'):
    made_clips.write(pathlib.Path(corpus_root) / person / 'a:b.mp4', 0.6)
  config = CorpusConfig(
    'folder', size=32, min_seconds=0.4, detector='tests.data_pipelines.made_clips:red'
  )
  workers = 2 if name == 'a::b' else 1  # the former takes seconds
  folder, report = corpus.prepare_corpus(
    make_plan(config, corpus_root), out, workers=workers
  )
  assert not report.skipped
  assert len(ClipSource(folder, 'train')) == 1
  tiny.save_model(model, {'emo_model': tiny.CONFIGS['emo_model']})
  assert call('export', model, f'{name}.exported') == 0
  pack.main([f'--model={model}', f'--output={name}.packed'])
  assert bundle.emotions(f'{name}.packed') == ['happy', 'sad']
  writer = tensorboard_writer(epath.Path(f'{name}.events'))
  writer.write_scalars(1, {'loss': 1.0})
  writer.close()
  made = {'corpus', 'out', 'model', 'exported', 'packed', 'events'}
  assert {path.name for path in tmp_path.iterdir()} == {f'{name}.{end}' for end in made}


def test_a_run_in_a_relative_folder_with_a_colon(tmp_path, monkeypatch, whole):
  monkeypatch.chdir(tmp_path)
  train(toy.ToyTask, toy_config(4), 'run:1', mesh=ONE)
  assert all_losses(tmp_path / 'run:1') == all_losses(whole)
  assert [path.name for path in tmp_path.iterdir()] == ['run:1']


def test_home_and_addresses_are_known(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  (tmp_path / 'a').mkdir()
  for folder in ('~/a', f'file://{tmp_path}/a'):
    fs, path = filesystems.open_folder(folder)
    assert fs.isdir(path)
    assert filesystems.address_of(fs, path) == str(tmp_path / 'a')
  fs, path = filesystems.open_folder('memory://bucket/a')
  assert filesystems.address_of(fs, path) == 'memory:///bucket/a'


def test_a_data_set_whose_name_is_read_as_a_list_is_refused(deep):
  config = toy.get_config()
  config.data.dataset = 'runs/lr=1e-3/data'
  with pytest.raises(
    ConfigError, match="not understood at 'runs/lr=1e-3/data'; write FOLDER"
  ):
    open_train_and_val(config, epath.Path(deep))


def test_conversion_and_export(deep):
  """Priors into a model folder, its export, and `inspect` on both."""
  (deep / 'emo').mkdir()
  for name in ('happy', 'sad'):
    published_priors.write(deep / 'emo' / f'{name}.npy', (np.zeros(6), np.ones(6)))
  model = deep / 'model'
  tiny.save_model(
    model,
    {name: tiny.CONFIGS[name] for name in ('audio_linear', 'emo_model')},
    emotions=(),
  )
  assert call('priors', deep / 'emo', model) == 0
  assert bundle.emotions(model) == ['happy', 'sad']
  assert call('export', model, deep / 'exported') == 0
  assert sorted(path.name for path in (deep / 'exported/priors').iterdir()) == [
    'happy.npy',
    'sad.npy',
  ]
  assert call('export', model, deep / 'exported', '--overwrite') == 0
  for folder in (model, deep / 'exported'):
    assert call('inspect', folder) == 0
  assert sorted(path.name for path in deep.iterdir()) == ['emo', 'exported', 'model']


@pytest.mark.parametrize(
  'name', ['[1] *?', 'a:b', 'file:c', 'concat:d|e', 'f%03d', 'g\\h', '-i', '~j']
)
def test_media(deep, monkeypatch, name):
  """By relative names too, which decoders must not take for addresses."""
  monkeypatch.chdir(deep)
  frames = made_clips.pictures(5)
  video.write_video(f'{name}.mp4', frames, 25.0, made_clips.tone(0.2))
  assert video.read_video(f'{name}.mp4').frames.shape == frames.shape
  assert video_reader.probe(f'{name}.mp4').height == 72
  assert len([*video_reader.frames(f'{name}.mp4')]) == 5
  soundfile.write(f'{name}.wav', made_clips.tone(0.5), 16000)
  assert len(audio.load_audio(f'{name}.wav')) == 8000
  Image.fromarray(frames[0]).save(f'{name}.png')
  assert image.load_image(f'{name}.png').shape == (72, 96, 3)
  assert sorted(os.listdir()) == sorted(
    f'{name}{ending}' for ending in ('.mp4', '.wav', '.png')
  )


def test_logs_profiles_and_compiled_programs(deep):
  writer = tensorboard_writer(epath.Path(deep / 'events'))
  writer.write_scalars(1, {'loss': 1.0})
  writer.close()
  assert [path.name[:10] for path in (deep / 'events').iterdir()] == ['events.out']
  jax.profiler.start_trace(str(deep / 'profile'))
  jax.block_until_ready(jnp.ones(3) + 1)
  jax.profiler.stop_trace()
  assert [*pathlib.Path(deep / 'profile').rglob('*.xplane.pb')]


@pytest.fixture
def latin(tmp_path):
  """A folder whose name is not UTF-8, as old archives have them."""
  (folder := tmp_path / os.fsdecode(b'rom\xe9')).mkdir()
  return folder


def test_model_folders_and_runs_whose_names_are_not_utf8(latin, whole):
  model = latin / 'model'
  bundle.save_component(model, 'vae', {'a': 1}, PARAMS, {})
  assert_same(bundle.load_component(model, 'vae')[1], PARAMS)
  train(toy.ToyTask, toy_config(2), latin / 'run', mesh=ONE)
  train(toy.ToyTask, toy_config(2), latin / 'run', mesh=ONE)  # reads the checkpoint
  assert bundle.components(latin / 'run/model').keys() == {'run'}
  writer = tensorboard_writer(epath.Path(latin / 'run'))
  writer.write_scalars(1, {'loss': 1.0})
  writer.close()
  assert list(latin.glob('run/events.out*'))


def test_weight_files_and_media_whose_names_are_not_utf8(latin, monkeypatch):
  monkeypatch.chdir(latin)
  name = os.fsdecode(b'x\xff')
  torch.save({'a': torch.ones(3)}, 'plain.pth')
  save_file({'a': torch.ones(3)}, 'plain.safetensors')
  for ending in ('.pth', '.safetensors'):
    os.rename(f'plain{ending}', f'{name}{ending}')
    assert torch_files.load(pathlib.Path(f'{name}{ending}')).keys() == {'a'}
  published_priors.write(pathlib.Path(f'{name}.npy'), (np.zeros(4), np.ones(4)))
  published_priors.read(pathlib.Path(f'{name}.npy'))
  frames = made_clips.pictures(5)
  video.write_video(f'{name}.mp4', frames, 25.0, made_clips.tone(0.2))
  assert len([*video_reader.frames(f'{name}.mp4')]) == 5
  assert len(audio.load_audio(f'{name}.mp4'))
  Image.fromarray(frames[0]).save('plain.png')
  os.rename('plain.png', f'{name}.png')
  assert image.load_image(f'{name}.png').shape == (72, 96, 3)


def test_data_sets_whose_names_are_not_utf8_are_refused(latin):
  config = SyntheticConfig(size=16, train=1, val=1, test=0, clips=1, seconds=0.2)
  with pytest.raises(InputError, match='not UTF-8.*choose another folder'):
    prepare_synthetic(latin, config, workers=1)
  (latin / 'dataset_info.json').touch()
  with pytest.raises(DataError, match='not UTF-8.*rename it'):
    ClipSource(latin)


def test_what_a_command_changes_about_its_output_ends_with_it(capfd):
  before = sys.stdout.errors
  with cli.console():
    assert sys.stdout.errors == 'surrogateescape'
  assert sys.stdout.errors == before != 'surrogateescape'


def test_names_that_are_not_utf8_are_printed_byte_for_byte(latin):
  code = (
    'import sys\n'
    'from dicetalk_jax import cli\n'
    'with cli.console():\n'
    '  print(sys.argv[1])'
  )
  out = subprocess.run([sys.executable, '-c', code, latin], capture_output=True)
  assert out.stdout == os.fsencode(latin) + b'\n' and not out.stderr
