"""Fills the journal of a table: renders, generates and lets the judges read."""

from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from benchmarks.demo_table import clips
from benchmarks.demo_table.clips import Truth, case_name
from benchmarks.demo_table.journal import Arrays, Journal
from dicetalk_jax.diffusion import windows
from dicetalk_jax.diffusion.sampler import (
  Conditions,
  SamplerConfig,
  join_conditions,
)
from dicetalk_jax.metrics import clip_scores
from dicetalk_jax.metrics.judges import Judges, Reading
from dicetalk_jax.pipeline import Pipeline
from dicetalk_jax.settings import Settings
from examples.demo_data import Case
from examples.judges import sanity_rows
from examples.judges.sanity_rows import Sample

# Rows of the journal.
RENDERING = 'rendering'  # the truth itself, not what judges read of it
REFERENCE = 'reference'  # true clips of other words, see `clips.other_words`
TRUTH = 'truth'
GENERATED = 'generated'
AUTOENCODED = 'autoencoded truth'
# True clips that are spoilt in a way that judges must look at.
SPOILT: dict[str, sanity_rows.Spoil] = {
  'still mouth': sanity_rows.still_mouth,
  'blur': sanity_rows.blur,
}

Load = Callable[[], Pipeline]


class Work:
  """Everything that a row of the table is made from.

  Attributes:
    cases: all of the table.
    journal: what is finished.
  """

  def __init__(
    self,
    cases: Sequence[Case],
    journal: Journal,
    judges: Judges,
    settings: Settings,
    load: Load,
  ):
    """`load` is called once, and only if the model has something to do."""
    self.cases = cases
    self.journal = journal
    self._judges = judges
    self._settings = settings
    self._pipeline = functools.cache(load)

  def truth(self, case: Case) -> Truth:
    """The finished rendering of a case."""
    return Truth(**self.journal.arrays(RENDERING, case_name(case)))

  def render(self) -> None:
    """Renders the truth and the references, and reads both."""
    left = [case for _, case in self._left(TRUTH)]
    for case, truth in self._watched(TRUTH, self._rendered(left)):
      self.journal.add(RENDERING, case_name(case), vars(truth))
      self._finish(TRUTH, case, self._judges.read(truth.frames, truth.box))

    others = clips.other_words(self.cases)
    left = [others[i] for i, _ in self._left(REFERENCE)]
    for case, truth in self._watched(REFERENCE, self._rendered(left)):
      self._finish(REFERENCE, case, self._judges.read(truth.frames, truth.box))

  def generate(self, batch: int, seed: int) -> None:
    """Generates and reads the clips that are left, `batch` at a time."""
    left = self._left(GENERATED)
    made = self._generated(left, batch, seed) if left else iter(())
    with _bar(GENERATED, len(left)) as bar:
      for case, frames in made:
        truth = self.truth(case)
        self._read(
          GENERATED,
          case,
          truth,
          frames,
          keep=True,
          seam=seam_of(frames, self._settings.sampler),
        )
        bar.update()

  def autoencode(self) -> None:
    """Reads true clips after the autoencoder: the best that the model could draw."""
    for case, truth in self._watched(AUTOENCODED):
      frames = self._pipeline().reconstruct(truth.frames)
      self._read(AUTOENCODED, case, truth, frames)

  def spoil(self, row: str) -> None:
    """Spoils true clips in a way of `SPOILT`, and reads them."""
    for case, _ in self._watched(row):
      sample = true_sample(self.journal, case, person=0)
      (spoilt,) = SPOILT[row]([sample], self._judges)
      self._finish(row, case, spoilt.reading)

  def _left(self, row: str) -> list[tuple[int, Case]]:
    """The cases that the row lacks, with their numbers."""
    return [
      (i, case)
      for i, case in enumerate(self.cases)
      if not self.journal.has(row, case_name(case))
    ]

  def _watched(
    self, row: str, truths: Iterable[Truth] | None = None
  ) -> Iterator[tuple[Case, Truth]]:
    """Gives the cases that a row lacks, under a bar with the time that is left.

    Args:
      row: of the journal.
      truths: of these cases; those of the journal by default.
    """
    left = self._left(row)
    if truths is None:
      truths = (self.truth(case) for _, case in left)
    with _bar(row, len(left)) as bar:
      for (_, case), truth in zip(left, truths):
        yield case, truth
        bar.update()

  def _rendered(self, cases: Sequence[Case]) -> Iterator[Truth]:
    """Renders as many frames of each case as the model makes of its audio."""
    settings = self._settings
    truths = clips.perform_all(cases, settings.image_size, settings.frame_step)
    for truth in truths if cases else ():
      yield truth.first(settings.count_frames(truth.audio))

  def _read(
    self,
    row: str,
    case: Case,
    truth: Truth,
    frames: np.ndarray,
    keep: bool = False,
    **facts: float,
  ) -> None:
    """Lets the judges read frames that a model drew, and finishes the clip.

    Args:
      row: of the journal.
      case: the case.
      truth: its truth.
      frames: uint8 [N,H,W,3].
      keep: whether they go into the journal.
      **facts: go there too.
    """
    reading = self._judges.read(frames, truth.box)
    more = {'frames': frames} if keep else {}
    facts['psnr'] = clips.psnr(frames, truth.frames)
    self._finish(row, case, reading, more, **facts)

  def _finish(
    self,
    row: str,
    case: Case,
    reading: Reading,
    more: Arrays | None = None,
    **facts: float,
  ) -> None:
    self.journal.add(
      row,
      case_name(case),
      vars(reading) | (more or {}),
      asked=case.emotion,
      level=case.level,
      recognised=reading.recognised,
      **facts,
    )

  def _generated(
    self, left: Sequence[tuple[int, Case]], batch: int, seed: int
  ) -> Iterator[tuple[Case, np.ndarray]]:
    """Yields cases with their generated frames."""
    pipe = self._pipeline()
    for group in self._batches(pipe, left, batch):
      # 1. A group that is not full repeats its last clip: one program serves all.
      whole = [*group, *[group[-1]] * (batch - len(group))]
      single, lengths = zip(*(self._conditions(pipe, case) for _, case in whole))
      keys = [jax.random.key(clip_seed(seed, number)) for number, _ in whole]

      # 2. Sample together, decode one by one.
      latents = pipe.sample(join_conditions(single), lengths, jnp.stack(keys))
      for (_, case), z, length in zip(group, np.asarray(latents), lengths):
        yield case, pipe.decode(z, length)

  def _batches(
    self, pipe: Pipeline, left: Sequence[tuple[int, Case]], batch: int
  ) -> Iterator[list[tuple[int, Case]]]:
    """Groups clips of one bucket, see `ConditionEncoder.bucket`."""
    groups: dict[int, list[tuple[int, Case]]] = {}
    for number, case in left:
      bucket = pipe.encoder.bucket(len(self.truth(case).frames))
      group = groups.setdefault(bucket, [])
      group.append((number, case))
      if len(group) == batch:
        yield groups.pop(bucket)
    yield from groups.values()

  def _conditions(self, pipe: Pipeline, case: Case) -> tuple[Conditions, int]:
    """The conditions of a case, and the number of frames."""
    image, box = case.portrait()
    left, top, right, bottom = box * len(image)
    job = pipe.job(
      image,
      self.truth(case).audio,
      case.prior,
      face_box=(left, top, right - left, bottom - top),
      interpolate=False,
    )
    return pipe.conditions(job)


