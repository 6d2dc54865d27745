"""`paper_strict` is the paper: each setting that it states, and a comment for each that
it leaves open.
"""

import importlib
import re

import pytest

from dicetalk_jax.training import config_checks

# Setting to (value, where the paper states it).
STATED = {
  'embedder': {
    'data.corpora': (('mead', 'hdtf'), 'section 4.1'),
    'trainable': (('all',), 'section 3.1'),
    'lora.rank': (0, 'section 3.1'),
    'optim.name': ('adam', 'section 4.1'),
    'embedder.visual': ('expression', 'section 3.1'),
    'embedder.modalities': ('both', 'section 3.1'),
    'embedder.pool': ('linear', 'equation 4'),
    'loss.similarity': ('cosine', 'equations 7 and 8'),
    'loss.use_sample': (True, 'equation 6'),
    'loss.level_aware': (False, 'section 3.1'),
    'loss.other_people': ('negative', 'section 3.1'),
  },
  'diffusion': {
    'optim.name': ('adam', 'section 4.1'),
    'unet.adapters': (2, 'equation 14'),
    'emo_model.mode': ('bank', 'equations 9 to 13'),
    'emo_model.distance': ('l2', 'equations 9 to 13'),
    'emotion.p_whole_bank': (0.0, 'equations 9 to 13'),
    'emo_model.codebook_update': ('grad', 'equation 17'),
    'emo_model.stop_fc_grad': (False, 'equation 17'),
    'emo_model.commitment': (0.25, 'equation 17'),
    'emotion.sample': (True, 'equation 6, section 4.5'),
    'drop.audio': (0.05, 'section 4.1'),
    'drop.image': (0.05, 'section 4.1'),
    'drop.emotion': (0.05, 'section 4.1'),
    'drop.all': (0.05, 'section 4.1'),
    'drop.audio_emotion': (0.0, 'section 4.1'),
    'loss.lambda_vq': (1.0, 'equation 15'),
    'loss.face_weight': (0.0, 'equation 15'),
    'loss.mouth_weight': (0.0, 'equation 15'),
    'sample.num_steps': (25, 'section 4.1'),
  },
}
# What the paper leaves open and the release shows.
RELEASED = {
  'embedder': {},
  'diffusion': {
    'trainable': ('all',),
    'lora.rank': 0,
    'emotion.bank_init': 'uniform',
    'emotion.restart': 0,
  },
}
# The sections of settings that decide what is learned; the others say how a run is
# carried out.
RECIPE = ('trainable', 'lora', 'optim', 'drop', 'loss', 'emotion', 'noise', 'sample')
MODELS = ('unet', 'audio_linear', 'pose_guider', 'emo_model', 'embedder')


def preset(task, arg='paper_strict'):
  return importlib.import_module(f'configs.{task}').get_config(arg)


def value_of(config, key):
  for name in key.split('.'):
    config = config[name]
  return config


def settings(task):
  """All settings of a task that decide what is learned, by dotted key."""
  config = preset(task).to_dict()
  keys = ['batch_size', 'total_steps', 'trainable']
  for section in (*RECIPE, *MODELS):
    if isinstance(config.get(section), dict):
      keys += [f'{section}.{key}' for key in config[section]]
  how = {'data.dir', 'data.dataset', 'data.workers'}
  keys += [f'data.{key}' for key in config['data'] if f'data.{key}' not in how]
  return keys


def open_settings(task):
  """What the comments of a configuration name as open: keys, and whole sections."""
  text = importlib.import_module(f'configs.{task}').__loader__.get_data(
    importlib.import_module(f'configs.{task}').__file__
  )
  comments = re.findall(r'# open: (.*)', text.decode())
  keys = {key for line in comments for key in re.findall(r'\w+\.\w+|\w+_\w+', line)}
  sections = set()
  for line in comments:
    for named in re.findall(r'all (?:other sizes )?of ([\w, ]+)', line):
      sections |= set(re.findall(r'\w+', named))
  return keys, sections


@pytest.mark.parametrize('task', STATED)
def test_every_stated_setting_is_exact(task):
  config = preset(task)
  for key, (value, place) in STATED[task].items():
    assert value_of(config, key) == value, f'{key}: {place}'
  declared = importlib.import_module(f'configs.{task}').PAPER
  stated = {key: value for key, (value, _) in STATED[task].items()}
  assert declared == stated | RELEASED[task]


@pytest.mark.parametrize('task', STATED)
def test_every_other_setting_is_named_as_open(task):
  keys, sections = open_settings(task)
  for key in settings(task):
    if key in STATED[task] or key in RELEASED[task] or key.startswith('lora.'):
      continue
    assert key in keys or key.partition('.')[0] in sections, key


@pytest.mark.parametrize('task', STATED)
def test_what_is_open_stays_at_the_default(task):
  strict = preset(task).to_dict()
  default = preset(task, 'default').to_dict()
  for key in settings(task):
    if key not in STATED[task] and key not in RELEASED[task]:
      assert value_of(strict, key) == value_of(default, key), key


def test_the_paper_is_the_ground_of_its_ablations():
  """Whatever the order, a preset that is named besides it has the last word."""
  for arg in ('paper_strict,abl_no_bank', 'abl_no_bank,paper_strict'):
    config = preset('diffusion', arg)
    assert config.emo_model.mode == 'direct' and config.drop.audio_emotion == 0
    config_checks.diffusion(config)
  assert preset('diffusion', 'paper_strict,adapters').trainable == ('adapters',)
  with pytest.raises(ValueError, match="'paper_strict' and 'sonic' contradict"):
    preset('diffusion', 'paper_strict,sonic')
