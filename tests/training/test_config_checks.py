"""Settings that contradict each other, or that no model can have, are refused."""

import importlib
import types

import pytest

from configs import diffusion, embedder
from dicetalk_jax.errors import ConfigError
from dicetalk_jax.models import registry
from dicetalk_jax.training import config_checks
from dicetalk_jax.training.diffusion import DiffusionTask


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
    (
      'default',
      {'fused_kernels': True, 'dtype': 'float32'},
      "no such kernel for config.dtype='float32'",
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
def test_every_diffusion_preset_passes_the_checks(name):
  config_checks.diffusion(diffusion.get_config(name))


@pytest.mark.parametrize('name', ['default', 'tiny', 'tiny,crops', *embedder.VARIANTS])
def test_every_embedder_preset_passes_the_checks(name):
  config_checks.embedder(embedder.get_config(name))


@pytest.mark.parametrize('task', ['diffusion', 'embedder'])
def test_dropout_needs_the_rates_of_all_cases(task):
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
  module = embedder if component == 'embedder' else diffusion
  config = module.get_config()[component].to_dict()
  with pytest.raises(ConfigError, match=sentence):
    registry.config_of(component, config | changes)


def test_heads_need_to_divide_only_where_there_is_attention():
  without_bank = diffusion.get_config('abl_no_bank').emo_model.to_dict()
  registry.config_of('emo_model', without_bank | {'num_heads': 7})
  # Only the second level of this UNet has attention.
  unet = diffusion.get_config('tiny').unet.to_dict()
  registry.config_of('unet', unet | {'num_attention_heads': (3, 2, 2)})


def test_an_image_encoder_of_another_width_is_refused():
  def component(**config):
    return types.SimpleNamespace(config=types.SimpleNamespace(**config))

  task = DiffusionTask.__new__(DiffusionTask)  # without data
  task.config = diffusion.get_config()
  task.has_emotion = True
  task.vae = component(latent_channels=4)
  task.whisper = component(d_model=384, encoder_layers=4)
  task.embedder = component(width=256)
  task.tower = component(projection_dim=1024)
  task._check_fit()
  task.tower = component(projection_dim=768)
  with pytest.raises(
    ConfigError,
    match='config.unet.cross_attention_dim=1024 does not fit .* which need 768',
  ):
    task._check_fit()


def emotion_model(**changes):
  config = diffusion.get_config().emo_model.to_dict()
  return registry.config_of('emo_model', config | changes)


def test_an_unknown_setting_of_a_model_is_refused():
  with pytest.raises(
    ConfigError,
    match="distance='dot' of the emotion model is unknown; choose one of l2, cosine",
  ):
    emotion_model(distance='dot')


@pytest.mark.parametrize(
  'change',
  [
    dict(distance='cosine'),
    dict(codebook_update='ema'),
    dict(stop_fc_grad=True),
    dict(null_kv='bank'),
  ],
)
def test_a_setting_of_the_bank_is_refused_without_a_bank(change):
  with pytest.raises(ConfigError, match="needs mode='bank'"):
    emotion_model(mode='direct', **change)
