"""How the face detector reproduces the reference implementation."""

from collections.abc import Iterator

import numpy as np

from convert import face_detector, torch_files
from convert.verify import full_size_cases
from convert.verify.golden import EXACT, LIMIT, Case, Golden, Module, channels_last
from dicetalk_jax.detect import yolo_face
from dicetalk_jax.models.yolo_face import YoloFace

# The description of the wrapper has the seed of its images in a sentence only.
BASE_SEED = 388817


def _levels_and_rows(model: YoloFace, image):
  levels = model(image)
  return levels, model.decode(levels)


def network(golden: Golden) -> Iterator[Case]:
  """Runs the network of the published size, its batch norms folded or not."""
  drawn = full_size_cases.tensors(golden.meta)
  folded = face_detector.fold(
    {key: torch_files.to_torch(value) for key, value in drawn.items()}
  )
  weights = {key: torch_files.to_numpy(x) for key, x in folded.items()}
  module = Module.of(yolo_face.COMPONENT, golden, weights)
  image = channels_last(full_size_cases.inputs(golden.meta)['image'])
  levels, rows = module(_levels_and_rows, image)
  for number, level in zip((3, 4, 5), levels):
    yield Case(f'raw_p{number}', level, LIMIT)
  yield Case('decoded', rows, LIMIT)


def wrapper(golden: Golden) -> Iterator[Case]:
  """What is done before and after the network, with given rows in its place."""
  # 1. Sizes
  sizes = golden.meta['network_size_h_w_for_image_h_w']
  found = []
  for name in sizes:
    height, width = map(int, name.split('x'))
    found.append(yolo_face.network_size(height, width))
  expected = np.array([*sizes.values()])
  yield Case('network_size', np.array(found), EXACT, expected)

  # 2. The choice among rows
  chosen = yolo_face.confident(golden.outputs['nms.prediction'][0])
  yield Case('nms.output', chosen, LIMIT)

  # 3. From a BGR image, and back to it
  for size in ((300, 301), (100, 37)):
    rule = {'shape': [*size, 3], 'amp': 127.5, 'base': 127.5}
    image = np.floor(
      full_size_cases.inputs({'base_seed': BASE_SEED, 'inputs': {'img8': rule}})['img8']
    ).astype(np.uint8)
    name = f'wrapper.{size[0]}x{size[1]}'
    seen = yolo_face.network_input(image[..., ::-1])
    sampled = np.moveaxis(seen[::16, ::16], -1, 0)
    yield Case(f'{name}.input_every16', sampled, EXACT)
    faces = yolo_face.faces_of(chosen, size, seen.shape[:2])
    yield Case(f'{name}.boxes_xywh', np.array([face.box for face in faces]), LIMIT)
    landmarks = np.array([face.landmarks for face in faces])
    yield Case(f'{name}.landmarks', landmarks, LIMIT)
    yield Case(f'{name}.scores', np.array([face.score for face in faces]), LIMIT)
