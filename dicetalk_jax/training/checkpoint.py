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
  """Returns whether there is a checkpoint to restore.

  Only looks, while opening `Checkpoints` cleans up after killed runs.
  """
  folder = epath.Path(folder)
  return folder.exists() and any(path.name.isdigit() for path in folder.iterdir())


class Checkpoints:
  """State and data position of one run, by step.

  Use as a context: leaving it waits for the last save. A checkpoint appears under its
  final name only when it is complete, so a killed run leaves the previous one.
  """

  def __init__(self, folder: epath.Path, keep: int = 2):
    """Opens or creates `folder`; the latest `keep` checkpoints are kept."""
    handlers = ocp.handlers.local_registry()
    # One data position for all processes.
    handlers.add(ocp.handlers.JsonHandler, checkpointable_name='data')
    context = ocp.Context()
    context.checkpointables.registry = handlers
    self._folder = epath.Path(folder)
    self._orbax = ocp.training.Checkpointer(
      orbax_paths.plain(self._folder),
      context=context,
      preservation_policy=keep_policies.LatestN(keep),
      # The loop decides when to save.
      save_decision_policy=save_policies.FixedIntervalPolicy(1),
      cleanup_tmp_directories=True,
    )

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *exc_info) -> None:
    self._orbax.close()

  @property
  def steps(self) -> list[int]:
    """Steps that can be restored, oldest first."""
    return [checkpoint.step for checkpoint in self._orbax.checkpoints]

  @property
  def latest(self) -> int | None:
    """The latest of `steps`."""
    return max(self.steps, default=None)

  def save(self, step: int, state: TrainState, data: grain.DatasetIterator) -> None:
    """Copies state and data position now, and writes them in the background.

    All processes call it together. The position must be the same on all of them, as
    that of the loaders in `dicetalk_jax.data` is.
    """
    position = copy.deepcopy(data.get_state())
    self._orbax.save_checkpointables_async(step, dict(state=state, data=position))

  def restore(
    self, target: TrainState, data: grain.DatasetIterator, step: int | None = None
  ) -> TrainState:
    """Restores a state, and sets `data` to its saved position in place.

    Mesh and number of processes may differ from those that saved.

    Args:
      target: abstract arrays of the state, with shardings.
      data: an iterator over the same batches.
      step: of the checkpoint; default the latest.
    """
    step = self.latest if step is None else step
    orbax_paths.mend(self._folder / str(step))
    restored = self._orbax.load_checkpointables(step, dict(state=target, data=None))
    data.set_state(restored['data'])
    return restored['state']
