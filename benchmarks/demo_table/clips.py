"""The truth about the test cases."""

from collections.abc import Iterable, Iterator, Sequence
import concurrent.futures
import dataclasses
import functools
import multiprocessing
import os

import numpy as np

from dicetalk_jax import interrupt
from examples.demo_data import Case


@dataclasses.dataclass(frozen=True)
class Truth:
  """How a case truly looks, at the frame rate of the model.

  Attributes:
    frames: uint8 [N,S,S,3].
    audio: float32 [samples], 16 kHz.
    opening: [N] mouth opening, in face units.
    closed: bool [N], frames in which the lips must touch.
    box: [4] outline of the face, x0, y0, x1, y1 in [0,1]: the mean over the clip.
    pose: [N,5] of the head.
  """

  frames: np.ndarray
  audio: np.ndarray
  opening: np.ndarray
  closed: np.ndarray
  box: np.ndarray
  pose: np.ndarray

  def first(self, count: int) -> 'Truth':
    """The first frames."""
    per_frame = ('frames', 'opening', 'closed', 'pose')
    return dataclasses.replace(
      self, **{name: getattr(self, name)[:count] for name in per_frame}
    )


def case_name(case: Case) -> str:
  """Names files and lines after a case."""
  return f'{case.identity}_{case.prior}'


def other_words(cases: Sequence[Case]) -> list[Case]:
  """The same people in the same emotions, with the words of their next clip.

  These clips stand for the people in galleries, and for the truth in distances between
  sets: so no clip is compared with itself.
  """
  clips_of: dict[int, list[Case]] = {}
  for case in cases:
    clips_of.setdefault(case.identity, []).append(case)
  others = []
  for case in cases:
    own = clips_of[case.identity]
    following = own[(own.index(case) + 1) % len(own)]
    others.append(dataclasses.replace(case, sentence=following.sentence))
  return others


def perform(case: Case, size: int, step: int) -> Truth:
  """Renders a case, and keeps every `step`-th frame."""
  clip = case.truth(size)
  return Truth(
    frames=clip.frames[::step],
    audio=clip.audio,
    opening=clip.opening[::step],
    closed=clip.lips_touch[::step],
    box=clip.bbox[::step].mean(0),
    pose=clip.pose[::step],
  )


def perform_all(cases: Iterable[Case], size: int, step: int) -> Iterator[Truth]:
  """Renders cases in order, with a process on each core."""
  with concurrent.futures.ProcessPoolExecutor(
    os.cpu_count(), multiprocessing.get_context('spawn')
  ) as pool:
    with interrupt.shielded():  # this process ends the others
      truths = pool.map(functools.partial(perform, size=size, step=step), cases)
    yield from truths


def psnr(frames: np.ndarray, truth: np.ndarray) -> float:
  """Peak signal-to-noise ratio of a clip in dB."""
  error = np.square(frames.astype(np.float32) - truth).mean()
  return float(10 * np.log10(255**2 / max(error, 1e-10)))
