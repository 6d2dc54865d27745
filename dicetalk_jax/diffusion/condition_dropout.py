"""Condition dropout (paper section 4.1): one uniform draw per clip decides which
conditions the network does not see.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float


class Dropped(NamedTuple):
  """True where a condition is replaced by its null value."""

  image: Bool[Array, ' B']
  audio: Bool[Array, ' B']
  emotion: Bool[Array, ' B']


# Intervals of the draw, in this order, and the conditions that each of them drops.
# `audio_emotion` is not in the paper's list: it trains the branch that the reference
# implementation's guidance uses (image only); 0 gives the literal paper.
CASES = {
  'audio': ('audio',),
  'image': ('image',),
  'emotion': ('emotion',),
  'all': ('image', 'audio', 'emotion'),
  'audio_emotion': ('audio', 'emotion'),
}


def condition_dropout(
  draw: Float[ArrayLike, ' B'], rates: Mapping[str, float]
) -> Dropped:
  """Splits [0, 1) into one interval per case, and finds the interval of each draw.

  An interval is as long as the rate of its case; the rest of [0, 1) drops nothing.

  Args:
    draw: uniform in [0, 1).
    rates: probability of each of `CASES`; a missing one is 0.
  """
  draw = jnp.asarray(draw)
  dropped = {name: jnp.zeros(draw.shape, bool) for name in Dropped._fields}
  low = 0.0
  for case, names in CASES.items():
    high = low + rates.get(case, 0.0)
    hit = (draw >= low) & (draw < high)
    for name in names:
      dropped[name] |= hit
    low = high
  return Dropped(**dropped)
