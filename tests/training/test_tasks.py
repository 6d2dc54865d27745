"""The three tasks at the smallest size there is, one after the other through the one
loop, and a video at the end.
"""

import dataclasses
import hashlib
import importlib
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import embedder
from data_pipelines import precompute
from data_pipelines.builders.synthetic import prepare_synthetic
from data_pipelines.builders.synthetic_clips import TINY, SyntheticConfig
from dicetalk_jax import bundle, main, model_references, parallel
from dicetalk_jax.data import clip_record, face_crops, feature_extraction
from dicetalk_jax.data.clip_source import ClipSource, ClipTable
from dicetalk_jax.data.loader import Part
from dicetalk_jax.errors import ConfigError, DataError, WeightsError
from dicetalk_jax.media.video import read_video
from dicetalk_jax.models import parameters, registry
from dicetalk_jax.pipeline import Pipeline
from dicetalk_jax.training import datasets, loop
from dicetalk_jax.training.diffusion import DiffusionTask
from dicetalk_jax.training.diffusion_loss import (
  DiffusionLoss,
  emotion_discrimination,
  mouth_region,
)
from tests import tiny

STEPS = 4
DATA = dataclasses.replace(TINY, size=32, train=2, val=2, test=0, seconds=0.6, clips=16)
ONE = parallel.make_mesh(devices=jax.devices()[:1])


def micro(task, arg='tiny'):
  """32 px, two levels everywhere."""
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
      block_out_channels=(32, 32),
      num_attention_heads=(2, 2),
      cross_attention_dim=32,
      down_block_types=('CrossAttnDownBlockSpatioTemporal', 'DownBlockSpatioTemporal'),
      up_block_types=('UpBlockSpatioTemporal', 'CrossAttnUpBlockSpatioTemporal'),
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
  task, folder, steps=STEPS, sizes=(1, 1, 1), remat='none', arg='tiny', model='', **data
):
  config = micro(task, arg)
  config.model = str(model)
  config.data.update(data)
  config.total_steps, config.log_every = steps, 1
  if task == 'diffusion':
    config.remat = remat
  prepare_synthetic(folder.parent / 'data', DATA, workers=1)
  mesh = parallel.make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])
  return loop.train(main.task_class(task), config, folder, mesh=mesh)


@pytest.fixture(scope='module', autouse=True)
def quick_compilation():
  with tiny.quick_compilation():
    yield


@pytest.fixture(scope='module')
def trained(tmp_path_factory, quick_compilation):
  """Work directories of the three tasks, each with the model of the one before; what
  they read is in inputs.json.
  """
  folder = tmp_path_factory.mktemp('runs')
  run('autoencoder', folder / 'autoencoder')
  run('embedder', folder / 'embedder', model=folder / 'autoencoder/model')
  inputs = {
    task: digests(folder / task / 'model') for task in ('autoencoder', 'embedder')
  }
  run('diffusion', folder / 'diffusion', model=folder / 'embedder/model')
  (folder / 'inputs.json').write_text(json.dumps(inputs))
  return folder


def digests(folder):
  """SHA-256 of every file below a folder."""
  files = [path for path in sorted(folder.rglob('*')) if path.is_file()]
  return {
    str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in files
  }


def diffusion_task(trained, config, mesh=ONE, workdir=None):
  """The diffusion task with the model of the embedder's run."""
  config.model = str(trained / 'embedder/model')
  return main.task_class('diffusion')(config, mesh, workdir or trained / 'diffusion')


def rows(folder, task):
  return [
    json.loads(line)
    for line in (folder / task / 'metrics.jsonl').read_text().splitlines()
  ]


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
  assert len(bundle.emotions(model)) == 8
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
  assert inputs == {task: digests(trained / task / 'model') for task in inputs}
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
    run('diffusion', trained / 'diffusion', model=other)


