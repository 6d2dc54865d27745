"""Which detector is used, and which of several faces is taken."""

import numpy as np
import pytest

from convert import face_detector, naming, torch_files
from data_pipelines.synthetic.clip import make_portrait
from dicetalk_jax import bundle
from dicetalk_jax.bundle import ModelFolder
from dicetalk_jax.detect import choice, mtcnn, yolo_face
from dicetalk_jax.detect.faces import Face
from dicetalk_jax.errors import InputError
from dicetalk_jax.models import parameters, registry
from tests.models.yolo_twin import TINY, random_net


def _face(left, side, score):
  return Face((left, 0.0, side, side), np.zeros((5, 2)), score)


# As a detector gives them, in falling order of scores: left to right 2, 0, 1, 3.
FACES = [
  _face(100, 40, 0.9),
  _face(200, 50, 0.8),
  _face(0, 70, 0.7),
  _face(300, 60, 0.6),
]


@pytest.fixture(scope='module')
def group():
  """Three rendered people, the middle one the smallest, the last the largest."""
  image = np.full((200, 512, 3), 110, np.uint8)
  for identity, left, side in ((1, 0, 150), (2, 160, 110), (3, 300, 200)):
    image[:side, left : left + side] = make_portrait(identity, side)[0]
  return image


def test_the_largest_face_is_the_default():
  assert choice.choose(FACES) is FACES[2]


def test_numbers_count_from_left_to_right():
  assert [choice.choose(FACES, i) for i in (1, 2, 3, 4)] == [
    FACES[2],
    FACES[0],
    FACES[1],
    FACES[3],
  ]


def test_the_published_choice_is_the_last_that_is_larger_than_the_first():
  """Not the largest: the reference implementation compares each with the first."""
  assert choice.choose(FACES, choice.PUBLISHED) is FACES[3]
  assert choice.choose([FACES[2], *FACES[:2]], choice.PUBLISHED) is FACES[2]


@pytest.mark.parametrize('index', [0, 5, -1])
def test_a_face_that_is_not_there(index):
  with pytest.raises(InputError, match=f'--face_index={index}, but 4 faces were found'):
    choice.choose(FACES, index)
  with pytest.raises(InputError, match='but one face was found .* --face_box'):
    choice.choose(FACES[:1], 2)


def test_the_flag():
  assert choice.parse_face_index(None) is None
  assert choice.parse_face_index('2') == 2
  assert choice.parse_face_index('published') == choice.PUBLISHED
  with pytest.raises(InputError, match='--face_index=left is not understood'):
    choice.parse_face_index('left')


def test_faces_of_a_group(group):
  largest = choice.find_face(group)
  boxes = [choice.find_face(group, index=i) for i in (1, 2, 3)]
  assert largest == boxes[2]
  assert [box[0] for box in boxes] == sorted(box[0] for box in boxes)
  with pytest.raises(InputError, match='--face_index=4, but 3 faces were found'):
    choice.find_face(group, index=4)


def test_no_face_names_the_remedy():
  with pytest.raises(InputError, match='no face was found in the image; .*--face_box'):
    choice.find_face(np.full((200, 250, 3), 90, np.uint8))


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  """A model folder that has nothing but a small detector of the published kind."""
  folder = tmp_path_factory.mktemp('model')
  state = {
    key: torch_files.to_numpy(x)
    for key, x in face_detector.fold(random_net().state_dict()).items()
    if not key.endswith(('anchors', 'anchor_grid', 'num_batches_tracked'))
  }
  name = yolo_face.COMPONENT
  _, target = parameters.abstract(registry.builder(name, TINY.to_json()))
  params = naming.from_torch(target, state)
  bundle.save_component(folder, name, TINY.to_json(), params, {'source': 'test'})
  return ModelFolder.open(folder)


def test_the_model_folder_chooses_the_detector(model, tmp_path):
  assert choice.detector_of(ModelFolder.open(tmp_path)) is mtcnn.shared()
  detector = choice.detector_of(model)
  assert isinstance(detector, yolo_face.YoloFaceDetector)
  assert choice.detector_of(model) is detector  # compiled once


def test_images_in_batches_of_other_sizes_give_the_same_faces(model, monkeypatch):
  """What is around an image in its array does not count.

  The untrained network finds faces everywhere if little confidence is enough.
  """
  monkeypatch.setattr(yolo_face, '_SURE', 0.3)
  draw = np.random.default_rng(0).integers
  images = [
    draw(0, 255, (height, width, 3), np.uint8) for height, width in ((40, 48), (40, 52))
  ]
  detector = choice.detector_of(model)
  together = detector.find_faces(images)
  assert [yolo_face.network_size(*x.shape[:2]) for x in images] == [
    (416, 512),
    (416, 544),
  ]
  for image, faces in zip(images, together):
    (alone,) = detector.find_faces([image])
    assert len(faces) == len(alone) > 0
    for one, other in zip(faces[:20], alone):
      np.testing.assert_allclose(one.box, other.box, atol=1e-3)
      np.testing.assert_allclose(one.landmarks, other.landmarks, atol=1e-2)


def test_few_arrays_serve_all_sizes():
  sizes = {
    yolo_face.array_size(*yolo_face.network_size(height, width))
    for height in range(64, 1100, 60)
    for width in range(64, 1100, 60)
    if max(height, width) < 2.7 * min(height, width)
  }
  assert sizes == {
    (416, 416),
    *((416, side) for side in (576, 768, 1152)),
    *((side, 416) for side in (576, 768, 1152)),
  }


def test_a_strip_that_is_longer_gets_an_array_of_its_own():
  assert yolo_face.array_size(*yolo_face.network_size(64, 400)) == (416, 2624)
