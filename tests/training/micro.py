"""The three tasks at the smallest size there is, and runs of them."""

import dataclasses
import hashlib
import importlib
import json
import math
import signal
from unittest import mock

import jax

from data_pipelines.builders.synthetic import prepare_synthetic
from data_pipelines.builders.synthetic_clips import TINY
from dicetalk_jax import main, parallel
from dicetalk_jax.training import loop

STEPS = 4
DATA = dataclasses.replace(TINY, size=32, train=2, val=2, test=0, seconds=0.6, clips=16)
ONE = parallel.make_mesh(devices=jax.devices()[:1])


def config_of(task, arg='tiny'):
  """The configuration of a task: 32 px, and as few levels as there can be."""
  config = importlib.import_module(f'configs.{task}').get_config(arg)
  config.total_steps = config.log_every = STEPS
  config.eval_every = config.checkpoint_every = STEPS
  config.optim.name = 'adam'  # compiles in half the time
  config.frozen.whisper.update(d_model=16, encoder_ffn_dim=16)
  config.frozen.image_encoder.update(
    hidden_size=16, intermediate_size=16, projection_dim=32, image_size=28
  )
  if task == 'autoencoder':
    config.vae.update(block_out_channels=(8, 16), latent_channels=4)
    config.batch_size, config.data.frames = 2, 2
  if task == 'embedder':
    config.embedder.update(
      whisper_dim=16,
      width=32,
      heads=2,
      mlp_dim=32,
      max_len=15,
      crop_size=8,
      crop_channels=(8,),
    )
    config.data.update(identities=2, emotions=2, clips=2, min_len=8, max_len=15)
    config.batch_size = 8
  if task == 'diffusion':
    config.data.update(frames=3, size=32)
    config.batch_size = 8  # divides among eight devices
    config.unet.update(
      in_channels=8,
      out_channels=4,
      block_out_channels=(32,),
      num_attention_heads=(2,),
      cross_attention_dim=32,
      down_block_types=('CrossAttnDownBlockSpatioTemporal',),
      up_block_types=('UpBlockSpatioTemporal',),
      num_frames=3,
    )
    config.audio_linear.update(channels=16, intermediate_dim=32, output_dim=32)
    if arg == 'tiny':
      config.pose_guider.update(
        conditioning_embedding_channels=32, block_out_channels=(8, 8)
      )
      config.emo_model.update(
        prior_dim=32, dim=32, intermediate_dim=32, classifier_in=32, num_heads=2
      )
    config.sample.update(num_steps=2, shift=1)
  return config


def run(
  task,
  folder,
  steps=STEPS,
  sizes=(1, 1, 1),
  remat='none',
  arg='tiny',
  model='',
  stop=None,
  **data,
):
  """Trains in a folder, on the data next to it unless `dir` names another.

  With `stop` the run is asked to stop after so many steps, by a signal, as a cluster
  does it: nothing else differs from the whole run, so that both have one program.
  """
  config = config_of(task, arg)
  config.model = str(model)
  config.data.update(data)
  config.total_steps, config.log_every = steps, 1
  if task == 'diffusion':
    config.remat = remat
  prepare_synthetic(config.data.dir or folder.parent / 'data', DATA, workers=1)
  mesh = parallel.make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])
  return loop.train(
    main.task_class(task),
    config,
    folder,
    mesh=mesh,
    make_writer=lambda workdir: _stopper(stop),
  )


def _stopper(stop):
  """A writer that asks for the end when the step before the last one is logged."""

  def write_scalars(step, scalars):
    if step + 1 == stop:
      signal.raise_signal(signal.SIGTERM)

  return mock.Mock(**{'write_scalars.side_effect': write_scalars})


def diffusion_task(trained, config, workdir, mesh=ONE):
  """The diffusion task with what the three runs left."""
  config.model = str(trained / 'diffusion/model')
  config.data.dir = str(trained / 'data')
  return main.task_class('diffusion')(config, mesh, workdir)


def rows(folder, task):
  return [
    json.loads(line)
    for line in (folder / task / 'metrics.jsonl').read_text().splitlines()
  ]


def losses(folder, name):
  return [
    (r['step'], r['train/loss'], r['train/grad_norm'])
    for r in rows(folder, name)
    if 'train/loss' in r
  ]


def digests(folder):
  """SHA-256 of every file below a folder."""
  files = [path for path in sorted(folder.rglob('*')) if path.is_file()]
  return {
    str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in files
  }
