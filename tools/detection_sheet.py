"""Draws what the default detector finds in pictures of all sorts: docs/detections.webp,
and the table of docs/detection.md.

    python -m tools.detection_sheet [MORE PICTURES...]

The photographs are those that scikit-image brings along.
"""

import argparse
from collections.abc import Iterator
import math
import pathlib

import numpy as np
from PIL import Image, ImageDraw
from skimage import data

from data_pipelines.synthetic.clip import make_portrait
from data_pipelines.synthetic.projection import Pose
from dicetalk_jax.detect import mtcnn
from dicetalk_jax.media.image import load_image

SHEET = pathlib.Path(__file__).parents[1] / 'docs' / 'detections.webp'
TILE = 150  # pixels
COLUMNS = 7


def _rgb(pixels: np.ndarray) -> np.ndarray:
  return np.asarray(Image.fromarray(pixels).convert('RGB'))


def _turned(pixels: np.ndarray, degrees: float) -> np.ndarray:
  fill = tuple(pixels[0, 0].tolist())
  return np.asarray(
    Image.fromarray(pixels).rotate(degrees, Image.Resampling.BICUBIC, fillcolor=fill)
  )


def _small(pixels: np.ndarray, side: int) -> np.ndarray:
  return np.asarray(Image.fromarray(pixels).resize((side, side)))


def _group() -> np.ndarray:
  """Seven people of four sizes, one of them tilted and one turned."""
  image = np.full((360, 640, 3), (96, 110, 120), np.uint8)
  places = ((0, 0, 160), (170, 10, 220), (400, 0, 120), (520, 20, 100))
  below = ((10, 190, 150), (400, 150, 200), (180, 250, 90))
  poses = {1: Pose(roll=0.4), 4: Pose(yaw=0.5)}
  for i, (left, top, side) in enumerate(places + below):
    part, _ = make_portrait(i + 20, side, pose=poses.get(i))
    image[top : top + side, left : left + side] = part
  return image


def pictures() -> Iterator[tuple[str, np.ndarray, int]]:
  """Yields what is to be seen, the picture, and how many faces it shows."""
  astronaut = data.astronaut()
  yield 'photograph of a woman', astronaut, 1
  yield 'the same, 150 pixels high', _small(astronaut, 150), 1
  yield 'the same, tilted by 25 degrees', _turned(astronaut, 25), 1
  yield 'the same, tilted by 45 degrees', _turned(astronaut, -45), 1
  yield 'the same, upside down', astronaut[::-1, ::-1], 1
  yield (
    'the same in grey, dark',
    _rgb(data.astronaut().mean(-1).astype(np.uint8) // 3),
    1,
  )
  yield 'half of her face', astronaut[:, 225:], 1
  yield 'man with a camera, from the side', _rgb(data.camera()), 1

  happy, _ = make_portrait(3, 256, 'happy')
  yield 'rendered, happy', happy, 1
  for name, pose in (
    ('turned by 30 degrees', Pose(yaw=0.52)),
    ('turned by 35 degrees', Pose(yaw=-0.61)),
    ('head lowered', Pose(pitch=0.35)),
    ('head raised', Pose(pitch=-0.35)),
    ('tilted by 30 degrees', Pose(roll=0.52)),
  ):
    yield f'rendered, {name}', make_portrait(6, 256, pose=pose)[0], 1
  yield 'rendered, larger than the picture', make_portrait(8, 256, zoom=1.6)[0], 1
  yield 'rendered, face of 26 pixels', make_portrait(9, 44)[0], 1
  yield 'seven rendered people', _group(), 7

  yield 'cat', data.chelsea(), 0
  yield 'cup of coffee', data.coffee(), 0
  yield 'rocket', data.rocket(), 0
  yield 'coins with heads', _rgb(data.coins()), 0
  yield 'page of text', _rgb(data.page()), 0
  yield 'stars', data.hubble_deep_field(), 0
  yield 'grass', _rgb(data.grass()), 0
  yield 'bricks', _rgb(data.brick()), 0
  yield 'horse', _rgb((data.horse() * 255).astype(np.uint8)), 0
  yield 'tissue', data.immunohistochemistry(), 0
  yield 'retina', data.retina(), 0


def _drawn(image: np.ndarray, faces) -> Image.Image:
  scale = TILE / max(image.shape[:2])
  size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
  tile = Image.new('RGB', (TILE, TILE), 'white')
  part = Image.fromarray(image).resize(size)
  pen = ImageDraw.Draw(part)
  for face in faces:
    left, top, width, height = (scale * x for x in face.box)
    pen.rectangle((left, top, left + width, top + height), outline='lime', width=2)
    for x, y in (scale * face.landmarks).tolist():
      pen.ellipse((x - 1, y - 1, x + 1, y + 1), fill='red')
  tile.paste(part, ((TILE - size[0]) // 2, (TILE - size[1]) // 2))
  return tile


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('pictures', nargs='*', help='more pictures, of one face each')
  parser.add_argument('--output', type=pathlib.Path, default=SHEET)
  args = parser.parse_args()
  shown = [*pictures()]
  shown += [(pathlib.Path(name).stem, load_image(name), 1) for name in args.pictures]
  found = mtcnn.shared().find_faces([image for _, image, _ in shown])
  sheet = Image.new(
    'RGB', (COLUMNS * TILE, math.ceil(len(shown) / COLUMNS) * TILE), 'white'
  )
  print('| | picture | size | faces | found | scores |\n' + '| --- ' * 6 + '|')
  for i, ((name, image, count), faces) in enumerate(zip(shown, found)):
    row, column = divmod(i, COLUMNS)
    sheet.paste(_drawn(image, faces), (column * TILE, row * TILE))
    scores = ', '.join(f'{face.score:.2f}' for face in faces)
    height, width = image.shape[:2]
    print(
      f'| {i + 1} | {name} | {width}x{height} | {count} | {len(faces)} | {scores} |'
    )
  sheet.save(args.output, quality=70)


if __name__ == '__main__':
  main()
