"""One video to make.

Commands, Python and whatever else asks for a video make a `Job`. Everything that a
person can get wrong is checked there, before any weights are read; nothing behind it
knows who asked.
"""

import dataclasses

import numpy as np

from dicetalk_jax import bundle
from dicetalk_jax.bundle import ModelFolder
from dicetalk_jax.detect.choice import FaceIndex, detector_of, find_face
from dicetalk_jax.errors import InputError, WeightsError
from dicetalk_jax.media.image import Box, crop_around_face, target_size
from dicetalk_jax.media.video import CRF, MAX_CRF
from dicetalk_jax.models.emotion import EmotionConfig
from dicetalk_jax.models.taesdv import TAESDVConfig
from dicetalk_jax.models.vae import VAEConfig
from dicetalk_jax.settings import INTERPOLATION, PREVIEW, Settings


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
  """The checked inputs of one video. Make it with `Job.check`.

  Attributes:
    image: the portrait, uint8 RGB `[H0, W0, 3]`, cropped if asked.
    wave: the speech, float32 `[samples]`, 16 kHz mono.
    face_box: (left, top, width, height) of the face, in pixels of `image`.
    prior: mean of an emotion, `[256]`; None for a model without emotions.
    seed: the same seed gives the same video.
    noise: start noise in place of the seed's, `[N + padding_frames, h, w, C]`.
    interpolate: whether to put a frame between every two.
    preview: whether to decode with TAESDV, quickly and roughly.
    image_size: shorter side of the generated frames; None: as in the model's settings.
    video_size: (width, height) of the file, if frames are to be scaled for it.
    crf: H.264 quality of the file; see `write_video`.
  """

  image: np.ndarray
  wave: np.ndarray
  face_box: Box
  prior: np.ndarray | None = None
  seed: int = 0
  noise: np.ndarray | None = None
  interpolate: bool = False
  preview: bool = False
  image_size: int | None = None
  video_size: tuple[int, int] | None = None
  crf: int = CRF

  @classmethod
  def check(
    cls,
    model: ModelFolder,
    settings: Settings,
    image: np.ndarray,
    wave: np.ndarray,
    emotion: str | None = None,
    *,
    prior: np.ndarray | None = None,
    face_box: Box | None = None,
    face_index: FaceIndex = None,
    seed: int = 0,
    noise: np.ndarray | None = None,
    interpolate: bool | None = None,
    preview: bool = False,
    crop: bool = False,
    image_size: int | None = None,
    keep_resolution: bool = False,
    crf: int = CRF,
  ) -> 'Job':
    """Makes a job, if the model can do it.

    Args:
      model: the model folder.
      settings: its settings, from `Settings.of`.
      image, wave, seed: see `Job`.
      emotion: one of the model folder's, unless `prior` is given; a Sonic model takes
        neither.
      prior: an emotion as a vector, `[256]`.
      face_box: see `Job`; None looks for the face, with the detector that the model
        folder has, or else with MTCNN.
      face_index: which of several faces, see `detect.choice.FaceIndex`; the largest by
        default.
      noise: standard normal, see `Job`. That of the reference implementation gives its
        video.
      interpolate: double the frame rate; None: if the model has what it takes.
      preview: see `Job`; previews are not interpolated.
      crop: use only a square around the face, as the reference implementation may.
      image_size: see `Job`.
      keep_resolution: scale the video to the size of the portrait (of the crop, if
        cropped), each side rounded down to an even number.
      crf: see `Job`.

    Raises:
      InputError: no face was found, or fewer than `face_index`; the crop or the image
        size is too small, the recording is shorter than one frame, the noise has
        another shape, the quality is out of range, a preview is to be interpolated, or
        the model needs an emotion or has none.
      WeightsError: the model has no such emotion or cannot read it, or it cannot
        interpolate or preview.
    """
    if emotion is not None and prior is not None:
      raise ValueError('give either the name of an emotion or a prior')
    _check_emotion(settings, given=emotion is not None or prior is not None)
    if emotion is not None:
      prior = bundle.load_prior(model, emotion)[0]
    if prior is not None:
      _check_width(model, prior)
    length = settings.count_frames(wave)
    if not 0 <= crf <= MAX_CRF:
      raise InputError(
        f'a quality of {crf} does not exist; give --crf from 0, the best, to {MAX_CRF}'
      )
    if preview:
      _check_preview(model, interpolate)
      interpolate = False
    if interpolate is None:
      interpolate = INTERPOLATION in model.components
    elif interpolate:
      model.require(INTERPOLATION)
    if face_box is None:
      face_box = find_face(image, detector_of(model), face_index)
    if crop:
      image, face_box = crop_around_face(image, face_box)
    height, width = image.shape[:2]
    if image_size is None:
      image_size = settings.image_size
    size = target_size(width, height, image_size, settings.multiple)
    if noise is not None:
      _check_noise(model, settings, size, length, noise)
    return cls(
      image=image,
      wave=wave,
      face_box=face_box,
      prior=prior,
      seed=seed,
      noise=noise,
      interpolate=interpolate,
      preview=preview,
      image_size=image_size,
      video_size=_even(width, height) if keep_resolution else None,
      crf=crf,
    )


