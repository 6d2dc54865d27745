"""How well and how fast the default detector finds faces.

    python -m benchmarks.face_detection                  # both tables; minutes
    python -m benchmarks.face_detection --faces=900 --fit

Rendered faces, whose outline is known, of all sizes, tilted, turned and nodding, are
searched in images of 256 pixels. `--fit` prints the constants of
`dicetalk_jax/detect/outline.py` for these faces.
"""

import argparse
from collections.abc import Iterator, Sequence
import os
import time
from typing import NamedTuple

import numpy as np

from data_pipelines.synthetic.clip import make_portrait
from data_pipelines.synthetic.projection import Pose
from dicetalk_jax.data.clip_record import EMOTIONS, LEVELS
from dicetalk_jax.detect import mtcnn
from dicetalk_jax.detect.faces import Face
from dicetalk_jax.detect.outline import outlined
from dicetalk_jax.media.face_tracking import overlap
from dicetalk_jax.media.image import Box

SIDE = 256  # of the images, in pixels
SIZES = (24, 230)  # of the faces: root of the area of their box, in pixels
_FACE = 0.6  # the same for a portrait of side 1
_SAME = 0.3  # least overlap of a find and a face
# Largest angles in radians.
YAW = 0.6  # the renderer is made for no more
PITCH = 0.35
ROLL = 0.6


class Scene(NamedTuple):
  """An image with one rendered face.

  Attributes:
    image: uint8 `[256,256,3]`.
    corners: of the outline, x0, y0, x1, y1 in pixels.
    size: root of the area of the box.
    pose: of the head.
  """

  image: np.ndarray
  corners: np.ndarray
  size: float
  pose: Pose


