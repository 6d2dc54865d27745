"""How whole pipelines, and what surrounds the networks, reproduce the reference."""

from collections.abc import Iterator
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from convert.torch_files import read_json
from convert.verify.golden import (
  ENCODE,
  EXACT,
  LIMIT,
  Case,
  Golden,
  Module,
  Tensors,
  channels_first,
  channels_last,
  forward,
  params_of,
)
from dicetalk_jax.component import Component
from dicetalk_jax.diffusion import edm, schedule
from dicetalk_jax.diffusion.face_mask import mask_pyramid
from dicetalk_jax.diffusion.sampler import Conditions, SamplerConfig, make_sampler
from dicetalk_jax.job import Job
from dicetalk_jax.media import audio, image
from dicetalk_jax.pipeline import Pipeline
from dicetalk_jax.settings import Settings

# Limits relative to the deviation, as in `golden`.
SIGMAS = 1e-6
HALF = 2.0**-9  # numbers of up to four deviations, rounded to float16
LATENTS = 2e-4  # ten times the float32 error of the published pipeline
FRAMES = 5e-4  # five times


def scheduler(golden: Golden) -> Iterator[Case]:
  """Computes noise levels, and four steps with given outputs of the network.

  Ours compute in float32, also for float16 numbers.
  """
  stored = golden.inputs
  for steps in (25, 10, 4):
    sigmas = schedule.karras_sigmas(steps)
    yield Case(f'steps{steps}/sigmas', sigmas, SIGMAS)
    yield Case(f'steps{steps}/timesteps', schedule.timesteps(sigmas), SIGMAS)
  first = stored['trace/ref_latents'][:, None] + stored['trace/noise'] * sigmas[0]
  yield Case('trace/latents0', first, LIMIT)
  for trace, limit in (('trace', LIMIT), ('trace_fp16', HALF)):
    before = stored[f'{trace}/latents0']
    for i in range(4):
      x = jnp.asarray(before, jnp.float32)
      v = jnp.asarray(stored[f'{trace}/model_output{i}'], jnp.float32)
      sigma = sigmas[i]
      yield Case(f'{trace}/scaled_input{i}', x * edm.c_in(sigma), limit)
      if trace == 'trace':
        denoised = np.asarray(edm.denoised(x, v, sigma))
        yield Case(f'trace/pred_original{i}', denoised, limit)
      after = np.asarray(schedule.euler_step(x, v, sigma, sigmas[i + 1]))
      yield Case(f'{trace}/prev_sample{i}', after, limit)
      before = stored[f'{trace}/prev_sample{i}']


def portraits(golden: Golden) -> Iterator[Case]:
  """Prepares images of many sizes for the networks, with their face masks."""
  for case in golden.meta['cases']:
    name = case['case']
    portrait = image.prepare_portrait(
      _pattern(case['width'], case['height']),
      case['bbox_xywh'],
      image_size=case['image_size'],
      area=case['area'],
    )
    ref_img = np.moveaxis(portrait.ref_img, -1, 0)
    clip_image = np.moveaxis(portrait.clip_image, -1, 0)
    mask = portrait.mask
    size = np.array([case['new_height'], case['new_width']])
    yield Case(f'{name}/size', np.array(mask.shape), EXACT, size)
    yield Case(f'{name}/face_mask_sample', mask[3::8, 3::8], EXACT)
    yield Case(f'{name}/face_mask_rowsum', mask.sum(1, dtype=np.float64), LIMIT)
    yield Case(f'{name}/face_mask_colsum', mask.sum(0, dtype=np.float64), LIMIT)
    yield Case(f'{name}/ref_img_sample', ref_img[:, 5::16, 5::16], EXACT)
    yield Case(f'{name}/ref_img_rowmean', ref_img.mean(2), LIMIT)
    yield Case(f'{name}/clip_image_sample', clip_image[:, ::16, ::16], EXACT)


