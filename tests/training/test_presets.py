"""Presets: what each changes, what it does not, and which do not go together;
parameter trees at full size.
"""

import functools
import importlib
import re
import types

import jax
import pytest

from benchmarks.memory_table import batch_shapes
from configs import autoencoder, diffusion, embedder
from dicetalk_jax import parallel
from dicetalk_jax.errors import ConfigError
from dicetalk_jax.models import parameters, registry
from dicetalk_jax.training import config_checks
from dicetalk_jax.training.diffusion import TRAINED, DiffusionTask
from dicetalk_jax.training.diffusion_loss import DiffusionLoss
from dicetalk_jax.training.embedder import EmbedderTask
from dicetalk_jax.training.optimizer import make_optimizer
from dicetalk_jax.training.state import init_state, partition
from dicetalk_jax.training.step import make_train_step
from tests import tiny


def flat(config):
  out = {}
  for key, value in config.to_dict().items():
    out |= (
      {f'{key}.{k}': v for k, v in value.items()}
      if isinstance(value, dict)
      else {key: value}
    )
  return out


@pytest.mark.parametrize(
  ('module', 'name'),
  [(module, name) for module in (diffusion, embedder) for name in module.VARIANTS],
)
@pytest.mark.parametrize('base', ['', 'tiny,'])
def test_a_variant_changes_what_it_says_and_nothing_else(module, name, base):
  plain, changed = (
    flat(module.get_config(base.strip(',') or 'default')),
    flat(module.get_config(base + name)),
  )
  assert module.get_config(base + name) == module.get_config(
    ','.join(reversed((base + name).split(',')))
  )
  said = module.VARIANTS[name]
  for key in plain.keys() | changed.keys():
    section = key.partition('.')[0]
    if section in said and said[section] is None:
      assert key not in changed
    elif not (base and key in ('embedder.expr_dim', 'data.corpora')):  # synthetic data
      assert changed[key] == said.get(key, plain[key]), key


@pytest.mark.parametrize(
  ('module', 'arg', 'sentence'),
  [
    (
      diffusion,
      'tiny,huge',
      "unknown preset 'huge'; this file has: default, tiny, paper_strict",
    ),
    (
      diffusion,
      'abl_no_bank,abl_learnable_ca',
      'contradict each other in config.emo_model.mode',
    ),
    (diffusion, 'sonic,abl_no_prior', 'contradict each other in config.emotion.sample'),
    (diffusion, 'svp,sonic', 'contradict each other in config.emo_model.mode'),
    (
      embedder,
      'video_only,audio_only',
      'contradict each other in config.embedder.modalities',
    ),
    (embedder, 'default,tiny', "'default' alone"),
    (autoencoder, 'tiny,tiny', 'each name once'),
  ],
)
def test_presets_that_do_not_go_together(module, arg, sentence):
  with pytest.raises(ValueError, match=sentence):
    module.get_config(arg)


@pytest.mark.parametrize('module', [autoencoder, diffusion, embedder])
def test_what_tiny_sets_can_be_set_at_full_size(module):
  """A key that only a preset has could not be overridden without it."""
  assert flat(module.get_config('tiny')).keys() - flat(module.get_config()).keys() == {
    'frozen.whisper',
    'frozen.image_encoder',
  }


def changed(task, arg='default', **changes):
  config = importlib.import_module(f'configs.{task}').get_config(arg)
  config.update_from_flattened_dict(changes)
  return config


