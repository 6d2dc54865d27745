"""Which synthetic clips a data set consists of, and how one becomes a record.

Everything is a function of the settings alone. No import of TFDS, so that rendering
processes start fast.
"""

import dataclasses
import hashlib
import json
from typing import Any
import zlib

import numpy as np

from data_pipelines.synthetic import phonemes, speech
from data_pipelines.synthetic.clip import make_clip
from dicetalk_jax.data import clip_record
from dicetalk_jax.errors import ConfigError

# Each split has people and sentences of its own. People are numbered from far apart, so
# that a larger training split leaves validation and test as they were; sentences are
# dealt out by a hash of their words, in tenths.
_FIRST_IDENTITY = {'train': 0, 'val': 1_000_000, 'test': 2_000_000}
_IDENTITIES_PER_SEED = 10_000_000
_SENTENCE_TENTHS = {'train': range(6), 'val': range(6, 8), 'test': range(8, 10)}
# of speech: a window of 25 frames at step 2 fits; longer is too rare among the
# sentences
_LEAST_SECONDS = 2.0
_SILENCE = 0.25  # around each sentence, at least
_SHORTEST = 0.85  # least factor that the synthesiser draws for the length of a phoneme


@dataclasses.dataclass(frozen=True)
class SyntheticConfig:
  """What is generated.

  Attributes:
    size: side of the picture in pixels.
    train, val, test: number of people of each split.
    clips: clips per person. They go round the eight emotions, at the next level each
      time round.
    seconds: longest clip; a shorter sentence ends its clip, but none is shorter than 2
      s (or `seconds`, if less).
    levels: emotion levels in use.
    motion: strength of head motion, 1 = natural.
    articulation: how far speech opens the mouth, 1 = natural.
    zoom: of the camera: 1 shows head and shoulders, 1.25 the head alone.
    drift: slow errors of the face tracker; 1 is as much as the strongest expression.
    seed: another seed gives other people and sentences.
    content: which blocks the records carry, see `record.RecordSpec`.
  """

  size: int = 64
  train: int = 16
  val: int = 4
  test: int = 4
  clips: int = 24
  seconds: float = 2.4
  levels: tuple[int, ...] = clip_record.LEVELS
  motion: float = 1.0
  articulation: float = 1.0
  zoom: float = 1.0
  drift: float = 0.0
  seed: int = 0
  content: str = 'full'

  def __post_init__(self):
    people = range(_FIRST_IDENTITY['val'] + 1)
    for name, (good, choice) in {
      'size': (16 <= self.size <= 1024, '16 to 1024'),
      'train': (self.train in people[1:], f'1 to {people[-1]}'),
      'val': (self.val in people, f'0 to {people[-1]}'),
      'test': (self.test in people, f'0 to {people[-1]}'),
      'clips': (self.clips > 0, '1 or more'),
      'seconds': (0.2 <= self.seconds <= 20, '0.2 to 20'),
      'levels': (
        self.levels and set(self.levels) <= set(clip_record.LEVELS),
        'some of 1, 2, 3',
      ),
      'motion': (0 <= self.motion <= 3, '0 to 3'),
      'articulation': (0 <= self.articulation <= 3, '0 to 3'),
      'zoom': (1 <= self.zoom <= 1.5, '1 to 1.5'),
      'drift': (0 <= self.drift <= 1, '0 to 1'),
      'seed': (0 <= self.seed < 200, '0 to 199'),
    }.items():
      if not good:
        raise ConfigError(
          f'{name}={getattr(self, name)} cannot be generated; choose {choice}'
        )
    # One data set, one name: 2 and 2.0, or (1, 3) and (3, 1), are the same.
    for name in ('seconds', 'motion', 'articulation', 'zoom', 'drift'):
      object.__setattr__(self, name, float(getattr(self, name)))
    object.__setattr__(self, 'levels', tuple(sorted(set(self.levels))))

  @property
  def spec(self) -> clip_record.RecordSpec:
    return clip_record.RecordSpec(self.content)

  @property
  def name(self) -> str:
    """Readable, and different for different settings."""
    digest = hashlib.sha256(
      json.dumps(dataclasses.asdict(self), sort_keys=True).encode()
    ).hexdigest()[:8]
    return f'{self.content}_{self.size}px_{self.train}x{self.clips}_{digest}'

  @property
  def splits(self) -> dict[str, int]:
    """Number of people of the splits that are not empty."""
    return {
      split: n for split in ('train', 'val', 'test') if (n := getattr(self, split))
    }


# What the presets 'tiny' of `configs/` train on.
TINY = SyntheticConfig(
  size=64,
  train=64,
  val=4,
  test=1,
  clips=8,
  seconds=1.2,
  levels=(2, 3),
  motion=0.15,
  articulation=2.0,
  zoom=1.2,
)


@dataclasses.dataclass(frozen=True)
class Job:
  """One clip to be rendered."""

  config: SyntheticConfig
  split: str
  identity: int
  take: int

  @property
  def emotion(self) -> str:
    return clip_record.EMOTIONS[self.take % len(clip_record.EMOTIONS)]

  @property
  def level(self) -> int:
    levels, turn = self.config.levels, self.take // len(clip_record.EMOTIONS)
    return (
      levels[(turn + self.identity) % len(levels)] if self.emotion != 'neutral' else 1
    )

  @property
  def key(self) -> str:
    return f'{self.identity:08d}_{self.take:03d}_{self.emotion}_{self.level}'

  def sentence(self) -> int:
    """Seed of a random sentence of this split that lasts long enough however fast it
    is said.
    """
    rng = np.random.default_rng([self.identity, self.take])
    fastest = max(1.0, speech.prosody(self.emotion, 1.0).rate)
    while True:
      seed = int(rng.integers(2**31))
      words = phonemes.sentence(seed)
      least = (
        sum(ms for _, ms in phonemes.pronounce(words)) / 1000 * _SHORTEST / fastest
        + _SILENCE
      )
      ours = (
        zlib.crc32(phonemes.text(words).encode()) % 10 in _SENTENCE_TENTHS[self.split]
      )
      if ours and least >= min(self.config.seconds, _LEAST_SECONDS):
        return seed


def jobs(config: SyntheticConfig, split: str) -> list[Job]:
  """All clips of a split."""
  first = config.seed * _IDENTITIES_PER_SEED + _FIRST_IDENTITY[split]
  return [
    Job(config, split, identity, take)
    for identity in range(first, first + config.splits[split])
    for take in range(config.clips)
  ]


def render(job: Job) -> tuple[str, dict[str, Any]]:
  """Renders one clip: (key, record)."""
  config = job.config
  clip = make_clip(
    job.identity,
    job.emotion,
    job.level,
    job.sentence(),
    size=config.size,
    take=job.take,
    motion=config.motion,
    articulation=config.articulation,
    zoom=config.zoom,
    drift=config.drift,
    max_seconds=config.seconds,
    render=config.content == 'full',
  )
  return job.key, clip_record.encode_example(
    config.spec,
    clip_id=job.key,
    identity=f'synthetic/{job.identity:08d}',
    dataset='synthetic',
    num_frames=len(clip.expression),
    emotion=job.emotion,
    intensity=job.level,
    text=clip.text,
    frames=clip.frames,
    audio=clip.audio,
    expression=clip.expression,
    bbox=clip.bbox,
    opening=clip.opening,
    landmarks=clip.landmarks,
    phoneme=clip.phoneme,
  )
