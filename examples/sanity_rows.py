"""Do the judges notice what is wrong? `python -m examples.sanity_rows`.

True clips are spoilt in one way each. Every score of every row has limits: what the
spoiling breaks must fall, and what it leaves alone must stay.
"""

from collections.abc import Callable, Sequence
import dataclasses

import numpy as np
from scipy import ndimage

from data_pipelines.synthetic import phonemes
from data_pipelines.synthetic.clip import make_clip, make_portrait
from data_pipelines.synthetic.projection import Pose
from dicetalk_jax import cli
from dicetalk_jax.data.clip_record import EMOTIONS, FPS
from dicetalk_jax.errors import InputError
from dicetalk_jax.metrics.clip_scores import ClipScores, score_clip, summarise
from dicetalk_jax.metrics.face_distance import FaceSpace
from dicetalk_jax.metrics.judges import Judges, Reading
from examples.demo_data import SECONDS, SHARD, SIZE, Case, cases

EVERY = 2  # frames: 12.5 per second, as the models generate
LATE = 3  # frames
BLUR = 1.5  # standard deviation in pixels

_TOUCHING = [phonemes.INDEX[name] for name in ('P', 'B', 'M')]


@dataclasses.dataclass(frozen=True)
class Sample:
  """A true or spoilt clip, and what it is held against.

  Attributes:
    case: who says what and how.
    frames: uint8 [N,S,S,3].
    box: [4] outline of the face.
    pose: [N,5] of the head.
    reading: what the judges see.
    opening: [N] of the mouth, as the audio asks for.
    closed: bool [N], frames in which lips must touch.
    asked: emotion.
    person: index in the gallery.
  """

  case: Case
  frames: np.ndarray
  box: np.ndarray
  pose: np.ndarray
  reading: Reading
  opening: np.ndarray
  closed: np.ndarray
  asked: str
  person: int


Spoil = Callable[[Sequence[Sample], Judges], list[Sample]]


def true_samples(
  judges: Judges, people: int, shown: Sequence[str] = EMOTIONS
) -> tuple[list[Sample], np.ndarray]:
  """Renders and reads unseen people in some emotions, at the strongest level.

  Returns:
    The clips, person by person, and the gallery: the people as neutral portraits show
    them, [people,64].
  """
  chosen = [case for case in cases(people) if case.emotion in shown]
  identities = list(dict.fromkeys(case.identity for case in chosen))
  portraits = [make_portrait(i, SIZE, zoom=SHARD.zoom) for i in identities]
  gallery = [judges.read(image[None], box).embedding for image, box in portraits]
  samples = []
  for case in chosen:
    clip = make_clip(
      case.identity,
      case.emotion,
      case.level,
      case.sentence,
      size=SIZE,
      motion=SHARD.motion,
      articulation=SHARD.articulation,
      zoom=SHARD.zoom,
      max_seconds=SECONDS,
      every=EVERY,
    )
    samples.append(
      Sample(
        case=case,
        frames=clip.frames,
        box=clip.bbox.mean(0),
        pose=clip.pose,
        reading=judges.read(clip.frames, clip.bbox),
        opening=clip.opening,
        closed=np.isin(clip.phoneme, _TOUCHING),
        asked=case.emotion,
        person=identities.index(case.identity),
      )
    )
  return samples, np.stack(gallery)


def other_sentence(samples: Sequence[Sample], judges: Judges) -> list[Sample]:
  """The audio of the next person's sentence."""
  people = len({sample.person for sample in samples})
  step = len(samples) // people
  spoilt = []
  for i, sample in enumerate(samples):
    other = samples[(i + step) % len(samples)]
    n = min(len(sample.opening), len(other.opening))
    spoilt.append(
      dataclasses.replace(
        sample,
        reading=sample.reading.part(slice(n)),
        opening=other.opening[:n],
        closed=other.closed[:n],
      )
    )
  return spoilt


