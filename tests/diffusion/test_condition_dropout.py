"""Condition dropout: its rates, and the literal setting of the paper."""

import jax
import numpy as np

from dicetalk_jax.diffusion.condition_dropout import condition_dropout

RATES = {
  'audio': 0.05,
  'image': 0.06,
  'emotion': 0.07,
  'all': 0.08,
  'audio_emotion': 0.09,
}


def test_rates_are_within_three_sigma():
  n = 200_000
  dropped = condition_dropout(jax.random.uniform(jax.random.key(0), (n,)), RATES)
  expected = {
    'image': 0.06 + 0.08,
    'audio': 0.05 + 0.08 + 0.09,
    'emotion': 0.07 + 0.08 + 0.09,
  }
  for name, rate in expected.items():
    got = float(getattr(dropped, name).mean())
    assert abs(got - rate) < 3 * np.sqrt(rate * (1 - rate) / n), name
  alone = np.asarray(dropped.image & ~dropped.audio & ~dropped.emotion).mean()
  assert abs(alone - 0.06) < 3 * np.sqrt(0.06 * 0.94 / n)


def test_literal_paper_never_drops_audio_and_emotion_without_the_image():
  dropped = condition_dropout(
    jax.random.uniform(jax.random.key(1), (10_000,)), RATES | {'audio_emotion': 0.0}
  )
  assert not np.asarray(dropped.audio & dropped.emotion & ~dropped.image).any()


def test_no_rates_drop_nothing():
  dropped = condition_dropout(np.linspace(0, 0.999, 100), {})
  assert not any(np.asarray(mask).any() for mask in dropped)
