"""The prior of one clip, from the command line."""

import shutil

import numpy as np
import pytest

from dicetalk_jax import bundle, embed, published_priors
from dicetalk_jax.component import Component
from dicetalk_jax.data import feature_extraction
from dicetalk_jax.errors import WeightsError
from tests import tiny
from tests.prior_commands import (
  FRAMES,
  assert_help_without_arguments,
  assert_refused,
  output_of,
  save_model,
  write_clip,
)


@pytest.fixture(scope='module', autouse=True)
def quick_compilation():
  with tiny.quick_compilation(), tiny.shared_programs():
    yield


@pytest.fixture(scope='module')
def saved_model(tmp_path_factory):
  return save_model(tmp_path_factory.mktemp('model'))


@pytest.fixture
def model(saved_model, tmp_path):
  """A copy for each test, because the command saves priors in it."""
  return shutil.copytree(saved_model, tmp_path / 'model')


@pytest.fixture(scope='module')
def clip(tmp_path_factory):
  return write_clip(tmp_path_factory.mktemp('clip'))


def test_a_prior_of_both_modalities_goes_into_the_model_and_a_file(
  model, clip, tmp_path
):
  file = tmp_path / 'new' / 'me.npy'
  out = output_of(
    embed,
    model=model,
    audio=clip / 'speech.wav',
    expression=clip / 'expression.npy',
    save='me',
    output=file,
  )
  assert 'prior of 0.8 s of expressions and speech' in out
  assert '--emotion=me' in out

  prior = bundle.load_prior(model, 'me')
  embedder = Component.load(model, 'embedder')
  whisper = Component.load(model, 'whisper')
  states = feature_extraction.speech_states(whisper, tiny.speech(), FRAMES)
  expression = np.load(clip / 'expression.npy').astype(np.float32)[:FRAMES]
  # The embedder reads windows of at most 12 frames, so the clip is two windows of 10.
  halves = [
    feature_extraction.gaussian(embedder, expression[:10], states[:20]),
    feature_extraction.gaussian(embedder, expression[10:], states[20:]),
  ]
  # The audio of the file has 16 bits.
  np.testing.assert_allclose(prior, np.mean(halves, axis=0), rtol=1e-3, atol=1e-4)
  np.testing.assert_array_equal(published_priors.read(file).prior, prior)


@pytest.mark.parametrize(
  'files, parts',
  [
    (dict(audio='speech.wav'), 'speech'),
    (dict(expression='expression.npy'), 'expressions'),
    (dict(video='clip.mp4'), 'speech'),
    (dict(video='clip.mp4', expression='expression.npy'), 'expressions and speech'),
  ],
)
def test_a_prior_is_made_from_whatever_modalities_are_given(model, clip, files, parts):
  flags = {name: clip / file for name, file in files.items()}
  out = output_of(embed, model=model, **flags)
  assert f' of {parts}: ' in out
  assert 'nearest emotions: ' in out
  assert ('only the audio of' in out) == (list(files) == ['video'])
  assert bundle.emotions(model) == sorted(tiny.EMOTIONS)


@pytest.mark.parametrize(
  'modalities, other, sentence, parts',
  [
    (
      'video',
      dict(audio='speech.wav'),
      'on expressions alone and reads no audio; give --expression',
      'expressions',
    ),
    (
      'video',
      dict(video='clip.mp4'),
      'on expressions alone and reads no audio; give --expression',
      'expressions',
    ),
    (
      'audio',
      dict(expression='expression.npy'),
      'on speech alone and reads nothing else; give --audio',
      'speech',
    ),
  ],
)
def test_an_embedder_of_one_modality_ignores_the_other(
  clip, tmp_path, modalities, other, sentence, parts
):
  """A file of the other modality is refused alone, and ignored otherwise."""
  model = save_model(tmp_path / 'model', tiny.EMBEDDER | dict(modalities=modalities))
  wrong = {name: clip / file for name, file in other.items()}
  assert_refused(sentence, embed, model=model, save='me', **wrong)
  assert 'me' not in bundle.emotions(model)
  out = output_of(
    embed,
    model=model,
    audio=clip / 'speech.wav',
    expression=clip / 'expression.npy',
  )
  assert f' s of {parts}: ' in out


def test_columns_and_frame_rate_of_expressions_can_be_chosen(model, tmp_path):
  wide = np.random.default_rng(3).normal(size=(2 * FRAMES, 70))
  np.save(tmp_path / 'wide.npy', wide)
  np.save(tmp_path / 'plain.npy', wide[::2, 3:67])
  out = output_of(
    embed,
    model=model,
    expression=tmp_path / 'wide.npy',
    expression_columns='3:67',
    expression_fps=50,
    output=tmp_path / 'chosen.npy',
  )
  assert 'prior of 0.8 s of expressions' in out
  output_of(
    embed,
    model=model,
    expression=tmp_path / 'plain.npy',
    output=tmp_path / 'expected.npy',
  )
  chosen = published_priors.read(tmp_path / 'chosen.npy').prior
  expected = published_priors.read(tmp_path / 'expected.npy').prior
  np.testing.assert_array_equal(chosen, expected)


