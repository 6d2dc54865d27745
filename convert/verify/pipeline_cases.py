"""How the parts around the networks, and all of them together, reproduce the
published program.
"""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from convert import naming
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
  weights_of,
)
from dicetalk_jax.component import Component
from dicetalk_jax.diffusion import edm, schedule
from dicetalk_jax.diffusion.face_mask import mask_pyramid
from dicetalk_jax.diffusion.sampler import Conditions, SamplerConfig, make_sampler
from dicetalk_jax.media import audio, image
from dicetalk_jax.pipeline import Pipeline, Settings

SIGMAS = 1e-6
HALF = 2.0**-9  # numbers of up to four deviations, rounded to float16
LATENTS, FRAMES = (
  2e-4,
  5e-4,
)  # ten and five times the float32 error of the published pipeline


def scheduler(golden: Golden) -> Iterator[Case]:
  """Noise levels, and four steps with given outputs of the network; ours are float32
  for float16 numbers too.
  """
  stored = golden.inputs
  for steps in (25, 10, 4):
    sigmas = schedule.karras_sigmas(steps)
    yield Case(f'steps{steps}/sigmas', sigmas, SIGMAS)
    yield Case(f'steps{steps}/timesteps', schedule.timesteps(sigmas), SIGMAS)
  x = stored['trace/ref_latents'][:, None] + stored['trace/noise'] * sigmas[0]
  yield Case('trace/latents0', x, LIMIT)
  for trace, limit in (('trace', LIMIT), ('trace_fp16', HALF)):
    x = stored[f'{trace}/latents0']
    for i in range(4):
      v = jnp.asarray(stored[f'{trace}/model_output{i}'], jnp.float32)
      z, now = jnp.asarray(x, jnp.float32), sigmas[i]
      yield Case(f'{trace}/scaled_input{i}', z * edm.c_in(now), limit)
      if trace == 'trace':
        yield Case(f'trace/pred_original{i}', edm.denoised(z, v, now), limit)
      yield Case(
        f'{trace}/prev_sample{i}',
        np.asarray(schedule.euler_step(z, v, now, sigmas[i + 1])),
        limit,
      )
      x = stored[f'{trace}/prev_sample{i}']


