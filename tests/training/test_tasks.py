"""A run of each task: the files it leaves, and what it refuses."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dicetalk_jax import bundle, main, model_references
from dicetalk_jax.data import clip_record
from dicetalk_jax.errors import ConfigError, WeightsError
from dicetalk_jax.media.video import read_video
from dicetalk_jax.pipeline import Pipeline
from dicetalk_jax.training import datasets
from dicetalk_jax.training.diffusion import DiffusionTask
from dicetalk_jax.training.diffusion_loss import DiffusionLoss
from tests.training import micro


def test_model_folder_is_complete_and_generates(trained):
  model = trained / 'diffusion/model'
  assert set(bundle.components(model)) == {
    'vae',
    'whisper',
    'image_encoder',
    'embedder',
    'unet',
    'audio_linear',
    'pose_guider',
    'emo_model',
  }
  levels = {f'{emotion}_3' for emotion in clip_record.EMOTIONS} - {'neutral_3'}
  assert {*clip_record.EMOTIONS, *levels} <= set(bundle.emotions(model))
  pipe = Pipeline.load(model)
  portrait = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
  wave = np.random.default_rng(1).normal(size=16_000 // 2).astype(np.float32) * 0.1
  frames, fps = pipe.generate(
    portrait, wave, emotion='happy', face_box=(16, 16, 32, 32)
  )
  assert frames.shape == (6, 32, 32, 3) and frames.dtype == np.uint8 and fps == 12.5


def test_training_does_not_change_the_model_folders_that_it_reads(trained):
  """Not a byte of them; what is not trained stays there, and is referred to."""
  inputs = json.loads((trained / 'inputs.json').read_text())
  assert inputs == {task: micro.digests(trained / task / 'model') for task in inputs}
  held = {
    name: entry.get('folder')
    for name, entry in bundle.components(trained / 'diffusion/model').items()
  }
  first, second = (
    str(trained / task / 'model') for task in ('autoencoder', 'embedder')
  )
  own = dict.fromkeys(
    ('image_encoder', 'unet', 'audio_linear', 'pose_guider', 'emo_model')
  )
  assert held == own | {'vae': first, 'whisper': second, 'embedder': second}


def test_priors_and_emotion_model_name_the_embedder_of_the_run(trained):
  embedder = bundle.components(trained / 'embedder/model')['embedder']['fingerprint']
  assert (
    bundle.components(trained / 'diffusion/model')['emo_model']['priors'] == embedder
  )
  for task in ('embedder', 'diffusion'):
    assert {
      bundle.read_prior(trained / task / 'model', name)[1]
      for name in clip_record.EMOTIONS
    } == {embedder}


def test_a_run_does_not_continue_with_another_autoencoder(trained, tmp_path):
  other = tmp_path / 'other'
  model_references.pack(trained / 'embedder/model', other)
  config, params = bundle.load_component(other, 'vae')
  bundle.save_component(
    other, 'vae', config, {name: x + 1 for name, x in params.items()}, {}
  )
  with pytest.raises(
    WeightsError,
    match='this run began with another vae than .*other has now; name the model',
  ):
    micro.run('diffusion', trained / 'diffusion', model=other)


def test_a_run_does_not_write_into_the_folder_that_it_reads(trained):
  with pytest.raises(
    ConfigError, match='config.model=.* is the folder that this run writes'
  ):
    micro.run('diffusion', trained / 'diffusion', model=trained / 'diffusion/model')


def test_every_loss_is_logged_and_every_run_has_pictures_and_curves(trained):
  diffusion = micro.rows(trained, 'diffusion')
  *_, train, evaluation = diffusion
  for part in (
    'loss',
    'denoise',
    'cls',
    'vq',
    'vq_error',
    'z_rms',
    'codes_used',
    'bank_perplexity',
    'bank_purity',
    'grad_norm',
    'steps_per_second',
  ):
    assert np.isfinite(train[f'train/{part}']), part
  for row, prefix in ((train, 'train'), (evaluation, 'eval')):
    by_sigma = {
      name: value
      for name, value in row.items()
      if name.startswith(f'{prefix}/denoise/sigma_')
    }
    assert by_sigma and min(by_sigma.values()) <= row[f'{prefix}/denoise'] <= max(
      by_sigma.values()
    )
    assert any(name.startswith(f'{prefix}/cls/sigma_') for name in row)
  assert 'eval/psnr' in micro.rows(trained, 'autoencoder')[-1]
  scores = micro.rows(trained, 'embedder')[-1].keys()
  assert {
    'eval/emotion_accuracy',
    'eval/identity_accuracy',
    'eval/audio_clustering',
  } <= scores
  for task, picture in (
    ('autoencoder', 'reconstruction'),
    ('embedder', 'tsne'),
    ('diffusion', 'sample'),
  ):
    assert (trained / task / 'pictures' / f'{picture}_{micro.STEPS:07d}.png').exists()
  assert (trained / 'diffusion' / 'curves.png').exists()


def test_samples_are_videos_with_the_sound_of_their_clip(trained):
  source = datasets.open_train_and_val(micro.config_of('diffusion'), trained / 'data')[
    1
  ][0].source
  for name, clip in (('sample_0', 0), ('sample_1', len(source) - 1)):
    video = read_video(
      trained / 'diffusion' / 'pictures' / f'{name}_{micro.STEPS:07d}.mp4'
    )
    frames = (int(source[clip]['num_frames']) - 1) // 2 + 1  # more than a window
    assert (
      len(video.frames) == frames > 3
      and video.frames.shape[2] == 2 * 32
      and video.fps == 12.5
    )
    sound = clip_record.decode_audio(source[clip])[: len(video.audio)]
    assert np.corrcoef(sound, video.audio[: len(sound)])[0, 1] > 0.9


def test_gradients_reach_every_trained_component(trained, tmp_path):
  config = micro.config_of('diffusion')
  mesh = jax.make_mesh(
    (1, 1),
    ('data', 'fsdp'),
    (jax.sharding.AxisType.Auto,) * 2,
    devices=jax.devices()[:1],
  )
  task = micro.diffusion_task(trained, config, tmp_path, mesh)
  # New networks begin with residual branches of zero, which let nothing through: move
  # them a little.
  params = {name: value + 0.02 for name, value in task.init(jax.random.key(0)).items()}
  batch = next(task.batches())
  batch['drop'] = np.ones_like(batch['drop'])

  def loss(params, batch):
    return task.loss(params, batch, jax.random.key(1), jnp.array(200))[0]

  grads = jax.jit(jax.grad(loss))(params, batch)
  norms = {
    name: sum(
      float(jnp.square(g).sum()) for k, g in grads.items() if k.startswith(name)
    )
    for name in (
      'unet.',
      'audio_linear.',
      'emo_model.emo_linear',
      'emo_model.codebook.codebook',
      'emo_model.classifier',
      'pose_guider.conv_out',
      'unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_k_ip.1',
    )
  }
  assert all(np.isfinite(v) and v > 0 for v in norms.values()), norms


def test_the_loss_knows_evaluation_from_training(trained, tmp_path, monkeypatch):
  modes = []
  monkeypatch.setattr(
    DiffusionLoss,
    '__call__',
    lambda self, *args, train=True: (
      modes.append(train) or (jnp.ones(()), {'denoise': jnp.ones(())})
    ),
  )
  monkeypatch.setattr(DiffusionTask, '_samples', lambda self, params: {})
  task = micro.diffusion_task(trained, micro.config_of('diffusion'), tmp_path)
  task.evaluate({})
  assert set(modes) == {False}
  task.loss({}, {}, jax.random.key(0), 0)
  assert modes[-1] is True


def test_the_step_of_training_is_that_of_sampling(trained, tmp_path):
  config = micro.config_of('diffusion')
  config.data.step = 5
  task = micro.diffusion_task(trained, config, tmp_path)
  params = task.init(jax.random.key(0))
  samples = task._samples(params)
  assert samples['sample_0'].fps == 5
  task.export(params)
  pipe = Pipeline.load(task.model_dir)
  assert pipe.settings.frame_step == 5 and pipe.settings.time_ids == (5.0, 8.0, 16.0)
  portrait = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
  wave = np.random.default_rng(1).normal(size=16_000).astype(np.float32) * 0.1
  frames, fps = pipe.generate(portrait, wave, emotion='sad', face_box=(16, 16, 32, 32))
  assert len(frames) == 5 and fps == 5


def test_parts_that_do_not_fit_are_refused(trained, tmp_path):
  config = micro.config_of('diffusion')
  with pytest.raises(ConfigError, match='emo_model.prior_dim=16 does not fit'):
    config.emo_model.prior_dim = 16
    micro.diffusion_task(trained, config, tmp_path)


def test_missing_autoencoder_is_named(tmp_path, trained):
  config = micro.config_of('diffusion')
  config.data.dir = str(trained / 'data')
  with pytest.raises(
    ConfigError,
    match='config.model is missing: .* the vae and the embedder of a model folder',
  ):
    main.task_class('diffusion')(config, micro.ONE, tmp_path / 'diffusion')
  config.model = str(trained / 'autoencoder/model')
  with pytest.raises(
    WeightsError, match='autoencoder/model has no embedder; it has: vae'
  ):
    main.task_class('diffusion')(config, micro.ONE, tmp_path / 'diffusion')
  config.model = str(tmp_path / 'nowhere')
  with pytest.raises(WeightsError, match='nowhere is not a model folder'):
    main.task_class('diffusion')(config, micro.ONE, tmp_path / 'diffusion')
