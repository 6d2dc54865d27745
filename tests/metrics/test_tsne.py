"""t-SNE on planted clusters."""

import numpy as np

from dicetalk_jax.metrics import tsne


def planted(people=2, emotions=3, clips=8):
  rng = np.random.default_rng(0)
  person, emotion, _ = np.indices((people, emotions, clips)).reshape(3, -1)
  x = 20 * rng.normal(size=(emotions, 16))[emotion] + rng.normal(
    size=(len(emotion), 16)
  )
  return x, person, emotion


def test_clusters_stay_together_and_apart_always_alike():
  x, _, emotion = planted()
  points = tsne.project(x)
  centroids = np.stack([points[emotion == kind].mean(0) for kind in range(3)])
  nearest = np.linalg.norm(points[:, None] - centroids, axis=-1).argmin(1)
  np.testing.assert_array_equal(nearest, emotion)
  np.testing.assert_array_equal(points, tsne.project(x))
  assert tsne.project(x[:4]).shape == (4, 2)


def test_picture_shows_emotions_levels_and_the_first_people():
  x, person, emotion = planted(people=8)
  names = np.array(['angry', 'happy', 'sad'])[emotion]
  level = np.full(len(x), 3)
  picture = tsne.picture(x, person, names, level)
  assert picture.shape == (600, 800, 3) and picture.dtype == np.uint8

  def inked(image, colour):
    return (image == np.round(255 * tsne._COLOURS[colour])).all(-1).sum()

  assert min(inked(picture, colour) for colour in range(3)) > 100 and not inked(
    picture, 3
  )
  few = person < len(tsne.MARKERS)
  np.testing.assert_array_equal(
    picture, tsne.picture(x[few], person[few], names[few], level[few])
  )
  pale = tsne.picture(x, person, names, np.ones_like(level))
  assert inked(pale, 0) < inked(picture, 0) / 2
