"""The stages of a run, each computed here from the inputs that the dump has for it.

So one wrong stage does not hide the next. The last rows are computed from the first
inputs alone, as `generate` does.
"""

from collections.abc import Iterator
import dataclasses
import pathlib
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from convert.accept.dump import Dump
from convert.verify.golden import channels_last
from dicetalk_jax.bundle import ModelFolder
from dicetalk_jax.component import Component
from dicetalk_jax.diffusion.face_mask import mask_pyramid
from dicetalk_jax.diffusion.sampler import Conditions, make_plan, make_sampler
from dicetalk_jax.errors import InputError
from dicetalk_jax.media import audio
from dicetalk_jax.pipeline import Pipeline
from dicetalk_jax.settings import Settings


class Limit(NamedTuple):
  """What rounding may change, as the largest error over the standard deviation.

  Attributes:
    single: where the run computed in float32.
    half: where it computed in 16 bits.
    psnr: in place of `half`, for images: dB.
  """

  single: float
  half: float
  psnr: float | None = None


# Of float32: ten times the limits of the goldens (`convert.verify.golden`), because
# weights are trained and the devices are others. Over all 25 steps, and of 16 bits, no
# error of the reference implementation has been measured: those are estimates, at least
# four times what a small twin in float16 shows (docs/original.md).
EXACT = Limit(1e-6, 1e-3)
TOKENS = Limit(2e-4, 5e-2)
ENCODED = Limit(3e-4, 5e-2)
CLIP = Limit(1e-3, 5e-2)
STEP = Limit(2e-3, 1e-1)
SAMPLED = Limit(1e-2, 3e-1)
FRAMES = Limit(5e-3, 1.0, psnr=35)
ALL_FRAMES = Limit(2e-2, 1.0, psnr=25)


class Stage(NamedTuple):
  """One comparison.

  Attributes:
    name: of the stage.
    ours: computed here.
    reference: recorded.
    limit: of their difference.
    half: whether the run computed it in 16 bits.
    is_image: whether the values are images in [-1, 1].
  """

  name: str
  ours: np.ndarray
  reference: np.ndarray
  limit: Limit
  half: bool
  is_image: bool = False


