"""Checkpoints of a run.

The only file of the training package that knows Orbax's training interface.
"""

import copy

from etils import epath
import grain
from orbax.checkpoint import v1 as ocp

from dicetalk_jax import orbax_paths
from dicetalk_jax.training.state import TrainState

save_policies = ocp.training.save_decision_policies
keep_policies = ocp.training.preservation_policies


def has_checkpoint(folder: epath.Path) -> bool:
  """Whether there is one to restore.

  Only looks; opening `Checkpoints` tidies up after killed runs.
  """
  folder = epath.Path(folder)
  return folder.exists() and any(path.name.isdigit() for path in folder.iterdir())


class Checkpoints:
  """State and data position of one run, by step.

  Use as a context: leaving it waits for the last save.

  A checkpoint appears under its final name only when it is whole, so a killed run
  leaves the previous one.
  """

  def __init__(self, folder: epath.Path, keep: int = 2):
    """Opens or creates `folder`; the latest `keep` checkpoints are kept."""
    handlers = ocp.handlers.local_registry()
    handlers.add(
      ocp.handlers.JsonHandler, checkpointable_name='data'
    )  # one position for all processes
    context = ocp.Context()
    context.checkpointables.registry = handlers
    self._folder = epath.Path(folder)
    self._orbax = ocp.training.Checkpointer(
      orbax_paths.plain(self._folder),
      context=context,
      preservation_policy=keep_policies.LatestN(keep),
      save_decision_policy=save_policies.FixedIntervalPolicy(
        1
      ),  # the loop decides when
      cleanup_tmp_directories=True,
    )

  def __enter__(self):
    return self

  def __exit__(self, *exc_info):
    self._orbax.close()

  @property
  def steps(self) -> list[int]:
    """Steps that can be restored, oldest first."""
    return [checkpoint.step for checkpoint in self._orbax.checkpoints]

  @property
  def latest(self) -> int | None:
    return max(self.steps, default=None)

  def save(self, step: int, state: TrainState, data: grain.DatasetIterator) -> None:
    """Copies state and data position now, writes them in the background.

    All processes call it together.

    The position must be the same on all of them, as that of
    `dicetalk_jax.data` is.
    """
    self._orbax.save_checkpointables_async(
      step, dict(state=state, data=copy.deepcopy(data.get_state()))
    )

  def restore(
    self, target: TrainState, data: grain.DatasetIterator, step: int | None = None
  ) -> TrainState:
    """The state of `step` (default the latest) as `target` says: abstract arrays, with
    shardings.

    Mesh and number of processes may differ from those that saved. `data` is set to its
    saved position in place.
    """
    step = self.latest if step is None else step
    orbax_paths.mend(self._folder / str(step))
    restored = self._orbax.load_checkpointables(step, dict(state=target, data=None))
    data.set_state(restored['data'])
    return restored['state']
