"""Weights as training programs save them: the same model as from published files."""

import pathlib

import numpy as np
import pytest
from safetensors.torch import save_file
import torch

from convert import torch_files
from dicetalk_jax import bundle
from dicetalk_jax.errors import WeightsError
from tests.convert import published_folders as folders
from tests.convert.commands import run_convert


def prefixed(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
  return {f'{prefix}{key}': x for key, x in state.items()}


def read(path: pathlib.Path) -> dict[str, torch.Tensor]:
  """In memory, so that the file may be written again."""
  return {key: x.clone() for key, x in torch_files.load(path).items()}


def save_downloads(root: pathlib.Path) -> pathlib.Path:
  folders.save_dicetalk(root / 'release')
  folders.save_rife(root / 'rife')
  folders.save_svd(root / 'svd')
  folders.save_whisper(root / 'whisper', pickled=True)
  return root


def wrap(root: pathlib.Path) -> None:
  """Saves every file in another way."""
  release = root / 'release'
  state = {
    name: read(release / f'{name}.pth')
    for name in ('unet', 'audio_linear', 'pose_guider', 'emo_model')
  }
  torch.save(prefixed('module.', state['unet']), release / 'unet.pth')
  checkpoint = {'epoch': 3, 'state_dict': prefixed('_orig_mod.', state['audio_linear'])}
  torch.save(checkpoint, release / 'audio_linear.pth')
  save_file(prefixed('model.', state['pose_guider']), release / 'pose_guider.pth')
  worse = {key: torch.zeros_like(x) for key, x in state['emo_model'].items()}
  averaged = {'params': worse, 'params_ema': state['emo_model']}
  torch.save(averaged, release / 'emo_model.pth')

  flownet = read(root / 'rife/flownet.pkl')
  del flownet['epoch']
  bare = {key.removeprefix('module.'): x for key, x in flownet.items()}
  torch.save({'flownet': bare}, root / 'rife/flownet.pkl')

  name = 'diffusion_pytorch_model.safetensors'
  torch.save(read(root / 'svd/vae' / name), root / 'svd/vae' / name)
  unet = prefixed('module._orig_mod.', read(root / 'svd/unet' / name))
  save_file(unet, root / 'svd/unet' / name)
  image_encoder = root / 'svd/image_encoder/model.safetensors'
  save_file(prefixed('tower.net.', read(image_encoder)), image_encoder)
  whisper = root / 'whisper/pytorch_model.bin'
  torch.save(prefixed('module.', read(whisper)), whisper)


def converted(root: pathlib.Path) -> pathlib.Path:
  options = [f'--{name}={root / name}' for name in ('svd', 'whisper', 'rife')]
  assert run_convert('dicetalk', root / 'release', root / 'model', *options) == 0
  return root / 'model'


def test_wrapped_files_give_the_same_model(tmp_path, capsys):
  plain = converted(save_downloads(tmp_path / 'plain'))
  assert 'begin with' not in capsys.readouterr().out
  root = save_downloads(tmp_path / 'wrapped')
  wrap(root)
  capsys.readouterr()
  wrapped = converted(root)
  assert bundle.components(wrapped).keys() == bundle.components(plain).keys()
  for name in bundle.components(plain):
    config, params = bundle.load_component(plain, name)
    same_config, same_params = bundle.load_component(wrapped, name)
    assert config == same_config and params.keys() == same_params.keys()
    for key, value in params.items():
      np.testing.assert_array_equal(value, same_params[key], err_msg=f'{name}: {key}')
  out = capsys.readouterr().out
  for note in (
    'unet: all keys of unet.pth begin with module., removed',
    "audio_linear.pth: read from its entry 'state_dict'",
    'audio_linear: all keys of audio_linear.pth begin with _orig_mod., removed',
    'pose_guider: all keys of pose_guider.pth begin with model., removed',
    "emo_model.pth: read from its entry 'params_ema'",
    "flownet.pkl: read from its entry 'flownet'",
    'unet: all keys of diffusion_pytorch_model.safetensors begin with '
    'module._orig_mod., removed',
    'image_encoder: all keys of model.safetensors begin with tower.net., removed',
    'whisper: all keys of pytorch_model.bin begin with module., removed',
  ):
    assert out.count(f'note: {note}\n') == 1, note


def test_sonic_too(tmp_path):
  root = folders.save_release(tmp_path / 'release', 'sonic')
  assert run_convert('sonic', root, tmp_path / 'plain') == 0
  state = read(root / 'audio2bucket.pth')
  torch.save({'net': prefixed('model.', state)}, root / 'audio2bucket.pth')
  assert run_convert('sonic', root, tmp_path / 'wrapped') == 0
  _, params = bundle.load_component(tmp_path / 'plain', 'audio2bucket')
  _, same = bundle.load_component(tmp_path / 'wrapped', 'audio2bucket')
  for key, value in params.items():
    np.testing.assert_array_equal(value, same[key])


@pytest.mark.parametrize(
  ('content', 'sentence'),
  [
    (
      {'a': {'x': torch.ones(1)}, 'b': {'x': torch.ones(1)}},
      'state dicts (a, b); save',
    ),
    ({'epoch': 3}, 'is not a state dict'),
    ({'state_dict': {'x': 3}}, 'is not a state dict'),
  ],
)
def test_what_has_no_one_state_dict_is_refused(tmp_path, content, sentence):
  torch.save(content, tmp_path / 'x.pth')
  with pytest.raises(WeightsError) as refused:
    torch_files.load(tmp_path / 'x.pth')
  assert sentence in str(refused.value)
