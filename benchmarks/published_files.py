"""Writes random files with the published names, shapes and layout, at full size.

  python -m benchmarks.published_files FOLDER

They look like downloads of the published weights, in float16.
"""

import json
import math
import pathlib
import sys
from typing import Any

import numpy as np
from safetensors.torch import save_file
import torch

from convert import published_layouts, torch_files
from dicetalk_jax.data.clip_record import EMOTIONS

ROOT = pathlib.Path(__file__).parents[1]
MANIFESTS = ROOT / 'tests' / 'manifests'

# Folder of a module -> its manifest of shapes, and its entry in configs.json.
MODULES = {
  'svd/unet': ('unet_svd_xt', 'unet_config'),
  'svd/vae': ('vae_temporal_decoder', 'vae_config'),
  'svd/image_encoder': ('clip_vision_h14', 'image_encoder_config'),
  'whisper': ('whisper_tiny', 'whisper_tiny_config'),
}
# Component of the DICE-Talk release -> its manifest.
DICETALK = {
  'unet': 'unet_dicetalk',
  'audio_linear': 'audio_linear',
  'pose_guider': 'pose_guider',
  'emo_model': 'emo_model',
}
PRIOR = 256  # width of an emotion prior


def random_tensors(manifest: str, dtype: torch.dtype) -> torch_files.StateDict:
  """Random values by published names, with the shapes of a manifest.

  They are in the range of usual initial values: networks made of them stay finite.
  """
  entries = json.loads((MANIFESTS / f'{manifest}.json').read_text())
  return {
    key: _random_tensor(key, entry['shape'], dtype) for key, entry in entries.items()
  }


def _random_tensor(key: str, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
  values = torch.empty(shape, dtype=dtype)
  if len(shape) >= 2:
    fan_in = math.prod(shape[1:])
    return values.uniform_(-1, 1).mul_(fan_in**-0.5)
  values.uniform_(-0.1, 0.1)
  is_scale = key.endswith('weight') and len(shape) == 1
  return values + 1.0 if is_scale else values


def write_bases(folder: pathlib.Path, dtype: torch.dtype) -> None:
  """Writes `svd` and `whisper` below `folder`: a folder per module, and the
  scheduler.
  """
  configs = json.loads((MANIFESTS / 'configs.json').read_text())
  variant = '.fp16' if dtype == torch.float16 else ''
  for place, (manifest, config) in MODULES.items():
    _write_json(folder / place / 'config.json', configs[config]['value'])
    weights = folder / place / f'model{variant}.safetensors'
    save_file(random_tensors(manifest, dtype), weights)
  scheduler = folder / 'svd' / published_layouts.SCHEDULER
  _write_json(scheduler, configs['scheduler_config']['value'])


def write_downloads(folder: pathlib.Path, dtype: torch.dtype) -> None:
  """Writes `svd`, `whisper`, `dicetalk`, `rife` and `emo` below `folder`.

  One file after the other, since all of them together need much memory.
  """
  # 1. Stable Video Diffusion and Whisper
  write_bases(folder, dtype)

  # 2. DICE-Talk: a state dict per component
  dicetalk = folder / 'dicetalk'
  dicetalk.mkdir()
  for name, manifest in DICETALK.items():
    weights = dicetalk / published_layouts.DICETALK[name]
    torch.save(random_tensors(manifest, dtype), weights)

  # 3. RIFE, always in float32
  rife = folder / 'rife'
  rife.mkdir()
  flownet = random_tensors('rife_flownet', torch.float32)
  torch.save(flownet, rife / published_layouts.FLOWNET)

  # 4. Emotion priors, each a pickled dict
  priors = folder / 'emo'
  priors.mkdir()
  for seed, emotion in enumerate(EMOTIONS):
    rng = np.random.default_rng(seed)
    mu = rng.normal(size=(1, PRIOR)).astype(np.float32)
    content = np.array({'mu': mu}, dtype=object)
    np.save(priors / f'{emotion}.npy', content, allow_pickle=True)


def _write_json(path: pathlib.Path, content: Any) -> None:
  path.parent.mkdir(parents=True)
  path.write_text(json.dumps(content))


if __name__ == '__main__':
  write_downloads(pathlib.Path(sys.argv[1]), torch.float16)
