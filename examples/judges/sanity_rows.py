"""True clips, and the same clips spoilt in one way each, as the judges read them.

They show what a score means: what a spoiling breaks must fall, see `sanity_table`.
"""

from collections.abc import Callable, Sequence
import dataclasses

import numpy as np
from scipy import ndimage

from data_pipelines.synthetic.clip import make_clip, make_portrait
from data_pipelines.synthetic.projection import Pose
from dicetalk_jax.data.clip_record import EMOTIONS
from dicetalk_jax.metrics.judges import Judges, Reading
from examples.demo_data import SECONDS, SHARD, SIZE, Case, cases

EVERY = 2  # frames: 12.5 per second, as the models generate
LATE = 3  # frames
BLUR = 1.5  # standard deviation in pixels


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
  samples = [
    _perform(judges, case, person=identities.index(case.identity)) for case in chosen
  ]
  return samples, np.stack(gallery)


def _perform(judges: Judges, case: Case, person: int, take: int = 0) -> Sample:
  clip = make_clip(
    case.identity,
    case.emotion,
    case.level,
    case.sentence,
    size=SIZE,
    take=take,
    motion=SHARD.motion,
    articulation=SHARD.articulation,
    zoom=SHARD.zoom,
    max_seconds=SECONDS,
    every=EVERY,
  )
  return Sample(
    case=case,
    frames=clip.frames,
    box=clip.bbox.mean(0),
    pose=clip.pose,
    reading=judges.read(clip.frames, clip.bbox),
    opening=clip.opening,
    closed=clip.lips_touch,
    asked=case.emotion,
    person=person,
  )


def another_take(samples: Sequence[Sample], judges: Judges) -> list[Sample]:
  """True clips again: the same people, words and emotions in another performance.

  Nothing breaks, and the distance is what chance alone gives.
  """
  return [_perform(judges, sample.case, sample.person, take=1) for sample in samples]


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
  'another take': another_take,
  'other sentence': other_sentence,
  '3 frames late': late,
  'wrong emotion': wrong_emotion,
  'still mouth': still_mouth,
  'still image': still_image,
  'other person': other_person,
  'blur': blur,
}