@pytest.mark.parametrize(
  ('arg', 'changes', 'sentence'),
  [
    (
      'default',
      {'emotion.bank_init': 'uniform', 'emo_model.stop_fc_grad': True},
      'map every prior to the same code for good',
    ),
    ('sonic', {'loss.lambda_cls': 0.1}, 'no classifier'),
    ('sonic', {'unet.adapters': 2}, 'audio alone needs 1'),
    ('default', {'unet.adapters': 1}, 'audio and emotion need 2'),
    (
      'abl_no_bank',
      {'emotion.restart': 100},
      "restart=100 needs config.emo_model.mode='bank'",
    ),
    ('abl_learnable_ca', {'emotion.p_whole_bank': 0.5}, "no bank in mode 'learnable'"),
    ('default', {'emo_model.num_classes': 8}, 'labelled with 22 classes'),
    ('default', {'emotion.restart': -1}, 'restart=-1'),
    ('default', {'drop.audio': 0.9}, 'their sum at most 1'),
    (
      'default',
      {'remat': 'all'},
      "config.remat='all' is unknown; choose one of: none, block",
    ),
    ('default', {'data.buckets': 'guessed'}, 'measured, fixed'),
    ('default', {'noise.ref_aug': 'some'}, 'none, lognormal'),
    ('default', {'loss.cls_pool': 'video'}, 'frame, clip'),
    ('default', {'emotion.emo_ref': 'any'}, 'same_clip, other_clip'),
    ('default', {'data.frames': 0}, 'config.data.frames=0 must be at least 1'),
    ('default', {'data.step': 0}, 'config.data.step=0 must be at least 1'),
    (
      'default',
      {'data.area': (1.1,)},
      r'config.data.area=\(1.1,\) must be two positive numbers',
    ),
    ('default', {'data.area': (1.3, 1.0)}, 'the smaller one first'),
    (
      'sonic',
      {'unet.addition_time_embed_dim': 128},
      'input_dim=768 must be 3 times .*time_embed_dim=128',
    ),
    ('default', {'data.reference': 'any'}, 'clip, identity'),
    ('default', {'emo_model.mode': 'none'}, 'bank, direct, learnable'),
    ('default', {'emo_model.dim': 512}, 'emo_model.dim=512 does not fit .* need 1024'),
    (
      'sonic',
      {'audio_linear.output_dim': 512},
      'audio_linear.output_dim=512 does not fit .* need 1024',
    ),
  ],
)
def test_impossible_diffusion_settings(arg, changes, sentence):
  with pytest.raises(ConfigError, match=sentence):
    config_checks.diffusion(changed('diffusion', arg, **changes))


@pytest.mark.parametrize(
  ('arg', 'changes', 'sentence'),
  [
    ('video_only', {'drop.video': 0.2}, 'only modality cannot be dropped'),
    ('default', {'drop.video': 0.6, 'drop.audio': 0.6}, 'their sum at most 1'),
    ('default', {'loss.similarity': 'dot'}, 'cosine, inv_dist'),
    (
      'default',
      {'data.min_len': 257},
      'min_len=257 and config.data.max_len=256 are .* at most the second',
    ),
    ('default', {'data.min_len': 0}, 'min_len=0 .* at least 1'),
    ('default', {'batch_size': 32}, 'batch_size=32, but .* make 192 windows'),
    ('default', {'embedder.pool': 'max'}, 'linear, mlp_mish'),
    (
      'default',
      {'accum': 2},
      'config.accum=2: the contrastive loss compares all clips of a batch',
    ),
    (
      'crops,audio_only',
      {},
      "modalities='audio' with config.embedder.visual='crops': the crops would never "
      'be seen',
    ),
    (
      'crops,mediapipe',
      {},
      "expr_norm='zscore' with config.embedder.visual='crops': there are no expression "
      'coeff',
    ),
  ],
)
def test_impossible_embedder_settings(arg, changes, sentence):
  with pytest.raises(ConfigError, match=sentence):
    config_checks.embedder(changed('embedder', arg, **changes))


@pytest.mark.parametrize('name', ['default', 'tiny', *diffusion.VARIANTS])
def test_variants_pass_the_checks(name):
  config_checks.diffusion(diffusion.get_config(name))


@pytest.mark.parametrize('name', ['default', 'tiny', 'tiny,crops', *embedder.VARIANTS])
def test_embedder_variants_pass_the_checks(name):
  config_checks.embedder(embedder.get_config(name))


