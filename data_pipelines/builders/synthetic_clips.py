"""The clips of a synthetic data set, and how one becomes a record.

Everything is a function of the settings alone. This module does not import TFDS, so
that rendering processes start fast.
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

# Each split has people and sentences of its own. The numbers of people are far apart,
# so that a larger training split leaves validation and test unchanged. Sentences belong
# to a split by a hash of their words, in tenths.
_FIRST_IDENTITY = {'train': 0, 'val': 1_000_000, 'test': 2_000_000}
_IDENTITIES_PER_SEED = 10_000_000
_SENTENCE_TENTHS = {'train': range(6), 'val': range(6, 8), 'test': range(8, 10)}
# Speech of this length fits a window of 25 frames at step 2. Longer sentences are rare.
_LEAST_SECONDS = 2.0
_SILENCE = 0.25  # seconds around each sentence, at least
_SHORTEST = 0.85  # smallest factor that the synthesiser applies to a phoneme's length


@dataclasses.dataclass(frozen=True)
class SyntheticConfig:
  """Settings of a synthetic data set.

  Attributes:
    size: side of the frames in pixels.
    train, val, test: number of people of each split.
    clips: clips per person. They cycle through the eight emotions, each time at the
      next level.
    seconds: longest clip. A shorter sentence ends its clip, but no clip is shorter than
      2 s (or `seconds`, if less).
    levels: emotion levels in use.
    motion: strength of head motion, 1 = natural.
    articulation: how far speech opens the mouth, 1 = natural.
    zoom: of the camera: 1 shows head and shoulders, 1.25 the head alone.
    drift: slow errors of the face tracker; 1 is as much as the strongest expression.
    seed: another seed gives other people and sentences.
    content: blocks that the records carry, see `clip_record.RecordSpec`.
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
    most = _FIRST_IDENTITY['val']  # people
    known_levels = set(clip_record.LEVELS)
    checks = {
      'size': (16 <= self.size <= 1024, '16 to 1024'),
      'train': (1 <= self.train <= most, f'1 to {most}'),
      'val': (0 <= self.val <= most, f'0 to {most}'),
      'test': (0 <= self.test <= most, f'0 to {most}'),
      'clips': (self.clips > 0, '1 or more'),
      'seconds': (0.2 <= self.seconds <= 20, '0.2 to 20'),
      'levels': (
        self.levels and set(self.levels) <= known_levels,
        'some of 1, 2, 3',
      ),
      'motion': (0 <= self.motion <= 3, '0 to 3'),
      'articulation': (0 <= self.articulation <= 3, '0 to 3'),
      'zoom': (1 <= self.zoom <= 1.5, '1 to 1.5'),
      'drift': (0 <= self.drift <= 1, '0 to 1'),
      'seed': (0 <= self.seed < 200, '0 to 199'),
    }
    for name, (valid, choice) in checks.items():
      if not valid:
        raise ConfigError(
          f'{name}={getattr(self, name)} cannot be generated; choose {choice}'
        )
    # 2 and 2.0, or (1, 3) and (3, 1), mean the same data set, so it has one name.
    for name in ('seconds', 'motion', 'articulation', 'zoom', 'drift'):
      object.__setattr__(self, name, float(getattr(self, name)))
    object.__setattr__(self, 'levels', tuple(sorted(set(self.levels))))

  @property
  def spec(self) -> clip_record.RecordSpec:
    return clip_record.RecordSpec(self.content)

  @property
  def name(self) -> str:
    """Name of the data set: readable, and different for different settings."""
    settings = json.dumps(dataclasses.asdict(self), sort_keys=True)
    digest = hashlib.sha256(settings.encode()).hexdigest()[:8]
    return f'{self.content}_{self.size}px_{self.train}x{self.clips}_{digest}'

  @property
  def splits(self) -> dict[str, int]:
    """Number of people of each split, without empty splits."""
    people = {'train': self.train, 'val': self.val, 'test': self.test}
    return {split: count for split, count in people.items() if count}


# The data set of the presets 'tiny' in `configs/`.
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
    if self.emotion == 'neutral':
      return 1
    levels = self.config.levels
    cycle = self.take // len(clip_record.EMOTIONS)
    return levels[(cycle + self.identity) % len(levels)]

  @property
  def key(self) -> str:
    return f'{self.identity:08d}_{self.take:03d}_{self.emotion}_{self.level}'

  def sentence(self) -> int:
    """Draws a sentence of this split, and returns its seed.

    The sentence is long enough even if it is said as fast as possible.
    """
    rng = np.random.default_rng([self.identity, self.take])
    fastest = max(1.0, speech.prosody(self.emotion, 1.0).rate)
    while True:
      seed = int(rng.integers(2**31))
      words = phonemes.sentence(seed)
      spoken = sum(ms for _, ms in phonemes.pronounce(words)) / 1000
      shortest = spoken * _SHORTEST / fastest + _SILENCE
      tenth = zlib.crc32(phonemes.text(words).encode()) % 10
      if tenth in _SENTENCE_TENTHS[self.split] and shortest >= min(
        self.config.seconds, _LEAST_SECONDS
      ):
        return seed


def jobs(config: SyntheticConfig, split: str) -> list[Job]:
  """Lists all clips of a split."""
  first = config.seed * _IDENTITIES_PER_SEED + _FIRST_IDENTITY[split]
  return [
    Job(config, split, identity, take)
    for identity in range(first, first + config.splits[split])
    for take in range(config.clips)
  ]


def render(job: Job) -> tuple[str, dict[str, Any]]:
  """Renders one clip, and returns (key, record)."""
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
