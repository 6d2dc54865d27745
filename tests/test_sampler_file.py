"""Samplers that are traced ahead of time: the same latents, and refusals."""

import dataclasses
import json
import sys
import zipfile

import jax
from jax import export
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from dicetalk_jax import export_sampler, generate, parallel
from dicetalk_jax.errors import ConfigError, InputError, WeightsError
from dicetalk_jax.models import target
from dicetalk_jax.pipeline import Pipeline
from dicetalk_jax.sampler_file import ExportedSampler
from tests import tiny

CUDNN = '__cudnn$fmhaSoftmax'
NAME = '16x20_16_1.sampler'  # 0.8 s are ten frames, in a bucket of 16


@pytest.fixture(scope='module', autouse=True)
def quick_compilation():
  with tiny.quick_compilation():
    yield


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tiny.shared_model(tmp_path_factory)


@pytest.fixture(scope='module')
def path(folder, tmp_path_factory):
  """The exported sampler of the tiny model."""
  output = tmp_path_factory.mktemp('samplers')
  command(folder, output)
  return output / f'cpu_{NAME}'


def command(folder, output, *flags):
  argv = [f'--model={folder}', f'--output={output}', '--frames=10', '--size=16x20']
  export_sampler.main([*argv, *flags])


def job_of(pipe):
  return pipe.job(tiny.portrait(), tiny.speech(), 'happy', face_box=tiny.FACE_BOX)


def sampled(pipe, job, **options):
  conditions, length = pipe.conditions(job)
  keys = jax.random.key(3)[None]
  return np.asarray(pipe.sample(conditions, [length], keys, **options))


def test_latents_are_the_same_to_the_bit_and_nothing_is_traced(folder, path):
  """With progress and without; clips of another bucket are sampled as ever."""
  traced = Pipeline.load(folder)
  pipe = Pipeline.load(folder, samplers=[path])
  job = job_of(pipe)
  expected = sampled(traced, job)
  np.testing.assert_array_equal(sampled(pipe, job), expected)
  stepwise = sampled(pipe, job, progress=lambda *_: None)
  np.testing.assert_array_equal(stepwise, sampled(traced, job, progress=print))
  assert pipe._sample.func._cache_size() == 0

  longer = np.zeros((1, 36, 10, 8, 4), np.float32)
  assert pipe._sampler_for(longer) is pipe._sample


@pytest.mark.parametrize('kind', ['dicetalk', 'sonic'])
def test_shapes_of_conditions_are_those_that_the_networks_compute(
  kind, tmp_path_factory
):
  shared = tiny.shared_sonic if kind == 'sonic' else tiny.shared_model
  folder = shared(tmp_path_factory)
  pipe = Pipeline.load(folder)
  emotion = None if kind == 'sonic' else 'happy'
  job = pipe.job(tiny.portrait(), tiny.speech(), emotion, face_box=tiny.FACE_BOX)
  conditions, length = pipe.conditions(job)
  shapes = Pipeline.abstract(folder).encoder.shapes(1, length, (16, 20))

  def kinds(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)

  assert kinds(shapes) == kinds(conditions)
  two = Pipeline.abstract(folder).encoder.shapes(2, length, (16, 20))
  assert two.audio_tokens.shape[0] == two.masks[0].shape[0] == 2
  assert two.null_audio.shape == shapes.null_audio.shape


def test_weights_are_arguments(folder, path):
  """So the file is small, and serves other values."""
  pipe = Pipeline.load(folder, samplers=[path])
  exported, sample = pipe._exported[0]
  params = sample.args[0]
  size = sum(x.nbytes for x in params.values())
  program = exported._program.mlir_module_serialized
  largest = max(x.nbytes for x in params.values())
  assert size > 10 * largest  # or the next line would say nothing
  conditions, length = pipe.conditions(job_of(pipe))
  x = pipe._draw(jax.random.key(0)[None], conditions, 4)
  changed = params | {'conv_out.bias': params['conv_out.bias'] + 1}
  one = exported(params, x, conditions, [length])
  other = exported(changed, x, conditions, [length])
  assert np.abs(np.asarray(one) - np.asarray(other)).max() > 0.01
  weight = np.asarray(max(params.values(), key=lambda x: x.nbytes))
  assert weight.tobytes() not in program


def test_exports_for_accelerators_that_are_not_here(tmp_path):
  """Each with its own kernels, in bfloat16."""
  unet = tiny.CONFIGS['unet'] | {'block_out_channels': (16,)}  # heads of 8 channels
  guider = tiny.CONFIGS['pose_guider'] | {'conditioning_embedding_channels': 16}
  configs = tiny.CONFIGS | {'unet': unet, 'pose_guider': guider}
  tiny.save_model(tmp_path / 'model', configs)
  flags = ('--platforms=cuda,tpu', '--batch=2', '--set=frames=5')
  with target.compiling_for('cuda'):  # as on a machine with a GPU
    command(tmp_path / 'model', tmp_path, *flags)
  fused = {}
  for platform in ('cuda', 'tpu'):
    exported = ExportedSampler.load(tmp_path / f'{platform}_16x20_10_2.sampler')
    assert exported.facts.platform == platform
    assert exported.facts.dtype == 'bfloat16'
    assert exported.facts.shape == (2, 15, 10, 8, 4)
    assert exported.facts.settings['frames'] == 5
    assert exported._program.platforms == (platform,)
    fused[platform] = exported._program.mlir_module().count(CUDNN)
  assert fused['cuda'] > 0 and fused['tpu'] == 0


