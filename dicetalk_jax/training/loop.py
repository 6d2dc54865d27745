"""The training loop: one for every task, on one device or on many processes."""

from collections.abc import Callable, Iterator
import contextlib
import functools
import signal
import threading
from typing import Any

from etils import epath
import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
import ml_collections
import optax

from dicetalk_jax import parallel
from dicetalk_jax.errors import ConfigError
from dicetalk_jax.training import lora
from dicetalk_jax.training.checkpoint import Checkpoints, has_checkpoint
from dicetalk_jax.training.lock import Lock, hold
from dicetalk_jax.training.optimizer import make_optimizer, make_schedule
from dicetalk_jax.training.prefetch import prefetched
from dicetalk_jax.training.profile import Profiler, check_span
from dicetalk_jax.training.run_log import Meter, Report, Writer
from dicetalk_jax.training.state import TrainState, init_state, partition
from dicetalk_jax.training.step import make_train_step
from dicetalk_jax.training.task import Task
from dicetalk_jax.training.workdir import claim, open_workdir


def train(
  task_class: type[Task],
  config: ml_collections.ConfigDict,
  workdir: Any,
  *,
  make_writer: Callable[[epath.Path], Writer] | None = None,
  mesh: Mesh | None = None,
  profile: tuple[int, int] | None = None,
) -> TrainState:
  """Begins or resumes a run and carries it to `config.total_steps`.

  A resumed run equals an uninterrupted one to the bit, as long as mesh and software
  stay the same: the checkpoint holds step, parameters, averages, optimizer state and
  data position, and everything random derives from (seed, step). On another mesh it
  agrees up to rounding. (On GPUs add `--xla_gpu_deterministic_ops=true` to XLA_FLAGS.)

  SIGTERM and Ctrl-C end the run after the current step with a checkpoint; the same
  command goes on from there.

  Args:
    task_class: constructed as `task_class(config, mesh, workdir)`.
    config: see `configs/common.py`.
    workdir: gets config.json, checkpoints/, metrics.jsonl, pictures/, curves.png;
      lock.json says who runs there.
    make_writer: from the work directory to a writer of TensorBoard files; called on
      process 0 when the run begins.
    mesh: default `config.mesh` over all devices.
    profile: first and last step of a profile, written to profile/ in the work
      directory.

  Returns:
    The final state.

  Raises:
    ConfigError, MeshError: before anything is computed; also where another run is alive
      in `workdir`.
    InputError: the work directory, or the lock in it, cannot be written.
    DivergedError: the loss is no longer a number. The last good checkpoint stays.
  """
  _check(config)
  check_span(profile, config.total_steps)
  mesh = parallel.make_mesh(**config.mesh) if mesh is None else mesh
  parallel.check_batch(config.batch_size, mesh, config.accum)
  tx = make_optimizer(config.optim, config.total_steps, task_class.new_modules)
  workdir = open_workdir(workdir)
  with hold(workdir) as lock:  # before anything else in there is touched
    return _train(task_class, config, workdir, make_writer, mesh, profile, tx, lock)


