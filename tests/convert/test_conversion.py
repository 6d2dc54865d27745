"""Published layouts to a model folder and back: equal to the bit, in every layout.

The live classes of diffusers and transformers load the export strictly.
"""

import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from convert import published_layouts, torch_files
from dicetalk_jax import bundle
from dicetalk_jax.settings import KINDS, Settings
from tests.convert import published_folders as folders
from tests.convert.commands import run_convert


@pytest.fixture(scope='module')
def downloads(tmp_path_factory):
  place = tmp_path_factory.mktemp('downloads')
  folders.save_svd(place / 'svd')
  folders.save_whisper(place / 'whisper')
  folders.save_dicetalk(place / 'dicetalk')
  return place


@pytest.fixture(scope='module')
def model(downloads, tmp_path_factory):
  """One model folder with everything."""
  model = tmp_path_factory.mktemp('models') / 'dicetalk'
  assert (
    run_convert(
      'dicetalk',
      downloads / 'dicetalk',
      model,
      '--svd',
      downloads / 'svd',
      '--whisper',
      downloads / 'whisper',
    )
    == 0
  )
  return model


@pytest.fixture(scope='module')
def exported(model, tmp_path_factory):
  exported = tmp_path_factory.mktemp('exports') / 'out'
  assert run_convert('export', model, exported) == 0
  return exported


def assert_equal(actual, expected):
  assert actual.keys() == expected.keys()
  for key, value in expected.items():
    assert actual[key].dtype == value.dtype and torch.equal(actual[key], value), key


def test_the_model_folder_is_complete(model):
  known = bundle.require(model, *KINDS['dicetalk'])
  assert (
    known['unet']['provenance']['licence']
    == 'CC BY-NC-SA 4.0; Stability AI community licence'
  )
  assert {
    len(digest)
    for entry in known.values()
    for digest in entry['provenance']['files'].values()
  } == {64}
  assert Settings.of(model).sampler.sigma_max == 700.0
  assert not list(model.parent.glob('.*'))


@pytest.mark.parametrize('name', published_layouts.DICETALK)
def test_dicetalk_files_come_back(downloads, exported, name):
  file = published_layouts.DICETALK[name]
  assert_equal(
    torch_files.load(exported / file), torch_files.load(downloads / 'dicetalk' / file)
  )


@pytest.mark.parametrize('name', ['vae', 'image_encoder'])
def test_diffusers_folders_come_back(downloads, exported, name):
  place = exported / 'stable-video-diffusion-img2vid-xt' / name
  assert_equal(
    torch_files.load(torch_files.weights_in(place)),
    torch_files.load(torch_files.weights_in(downloads / 'svd' / name)),
  )


def test_whisper_comes_back(downloads, exported):
  """With the decoder, which no module here reads."""
  before, after = downloads / 'whisper', exported / 'whisper-tiny'
  assert_equal(
    torch_files.load(after / 'model.safetensors'),
    torch_files.load(before / 'model.safetensors'),
  )
  assert torch_files.read_json(after / 'config.json') == torch_files.read_json(
    before / 'config.json'
  )


def test_live_classes_load_the_export(exported):
  """Strictly, from the exported configuration, by the ordinary loaders."""
  svd = exported / 'stable-video-diffusion-img2vid-xt'
  kinds = dict(
    unet=diffusers.UNetSpatioTemporalConditionModel,
    vae=diffusers.AutoencoderKLTemporalDecoder,
    image_encoder=transformers.CLIPVisionModelWithProjection,
  )
  for name, kind in kinds.items():
    module, report = kind.from_pretrained(svd / name, output_loading_info=True)
    assert not any(report.values()), (name, report)
    module.load_state_dict(
      torch_files.load(torch_files.weights_in(svd / name)), strict=True
    )
  assert (
    diffusers.EulerDiscreteScheduler.from_pretrained(svd / 'scheduler').config.sigma_max
    == 700
  )
  whisper, report = transformers.WhisperModel.from_pretrained(
    exported / 'whisper-tiny', output_loading_info=True
  )
  assert not any(report.values()), report
  own = torch_files.load(exported / 'whisper-tiny' / 'model.safetensors')
  whisper.load_state_dict(published_layouts.without_prefix(own, 'model.'), strict=True)
  assert (
    transformers.WhisperFeatureExtractor.from_pretrained(
      exported / 'whisper-tiny'
    ).hop_length
    == 160
  )


