"""Condition dropout (paper section 4.1): one uniform draw per clip decides what the
network does not see.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Intervals of the draw, in this order. `audio_emotion` is not in the paper's list: it
# trains the branch that the published three-branch guidance uses (image only); 0 gives
# the literal paper.
CASES = {
  'audio': (False, True, False),
  'image': (True, False, False),
  'emotion': (False, False, True),
  'all': (True, True, True),
  'audio_emotion': (False, True, True),
}


class Dropped(NamedTuple):
  """Boolean masks [B]: True where the condition is replaced by its null value."""

  image: jax.Array
  audio: jax.Array
  emotion: jax.Array


def condition_dropout(draw: jax.Array, rates: Mapping[str, float]) -> Dropped:
  """Splits [0, 1) into one interval per case, of the length of its rate; the rest drops
  nothing.

  Args:
    draw: [B], uniform in [0, 1).
    rates: probability of each of `CASES`; a missing one is 0.
  """
  masks = [jnp.zeros(draw.shape, bool)] * 3
  low = 0.0
  for case, drops in CASES.items():
    high = low + rates.get(case, 0.0)
    hit = (draw >= low) & (draw < high)
    masks = [mask | hit if dropped else mask for mask, dropped in zip(masks, drops)]
    low = high
  return Dropped(*masks)