def _train(
  task_class: type[Task],
  config: ml_collections.ConfigDict,
  workdir: epath.Path,
  make_writer: Callable[[epath.Path], Writer] | None,
  mesh: Mesh,
  profile: tuple[int, int] | None,
  tx: optax.GradientTransformation,
  lock: Lock,
) -> TrainState:
  """`train`, in a work directory that is ours alone."""
  learning_rate = jax.jit(make_schedule(config.optim, config.total_steps))
  folder = workdir / 'checkpoints'
  claim(workdir, config, resuming=has_checkpoint(folder))

  with jax.set_mesh(mesh):
    task = task_class(config, mesh, workdir)
    init_key, step_key = jax.random.split(jax.random.key(config.seed))
    params, held = partition(
      parallel.put_params(lora.extended(task.init(init_key), config), mesh),
      lora.patterns(config),
      sets=task_class.sets,
      constants=task_class.constants,
    )
    lora.check(params, config)

    new_state = functools.partial(
      init_state, tx=tx, ema=bool(config.optim.ema), extra=task.extra_state
    )
    target = jax.eval_shape(new_state, params)
    shards = parallel.shardings(target, mesh)
    train_step = make_train_step(
      lambda params, held, *args: task.loss(
        lora.merged({**held, **params}, config), *args
      ),
      tx,
      shards,
      accum=config.accum,
      ema=config.optim.ema,
      after_update=task.after_update,
    )

    def complete(state):
      return lora.merged({**held, **state.averaged}, config)

    # Opened when nothing is left to refuse: a process that ends at once would cut off
    # the tidying in its background.
    with (
      Checkpoints(folder, config.keep) as checkpoints,
      contextlib.closing(task.batches()) as batches,
      contextlib.closing(prefetched(batches, mesh)) as data,
      _stop_requests() as stop_requested,
      contextlib.ExitStack() as endings,
      Profiler(workdir / 'profile', profile, (checkpoints.latest or 0) + 1) as profiler,
    ):
      if checkpoints.latest is None:
        state = jax.jit(new_state, out_shardings=shards, donate_argnums=0)(params)
      else:
        state = checkpoints.restore(parallel.with_shardings(target, shards), data)
      del params
      first = int(state.step)
      report = Report(workdir, make_writer, first, config.total_steps)
      report.say(
        f'{task.name}: {_millions(target.params)} parameters trained, '
        f'{_millions(held)} held; {mesh.size} devices {dict(mesh.shape)}; from step '
        f'{first} to {config.total_steps}'
      )
      if profiler.missed:  # the same command that began the run may go on with it
        report.say(
          f'no profile of steps {profile[0]} to {profile[1]}: the run goes on behind '
          'the first of them'
        )
      meter = Meter()

      def tell(step, means, rate):
        return report.train(step, {**means, 'lr': float(learning_rate(step - 1))}, rate)

      endings.callback(_close, report, meter, tell)
      stopping = False
      for step in range(first + 1, config.total_steps + 1):
        profiler.before(step)
        state, metrics = train_step(state, held, next(data), step_key)
        meter.add(step, metrics)
        if profiler.after(step, metrics):
          report.say(f'step {step}: profile written to {workdir / "profile"}')

        stopping = stop_requested(step) and step < config.total_steps

        def due(every):
          return stopping or step == config.total_steps or step % every == 0  # noqa: B023, used at once

        if not any(
          map(due, (config.log_every, config.eval_every, config.checkpoint_every))
        ):
          continue
        lock.check()
        means, rate = meter.means()  # raises before a bad state is saved
        tell(step, means, rate)
        # Before the evaluation: should that fail, the steps until here are not lost.
        if due(config.checkpoint_every):
          checkpoints.save(step, state, data)
        if due(config.eval_every) and not stopping:  # whoever asks to stop cannot wait
          values, pictures = task.evaluate(complete(state))
          report.evaluation(step, values, pictures)
        meter.restart_clock()
        if stopping:
          report.say(
            f'stopped on request at step {step}; run the same command again to go on'
          )
          break

    if not stopping:
      lock.check()  # an evaluation may lie between
      task.export(complete(state))
      report.say(f'{task.name}: finished, written to {task.model_dir}')
  return state


def _check(config: ml_collections.ConfigDict) -> None:
  for name in ('total_steps', 'log_every', 'eval_every', 'checkpoint_every', 'keep'):
    if config[name] < 1:
      raise ConfigError(f'config.{name}={config[name]} must be at least 1')
  if config.lora.rank < 0:
    raise ConfigError(
      f'config.lora.rank={config.lora.rank} must be at least 1, or 0 for no factors'
    )


def _close(
  report: Report,
  meter: Meter,
  tell: Callable[[int, dict[str, float], float | None], None],
) -> None:
  """However the steps end: tells those that broke off between two reports, and draws
  the curves.
  """
  if left := meter.left():
    tell(*left, None)
  report.close()


@contextlib.contextmanager
def _stop_requests() -> Iterator[Callable[[int], bool]]:
  """Yields `stop_requested(step)`, true on all processes at the same step."""
  if (
    jax.process_count() > 1
  ):  # jax.distributed listens for SIGTERM and agrees on the step
    yield multihost_utils.reached_preemption_sync_point
    return
  requested = threading.Event()

  def handle(number, frame):
    requested.set()
    signal.signal(number, previous[number])  # a second signal acts at once

  previous = {
    number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)
  }
  try:
    yield lambda step: requested.is_set()
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)


def _millions(tree: Any) -> str:
  return f'{sum(x.size for x in jax.tree.leaves(tree)) / 1e6:.3g} M'