def test_the_nearest_emotions_do_not_count_what_all_emotions_share():
  rng = np.random.default_rng(1)
  shared = 100 * rng.normal(size=8)
  means = {name: shared + rng.normal(size=8) for name in ('happy', 'sad', 'fear')}
  known = {name: (mean, mean) for name, mean in means.items()}
  known['wide'] = np.ones(9), np.ones(9)
  (first, cosine), (_, second_cosine), _ = embed.nearest(means['sad'] + 0.1, known)
  assert first == 'sad'
  assert cosine > 0.9
  assert second_cosine < 0.5
  assert embed.nearest(shared, {'one': (shared, shared)}) == []


def test_an_emotion_is_replaced_only_on_request(model, clip):
  flags = dict(model=model, audio=clip / 'speech.wav', save='happy')
  before = bundle.load_prior(model, 'happy')[0]
  sentence = 'has happy already; choose another name, or add --overwrite'
  assert_refused(sentence, embed, **flags)
  np.testing.assert_array_equal(bundle.load_prior(model, 'happy')[0], before)
  output_of(embed, **flags, overwrite=True)
  assert (bundle.load_prior(model, 'happy')[0] != before).any()


def test_a_prior_is_read_only_by_an_emotion_model_that_learned_on_its_embedder(
  model, clip
):
  def save_emotion_model(priors):
    params = {'x': np.zeros(1)}
    bundle.save_component(model, 'emo_model', {}, params, {}, priors=priors)

  flags = dict(model=model, audio=clip / 'speech.wav', save='me', overwrite=True)
  embedder = bundle.components(model)['embedder']['fingerprint']
  assert embedder == Component.load(model, 'embedder').fingerprint
  save_emotion_model(priors=embedder)
  assert '--emotion=me' in output_of(embed, **flags)
  assert bundle.read_prior(model, 'me')[1] == embedder
  bundle.load_prior(model, 'me')

  save_emotion_model(priors='abc')
  sentence = 'learned on priors of another embedder: train the diffusion model'
  assert sentence in output_of(embed, **flags)
  with pytest.raises(
    WeightsError,
    match=f"'me' of .* comes from the embedder {embedder}, .* .abc. and would misread",
  ):
    bundle.load_prior(model, 'me')


@pytest.mark.parametrize(
  'content, sentence',
  [
    (b'junk', 'cannot be read as numbers'),
    (b'PK junk', 'cannot be read as numbers'),
    ({'mu': 1}, 'cannot be read as numbers'),
    (np.zeros((FRAMES, 70)), 'has 70 columns, the embedder wants the 64'),
    (np.zeros((0, 64)), 'holds [0, 64]'),
    (np.full((FRAMES, 64), np.nan), 'not finite'),
    (np.full((FRAMES, 64), 'a'), 'cannot be read as numbers'),
    (
      np.zeros((FRAMES * 6 // 5, 64)),
      'the expressions last 0.96 s at their rate, the audio 0.80 s',
    ),
  ],
)
def test_bad_expressions(saved_model, clip, tmp_path, content, sentence):
  file = tmp_path / 'expression.npy'
  if isinstance(content, bytes):
    file.write_bytes(content)
  else:
    np.save(file, content, allow_pickle=True)
  audio = clip / 'speech.wav'
  assert_refused(sentence, embed, model=saved_model, audio=audio, expression=file)


def test_missing_expressions(saved_model, clip, tmp_path):
  assert_refused(
    'cannot be read as numbers',
    embed,
    model=saved_model,
    audio=clip / 'speech.wav',
    expression=tmp_path / 'nowhere.npy',
  )


def test_bad_flags(saved_model, clip, tmp_path):
  good = dict(model=saved_model, audio=clip / 'speech.wav')

  def refused(sentence, **flags):
    assert_refused(sentence, embed, **{**good, **flags})

  assert_refused('--model', embed, audio=clip / 'speech.wav')
  assert_refused('there is nothing to embed', embed, model=saved_model)
  refused('give --audio or --video, not both', video=clip / 'clip.mp4')
  refused("--save='../x' is not a valid name", save='../x')
  refused('end the name in .npy', output=tmp_path / 'x.pt')
  refused('not a model folder', model=tmp_path / 'nowhere')
  refused('there is no recording', audio='nowhere.wav')
  tiny.write_speech(tmp_path / 'blip.wav', tiny.speech(0.03))
  refused('shorter than a frame', audio=tmp_path / 'blip.wav')
  expression = clip / 'expression.npy'
  refused(
    '--expression_fps must be positive, got 0',
    expression=expression,
    expression_fps=0,
  )
  refused(
    "--expression_columns: '5' is not understood; write FIRST:END; see python -m ",
    expression=expression,
    expression_columns='5',
  )
  refused('--what', what=1)


def test_the_help_is_shown_without_arguments():
  assert_help_without_arguments(embed)
