"""Do the judges notice what is wrong? `python -m examples.judges.sanity_table`.

Every score of true and spoilt clips has limits: what a spoiling breaks must fall, and
what it leaves alone must stay. So the limits say what a score is worth.
"""

from collections.abc import Sequence
import sys

import numpy as np

from dicetalk_jax import cli
from dicetalk_jax.data.clip_record import FPS
from dicetalk_jax.errors import InputError
from dicetalk_jax.metrics.clip_scores import ClipScores, score_clip, summarise
from dicetalk_jax.metrics.face_distance import FaceSpace
from dicetalk_jax.metrics.judges import Judges
from examples.judges.sanity_rows import EVERY, LATE, ROWS, Sample, true_samples

# Lowest and highest mean of each score (see `measure`): of true clips, and of spoilt
# clips where that differs. There, and nowhere else, a score may move.
Limits = dict[str, tuple[float, float]]
TRUE: Limits = {
  'emotion': (0.95, 1),
  'sync': (0.93, 1),
  'offset': (-0.1, 0.1),
  'closure': (0.75, 1),
  'nearest': (0.9, 1),
  'passed': (0.9, 1),
  'all_right': (0.85, 1),
  'distance': (0, 0.01),
}
_FAILED: Limits = {'passed': (0, 0.1), 'all_right': (0, 0.1)}
_ANY_OFFSET: Limits = {'offset': (-5, 5)}  # unrelated lips have one by chance
BROKEN: dict[str, Limits] = {
  'truth': {},
  'another take': {},
  'other sentence': {
    'sync': (-0.3, 0.4),
    'closure': (0, 0.6),
    **_ANY_OFFSET,
    **_FAILED,
  },
  '3 frames late': {
    'sync': (-0.3, 0.3),
    'offset': (LATE - 0.1, LATE + 0.1),
    'closure': (0, 0.6),
    **_FAILED,
  },
  'wrong emotion': {'emotion': (0, 0.05), **_FAILED},
  'still mouth': {
    'sync': (-0.3, 0.3),
    'closure': (0, 1),  # a mouth that never opens is closed where it should be
    'distance': (0.02, 1),
    **_ANY_OFFSET,
    **_FAILED,
  },
  'still image': {
    'sync': (0, 0),
    'closure': (0, 0.7),
    'distance': (0.01, 1),
    **_FAILED,
  },
  'other person': {'nearest': (0, 0.1), 'all_right': (0, 0.1)},
  'blur': {'closure': (0.5, 1), 'sync': (0.85, 1), 'distance': (0.03, 1)},
}


def measure(
  samples: Sequence[Sample], truth: Sequence[Sample], gallery: np.ndarray
) -> tuple[dict[str, float], list[ClipScores]]:
  """Scores of one row.

  Args:
    samples: true or spoilt.
    truth: the same clips before.
    gallery: [people,64].

  Returns:
    Means over clips: emotion, sync, offset (in frames), closure, nearest (share of all
    clips whose person is recognised, speaking or not), passed and all_right (see
    `summarise`), and the distance of the faces from the truth. Then the scores of each
    clip.
  """
  scores = [
    score_clip(
      sample.reading,
      asked=sample.asked,
      opening=sample.opening,
      fps=FPS / EVERY,
      gallery=gallery,
      person=sample.person,
      level=sample.case.level,
      closed=sample.closed,
    )
    for sample in samples
  ]
  means = {name: estimate.mean for name, estimate in summarise(scores).items()}
  values = {name: means[name] for name in ('emotion', 'sync')}
  values['offset'] = float(np.mean([score.sync.offset for score in scores]))
  values['closure'] = means['closure']
  values['nearest'] = float(np.mean([score.identity_right for score in scores]))
  values['passed'] = means['passed']
  values['all_right'] = means['all_right']
  true_features = _features(truth)
  space = FaceSpace.fit(true_features)
  values['distance'] = space.distance(true_features, _features(samples)).distance
  return values, scores


def outside(row: str, values: dict[str, float]) -> list[str]:
  """The scores of a row that are not within their limits, in words."""
  limits = TRUE | BROKEN[row]
  return [
    f'{row}: {name} is {values[name]:.3f}, not {low} to {high}'
    for name, (low, high) in limits.items()
    if not low <= values[name] <= high
  ]


def _features(samples: Sequence[Sample]) -> np.ndarray:
  return np.concatenate([sample.reading.features for sample in samples])


def main() -> None:
  """Prints the table."""
  parser = cli.OptionParser(
    prog='python -m examples.judges.sanity_table',
    description='Spoils true clips in one way each, and shows what every score makes '
    'of it.',
  )
  parser.add_argument('--people', default=24, type=int, help='unseen people')
  flags = parser.parse_args()
  if flags.people < 2:
    raise InputError(f'--people={flags.people} has no other person; choose 2 or more')

  judges = Judges.load()
  truth, gallery = true_samples(judges, flags.people)
  print(f'judges {judges.fingerprint}, {len(truth)} clips of {flags.people} people')
  print('Bold scores have limits of their own, which follow.\n')
  print(f'| row | {" | ".join(TRUE)} |')
  print('| --- |' + ' --- |' * len(TRUE))
  cells = [f'{low:g} to {high:g}' for low, high in TRUE.values()]
  print(f'| limits of truth | {" | ".join(cells)} |')
  wrong = []
  for row, spoil in ROWS.items():
    values, _ = measure(spoil(truth, judges), truth, gallery)
    wrong += outside(row, values)
    cells = [f'{value:.3f}' for value in values.values()]
    for i, name in enumerate(values):
      if name in BROKEN[row]:
        low, high = BROKEN[row][name]
        cells[i] = f'**{cells[i]}** ({low:g} to {high:g})'
    print(f'| {row} | {" | ".join(cells)} |', flush=True)
  print()
  print('\n'.join(wrong) or 'Every score is within its limits.')
  sys.exit(1 if wrong else 0)


if __name__ == '__main__':
  with cli.console():
    main()
