"""A report of the demo with made-up scores, and the files that it names."""

import pathlib

import numpy as np

from examples.demo import files
from examples.demo.clips import EMOTIONS, Clip, Person
from examples.demo_data import Case

COUNT = 6  # frames


def made_person(identity: int) -> tuple[Person, list[Clip]]:
  """Colours that move in place of videos, 16 pixels wide."""
  ramp = np.arange(0, 256, 16, dtype=np.uint8)
  image = np.stack(np.broadcast_arrays(ramp[:, None], ramp, 60 * identity), axis=-1)
  image = image.astype(np.uint8)
  frames = np.stack([np.roll(image, 2 * i, axis=0) for i in range(COUNT)])

  cases = [Case(identity, 0, emotion, 3) for emotion in EMOTIONS]
  clips = [
    Clip(
      case=case,
      text='Say <b>"A & B"</b>.',
      audio=np.zeros(COUNT * 1280, np.float32),
      fps=12.5,
      videos=dict.fromkeys(('generated', 'truth', 'autoencoded'), frames),
      opening=np.linspace(0, 1, COUNT),
      face=np.array([0.2, 0.1, 0.8, 0.9]),
    )
    for case in cases
  ]
  return Person(identity, image, clips[0].face, cases), clips


def made_scores(right: bool) -> dict:
  return {
    'recognised': 'happy',
    'emotion_right': right,
    'strength': 0.9,
    'lip_sync': -0.25,
    'lip_sync_offset': 0.0,
    'identity_right': right,
    'identity_counts': right,
    'identity_similarity': 0.8,
  }


def made_report(folder: pathlib.Path, people: int = 2) -> dict:
  """Writes the files of some people into `folder`."""
  kinds = {'generated': False, 'truth': True, 'autoencoded': True}
  shown = []
  for number in range(people):
    person, clips = made_person(number)
    shown.append(
      {
        'name': f'Person {number}',
        'identity': number,
        'portrait': files.write_person(folder, str(number), person),
        'sheet': files.write_sheet(folder, str(number), clips),
        'clips': [
          {
            'emotion': clip.case.emotion,
            'prior': clip.case.prior,
            'sentence': clip.text,
            'files': files.write_clip(folder, f'{number}_{clip.case.emotion}', clip),
            'scores': {kind: made_scores(right) for kind, right in kinds.items()},
          }
          for clip in clips
        ],
      }
    )
  return {
    'model': 'my models/<i>one</i>',
    'folder': 'demo',
    'image_size': 16,
    'parameters': 1234567,
    'emotions': ['happy', 'happy_3'],
    'judges': '0123456789abcdef',
    'people_compared': 24,
    'seconds': {'generating': 1.5},
    'total_seconds': 61.4,
    'summary': {
      kind: {
        'clips': 8,
        'emotions_right': 5 + right,
        'lip_sync': -0.25,
        'identities_counted': 0,
        'identities_right': 0,
        'identity_similarity': 0.8,
      }
      for kind, right in kinds.items()
    },
    'people': shown,
  }