def test_a_run_does_not_write_into_the_folder_that_it_reads(trained):
  with pytest.raises(
    ConfigError, match='config.model=.* is the folder that this run writes'
  ):
    run('diffusion', trained / 'diffusion', model=trained / 'diffusion/model')


def test_a_frozen_emotion_model_of_other_priors_is_refused(trained, tmp_path):
  start = tmp_path / 'start'
  model_references.pack(trained / 'diffusion/model', start)
  config, params = bundle.load_component(start, 'emo_model')
  bundle.save_component(start, 'emo_model', config, params, {}, priors=bundle.RELEASED)
  frozen = micro('diffusion')
  frozen.init_from, frozen.trainable = str(start), ('^unet',)
  frozen.data.dir = str(trained / 'data')
  with pytest.raises(
    WeightsError, match='learned on priors of another embedder .released.* train it too'
  ):
    diffusion_task(trained, frozen, workdir=tmp_path / 'run')
  frozen.trainable = ('^unet', '^emo_model')
  diffusion_task(trained, frozen, workdir=tmp_path / 'run')


def test_every_loss_is_logged_and_every_run_has_pictures_and_curves(trained):
  diffusion = rows(trained, 'diffusion')
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
  assert 'eval/psnr' in rows(trained, 'autoencoder')[-1]
  scores = rows(trained, 'embedder')[-1].keys()
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
    assert (trained / task / 'pictures' / f'{picture}_{STEPS:07d}.png').exists()
  assert (trained / 'diffusion' / 'curves.png').exists()


def test_samples_are_videos_with_the_sound_of_their_clip(trained):
  source = datasets.open_train_and_val(micro('diffusion'), trained / 'data')[1][
    0
  ].source
  for name, clip in (('sample_0', 0), ('sample_1', len(source) - 1)):
    video = read_video(trained / 'diffusion' / 'pictures' / f'{name}_{STEPS:07d}.mp4')
    frames = (int(source[clip]['num_frames']) - 1) // 2 + 1  # more than a window
    assert (
      len(video.frames) == frames > 3
      and video.frames.shape[2] == 2 * 32
      and video.fps == 12.5
    )
    sound = clip_record.decode_audio(source[clip])[: len(video.audio)]
    assert np.corrcoef(sound, video.audio[: len(sound)])[0, 1] > 0.9


def losses(folder, name):
  return [
    (r['step'], r['train/loss'], r['train/grad_norm'])
    for r in rows(folder, name)
    if 'train/loss' in r
  ]


def test_continued_diffusion_run_equals_the_uninterrupted_one_to_the_bit(trained):
  model = trained / 'embedder/model'
  run('diffusion', trained / 'halves', steps=2, model=model)
  run('diffusion', trained / 'halves', model=model)
  assert (
    losses(trained, 'halves') == losses(trained, 'diffusion')
    and len(losses(trained, 'halves')) == STEPS
  )


def test_worker_processes_change_nothing(trained):
  """Neither in a run nor in its continuation."""
  model = trained / 'embedder/model'
  run('diffusion', trained / 'workers', steps=2, workers=1, model=model)
  run('diffusion', trained / 'workers', workers=1, model=model)
  assert losses(trained, 'workers') == losses(trained, 'diffusion')


@pytest.fixture(scope='module')
def two_sets(trained):
  """The synthetic data set and another one."""
  (first,) = (
    path.parent for path in (trained / 'data' / 'synthetic').rglob('dataset_info.json')
  )
  second = prepare_synthetic(
    trained / 'data',
    SyntheticConfig(size=32, train=1, val=1, test=0, seconds=0.6, clips=8, seed=1),
    workers=1,
  )
  return first, second