def test_the_command_generates_with_it(folder, path, tmp_path, monkeypatch):
  """On one device, though there are eight."""
  meshes = []

  def load(*args, **options):
    meshes.append((args[1], options['samplers']))
    raise KeyboardInterrupt

  monkeypatch.setattr(Pipeline, 'load', load)
  Image.fromarray(tiny.portrait()).save(tmp_path / 'face.png')
  tiny.write_speech(tmp_path / 'speech.wav')
  argv = [
    f'--model={folder}',
    f'--image={tmp_path}/face.png',
    f'--audio={tmp_path}/speech.wav',
    '--emotion=happy',
    '--face_box=12,10,52,54',
    f'--output={tmp_path}/out.mp4',
  ]
  for extra in ([], [f'--sampler={path}', '--sampler=other']):
    with pytest.raises(KeyboardInterrupt):
      generate.main([*argv, *extra])
  assert meshes[0][0].size == 8 and meshes[0][1] == []
  assert meshes[1] == (None, [str(path), 'other'])


def rewritten(path, place, **facts):
  """A copy of the file that says something else of itself."""
  with zipfile.ZipFile(path) as archive:
    old = json.loads(archive.read('facts.json'))
    program = archive.read('sampler.bin')
  with zipfile.ZipFile(place, 'w') as archive:
    archive.writestr('facts.json', json.dumps(old | facts))
    archive.writestr('sampler.bin', program)
  return place


def test_refuses_a_file_that_is_missing_or_damaged(folder, path, tmp_path):
  def load(file):
    return Pipeline.load(folder, samplers=[file])

  with pytest.raises(InputError, match='No such file.*check the path'):
    load(tmp_path / 'none.sampler')
  (tmp_path / 'cut').write_bytes(path.read_bytes()[:-100])
  with pytest.raises(InputError, match='damaged or no exported sampler'):
    load(tmp_path / 'cut')
  damaged = bytearray(path.read_bytes())
  damaged[len(damaged) // 2] ^= 1
  (tmp_path / 'flipped').write_bytes(damaged)
  with pytest.raises(InputError, match='damaged or no exported sampler'):
    load(tmp_path / 'flipped')
  (tmp_path / 'text').write_text('nothing')
  with pytest.raises(InputError, match='damaged or no exported sampler'):
    load(tmp_path / 'text')
  for facts in (
    {'format': 9},
    {'calling_convention': export.maximum_supported_calling_convention_version + 1},
    {'calling_convention': 1},
  ):
    with pytest.raises(InputError, match='another version of this program or of JAX'):
      load(rewritten(path, tmp_path / 'other', **facts))


def test_refuses_what_it_was_not_made_for(folder, path, tmp_path, tmp_path_factory):
  """Before weights are read: another model, setting, type, platform or mesh."""
  sonic = tiny.shared_sonic(tmp_path_factory)
  with pytest.raises(WeightsError, match='exported from another unet'):
    Pipeline.load(sonic, samplers=[path])
  with pytest.raises(ConfigError, match='num_steps=2, but num_steps=3 is wanted'):
    Pipeline.load(folder, samplers=[path], num_steps=3)
  with pytest.raises(ConfigError, match='in float32, these are in bfloat16'):
    Pipeline.load(folder, samplers=[path], dtype=jnp.bfloat16)
  with pytest.raises(ConfigError, match='exported for tpu, this is cpu'):
    other = rewritten(path, tmp_path / 'other', platform='tpu')
    Pipeline.load(folder, samplers=[other])
  with pytest.raises(ConfigError, match='runs on one device, the mesh has 8'):
    mesh = parallel.make_mesh(data=-1, fsdp=1)
    Pipeline.load(folder, mesh, samplers=[path])


@pytest.mark.parametrize(
  'flags, sentence',
  [
    (['--platforms=cpu,abacus'], "unknown platform 'abacus'"),
    (['--frames=0'], '--frames must be at least 1'),
    (['--batch=0'], '--batch must be at least 1'),
    (['--size=17x20'], 'choose --size=16x20'),
    (['--size=big'], 'write WIDTHxHEIGHT'),
    (['--set=steps=5'], 'there is no such setting'),
    (['--set=num_steps=many'], 'write NAME=VALUE'),
    (['--set=num_steps="5"'], "one of num_steps='5' is of the wrong type"),
    (['--set=num_steps=0'], 'at least one step'),
    (['--model=nowhere'], 'is not a model folder'),
  ],
)
def test_the_command_refuses(folder, tmp_path, flags, sentence, monkeypatch, capsys):
  argv = [f'--model={folder}', f'--output={tmp_path / "new"}', '--frames=10']
  monkeypatch.setattr(sys, 'argv', ['export_sampler', *argv, *flags])
  with pytest.raises(SystemExit) as info:
    export_sampler.run()
  message = capsys.readouterr().err
  assert info.value.code == 2
  assert message.startswith('error: ') and message.count('\n') == 1
  assert sentence in message
  assert not (tmp_path / 'new').exists()


def test_a_folder_without_fingerprints_is_refused(folder, tmp_path):
  index = json.loads((folder / 'bundle.json').read_text())
  del index['components']['unet']['fingerprint']
  for file in folder.iterdir():
    if file.name != 'bundle.json':
      (tmp_path / file.name).symlink_to(file)
  (tmp_path / 'bundle.json').write_text(json.dumps(index))
  with pytest.raises(WeightsError, match='has no fingerprints'):
    command(tmp_path, tmp_path / 'new')


def test_facts_are_all_in_the_file(path):
  with zipfile.ZipFile(path) as archive:
    stored = json.loads(archive.read('facts.json'))
  facts = ExportedSampler.load(path).facts
  assert json.loads(json.dumps(dataclasses.asdict(facts))) == {
    name: value for name, value in stored.items() if name != 'format'
  }
