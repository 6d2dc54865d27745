"""Clustering strength and probes on planted clusters."""

import numpy as np
import pytest

from dicetalk_jax.metrics import clustering

IDENTITIES = 6
EMOTIONS = 4
CLIPS = 10
WIDTH = 12


def planted(speaker=0.0, emotion=0.0, noise=1.0, seed=0):
  """Rows are a vector of the speaker, one of the emotion and noise, added.

  Each has the given standard deviation per entry.
  """
  rng = np.random.default_rng(seed)

  def draw(*size):
    return rng.normal(size=(*size, WIDTH))

  x = (
    speaker * draw(IDENTITIES, 1, 1)
    + emotion * draw(1, EMOTIONS, 1)
    + noise * draw(IDENTITIES, EMOTIONS, CLIPS)
  )
  label = np.indices((IDENTITIES, EMOTIONS, CLIPS)).reshape(3, -1)
  return x.reshape(-1, WIDTH), label[0], label[1]


def test_strength_by_hand():
  """Two tight pairs on a line: centroids 0 and 10, members at distance 1 and 2."""
  x = np.array([[-1.0], [1.0], [8.0], [12.0]])
  ratios = clustering.clustering_strength(
    x, np.zeros(4), np.array(['sad', 'sad', 'happy', 'happy'])
  )
  assert ratios == {'sad': pytest.approx(10.0), 'happy': pytest.approx(5.0)}


def test_strength_on_planted_clusters():
  """Grows with the distance of emotions, whatever the speaker's place, from a floor
  without clusters.
  """

  def strength(**kw):
    return np.mean(list(clustering.clustering_strength(*planted(**kw)).values()))

  none, weak, strong = (strength(emotion=e) for e in (0, 1, 5))
  assert none < 0.6 < weak < strong
  assert strong > 5
  assert strength(emotion=1, speaker=50) == pytest.approx(weak)
  # Centroids of an isotropic cluster: distance sqrt(2) e sqrt(D) over deviation
  # sqrt(D), both up to sampling.
  assert strength(emotion=20) == pytest.approx(20 * np.sqrt(2), rel=0.3)


def test_strength_leaves_out_what_has_no_spread():
  x, identity, emotion = planted(emotion=2)
  expected = clustering.clustering_strength(x, identity, emotion)
  # A single clip, and an identity with one emotion.
  x = np.concatenate([x, np.ones((2, WIDTH))])
  more = clustering.clustering_strength(
    x, np.append(identity, [0, 99]), np.append(emotion, [77, 1])
  )
  assert more == expected


def test_probes_find_what_is_planted():
  x, identity, emotion = planted(emotion=3)
  within = clustering.folds_within(identity)
  assert clustering.nearest_centroid_accuracy(x, emotion, identity) > 0.95
  assert clustering.linear_probe_accuracy(x, emotion, identity) > 0.95
  assert clustering.linear_probe_accuracy(x, identity, within) < 2 / IDENTITIES
  assert clustering.recall_at_1(x, emotion) > 0.95
  x, identity, emotion = planted(speaker=3)
  assert clustering.linear_probe_accuracy(x, identity, within) > 0.95
  assert clustering.nearest_centroid_accuracy(x, emotion, identity) < 2 / EMOTIONS


def test_linear_probe_sees_past_a_big_common_direction():
  """A centroid misses the label in a small entry next to a big one without meaning."""
  rng = np.random.default_rng(0)
  label = np.arange(200) % 2
  x = np.stack([100 * rng.normal(size=200), label + 0.1 * rng.normal(size=200)], axis=1)
  fold = clustering.folds_within(label)
  assert clustering.linear_probe_accuracy(x, label, fold) == 1
  assert clustering.nearest_centroid_accuracy(x, label, fold) < 0.7


def test_linear_probe_is_not_fooled_by_many_features():
  x, identity, _ = planted()
  noise = np.random.default_rng(1).normal(size=(len(x), 300))
  fold = clustering.folds_within(identity)
  accuracy = clustering.linear_probe_accuracy(noise, identity, fold)
  assert accuracy < 2 / IDENTITIES


def test_folds_deal_every_label_out():
  label = np.array([0, 0, 1, 0, 1, 0, 0])
  np.testing.assert_array_equal(
    clustering.folds_within(label, 2), [0, 1, 0, 0, 1, 1, 0]
  )


def test_summary():
  x, identity, emotion = planted(speaker=2, emotion=4, noise=0.5)
  report = clustering.summary(x, identity, emotion)
  assert report['clustering'] > 3
  assert report['emotion_accuracy'] > 0.95 and report['recall_at_1'] > 0.95
  assert report['norm'] == pytest.approx(np.linalg.norm(x, axis=1).mean())
  kinds = np.array(['angry', 'happy', 'neutral', 'sad'])
  named = clustering.summary(x, identity.astype(str), kinds[emotion])
  each = clustering.clustering_strength(x, identity, emotion)
  for i, kind in enumerate(kinds):
    assert named.pop(f'clustering/{kind}') == each[i]
    assert report.pop(f'clustering/{i}') == each[i]
  assert named == report
  assert report['clustering'] == pytest.approx(np.mean(list(each.values())))
  x, identity, emotion = planted()
  assert clustering.summary(x + 100, identity, emotion)['mean_cosine'] > 0.99
  assert abs(clustering.summary(x, identity, emotion)['mean_cosine']) < 0.05


@pytest.mark.parametrize(
  ('kept', 'missing'),
  [
    (
      lambda identity, emotion, clip: identity == 0,
      {'emotion_accuracy', 'identity_accuracy'},
    ),
    (
      lambda identity, emotion, clip: (emotion == 0) & (clip == 0),
      {'clustering', 'recall_at_1', 'identity_accuracy'},
    ),
    (
      lambda identity, emotion, clip: (identity == 0) & (emotion == 0) & (clip == 0),
      {
        'clustering',
        'recall_at_1',
        'emotion_accuracy',
        'identity_accuracy',
        'mean_cosine',
      },
    ),
  ],
)
def test_summary_leaves_out_what_needs_more_clips(kept, missing):
  """Clips of one identity; one clip of each; one clip."""
  x, identity, emotion = planted(speaker=2, emotion=4, noise=0.5)
  chosen = kept(identity, emotion, np.arange(len(x)) % CLIPS)
  report = clustering.summary(x[chosen], identity[chosen], emotion[chosen])

  def scores(names):
    return {name for name in names if '/' not in name}

  assert scores(report) == scores(clustering.summary(x, identity, emotion)) - missing
  assert np.isfinite(list(report.values())).all()
