"""Condition dropout (paper section 4.1): one uniform draw per clip decides which
conditions the network does not see.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import ArrayLike, Bool, Float


class Dropped(NamedTuple):
  """True where a condition is replaced by its null value."""

  image: Bool[ArrayLike, ' B']
  audio: Bool[ArrayLike, ' B']
  emotion: Bool[ArrayLike, ' B']


# Intervals of the draw, in this order. `audio_emotion` is not in the paper's list: it
# trains the branch that the reference implementation's guidance uses (image only); 0
# gives the literal paper.
CASES = {
  'audio': Dropped(image=False, audio=True, emotion=False),
  'image': Dropped(image=True, audio=False, emotion=False),
  'emotion': Dropped(image=False, audio=False, emotion=True),
  'all': Dropped(image=True, audio=True, emotion=True),
  'audio_emotion': Dropped(image=False, audio=True, emotion=True),
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
  dropped = Dropped(*[jnp.zeros(draw.shape, bool)] * 3)
  low = 0.0
  for case, drops in CASES.items():
    high = low + rates.get(case, 0.0)
    hit = (draw >= low) & (draw < high)
    dropped = Dropped(
      *(mask | hit if drop else mask for mask, drop in zip(dropped, drops))
    )
    low = high
  return dropped
