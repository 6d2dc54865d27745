"""The prior of one clip, and those of a data set, from the command line."""

import dataclasses
import itertools
import pathlib
import shutil
import sys

import numpy as np
import pytest

from data_pipelines.builders.synthetic import prepare_synthetic
from data_pipelines.builders.synthetic_clips import SyntheticConfig
from data_pipelines.synthetic.clip import make_clip
from dicetalk_jax import bundle, dataset_priors, embed, published_priors
from dicetalk_jax.component import Component
from dicetalk_jax.data import face_crops, feature_extraction
from dicetalk_jax.data.clip_record import UNKNOWN
from dicetalk_jax.data.clip_source import ClipSource
from dicetalk_jax.errors import WeightsError
from dicetalk_jax.media.video import write_video
from dicetalk_jax.models import parameters, registry
from tests import tiny

EMBEDDER = dict(
  expr_dim=64,
  whisper_dim=8,
  whisper_states=2,
  width=6,
  heads=2,
  mlp_dim=8,
  visual_layers=1,
  audio_layers=1,
  fusion_layers=1,
  dropout=0.0,
  max_len=10,
)
CROPS = dict(visual='crops', crop_size=8, crop_channels=(4,))
FRAMES = 20  # of tiny.speech()


@pytest.fixture(scope='module', autouse=True)
def quick_compilation():
  with tiny.quick_compilation():
    yield


@pytest.fixture(scope='module')
def clip(tmp_path_factory):
  """Files of one clip."""
  folder = tmp_path_factory.mktemp('clip')
  tiny.write_speech(folder / 'speech.wav')
  write_video(
    folder / 'clip.mp4', np.zeros((FRAMES, 16, 16, 3), np.uint8), 25, tiny.speech()
  )
  np.save(
    folder / 'expression.npy', np.random.default_rng(3).normal(size=(FRAMES + 1, 64))
  )
  return folder


def save_model(folder, embedder):
  """Writes a model folder with all that embedding needs, and two emotions."""
  for name, config in (('embedder', embedder), ('whisper', tiny.CONFIGS['whisper'])):
    params = parameters.numpy_params(
      parameters.abstract(registry.builder(name, config))[1]
    )
    bundle.save_component(
      folder, name, registry.config_of(name, config).to_json(), params, {}
    )
  rng = np.random.default_rng(0)
  bundle.save_priors(
    folder, {name: (5 + rng.normal(size=6), np.ones(6)) for name in tiny.EMOTIONS}
  )
  return folder


@pytest.fixture
def model(tmp_path):
  return save_model(tmp_path / 'model', EMBEDDER)


@pytest.fixture
def seeing(tmp_path):
  """The model folder of an embedder that reads images."""
  return save_model(tmp_path / 'seeing', EMBEDDER | CROPS)


@pytest.fixture(scope='module')
def portrait(tmp_path_factory):
  """A rendered person who speaks, as a video with audio and one without."""
  folder = tmp_path_factory.mktemp('portrait')
  person = make_clip(1, 'happy', 3, 0, size=128, max_seconds=0.4)
  write_video(folder / 'clip.mp4', person.frames, 25, person.audio)
  write_video(folder / 'mute.mp4', person.frames, 25)
  return folder, person


def call(monkeypatch, module, **flags):
  def spelled(name, value):
    return f'--{name}' if value is True else f'--{name}={value}'

  argv = [spelled(*flag) for flag in flags.items()]
  monkeypatch.setattr(sys, 'argv', [module.__name__, *argv])
  module.run()


@pytest.fixture
def run(monkeypatch, capsys):
  """run(module, **flags) -> what the command prints."""

  def run(module, **flags):
    call(monkeypatch, module, **flags)
    return capsys.readouterr().out

  return run


@pytest.fixture
def refuses(monkeypatch, capsys):
  """refuses(sentence, module, **flags): one line and exit code 2."""

  def refuses(sentence, module, **flags):
    with pytest.raises(SystemExit) as stop:
      call(monkeypatch, module, **flags)
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.startswith('error: ')
    assert err.count('\n') == 1
    assert sentence in err

  return refuses


