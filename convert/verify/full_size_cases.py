"""Full-size modules, whose weights and inputs follow from a rule: no gigabytes of
files.

A tensor is `base + amp * (2 u - 1)` with u uniform in [0, 1): the upper 53 bits of
PCG64's raw numbers, in C order of the published layout. NumPy guarantees these numbers
for all time.
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
  """Uniform in [-1, 1), float64."""
  raw = np.random.PCG64(seed).random_raw(int(np.prod(shape)))
  return ((raw >> np.uint64(11)) * 2.0**-52 - 1).reshape(shape)


def inputs(meta: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """The input tensors that a description asks for, float32."""
  out = {}
  for name, rule in meta['inputs'].items():
    seed = zlib.crc32(f'input:{name}'.encode()) ^ meta['base_seed']
    out[name] = np.float32(rule['amp'] * _symmetric(seed, rule['shape'])) + np.float32(
      rule['base']
    )
  return out


def params(meta: Mapping[str, Any], target: Abstract) -> Params:
  """The parameters of `target`, made and converted one at a time: no second copy of a
  large module ever exists.

  Raises:
    WeightsError: the description names other tensors than the module has.
  """
  rules = meta['weights_seed_base_amp']
  shapes = {
    key: naming.torch_shape(name, x.shape)
    for name, x in target.items()
    if (key := naming.torch_name(name)) in rules
  }
  naming.from_torch(
    target, {key: np.broadcast_to(np.float32(0), shapes.get(key, ())) for key in rules}
  )
  out = {}
  for name, x in target.items():
    key = naming.torch_name(name)
    seed, base, amp = rules[key]
    value = np.float32(base + amp * _symmetric(seed, shapes[key]))
    out[name] = jnp.asarray(naming.from_torch({name: x}, {key: value})[name])
  return out


def _module(name: str, golden: Golden) -> Module:
  """With its published configuration."""
  return Module(name, {}, lambda target: params(golden.meta, target), golden.dtype)


# Limits are at most ten times what the published modules differ by between float32 and
# float64; that of CLIP was not measured.


def audio_linear(golden: Golden) -> Iterator[Case]:
  module, x = _module('audio_linear', golden), inputs(golden.meta)['audio_embeds']
  yield Case('context_tokens', module(forward, x), 5e-5)
  yield Case('uncond_tokens_every8', module(forward, np.zeros_like(x))[:, :, ::8], 5e-5)


def emo_model(golden: Golden) -> Iterator[Case]:
  module, given = _module('emo_model', golden), inputs(golden.meta)
  prior = given['emo_prompts'].reshape(1, -1)
  methods = {
    'on': lambda model, e: model(e, True),
    'off': lambda model, e: model(e, False),
  }
  for retrieval, method in methods.items():
    for suffix, e in (('_every2', prior), ('_zero_every8', np.zeros_like(prior))):
      tokens, vq = module(method, e)
      yield Case(
        f'retrieval_{retrieval}{suffix}', tokens[:, None, :: int(suffix[-1])], 6e-5
      )
      if suffix == '_every2' and retrieval == 'on':
        yield Case('codebook_index', vq.indices[:, None], EXACT)
  yield Case(
    'classifier_logits',
    module(lambda model, x: model.classify(x), channels_last(given['features'])),
    6e-5,
  )


def pose_guider(golden: Golden) -> Iterator[Case]:
  features = _module('pose_guider', golden)(
    forward, channels_last(inputs(golden.meta)['conditioning'])
  )
  yield Case('embedding', channels_first(features), 1e-5)


def rife(golden: Golden) -> Iterator[Case]:
  pair = inputs(golden.meta)
  last = _module('flownet', golden)(
    forward, *(channels_last(pair[f'img{i}']) for i in range(2))
  )[-1]
  yield Case('merged', channels_first(last.frame), 1e-4)
  yield Case('flow', channels_first(last.flow), 1e-4)


def vae(golden: Golden) -> Iterator[Case]:
  """The latents are one clip."""
  module, given = _module('vae', golden), inputs(golden.meta)
  mean, _ = module(lambda model, x: model.encode(x), channels_last(given['image']))
  yield Case('mean', channels_first(mean), 2e-5)
  video = module(
    lambda model, z: model.decode(z), channels_last(given['latents'])[None]
  )
  yield Case('decoded', channels_first(video[0]), 3e-4)


def whisper(golden: Golden) -> Iterator[Case]:
  states = _module('whisper', golden)(
    forward, channels_last(inputs(golden.meta)['input_features'])
  )
  yield Case('hidden_states_stacked_every100', states[:, ::100], 3e-5)


def clip_vision(golden: Golden) -> Iterator[Case]:
  """2.5 GB of parameters."""
  module, pixels = (
    _module('image_encoder', golden),
    channels_last(inputs(golden.meta)['pixel_values']),
  )
  embeds, _, last = module(clip_states, pixels)
  yield Case('image_embeds', embeds, 1e-3)
  yield Case('last_hidden_state_every32', last[:, ::32], 1e-3)
