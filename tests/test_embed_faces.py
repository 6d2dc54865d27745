"""The prior of the face that a video shows, by an embedder of images."""

import itertools

import numpy as np
import pytest

from data_pipelines.synthetic.clip import make_clip
from dicetalk_jax import embed, published_priors
from dicetalk_jax.component import Component
from dicetalk_jax.data import face_crops, feature_extraction
from dicetalk_jax.detect.choice import find_face
from dicetalk_jax.media.video import write_video
from tests import tiny
from tests.prior_commands import assert_refused, output_of, save_model, write_clip


@pytest.fixture(scope='module', autouse=True)
def quick_compilation():
  with tiny.quick_compilation(), tiny.shared_programs():
    yield


@pytest.fixture
def model(tmp_path):
  return save_model(tmp_path / 'model', tiny.EMBEDDER_OF_CROPS)


@pytest.fixture(scope='module')
def clip(tmp_path_factory):
  return write_clip(tmp_path_factory.mktemp('clip'))


@pytest.fixture(scope='module')
def portrait(tmp_path_factory):
  """A rendered person who speaks: the folder of two videos, and the clip.

  Only clip.mp4 has audio, mute.mp4 does not.
  """
  folder = tmp_path_factory.mktemp('portrait')
  person = make_clip(1, 'happy', 3, 0, size=128, max_seconds=0.4)
  write_video(folder / 'clip.mp4', person.frames, 25, person.audio)
  write_video(folder / 'mute.mp4', person.frames, 25)
  return folder, person


def test_a_prior_of_a_video_is_made_from_its_face_and_its_speech(
  model, portrait, tmp_path
):
  folder, person = portrait
  seconds = len(person.frames) / 25
  out = output_of(
    embed,
    model=model,
    video=folder / 'clip.mp4',
    output=tmp_path / 'both.npy',
    save='me',
  )
  assert f'the face is seen from 0.00 s to {seconds:.2f} s' in out
  assert f'prior of {seconds:.1f} s of images and speech' in out
  assert '--emotion=me' in out
  out = output_of(
    embed, model=model, video=folder / 'mute.mp4', output=tmp_path / 'mute.npy'
  )
  assert ' s of images: ' in out
  out = output_of(
    embed, model=model, audio=folder / 'clip.mp4', output=tmp_path / 'heard.npy'
  )
  assert ' s of speech: ' in out

  # Each modality changes the prior.
  both, mute, heard = (
    np.array(published_priors.read(tmp_path / f'{name}.npy').prior)
    for name in ('both', 'mute', 'heard')
  )
  for a, b in itertools.combinations((both, mute, heard), 2):
    assert np.abs(a - b).max() > 1e-3

  # The crops show what the detector finds in the rendered frames.
  faces = []
  for frame in person.frames:
    left, top, width, height = find_face(frame)
    corners = np.array([left, top, left + width, top + height])
    faces.append(face_crops.crop_square(frame, corners, 8))
  seen, _ = face_crops.of_video(folder / 'mute.mp4', 8)
  correlation = np.corrcoef(np.ravel(faces), seen.ravel())[0, 1]
  assert correlation > 0.95  # 0.6 with whole frames

  # The prior of the mute video is that of these crops.
  embedder = Component.load(model, 'embedder')
  no_states = np.zeros((0, 2, 8), np.float32)
  expected = feature_extraction.gaussian(embedder, seen, no_states)
  np.testing.assert_allclose(mute, expected, rtol=1e-3, atol=1e-4)


def test_files_that_an_embedder_of_images_cannot_use(model, clip, tmp_path):
  def refused(sentence, **flags):
    assert_refused(sentence, embed, model=model, **flags)

  refused('no face was found in', video=clip / 'clip.mp4')
  refused(
    'trained on face crops and reads no expression coefficients; leave out '
    '--expression, and give a --video',
    audio=clip / 'speech.wav',
    expression=clip / 'expression.npy',
  )
  refused('does not exist', video=tmp_path / 'nowhere.mp4')
  junk = tmp_path / 'junk.mp4'
  junk.write_bytes(b'junk')
  refused('cannot be read as a video', video=junk)


def test_an_embedder_of_images_alone_refuses_audio(clip, tmp_path):
  config = tiny.EMBEDDER_OF_CROPS | dict(modalities='video')
  model = save_model(tmp_path / 'model', config)
  assert_refused(
    'trained on images alone and reads no audio; give a --video',
    embed,
    model=model,
    audio=clip / 'speech.wav',
  )