def test_training_takes_precomputed_features_and_mixes_by_weight(
  trained, two_sets, monkeypatch
):
  precompute.main(
    [f'--model={trained}/diffusion/model', f'--data={trained}/data', '--batch=4']
  )

  def fail(*_):
    raise AssertionError('computed again')

  monkeypatch.setattr(feature_extraction, '_batched', fail)
  config = micro('diffusion')
  config.data.dataset = '{}=1, {}=3'.format(*two_sets)
  task = diffusion_task(trained, config)
  priors = [part.features['prior'] for part in task.parts['train']]
  of_second = [prior(clip)[0, 0] for prior in priors[1:] for clip in range(len(prior))]
  mu = next(task.batches())['mu']
  assert (
    sum(any((row == other).all() for other in of_second) for row in mu) == 6
  )  # of 8
  assert task.init(jax.random.key(0))['emo_model.codebook.codebook.embedding'].any()


def test_embedder_of_several_data_sets(trained, two_sets, tmp_path):
  state = run(
    'embedder',
    tmp_path / 'embedder',
    steps=1,
    dir=str(trained / 'data'),
    dataset=f'synthetic=0.5,{two_sets[1]}=0.5',
  )
  assert int(state.step) == 1 and np.isfinite(
    rows(tmp_path, 'embedder')[-1]['eval/clustering']
  )
  assert len(bundle.emotions(tmp_path / 'embedder/model')) == 8


def test_embedder_of_a_data_set_with_and_one_without_expressions(
  trained, two_sets, tmp_path, monkeypatch
):
  """The latter has columns for another tracker.

  Its clips are heard only, in training, evaluation and priors.
  """
  read, scan = ClipSource.__getitem__, ClipTable.load

  def bare(record):
    return record | {'expression': np.zeros((0, 51), np.float32)}

  monkeypatch.setattr(
    ClipSource,
    '__getitem__',
    lambda self, i: (bare if self.folder == two_sets[1] else dict)(read(self, i)),
  )
  monkeypatch.setattr(
    ClipTable,
    'load',
    lambda path: dataclasses.replace(
      scan(path),
      **(
        {'motion_exp': np.zeros(len(scan(path)))} if path.parent == two_sets[1] else {}
      ),
    ),
  )
  assert [ClipSource(folder).expression_dim for folder in two_sets] == [64, 0]
  assert ClipSource(two_sets[1])[0]['expression'].shape == (0, 51)
  run(
    'embedder',
    tmp_path / 'embedder',
    steps=1,
    arg='tiny,mediapipe',
    dir=str(trained / 'data'),
    dataset='{}=1,{}=1'.format(*two_sets),
  )
  assert np.isfinite(rows(tmp_path, 'embedder')[-1]['eval/clustering'])
  assert len(bundle.emotions(tmp_path / 'embedder/model')) == 8


def test_embedder_of_expressions_of_another_width_is_refused(trained, two_sets):
  config = micro('embedder')
  config.data.dir, config.embedder.expr_dim = str(trained / 'data'), 51
  with pytest.raises(
    ConfigError,
    match='expr_dim=51, but the clips of .* have 64 expression coefficients per frame',
  ):
    main.task_class('embedder')(config, ONE, trained / 'embedder')


def test_embedder_with_one_person_to_validate(trained, two_sets, tmp_path):
  """Scores that compare people are left out."""
  run(
    'embedder',
    tmp_path / 'embedder',
    steps=1,
    dir=str(trained / 'data'),
    dataset=str(two_sets[1]),
    identities=1,
    emotions=4,
  )
  scores = {name for name in rows(tmp_path, 'embedder')[-1] if name.startswith('eval/')}
  assert 'eval/norm' in scores and not scores & {
    'eval/emotion_accuracy',
    'eval/identity_accuracy',
  }


def set_width(monkeypatch, width):
  """Lets training find two clips with so many expression coefficients."""
  table = {f.name: np.zeros(2, int) for f in dataclasses.fields(ClipTable)} | {
    'emotion': np.array(['happy', 'sad'])
  }
  part = Part(types.SimpleNamespace(table=ClipTable(**table), expression_dim=width))
  monkeypatch.setattr(datasets, 'open_train_and_val', lambda *_: ([part], [part]))


