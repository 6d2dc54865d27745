"""How each module reproduces the reference outputs of its component.

There is one function per component, from golden files to cases.
"""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from convert.verify.golden import (
  DECODE,
  ENCODE,
  EXACT,
  LIMIT,
  Case,
  Golden,
  Module,
  channels_first,
  channels_last,
  forward,
)
from dicetalk_jax.diffusion.face_mask import mask_pyramid, resample_mask
from dicetalk_jax.models.rife import double

# As in `golden`, ten times the float32 error of the published modules.
UNET = 3e-5
RIFE = 1e-4


def audio_projection(golden: Golden) -> Iterator[Case]:
  module = Module.of('audio_linear', golden)
  for suffix in ('', '_zero', '_small'):
    tokens = module(forward, golden.inputs[f'audio_embeds{suffix}'])
    yield Case(f'context_tokens{suffix}', tokens, LIMIT)


def pose_guider(golden: Golden) -> Iterator[Case]:
  module = Module.of('pose_guider', golden)
  for suffix in ('', '_mask'):
    features = module(forward, channels_last(golden.inputs[f'conditioning{suffix}']))
    yield Case(f'embedding{suffix}', channels_first(features), LIMIT)


def emotion_model(golden: Golden) -> Iterator[Case]:
  """Rows of the golden are (clip, frame); ours has no frames."""
  module = Module.of('emo_model', golden)
  methods = {
    'on': lambda model, prior, mask: model(prior, True, mask),
    'off': lambda model, prior, mask: model(prior, False, mask),
  }
  prior = golden.inputs['emo_prompts']
  zero = golden.inputs['emo_prompts_zero']
  mask = golden.inputs['emo_prompt_mask']
  no_mask = np.zeros_like(mask)
  inputs = {
    '': (prior, no_mask),
    '_masked': (prior, mask),
    '_zero': (zero, no_mask[:1, :1]),
  }
  for retrieval, method in methods.items():
    for suffix, (x, dropped) in inputs.items():
      tokens, vq = module(method, x.reshape(-1, x.shape[-1]), dropped.ravel())
      tokens = tokens.reshape(*x.shape[:2], *tokens.shape[1:])
      yield Case(f'retrieval_{retrieval}{suffix}/tokens', tokens, LIMIT)
      yield Case(f'retrieval_{retrieval}{suffix}/vq_loss', vq.loss[None], LIMIT)
  rows = prior.reshape(-1, prior.shape[-1])
  code, vq = module(lambda model, x: model.codebook(x), rows)
  yield Case('codebook/quantized', code.reshape(*prior.shape[:-1], -1), LIMIT)
  yield Case('codebook/vq_loss', vq.loss[None], LIMIT)
  yield Case('codebook/indices', vq.indices[:, None], EXACT)
  features = channels_last(golden.inputs['classifier_features'])
  logits = module(lambda model, x: model.classify(x), features)
  yield Case('classifier_logits', logits, LIMIT)


def whisper(golden: Golden) -> Iterator[Case]:
  """The golden has some states, and the padded prompts that frames take windows of."""
  module = Module.of('whisper', golden)
  head = golden.inputs['log_mel_head']
  silence = golden.inputs['log_mel_fill']
  tail = np.repeat(silence, 3000 - head.shape[2], axis=2)
  log_mel = np.concatenate([head, tail], axis=2)
  states = module(forward, channels_last(log_mel))
  yield Case('hidden_states_stacked_every25', states[:, ::25], LIMIT)
  yield Case('hidden_states_last100_every5', states[:, -100::5], LIMIT)
  meta = golden.meta
  padding = ((0, 0), (4, 6), (0, 0), (0, 0))
  prompts = np.pad(states[:, : 2 * meta['audio_len']], padding)
  starts = [2 * meta['step'] * i for i in range(meta['frames'])]
  clips = np.stack([prompts[0, start : start + 10] for start in starts])
  yield Case('audio_prompts', prompts, LIMIT)
  yield Case('clips_first', clips[0], LIMIT)
  yield Case('clips_last', clips[-1], LIMIT)
  yield Case('clips_sum', clips.sum(axis=(1, 2, 3)), LIMIT)


def clip_states(model, pixels):
  """Computes the embedding, and the states after the first and the last layer."""
  tower = model.vision_model
  embedded = tower.pre_layrnorm(tower.embeddings(pixels))
  return model(pixels), tower.encoder.layers[0](embedded), tower.encoder(embedded)


def clip_vision(golden: Golden) -> Iterator[Case]:
  module = Module.of('image_encoder', golden)
  pixels = channels_last(golden.inputs['pixel_values'])
  embeds, first, last = module(clip_states, pixels)
  yield Case('image_embeds', embeds, LIMIT)
  yield Case('hidden_state_1', first, LIMIT)
  yield Case('last_hidden_state', last, LIMIT)