def test_both_modalities_into_model_folder_and_file(model, clip, run, tmp_path):
  out = run(
    embed,
    model=model,
    audio=clip / 'speech.wav',
    expression=clip / 'expression.npy',
    save='me',
    output=tmp_path / 'new' / 'me.npy',
  )
  assert 'prior of 0.8 s of expressions and speech' in out
  assert '--emotion=me' in out
  prior = bundle.load_prior(model, 'me')
  embedder, whisper = (Component.load(model, name) for name in ('embedder', 'whisper'))
  states = feature_extraction.speech_states(whisper, tiny.speech(), FRAMES)
  expression = np.load(clip / 'expression.npy').astype(np.float32)[:FRAMES]
  halves = [
    feature_extraction.gaussian(
      embedder, expression[i : i + 10], states[2 * i : 2 * i + 20]
    )
    for i in (0, 10)
  ]
  # The audio of the file has 16 bits.
  np.testing.assert_allclose(prior, np.mean(halves, axis=0), rtol=1e-3, atol=1e-4)
  written = published_priors.read(tmp_path / 'new' / 'me.npy')
  np.testing.assert_array_equal(written.prior, prior)


@pytest.mark.parametrize(
  'flags, parts',
  [
    (dict(audio='speech.wav'), 'speech'),
    (dict(expression='expression.npy'), 'expressions'),
    (dict(video='clip.mp4'), 'speech'),
    (dict(video='clip.mp4', expression='expression.npy'), 'expressions and speech'),
  ],
)
def test_any_modality(model, clip, run, flags, parts):
  out = run(embed, model=model, **{name: clip / file for name, file in flags.items()})
  assert f' of {parts}: ' in out
  assert 'nearest emotions: ' in out
  assert ('only the audio of' in out) == (list(flags) == ['video'])
  assert bundle.emotions(model) == sorted(tiny.EMOTIONS)


def test_a_prior_from_a_plain_video(seeing, portrait, run, tmp_path):
  folder, person = portrait
  frames = len(person.frames)
  out = run(
    embed,
    model=seeing,
    video=folder / 'clip.mp4',
    output=tmp_path / 'both.npy',
    save='me',
  )
  assert f'the face is seen from 0.00 s to {frames / 25:.2f} s' in out
  assert f'prior of {frames / 25:.1f} s of images and speech' in out
  assert '--emotion=me' in out
  assert ' s of images: ' in run(
    embed, model=seeing, video=folder / 'mute.mp4', output=tmp_path / 'mute.npy'
  )
  assert ' s of speech: ' in run(
    embed, model=seeing, audio=folder / 'clip.mp4', output=tmp_path / 'heard.npy'
  )
  both, mute, heard = (
    np.array(published_priors.read(tmp_path / f'{name}.npy').prior)
    for name in ('both', 'mute', 'heard')
  )
  for a, b in itertools.combinations((both, mute, heard), 2):
    assert np.abs(a - b).max() > 1e-3
  faces = np.stack(
    [
      face_crops.crop_square(frame, 128 * box, 8)
      for frame, box in zip(person.frames, person.bbox)
    ]
  )
  seen, _ = face_crops.of_video(folder / 'mute.mp4', 8)
  assert np.corrcoef(faces.ravel(), seen.ravel())[0, 1] > 0.9  # whole frames: 0.6
  embedder = Component.load(seeing, 'embedder')
  no_states = np.zeros((0, 2, 8), np.float32)
  expected = feature_extraction.gaussian(embedder, seen, no_states)
  np.testing.assert_allclose(mute, expected, rtol=1e-3, atol=1e-4)


def test_videos_and_files_that_an_embedder_of_images_cannot_read(
  seeing, clip, refuses, tmp_path
):
  refuses('no face was found in', embed, model=seeing, video=clip / 'clip.mp4')
  refuses(
    'trained on face crops and reads no expression coefficients; leave out '
    '--expression, and give a --video',
    embed,
    model=seeing,
    audio=clip / 'speech.wav',
    expression=clip / 'expression.npy',
  )
  refuses('does not exist', embed, model=seeing, video=tmp_path / 'nowhere.mp4')
  (tmp_path / 'junk.mp4').write_bytes(b'junk')
  refuses('cannot be read as a video', embed, model=seeing, video=tmp_path / 'junk.mp4')


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
def test_embedders_of_one_modality(
  clip, run, refuses, tmp_path, modalities, other, sentence, parts
):
  """Files of the other modality make no prior alone, and are not counted next to
  those of the right one.
  """
  model = save_model(tmp_path / 'model', EMBEDDER | dict(modalities=modalities))
  refuses(
    sentence,
    embed,
    model=model,
    save='me',
    **{name: clip / file for name, file in other.items()},
  )
  assert 'me' not in bundle.emotions(model)
  out = run(
    embed, model=model, audio=clip / 'speech.wav', expression=clip / 'expression.npy'
  )
  assert f' s of {parts}: ' in out


