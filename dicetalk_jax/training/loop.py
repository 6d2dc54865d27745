"""The training loop: one for every task, on one device or on many processes."""

from collections.abc import Callable
import functools
import signal
from typing import Any

from etils import epath
import jax
from jax.sharding import Mesh
import ml_collections

from dicetalk_jax import parallel
from dicetalk_jax.models.parameters import Params
from dicetalk_jax.training import config_checks, lora
from dicetalk_jax.training.checkpoint import has_checkpoint
from dicetalk_jax.training.lock import hold
from dicetalk_jax.training.optimizer import make_optimizer
from dicetalk_jax.training.profile import check_span
from dicetalk_jax.training.run_context import open_run
from dicetalk_jax.training.run_log import Writer
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
  stay the same: the checkpoint holds step, parameters, EMA, optimizer state and data
  position, and everything random derives from (seed, step). On another mesh it agrees
  up to rounding. (On GPUs add `--xla_gpu_deterministic_ops=true` to XLA_FLAGS.)

  SIGTERM and Ctrl-C end the run after the current step with a checkpoint; the same
  command resumes it. After Ctrl-C, KeyboardInterrupt is raised then.

  Args:
    task_class: constructed as `task_class(config, mesh, workdir)`.
    config: see `configs/common.py`.
    workdir: gets config.json, checkpoints/, metrics.jsonl, pictures/, curves.png,
      TensorBoard events (see `make_writer`), model/, and lock.json, which names the
      process that runs there.
    make_writer: makes a writer of TensorBoard files for a work directory. Called on
      process 0 when the run begins.
    mesh: default `config.mesh` over all devices.
    profile: first and last step of a profile, written to profile/ in the work
      directory.

  Returns:
    The final state.

  Raises:
    ConfigError, MeshError: before anything is computed; also if another run is alive
      in `workdir`.
    InputError: the work directory, or the lock in it, cannot be written.
    DivergedError: the loss is no longer a number. The last good checkpoint stays.
  """
  # Refuse what cannot work before anything is touched.
  config_checks.loop(config)
  check_span(profile, config.total_steps)
  if mesh is None:
    mesh = parallel.make_mesh(**config.mesh)
  parallel.check_batch(config.batch_size, mesh, config.accum)
  optimizer = make_optimizer(config.optim, config.total_steps, task_class.new_modules)

  # Open the work directory, lock it, and check that it belongs to this run.
  workdir = open_workdir(workdir)
  with hold(workdir) as lock:
    claim(workdir, config, resuming=has_checkpoint(workdir / 'checkpoints'))

    with jax.set_mesh(mesh):
      # The task and its parameters. Only trained ones belong to the state.
      task = task_class(config, mesh, workdir)
      init_key, step_key = jax.random.split(jax.random.key(config.seed))
      params = lora.extended(task.init(init_key), config)
      params, frozen = partition(
        parallel.put_params(params, mesh),
        lora.patterns(config),
        sets=task.sets,
        constants=task.constants,
      )
      lora.check(params, config)

      # The training step.
      new_state = functools.partial(
        init_state, tx=optimizer, ema=bool(config.optim.ema), extra=task.extra_state
      )
      abstract_state = jax.eval_shape(new_state, params)
      state_shardings = parallel.shardings(abstract_state, mesh)

      def all_params(trained: Params, frozen: Params) -> Params:
        return lora.merged({**frozen, **trained}, config)

      def loss(trained, frozen, batch, key, step):
        return task.loss(all_params(trained, frozen), batch, key, step)

      train_step = make_train_step(
        loss,
        optimizer,
        state_shardings,
        accum=config.accum,
        ema=config.optim.ema,
        after_update=task.after_update,
      )

      # Open the checkpointer when nothing is left to refuse. It cleans up in a
      # background thread, which an early exit on an error would interrupt.
      with open_run(task, config, workdir, mesh, make_writer, profile) as run:
        # The initial state, or that of the latest checkpoint.
        if run.first_step == 1:
          make_state = jax.jit(
            new_state, out_shardings=state_shardings, donate_argnums=0
          )
          state = make_state(params)
        else:
          target = parallel.with_shardings(abstract_state, state_shardings)
          state = run.checkpoints.restore(target, run.data)
        del params  # donated, or replaced by the checkpoint
        run.log.say(
          f'{task.name}: {_millions(abstract_state.params)} parameters trained, '
          f'{_millions(frozen)} frozen; {mesh.size} devices {dict(mesh.shape)}; '
          f'from step {run.first_step - 1} to {config.total_steps}'
        )
        run.announce_profile()

        # The order matters: a state that diverged is not saved, and an evaluation that
        # fails loses no step.
        stop_signal = None
        stopping = False
        for step in range(run.first_step, config.total_steps + 1):
          # 1. Step
          run.profiler.before(step)
          state, metrics = train_step(state, frozen, next(run.data), step_key)
          run.meter.add(step, metrics)  # checks the step before; raises DivergedError
          if run.profiler.after(step, metrics):
            run.log.say(f'step {step}: profile written to {workdir / "profile"}')

          # The last step does all three. A run that was asked to stop saves but does
          # not evaluate: that could take too long.
          last = step == config.total_steps
          stop_signal = run.stop_signal(step)
          stopping = stop_signal is not None and not last
          save = stopping or last or step % config.checkpoint_every == 0
          evaluate = not stopping and (last or step % config.eval_every == 0)
          if not (save or evaluate or step % config.log_every == 0):
            continue
          lock.check()

          # 2. Log
          means, steps_per_second = run.meter.means()  # checks this step, too
          run.log_means(step, means, steps_per_second)

          # 3. Save
          if save:
            run.checkpoints.save(step, state, run.data)

          # 4. Evaluate
          if evaluate:
            scores, pictures = task.evaluate(all_params(state.averaged, frozen))
            run.log.evaluation(step, scores, pictures)
          run.meter.restart_clock()

          # 5. Stop
          if stopping:
            run.log.say(
              f'stopped on request at step {step}; run the same command again to resume'
            )
            break

      if stopping and stop_signal == signal.SIGINT:
        raise KeyboardInterrupt

      # Export after the last checkpoint is on disk. The log is closed; `say` only
      # prints.
      if not stopping:
        lock.check()  # the last evaluation may have taken long
        task.export(all_params(state.averaged, frozen))
        run.log.say(f'{task.name}: finished, written to {task.model_dir}')
      return state


def _millions(tree: Any) -> str:
  return f'{sum(x.size for x in jax.tree.leaves(tree)) / 1e6:.3g} M'
