"""How each module reproduces the reference outputs of its component.

A golden folder holds `config.json` (constructor arguments of a small published module), `weights.safetensors` (its
state dict), `inputs.safetensors` and `outputs.safetensors`, all in PyTorch's layouts. One function per component
yields (name of an output, our array in the same layout, limit of the error relative to the output's deviation).
"""

from collections.abc import Callable, Iterator
import json
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from convert import naming
from dicetalk_jax.errors import InputError
from dicetalk_jax.models import core, registry
from dicetalk_jax.models.face_mask import mask_pyramid, resample_mask

Case = tuple[str, np.ndarray, float]

# Ten times what the published modules differ by between float32 and float64.
LIMIT, UNET, ENCODE, DECODE = 2e-5, 3e-5, 3e-5, 2e-4
EXACT = 0.0


class Tensors(dict):
  """A safetensors file; asking for what it lacks is a `UserError`, as are a missing and a damaged file."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    try:
      super().__init__(load_file(path))
    except FileNotFoundError:
      raise InputError(f'{path} does not exist; a golden folder needs it') from None
    except (OSError, SafetensorError) as error:
      raise InputError(f'{path} cannot be read as safetensors ({error}); copy it again') from None

  def __missing__(self, name: str):
    raise InputError(f'{self._path} has no tensor {name}; use the file that belongs to this component')


class Golden(NamedTuple):
  """A golden folder: `meta` is its whole `config.json`."""

  folder: pathlib.Path
  meta: dict[str, Any]
  weights: Tensors
  inputs: Tensors
  outputs: Tensors

  @property
  def constructor(self) -> dict[str, Any]:
    return self.meta['constructor']

  def small_signal(self) -> dict[str, np.ndarray]:
    """Weights with some scaled down, which makes the epsilons of the norms visible."""
    rule = self.meta['small_signal']
    kept = lambda key: (key.startswith(rule.get('exclude_prefix', '\0')) or rule.get('exclude_substring', '\0') in key)
    hit = lambda key: key.endswith(tuple(rule['key_suffixes'])) and not kept(key)
    return {k: v * np.float32(rule['factor']) if hit(k) else v for k, v in self.weights.items()}


class Module:
  """A component built from a golden's configuration; a method compiles once per shape, whatever the weights."""

  def __init__(self, name: str, golden: Golden, **config):
    graphdef, self._target = core.abstract(registry.builder(name, golden.constructor | config))
    call = lambda params, method, args: method(core.merge(graphdef, params), *args)
    self._call = jax.jit(call, static_argnums=1)
    self._weights = golden.weights

  def __call__(self, method: Callable[..., Any], *args, weights=None) -> Any:
    """`method(module, *args)` with the golden's weights or others, as NumPy arrays."""
    params = naming.from_torch(self._target, self._weights if weights is None else weights)
    return jax.tree.map(np.asarray, self._call(params, method, args))


def forward(model, *args):
  return model(*args)


def channels_last(x: np.ndarray) -> np.ndarray:
  """[B,C,...] to [B,...,C]."""
  return np.moveaxis(x, 1, -1)


def channels_first(x: np.ndarray) -> np.ndarray:
  """[B,...,C] to [B,C,...]."""
  return np.moveaxis(x, -1, 1)


def audio_projection(golden: Golden) -> Iterator[Case]:
  module = Module('audio_linear', golden)
  for suffix in ('', '_zero', '_small'):
    yield f'context_tokens{suffix}', module(forward, golden.inputs[f'audio_embeds{suffix}']), LIMIT


def pose_guider(golden: Golden) -> Iterator[Case]:
  module = Module('pose_guider', golden)
  for suffix in ('', '_mask'):
    features = module(forward, channels_last(golden.inputs[f'conditioning{suffix}']))
    yield f'embedding{suffix}', channels_first(features), LIMIT