def test_an_embedder_of_images_alone(clip, refuses, tmp_path):
  config = EMBEDDER | CROPS | dict(modalities='video')
  model = save_model(tmp_path / 'model', config)
  refuses(
    'trained on images alone and reads no audio; give a --video',
    embed,
    model=model,
    audio=clip / 'speech.wav',
  )


def test_columns_and_rate_of_expressions(model, run, tmp_path):
  np.save(tmp_path / 'wide.npy', np.random.default_rng(3).normal(size=(2 * FRAMES, 70)))
  out = run(
    embed,
    model=model,
    expression=tmp_path / 'wide.npy',
    expression_columns='3:67',
    expression_fps=50,
    output=tmp_path / 'a.npy',
  )
  assert 'prior of 0.8 s of expressions' in out
  np.save(tmp_path / 'plain.npy', np.load(tmp_path / 'wide.npy')[::2, 3:67])
  run(embed, model=model, expression=tmp_path / 'plain.npy', output=tmp_path / 'b.npy')
  np.testing.assert_array_equal(
    *(published_priors.read(tmp_path / name).prior for name in ('a.npy', 'b.npy'))
  )


def test_nearest_leaves_out_what_all_emotions_share():
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


def test_an_emotion_is_replaced_on_request_only(model, clip, run, refuses):
  flags = dict(model=model, audio=clip / 'speech.wav', save='happy')
  before = bundle.load_prior(model, 'happy')[0]
  refuses('has happy already; choose another name, or add --overwrite', embed, **flags)
  np.testing.assert_array_equal(bundle.load_prior(model, 'happy')[0], before)
  run(embed, **flags, overwrite=True)
  assert (bundle.load_prior(model, 'happy')[0] != before).any()


def test_priors_of_another_embedder_are_never_replaced(model, clip, run, refuses, data):
  """They are those that the emotion model learned on."""
  theirs = bundle.load_prior(model, 'happy')
  bundle.save_priors(model, {'happy': theirs}, 'abc')
  sentence = "has the emotion 'happy' of another embedder (abc, not "
  refuses(
    sentence,
    embed,
    model=model,
    audio=clip / 'speech.wav',
    save='happy',
    overwrite=True,
  )
  refuses(sentence, dataset_priors, model=model, data=data)
  np.testing.assert_array_equal(bundle.load_prior(model, 'happy'), theirs)


def test_priors_name_their_embedder_and_the_emotion_model_that_cannot_read_them(
  model, clip, run
):
  embedder = bundle.components(model)['embedder']['fingerprint']
  assert embedder == Component.load(model, 'embedder').fingerprint
  bundle.save_component(model, 'emo_model', {}, {'x': np.zeros(1)}, {}, priors=embedder)
  flags = dict(model=model, audio=clip / 'speech.wav', save='me', overwrite=True)
  assert '--emotion=me' in run(embed, **flags)
  assert bundle.read_prior(model, 'me')[1] == embedder
  bundle.load_prior(model, 'me')
  bundle.save_component(model, 'emo_model', {}, {'x': np.zeros(1)}, {}, priors='abc')
  assert 'learned on priors of another embedder: train the diffusion model' in run(
    embed, **flags
  )
  with pytest.raises(
    WeightsError,
    match=f"'me' of .* comes from the embedder {embedder}, .* .abc. and would misread",
  ):
    bundle.load_prior(model, 'me')


def array(values):
  return lambda path: np.save(path, values)


