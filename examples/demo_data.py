"""What the demo model learns from, and what it is judged on.

Everything is rendered: people, voices and sentences of the training set, of the judges'
training set and of the test cases are different ones.
"""

from collections.abc import Iterator
import dataclasses

from data_pipelines.builders.synthetic_clips import SyntheticConfig, jobs
from data_pipelines.synthetic.clip import Clip, make_clip, make_portrait

SIZE = 64  # side of the frames in pixels
SECONDS = 2.4  # of a test case
STRONGEST = 3  # level of emotions

# One shard of the training set. Shards differ by their seed, so in people and words.
SHARD = SyntheticConfig(
  size=SIZE,
  train=128,
  val=2,
  test=0,
  clips=8,
  seconds=1.2,
  levels=(1, 2, 3),
  motion=0.3,
  articulation=2.0,
  zoom=1.2,
)
# Seeds of people that nothing but the judges sees.
JUDGES_SEED = 100


@dataclasses.dataclass(frozen=True)
class Case:
  """An unseen person who says an unseen sentence in an emotion.

  Attributes:
    identity: seed of the person.
    sentence: seed of the words.
    emotion: one of the eight emotions.
    level: intensity 1, 2 or 3; neutral has none.
  """

  identity: int
  sentence: int
  emotion: str
  level: int

  @property
  def prior(self) -> str:
    """The name of the emotion in a model folder."""
    return self.emotion if self.emotion == 'neutral' else f'{self.emotion}_{self.level}'

  def truth(self, size: int = SIZE) -> Clip:
    """Renders the clip as the data set would show it, at 25 frames per second."""
    return make_clip(
      self.identity,
      self.emotion,
      self.level,
      self.sentence,
      size=size,
      motion=SHARD.motion,
      articulation=SHARD.articulation,
      zoom=SHARD.zoom,
      max_seconds=SECONDS,
    )

  def portrait(self, size: int = 4 * SIZE):
    """The person's neutral portrait and the box of the face; see `make_portrait`."""
    return make_portrait(self.identity, size, zoom=SHARD.zoom)


def cases(people: int, levels: tuple[int, ...] = (STRONGEST,)) -> Iterator[Case]:
  """Every one of some unseen people in each of the eight emotions.

  Args:
    people: how many.
    levels: of the emotions; people take turns.
  """
  unseen = dataclasses.replace(SHARD, test=people, seconds=SECONDS)
  for job in jobs(unseen, 'test'):
    level = levels[(job.identity + job.take) % len(levels)]
    yield Case(job.identity, job.sentence(), job.emotion, level)