def test_the_way_back_gives_the_same_model(model, exported, tmp_path):
  again = tmp_path / 'again'
  assert (
    run_convert(
      'dicetalk',
      exported,
      again,
      '--svd',
      exported / 'stable-video-diffusion-img2vid-xt',
      '--whisper',
      exported / 'whisper-tiny',
    )
    == 0
  )
  assert bundle.settings(again) == bundle.settings(model)
  for name, entry in bundle.components(model).items():
    config, params = bundle.load_component(again, name)
    assert config == entry['config']
    jax.tree.map(
      np.testing.assert_array_equal, params, bundle.load_component(model, name)[1]
    )


@pytest.mark.parametrize(
  'options',
  [
    dict(variant='fp16'),
    dict(max_shard_size='1MB'),
    dict(variant='fp16', max_shard_size='400KB'),
  ],
)
def test_every_layout_of_svd(tmp_path, options):
  folders.save_svd(tmp_path / 'svd', half='variant' in options, **options)
  shards = list((tmp_path / 'svd/unet').glob('*-of-*'))
  assert len(shards) > 1 or 'max_shard_size' not in options
  assert run_convert('svd', tmp_path / 'svd', tmp_path / 'model') == 0
  assert bundle.components(tmp_path / 'model').keys() == {
    'unet',
    'vae',
    'image_encoder',
  }
  dtype = jnp.float16 if 'variant' in options else jnp.float32
  assert {x.dtype for x in bundle.shapes(tmp_path / 'model', 'unet').values()} == {
    jnp.dtype(dtype)
  }
  assert run_convert('export', tmp_path / 'model', tmp_path / 'out') == 0
  half = 'variant' in options
  before = {
    key: x.half() if half else x
    for key, x in folders.svd_modules()['unet'].state_dict().items()
  }
  out = tmp_path / 'out/stable-video-diffusion-img2vid-xt/unet'
  assert_equal(torch_files.load(torch_files.weights_in(out)), before)
  # Without adapters this is Stable Video Diffusion, not a UNet of DICE-Talk.
  assert not (tmp_path / 'out/unet.pth').exists()


def test_pickled_whisper(downloads, tmp_path):
  folders.save_whisper(tmp_path / 'bin', pickled=True)
  assert run_convert('whisper', tmp_path / 'bin', tmp_path / 'from_bin') == 0
  assert (
    run_convert('whisper', downloads / 'whisper', tmp_path / 'from_safetensors') == 0
  )
  jax.tree.map(
    np.testing.assert_array_equal,
    *(
      bundle.load_component(tmp_path / name, 'whisper')[1]
      for name in ('from_bin', 'from_safetensors')
    ),
  )
  assert run_convert('export', tmp_path / 'from_bin', tmp_path / 'out') == 0
  assert_equal(
    torch_files.load(tmp_path / 'out/whisper-tiny/model.safetensors'),
    torch_files.load(tmp_path / 'bin/pytorch_model.bin'),
  )


@pytest.mark.parametrize('legacy', [False, True])
def test_bfloat16_and_old_files_are_kept_to_the_bit(downloads, tmp_path, legacy):
  release = folders.save_dicetalk(tmp_path / 'release')
  state = {key: x.bfloat16() for key, x in folders.state_dict('pose_guider').items()}
  torch.save(
    state, release / 'pose_guider.pth', _use_new_zipfile_serialization=not legacy
  )
  assert run_convert('dicetalk', release, tmp_path / 'model') == 0
  assert run_convert('export', tmp_path / 'model', tmp_path / 'out') == 0
  assert_equal(torch_files.load(tmp_path / 'out/pose_guider.pth'), state)