@pytest.mark.parametrize(
  ('width', 'arg', 'error'),
  [
    (0, 'default', DataError),
    (0, 'video_only', DataError),
    (64, 'default', WeightsError),
    (0, 'crops', WeightsError),
    (0, 'audio_only', WeightsError),
  ],
)
def test_embedder_of_data_without_expressions(tmp_path, monkeypatch, width, arg, error):
  """Refused, unless the embedder reads something else; the next thing missing is
  Whisper then.
  """
  set_width(monkeypatch, width)
  with pytest.raises(
    error,
    match='--expression=DIR, .* preset .crops.'
    if error is DataError
    else 'has no whisper',
  ):
    main.task_class('embedder')(embedder.get_config(arg), ONE, tmp_path / 'run')


def test_embedder_of_another_whisper(tmp_path, monkeypatch):
  set_width(monkeypatch, 64)
  config = micro('embedder')
  config.embedder.whisper_states = 5
  with pytest.raises(
    ConfigError, match='whisper_states=5, but the Whisper encoder of .* has 2 states'
  ):
    main.task_class('embedder')(config, ONE, tmp_path / 'run')


def test_embedder_of_crops_and_its_priors_in_diffusion(tmp_path):
  run('embedder', tmp_path / 'embedder', steps=2, arg='tiny,crops')
  scores = rows(tmp_path, 'embedder')[-1]
  assert scores['eval/sigma'] > 0
  for name in ('', 'video_', 'audio_'):  # paper table 5
    each = [
      value
      for key, value in scores.items()
      if key.startswith(f'eval/{name}clustering/')
    ]
    assert len(each) > 1 and np.mean(each) == pytest.approx(
      scores[f'eval/{name}clustering']
    )
  assert len(bundle.emotions(tmp_path / 'embedder/model')) == 8
  vae = micro('autoencoder').vae.to_dict()
  bundle.save_component(
    tmp_path / 'embedder/model',
    'vae',
    vae,
    parameters.numpy_params(parameters.abstract(registry.builder('vae', vae))[1]),
    {},
  )
  task = diffusion_task(tmp_path, micro('diffusion'))
  part = task.parts['train'][0]
  want = feature_extraction.gaussian(
    task.embedder, face_crops.of_record(part.source[1], 8), part.features['whisper'](1)
  )
  np.testing.assert_allclose(part.features['prior'](1)[0], want, atol=1e-5)


def test_eight_devices_agree_with_one(trained, monkeypatch):
  monkeypatch.setattr(
    DiffusionTask, '_samples', lambda self, params: {}
  )  # the sampler compiles for a minute or two
  run(
    'diffusion',
    trained / 'eight',
    sizes=(2, 2, 2),
    remat='block',
    model=trained / 'embedder/model',
  )
  np.testing.assert_allclose(
    losses(trained, 'eight'), losses(trained, 'diffusion'), rtol=1e-4
  )


def test_gradients_reach_every_trained_component(trained):
  config = micro('diffusion')
  mesh = jax.make_mesh(
    (1, 1),
    ('data', 'fsdp'),
    (jax.sharding.AxisType.Auto,) * 2,
    devices=jax.devices()[:1],
  )
  task = diffusion_task(trained, config, mesh)
  # New networks begin with residual branches of zero, which let nothing through: move
  # them a little.
  params = {name: value + 0.02 for name, value in task.init(jax.random.key(0)).items()}
  batch = next(task.batches())
  batch['drop'] = np.ones_like(batch['drop'])
  grads = jax.jit(
    jax.grad(lambda p: task.loss(p, {}, batch, jax.random.key(1), jnp.array(200))[0])
  )(params)
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


