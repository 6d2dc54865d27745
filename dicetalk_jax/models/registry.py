"""The components of a model folder, by the names of the published files."""

from collections.abc import Callable, Mapping
import functools
from typing import Any

from flax import nnx
import jax.numpy as jnp
from jax.typing import DTypeLike

from dicetalk_jax.models.audio2bucket import AudioToBucket, AudioToBucketConfig
from dicetalk_jax.models.audio_projection import AudioProjection, AudioProjectionConfig
from dicetalk_jax.models.clip import CLIPVision, CLIPVisionConfig
from dicetalk_jax.models.embedder import Embedder, EmbedderConfig
from dicetalk_jax.models.emotion import EmotionConfig, EmotionModel
from dicetalk_jax.models.parameters import ModelConfig
from dicetalk_jax.models.pose_guider import PoseGuider, PoseGuiderConfig
from dicetalk_jax.models.rife import IFNet, RIFEConfig
from dicetalk_jax.models.taesdv import TAESDV, TAESDVConfig
from dicetalk_jax.models.unet import UNet, UNetConfig
from dicetalk_jax.models.vae import VAE, VAEConfig
from dicetalk_jax.models.whisper import WhisperConfig, WhisperEncoder
from dicetalk_jax.models.yolo_face import YoloFace, YoloFaceConfig

# Name -> the classes of its configuration and its module.
COMPONENTS: dict[str, tuple[type[ModelConfig], Callable[..., nnx.Module]]] = {
  'unet': (UNetConfig, UNet),
  'vae': (VAEConfig, VAE),
  'image_encoder': (CLIPVisionConfig, CLIPVision),
  'whisper': (WhisperConfig, WhisperEncoder),
  'audio_linear': (AudioProjectionConfig, AudioProjection),
  'audio2bucket': (AudioToBucketConfig, AudioToBucket),
  'pose_guider': (PoseGuiderConfig, PoseGuider),
  'emo_model': (EmotionConfig, EmotionModel),
  'flownet': (RIFEConfig, IFNet),
  'taesdv': (TAESDVConfig, TAESDV),
  'face_detector': (YoloFaceConfig, YoloFace),
  'embedder': (EmbedderConfig, Embedder),
}


def config_of(name: str, mapping: Mapping[str, Any]) -> ModelConfig:
  """Reads the typed configuration of a component from its `config.json`."""
  config_class, _ = COMPONENTS[name]
  return config_class.from_json(mapping)


def builder(
  name: str, mapping: Mapping[str, Any], dtype: DTypeLike | None = None
) -> Callable[..., nnx.Module]:
  """Returns the constructor of a component.

  `builder(name, config)(rngs=...)` constructs it; see `parameters.abstract` and
  `parameters.init_params`.

  Args:
    name: of the component.
    mapping: its `config.json`.
    dtype: the compute type of its layers; None and 'float32' leave it to the parameters
      and the input.
  """
  _, module_class = COMPONENTS[name]
  if dtype in (None, 'float32'):
    dtype = None
  else:
    dtype = jnp.dtype(dtype)
  return functools.partial(module_class, config_of(name, mapping), dtype=dtype)
