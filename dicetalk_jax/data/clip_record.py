"""The clip record `talking_clip`: one spec for every corpus, real or synthetic.

A record is one clip of at most about 20 s at 25 frames and 16 000 samples per second.
Pixels are stored as one JPEG per frame, so that a loader decodes only the frames that
it samples; blocks that a corpus does not have are zero-length. Neither writing nor
reading needs TensorFlow.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import io
from typing import Any

import numpy as np
from PIL import Image

from dicetalk_jax.errors import ConfigError, DataError
from dicetalk_jax.media import audio

FPS = 25
SAMPLE_RATE = audio.RATE  # the rate that the networks hear
SAMPLES_PER_FRAME = SAMPLE_RATE // FPS

EMOTIONS = (
  'angry',
  'contempt',
  'disgusted',
  'fear',
  'happy',
  'neutral',
  'sad',
  'surprised',
)
UNKNOWN = 'unknown'
LEVELS = (1, 2, 3)
CLASSES = 22  # seven emotions at three levels, and neutral
DATASETS = ('mead', 'hdtf', 'voxceleb2', 'other', 'synthetic')
CONTENTS = ('embedder', 'latents', 'full')

_LEVELLED = tuple(e for e in EMOTIONS if e != 'neutral')


def emotion_class(emotion: str, level: int) -> int:
  """Index in the 22 classes of the emotion classifier: neutral is 0, others `1 + 3 e +
  (level - 1)`.

  Args:
    emotion: one of `EMOTIONS` or `UNKNOWN`.
    level: 1-3; 0 where it is unknown. Neutral has no levels.

  Returns:
    0-21, or -1 for clips that carry no usable label.

  Raises:
    ConfigError: no such emotion or level.
  """
  if emotion not in (*EMOTIONS, UNKNOWN):
    raise ConfigError(
      f'emotion {emotion!r} is not known; choose one of {", ".join(EMOTIONS)}'
    )
  if level not in (0, *LEVELS):
    raise ConfigError(
      f'emotion level {level} is not known; choose 1, 2 or 3, or 0 where it is unknown'
    )
  if emotion == 'neutral':
    return 0
  if emotion == UNKNOWN or level == 0:
    return -1
  return 1 + 3 * _LEVELLED.index(emotion) + level - 1


@dataclasses.dataclass(frozen=True)
class RecordSpec:
  """Which blocks a record carries, and the sizes of their rows.

  `content`: 'embedder' leaves out pixels, latents and CLIP tokens; 'latents' leaves out
  pixels; 'full' has all.
  """

  content: str = 'full'
  expression_dim: int = 64
  latent_shape: tuple[int, ...] = (64, 64, 4)
  clip_dim: int = 1024
  whisper_shape: tuple[int, ...] = (5, 384)
  prior_dim: int = 256

  def __post_init__(self):
    if self.content not in CONTENTS:
      raise ConfigError(
        f'record content {self.content!r} is not known; choose one of '
        f'{", ".join(CONTENTS)}'
      )

  @property
  def blocks(self) -> dict[str, tuple[tuple[int | None, ...], Any]]:
    """Shape (None = any length) and dtype of every array block."""
    blocks = {
      'audio': ((None,), np.int16),  # 16 kHz mono
      'whisper': ((None, *self.whisper_shape), np.float16),  # 2 tokens per frame
      'expression': ((None, self.expression_dim), np.float32),
      'bbox': ((None, 4), np.float32),  # x1, y1, x2, y2 in [0, 1] of the picture
      'emo_mu': ((self.prior_dim,), np.float32),
      'emo_sigma': ((self.prior_dim,), np.float32),  # standard deviation
      'opening': (
        (None,),
        np.float32,
      ),  # ground truth of synthetic clips: mouth opening,
      'landmarks': ((None, 68, 2), np.float32),  # 68 points in [0, 1] of the picture,
      'phoneme': ((None,), np.int16),  # and phoneme id, each per frame
    }
    if self.content != 'embedder':
      blocks['latents'] = (
        (None, *self.latent_shape),
        np.float16,
      )  # VAE posterior mean, unscaled
      blocks['clip_embed'] = ((None, self.clip_dim), np.float16)
    return blocks

  def features(self) -> Any:
    """The spec as a `tfds.features.FeaturesDict`."""
    # builders only: rendering processes start in half the time without it
    import tensorflow_datasets as tfds

    spec = {
      name: tfds.features.Text() for name in ('clip_id', 'video_id', 'identity', 'text')
    }
    spec['dataset'] = tfds.features.ClassLabel(names=DATASETS)
    spec['emotion'] = tfds.features.ClassLabel(names=(*EMOTIONS, UNKNOWN))
    spec |= {
      name: tfds.features.Scalar(np.int32) for name in ('intensity', 'num_frames')
    }
    spec |= {
      name: tfds.features.Scalar(np.float32)
      for name in ('fps', 'motion_head', 'motion_exp')
    }
    spec |= {
      name: tfds.features.Scalar(np.bool_)
      for name in ('has_video', 'has_audio', 'has_expression', 'has_prior')
    }
    for name, (shape, dtype) in self.blocks.items():
      spec[name] = tfds.features.Tensor(shape=shape, dtype=dtype, encoding='zlib')
    if self.content == 'full':
      spec['frames'] = tfds.features.Sequence(
        tfds.features.Tensor(shape=(), dtype=np.object_)
      )
    return tfds.features.FeaturesDict(spec)


def head_motion(bbox: np.ndarray) -> float:
  """How far the head moves: spread of the box centre over the mean side of the box;
  `bbox` [N,4].
  """
  centre = (bbox[:, :2] + bbox[:, 2:]) / 2
  side = (bbox[:, 2:] - bbox[:, :2]).mean()
  return float(np.sqrt(centre.var(axis=0).sum()) / side)


def expression_motion(expression: np.ndarray) -> float:
  """How much the face moves: standard deviation over time, mean over dimensions;
  `expression` [N,D].
  """
  return float(expression.std(axis=0).mean())


def encode_example(
  spec: RecordSpec,
  *,
  clip_id: str,
  identity: str,
  dataset: str,
  num_frames: int,
  video_id: str = '',
  emotion: str = UNKNOWN,
  intensity: int = 0,
  text: str = '',
  frames: Sequence[np.ndarray | bytes] | np.ndarray = (),
  **blocks: np.ndarray,
) -> dict[str, Any]:
  """One record, ready for a TFDS builder.

  Args:
    spec: which blocks are kept; others may be passed and are left out.
    clip_id: unique in the data set.
    identity: global key of the person, such as 'mead/M003'.
    dataset: one of `DATASETS`.
    num_frames: N, length at 25 frames per second.
    video_id: recording that the clip was cut from; the clip itself by default.
    emotion: one of `EMOTIONS` or `UNKNOWN`.
    intensity: 1-3, 0 where unknown.
    text: what is said, where known.
    frames: N pictures, uint8 `[H,W,3]` or already JPEG bytes.
    **blocks: arrays named as in `spec.blocks`, with N rows (audio: 640 N samples, float
      in [-1, 1] or int16; whisper: 2N rows; emo_mu and emo_sigma: no time axis).

  Raises:
    DataError: a block is unknown, or has another length or shape than the spec and N
      ask for.
  """
  known = dataclasses.replace(spec, content='full').blocks
  if unknown := sorted(set(blocks) - set(known)):
    raise DataError(
      f'clip {clip_id}: the record has no block {", ".join(unknown)}; its blocks are '
      f'{", ".join(known)}'
    )
  if blocks.get('audio') is not None and np.issubdtype(
    np.asarray(blocks['audio']).dtype, np.floating
  ):
    blocks['audio'] = np.round(np.clip(blocks['audio'], -1, 1) * 32767)
  rows = {'audio': SAMPLES_PER_FRAME * num_frames, 'whisper': 2 * num_frames}
  arrays = {}
  for name, (shape, dtype) in known.items():
    if blocks.get(name) is None:
      arrays[name] = np.zeros([n or 0 for n in shape], dtype)
      continue
    arrays[name] = value = np.asarray(blocks[name]).astype(dtype)
    want = (rows.get(name, num_frames), *shape[1:]) if shape[0] is None else shape
    strided = (
      name == 'clip_embed' and 0 < len(value) <= num_frames
    )  # may hold every n-th frame only
    if value.shape[1:] != want[1:] or (value.shape[0] != want[0] and not strided):
      raise DataError(
        f'clip {clip_id}: {name} has shape {value.shape}, but {num_frames} frames need '
        f'{want}'
      )
  if len(frames) not in (0, num_frames):
    raise DataError(
      f'clip {clip_id}: there are {len(frames)} pictures, but {num_frames} frames'
    )
  record = {
    'clip_id': clip_id,
    'video_id': video_id or clip_id,
    'identity': identity,
    'dataset': dataset,
    'text': text,
    'emotion': emotion,
    'intensity': intensity,
    'fps': FPS,
    'num_frames': num_frames,
    'motion_head': head_motion(arrays['bbox']) if len(arrays['bbox']) else 0.0,
    'motion_exp': expression_motion(arrays['expression'])
    if len(arrays['expression'])
    else 0.0,
    'has_video': len(frames) > 0 or len(arrays['latents']) > 0,
    'has_audio': len(arrays['audio']) > 0,
    'has_expression': len(arrays['expression']) > 0,
    'has_prior': blocks.get('emo_mu') is not None,
  }
  record |= {name: arrays[name] for name in spec.blocks}
  if spec.content == 'full':
    record['frames'] = [f if isinstance(f, bytes) else encode_jpeg(f) for f in frames]
  return record


def encode_jpeg(picture: np.ndarray, quality: int = 95) -> bytes:
  """uint8 `[H,W,3]` -> JPEG; colour is kept at full resolution, since lips are small
  and red.
  """
  buffer = io.BytesIO()
  Image.fromarray(picture).save(buffer, 'JPEG', quality=quality, subsampling=0)
  return buffer.getvalue()


def decode_frames(
  record: Mapping[str, Any], rows: Sequence[int] | None = None
) -> np.ndarray:
  """The pictures at `rows` (all by default), uint8 `[n,H,W,3]`."""
  frames = record['frames']
  rows = range(len(frames)) if rows is None else rows
  return np.stack([np.asarray(Image.open(io.BytesIO(frames[i]))) for i in rows])


def decode_audio(record: Mapping[str, Any]) -> np.ndarray:
  """The sound in [-1, 1], float32 `[640 N]`, 16 kHz mono."""
  return record['audio'].astype(np.float32) / 32767


def decode_text(record: Mapping[str, Any], name: str) -> str:
  """A text field; TFDS reads them back as bytes."""
  value = record[name]
  return value.decode() if isinstance(value, bytes) else value


def decode_emotion(record: Mapping[str, Any]) -> str:
  """The label as a name, `UNKNOWN` where there is none."""
  value = record['emotion']
  return value if isinstance(value, str) else (*EMOTIONS, UNKNOWN)[int(value)]