@pytest.mark.parametrize(
  'make, sentence',
  [
    (None, 'cannot be read as numbers'),
    (lambda path: path.write_bytes(b'junk'), 'cannot be read as numbers'),
    (lambda path: path.write_bytes(b'PK junk'), 'cannot be read as numbers'),
    (
      lambda path: np.save(path, {'mu': 1}, allow_pickle=True),
      'cannot be read as numbers',
    ),
    (array(np.zeros((FRAMES, 70))), 'has 70 columns, the embedder wants the 64'),
    (array(np.zeros((0, 64))), 'holds [0, 64]'),
    (array(np.full((FRAMES, 64), np.nan)), 'not finite'),
    (array(np.full((FRAMES, 64), 'a')), 'cannot be read as numbers'),
    (
      array(np.zeros((FRAMES * 6 // 5, 64))),
      'the expressions last 0.96 s at their rate, the audio 0.80 s',
    ),
  ],
)
def test_bad_expressions(model, clip, refuses, tmp_path, make, sentence):
  if make:
    make(tmp_path / 'x.npy')
  refuses(
    sentence,
    embed,
    model=model,
    audio=clip / 'speech.wav',
    expression=tmp_path / 'x.npy',
  )


def test_bad_flags(model, clip, refuses, tmp_path):
  good = dict(model=model, audio=clip / 'speech.wav')
  refuses('--model', embed, audio=clip / 'speech.wav')
  refuses('there is nothing to embed', embed, model=model)
  refuses('give --audio or --video, not both', embed, **good, video=clip / 'clip.mp4')
  refuses("--save='../x' is not a valid name", embed, **good, save='../x')
  refuses('end the name in .npy', embed, **good, output=tmp_path / 'x.pt')
  refuses('not a model folder', embed, **good | dict(model=tmp_path / 'nowhere'))
  refuses('there is no recording', embed, **good | dict(audio='nowhere.wav'))
  tiny.write_speech(tmp_path / 'blip.wav', tiny.speech(0.03))
  refuses('shorter than a frame', embed, **good | dict(audio=tmp_path / 'blip.wav'))
  refuses(
    '--expression_fps must be positive, got 0',
    embed,
    **good,
    expression=clip / 'expression.npy',
    expression_fps=0,
  )
  refuses(
    "--expression_columns: '5' is not understood; write FIRST:END; see python -m ",
    embed,
    **good,
    expression=clip / 'expression.npy',
    expression_columns='5',
  )
  refuses('--what', embed, **good, what=1)


@pytest.mark.parametrize('module', [embed, dataset_priors])
def test_no_arguments_show_the_help(module, monkeypatch, capsys):
  monkeypatch.setattr(sys, 'argv', ['x'])
  with pytest.raises(SystemExit) as stop:
    module.run()
  assert stop.value.code == 2
  usage = capsys.readouterr().err
  assert f'usage: python -m {module.__name__}' in usage
  assert '--model' in usage
  assert '(default: ' in usage


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  """A person in every emotion, at two levels but for neutral."""
  folder = tmp_path_factory.mktemp('data')
  prepare_synthetic(
    folder,
    SyntheticConfig(
      train=1, val=0, test=0, clips=16, seconds=0.4, levels=(1, 3), content='embedder'
    ),
    workers=1,
  )
  return folder


def test_priors_of_a_data_set(model, data, run, tmp_path):
  out = run(
    dataset_priors, model=model, data=data, by_intensity=True, output=tmp_path / 'npy'
  )
  assert 'wrote 22 priors of 16 clips' in out
  names = bundle.emotions(model)
  assert len(names) == 22
  assert {'neutral', 'happy', 'happy_1', 'happy_3'} <= set(names)
  assert 'neutral_1' not in names
  source = ClipSource(next(data.rglob('dataset_info.json')).parent)
  embedder, whisper = (Component.load(model, name) for name in ('embedder', 'whisper'))
  table = source.table
  (clip,) = np.flatnonzero((table.emotion == 'happy') & (table.intensity == 1))
  record = source[clip]
  expression = record['expression']
  wave = record['audio'].astype(np.float32) / 32767
  states = feature_extraction.speech_states(whisper, wave, len(expression))
  expected = feature_extraction.gaussian(embedder, expression, states)
  np.testing.assert_allclose(
    bundle.load_prior(model, 'happy_1'), expected, rtol=1e-5, atol=1e-6
  )
  levels = [bundle.load_prior(model, f'happy_{level}') for level in (1, 3)]
  np.testing.assert_allclose(  # a clip of each
    bundle.load_prior(model, 'happy'), np.mean(levels, axis=0), rtol=1e-5, atol=1e-6
  )
  for name in names:
    np.testing.assert_array_equal(
      published_priors.read(tmp_path / 'npy' / f'{name}.npy').prior,
      bundle.load_prior(model, name),
    )


def test_priors_of_several_data_sets(model, data, run, refuses, tmp_path):
  """Clips of all sets count alike, those without labels do not, and training finds
  what was computed.
  """
  one = next(data.rglob('dataset_info.json')).parent
  assert 'wrote 8 priors of 16 clips' in run(
    dataset_priors, model=model, data=tmp_path, datasets=one
  )

  def sad():
    return np.stack(bundle.load_prior(model, 'sad'))

  alone = sad()
  other = prepare_synthetic(
    tmp_path,
    SyntheticConfig(
      train=2,
      val=0,
      test=0,
      clips=8,
      seconds=0.4,
      seed=1,
      levels=(3,),
      content='embedder',
    ),
    workers=1,
  )
  shutil.copytree(data / 'synthetic', tmp_path / 'synthetic', dirs_exist_ok=True)
  assert 'wrote 8 priors of 32 clips' in run(dataset_priors, model=model, data=tmp_path)
  merged = sad()
  run(dataset_priors, model=model, data=tmp_path, datasets=other)
  np.testing.assert_allclose(merged, (alone + sad()) / 2, rtol=1e-5, atol=1e-6)
  table = ClipSource(other).table
  unlabelled = dataclasses.replace(table, emotion=np.full(len(table), UNKNOWN))
  unlabelled.save(other / 'clips-train.npz')
  assert 'wrote 8 priors of 16 clips' in run(dataset_priors, model=model, data=tmp_path)
  refuses(
    'has an emotion label, which priors need',
    dataset_priors,
    model=model,
    data=tmp_path,
    datasets=other,
  )
  assert not list(other.rglob('features'))
  assert list((tmp_path / 'features').iterdir())


@pytest.mark.parametrize('kind', ['a file', 'below a file', 'unwritable'])
def test_a_place_that_cannot_be_written_is_refused_before_embedding(
  model, data, refuses, tmp_path, monkeypatch, kind
):
  monkeypatch.setattr(
    feature_extraction.FeatureExtractor,
    'load_or_compute',
    lambda *_: pytest.fail('computed'),
  )
  (tmp_path / 'file').write_bytes(b'mine')
  place = {
    'a file': tmp_path / 'file',
    'below a file': tmp_path / 'file' / 'npy',
    'unwritable': pathlib.Path('/proc'),
  }
  refuses(
    f'cannot write into {place[kind]}: ',
    dataset_priors,
    model=model,
    data=data,
    output=place[kind],
  )
  assert (tmp_path / 'file').read_bytes() == b'mine'
  assert bundle.emotions(model) == sorted(tiny.EMOTIONS)


def test_bad_data_sets(model, data, refuses, tmp_path):
  refuses('no prepared data set below', dataset_priors, model=model, data=tmp_path)
  refuses("has no split 'test'", dataset_priors, model=model, data=data, split='test')
  refuses('not a model folder', dataset_priors, model=tmp_path, data=data)
  refuses(
    'is itself a data set; name it with --datasets',
    dataset_priors,
    model=model,
    data=next(data.rglob('dataset_info.json')).parent,
  )
  refuses('--data', dataset_priors, model=model)


def test_a_model_that_cannot_be_written_is_refused_before_embedding(
  model, data, refuses, monkeypatch
):
  monkeypatch.setattr(
    feature_extraction.FeatureExtractor,
    'load_or_compute',
    lambda *_: pytest.fail('computed'),
  )
  shutil.rmtree(model / 'priors')
  (model / 'priors').write_bytes(b'mine')
  refuses(f'cannot write into {model}/priors: ', dataset_priors, model=model, data=data)
  assert (model / 'priors').read_bytes() == b'mine'
