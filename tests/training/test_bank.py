import numpy as np

from data_pipelines.features import FeatureStore
from data_pipelines.loader import Part
from dicetalk_jax.training import bank


def test_codes_begin_where_the_priors_are(tmp_path):
  rng = np.random.default_rng(0)
  centres = rng.normal(size=(4, 6)).astype(np.float32) * 5
  priors = FeatureStore(tmp_path, 'set').write('prior', 'embedder', (
      (i, np.stack([centres[i % 4], np.full(6, 0.05, np.float32)])[None]) for i in range(12)))
  parts = [Part(None, {'prior': priors})]
  params = {'codebook.fc.kernel': rng.normal(size=(6, 8)).astype(np.float32),
            'codebook.fc.bias': rng.normal(size=8).astype(np.float32),
            'codebook.codebook.embedding': np.zeros((4, 8), np.float32), 'emo_linear.kernel': np.ones(3)}
  fitted = bank.fit_codes(params, parts, seed=3)
  projected = centres @ params['codebook.fc.kernel'] + params['codebook.fc.bias']
  distance = np.linalg.norm(projected[:, None] - fitted['codebook.codebook.embedding'], axis=-1)
  assert sorted(distance.argmin(1)) == [0, 1, 2, 3] and distance.min(1).max() < 0.1
  assert fitted['emo_linear.kernel'] is params['emo_linear.kernel']
  again = bank.fit_codes(params, parts, seed=3)
  np.testing.assert_array_equal(again['codebook.codebook.embedding'], fitted['codebook.codebook.embedding'])