def _pattern(width: int, height: int) -> np.ndarray:
  """Makes the image of a case, uint8 [H,W,3]."""
  x, y = np.meshgrid(np.arange(width), np.arange(height))
  channels = [(3 * x + 5 * y + 40 * c + x * y // 97) % 256 for c in range(3)]
  return np.stack(channels, -1).astype(np.uint8)


def crops(golden: Golden) -> Iterator[Case]:
  """Crops squares around faces."""
  cases = golden.meta['cases']
  ours = [
    image.crop_square(c['bbox'], c['width'], c['height'], c['expand_radio'])
    for c in cases
  ]
  yield Case('crops', np.array(ours), EXACT, np.array([c['result'] for c in cases]))


def clip_preprocess(golden: Golden) -> Iterator[Case]:
  """Resizes images to CLIP's size, before and after normalisation."""
  processor = golden.meta['processor']
  mean = np.array(processor['image_mean'], np.float32)
  std = np.array(processor['image_std'], np.float32)
  for i, facts in enumerate(golden.meta['images']):
    pixels = image.clip_pixels(golden.inputs[f'image{i}_uint8'])
    levels = np.rint((pixels * std + mean) * 255).astype(np.uint8)
    yield Case(f'image{i}_lanczos224_uint8_every7', levels[::7, ::7], EXACT)
    values = channels_first(pixels[None])[0]
    yield Case(f'image{i}_pixel_values_every4', values[:, ::4, ::4], LIMIT)
    yield Case(f'image{i}_pixel_values_rowmean', values.mean(2), LIMIT)
    ends = np.array([pixels.min(), pixels.max()])
    expected = np.array([facts['pixel_min'], facts['pixel_max']])
    yield Case(f'image{i}_limits', ends, LIMIT, expected)


def _long_wave(facts: dict[str, Any]) -> np.ndarray:
  """Makes the recording of 31 s: a chirp of changing loudness, and noise."""
  t = np.arange(facts['samples']) / audio.RATE
  chirp = np.sin(2 * np.pi * (200 * t + 5 * t**2))
  loudness = 0.5 + 0.5 * np.sin(2 * np.pi * 0.7 * t)
  noise = np.random.default_rng(406).standard_normal(len(t))
  x = 0.3 * chirp * loudness + 0.05 * noise
  return np.clip(x * 32767, -32768, 32767).astype(np.int16)


def speech_features(golden: Golden) -> Iterator[Case]:
  """Computes log-mel of two recordings, and Whisper's states of the longer one.

  The longer recording fills two windows.
  """
  encoder = golden.folder / 'encoder'
  facts = golden.meta['long']
  given = Tensors(encoder / 'inputs.safetensors')

  def mel_case(name, mel, expected):
    # The published extractor computes in float32, ours in float64; near the floor the
    # logarithm magnifies rounding.
    return Case(name, mel, 4e-5 / float(expected.std()), expected)

  # 1. Log-mel of the short recording
  mel = audio.log_mel(golden.inputs['wav_short_int16'] / np.float32(32768))[0].T
  head = given['log_mel_head'][0]
  silence = given['log_mel_fill'][0].repeat(mel.shape[1] - head.shape[1], axis=1)
  yield mel_case('log_mel_short', mel, np.append(head, silence, axis=1))

  # 2. Log-mel of the long recording, after a check that it is the same recording
  wave = _long_wave(facts)
  ends = np.concatenate([wave[:16], wave[-16:], wave.sum(dtype=np.int64)[None]])
  expected = np.array(facts['first16'] + facts['last16'] + [facts['int64_sum']])
  yield Case('wav_long', ends, EXACT, expected)
  windows = audio.log_mel(wave / np.float32(32768))
  mel = windows.reshape(-1, windows.shape[-1]).T[None]
  samples = {
    'log_mel_long_every50': mel[..., ::50],
    'log_mel_long_colmean': mel.mean(1),
    'log_mel_long_tail': mel[..., 2992:3110],
  }
  for name, ours in samples.items():
    yield mel_case(name, ours, golden.outputs[name])

  # 3. Its states
  config = read_json(encoder / 'config.json')['constructor']
  params = functools.partial(params_of, encoder / 'weights.safetensors')
  module = Module('whisper', config, params)
  states = np.concatenate([module(forward, window[None]) for window in windows])
  padded = audio.pad_states(states, facts['audio_len'])[None]
  border = 1494  # ten positions before the second window, counting the padding in front
  yield Case('long_audio_prompts_every50', padded[:, ::50], LIMIT)
  yield Case('long_audio_prompts_around_window', padded[:, border : border + 20], LIMIT)
  yield Case('long_audio_prompts_tail', padded[:, -20:], LIMIT)


# Names in the descriptions of whole pipelines -> ours.
PARTS = {
  'unet': 'unet',
  'vae': 'vae',
  'clip_vision': 'image_encoder',
  'pose_guider': 'pose_guider',
  'whisper': 'whisper',
  'emotion_model': 'emo_model',
  'rife': 'flownet',
  'audio_linear': 'audio_linear',
}
# Computed in the dtype of the golden, as by `Pipeline.load`; `Pipeline` itself chooses
# the dtype of the decoder.
IN_GOLDEN_DTYPE = ('unet', 'image_encoder', 'pose_guider')


def _parts(golden: Golden) -> dict[str, Module]:
  """Makes the modules of a whole pipeline, by our names.

  Most weights lie in other golden folders.
  """
  own_configs = {
    'clip_vision': 'clip_constructor',
    'audio_linear': 'audio_linear_constructor',
  }
  modules = {}
  for part, place in golden.meta['components'].items():
    name = PARTS[part]
    path = golden.folder / place
    if part in own_configs and own_configs[part] in golden.meta:
      config = golden.meta[own_configs[part]]
    else:
      config = read_json(path.parent / 'config.json')['constructor']
    modules[name] = Module(
      name,
      config,
      functools.partial(params_of, path),
      golden.dtype if name in IN_GOLDEN_DTYPE else None,
    )
  return modules


def _sampler(args: dict[str, Any], **others) -> SamplerConfig:
  """Makes the settings of the sampler from the published pipeline's arguments."""
  return SamplerConfig(
    num_steps=args['num_inference_steps'],
    frames=args['frames_per_batch'],
    overlap=args['overlap'],
    shift=args['shift_offset'],
    strength=args['i2i_noise_strength'],
    g_image=(args['min_guidance_scale1'], args['max_guidance_scale1']),
    g_condition=(args['min_guidance_scale2'], args['max_guidance_scale2']),
    **others,
  )


def _time_ids(args: dict[str, Any]) -> tuple[float, float, float]:
  return (
    float(args['fps']),
    float(args['motion_bucket_id']),
    float(args['motion_bucket_id_exp']),
  )


def pipeline(golden: Golden) -> Iterator[Case]:
  """Samples and decodes from given tokens: every step, and the decoded frames."""
  modules = _parts(golden)
  inputs = golden.inputs
  args = golden.meta['arguments']
  vae = modules['vae']
  scale = vae.config.scaling_factor
  count = args['num_frames']
  chunk = args['decode_chunk_size']

  # 1. Encode the portrait
  mean, _ = vae(lambda model, x: model.encode(x), channels_last(inputs['ref_img']))
  yield Case('vae_mean', channels_first(mean), ENCODE)
  embeds = modules['image_encoder'](forward, channels_last(inputs['clip_img']))
  yield Case('image_embeds', embeds, LIMIT)
  face_mask = channels_last(inputs['face_mask'][None])
  conditions = Conditions(
    reference_latents=mean,
    image_token=embeds[:, None],
    audio_tokens=inputs['audio_tokens'][None],
    null_audio=inputs['uncond_audio_tokens'],
    emotion_tokens=inputs['emo_tokens'][None],
    null_emotion=inputs['uncond_emo_tokens'],
    masks=mask_pyramid(
      jnp.asarray(face_mask[..., 0]), mean.shape[1:3], modules['unet'].config.levels
    ),
    spatial=modules['pose_guider'](forward, face_mask[:, None])[:, 0],
    added_time_ids=jnp.array([_time_ids(args)], jnp.float32),
  )

  # 2. Sample, step by step
  unet = modules['unet']
  config = _sampler(
    args, scaling_factor=scale, adapter_scales=tuple(golden.meta['ip_scale'])
  )
  sample = make_sampler(unet.graphdef, config)

  def steps(x, first, last):
    lengths = np.array([count])
    return np.asarray(sample(unet.params, x, conditions, lengths, first, last))

  latents = np.moveaxis(inputs['noise'], 2, -1)
  yield Case('init_latents', np.moveaxis(steps(latents, 0, 0), -1, 2), LIMIT)
  for i, expected in enumerate(golden.outputs['latents_after_step']):
    latents = steps(latents, i, i + 1)
    ours = np.moveaxis(latents[0], -1, 1)
    yield Case(f'latents_after_step/{i + 1}', ours, LATENTS, expected)
  yield Case('latents_final', np.moveaxis(latents, -1, 2), LATENTS)

  # 3. Decode whole chunks
  padded = -(-count // chunk) * chunk
  z = latents[:, :padded] / np.float32(scale)
  chunks = [
    vae(lambda model, z: model.decode(z), z[:, i : i + chunk])
    for i in range(0, z.shape[1], chunk)
  ]
  frames = channels_first(np.concatenate(chunks, axis=1)[:, :count])
  yield Case('frames_every4_pixels', frames[..., ::4, ::4], FRAMES)
  yield Case('frames_full', frames[:, :, golden.meta['frames_full_indices']], FRAMES)


def end_to_end(golden: Golden) -> Iterator[Case]:
  """Generates a video from image, recording and emotion, up to the written pixels."""
  # 1. Build the pipeline
  modules = _parts(golden)
  inputs = golden.inputs
  args = golden.meta['pipeline_keyword_arguments']
  settings = Settings(
    image_size=golden.meta['process_arguments']['min_resolution'],
    decode_chunk=args['decode_chunk_size'],
    retrieval=golden.meta['config_overrides']['retrieval'],
    time_ids=_time_ids(args),
    sampler=_sampler(args, scaling_factor=modules['vae'].config.scaling_factor),
  )
  networks = {
    name: Component(module.config, module.graphdef, module.params)
    for name, module in modules.items()
  }
  pipe = Pipeline(golden.folder, networks, settings, dtype=golden.dtype)

  # 2. Prepare the portrait
  picture = inputs['image_uint8']
  box = golden.meta['detector_bbox_xywh']
  portrait = image.prepare_portrait(
    picture,
    box,
    image_size=settings.image_size,
    clip_size=modules['image_encoder'].config.image_size,
  )
  yield Case('ref_img', channels_first(portrait.ref_img[None]), EXACT)
  yield Case('face_mask', portrait.mask[None], EXACT)
  clip_image = channels_first(portrait.clip_image[None])
  yield Case('clip_image_every4', clip_image[..., ::4, ::4], EXACT)

  # 3. Make the conditions
  wave = inputs['wav_int16'] / np.float32(32768)
  job = Job(picture, wave, box, prior=inputs['emotion_mu'])
  conditions, count = pipe.conditions(job)
  yield Case('audio_tokens', np.asarray(conditions.audio_tokens[0, :count]), LIMIT)
  yield Case('uncond_audio_tokens', np.asarray(conditions.null_audio), LIMIT)
  assert conditions.emotion_tokens is not None
  yield Case('emo_tokens', np.asarray(conditions.emotion_tokens[0]), LIMIT)
  yield Case('uncond_emo_tokens', np.asarray(conditions.null_emotion), LIMIT)

  # 4. Sample and decode; frames of the bucket beyond the clip are not used
  noise = np.moveaxis(inputs['noise'], 2, -1)
  unused = conditions.audio_tokens.shape[1] - count
  noise = np.pad(noise, ((0, 0), (0, unused), (0, 0), (0, 0), (0, 0)))
  latents = pipe.denoise(noise, conditions, [count])[0]
  exact = channels_first(
    pipe.decode(latents, count, interpolate=True, rounded=False)[None]
  )
  yield Case('video_every4_pixels', exact[:, :, ::2, ::4, ::4], FRAMES)
  yield Case('interpolated_every4_pixels', exact[:, :, 1::2, ::4, ::4], FRAMES)
  yield Case('video_full_last', exact[:, :, -1:], FRAMES)
  written = pipe.decode(latents, count, interpolate=True)[:, ::4, ::4, ::-1]
  one_level = 1 / float(golden.outputs['written_bgr_uint8_every4pixels'].std())
  yield Case('written_bgr_uint8_every4pixels', written, one_level)