class Stages:
  """Computes every stage with the networks of a model folder, in float32."""

  def __init__(self, dump: Dump, folder: pathlib.Path):
    """Loads the networks.

    Raises:
      InputError: the model folder is not of DICE-Talk.
      WeightsError: the model folder is incomplete or damaged.
    """
    self.dump = dump
    model = ModelFolder.open(folder)
    settings = _settings(dump, model)
    model.require(*settings.components)
    networks = {name: Component.load(model, name) for name in settings.components}
    self.pipe = Pipeline(model, networks, settings)
    self.networks = self.pipe.encoder.stages
    unet = networks['unet']
    self._sample = make_sampler(unet.graphdef, settings.sampler)
    self._unet_params = unet.params
    self.levels = unet.config.levels

  def run(self) -> Iterator[Stage]:
    """Yields the stages in the order of the data."""
    yield from self.portrait()
    yield from self.speech()
    yield from self.emotion()
    yield from self.sampling()
    yield from self.decoding()
    yield from self.end_to_end()

  def stage(self, name: str, ours: Any, tensor: str, limit: Limit) -> Stage:
    """Compares with one tensor of the dump."""
    half = self.dump.is_half(tensor)
    return Stage(name, np.asarray(ours), self.dump[tensor], limit, half)

  # Conditions, from the inputs of each network.

  def portrait(self) -> Iterator[Stage]:
    latents = self._reference_latents()
    first = np.moveaxis(latents, -1, 1)
    yield self.stage('reference latents', first, 'reference_latents', ENCODED)
    yield self.stage('CLIP token', self._image_token()[:, 0], 'image_embeds', CLIP)
    spatial = np.moveaxis(self._face_features()[0], -1, 0)
    yield self.stage('face mask features', spatial, 'face_features', TOKENS)

  def speech(self) -> Iterator[Stage]:
    yield self.stage('speech states', self._states(), 'speech_states', TOKENS)
    windows = self._windows(self.dump['speech_states'])
    yield self.stage('audio windows', windows, 'audio_windows', EXACT)
    tokens, silence = self.networks['audio_linear'](self.dump['audio_windows'][None])
    yield self.stage('audio tokens', tokens[0], 'audio_tokens', TOKENS)
    yield self.stage('audio tokens of silence', silence, 'null_audio', TOKENS)

  def emotion(self) -> Iterator[Stage]:
    tokens, none = self.networks['emo_model'](self.dump['prior'][None])
    yield self.stage('emotion tokens', tokens[0], 'emotion_tokens', TOKENS)
    yield self.stage('tokens of no emotion', none, 'null_emotion', TOKENS)
    if 'time_ids' in self.dump:
      ids = np.float32(self.pipe.settings.time_ids)
      yield self.stage('time ids', ids, 'time_ids', EXACT)

  # Sampling and decoding, from the recorded conditions and latents.

  def sampling(self) -> Iterator[Stage]:
    recorded = self._recorded_latents()
    half = self.dump.is_half('latents')
    conditions = self._recorded_conditions()
    if 'noise' in self.dump:
      start = self.sample(self._noise(), conditions, 0, 0)
      yield Stage('initial latents', start, recorded[0], ENCODED, half)

    # A sampler that begins with the first step wants noise.
    noise = self._noise_of(recorded[0])
    steps = len(recorded) - 1
    for i in range(steps):
      before = recorded[i] if i > 0 else noise
      after = self.sample(before, conditions, i, i + 1)
      yield Stage(f'latents after step {i + 1}', after, recorded[i + 1], STEP, half)
    final = self.sample(noise, conditions, 0, steps)
    yield Stage('final latents', final, recorded[-1], SAMPLED, half)

  def decoding(self) -> Iterator[Stage]:
    yield self._frames('frames', self._recorded_latents()[-1], FRAMES)

  def end_to_end(self) -> Iterator[Stage]:
    """From pixels, mask, log-mel, prior and noise alone."""
    windows = self._windows(self._states())
    tokens, silence = self.networks['audio_linear'](windows[None])
    emotion, none = self.networks['emo_model'](self.dump['prior'][None])
    conditions = self._conditions(
      reference_latents=self._reference_latents(),
      image_token=self._image_token(),
      audio_tokens=tokens,
      null_audio=silence,
      emotion_tokens=emotion,
      null_emotion=none,
      spatial=self._face_features(),
    )
    steps = self.pipe.settings.sampler.steps_run
    final = self.sample(self._noise(), conditions, 0, steps)
    yield self._frames('frames, end to end', final, ALL_FRAMES)

  def sample(
    self, x: np.ndarray, conditions: Conditions, first: int, last: int
  ) -> np.ndarray:
    """Latents [1,T,h,w,C] after the steps `first` to `last`, from those before."""
    lengths = np.array([self.dump.settings['length']])
    return np.asarray(
      self._sample(self._unet_params, x, conditions, lengths, first, last)
    )

  # Parts that several stages share.

  def _reference_latents(self) -> np.ndarray:
    return np.asarray(self.networks['vae'](channels_last(self.dump['image'])))

  def _image_token(self) -> np.ndarray:
    pixels = channels_last(self.dump['clip_image'])
    return np.asarray(self.networks['image_encoder'](pixels))

  def _face_features(self) -> np.ndarray:
    return np.asarray(self.networks['pose_guider'](self.dump['mask'][None]))

  def _states(self) -> np.ndarray:
    mel = channels_last(self.dump['log_mel'])
    return np.concatenate([self.networks['whisper'](window[None]) for window in mel])

  def _windows(self, states: np.ndarray) -> np.ndarray:
    """States around each frame [N,10,S,D].

    The dump does not say how long the recording is. It fills N frames and perhaps a
    part of the next, which can show at the end of the last frame only.
    """
    step = self.pipe.settings.frame_step
    length = self.dump.settings['length']
    recorded = self.dump['audio_windows']
    candidates = []
    for units in range(step * length, step * (length + 1)):
      padded = audio.pad_states(states, units, audio.CLIP)
      windows = audio.audio_windows(padded, step=step, frames=length, clip=audio.CLIP)
      candidates.append(windows)
    return min(candidates, key=lambda windows: np.abs(windows - recorded).max())

  def _recorded_conditions(self) -> Conditions:
    return self._conditions(
      reference_latents=channels_last(self.dump['reference_latents']),
      image_token=self.dump['image_embeds'][:, None],
      audio_tokens=self.dump['audio_tokens'][None],
      null_audio=self.dump['null_audio'],
      emotion_tokens=self.dump['emotion_tokens'][None],
      null_emotion=self.dump['null_emotion'],
      spatial=np.moveaxis(self.dump['face_features'], 0, -1)[None],
    )

  def _conditions(self, reference_latents: np.ndarray, **others: Any) -> Conditions:
    size = reference_latents.shape[1:3]
    mask = jnp.asarray(self.dump['mask'][None])
    return Conditions(
      reference_latents=reference_latents,
      masks=mask_pyramid(mask, size, self.levels),
      added_time_ids=np.float32([self.pipe.settings.time_ids]),
      **others,
    )

  def _recorded_latents(self) -> np.ndarray:
    """Before the first step and after every step [steps + 1,1,T,h,w,C]."""
    return np.moveaxis(self.dump['latents'], 2, -1)[:, None]

  def _noise(self) -> np.ndarray:
    """The start noise [1,T,h,w,C]."""
    if 'noise' in self.dump:
      return np.moveaxis(self.dump['noise'], 1, -1)[None]
    return self._noise_of(self._recorded_latents()[0])

  def _noise_of(self, initial: np.ndarray) -> np.ndarray:
    """The noise that makes these initial latents [1,T,h,w,C]."""
    sampler = self.pipe.settings.sampler
    portrait = channels_last(self.dump['reference_latents'])[:, None]
    return (initial - sampler.scaling_factor * portrait) / make_plan(sampler).sigma[0]

  def _frames(self, name: str, latents: np.ndarray, limit: Limit) -> Stage:
    length = self.dump.settings['length']
    ours = self.pipe.decode(latents[0], length, rounded=False)
    reference = np.moveaxis(self.dump['frames'], 1, -1)
    return Stage(
      name,
      ours * 2 - 1,
      np.clip(reference, -1, 1),
      limit,
      self.dump.is_half('frames'),
      is_image=True,
    )


def _settings(dump: Dump, model: ModelFolder) -> Settings:
  """The settings of the model folder, with what the run was asked for."""
  asked = dump.settings
  sampling = {
    name: asked[name]
    for name in ('num_steps', 'frames', 'overlap', 'shift', 'g_image', 'g_condition')
  }
  if asked['steps_run'] < asked['num_steps']:
    sampling['strength'] = (asked['steps_run'] + 0.5) / asked['num_steps']
  settings = Settings.of(model, **sampling)
  if settings.kind != 'dicetalk':
    raise InputError(
      f'{model} is a model of {settings.kind}, but the dump is one of DICE-Talk; name '
      'the folder that python -m convert dicetalk has made'
    )
  return dataclasses.replace(settings, decode_chunk=asked['decode_chunk'])
