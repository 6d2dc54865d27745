"""Pose guider: how it starts, and that it learns.

The recorded numbers are checked in `tests/convert/verify/test_verify.py`.
"""

import jax
import jax.numpy as jnp

from dicetalk_jax.models import parameters
from dicetalk_jax.models.pose_guider import PoseGuider, PoseGuiderConfig


def test_starts_at_zero_and_learns():
  config = PoseGuiderConfig(
    conditioning_embedding_channels=8, block_out_channels=(4, 8)
  )

  def build(rngs):
    return PoseGuider(config, rngs=rngs)

  graphdef, target = parameters.abstract(build)
  drawn = parameters.init_params(build, jax.random.key(0))
  last = {name: x for name, x in drawn.items() if name.startswith('conv_out')}
  params = parameters.numpy_params(target) | last

  def forward(params):
    return parameters.merge(graphdef, params)(jnp.ones((1, 2, 8, 16, 3)))

  y, pull = jax.vjp(jax.jit(forward), params)
  assert y.shape == (1, 2, 4, 8, 8)  # one halving for two widths
  assert not y.any()
  assert pull(jnp.ones_like(y))[0]['conv_out.kernel'].any()
