"""Face crops: the place of the square, records, videos, names."""

import numpy as np
import pytest

from dicetalk_jax.data import clip_record, face_crops
from dicetalk_jax.errors import InputError
from dicetalk_jax.media.face_tracking import one_by_one
from dicetalk_jax.models.embedder import EmbedderConfig
from tests.data_pipelines import made_clips


def extent(crop):
  """Corners of the bright area."""
  rows, columns = np.nonzero(crop[..., 0] > 127)
  return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


def painted(box, size=(60, 90)):
  frame = np.zeros((*size, 3), np.uint8)
  x0, y0, x1, y1 = box
  frame[y0:y1, x0:x1] = 255
  return frame


@pytest.mark.parametrize(
  ('box', 'place'),
  [
    ((30, 20, 50, 40), (2, 2, 22, 22)),  # 20 pixels become 24
    ((32, 20, 48, 40), (4, 2, 20, 22)),  # the longer side counts
    ((0, 20, 20, 40), (0, 2, 20, 22)),  # moved into the frame,
    ((75, 45, 90, 60), (4, 4, 24, 24)),  # at the other corner too: 15 pixels become 18
    ((10, 0, 70, 60), (0, 0, 24, 24)),  # no room at all: as large as the frame allows
  ],
)
def test_a_square_around_the_face(box, place):
  crop = face_crops.crop_square(painted(box), np.array(box), 24)
  assert crop.shape == (24, 24, 3) and crop.dtype == np.uint8
  np.testing.assert_array_equal(extent(crop), place)


def test_crops_of_a_record_follow_its_boxes():
  boxes = np.array([[10 + 3 * i, 16, 26 + 3 * i, 40] for i in range(5)])
  frames = [painted(box) for box in boxes]
  example = clip_record.encode_example(
    clip_record.RecordSpec(),
    clip_id='a',
    identity='a',
    dataset='other',
    num_frames=5,
    frames=frames,
    bbox=boxes / [90, 60, 90, 60],
  )
  found = face_crops.of_record(example, 36)
  assert found.shape == (5, 36, 36, 3)
  for crop in found:
    np.testing.assert_allclose(extent(crop), [8, 3, 28, 33], atol=1)
  for without in (
    example | {'frames': []},
    example | {'bbox': np.zeros((0, 4))},
    {k: v for k, v in example.items() if k != 'frames'},
  ):
    assert face_crops.of_record(without, 36).shape == (0, 36, 36, 3)


def test_crops_of_a_video_follow_the_face(tmp_path, monkeypatch):
  monkeypatch.setattr(face_crops, 'largest_faces', one_by_one(made_clips.red()))
  moving = made_clips.write(tmp_path / 'a.mp4', 0.8, fps=50, face=(10, 20), step=0.5)
  found, first = face_crops.of_video(moving, 24)
  assert found.shape == (20, 24, 24, 3) and first == 0
  for crop in found[5:-5]:  # the median over time flattens the ends
    left, top, width, height = made_clips.red()(crop)
    np.testing.assert_allclose([left, top, width, height], [2, 2, 20, 20], atol=1)
  without_face = made_clips.write(tmp_path / 'b.mp4', 0.2, side=0)
  with pytest.raises(
    InputError, match='no face was found in .*one person with the face in view'
  ):
    face_crops.of_video(without_face, 24)


def test_of_several_shots_the_longest_counts(tmp_path, monkeypatch):
  monkeypatch.setattr(face_crops, 'largest_faces', one_by_one(made_clips.red()))
  short = made_clips.pictures(6)
  long = made_clips.pictures(15, light=150, face=(50, 30))
  frames = np.concatenate([short, long])
  path = tmp_path / 'a.mp4'
  made_clips.video.write_video(path, frames, 25)
  found, first = face_crops.of_video(path, 24)
  assert first == 6 and len(found) == 15


def test_names():
  assert face_crops.parse_name(face_crops.feature(64)) == 64
  for other in ('crops', 'crops_0', 'crops_64x', 'whisper'):
    assert face_crops.parse_name(other) is None
  seeing = EmbedderConfig(visual='crops', crop_size=32)
  assert face_crops.input_name(seeing) == 'crops_32'
  assert face_crops.input_name(EmbedderConfig()) == 'expression'