def test_rates_of_all_cases_are_needed():
  for task in ('diffusion', 'embedder'):
    config = changed(task)
    config.drop = {}
    with pytest.raises(
      ConfigError, match='config.drop={} must have these probabilities: .*audio'
    ):
      getattr(config_checks, task)(config)


@pytest.mark.parametrize(
  ('component', 'changes', 'sentence'),
  [
    (
      'embedder',
      {'heads': 7},
      'width=256 of the embedder must be even and a multiple of heads=7',
    ),
    ('embedder', {'heads': 0}, 'multiple of heads=0'),
    ('embedder', {'width': 63, 'heads': 3}, 'width=63 of the embedder must be even'),
    (
      'emo_model',
      {'num_heads': 7},
      'dim=1024 of the emotion model must be a multiple of num_heads=7',
    ),
    (
      'unet',
      {'num_attention_heads': (5, 10, 20)},
      r'num_attention_heads=\(5, 10, 20\) .* must have 4 entries',
    ),
    ('unet', {'layers_per_block': (1, 2)}, 'layers_per_block=.* must have 4 entries'),
    (
      'unet',
      {'num_attention_heads': (5, 10, 20, 19)},
      r'multiples of .* num_attention_heads=\(5, 10, 20, 19\)',
    ),
    (
      'unet',
      {'num_attention_heads': (7, 10, 20, 20)},
      'multiples of .* where there is attention',
    ),
    ('unet', {'norm_num_groups': 48}, 'multiples of norm_num_groups=48'),
  ],
)
def test_sizes_that_do_not_divide(component, changes, sentence):
  config = (
    (embedder if component == 'embedder' else diffusion)
    .get_config()[component]
    .to_dict()
  )
  with pytest.raises(ConfigError, match=sentence):
    registry.config_of(component, config | changes)


def test_heads_matter_only_where_there_is_attention():
  registry.config_of(
    'emo_model',
    diffusion.get_config('abl_no_bank').emo_model.to_dict() | {'num_heads': 7},
  )
  registry.config_of(
    'unet',
    diffusion.get_config('tiny').unet.to_dict() | {'num_attention_heads': (3, 2, 2)},
  )


def test_an_image_encoder_of_another_width_is_refused():
  def of(**config):
    return types.SimpleNamespace(config=types.SimpleNamespace(**config))

  task = DiffusionTask.__new__(DiffusionTask)
  task.config, task.has_emotion = diffusion.get_config(), True
  task.vae, task.whisper, task.embedder = (
    of(latent_channels=4),
    of(d_model=384, encoder_layers=4),
    of(width=256),
  )
  task.tower = of(projection_dim=1024)
  task._check_fit()
  task.tower = of(projection_dim=768)
  with pytest.raises(
    ConfigError,
    match='config.unet.cross_attention_dim=1024 does not fit .* which need 768',
  ):
    task._check_fit()


def test_unknown_or_idle_settings_of_the_models_are_refused():
  def make(**changes):
    return registry.config_of(
      'emo_model', changed('diffusion').emo_model.to_dict() | changes
    )

  with pytest.raises(
    ConfigError,
    match="distance='dot' of the emotion model is unknown; choose one of l2, cosine",
  ):
    make(distance='dot')
  for change in (
    dict(distance='cosine'),
    dict(codebook_update='ema'),
    dict(stop_fc_grad=True),
    dict(null_kv='bank'),
  ):
    with pytest.raises(ConfigError, match="needs mode='bank'"):
      make(mode='direct', **change)


@functools.cache
def tree(task, arg, component):
  """Parameter shapes of a component at full size; None where it has none."""
  config = importlib.import_module(f'configs.{task}').get_config(arg)
  if component not in config:
    return None
  _, target = parameters.abstract(
    registry.builder(component, config[component].to_dict())
  )
  return {name: x.shape for name, x in target.items()}


