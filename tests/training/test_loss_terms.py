"""Emotion discrimination and the mouth's region, on numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from dicetalk_jax.training.diffusion_loss import emotion_discrimination, mouth_region


def test_discrimination_counts_labelled_clips_whose_emotion_is_kept():
  logits = jax.random.normal(jax.random.key(0), (3, 4, 22))
  label, dropped = jnp.array([5, -1, 7]), jnp.array([False, False, True])
  loss, accuracy = emotion_discrimination(logits, label, dropped)
  expected = -jax.nn.log_softmax(logits[0])[:, 5].mean()
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  assert float(accuracy) == float((logits[0].argmax(-1) == 5).mean())


def test_discrimination_without_any_label_is_zero_with_zero_gradient():
  label, dropped = jnp.array([-1, 3]), jnp.array([False, True])
  loss, grad = jax.value_and_grad(
    lambda x: emotion_discrimination(x, label, dropped)[0]
  )(jnp.ones((2, 3, 22)))
  assert float(loss) == 0 and not np.asarray(grad).any()


def test_mouth_region_follows_the_face_rectangle():
  mask = np.zeros((2, 40, 40), np.float32)
  mask[0, 10:30, 8:28] = 1
  mask[1] = 1
  mouth = np.asarray(mouth_region(jnp.asarray(mask)))
  expected = np.zeros_like(mask)
  expected[0, 21:28, 13:23] = 1
  expected[1, 22:36, 10:30] = 1
  np.testing.assert_array_equal(mouth, expected)
