"""Tracks of faces and shots."""

import numpy as np
import pytest

from dicetalk_jax.media import face_tracking
from tests.data_pipelines import made_clips


def _row(count, start=0.0, step=1.0):
  return [(start + step * i, 10.0, 20.0, 30.0) for i in range(count)]


def test_overlap_is_intersection_over_union():
  a = np.array([0.0, 0, 10, 10])
  assert face_tracking.overlap(a, a) == 1
  assert face_tracking.overlap(a, a + [5, 0, 5, 0]) == pytest.approx(1 / 3)
  assert face_tracking.overlap(a, a + 20) == 0


def test_a_face_is_followed_and_gaps_are_filled():
  boxes = _row(100, step=0.1)
  boxes[40:65] = [None] * 25
  boxes[0] = boxes[99] = None
  (track,) = face_tracking.tracks(boxes)
  assert track.first == 0 and track.end == 100
  inside = slice(8, 92)  # the median of 13 flattens the ends
  np.testing.assert_allclose(track.boxes[inside, 0], 0.1 * np.arange(100)[inside])
  np.testing.assert_allclose(track.boxes[inside, 2], 0.1 * np.arange(100)[inside] + 20)
  assert (track.boxes[:, 3] == 40).all()


def test_longer_gaps_divide_and_a_held_box_ends_after_a_second():
  boxes = _row(60, step=0.0) + [None] * 70 + _row(60, step=0.0)
  first, second = face_tracking.tracks(boxes)
  assert (first.first, first.end) == (0, 85)
  assert (second.first, second.end) == (105, 190)


def test_cuts_divide_though_the_face_stays():
  first, second = face_tracking.tracks(_row(80, step=0.0), cuts=[30])
  assert (first.first, first.end, second.first, second.end) == (0, 30, 30, 80)


def test_jitter_and_false_finds_do_not_matter():
  boxes = _row(60, start=50.0, step=0.0)
  boxes[20] = (400.0, 300.0, 90.0, 90.0)  # somewhere else for one frame
  boxes[30] = (52.0, 12.0, 20.0, 30.0)  # jitter
  (track,) = face_tracking.tracks(boxes)
  assert (track.boxes == [50, 10, 70, 40]).all() and len(track.boxes) == 60
  assert face_tracking.tracks([None] * 10) == []


def test_shots_are_told_apart_by_their_colours():
  same = made_clips.pictures(6, step=3.0)
  other = made_clips.pictures(4, light=150)
  begins_shot = face_tracking.ShotDetector()
  begins = [i for i, x in enumerate((*same, *other, *same)) if begins_shot(x)]
  assert begins == [6, 10]


def test_faces_and_cuts_of_a_video():
  with_face = made_clips.pictures(6, step=3.0)
  without = made_clips.pictures(3, light=150, side=0)
  frames = [*with_face, *without]
  red = face_tracking.one_by_one(made_clips.red())
  boxes, cuts = face_tracking.detect(frames, red, every=2)
  assert [i for i, box in enumerate(boxes) if box is not None] == [0, 2, 4]
  assert len(boxes) == 9
  assert cuts == [6]
  assert face_tracking.detect(frames, red, shots=False).cuts == []


def test_the_detector_gets_batches_of_frames():
  given = []

  def detector(frames):
    given.append(len(frames))
    return [(float(frame[0, 0, 0]), 0.0, 1.0, 1.0) for frame in frames]

  frames = np.arange(20, dtype=np.uint8)[:, None, None, None] * np.ones((4, 4, 3))
  boxes, _ = face_tracking.detect(frames, detector, shots=False)
  assert given == [8, 8, 4]
  assert [box[0] for box in boxes] == [*range(20)]
