"""Judges of rendered faces: emotion, mouth and identity of single frames.

They measure the synthetic data set only, where the truth is known. Trained on rendered
faces by `python -m examples.judges.train`, they share no code with the models that they
judge, and never see what these generate. The weights come with this package; their
fingerprint belongs beside every score.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import hashlib
import os
import pathlib
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
import safetensors.numpy

from dicetalk_jax.data.clip_record import EMOTIONS
from dicetalk_jax.errors import WeightsError
from dicetalk_jax.metrics import face_features

WEIGHTS = pathlib.Path(__file__).with_suffix('.safetensors')
LAYERS = ('first', 'second', 'last')
# What the last layer of the first network gives, after the emotions.
MEASURES = ('strength', 'opening', 'jaw', 'width')
IDENTITY = 64  # length of an embedding

Params = Mapping[str, Any]  # name -> array


@dataclasses.dataclass(frozen=True)
class Reading:
  """What the judges see in N frames of a clip.

  Attributes:
    emotion: [N,8] log probabilities, in the order of `EMOTIONS`.
    strength: [N] intensity of the emotion, 0 (neutral) to 1 (level 3).
    opening: [N] mouth opening at the midline, in face units (about half the
      height of a head).
    jaw: [N] how far the jaw has dropped, as the activation of action unit 26.
    width: [N] from one corner of the mouth to the other, in face units.
    identity: [N,64] unit vectors; the cosine of two is near 1 for one person.
    features: [N,256] of both networks, for distances of sets of frames.
  """

  emotion: np.ndarray
  strength: np.ndarray
  opening: np.ndarray
  jaw: np.ndarray
  width: np.ndarray
  identity: np.ndarray
  features: np.ndarray

  @property
  def recognised(self) -> str:
    """The emotion with the largest mean log probability."""
    return EMOTIONS[int(self.emotion.mean(0).argmax())]

  @property
  def embedding(self) -> np.ndarray:
    """[64] the person: the mean direction of `identity`."""
    mean = self.identity.mean(0)
    return mean / np.linalg.norm(mean)

  def part(self, frames: slice | Sequence[int] | np.ndarray) -> 'Reading':
    """Some of the frames, chosen as from an array."""
    return Reading(**{name: x[frames] for name, x in vars(self).items()})


class Judges:
  """Reads faces; get them with `Judges.load`.

  Attributes:
    fingerprint: of the arrays; other judges have another.
    metadata: settings, seed and held-out scores of their training, as text.
  """

  def __init__(self, params: Params, metadata: Mapping[str, str] | None = None):
    """Takes the arrays as `python -m examples.judges.train` stores them."""
    self.fingerprint = fingerprint(params)
    self.metadata = dict(metadata or {})
    self._params = {name: jnp.asarray(x, jnp.float32) for name, x in params.items()}

  @classmethod
  def load(cls, path: str | os.PathLike = WEIGHTS) -> Self:
    """Reads a file of weights; without a path the one of this package.

    Raises:
      WeightsError: it is missing, or is not what was written.
    """
    remedy = 'make it with python -m examples.judges.train'
    try:
      with safetensors.safe_open(path, 'numpy') as file:
        metadata = file.metadata() or {}
        params = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
      raise WeightsError(f'there are no judges at {path}; {remedy}') from error
    except (OSError, SafetensorError) as error:
      raise WeightsError(f'cannot read the judges {path}: {error}; {remedy}') from error
    if metadata.get('fingerprint') != fingerprint(params):
      raise WeightsError(
        f'{path} holds other arrays than were written as judges; {remedy}'
      )
    return cls(params, metadata)

  def read(self, frames: np.ndarray, box: np.ndarray) -> Reading:
    """Looks at the frames of one clip, each on its own.

    Args:
      frames: uint8 [N,H,W,3], N at least 1.
      box: [4] or [N,4], x0, y0, x1, y1 in [0,1] of the frame: the outline of the face,
        from hairline to chin. The mean serves the whole clip.
    """
    crops = face_features.crop_faces(frames, box)
    return self.read_features(
      face_features.expression_features(crops), face_features.identity_features(crops)
    )

  def read_features(self, expression: np.ndarray, identity: np.ndarray) -> Reading:
    """The same of features [N,D] from `face_features`."""
    seen, scores = network(self._params, 'expression', jnp.asarray(expression))
    face, direction = network(self._params, 'identity', jnp.asarray(identity))
    emotion = jax.nn.log_softmax(scores[:, : len(EMOTIONS)])
    measures = np.asarray(scores[:, len(EMOTIONS) :]).T
    values = dict(zip(MEASURES, measures))
    values['strength'] = values['strength'].clip(0, 1)
    return Reading(
      emotion=np.asarray(emotion),
      identity=np.asarray(unit(direction)),
      features=np.asarray(jnp.concatenate([seen, face], axis=1)),
      **values,
    )


def network(
  params: Params, name: str, x: jax.Array, drop: Callable = lambda x, layer: x
) -> tuple[jax.Array, jax.Array]:
  """Three layers with GELU between them.

  Args:
    params: kernels and biases of all networks.
    name: which network, 'expression' or 'identity'.
    x: [N,D] features.
    drop: called on the output of hidden layers with the name of the layer; training
      drops some.

  Returns:
    The output of the second layer, [N,128], and of the last.
  """
  for layer in LAYERS[:-1]:
    x = drop(jax.nn.gelu(_linear(params, f'{name}.{layer}', x)), layer)
  return x, _linear(params, f'{name}.{LAYERS[-1]}', x)


def unit(x: jax.Array) -> jax.Array:
  """Rows of length 1."""
  return x / jnp.sqrt((x * x).sum(-1, keepdims=True) + 1e-12)


def fingerprint(params: Params) -> str:
  """A hash of names, types, shapes and values: 16 hexadecimal digits."""
  digest = hashlib.sha256()
  for name in sorted(params):
    x = np.ascontiguousarray(params[name])
    digest.update(f'{name} {x.dtype} {x.shape}\n'.encode())
    digest.update(x.tobytes())
  return digest.hexdigest()[:16]


def _linear(params: Params, name: str, x: jax.Array) -> jax.Array:
  kernel = params[f'{name}.kernel']
  return jnp.matmul(x, kernel, precision='highest') + params[f'{name}.bias']
