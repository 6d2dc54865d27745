"""Batches of frames for the autoencoder."""

import numpy as np

from tests.data.memory_clips import frame_batches, take


def test_frames_are_consecutive_pixels(part):
  for batch in take(frame_batches(part, step=2), 6):
    video = batch['video']
    assert video.shape == (4, 3, 8, 8, 3)
    assert video.dtype == np.float32
    assert np.abs(video).max() <= 1
    rows = np.round((video.mean(axis=(2, 3, 4)) + 1) * 12.75)
    np.testing.assert_array_equal(np.diff(rows), 2)
