"""A small real task: an MLP learns a random projection.

Also a script, for tests that kill it:

    python toy.py DEVICES SECONDS_PER_BATCH TOTAL_STEPS WORKDIR [WORKDIR ...]

It makes one run after the other. It is one of several processes, with as many devices
each, if the environment says so (`parallel.initialize`).
"""

import functools
import os
import sys
import time

from flax import nnx
import grain
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from dicetalk_jax import bundle, parallel
from dicetalk_jax.data.process_shard import ProcessShard
from dicetalk_jax.errors import one_sentence
from dicetalk_jax.models import parameters
from dicetalk_jax.training import gathering, lock
from dicetalk_jax.training.loop import train
from dicetalk_jax.training.task import Task


def get_config(**changes) -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict(
    dict(
      task='toy',
      seed=0,
      total_steps=24,
      batch_size=16,
      accum=2,
      mesh=dict(data=1, fsdp=-1, sequence=1),
      multihost=False,
      dtype='float32',
      trainable=('net',),
      optim=dict(
        name='adamw',
        lr=1e-2,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=1e-2,
        clip=1.0,
        warmup=5,
        schedule='cosine',
        end_lr=0.0,
        ema=0.99,
        new_module_lr_mult=1.0,
      ),
      lora=dict(rank=0, alpha=1.0, targets=()),
      log_every=1,
      eval_every=8,
      checkpoint_every=4,
      keep=2,
      model='',
      init_from='',
      bad_step=-1,
      data=dict(dir=''),
    )
  )
  config.update(changes)
  return config


PROJECTION = np.random.default_rng(7).normal(size=(16, 4)).astype(np.float32)


class MLP(nnx.Module):
  def __init__(self, width, *, rngs):
    self.hidden = nnx.Linear(16, width, rngs=rngs)
    self.out = nnx.Linear(width, 4, rngs=rngs)

  def __call__(self, x):
    return self.out(nnx.relu(self.hidden(x)))


class ToyTask(Task):
  """`net` is trained to repeat `PROJECTION`; `scale` may be trained too, by pattern."""

  name = 'toy'
  delay = 0.0  # seconds per batch

  def __init__(self, config, mesh, workdir):
    super().__init__(config, mesh, workdir)
    self.build = functools.partial(MLP, 256)
    self.graphdef, self.target = parameters.abstract(self.build)
    self.error = jax.jit(
      lambda params, x: jnp.mean(
        (
          parameters.merge(self.graphdef, parameters.strip_prefix('net', params))(x)
          - x @ PROJECTION
        )
        ** 2
      )
    )

  def init(self, key):
    return parameters.add_prefix('net', parameters.numpy_params(self.target)) | {
      'scale': np.ones(4, np.float32)
    }

  def loss(self, params, batch, key, step):
    target = batch['x'] @ PROJECTION
    x = batch['x'] + 0.1 * jax.random.uniform(key, batch['x'].shape)
    out = (
      gathering.merge(self.graphdef, parameters.strip_prefix('net', params))(x)
      * params['scale']
    )
    error = jnp.mean((out - target) ** 2, -1) * batch['weight']
    error = jnp.where(step == self.config.bad_step, jnp.nan, error)
    return error.mean(), {
      'largest': error.max(),
      'early': jnp.mean(step < 5),
      'per_row': {'error': error},
    }

  def extra_state(self, params):
    return {'seen': jnp.zeros(())}

  def after_update(self, state, rows, key):
    seen = state.extra['seen'] + rows['error'].sum() + jax.random.uniform(key)
    return state.replace(extra={'seen': seen}), {'seen': seen}

  def batches(self):
    index, count = parallel.batch_shard(self.mesh)
    data = (
      grain.MapDataset.range(100)
      .seed(self.config.seed)
      .shuffle()
      .repeat()
      .random_map(self.row)
    )
    rows = self.config.batch_size // count
    data = ProcessShard(data, rows, (index, count)).batch(rows, drop_remainder=True)
    return iter(
      data.to_iter_dataset(grain.ReadOptions(num_threads=0))
    )  # no reading ahead: `delay` paces the steps

  def row(self, i, rng):
    time.sleep(self.delay / self.config.batch_size)
    x = np.random.default_rng(i).normal(size=16) + 0.1 * rng.normal(size=16)
    return {'x': x.astype(np.float32), 'weight': np.float32(1)}

  def evaluate(self, params):
    loss = float(
      self.error(
        params,
        np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32),
      )
    )
    return {'loss': loss}, {
      'error': np.full((8, 8, 3), min(255, int(10 * loss)), np.uint8)
    }

  def export(self, params):
    bundle.save_component(
      self.model_dir, self.workdir.name, {}, {**params, 'own': jnp.arange(3)}, {}
    )
    params = parallel.to_host(params)
    if jax.process_index() == 0:
      self.model_dir.mkdir(parents=True, exist_ok=True)
      with (self.model_dir / f'{self.workdir.name}.npz').open('wb') as f:
        np.savez(f, **params)


if __name__ == '__main__':
  devices, delay, total, *workdirs = sys.argv[1:]
  jax.config.update('jax_num_cpu_devices', int(devices))
  parallel.initialize(multihost := parallel.VARIABLES[0] in os.environ)
  ToyTask.delay = float(delay)
  lock.BEAT = 1.0
  with one_sentence():
    for workdir in workdirs:
      train(ToyTask, get_config(total_steps=int(total), multihost=multihost), workdir)