def test_dtype_is_chosen(downloads, tmp_path, capsys):
  assert (
    run_convert('svd', downloads / 'svd', tmp_path / 'model', '--dtype', 'bfloat16')
    == 0
  )
  assert 'bfloat16' in capsys.readouterr().out
  _, params = bundle.load_component(tmp_path / 'model', 'vae')
  expected = torch_files.load(
    downloads / 'svd/vae/diffusion_pytorch_model.safetensors'
  )['quant_conv.bias'].bfloat16()
  assert_equal(
    {'x': torch_files.to_torch(np.array(params['quant_conv.bias']))}, {'x': expected}
  )


def test_the_base_fills_gaps_of_the_unet(downloads, tmp_path, capsys):
  """As in the reference implementation, this is not strict.

  The base fills gaps, adapters start as copies, and surplus keys are reported.
  """
  release = folders.save_dicetalk(tmp_path / 'release')
  whole = folders.state_dict('unet')
  partial = {
    key: x
    for key, x in whole.items()
    if 'down_blocks' in key and '.processor.' not in key
  }
  torch.save(partial | {'unknown.weight': torch.zeros(3)}, release / 'unet.pth')
  assert (
    run_convert('dicetalk', release, tmp_path / 'model', '--svd', downloads / 'svd')
    == 0
  )
  out = capsys.readouterr().out
  assert "taken from copies of the base's keys and values: 32" in out
  assert 'unet: unknown to the model and ignored: unknown.weight' in out
  assert run_convert('export', tmp_path / 'model', tmp_path / 'out') == 0
  base = torch_files.load(downloads / 'svd/unet/diffusion_pytorch_model.safetensors')
  assert_equal(
    torch_files.load(tmp_path / 'out/unet.pth'),
    folders.adapters_from(base) | base | partial,
  )


def test_initial_values_fill_gaps_of_the_emotion_model(tmp_path, capsys):
  release = folders.save_dicetalk(tmp_path / 'release')
  whole = folders.state_dict('emo_model')
  partial = {key: x for key, x in whole.items() if not key.startswith('classifier')}
  torch.save(partial | {'extra': torch.zeros(1)}, release / 'emo_model.pth')
  for again in ('one', 'two'):
    assert run_convert('dicetalk', release, tmp_path / again) == 0
  out = capsys.readouterr().out
  assert 'drawn at random: 6 (classifier.fc1.' in out and 'ignored: extra' in out
  one, two = (
    bundle.load_component(tmp_path / again, 'emo_model')[1] for again in ('one', 'two')
  )
  jax.tree.map(np.testing.assert_array_equal, one, two)
  np.testing.assert_array_equal(
    one['codebook.codebook.embedding'], whole['codebook.codebook.weight']
  )


@pytest.mark.parametrize('file', [False, True])
def test_frame_interpolation(tmp_path, file, capsys):
  release, rife = (
    folders.save_dicetalk(tmp_path / 'release'),
    folders.save_rife(tmp_path / 'RIFE'),
  )
  assert (
    run_convert(
      'dicetalk',
      release,
      tmp_path / 'model',
      '--rife',
      rife / published_layouts.FLOWNET if file else rife,
    )
    == 0
  )
  assert 'flownet: unknown to the model and ignored: epoch' in capsys.readouterr().out
  assert run_convert('export', tmp_path / 'model', tmp_path / 'out') == 0
  assert_equal(
    torch_files.load(tmp_path / 'out/RIFE/flownet.pkl'),
    {f'module.{key}': x for key, x in folders.state_dict('flownet').items()},
  )


def test_notes_name_options_that_were_left_out(tmp_path, capsys):
  release = folders.save_dicetalk(tmp_path / 'release')
  assert run_convert('dicetalk', release, tmp_path / 'model') == 0
  out = capsys.readouterr().out
  assert (
    'vae, image_encoder: not converted; add --svd' in out
    and 'add --whisper' in out
    and 'add --priors' in out
  )


