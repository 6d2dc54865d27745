"""How well the judges read faces of people whom they have not seen."""

import numpy as np

from dicetalk_jax.data.clip_record import EMOTIONS
from dicetalk_jax.metrics.judges import Judges
from examples.judges.rendered_faces import Faces


def held_out(judges: Judges, faces: Faces) -> dict[str, float]:
  """Reads whole clips and compares with the truth.

  Returns:
    emotion_level_<n>: share of clips whose emotion is recognised, 0 is neutral;
      emotion_strong of levels 2 and 3; frame_level_<n> of single frames.
    <measure>_r: correlation with the truth. That of the mouth opening is within a clip:
      the median, and the lowest tenth; that of the others over all frames.
    nearest: share of clips whose person is the nearest one, to the mean over all clips
      of the person but this one.
    same, different: mean cosine of two clips of one person, of two people.
  """
  numbers, first = np.unique(faces.clip, return_index=True)
  reading = judges.read_features(
    faces.expression.astype(np.float32), faces.identity.astype(np.float32)
  )
  clips = [reading.part(faces.clip == number) for number in numbers]
  emotion, level, person = (
    label[first] for label in (faces.emotion, faces.level, faces.person)
  )
  scores = {}

  # 1. Emotions, by clip and by frame.
  right = np.array([EMOTIONS.index(clip.recognised) for clip in clips]) == emotion
  frames_right = reading.emotion.argmax(1) == faces.emotion
  for n in range(4):
    scores[f'emotion_level_{n}'] = right[level == n].mean()
    scores[f'frame_level_{n}'] = frames_right[faces.level == n].mean()
  scores['emotion_strong'] = right[level >= 2].mean()

  # 2. Measures.
  by_clip = [
    np.corrcoef(clip.opening, faces.measures[faces.clip == number, 1])[0, 1]
    for clip, number in zip(clips, numbers)
  ]
  scores['opening_r'] = np.median(by_clip)
  scores['opening_r_tenth'] = np.quantile(by_clip, 0.1)
  scores['opening_error'] = np.abs(reading.opening - faces.measures[:, 1]).mean()
  for column, name in ((0, 'strength'), (2, 'jaw'), (3, 'width')):
    seen = getattr(reading, name)
    scores[f'{name}_r'] = np.corrcoef(seen, faces.measures[:, column])[0, 1]

  # 3. Identity.
  embeddings = np.stack([clip.embedding for clip in clips])
  same = person[:, None] == person
  other = ~np.eye(len(person), dtype=bool)
  cosines = embeddings @ embeddings.T
  scores['same'] = cosines[same & other].mean()
  scores['different'] = cosines[~same].mean()
  people = np.unique(person)
  to_person = np.stack(
    [
      [_unit(embeddings[(person == p) & other[i]].mean(0)) @ own for p in people]
      for i, own in enumerate(embeddings)
    ]
  )
  scores['nearest'] = (people[to_person.argmax(1)] == person).mean()
  return {name: round(float(score), 4) for name, score in scores.items()}


def _unit(x: np.ndarray) -> np.ndarray:
  return x / np.linalg.norm(x)
