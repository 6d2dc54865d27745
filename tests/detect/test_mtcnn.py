"""The default detector, next to the package that its weights are from."""

import numpy as np
from PIL import Image
import pytest
from safetensors.numpy import load_file
from skimage import data

from data_pipelines.synthetic.clip import make_portrait
from dicetalk_jax.detect import mtcnn
from tools import mtcnn_weights

SIDE = 256  # a size that is searched as it is


@pytest.fixture(scope='module')
def images():
  """Photographs and rendered faces, one of them several times, one without a face."""
  astronaut = Image.fromarray(data.astronaut())
  group = np.full((SIDE, SIDE, 3), 120, np.uint8)
  for i, (top, left, side) in enumerate([(0, 0, 128), (20, 130, 96), (160, 90, 64)]):
    group[top : top + side, left : left + side] = make_portrait(i, side)[0]
  return [
    np.asarray(astronaut.crop((96, 0, 352, 256))),
    np.asarray(astronaut.crop((150, 30, 300, 180)).resize((SIDE, SIDE))),
    make_portrait(5, SIDE, 'surprised')[0],
    group,
    data.chelsea()[:SIDE, :SIDE],
    np.full((SIDE, SIDE, 3), 255, np.uint8),
  ]


@pytest.fixture(scope='module')
def found(images):
  return mtcnn.shared().find_raw(images)


@pytest.fixture(scope='module')
def package():
  from mtcnn import MTCNN

  return MTCNN()


def test_weights_are_those_of_the_package():
  ours = load_file(mtcnn.WEIGHTS)
  theirs = mtcnn_weights.package_weights()
  assert ours.keys() == theirs.keys()
  assert sum(x.size for x in ours.values()) == 6_632 + 100_178 + 389_040
  for name, x in ours.items():
    np.testing.assert_array_equal(x, theirs[name])


def test_faces_equal_those_of_the_package(images, found, package):
  """To a hundredth of a pixel, scores to 1e-4, and no other faces."""
  counts = []
  for image, faces in zip(images, found):
    rows = package.detect_faces(
      image, fit_to_image=False, output_type='numpy', box_format='xywh'
    )
    counts.append(len(rows))
    assert len(faces) == len(rows)
    for face, row in zip(faces, rows):
      np.testing.assert_allclose(face.box, row[1:5], atol=0.01)
      landmarks = np.stack([row[6:11], row[11:16]], axis=-1)
      np.testing.assert_allclose(face.landmarks, landmarks, atol=0.01)
      assert face.score == pytest.approx(row[5], abs=1e-4)
  assert counts == [1, 1, 1, 3, 0, 0]


def test_photographs_of_many_people():
  """100 tiny photographs of faces and 100 of other things (Labeled Faces in the Wild),
  enlarged to 64 pixels.
  """
  scenes = np.full((200, 128, 128, 3), 128, np.uint8)
  for scene, photograph in zip(scenes, data.lfw_subset()):
    grey = Image.fromarray((255 * photograph).astype(np.uint8)).resize((64, 64))
    scene[32:96, 32:96] = np.asarray(grey)[..., None]
  found = [bool(faces) for faces in mtcnn.shared().find_raw([*scenes])]
  assert np.mean(found[:100]) > 0.95
  assert np.mean(found[100:]) < 0.02


def test_one_image_alone_or_in_a_batch_gives_the_same(images, found):
  for image, faces in zip(images[:3], found):
    ((alone,),) = mtcnn.shared().find_raw([image])
    np.testing.assert_allclose(alone.box, faces[0].box, atol=0.01)


def test_large_images_are_scaled_and_others_padded(images, found):
  (face,) = found[1]
  large = np.asarray(Image.fromarray(images[1]).resize((1500, 1500)))
  ((scaled,),) = mtcnn.shared().find_raw([large])
  side = face.box[2] * 1500 / SIDE
  np.testing.assert_allclose(
    np.array(scaled.box) * SIDE / 1500, face.box, atol=0.06 * side * SIDE / 1500
  )
  padded = images[1][:250, :240]
  ((same,),) = mtcnn.shared().find_raw([padded])
  np.testing.assert_allclose(same.landmarks, face.landmarks, atol=3)


def test_few_sizes_serve_all():
  assert mtcnn.search_size(64, 64) == (128, 128)
  assert mtcnn.search_size(240, 256) == (256, 256)
  assert mtcnn.search_size(1080, 1920) == (384, 640)
  assert mtcnn.search_size(1920, 1080) == (640, 384)
  assert mtcnn.search_size(480, 640) == (512, 640)
  assert mtcnn.search_size(4000, 3900) == (640, 640)
  assert mtcnn.search_size(64, 6000) == (384, 640)


def test_a_thin_strip_has_no_face():
  assert mtcnn.shared().find_raw([np.zeros((2, 250, 3), np.uint8)]) == [[]]
  assert mtcnn.shared().find_raw([]) == []


def test_noise_is_bounded():
  """However many boxes look likely, time and memory stay small."""
  noise = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), np.uint8)
  mtcnn.shared().find_raw([noise])
  pyramid = mtcnn._pyramid(SIDE, SIDE)
  height, width = (side // 2 - 5 for side in pyramid.valid.shape)
  scores = np.random.default_rng(1).random((height, width), np.float32)
  boxes, _ = mtcnn._thinned(pyramid, scores, np.zeros((height, width, 4)))
  assert len(boxes) < len(pyramid.levels) * mtcnn._CANDIDATES