def true_sample(journal: Journal, case: Case, person: int) -> Sample:
  """A finished true clip, as `sanity_rows` takes it.

  Args:
    journal: it has the truth of the case.
    case: the case.
    person: index in the gallery.
  """
  truth = Truth(**journal.arrays(RENDERING, case_name(case)))
  return Sample(
    case=case,
    frames=truth.frames,
    box=truth.box,
    pose=truth.pose,
    reading=read_of(journal, TRUTH, case),
    opening=truth.opening,
    closed=truth.closed,
    asked=case.emotion,
    person=person,
  )


def read_of(journal: Journal, row: str, case: Case) -> Reading:
  """What the judges read of a finished clip."""
  names = [field.name for field in dataclasses.fields(Reading)]
  return Reading(**journal.arrays(row, case_name(case), *names))


def clip_seed(seed: int, number: int) -> int:
  """The seed of a clip, as `python -m dicetalk_jax.generate --seed` takes it.

  Args:
    seed: of the table.
    number: of the clip in the table; more people leave it as it is.
  """
  return 1_000_000 * seed + number


def seam_of(frames: np.ndarray, sampler: SamplerConfig) -> float:
  """How much frames jump at the window borders of the last step.

  NaN where a clip holds no two windows.
  """
  window = sampler.frames - sampler.overlap
  modulus = sampler.frames if sampler.padding else None
  shift = int(windows.shifts(sampler.steps_run, sampler.shift, modulus)[-1])
  first = -shift % window
  if len(frames) - first <= window or window < 2:
    return float('nan')
  return clip_scores.seam(frames[first:], window)


def _bar(row: str, total: int) -> tqdm:
  return tqdm(total=total, desc=row, unit='clip', mininterval=1, disable=not total)