def portraits(golden: Golden) -> Iterator[Case]:
  """Pictures of many sizes: what the networks see of them, and the face mask."""
  for case in golden.meta['cases']:
    x, y = np.meshgrid(np.arange(case['width']), np.arange(case['height']))
    picture = np.stack(
      [(3 * x + 5 * y + 40 * c + x * y // 97) % 256 for c in range(3)], -1
    ).astype(np.uint8)
    portrait = image.prepare_portrait(
      picture, case['bbox_xywh'], image_size=case['image_size'], area=case['area']
    )
    ref_img, clip_image = (
      np.moveaxis(a, -1, 0) for a in (portrait.ref_img, portrait.clip_image)
    )
    mask, name = portrait.mask, case['case']
    yield Case(
      f'{name}/size',
      np.array(mask.shape),
      EXACT,
      np.array([case['new_height'], case['new_width']]),
    )
    yield Case(f'{name}/face_mask_sample', mask[3::8, 3::8], EXACT)
    yield Case(f'{name}/face_mask_rowsum', mask.sum(1, dtype=np.float64), LIMIT)
    yield Case(f'{name}/face_mask_colsum', mask.sum(0, dtype=np.float64), LIMIT)
    yield Case(f'{name}/ref_img_sample', ref_img[:, 5::16, 5::16], EXACT)
    yield Case(f'{name}/ref_img_rowmean', ref_img.mean(2), LIMIT)
    yield Case(f'{name}/clip_image_sample', clip_image[:, ::16, ::16], EXACT)


def crops(golden: Golden) -> Iterator[Case]:
  """Square crops around faces."""
  cases = golden.meta['cases']
  ours = [
    image.crop_square(c['bbox'], c['width'], c['height'], c['expand_radio'])
    for c in cases
  ]
  yield Case('crops', np.array(ours), EXACT, np.array([c['result'] for c in cases]))


def clip_preprocess(golden: Golden) -> Iterator[Case]:
  """Pictures squeezed to CLIP's size, before and after normalisation."""
  processor = golden.meta['processor']
  mean, std = np.float32(processor['image_mean']), np.float32(processor['image_std'])
  for i, facts in enumerate(golden.meta['images']):
    pixels = image.clip_pixels(golden.inputs[f'image{i}_uint8'])
    levels = np.rint((pixels * std + mean) * 255).astype(np.uint8)
    yield Case(f'image{i}_lanczos224_uint8_every7', levels[::7, ::7], EXACT)
    yield Case(
      f'image{i}_pixel_values_every4',
      channels_first(pixels[None])[0, :, ::4, ::4],
      LIMIT,
    )
    yield Case(
      f'image{i}_pixel_values_rowmean', channels_first(pixels[None])[0].mean(2), LIMIT
    )
    limits = np.array([facts['pixel_min'], facts['pixel_max']])
    yield Case(
      f'image{i}_limits', np.array([pixels.min(), pixels.max()]), LIMIT, limits
    )


def _long_wave(facts: dict[str, Any]) -> np.ndarray:
  """The recording of 31 s by its recipe."""
  t = np.arange(facts['samples']) / audio.RATE
  chirp = (
    0.3
    * np.sin(2 * np.pi * (200 * t + 5 * t**2))
    * (0.5 + 0.5 * np.sin(2 * np.pi * 0.7 * t))
  )
  x = chirp + 0.05 * np.random.default_rng(406).standard_normal(len(t))
  return np.clip(x * 32767, -32768, 32767).astype(np.int16)


def speech_features(golden: Golden) -> Iterator[Case]:
  """Log-mel of two recordings, and the padded states of the longer one, which fills
  two windows.
  """
  encoder = golden.folder / 'encoder'
  facts, given = golden.meta['long'], Tensors(encoder / 'inputs.safetensors')

  def mel_case(name, mel, expected):
    # The published extractor computes in float32, ours in float64; near the floor the
    # logarithm magnifies rounding.
    return Case(name, mel, 4e-5 / float(expected.std()), expected)

  mel = audio.log_mel(golden.inputs['wav_short_int16'] / np.float32(32768))[0].T
  head, fill = given['log_mel_head'][0], given['log_mel_fill'][0]
  yield mel_case(
    'log_mel_short',
    mel,
    np.append(head, fill.repeat(mel.shape[1] - head.shape[1], axis=1), axis=1),
  )

  wave = _long_wave(facts)
  ends = np.concatenate([wave[:16], wave[-16:], wave.sum(dtype=np.int64)[None]])
  yield Case(
    'wav_long',
    ends,
    EXACT,
    np.array(facts['first16'] + facts['last16'] + [facts['int64_sum']]),
  )
  windows = audio.log_mel(wave / np.float32(32768))
  mel = windows.reshape(-1, windows.shape[-1]).T[None]
  for name, ours in (
    ('every50', mel[..., ::50]),
    ('colmean', mel.mean(1)),
    ('tail', mel[..., 2992:3110]),
  ):
    yield mel_case(f'log_mel_long_{name}', ours, golden.outputs[f'log_mel_long_{name}'])

  config = read_json(encoder / 'config.json')['constructor']
  weights = weights_of(encoder / 'weights.safetensors')
  module = Module('whisper', config, lambda target: naming.from_torch(target, weights))
  states = np.concatenate([module(forward, window[None]) for window in windows])
  padded = audio.pad_states(states, facts['audio_len'])[None]
  border = 1494  # ten positions before the second window, counting the padding in front
  yield Case('long_audio_prompts_every50', padded[:, ::50], LIMIT)
  yield Case('long_audio_prompts_around_window', padded[:, border : border + 20], LIMIT)
  yield Case('long_audio_prompts_tail', padded[:, -20:], LIMIT)


# Names in the descriptions of whole programs: ours.
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
# Computed in the type of the golden, as `Pipeline.load` does; the decoder is
# `Pipeline`'s.
HALVED = ('unet', 'image_encoder', 'pose_guider')


def _parts(golden: Golden) -> dict[str, Module]:
  """The modules of a whole program, by our names; most weights lie in other golden
  folders.
  """
  modules, own = (
    {},
    {'clip_vision': 'clip_constructor', 'audio_linear': 'audio_linear_constructor'},
  )
  for part, place in golden.meta['components'].items():
    path = golden.folder / place
    config = (
      golden.meta.get(own.get(part))
      or read_json(path.parent / 'config.json')['constructor']
    )
    modules[PARTS[part]] = Module(
      PARTS[part],
      config,
      lambda target, path=path: naming.from_torch(target, weights_of(path)),
      golden.dtype if PARTS[part] in HALVED else None,
    )
  return modules


def _sampler(args: dict[str, Any], **others) -> SamplerConfig:
  """From the published pipeline's arguments."""
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
  """Sampling and decoding from given tokens: every step, and the decoded frames."""
  modules, inputs, args = _parts(golden), golden.inputs, golden.meta['arguments']
  vae, scale = modules['vae'], modules['vae'].config.scaling_factor
  count, chunk = args['num_frames'], args['decode_chunk_size']

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
      face_mask[..., 0], mean.shape[1:3], modules['unet'].config.levels
    ),
    spatial=modules['pose_guider'](forward, face_mask[:, None])[:, 0],
    added_time_ids=np.float32([_time_ids(args)]),
  )

  unet = modules['unet']
  config = _sampler(
    args, scaling_factor=scale, adapter_scales=tuple(golden.meta['ip_scale'])
  )
  sample = make_sampler(unet.graphdef, config)

  def run(x, first, last):
    return np.asarray(
      sample(unet.params, x, conditions, np.array([count]), first, last)
    )

  latents = np.moveaxis(inputs['noise'], 2, -1)
  yield Case('init_latents', np.moveaxis(run(latents, 0, 0), -1, 2), LIMIT)
  for i, expected in enumerate(golden.outputs['latents_after_step']):
    latents = run(latents, i, i + 1)
    yield Case(
      f'latents_after_step/{i + 1}', np.moveaxis(latents[0], -1, 1), LATENTS, expected
    )
  yield Case('latents_final', np.moveaxis(latents, -1, 2), LATENTS)

  z = latents[:, : -(-count // chunk) * chunk] / np.float32(scale)
  chunks = [
    vae(lambda model, z: model.decode(z), z[:, i : i + chunk])
    for i in range(0, z.shape[1], chunk)
  ]
  frames = channels_first(np.concatenate(chunks, axis=1)[:, :count])
  yield Case('frames_every4_pixels', frames[..., ::4, ::4], FRAMES)
  yield Case('frames_full', frames[:, :, golden.meta['frames_full_indices']], FRAMES)


def end_to_end(golden: Golden) -> Iterator[Case]:
  """From picture, recording and emotion to the pixels that are written."""
  modules, inputs, args = (
    _parts(golden),
    golden.inputs,
    golden.meta['pipeline_keyword_arguments'],
  )
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

  picture, box = inputs['image_uint8'], golden.meta['detector_bbox_xywh']
  portrait = image.prepare_portrait(
    picture,
    box,
    image_size=settings.image_size,
    clip_size=modules['image_encoder'].config.image_size,
  )
  yield Case('ref_img', channels_first(portrait.ref_img[None]), EXACT)
  yield Case('face_mask', portrait.mask[None], EXACT)
  yield Case(
    'clip_image_every4', channels_first(portrait.clip_image[None])[..., ::4, ::4], EXACT
  )

  wave = inputs['wav_int16'] / np.float32(32768)
  conditions, count = pipe.conditions(picture, wave, inputs['emotion_mu'], box)
  yield Case('audio_tokens', np.asarray(conditions.audio_tokens[0, :count]), LIMIT)
  yield Case('uncond_audio_tokens', np.asarray(conditions.null_audio), LIMIT)
  yield Case('emo_tokens', np.asarray(conditions.emotion_tokens[0]), LIMIT)
  yield Case('uncond_emo_tokens', np.asarray(conditions.null_emotion), LIMIT)

  noise = np.moveaxis(inputs['noise'], 2, -1)
  unused = (
    conditions.audio_tokens.shape[1] - count
  )  # frames of the bucket beyond the clip
  latents = pipe.denoise(
    np.pad(noise, ((0, 0), (0, unused), *[(0, 0)] * 3)), conditions, [count]
  )[0]
  exact = channels_first(
    pipe.decode(latents, count, interpolate=True, rounded=False)[None]
  )
  yield Case('video_every4_pixels', exact[:, :, ::2, ::4, ::4], FRAMES)
  yield Case('interpolated_every4_pixels', exact[:, :, 1::2, ::4, ::4], FRAMES)
  yield Case('video_full_last', exact[:, :, -1:], FRAMES)
  written = pipe.decode(latents, count, interpolate=True)[:, ::4, ::4, ::-1]
  one_level = 1 / float(golden.outputs['written_bgr_uint8_every4pixels'].std())
  yield Case('written_bgr_uint8_every4pixels', written, one_level)
