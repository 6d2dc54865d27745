"""How full-size modules reproduce the reference implementation.

Their weights and inputs follow from a rule, which saves gigabytes of files. A tensor is
`base + amp * (2 u - 1)` with u uniform in [0, 1): the upper 53 bits of PCG64's raw
numbers, in C order of the published layout. NumPy guarantees that these numbers never
change.
"""

from collections.abc import Iterator, Mapping
from typing import Any
import zlib

import jax.numpy as jnp
import numpy as np

from convert import naming
from convert.verify.golden import (
  EXACT,
  Case,
  Golden,
  Module,
  channels_first,
  channels_last,
  forward,
)
from convert.verify.module_cases import clip_states
from dicetalk_jax.models.parameters import Abstract, Params


def _symmetric(seed: int, shape: tuple[int, ...]) -> np.ndarray:
  """Draws numbers that are uniform in [-1, 1), as float64."""
  raw = np.random.PCG64(seed).random_raw(int(np.prod(shape)))
  return ((raw >> np.uint64(11)) * 2.0**-52 - 1).reshape(shape)


def inputs(meta: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Makes the input tensors that a description asks for, in float32."""
  tensors = {}
  for name, rule in meta['inputs'].items():
    seed = zlib.crc32(f'input:{name}'.encode()) ^ meta['base_seed']
    scaled = rule['amp'] * _symmetric(seed, rule['shape'])
    tensors[name] = scaled.astype(np.float32) + np.float32(rule['base'])
  return tensors


def tensors(meta: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Makes all tensors that a description names, by published key, in float32."""
  made = {}
  for key, (seed, base, amp) in meta['weights_seed_base_amp'].items():
    value = base + amp * _symmetric(seed, meta['weights_shape'][key])
    made[key] = value.astype(np.float32)
  return made


def params(meta: Mapping[str, Any], target: Abstract) -> Params:
  """Makes the parameters of `target`.

  They are made and converted one at a time, so a large module is never in memory twice.

  Raises:
    WeightsError: the description names other tensors than the module has.
  """
  rules = meta['weights_seed_base_amp']
  shapes = {
    naming.torch_name(name): naming.torch_shape(name, x.shape)
    for name, x in target.items()
  }

  # 1. Refuse a description that does not fit, by converting tensors without memory
  zero = np.float32(0)
  naming.from_torch(
    target, {key: np.broadcast_to(zero, shapes.get(key, ())) for key in rules}
  )

  # 2. Make one parameter after the other
  params = {}
  for name, x in target.items():
    key = naming.torch_name(name)
    seed, base, amp = rules[key]
    value = (base + amp * _symmetric(seed, shapes[key])).astype(np.float32)
    params[name] = jnp.asarray(naming.from_torch({name: x}, {key: value})[name])
  return params


def _module(name: str, golden: Golden) -> Module:
  """Makes a module of the published size."""
  return Module(name, {}, lambda target: params(golden.meta, target), golden.dtype)


# Limits are at most ten times the difference of the published modules between float32
# and float64. For CLIP that difference was not measured.


def audio_linear(golden: Golden) -> Iterator[Case]:
  module = _module('audio_linear', golden)
  x = inputs(golden.meta)['audio_embeds']
  yield Case('context_tokens', module(forward, x), 5e-5)
  yield Case('uncond_tokens_every8', module(forward, np.zeros_like(x))[:, :, ::8], 5e-5)


def emo_model(golden: Golden) -> Iterator[Case]:
  module = _module('emo_model', golden)
  given = inputs(golden.meta)
  prior = given['emo_prompts'].reshape(1, -1)
  methods = {
    'on': lambda model, e: model(e, True),
    'off': lambda model, e: model(e, False),
  }
  for retrieval, method in methods.items():
    tokens, vq = module(method, prior)
    yield Case(f'retrieval_{retrieval}_every2', tokens[:, None, ::2], 6e-5)
    if retrieval == 'on':
      yield Case('codebook_index', vq.indices[:, None], EXACT)
    tokens, _ = module(method, np.zeros_like(prior))
    yield Case(f'retrieval_{retrieval}_zero_every8', tokens[:, None, ::8], 6e-5)
  features = channels_last(given['features'])
  logits = module(lambda model, x: model.classify(x), features)
  yield Case('classifier_logits', logits, 6e-5)


def pose_guider(golden: Golden) -> Iterator[Case]:
  x = channels_last(inputs(golden.meta)['conditioning'])
  features = _module('pose_guider', golden)(forward, x)
  yield Case('embedding', channels_first(features), 1e-5)


def rife(golden: Golden) -> Iterator[Case]:
  given = inputs(golden.meta)
  pair = (channels_last(given['img0']), channels_last(given['img1']))
  stages = _module('flownet', golden)(forward, *pair)
  last = stages[-1]
  yield Case('merged', channels_first(last.frame), 1e-4)
  yield Case('flow', channels_first(last.flow), 1e-4)


def vae(golden: Golden) -> Iterator[Case]:
  """The latents are one clip."""
  module = _module('vae', golden)
  given = inputs(golden.meta)
  mean, _ = module(lambda model, x: model.encode(x), channels_last(given['image']))
  yield Case('mean', channels_first(mean), 2e-5)
  latents = channels_last(given['latents'])[None]
  video = module(lambda model, z: model.decode(z), latents)
  yield Case('decoded', channels_first(video[0]), 3e-4)


def whisper(golden: Golden) -> Iterator[Case]:
  log_mel = channels_last(inputs(golden.meta)['input_features'])
  states = _module('whisper', golden)(forward, log_mel)
  yield Case('hidden_states_stacked_every100', states[:, ::100], 3e-5)


def clip_vision(golden: Golden) -> Iterator[Case]:
  """The module has 2.5 GB of parameters."""
  pixels = channels_last(inputs(golden.meta)['pixel_values'])
  embeds, _, last = _module('image_encoder', golden)(clip_states, pixels)
  yield Case('image_embeds', embeds, 1e-3)
  yield Case('last_hidden_state_every32', last[:, ::32], 1e-3)
