"""t-SNE on planted clusters."""

import numpy as np

from dicetalk_jax.metrics import tsne


def planted(identities=2, emotions=3, clips=8):
  rng = np.random.default_rng(0)
  identity, emotion, _ = np.indices((identities, emotions, clips)).reshape(3, -1)
  centres = 20 * rng.normal(size=(emotions, 16))
  x = centres[emotion] + rng.normal(size=(len(emotion), 16))
  return x, identity, emotion


def test_clusters_stay_together_and_apart_and_are_reproducible():
  x, _, emotion = planted()
  points = tsne.project(x)
  centroids = np.stack([points[emotion == kind].mean(0) for kind in range(3)])
  nearest = np.linalg.norm(points[:, None] - centroids, axis=-1).argmin(1)
  np.testing.assert_array_equal(nearest, emotion)
  np.testing.assert_array_equal(points, tsne.project(x))
  assert tsne.project(x[:4]).shape == (4, 2)


def test_the_image_shows_emotions_levels_and_the_first_identities():
  x, identity, emotion = planted(identities=8)
  names = np.array(['angry', 'happy', 'sad'])[emotion]
  level = np.full(len(x), 3)
  image = tsne.picture(x, identity, names, level)
  assert image.shape == (600, 800, 3) and image.dtype == np.uint8

  def pixels_of(image, colour):
    return (image == np.round(255 * tsne._COLOURS[colour])).all(-1).sum()

  assert min(pixels_of(image, colour) for colour in range(3)) > 100
  assert not pixels_of(image, 3)
  few = identity < len(tsne.MARKERS)
  same = tsne.picture(x[few], identity[few], names[few], level[few])
  np.testing.assert_array_equal(image, same)
  pale = tsne.picture(x, identity, names, np.ones_like(level))
  assert pixels_of(pale, 0) < pixels_of(image, 0) / 2