def _even(width: int, height: int) -> tuple[int, int]:
  """Rounds down to even numbers, as 4:2:0 chroma wants."""
  return width // 2 * 2, height // 2 * 2


def _check_emotion(settings: Settings, given: bool) -> None:
  """Refuses an emotion for a model that has none, and none for one that needs it."""
  has_emotions = 'emo_model' in settings.components
  if given and not has_emotions:
    raise InputError('a Sonic model has no emotions; leave --emotion out')
  if has_emotions and not given:
    raise InputError(
      "a DICE-Talk model needs an emotion; name one of the model's with --emotion"
    )


def _check_width(model: ModelFolder, prior: np.ndarray) -> None:
  config = EmotionConfig.from_json(model.components['emo_model']['config'])
  if np.size(prior) != config.prior_dim:
    raise WeightsError(
      f'the emotion prior has {np.size(prior)} numbers, the model wants '
      f'{config.prior_dim}; use priors made by the same embedder'
    )


def _check_preview(model: ModelFolder, interpolate: bool | None) -> None:
  """Refuses a preview of a model that TAESDV cannot decode."""
  if interpolate:
    raise InputError('previews are not interpolated; leave out one of the two')
  model.require(PREVIEW)
  tiny = TAESDVConfig.from_json(model.components[PREVIEW]['config'])
  vae = VAEConfig.from_json(model.components['vae']['config'])
  ours = (vae.latent_channels, 2 ** (len(vae.block_out_channels) - 1))
  theirs = (tiny.latent_channels, tiny.factor)
  if ours != theirs:
    raise WeightsError(
      f'{PREVIEW} decodes latents of {theirs[0]} channels, {theirs[1]} pixels wide, '
      f'those of {model} have {ours[0]} and are {ours[1]} pixels wide; generate '
      'without --preview'
    )


def _check_noise(
  model: ModelFolder,
  settings: Settings,
  size: tuple[int, int],
  length: int,
  noise: np.ndarray,
) -> None:
  """Compares the shape with that of the latents of `length` frames of (width, height)
  `size`.
  """
  vae = VAEConfig.from_json(model.components['vae']['config'])
  downsampling = 2 ** (len(vae.block_out_channels) - 1)
  width, height = size
  wanted = (
    length + settings.sampler.padding_frames,
    height // downsampling,
    width // downsampling,
    vae.latent_channels,
  )
  if noise.shape != wanted:
    raise InputError(
      f'the noise has the shape {noise.shape}, this clip needs {wanted} (frames with '
      'padding, height, width, channels); use that of the same image, recording and '
      'settings'
    )