def emotion_model(golden: Golden) -> Iterator[Case]:
  """Rows of the golden are (clip, frame); ours has no frames."""
  module = Module('emo_model', golden)
  methods = {'on': lambda model, *args: model(args[0], True, args[1]),
             'off': lambda model, *args: model(args[0], False, args[1])}
  prior, zero, mask = (golden.inputs[name] for name in ('emo_prompts', 'emo_prompts_zero', 'emo_prompt_mask'))
  nobody = np.zeros_like(mask)
  for retrieval, method in methods.items():
    for suffix, e, drop in (('', prior, nobody), ('_masked', prior, mask), ('_zero', zero, nobody[:1, :1])):
      tokens, vq = module(method, e.reshape(-1, e.shape[-1]), drop.ravel())
      yield f'retrieval_{retrieval}{suffix}/tokens', tokens.reshape(*e.shape[:2], *tokens.shape[1:]), LIMIT
      yield f'retrieval_{retrieval}{suffix}/vq_loss', vq.loss[None], LIMIT
  code, vq = module(lambda model, x: model.codebook(x), prior.reshape(-1, prior.shape[-1]))
  yield 'codebook/quantized', code.reshape(*prior.shape[:-1], -1), LIMIT
  yield 'codebook/vq_loss', vq.loss[None], LIMIT
  yield 'codebook/indices', vq.indices[:, None], EXACT
  features = channels_last(golden.inputs['classifier_features'])
  yield 'classifier_logits', module(lambda model, x: model.classify(x), features), LIMIT


def whisper(golden: Golden) -> Iterator[Case]:
  """The golden keeps some of the states, and the padded prompts that video frames take their clips from."""
  module = Module('whisper', golden)
  head, fill = (golden.inputs[name] for name in ('log_mel_head', 'log_mel_fill'))
  log_mel = np.concatenate([head, np.repeat(fill, 3000 - head.shape[2], axis=2)], axis=2)
  states = module(forward, channels_last(log_mel))
  yield 'hidden_states_stacked_every25', states[:, ::25], LIMIT
  yield 'hidden_states_last100_every5', states[:, -100::5], LIMIT
  meta = golden.meta
  prompts = np.pad(states[:, :2 * meta['audio_len']], ((0, 0), (4, 6), (0, 0), (0, 0)))
  clips = np.stack([prompts[0, 2 * meta['step'] * i:][:10] for i in range(meta['frames'])])
  yield 'audio_prompts', prompts, LIMIT
  yield 'clips_first', clips[0], LIMIT
  yield 'clips_last', clips[-1], LIMIT
  yield 'clips_sum', clips.sum(axis=(1, 2, 3)), LIMIT


def clip_vision(golden: Golden) -> Iterator[Case]:
  module = Module('image_encoder', golden)
  yield 'image_embeds', module(forward, channels_last(golden.inputs['pixel_values'])), LIMIT


def vae(golden: Golden) -> Iterator[Case]:
  module = Module('vae', golden)
  small = golden.small_signal()

  def encode(weights=None):
    moments = module(lambda model, x: model.encode(x), channels_last(golden.inputs['image']), weights=weights)
    return map(channels_first, moments)

  def decode(name, weights=None):
    z = channels_last(golden.inputs[f'latents_{name}'])
    clips = z.reshape(int(name.split('x')[0]), -1, *z.shape[1:])
    video = module(lambda model, z: model.decode(z), clips, weights=weights)
    return channels_first(video.reshape(-1, *video.shape[2:]))

  mean, logvar = encode()
  yield 'encode/mean', mean, ENCODE
  yield 'encode/mode', mean, ENCODE
  yield 'encode/logvar', logvar, ENCODE
  yield 'encode/moments', np.concatenate([mean, logvar], axis=1), ENCODE
  yield 'small_signal/encode_mean', next(encode(small)), ENCODE
  yield 'decode_1x5', decode('1x5'), DECODE
  yield 'decode_2x3', decode('2x3'), DECODE
  yield 'small_signal/decode_2x3', decode('2x3', small), DECODE