def render(
  identity: int, size: float, pose: Pose, rng: np.random.Generator | None = None
) -> Scene:
  """Renders a face of about `size` pixels, larger ones cut at the image's edge.

  Args:
    identity: seed of the person.
    size: root of the area of the face's box.
    pose: of the head.
    rng: draws emotion and place; None stands for a neutral face in the middle.
  """
  emotion = EMOTIONS[rng.integers(len(EMOTIONS))] if rng else 'neutral'
  level = LEVELS[rng.integers(len(LEVELS))] if rng else LEVELS[0]
  whole = round(size / _FACE)
  if whole >= SIDE:
    zoom = whole / SIDE
    image, box = make_portrait(identity, SIDE, emotion, level, zoom, pose)
    return Scene(image, box * SIDE, size, pose)
  part, box = make_portrait(identity, whole, emotion, level, pose=pose)
  spare = SIDE - whole
  left, top = rng.integers(0, spare + 1, 2) if rng else (spare // 2, spare // 2)
  image = np.tile(part[0, 0], (SIDE, SIDE, 1))
  image[top : top + whole, left : left + whole] = part
  return Scene(image, box * whole + [left, top, left, top], size, pose)


def scenes(count: int, seed: int = 0, first: int = 0) -> Iterator[Scene]:
  """Draws scenes of `count` persons, the first one and those after it; every third
  looks to the front.
  """
  rng = np.random.default_rng(seed)
  for identity in range(first, first + count):
    size = np.exp(rng.uniform(*np.log(SIZES)))
    angles = rng.uniform(-1, 1, 3) * (YAW, PITCH, ROLL)
    if identity % 3 == 0:
      angles = rng.normal(0, 0.08, 3)
    yield render(identity, size, Pose(*angles.tolist()), rng)


def corners_of(box: Box) -> np.ndarray:
  left, top, width, height = box
  return np.array([left, top, left + width, top + height])


def match(scene: Scene, faces: Sequence[Face]) -> Face | None:
  """The find that is the face of a scene, by its overlap with the outline."""
  boxes = [corners_of(outlined(face).box) for face in faces]
  shared = [overlap(box, scene.corners) for box in boxes]
  best = int(np.argmax(shared)) if shared else -1
  return faces[best] if shared and shared[best] > _SAME else None


def errors(pairs: Sequence[tuple[Scene, Face]]) -> np.ndarray:
  """How outlines differ from the truth.

  Returns:
    `[n,4]`: of the middle in x and y, and of width and height, all in sides of the true
    box.
  """
  truth = np.array([scene.corners for scene, _ in pairs])
  found = np.array([corners_of(outlined(face).box) for _, face in pairs])
  sides = truth[:, 2:] - truth[:, :2]
  low, high = np.split(found - truth, 2, axis=1)
  return np.concatenate([(low + high) / 2 / sides, (high - low) / sides], axis=1)


def fit(pairs: Sequence[tuple[Scene, Face]]) -> dict[str, float]:
  """Fits the constants of `outline.py` by least squares."""
  truth = np.array([scene.corners for scene, _ in pairs])
  boxes = np.array([corners_of(face.box) for _, face in pairs])
  landmarks = np.array([face.landmarks for _, face in pairs])
  down = landmarks[:, 3:].mean(axis=1) - landmarks[:, :2].mean(axis=1)
  down /= np.linalg.norm(down, axis=1, keepdims=True)
  tilt = np.abs(down[:, 0])

  sides = boxes[:, 2:] - boxes[:, :2]
  shift = (truth[:, :2] + truth[:, 2:] - boxes[:, :2] - boxes[:, 2:]) / 2
  shift /= np.sqrt(sides.prod(axis=1))[:, None]
  rise = -np.median((shift * down).sum(axis=1))

  ratio = (truth[:, 2:] - truth[:, :2]) / sides
  level = tilt < 0.15
  width, height = np.median(ratio[level], axis=0)
  growth = ratio / [width, height] - 1
  slope = (growth.mean(axis=1) * tilt).sum() / np.square(tilt).sum()
  return {'WIDTH': width, 'HEIGHT': height, 'TILT': slope, 'RISE': rise}


def accuracy(count: int, print_fit: bool) -> None:
  drawn = [*scenes(count)]
  found = mtcnn.shared().find_raw([scene.image for scene in drawn])
  matched = [match(scene, faces) for scene, faces in zip(drawn, found)]
  false = sum(len(faces) for faces in found) - sum(face is not None for face in matched)
  print(f'{count} faces, {false} false finds')
  if print_fit:
    for name, value in fit([(s, f) for s, f in zip(drawn, matched) if f]).items():
      print(f'{name} = {value:.3f}')
  print_table([*zip(drawn, matched)])


def print_table(matched: Sequence[tuple[Scene, Face | None]]) -> None:
  """Prints rates and root mean squares of the errors, by size and pose."""

  def angle(name):
    return lambda scene: abs(np.degrees(getattr(scene.pose, name)))

  print(
    f'{"faces":>22} {"found":>6} {"middle x":>9} {"y":>6} {"width":>6} {"height":>6}'
  )
  for name, of, edges in (
    ('pixels', lambda scene: scene.size, (24, 32, 48, 96, 160, 230)),
    ('degrees turned', angle('yaw'), (0, 10, 20, 30, 35)),
    ('degrees nodded', angle('pitch'), (0, 10, 20)),
    ('degrees tilted', angle('roll'), (0, 10, 20, 35)),
  ):
    for low, high in zip(edges, edges[1:]):
      group = [(s, f) for s, f in matched if low <= of(s) < high]
      seen = [(s, f) for s, f in group if f]
      if not seen:
        continue
      spread = np.sqrt(np.square(errors(seen)).mean(axis=0))
      numbers = '  '.join(f'{x:.3f}' for x in spread)
      rate = len(seen) / len(group)
      print(f'{f"{low} to {high} {name}":>22} {rate:6.0%}     {numbers}')


def speed(count: int) -> None:
  detector = mtcnn.shared()
  for side in (256, 512):
    frame, _ = make_portrait(1, side)
    frames = [frame] * count
    detector.find_raw(frames[: mtcnn.BATCH])  # compiles
    start = time.perf_counter()
    used = time.process_time()
    detector.find_raw(frames)
    used = time.process_time() - used
    seconds = time.perf_counter() - start
    print(
      f'{side}x{side}: {count / seconds:.1f} frames per second, '
      f'{1000 * used / count:.0f} ms of processor time each'
    )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--faces', type=int, default=300, help='rendered faces')
  parser.add_argument('--frames', type=int, default=64, help='frames for the speed')
  parser.add_argument('--fit', action='store_true', help='print fitted constants')
  args = parser.parse_args()
  print(f'{os.cpu_count()} cores')
  speed(args.frames)
  accuracy(args.faces, args.fit)


if __name__ == '__main__':
  main()