def test_summary(downloads, tmp_path, capsys):
  assert run_convert('whisper', downloads / 'whisper', tmp_path / 'model') == 0
  out = capsys.readouterr().out
  rest = len(torch_files.load(downloads / 'whisper' / 'model.safetensors')) - 37
  rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()}
  assert rows['whisper'][:3] == ['37', '37', '0'] and rows['whisper'][-1] == 'float32'
  assert rows['whisper_decoder'][:3] == [str(rest), str(rest), '0']
  digest = torch_files.sha256([downloads / 'whisper' / 'model.safetensors'])[
    'whisper/model.safetensors'
  ]
  assert f'sha256 {digest}  whisper/model.safetensors' in out
  assert run_convert('export', tmp_path / 'model', tmp_path / 'out') == 0
  out = capsys.readouterr().out
  assert next(
    line.split()[1:4] for line in out.splitlines() if line.startswith('whisper ')
  ) == [str(37 + rest), str(37 + rest), '0']
  assert f'sha256 {digest}  whisper/model.safetensors (source of whisper)' in out


def test_inspect_says_the_same_of_model_and_files(downloads, model, exported, capsys):
  assert run_convert('inspect', model) == 0
  of_model = capsys.readouterr().out
  assert run_convert('inspect', exported) == 0
  of_files = capsys.readouterr().out

  def rows(text):
    return {tuple(line.split()) for line in text.splitlines() if 'float32' in line}

  assert (
    len(rows(of_model) & rows(of_files)) == len(KINDS['dicetalk']) - 1
  )  # Whisper's file has two components
  assert 'emotions: none' in of_model and 'licence CC BY-NC-SA 4.0' in of_model
  assert run_convert('inspect', downloads / 'dicetalk' / 'unet.pth') == 0
  assert capsys.readouterr().out.splitlines()[1].split()[0] == 'unet'


def test_overwrite_replaces_the_whole_folder(downloads, tmp_path):
  model = tmp_path / 'model'
  assert run_convert('whisper', downloads / 'whisper', model) == 0
  assert run_convert('svd', downloads / 'svd', model, '--overwrite') == 0
  assert 'whisper' not in bundle.components(model) and not list(tmp_path.glob('.*'))


def test_settings_survive(downloads, tmp_path):
  """A model of other sizes keeps its settings on the way out and in."""
  release = folders.save_dicetalk(tmp_path / 'release')
  own = json.loads((release / published_layouts.DICETALK_CONFIG).read_text())
  settings = dict(image_size=64, sampler=dict(frames=4, sigma_max=80.0))
  (release / published_layouts.DICETALK_CONFIG).write_text(
    json.dumps(own | dict(settings=settings))
  )
  assert (
    run_convert('dicetalk', release, tmp_path / 'model', '--svd', downloads / 'svd')
    == 0
  )
  assert bundle.settings(tmp_path / 'model') == settings
  assert run_convert('export', tmp_path / 'model', tmp_path / 'out') == 0
  assert (
    json.loads((tmp_path / 'out' / published_layouts.DICETALK_CONFIG).read_text())[
      'settings'
    ]
    == settings
  )
  scheduler = (
    tmp_path / 'out/stable-video-diffusion-img2vid-xt' / published_layouts.SCHEDULER
  )
  assert json.loads(scheduler.read_text())['sigma_max'] == 80


def test_overwriting_through_a_link(downloads, tmp_path):
  assert run_convert('whisper', downloads / 'whisper', tmp_path / 'model') == 0
  (tmp_path / 'link').symlink_to('model')
  assert run_convert('svd', downloads / 'svd', tmp_path / 'link', '--overwrite') == 0
  assert (
    'unet' in bundle.components(tmp_path / 'model')
    and len(list(tmp_path.iterdir())) == 2
  )