def test_the_loss_knows_evaluation_from_training(trained, monkeypatch):
  told = []
  monkeypatch.setattr(
    DiffusionLoss,
    '__call__',
    lambda self, *args, train=True: (
      told.append(train) or (jnp.ones(()), {'denoise': jnp.ones(())})
    ),
  )
  monkeypatch.setattr(DiffusionTask, '_samples', lambda self, params: {})
  task = diffusion_task(trained, micro('diffusion'))
  task.evaluate({}, {})
  assert set(told) == {False}
  task.loss({}, {}, {}, jax.random.key(0), 0)
  assert told[-1] is True


def test_parts_that_do_not_fit_are_refused(trained):
  config = micro('diffusion')
  with pytest.raises(ConfigError, match='emo_model.prior_dim=16 does not fit'):
    config.emo_model.prior_dim = 16
    diffusion_task(trained, config)


def plain_svd(folder, model):
  """A model folder with the trained UNet, but without adapters."""
  config, params = bundle.load_component(model, 'unet')
  plain = {name: x for name, x in params.items() if '.processor.' not in name}
  bundle.save_component(
    folder, 'unet', config | {'adapters': 0}, plain, {'source': 'test'}
  )
  return plain


def test_adapters_are_added_to_a_plain_unet(tmp_path, trained):
  plain = plain_svd(tmp_path, trained / 'diffusion/model')
  config = micro('diffusion')
  config.init_from, config.trainable = str(tmp_path), ('adapters',)
  task = diffusion_task(trained, config)
  unet = parameters.strip_prefix('unet', task.init(jax.random.key(0)))
  assert unet.keys() == bundle.shapes(trained / 'diffusion/model', 'unet').keys()
  attention = 'mid_block.attentions.0.transformer_blocks.0.attn2.'
  for name in unet:
    source = name.replace('processor.', '').replace('_ip.0', '').replace('_ip.1', '')
    np.testing.assert_array_equal(unet[name], plain[source], err_msg=name)
  assert (
    unet[f'{attention}processor.to_k_ip.1.kernel']
    is not unet[f'{attention}processor.to_k_ip.0.kernel']
  )


@pytest.mark.parametrize(
  ('changes', 'error', 'sentence'),
  [
    (
      dict(trainable=('adapters',)),
      ConfigError,
      "would hold .* such as 'unet.* at random values; name a model folder",
    ),
    (
      dict(trainable=('^unet',), init_from=True),
      ConfigError,
      "such as 'audio_linear.* at random values",
    ),
    (
      dict(trainable=('unett',)),
      ConfigError,
      'sets are: all, adapters, adapters_temporal',
    ),
    (
      dict(wide=True, init_from=True),
      WeightsError,
      r"another unet .*'add_embedding.linear_1.kernel' is \(96, ",
    ),
  ],
)
def test_starts_that_cannot_be(tmp_path, trained, changes, error, sentence):
  config = micro('diffusion')
  plain_svd(tmp_path, trained / 'diffusion/model')
  config.trainable = changes.get('trainable', config.trainable)
  config.init_from = str(tmp_path) if 'init_from' in changes else ''
  if 'wide' in changes:
    (
      config.unet.addition_time_embed_dim,
      config.unet.projection_class_embeddings_input_dim,
    ) = 64, 192
  with pytest.raises(error, match=sentence):
    diffusion_task(trained, config).init(jax.random.key(0))


def fine_tuning(task, trained, tmp_path):
  """The task on a start in half precision and with the published scaling factor."""
  name = {'autoencoder': 'vae'}.get(task, task)
  config, params = bundle.load_component(trained / 'diffusion/model', name)
  published = {'scaling_factor': 0.18215} if name == 'vae' else {}
  bundle.save_component(
    tmp_path / 'start',
    name,
    config | published,
    {k: np.asarray(x, np.float16) for k, x in params.items()},
    {},
  )
  config = micro(task)
  config.model = str(trained / 'embedder/model')
  config.init_from, config.data.dir = str(tmp_path / 'start'), str(trained / 'data')
  return name, config, lambda: main.task_class(task)(config, ONE, tmp_path / task)


