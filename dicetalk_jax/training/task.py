"""The interface of a training task. One loop (`training/loop.py`) serves every task."""

import abc
import os
from typing import Any, ClassVar

from etils import epath
import grain
import jax
from jax.sharding import Mesh

from dicetalk_jax import model_references
from dicetalk_jax.errors import ConfigError
from dicetalk_jax.models.parameters import Params
from dicetalk_jax.training import lora
from dicetalk_jax.training.checkpoint import has_checkpoint
from dicetalk_jax.training.run_log import Picture
from dicetalk_jax.training.state import TrainState


class Task(abc.ABC):
  """A model with its loss, data and evaluation; the loop owns steps, optimizer, EMA and
  checkpoints.

  The loop calls `init` once, `batches` once, then `loss` (traced), `evaluate` and
  finally `export`. If several processes train together, all of them make the same
  calls.

  Everything random in `loss` comes from `key`, which derives from (seed, step);
  everything random in the data comes from the seed and the iterator's state. Nothing
  else may be random, or a resumed run would differ from an uninterrupted one.

  Attributes:
    name: 'autoencoder', 'embedder' or 'diffusion'; equals `config.task`.
    sets: what a name in `config.trainable` stands for: regular expressions on dotted
      parameter names.
    new_modules: patterns of parameters that no pretrained model has; they learn at
      `optim.new_module_lr_mult` times the rate.
    constants: patterns of parameters that are never trained, such as statistics of the
      data.
    config: the whole resolved configuration.
    mesh: the devices; see `parallel.py`.
    workdir: folder of this run; the task may write below it, but not into 'checkpoints'
      or 'pictures'.
  """

  name: ClassVar[str]
  sets: ClassVar[dict[str, tuple[str, ...]]] = {'all': ('.*',)}
  new_modules: ClassVar[tuple[str, ...]] = ()
  constants: ClassVar[tuple[str, ...]] = ()

  def __init__(self, config: Any, mesh: Mesh, workdir: os.PathLike | str):
    self.config = config
    self.mesh = mesh
    self.workdir = epath.Path(workdir)
    lora.check_start(config, self.model_dir)
    self._adopt_model()

  @property
  def model_dir(self) -> epath.Path:
    """The model folder of this run: trained components go there, and it refers to the
    frozen ones of `config.model`.
    """
    return self.workdir / 'model'

  @property
  def data_dir(self) -> epath.Path:
    """The folder of the data sets."""
    return epath.Path(self.config.data.dir or self.workdir.parent / 'data')

  def trained(self) -> tuple[str, ...]:
    """Names of the components that this run trains."""
    return (self.name,)

  def needed(self) -> tuple[str, ...]:
    """Names of the frozen components that this run computes with."""
    return ()

  def _adopt_model(self) -> None:
    """Makes the model folder of this run refer to the components of `config.model` that
    this run does not train.
    """
    source = self.config.model
    if source and os.path.realpath(source) == os.path.realpath(self.model_dir):
      raise ConfigError(
        f'config.model={source} is the folder that this run writes; name the model '
        'folder that it reads, such as that of the run before'
      )
    model_references.adopt(
      source,
      self.model_dir,
      trained=self.trained(),
      needed=self.needed(),
      priors='embedder' not in self.trained(),
      resuming=has_checkpoint(self.workdir / 'checkpoints'),
    )

  @abc.abstractmethod
  def init(self, key: jax.Array) -> Params:
    """Makes all parameters that `config.trainable` may choose from, prefixed by
    component ('vae.encoder.conv_in.kernel').

    Called eagerly, also when a run resumes. Returns concrete arrays, NumPy or jax; the
    loop lays them out with `parallel.put_params` and takes them over (they are donated:
    keep no reference). A model too large for one host returns arrays that
    `parallel.shardings` has laid out already.
    """

  @abc.abstractmethod
  def loss(
    self, params: Params, batch: Any, key: jax.Array, step: jax.Array
  ) -> tuple[jax.Array, dict[str, Any]]:
    """Computes the mean loss of a batch, and its parts.

    Pure; traced under `jax.jit`, with the mesh set.

    Args:
      params: every name that `init` returned, trained or frozen, as the devices share
        them; `gathering.merge` makes a module of them.
      batch: a batch (one of `config.accum` micro-batches) as global arrays `[rows,
        ...]`.
      key: for this step and micro-batch alone.
      step: int32 scalar, updates made so far.

    Returns:
      loss: float32 scalar, a mean over the rows. Accumulation averages it; a term that
        only some rows have becomes the mean of the micro-batches' means.
      parts: values to log, float32 scalars or pairs (see `metric_means.aggregate`).
        Among these, `per_row` may be a dict of arrays `[rows, ...]` for `after_update`.
    """

  def extra_state(self, params: Params) -> Params:
    """Makes arrays that change from step to step without being parameters.

    Args:
      params: the initial trained parameters. Traced.
    """
    return {}

  def after_update(
    self, state: TrainState, rows: dict[str, jax.Array], key: jax.Array
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    """Changes the state after the optimizer did, and adds float32 scalars to log.

    Pure; traced with the step.

    Args:
      state: after the update; `state.step` updates have been made.
      rows: `per_row` of `loss`, all micro-batches together.
      key: for this step alone.
    """
    return state, {}

  @abc.abstractmethod
  def batches(self) -> grain.DatasetIterator:
    """Opens the endless batches of this process: trees of NumPy arrays `[batch_size //
    count, ...]`.

    `index, count = parallel.batch_shard(self.mesh)` is the share of each global batch
    that this process reads. The iterator's state goes into the checkpoint as JSON.
    Neither batches nor state may depend on the number of devices or processes: the
    state of one process is restored on all of another job (see
    `dicetalk_jax.data.process_shard`).
    """

  @abc.abstractmethod
  def evaluate(self, params: Params) -> tuple[dict[str, float], dict[str, Picture]]:
    """Computes metrics, and images uint8 `[H,W,3]` or videos by name.

    Args:
      params: complete, as in `loss`; the EMA of the trained ones, if there is one.
    """

  @abc.abstractmethod
  def export(self, params: Params) -> None:
    """Writes the trained components into the model folder.

    Args:
      params: as in `evaluate`.
    """