LEAVES_OUT = {
  'paper_strict': r'^$',
  'adapters': r'^$',
  'abl_no_cls': r'^$',
  'abl_no_prior': r'^$',
  'abl_no_bank': r'^emo_model\.(codebook|kv_tokens_linear|attention)\.',
  'svp': r'^emo_model\.(codebook|kv_tokens_linear|attention)\.',
  'abl_learnable_ca': r'^emo_model\.codebook\.fc\.',
  'sonic': r'^(emo_model|pose_guider)\.',
}


@pytest.mark.parametrize('arg', LEAVES_OUT)
def test_parameters_of_a_diffusion_variant(arg):
  # The UNet is equal but for Sonic's missing adapter; its names are those published,
  # see tests/models/test_unet.py.
  unet = diffusion.get_config().unet.to_dict()
  assert diffusion.get_config(arg).unet.to_dict() == unet | (
    {'adapters': 1} if arg == 'sonic' else {}
  )

  def whole(arg):
    return {
      f'{c}.{name}': shape
      for c in TRAINED
      if c != 'unet'
      for name, shape in (tree('diffusion', arg, c) or {}).items()
    }

  plain = whole('default')
  assert whole(arg) == {
    name: shape for name, shape in plain.items() if not re.search(LEAVES_OUT[arg], name)
  }
  assert (whole(arg) == plain) == (LEAVES_OUT[arg] == '^$')


def test_parameters_of_an_embedder_variant():
  plain = tree('embedder', 'default', 'embedder')
  for arg in ('svp', 'video_only', 'audio_only'):
    assert tree('embedder', arg, 'embedder') == plain
  mediapipe = tree('embedder', 'mediapipe', 'embedder')
  assert {name for name in mediapipe if mediapipe[name] != plain.get(name)} == {
    'expr_mean',
    'expr_std',
    'visual.linear_in.kernel',
  }
  seeing = tree('embedder', 'crops', 'embedder')
  assert {name for name in seeing if seeing[name] != plain.get(name)} == {
    'visual.linear_in.kernel'
  } | {
    f'crop_encoder.{layer}'
    for i in range(5)
    for layer in (
      f'convs.{i}.kernel',
      f'convs.{i}.bias',
      f'norms.{i}.scale',
      f'norms.{i}.bias',
    )
  }
  assert plain.keys() < seeing.keys()
  state = partition(
    {f'embedder.{name}': 0 for name in mediapipe},
    ('all',),
    sets=EmbedderTask.sets,
    constants=EmbedderTask.constants,
  )
  assert set(state[1]) == {'embedder.expr_mean', 'embedder.expr_std'}


@pytest.mark.parametrize(
  ('name', 'unet'),
  [
    ('all', ''),
    ('adapters', r'\.processor\.to_[kv]_ip\.'),
    ('adapters_temporal', r'\.processor\.to_[kv]_ip\.|\.temporal_transformer_blocks\.'),
  ],
)
def test_frozen_parameters_carry_no_optimizer_state(name, unet):
  """Of the full-size model, by the tree of the training state."""
  config = diffusion.get_config()
  shapes = {
    f'{c}.{key}': jax.ShapeDtypeStruct(shape, 'float32')
    for c in TRAINED
    for key, shape in tree('diffusion', 'default', c).items()
  }
  trained, held = partition(shapes, (name,), sets=DiffusionTask.sets)
  expected = {
    key for key in shapes if not key.startswith('unet.') or re.search(unet, key)
  }
  assert set(trained) == expected and set(held) == shapes.keys() - expected
  assert bool(held) == bool(unet)
  tx = make_optimizer(config.optim, config.total_steps, DiffusionTask.new_modules)
  state = jax.eval_shape(functools.partial(init_state, tx=tx, ema=True), trained)
  named = [path[-1].key for path, x in jax.tree.leaves_with_path(state) if x.ndim]
  assert set(named) == expected and len(named) == 4 * len(
    expected
  )  # values, averages, two moments