def unet(golden: Golden) -> Iterator[Case]:
  """`main`: three guidance rows; `perframe`: an image token per frame; `plain`: stock SVD, without adapters."""
  inputs, small = golden.inputs, golden.small_signal()
  module = Module('unet', golden, adapters=len(golden.meta['adapter_tokens']))

  def prepare(name, *tokens):
    """Sample, time step, ids and tokens of an input group, channels last."""
    sample = np.moveaxis(inputs[f'{name}/sample'], 2, -1)
    grouped = [inputs[f'{name}/{x}'] for x in tokens]
    grouped = [x.reshape(len(sample), -1, *x.shape[1:]) for x in grouped]
    return sample, inputs[f'{name}/timestep'][0], inputs[f'{name}/added_time_ids'], grouped

  def call(model, sample, timestep, ids, tokens, spatial=None, masks=None, scales=()):
    return model(sample, timestep, model.context_kv(*tokens), ids, spatial, masks, scales)

  def adapted(name, scales=(1., 1.), masked=True, factor=1, weights=None):
    """Output and middle block in PyTorch's layouts. No mask is a mask of ones, which saves a compilation."""
    sample, timestep, ids, tokens = prepare(name, 'image_context', 'audio_tokens', 'emo_tokens')
    spatial = np.moveaxis(inputs[f'{name}/spatial_condition'], 2, -1) * np.float32(factor)
    mask = np.repeat(inputs[f'{name}/mask'][:, 0], len(sample), axis=0)
    levels = len(golden.constructor['block_out_channels'])
    masks = mask_pyramid(mask if masked else np.ones_like(mask), sample.shape[2:4], levels)
    out, mid = module(call, sample, timestep, ids, tokens, spatial, masks, np.float32(scales), weights=weights)
    return np.moveaxis(out, -1, 2), channels_first(mid.reshape(-1, *mid.shape[2:]))

  out, mid = adapted('main')
  yield 'main/out', out, UNET
  yield 'main/mid_block', mid, UNET
  yield 'main_scale_1_0/out', adapted('main', scales=(1., 0.))[0], UNET
  yield 'main_scale_07_03/out', adapted('main', scales=(.7, .3))[0], UNET
  factor = golden.meta['small_signal']['factor']
  yield 'main_small_signal/out', adapted('main', factor=factor, weights=small)[0], UNET
  yield 'main_nomask/out', adapted('main', masked=False)[0], UNET
  yield 'perframe/out', adapted('perframe')[0], UNET
  plain = Module('unet', golden, adapters=0)
  without = {k: v for k, v in golden.weights.items() if '.processor.' not in k}
  out, _ = plain(call, *prepare('plain', 'image_context'), weights=without)
  yield 'plain/out_diffusers_0.29.0', np.moveaxis(out, -1, 2), UNET


def mask_downsample(golden: Golden) -> Iterator[Case]:
  """Masks are stored, or boxes of ones."""
  for case in golden.meta['cases']:
    if case['mask_stored']:
      mask = golden.inputs[f'{case["case"]}/mask']
    else:
      top, bottom, left, right = case['box']
      mask = np.zeros((1, *case['mask_hw']), np.float32)
      mask[:, top:bottom, left:right] = 1
    yield f'{case["case"]}/out', np.asarray(resample_mask(mask, case['num_queries'])), LIMIT


class Component(NamedTuple):
  mark: str  # the constructor argument that only this component has
  cases: Callable[[Golden], Iterator[Case]]


COMPONENTS = {
    'audio_proj': Component('context_tokens', audio_projection),
    'pose_guider': Component('conditioning_channels', pose_guider),
    'emotion_model': Component('codebook_size', emotion_model),
    'whisper': Component('encoder_layers', whisper),
    'clip_vision': Component('patch_size', clip_vision),
    'vae': Component('latent_channels', vae),
    'unet': Component('cross_attention_dim', unet),
    'mask_downsample': Component('cases', mask_downsample),
}


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise InputError(f'{path} cannot be read as JSON ({error}); copy it again') from None


def load_golden(folder: pathlib.Path) -> tuple[str, Golden]:
  """Recognises a golden folder by its configuration and reads it.

  Returns:
    The component's name, and the golden.

  Raises:
    InputError: the folder is of no known component, or lacks a file.
  """
  if not folder.is_dir():
    raise InputError(f'{folder} is not a folder; give the folders of golden files to verify')
  if (folder / 'cases.json').exists():
    tensors = Tensors(folder / 'tensors.safetensors')
    return 'mask_downsample', Golden(folder, _read_json(folder / 'cases.json'), tensors, tensors, tensors)
  if not (folder / 'config.json').exists():
    raise InputError(f'{folder} has no config.json; give folders that each hold one golden component')
  meta = _read_json(folder / 'config.json')
  found = [name for name, component in COMPONENTS.items() if component.mark in meta.get('constructor', {})]
  if len(found) != 1:
    raise InputError(f'{folder} is of no known component; those are {", ".join(COMPONENTS)}')
  files = (Tensors(folder / f'{part}.safetensors') for part in ('weights', 'inputs', 'outputs'))
  return found[0], Golden(folder, meta, *files)
