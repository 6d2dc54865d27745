"""Portrait, audio and emotion become the conditions of the sampler."""

from collections.abc import Callable, Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dicetalk_jax.component import Component
from dicetalk_jax.diffusion.face_mask import mask_pyramid
from dicetalk_jax.diffusion.sampler import Conditions, join_conditions
from dicetalk_jax.job import Job
from dicetalk_jax.media import audio
from dicetalk_jax.media.image import prepare_portrait
from dicetalk_jax.models.audio2bucket import AudioToBucket
from dicetalk_jax.models.audio_projection import AudioProjection
from dicetalk_jax.models.clip import CLIPVision
from dicetalk_jax.models.emotion import EmotionModel
from dicetalk_jax.models.pose_guider import PoseGuider
from dicetalk_jax.models.vae import VAE
from dicetalk_jax.models.whisper import WhisperEncoder
from dicetalk_jax.settings import Settings

MASK_CHANNELS = 3


class ConditionEncoder:
  """Computes everything that steers one clip.

  Attributes:
    stages: component -> its compiled function, for the components that the model has.
  """

  def __init__(self, networks: Mapping[str, Component], settings: Settings):
    """`networks` are the components of the model by name.

    The `vae` among them computes in the type that the portrait is encoded in.
    """
    self.settings = settings
    self.networks = networks
    self._functions: dict[str, Callable[..., Any]] = {
      'vae': encode_image,
      'image_encoder': image_token,
      'whisper': speech_states,
      'audio_linear': audio_tokens,
      'audio2bucket': motion_amounts,
      'pose_guider': face_features,
      'emo_model': functools.partial(emotion_tokens, retrieval=settings.retrieval),
    }
    self.stages = {
      name: networks[name].stage(function)
      for name, function in self._functions.items()
      if name in networks
    }

  def encode(self, job: Job) -> tuple[Conditions, int]:
    """The conditions of a job, as a batch of one clip.

    Returns:
      The conditions, padded to the clip's bucket, and the number of frames.

    Raises:
      InputError: the face box lies outside of the image.
    """
    # 1. The portrait.
    portrait = prepare_portrait(
      job.image,
      job.face_box,
      image_size=job.image_size or self.settings.image_size,
      area=self.settings.area,
      multiple=self.settings.multiple,
      clip_size=self.networks['image_encoder'].config.image_size,
    )
    mask = jnp.asarray(portrait.mask[None])
    latents = self.stages['vae'](portrait.ref_img[None])
    token = self.stages['image_encoder'](portrait.clip_image[None])
    levels = self.networks['unet'].config.levels
    spatial = None
    if 'pose_guider' in self.stages:
      spatial = self.stages['pose_guider'](mask)

    # 2. The audio.
    length = self.settings.count_frames(job.wave)
    states = np.concatenate(
      [self.stages['whisper'](mel[None]) for mel in audio.log_mel(job.wave)]
    )
    tokens, null_audio = self.stages['audio_linear'](
      self._audio_windows(states, job.wave, length)
    )
    time_ids = jnp.float32([self.settings.time_ids])
    if 'audio2bucket' in self.stages:
      time_ids = self._predicted_time_ids(states, job.wave, length, token)

    # 3. The emotion.
    emotion = null_emotion = None
    if job.prior is not None:
      prior = np.float32(job.prior).reshape(1, -1)
      emotion, null_emotion = self.stages['emo_model'](prior)

    conditions = Conditions(
      reference_latents=latents,
      image_token=token,
      audio_tokens=tokens,
      null_audio=null_audio,
      emotion_tokens=emotion,
      null_emotion=null_emotion,
      masks=mask_pyramid(mask, latents.shape[1:3], levels),
      spatial=spatial,
      added_time_ids=time_ids,
    )
    return conditions, length

  def shapes(self, batch: int, length: int, size: tuple[int, int]) -> Conditions:
    """Shapes of the conditions of a batch of clips. Computes nothing.

    Args:
      batch: number of clips.
      length: frames of the longest.
      size: (width, height) of the frames.
    """
    networks = self.networks

    def stage(name: str, *args: Any) -> Any:
      return networks[name].shapes(self._functions[name], *args)

    # 1. The portrait.
    image = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    width, height = size
    side = networks['image_encoder'].config.image_size
    latents = stage('vae', image((1, height, width, 3)))
    token = stage('image_encoder', image((1, side, side, 3)))
    mask = image((1, height, width))
    levels = networks['unet'].config.levels
    latent_size = latents.shape[1:3]
    masks = jax.eval_shape(lambda mask: mask_pyramid(mask, latent_size, levels), mask)
    spatial = stage('pose_guider', mask) if 'pose_guider' in networks else None

    # 2. The audio.
    frames = self.bucket(length)
    whisper = networks['whisper'].config
    mel = image((1, 2 * whisper.max_source_positions, whisper.num_mel_bins))
    *_, layers, channels = stage('whisper', mel).shape
    windows = image((1, frames, audio.CLIP, layers, channels))
    tokens, null_audio = stage('audio_linear', windows)
    time_ids: Any = image((1, 3))
    if 'audio2bucket' in networks:
      time_ids = image((1, frames, 3))

    # 3. The emotion.
    emotion = null_emotion = None
    if 'emo_model' in networks:
      prior = image((1, networks['emo_model'].config.prior_dim))
      emotion, null_emotion = stage('emo_model', prior)

    one = Conditions(
      reference_latents=latents,
      image_token=token,
      audio_tokens=tokens,
      null_audio=null_audio,
      emotion_tokens=emotion,
      null_emotion=null_emotion,
      masks=masks,
      spatial=spatial,
      added_time_ids=time_ids,
    )
    clips = [one] * batch
    batched: Conditions = jax.eval_shape(join_conditions, clips)
    return batched

  def bucket(self, length: int) -> int:
    """The number of frames that a clip is padded to: 1, 2, 4, 8, ... windows.

    So few programs serve all lengths. Windows beyond a clip are not computed.
    """
    frames = self.settings.sampler.frames
    windows = -(-length // frames)
    return frames * 2 ** (windows - 1).bit_length()

  def _audio_windows(
    self, states: np.ndarray, wave: np.ndarray, length: int, clip: int = audio.CLIP
  ) -> np.ndarray:
    """Whisper's states around each frame, zero beyond the clip.

    Args:
      states: `[windows, 1500, S, D]`.
      wave: the recording that they are from.
      length: frames of the clip.
      clip: positions around each frame.

    Returns:
      `[1, bucket, clip, S, D]`.
    """
    padded = audio.pad_states(states, audio.audio_len(len(wave)), clip)
    windows = audio.audio_windows(
      padded, step=self.settings.frame_step, frames=length, clip=clip
    )
    unused = self.bucket(length) - length
    return np.pad(windows, ((0, unused), (0, 0), (0, 0), (0, 0)))[None]

  def _predicted_time_ids(
    self, states: np.ndarray, wave: np.ndarray, length: int, token: jax.Array
  ) -> jax.Array:
    """Frame rate and two predicted motion amounts of each frame, `[1, bucket, 3]`."""
    clip = self.networks['audio2bucket'].config.seq_len
    last_state = states[:, :, -1:]
    windows = self._audio_windows(last_state, wave, length, clip)
    amounts = self.stages['audio2bucket'](windows, token)
    rate = jnp.float32(self.settings.time_ids[0])
    rates = jnp.broadcast_to(rate, (*amounts.shape[:2], 1))
    return jnp.concatenate([rates, amounts], axis=-1)


# The stages: each is compiled with the parameters of one component.


def encode_image(vae: VAE, image: jax.Array) -> jax.Array:
  """Latents `[B, h, w, C]` of images `[B, H, W, 3]` in [-1, 1]."""
  return vae.encode(image)[0]


def image_token(image_encoder: CLIPVision, image: jax.Array) -> jax.Array:
  """The CLIP token `[B, 1, D]` of images in CLIP's size and scale."""
  return image_encoder(image)[:, None]


def speech_states(whisper: WhisperEncoder, mel: jax.Array) -> jax.Array:
  """States `[B, 1500, S, D]` of windows of 30 s, log-mel `[B, 3000, 80]`."""
  return whisper(mel)


def audio_tokens(
  audio_linear: AudioProjection, windows: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Tokens `[B, N, K, D]` of windows `[B, N, clip, S, D]`, and those of silence."""
  silence = jnp.zeros_like(windows[:1, :1])
  return audio_linear(windows), audio_linear(silence)[0, 0]


def motion_amounts(
  audio2bucket: AudioToBucket, windows: jax.Array, token: jax.Array
) -> jax.Array:
  """Two amounts of motion for each frame, `[B, N, 2]`, as Sonic scales them."""
  return 16 * audio2bucket(windows, token[:, 0]) + 16


def face_features(pose_guider: PoseGuider, mask: jax.Array) -> jax.Array:
  """Features `[B, h, w, C]` of face masks `[B, H, W]`."""
  frame = jnp.repeat(mask[:, None, ..., None], MASK_CHANNELS, -1)
  return pose_guider(frame)[:, 0]


def emotion_tokens(
  emo_model: EmotionModel, prior: jax.Array, retrieval: bool
) -> tuple[jax.Array, jax.Array]:
  """Tokens `[B, K, D]` of priors `[B, 256]`, and those of no emotion."""
  return emo_model(prior, retrieval)[0], emo_model.null_tokens(retrieval)
