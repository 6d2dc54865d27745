"""The settings of a model folder: what belongs to a model but to no component."""

import dataclasses
from typing import Any

import numpy as np

from dicetalk_jax.bundle import Folder, ModelFolder
from dicetalk_jax.diffusion.sampler import SamplerConfig
from dicetalk_jax.errors import ConfigError, InputError
from dicetalk_jax.media import audio
from dicetalk_jax.models.parameters import ModelConfig
from dicetalk_jax.models.vae import VAEConfig

# The components that each kind of model must have.
KINDS = {
  'dicetalk': (
    'unet',
    'vae',
    'image_encoder',
    'whisper',
    'audio_linear',
    'pose_guider',
    'emo_model',
  ),
  'sonic': (
    'unet',
    'vae',
    'image_encoder',
    'whisper',
    'audio_linear',
    'audio2bucket',
  ),
}
# What a model folder may lack: the network that doubles the frame rate, and the decoder
# of previews.
INTERPOLATION = 'flownet'
PREVIEW = 'taesdv'


@dataclasses.dataclass(frozen=True)
class Settings(ModelConfig):
  """Read from `bundle.json`; the defaults are the published values.

  Attributes:
    kind: of model, see `KINDS`.
    image_size: shorter side of the video in pixels.
    multiple: both sides are multiples of this, because of the downsampling in
      autoencoder and UNet.
    area: growth of the face box for the mask.
    frame_step: units of 1/25 s per frame.
    time_ids: frame rate and two motion amounts, as the network saw them in training.
      Sonic predicts the amounts.
    decode_chunk: frames that are decoded together.
    upcast_vae: encode the portrait in float32 whatever the compute type.
    retrieval: look the emotion up in the codebook, instead of attending to all of it.
    sampler: see `SamplerConfig`; its scaling factor is the autoencoder's.
  """

  kind: str = 'dicetalk'
  image_size: int = 512
  multiple: int = 64
  area: float = 1.1
  frame_step: int = 2
  time_ids: tuple[float, float, float] = (12.5, 8.0, 16.0)
  decode_chunk: int = 10
  upcast_vae: bool = True
  retrieval: bool = False
  sampler: SamplerConfig = SamplerConfig(windows_per_call=1)

  def __post_init__(self):
    if self.kind not in KINDS:
      raise ConfigError(
        f'the model folder is of kind {self.kind!r}, but only {", ".join(KINDS)} are '
        'known here; update the program'
      )

  @classmethod
  def of(cls, folder: Folder, **sampling: Any) -> 'Settings':
    """The settings of a model folder.

    Args:
      folder: a path, or an opened `ModelFolder`.
      **sampling: changes to its `SamplerConfig`.

    Raises:
      ConfigError: the folder is of an unknown kind, or the sampler cannot work as
        asked.
      WeightsError: the folder is damaged.
    """
    model = ModelFolder.open(folder)
    if 'vae' in model.components:
      vae = VAEConfig.from_json(model.components['vae']['config'])
      sampling = {'scaling_factor': vae.scaling_factor} | sampling
    stored = {'windows_per_call': 1} | model.settings.get('sampler', {})
    return dataclasses.replace(
      cls.from_json(model.settings),
      sampler=dataclasses.replace(SamplerConfig.from_json(stored), **sampling),
    )

  @property
  def components(self) -> tuple[str, ...]:
    """The components that the model folder must have."""
    return KINDS[self.kind]

  @property
  def fps(self) -> float:
    """Frames per second, before interpolation."""
    return 25 / self.frame_step

  def count_frames(self, wave: np.ndarray) -> int:
    """How many frames a recording fills.

    Args:
      wave: `[samples]` at 16 kHz.

    Raises:
      InputError: not even one.
    """
    frames = audio.audio_len(len(wave)) // self.frame_step
    if not frames:
      raise InputError(
        f'the recording lasts {len(wave) / audio.RATE:.2f} s, less than one frame; '
        f'give at least {1 / self.fps:.2f} s'
      )
    return frames
