"""Random files of full size with the published names, shapes and layout: what a
download looks like.

python -m benchmarks.published_files FOLDER
"""

import json
import math
import pathlib
import sys

import numpy as np
from safetensors.torch import save_file
import torch

from convert import published_layouts, torch_files
from dicetalk_jax.data.clip_record import EMOTIONS

ROOT = pathlib.Path(__file__).parents[1]
MANIFESTS = ROOT / 'tests' / 'manifests'
CONFIGS = {
  'unet': 'unet_config',
  'vae': 'vae_config',
  'image_encoder': 'image_encoder_config',
  'whisper': 'whisper_tiny_config',
}
FOLDERS = {
  'unet': 'unet_svd_xt',
  'vae': 'vae_temporal_decoder',
  'image_encoder': 'clip_vision_h14',
}
FILES = {
  'unet': 'unet_dicetalk',
  'audio_linear': 'audio_linear',
  'pose_guider': 'pose_guider',
  'emo_model': 'emo_model',
}
PRIOR = 256


def tensors(manifest: str, dtype: torch.dtype) -> torch_files.StateDict:
  """Random values by published names, in the range of usual initial values: networks
  made of them stay finite.
  """
  shapes = {
    key: entry['shape']
    for key, entry in json.loads((MANIFESTS / f'{manifest}.json').read_text()).items()
  }
  return {key: _draw(key, shape, dtype) for key, shape in shapes.items()}


def _draw(key: str, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
  if len(shape) < 2:
    return torch.empty(shape, dtype=dtype).uniform_(-0.1, 0.1) + (
      1.0 if key.endswith('weight') and shape else 0.0
    )
  return (
    torch.empty(shape, dtype=dtype).uniform_(-1, 1).mul_(math.prod(shape[1:]) ** -0.5)
  )


def write_downloads(folder: pathlib.Path, dtype: torch.dtype) -> None:
  """`svd`, `whisper`, `dicetalk`, `rife` and `emo` below `folder`, one file after
  the other.
  """
  configs = json.loads((MANIFESTS / 'configs.json').read_text())
  variant = '.fp16' if dtype == torch.float16 else ''
  places = {f'svd/{name}': (name, manifest) for name, manifest in FOLDERS.items()}
  for place, (name, manifest) in (
    places | {'whisper': ('whisper', 'whisper_tiny')}
  ).items():
    (folder / place).mkdir(parents=True)
    (folder / place / 'config.json').write_text(
      json.dumps(configs[CONFIGS[name]]['value'])
    )
    save_file(tensors(manifest, dtype), folder / place / f'model{variant}.safetensors')
  (folder / 'svd' / published_layouts.SCHEDULER).parent.mkdir()
  (folder / 'svd' / published_layouts.SCHEDULER).write_text(
    json.dumps(configs['scheduler_config']['value'])
  )
  (folder / 'dicetalk').mkdir()
  for name, manifest in FILES.items():
    torch.save(
      tensors(manifest, dtype), folder / 'dicetalk' / published_layouts.DICETALK[name]
    )
  (folder / 'rife').mkdir()
  torch.save(
    tensors('rife_flownet', torch.float32), folder / 'rife' / published_layouts.FLOWNET
  )
  (folder / 'emo').mkdir()
  for i, emotion in enumerate(EMOTIONS):
    mu = np.random.default_rng(i).normal(size=(1, PRIOR)).astype(np.float32)
    np.save(
      folder / 'emo' / f'{emotion}.npy',
      np.array({'mu': mu}, dtype=object),
      allow_pickle=True,
    )


if __name__ == '__main__':
  write_downloads(pathlib.Path(sys.argv[1]), torch.float16)