def vae(golden: Golden) -> Iterator[Case]:
  module = Module.of('vae', golden)
  small = golden.small_signal()

  def encode(weights=None):
    image = channels_last(golden.inputs['image'])
    mean, logvar = module(lambda model, x: model.encode(x), image, weights=weights)
    return channels_first(mean), channels_first(logvar)

  def decode(shape, weights=None):
    """`shape` names the number of clips and frames, such as 2x3."""
    latents = channels_last(golden.inputs[f'latents_{shape}'])
    count = int(shape.split('x')[0])
    clips = latents.reshape(count, -1, *latents.shape[1:])
    video = module(lambda model, z: model.decode(z), clips, weights=weights)
    return channels_first(video.reshape(-1, *video.shape[2:]))

  mean, logvar = encode()
  yield Case('encode/mean', mean, ENCODE)
  yield Case('encode/mode', mean, ENCODE)
  yield Case('encode/logvar', logvar, ENCODE)
  yield Case('encode/moments', np.concatenate([mean, logvar], axis=1), ENCODE)
  yield Case('small_signal/encode_mean', encode(small)[0], ENCODE)
  yield Case('decode_1x5', decode('1x5'), DECODE)
  yield Case('decode_2x3', decode('2x3'), DECODE)
  yield Case('small_signal/decode_2x3', decode('2x3', small), DECODE)


def unet(golden: Golden) -> Iterator[Case]:
  """Runs the UNet on three groups of inputs.

  `main` has three guidance rows, `perframe` an image token per frame, and `plain` is
  Stable Video Diffusion, without adapters.
  """
  inputs = golden.inputs
  small = golden.small_signal()
  module = Module.of('unet', golden, adapters=len(golden.meta['adapter_tokens']))

  def prepare(name, *token_names):
    """Sample, time step, ids and tokens of an input group, channels last."""
    sample = np.moveaxis(inputs[f'{name}/sample'], 2, -1)
    timestep = inputs[f'{name}/timestep'][0]
    ids = inputs[f'{name}/added_time_ids']
    tokens = []
    for token_name in token_names:
      x = inputs[f'{name}/{token_name}']
      tokens.append(x.reshape(len(sample), -1, *x.shape[1:]))
    return sample, timestep, ids, tokens

  def call(model, sample, timestep, ids, tokens, spatial=None, masks=None, scales=()):
    return model(
      sample, timestep, model.context_kv(*tokens), ids, spatial, masks, scales
    )

  def adapted(name, scales=(1.0, 1.0), masked=True, factor=1, weights=None):
    """Output and middle block in PyTorch's layouts.

    Instead of no mask, a mask of ones is used, which saves a compilation.
    """
    sample, timestep, ids, tokens = prepare(
      name, 'image_context', 'audio_tokens', 'emo_tokens'
    )
    spatial = np.moveaxis(inputs[f'{name}/spatial_condition'], 2, -1)
    spatial = spatial * np.float32(factor)
    mask = np.repeat(inputs[f'{name}/mask'][:, 0], len(sample), axis=0)
    if not masked:
      mask = np.ones_like(mask)
    levels = len(golden.constructor['block_out_channels'])
    masks = mask_pyramid(jnp.asarray(mask), sample.shape[2:4], levels)
    out, mid = module(
      call,
      sample,
      timestep,
      ids,
      tokens,
      spatial,
      masks,
      np.float32(scales),
      weights=weights,
    )
    return np.moveaxis(out, -1, 2), channels_first(mid.reshape(-1, *mid.shape[2:]))

  out, mid = adapted('main')
  yield Case('main/out', out, UNET)
  yield Case('main/mid_block', mid, UNET)
  yield Case('main_scale_1_0/out', adapted('main', scales=(1.0, 0.0))[0], UNET)
  yield Case('main_scale_07_03/out', adapted('main', scales=(0.7, 0.3))[0], UNET)
  factor = golden.meta['small_signal']['factor']
  out, _ = adapted('main', factor=factor, weights=small)
  yield Case('main_small_signal/out', out, UNET)
  yield Case('main_nomask/out', adapted('main', masked=False)[0], UNET)
  yield Case('perframe/out', adapted('perframe')[0], UNET)
  without_adapters = {
    key: x for key, x in golden.weights.items() if '.processor.' not in key
  }
  plain = Module.of('unet', golden, without_adapters, adapters=0)
  out, _ = plain(call, *prepare('plain', 'image_context'))
  for version in ('0.29.0', '0.42.1'):
    yield Case(f'plain/out_diffusers_{version}', np.moveaxis(out, -1, 2), UNET)


def mask_downsample(golden: Golden) -> Iterator[Case]:
  """Masks are stored, or boxes of ones."""
  for case in golden.meta['cases']:
    name = case['case']
    if case['mask_stored']:
      mask = golden.inputs[f'{name}/mask']
    else:
      top, bottom, left, right = case['box']
      mask = np.zeros((1, *case['mask_hw']), np.float32)
      mask[:, top:bottom, left:right] = 1
    resampled = resample_mask(jnp.asarray(mask), case['num_queries'])
    yield Case(f'{name}/out', np.asarray(resampled), LIMIT)


def rife(golden: Golden) -> Iterator[Case]:
  """Interpolates two pairs of frames, one of them with all stages, and a clip."""
  module = Module.of('flownet', golden)

  def pair(name):
    return (channels_last(golden.inputs[f'{name}/img{i}']) for i in range(2))

  *stages, last = module(forward, *pair('a'))
  for i, stage in enumerate(stages):
    yield Case(f'a/flow_stage{i}', channels_first(stage.flow), RIFE)
  yield Case('a/merged_stage0', channels_first(stages[0].frame), RIFE)
  yield Case('a/flow', channels_first(last.flow), RIFE)
  yield Case('a/mask', channels_first(last.share), RIFE)
  yield Case('a/merged', channels_first(last.frame), RIFE)
  yield Case('b/merged', channels_first(module(forward, *pair('b'))[-1].frame), RIFE)
  doubled = module(double, channels_last(golden.inputs['seq']))
  yield Case('seq_doubled', channels_first(doubled), RIFE)
