"""The release of Sonic to a model folder and back: equal to the bit, and strict."""

import json

import jax
import numpy as np
import pytest
import torch

from convert import published_layouts, torch_files
from dicetalk_jax import bundle, settings
from dicetalk_jax.diffusion.sampler import SamplerConfig
from tests.convert import published_folders as folders
from tests.convert.commands import run_convert


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  """Downloads, the model folder made of them, and what was exported from that."""
  place = tmp_path_factory.mktemp('sonic')
  svd = folders.save_svd(place / 'svd')
  (svd / 'unet/diffusion_pytorch_model.safetensors').unlink()  # Sonic's own is whole
  whisper = folders.save_whisper(place / 'whisper')
  rife = folders.save_rife(place / 'RIFE')
  release = folders.save_release(place / 'release', 'sonic')
  assert (
    run_convert(
      'sonic',
      release,
      place / 'model',
      '--svd',
      svd,
      '--whisper',
      whisper,
      '--rife',
      rife,
    )
    == 0
  )
  assert run_convert('export', place / 'model', place / 'out') == 0
  return place


def test_the_model_folder_is_complete(place):
  assert published_layouts.RELEASES.keys() == settings.KINDS.keys()
  known = bundle.require(
    place / 'model', *settings.KINDS['sonic'], settings.INTERPOLATION
  )
  assert (
    known['unet']['provenance']['licence'] == 'CC BY-NC-SA 4.0'
    and known['unet']['config']['adapters'] == 1
  )
  assert not bundle.emotions(place / 'model')


def test_settings_are_those_of_the_reference_implementation(place):
  assert settings.Settings.of(place / 'model') == settings.Settings(
    kind='sonic',
    decode_chunk=8,
    upcast_vae=False,
    sampler=SamplerConfig(
      num_steps=25,
      frames=25,
      overlap=0,
      shift=7,
      g_image=2.0,
      g_condition=7.5,
      padding=False,
      sigma_min=0.002,
      sigma_max=700.0,
      windows_per_call=1,
    ),
  )


@pytest.mark.parametrize('name', published_layouts.SONIC)
def test_files_come_back(place, name):
  before, after = (
    torch_files.load(place / folder / published_layouts.SONIC[name])
    for folder in ('release', 'out')
  )
  assert after.keys() == before.keys()
  assert all(
    after[key].dtype == x.dtype and torch.equal(after[key], x)
    for key, x in before.items()
  )


def test_the_way_back_gives_the_same_model(place):
  out, again = place / 'out', place / 'again'
  assert (
    run_convert(
      'sonic',
      out,
      again,
      '--svd',
      out / 'stable-video-diffusion-img2vid-xt',
      '--whisper',
      out / 'whisper-tiny',
      '--rife',
      out / 'RIFE',
    )
    == 0
  )
  assert bundle.settings(again) == bundle.settings(place / 'model')
  for name, entry in bundle.components(place / 'model').items():
    config, params = bundle.load_component(again, name)
    assert config == entry['config']
    jax.tree.map(
      np.testing.assert_array_equal,
      params,
      bundle.load_component(place / 'model', name)[1],
    )


def test_inspect_says_the_same_of_model_and_files(place, capsys):
  rows = []
  for folder in ('model', 'out'):
    assert run_convert('inspect', place / folder) == 0
    text = capsys.readouterr().out
    rows.append(
      {tuple(line.split()) for line in text.splitlines() if 'float32' in line}
    )
  whisper = {'whisper', published_layouts.WHISPER_DECODER}  # one file
  assert {row[0] for row in rows[0]} == {
    *settings.KINDS['sonic'],
    settings.INTERPOLATION,
    *whisper,
  }
  assert {row[0] for row in rows[0] - rows[1]} == whisper


def test_settings_do_not_depend_on_other_files(place, tmp_path, capsys):
  assert run_convert('sonic', place / 'release', tmp_path / 'model') == 0
  out = capsys.readouterr().out
  assert all(
    f'not converted; add --{option}' in out for option in ('svd', 'whisper', 'rife')
  )
  assert settings.Settings.of(tmp_path / 'model') == settings.Settings.of(
    place / 'model'
  )


def test_all_files_must_fit(tmp_path, capsys):
  release = folders.save_release(tmp_path / 'release', 'sonic')
  unet = folders.state_dict('unet')  # of DICE-Talk, with one adapter more
  del unet['conv_in.bias']
  torch.save(unet, release / 'unet.pth')
  torch.save(folders.state_dict('audio_linear'), release / 'audio2bucket.pth')
  assert run_convert('sonic', release, tmp_path / 'model') == 2
  err = capsys.readouterr().err
  assert (
    'unet: missing: conv_in.bias' in err
    and err.count('unet: left over: ') == 16
    and 'to_k_ip.1.weight' in err
  )
  assert (
    'audio2bucket: left over: norm.weight' in err and not (tmp_path / 'model').exists()
  )


def test_refusals(place, tmp_path, capsys):
  release = folders.save_release(tmp_path / 'release', 'sonic')
  torch.save(folders.state_dict('pose_guider'), release / 'audio2bucket.pth')
  assert run_convert('sonic', release, tmp_path / 'model') == 2
  assert (
    'audio2bucket.pth has nothing of audio2bucket; use the published file'
    in capsys.readouterr().err
  )
  assert (
    run_convert(
      'sonic', folders.save_dicetalk(tmp_path / 'dicetalk'), tmp_path / 'model'
    )
    == 2
  )
  assert 'audio2token.pth: No such file' in capsys.readouterr().err
  assert (
    run_convert('export', place / 'model', release, '--overwrite') == 0
  )  # it has a sonic.json
  assert (
    run_convert('export', place / 'model', tmp_path / 'dicetalk', '--overwrite') == 2
  )
  assert 'has no sonic.json' in capsys.readouterr().err
  bundle.save_settings(tmp_path / 'odd', {'kind': 'opera'})
  assert run_convert('export', tmp_path / 'odd', tmp_path / 'out') == 2
  assert "the unknown kind 'opera' (known: dicetalk, sonic)" in capsys.readouterr().err
  (release / 'sonic.json').write_text(json.dumps({'settings': 3}))
  assert run_convert('sonic', release, tmp_path / 'model') == 2
  assert 'sonic.json is damaged' in capsys.readouterr().err