def metrics_of_a_step(task, params, batch):
  """Traces the whole training step, as the loop makes it; the metrics' shapes by
  name.
  """
  config, mesh = task.config, parallel.make_mesh(devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    trained, held = partition(
      params, config.trainable, sets=task.sets, constants=task.constants
    )
    tx = make_optimizer(config.optim, config.total_steps, task.new_modules)
    state = jax.eval_shape(
      functools.partial(init_state, tx=tx, ema=True, extra=task.extra_state), trained
    )
    step = make_train_step(
      lambda params, held, *args: task.loss({**held, **params}, *args),
      tx,
      parallel.shardings(state, mesh),
      ema=0.9,
      after_update=task.after_update,
    )
    after, metrics = jax.eval_shape(
      step, state, held, batch, jax.eval_shape(lambda: jax.random.key(0))
    )
  assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
    lambda x: (x.shape, x.dtype), state
  )
  return metrics


def smallest(arg):
  config = diffusion.get_config(arg)
  for name in TRAINED:
    if name in config:
      config[name].update(
        tiny.CONFIGS[name] | ({'num_classes': 22} if name == 'emo_model' else {})
      )
  config.unet.update(in_channels=8, out_channels=4)
  config.optim.name, config.data.size = 'adam', 16
  return config


@pytest.mark.parametrize('name', ['', *diffusion.VARIANTS])
def test_every_diffusion_variant_makes_a_step(name):
  plain, config = smallest('tiny'), smallest(f'tiny,{name}'.strip(','))
  abstract = {
    c: parameters.abstract(registry.builder(c, config[c].to_dict()))
    for c in TRAINED
    if c in config
  }
  task = DiffusionTask.__new__(DiffusionTask)  # without data and frozen networks
  task.config, task.has_emotion = config, 'emo_model' in config
  task._loss = DiffusionLoss(
    config, {c: graph for c, (graph, _) in abstract.items()}, 1.0
  )
  params = {
    key: x
    for c, (_, part) in abstract.items()
    for key, x in parameters.add_prefix(c, part).items()
  }
  batch = batch_shapes(plain)
  for key, shape in (
    ('latents', (plain.data.frames, 8, 8, 4)),
    ('reference', (8, 8, 4)),
  ):  # half the picture's side
    batch[key] = jax.ShapeDtypeStruct((plain.batch_size, *shape), 'float32')
  metrics = metrics_of_a_step(task, params, batch)
  has_bank = task.has_emotion and config.emo_model.mode == 'bank'
  assert ('vq' in metrics) == ('bank_perplexity' in metrics) == has_bank


@pytest.mark.parametrize('name', ['', *embedder.VARIANTS])
def test_every_embedder_variant_makes_a_step(name):
  config = embedder.get_config(f'tiny,{name}'.strip(','))
  task = EmbedderTask.__new__(EmbedderTask)
  task.config = config
  task.graphdef, params = parameters.abstract(
    registry.builder('embedder', config.embedder.to_dict())
  )
  c, rows, frames = config.embedder, config.batch_size, config.data.max_len
  seen = (
    ((c.crop_size, c.crop_size, 3), 'uint8')
    if c.visual == 'crops'
    else ((c.expr_dim,), 'float32')
  )
  shapes = {
    'expr': ((frames, *seen[0]), seen[1]),
    'frame_mask': ((frames,), bool),
    'whisper': ((2 * frames, c.whisper_states, c.whisper_dim), 'float16'),
  }
  shapes |= {key: ((), bool) for key in ('has_video', 'has_audio')}
  shapes |= {
    key: ((), 'int32') for key in ('dataset', 'identity', 'emotion', 'level', 'video')
  }
  batch = {
    key: jax.ShapeDtypeStruct((rows, *shape), dtype)
    for key, (shape, dtype) in shapes.items()
  }
  metrics = metrics_of_a_step(task, parameters.add_prefix('embedder', params), batch)
  assert {'loss', 'sigma'} <= metrics.keys()