def late(samples: Sequence[Sample], judges: Judges) -> list[Sample]:
  """Lips that come `LATE` frames after the audio."""
  return [
    dataclasses.replace(
      sample,
      reading=sample.reading.part(slice(-LATE)),
      opening=sample.opening[LATE:],
      closed=sample.closed[LATE:],
    )
    for sample in samples
  ]


def wrong_emotion(samples: Sequence[Sample], judges: Judges) -> list[Sample]:
  """Another emotion was asked for than is shown."""
  after = dict(zip(EMOTIONS, (*EMOTIONS[1:], EMOTIONS[0])))
  return [dataclasses.replace(s, asked=after[s.asked]) for s in samples]


def still_mouth(samples: Sequence[Sample], judges: Judges) -> list[Sample]:
  """The head moves, the face shows the emotion, and nobody speaks."""
  spoilt = []
  for sample in samples:
    case = sample.case
    frames = [
      make_portrait(
        case.identity, SIZE, case.emotion, case.level, SHARD.zoom, Pose(*pose)
      )[0]
      for pose in sample.pose.tolist()
    ]
    reading = judges.read(np.stack(frames), sample.box)
    spoilt.append(dataclasses.replace(sample, reading=reading))
  return spoilt


def still_image(samples: Sequence[Sample], judges: Judges) -> list[Sample]:
  """One frame of the clip all the time."""
  return [
    dataclasses.replace(
      s, reading=s.reading.part([len(s.opening) // 2] * len(s.opening))
    )
    for s in samples
  ]


def other_person(samples: Sequence[Sample], judges: Judges) -> list[Sample]:
  """The next person was asked for."""
  people = len({sample.person for sample in samples})
  return [dataclasses.replace(s, person=(s.person + 1) % people) for s in samples]


def blur(samples: Sequence[Sample], judges: Judges) -> list[Sample]:
  """Frames without detail."""
  spoilt = []
  for sample in samples:
    frames = ndimage.gaussian_filter(sample.frames, (0, BLUR, BLUR, 0))
    reading = judges.read(frames, sample.box)
    spoilt.append(dataclasses.replace(sample, reading=reading))
  return spoilt


ROWS: dict[str, Spoil] = {
  'truth': lambda samples, judges: list(samples),
  'other sentence': other_sentence,
  f'{LATE} frames late': late,
  'wrong emotion': wrong_emotion,
  'still mouth': still_mouth,
  'still image': still_image,
  'other person': other_person,
  'blur': blur,
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
  true_features, features = _features(truth), _features(samples)
  space = FaceSpace.fit(true_features)
  values = {name: means[name] for name in ('emotion', 'sync')}
  values['offset'] = float(np.mean([score.sync.offset for score in scores]))
  values['closure'] = means['closure']
  values['nearest'] = float(np.mean([score.identity_right for score in scores]))
  values['passed'] = means['passed']
  values['all_right'] = means['all_right']
  values['distance'] = space.distance(true_features, features).distance
  return values, scores


def floor(truth: Sequence[Sample]) -> float:
  """The distance of one half of the true clips from the other."""
  features = _features(truth)
  clips = np.repeat(np.arange(len(truth)), [len(s.opening) for s in truth])
  return FaceSpace.fit(features).floor(features, clips).distance


def _features(samples: Sequence[Sample]) -> np.ndarray:
  return np.concatenate([sample.reading.features for sample in samples])


def main() -> None:
  """Prints the table."""
  parser = cli.OptionParser(
    prog='python -m examples.sanity_rows',
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
  for name, spoil in ROWS.items():
    values, _ = measure(spoil(truth, judges), truth, gallery)
    if name == 'truth':
      print(f'\n| row | {" | ".join(values)} |')
      print('| --- |' + ' --- |' * len(values))
    cells = ' | '.join(f'{value:.2f}' for value in values.values())
    print(f'| {name} | {cells} |', flush=True)
  print(f'\ndistance of two halves of the truth: {floor(truth):.3f}')


if __name__ == '__main__':
  with cli.console():
    main()
