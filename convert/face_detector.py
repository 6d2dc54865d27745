"""The reference implementation's face detector: `yoloface_v5m.pt` to a component.

The file is TorchScript, or a state dict. Its batch norms may be folded into the
convolutions, as ours always are, or not; its names may have a prefix, or be lost.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import pathlib
import re
from typing import Any

import numpy as np
import torch

from convert import published_layouts, torch_files, torchscript
from convert.component_check import Part, model
from convert.naming import torch_name, torch_shape
from convert.torch_files import StateDict, Weights
from dicetalk_jax.detect.yolo_face import COMPONENT
from dicetalk_jax.errors import WeightsError

FILE = 'yoloface_v5m.pt'
EPSILON = 1e-3  # of the batch norms
_FIRST = 'model.0.stem_1.conv.weight'
_NORM = ('weight', 'bias', 'running_mean', 'running_var')
# Constants of the file, and counters of training.
_CONSTANTS = re.compile(r'(^|\.)(anchors|anchor_grid|num_batches_tracked|constants)\b')


def part(path: pathlib.Path, config: Mapping[str, Any] | None = None) -> Part:
  """Reads the face detector.

  Args:
    path: of the file, or of the folder that holds it.
    config: values that replace those of the published network.

  Raises:
    InputError: the file is missing or damaged.
    WeightsError: it is the file of another network.
  """
  if path.is_dir():
    path = path / FILE
  out = published_layouts.file_part(
    COMPONENT,
    path,
    'face_detector',
    dict(config or {}),
    read=read,
  )
  keys = [torch_name(name) for name in model(out)[1]]
  shapes = {
    torch_name(name): torch_shape(name, x.shape) for name, x in model(out)[1].items()
  }
  named = _without_prefix(out.tensors)
  notes = []
  if not named:
    named = _by_order(out.tensors, keys, shapes)
    notes.append(f'{COMPONENT}: the file has no names; matched by order and shape')
  if not named:
    raise WeightsError(
      f'{path} is not YOLOv5m-face: neither its names nor the shapes of its tensors '
      f'fit; use {FILE} of the release'
    )
  folded = fold(named)
  ignored = tuple(key for key in folded if _CONSTANTS.search(key))
  return dataclasses.replace(
    out,
    config=out.config | _anchors(named),
    tensors={key: x for key, x in folded.items() if key not in ignored},
    notes=(*out.notes, *notes),
  )


def read(path: pathlib.Path) -> Weights:
  """Reads TorchScript or a state dict."""
  if torchscript.is_torchscript(path):
    return Weights(torchscript.load(path))
  return torch_files.read(path)


def fold(tensors: StateDict) -> StateDict:
  """Folds batch norms into the convolutions before them."""
  folded = {key: x for key, x in tensors.items() if '.bn.' not in key}
  for key in tensors:
    if not key.endswith('.bn.running_var'):
      continue
    stem = key.removesuffix('.bn.running_var')
    weight = tensors[f'{stem}.conv.weight']
    scale, shift, mean, variance = (
      tensors[f'{stem}.bn.{name}'].double() for name in _NORM
    )
    factor = scale / torch.sqrt(variance + EPSILON)
    folded[f'{stem}.conv.weight'] = (weight.double() * factor[:, None, None, None]).to(
      weight.dtype
    )
    folded[f'{stem}.conv.bias'] = (shift - mean * factor).to(weight.dtype)
  return folded


def _without_prefix(tensors: StateDict) -> StateDict:
  """Removes what stands before the names; {} if the file has no names."""
  first = next((key for key in tensors if key.endswith(_FIRST)), None)
  if first is None:
    return {}
  prefix = first.removesuffix(_FIRST)
  return {
    key.removeprefix(prefix): x
    for key, x in tensors.items()
    if key.startswith(prefix) or _CONSTANTS.search(key)
  }


def _by_order(
  tensors: StateDict, keys: list[str], shapes: Mapping[str, tuple[int, ...]]
) -> StateDict:
  """Names tensors by their order and shapes; {} if these do not fit.

  Kernels, and vectors, are in the order in which modules are defined, or in which they
  are executed. Both are unmistakable: they differ in the order of shapes.
  """
  kernels = [x for x in tensors.values() if x.ndim == 4]
  vectors = [x for x in tensors.values() if x.ndim == 1]
  for order in (_definition_order, _execution_order):
    stems = sorted({key.rpartition('.')[0] for key in keys}, key=order)
    for has_norms in (False, True):
      kernel_names = [f'{stem}.weight' for stem in stems]
      vector_names = [name for stem in stems for name in _vectors(stem, has_norms)]
      if len(kernels) != len(kernel_names) or len(vectors) != len(vector_names):
        continue
      named = dict(zip(kernel_names, kernels)) | dict(zip(vector_names, vectors))
      if all(tuple(named[key].shape) == shapes[key] for key in kernel_names):
        return named
  return {}


def _vectors(stem: str, has_norms: bool) -> Iterator[str]:
  """Names the vectors of a convolution; those of the outputs have no norm."""
  if has_norms and stem.endswith('.conv'):
    for name in _NORM:
      yield f'{stem.removesuffix("conv")}bn.{name}'
  else:
    yield f'{stem}.bias'


def _definition_order(stem: str) -> list[Any]:
  """Sorts as the published network defines its modules: cv1, cv2, cv3, m."""
  return [
    (0, int(word), '') if word.isdigit() else (1, 0, word) for word in stem.split('.')
  ]


def _execution_order(stem: str) -> list[Any]:
  """Sorts as the published network calls its modules: in C3, m follows cv1."""
  return _definition_order(re.sub(r'^(model\.\d+)\.m\.(\d+\.cv)', r'\1.cv1m.\2', stem))


def _anchors(tensors: StateDict) -> dict[str, Any]:
  """Reads the anchors in pixels, if the file has them."""
  grid = tensors.get('model.23.anchor_grid')
  if grid is None:
    return {}
  levels = np.asarray(grid.double()).reshape(len(grid), -1, 2)
  return {'anchors': levels.tolist()}