@pytest.mark.parametrize('task', ['autoencoder', 'embedder'])
def test_fine_tuning_goes_on_in_full_precision(trained, tmp_path, task):
  _, config, make = fine_tuning(task, trained, tmp_path)
  assert {x.dtype for x in make().init(jax.random.key(0)).values()} == {
    np.dtype(np.float32)
  }


def test_a_fine_tuned_autoencoder_keeps_its_scaling_factor(trained, tmp_path):
  _, config, make = fine_tuning('autoencoder', trained, tmp_path)

  def factor(folder):
    return bundle.components(folder)['vae']['config']['scaling_factor']

  task = make()
  task.export(task.init(jax.random.key(0)))
  assert (
    factor(tmp_path / 'autoencoder/model')
    == 0.18215
    != factor(trained / 'autoencoder/model')
  )
  config.init_from = ''
  task.export(task.init(jax.random.key(0)))
  assert factor(tmp_path / 'autoencoder/model') != 0.18215


@pytest.mark.parametrize(
  ('task', 'changes', 'sentence'),
  [
    (
      'autoencoder',
      {'block_out_channels': (8, 24)},
      'has another vae .* here; change config.vae or choose another',
    ),
    (
      'embedder',
      {'width': 16},
      'has another embedder .* here; change config.embedder or choose another',
    ),
  ],
)
def test_starts_of_other_sizes_are_refused(trained, tmp_path, task, changes, sentence):
  name, config, make = fine_tuning(task, trained, tmp_path)
  config[name].update(changes)
  with pytest.raises(WeightsError, match=sentence):
    make().init(jax.random.key(0))


def test_missing_autoencoder_is_named(tmp_path, trained):
  config = micro('diffusion')
  config.data.dir = str(trained / 'data')
  with pytest.raises(
    ConfigError,
    match='config.model is missing: .* the vae and the embedder of a model folder',
  ):
    main.task_class('diffusion')(config, ONE, tmp_path / 'diffusion')
  config.model = str(trained / 'autoencoder/model')
  with pytest.raises(
    WeightsError, match='autoencoder/model has no embedder; it has: vae'
  ):
    main.task_class('diffusion')(config, ONE, tmp_path / 'diffusion')
  config.model = str(tmp_path / 'nowhere')
  with pytest.raises(WeightsError, match='nowhere is not a model folder'):
    main.task_class('diffusion')(config, ONE, tmp_path / 'diffusion')


def test_discrimination_counts_labelled_clips_whose_emotion_is_kept():
  logits = jax.random.normal(jax.random.key(0), (3, 4, 22))
  label, dropped = jnp.array([5, -1, 7]), jnp.array([False, False, True])
  loss, accuracy = emotion_discrimination(logits, label, dropped)
  expected = -jax.nn.log_softmax(logits[0])[:, 5].mean()
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  assert float(accuracy) == float((logits[0].argmax(-1) == 5).mean())


def test_discrimination_without_any_label_is_zero_with_zero_gradient():
  label, dropped = jnp.array([-1, 3]), jnp.array([False, True])
  loss, grad = jax.value_and_grad(
    lambda x: emotion_discrimination(x, label, dropped)[0]
  )(jnp.ones((2, 3, 22)))
  assert float(loss) == 0 and not np.asarray(grad).any()


def test_mouth_region_follows_the_face_rectangle():
  mask = np.zeros((2, 40, 40), np.float32)
  mask[0, 10:30, 8:28] = 1
  mask[1] = 1
  mouth = np.asarray(mouth_region(jnp.asarray(mask)))
  expected = np.zeros_like(mask)
  expected[0, 21:28, 13:23] = 1
  expected[1, 22:36, 10:30] = 1
  np.testing.assert_array_equal(mouth, expected)
