"""The clip record `talking_clip`: one spec for every corpus, real or synthetic.

A record is one clip of at most about 20 s at 25 frames and 16 000 samples per second.
Pixels are stored as one JPEG per frame, so that a loader decodes only the frames that
it samples; blocks that a corpus does not have are of length zero. Neither writing nor
reading needs TensorFlow.
"""

from collections.abc import Iterable, Mapping, Sequence
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

_LEVELLED = tuple(emotion for emotion in EMOTIONS if emotion != 'neutral')


def emotion_class(emotion: str, level: int) -> int:
  """Label of a clip for the emotion classifier: one of its 22 classes, if the level is
  known.

  Neutral is 0. The others are `1 + 3 e + (level - 1)`, with `e` counting the emotions
  but neutral. At an unknown level they are `22 + e`, see `CLASSES_OF_LABEL`.

  Args:
    emotion: one of `EMOTIONS` or `UNKNOWN`.
    level: 1-3; 0 where it is unknown. Neutral has no levels.

  Returns:
    0-28, or -1 where the emotion is unknown.

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
  if emotion == UNKNOWN:
    return -1
  number = _LEVELLED.index(emotion)
  if level == 0:
    return CLASSES + number
  return 1 + 3 * number + level - 1


def _classes_of_label() -> np.ndarray:
  right = np.zeros((CLASSES + len(_LEVELLED), CLASSES), bool)
  right[:CLASSES] = np.eye(CLASSES, dtype=bool)
  for number, emotion in enumerate(_LEVELLED):
    for level in LEVELS:
      right[CLASSES + number, emotion_class(emotion, level)] = True
  return right


# Label to the classes that it leaves possible, bool `[29, 22]`: one, or the three
# levels of an emotion.
CLASSES_OF_LABEL = _classes_of_label()


@dataclasses.dataclass(frozen=True)
class RecordSpec:
  """The blocks of a record, and the sizes of their rows.

  Attributes:
    content: 'embedder' leaves out pixels, latents and CLIP tokens; 'latents' leaves out
      pixels; 'full' has all.
    expression_dim, latent_shape, clip_dim, whisper_shape, prior_dim: of one row.
  """

  content: str = 'full'
  expression_dim: int = 64
  latent_shape: tuple[int, ...] = (64, 64, 4)
  clip_dim: int = 1024
  whisper_shape: tuple[int, ...] = (5, 384)
  prior_dim: int = 256

  def __post_init__(self) -> None:
    if self.content not in CONTENTS:
      raise ConfigError(
        f'record content {self.content!r} is not known; choose one of '
        f'{", ".join(CONTENTS)}'
      )

  @property
  def blocks(self) -> dict[str, tuple[tuple[int | None, ...], Any]]:
    """Shape (None = any length) and dtype of every array block."""
    blocks: dict[str, tuple[tuple[int | None, ...], Any]] = {
      'audio': ((None,), np.int16),  # 16 kHz mono
      'whisper': ((None, *self.whisper_shape), np.float16),  # two positions per frame
      'expression': ((None, self.expression_dim), np.float32),
      'bbox': ((None, 4), np.float32),  # x1, y1, x2, y2 in [0, 1] of the image
      'emo_mu': ((self.prior_dim,), np.float32),
      'emo_sigma': ((self.prior_dim,), np.float32),  # standard deviation
      # Ground truth of synthetic clips, for each frame.
      'opening': ((None,), np.float32),  # of the mouth
      'landmarks': ((None, 68, 2), np.float32),  # 68 points in [0, 1] of the image
      'phoneme': ((None,), np.int16),  # its number
    }
    if self.content != 'embedder':
      # The VAE's posterior mean, unscaled.
      blocks['latents'] = ((None, *self.latent_shape), np.float16)
      blocks['clip_embed'] = ((None, self.clip_dim), np.float16)
    return blocks

  def features(self) -> Any:
    """The spec as a `tfds.features.FeaturesDict`."""
    # Builders only: rendering processes start in half the time without it.
    import tensorflow_datasets as tfds

    spec: dict[str, Any] = {}
    for name in ('clip_id', 'video_id', 'identity', 'text'):
      spec[name] = tfds.features.Text()
    spec['dataset'] = tfds.features.ClassLabel(names=DATASETS)
    spec['emotion'] = tfds.features.ClassLabel(names=(*EMOTIONS, UNKNOWN))
    for name in ('intensity', 'num_frames'):
      spec[name] = tfds.features.Scalar(np.int32)
    for name in ('fps', 'motion_head', 'motion_exp'):
      spec[name] = tfds.features.Scalar(np.float32)
    for name in ('has_video', 'has_audio', 'has_expression', 'has_prior'):
      spec[name] = tfds.features.Scalar(np.bool_)
    for name, (shape, dtype) in self.blocks.items():
      spec[name] = tfds.features.Tensor(shape=shape, dtype=dtype, encoding='zlib')
    if self.content == 'full':
      spec['frames'] = tfds.features.Sequence(
        tfds.features.Tensor(shape=(), dtype=np.object_)
      )
    return tfds.features.FeaturesDict(spec)


def head_motion(bbox: np.ndarray) -> float:
  """How far the head moves: spread of the box's centre over the box's mean side.

  Args:
    bbox: [N,4], x1, y1, x2, y2.
  """
  centre = (bbox[:, :2] + bbox[:, 2:]) / 2
  side = (bbox[:, 2:] - bbox[:, :2]).mean()
  return float(np.sqrt(centre.var(axis=0).sum()) / side)


def expression_motion(expression: np.ndarray) -> float:
  """How much the face moves: standard deviation over time, mean over dimensions.

  Args:
    expression: [N,D].
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
    frames: N images, uint8 `[H,W,3]` or already JPEG bytes.
    **blocks: arrays named as in `spec.blocks`, with N rows (audio: 640 N samples, float
      in [-1, 1] or int16; whisper: 2N rows; emo_mu and emo_sigma: no time axis).

  Raises:
    DataError: a block is unknown, or has another length or shape than the spec and N
      ask for.
  """
  arrays = _typed_blocks(spec, clip_id, num_frames, blocks)
  if len(frames) not in (0, num_frames):
    raise DataError(
      f'clip {clip_id}: there are {len(frames)} images for {num_frames} frames; pass '
      'one for each, or none'
    )
  bbox, expression = arrays['bbox'], arrays['expression']
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
    'motion_head': head_motion(bbox) if len(bbox) else 0.0,
    'motion_exp': expression_motion(expression) if len(expression) else 0.0,
    'has_video': len(frames) > 0 or len(arrays['latents']) > 0,
    'has_audio': len(arrays['audio']) > 0,
    'has_expression': len(expression) > 0,
    'has_prior': blocks.get('emo_mu') is not None,
  }
  record |= {name: arrays[name] for name in spec.blocks}
  if spec.content == 'full':
    record['frames'] = [f if isinstance(f, bytes) else encode_jpeg(f) for f in frames]
  return record


def _typed_blocks(
  spec: RecordSpec, clip_id: str, num_frames: int, blocks: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  """All blocks that a full record has, in the types of the spec; see `encode_example`.

  Blocks that are not given, or None, have no rows.
  """
  known = dataclasses.replace(spec, content='full').blocks
  if unknown := sorted(set(blocks) - set(known)):
    raise DataError(
      f'clip {clip_id}: the record has no block {", ".join(unknown)}; its blocks are '
      f'{", ".join(known)}'
    )
  rows = {'audio': SAMPLES_PER_FRAME * num_frames, 'whisper': 2 * num_frames}
  arrays = {}
  for name, (shape, dtype) in known.items():
    if blocks.get(name) is None:
      arrays[name] = np.zeros([n or 0 for n in shape], dtype)
      continue
    value = np.asarray(blocks[name])
    if name == 'audio' and np.issubdtype(value.dtype, np.floating):
      value = np.round(np.clip(value, -1, 1) * 32767)
    value = value.astype(dtype)
    want = (rows.get(name, num_frames), *shape[1:]) if shape[0] is None else shape
    # CLIP tokens may be of every n-th frame only.
    strided = name == 'clip_embed' and 0 < len(value) <= num_frames
    if value.shape[1:] != want[1:] or (len(value) != want[0] and not strided):
      raise DataError(
        f'clip {clip_id}: {name} has shape {value.shape}, but {num_frames} frames need '
        f'{want}'
      )
    arrays[name] = value
  return arrays


def encode_jpeg(image: np.ndarray, quality: int = 95) -> bytes:
  """uint8 `[H,W,3]` to JPEG.

  Colour is kept at full resolution, since lips are small and red.
  """
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, 'JPEG', quality=quality, subsampling=0)
  return buffer.getvalue()


def decode_frames(
  record: Mapping[str, Any], rows: Iterable[int] | None = None
) -> np.ndarray:
  """The frames at `rows` (all by default), uint8 `[n,H,W,3]`."""
  frames = record['frames']
  rows = range(len(frames)) if rows is None else rows
  return np.stack([np.asarray(Image.open(io.BytesIO(frames[i]))) for i in rows])


def decode_audio(record: Mapping[str, Any]) -> np.ndarray:
  """The audio in [-1, 1], float32 `[640 N]`, 16 kHz mono."""
  return record['audio'].astype(np.float32) / 32767


def decode_text(record: Mapping[str, Any], name: str) -> str:
  """A text field, which TFDS reads back as bytes."""
  value = record[name]
  return value.decode() if isinstance(value, bytes) else value


def decode_emotion(record: Mapping[str, Any]) -> str:
  """The label as a name, `UNKNOWN` where there is none."""
  value = record['emotion']
  return value if isinstance(value, str) else (*EMOTIONS, UNKNOWN)[int(value)]
