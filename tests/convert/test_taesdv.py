"""TAESDV from its file into a model folder and back, and previews made with it."""

import json

import numpy as np
import pytest
from safetensors.torch import save_file
import torch

from convert import naming, torch_files
from dicetalk_jax import bundle
from dicetalk_jax.errors import InputError, WeightsError
from dicetalk_jax.pipeline import Pipeline
from tests import tiny
from tests.convert import published_folders as folders
from tests.convert.commands import run_convert
from tests.models import taesdv_twin

SIZES = dict(channels=8, levels=1, blocks=2)  # latents as of `tiny`, two pixels wide


@pytest.fixture(scope='module', autouse=True)
def quick_compilation():
  with tiny.quick_compilation():
    yield


@pytest.fixture(scope='module')
def twin():
  torch.manual_seed(0)
  return folders.with_noise(taesdv_twin.Twin(width=8, levels=1, blocks=2))


@pytest.mark.parametrize('name', ['mine.safetensors', 'folder'])
def test_there_and_back(twin, name, tmp_path):
  """A file of ours, or the folder of the published one; the export loads strictly."""
  release = folders.save_dicetalk(tmp_path / 'release')
  config = json.loads((release / 'dicetalk.json').read_text())
  config['components']['taesdv'] = SIZES
  (release / 'dicetalk.json').write_text(json.dumps(config))
  path = tmp_path / name
  if name == 'folder':
    path.mkdir()
    torch.save(twin.state_dict(), path / 'taesdv.pth')
  else:
    save_file(twin.state_dict(), path)

  model = tmp_path / 'model'
  assert run_convert('dicetalk', release, model, '--taesdv', path) == 0
  assert bundle.components(model)['taesdv']['provenance']['licence'].startswith('MIT')
  assert run_convert('export', model, tmp_path / 'out') == 0
  exported = torch_files.load(tmp_path / 'out/taesdv.pth')
  again = taesdv_twin.Twin(width=8, levels=1, blocks=2)
  again.load_state_dict(exported)
  for key, value in twin.state_dict().items():
    assert torch.equal(exported[key], value), key


def test_another_file_is_refused(twin, tmp_path, capsys):
  release = folders.save_dicetalk(tmp_path / 'release')
  torch.save(twin.state_dict(), tmp_path / 'taesdv.pth')  # not of the published size
  model = tmp_path / 'model'
  assert run_convert('dicetalk', release, model, '--taesdv', tmp_path) == 2
  assert 'taesdv' in capsys.readouterr().err
  assert not model.exists()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A small model folder with TAESDV."""
  place = tmp_path_factory.mktemp('model')
  tiny.save_model(place, tiny.CONFIGS | {'taesdv': SIZES})
  return place


def test_previews_are_decoded_in_chunks_that_fit_together(folder):
  """Chunks of three frames; the twin takes the scaled latents as they are."""
  pipe = Pipeline.load(folder)
  z = np.float32(np.random.default_rng(0).normal(size=(11, 10, 8, 4)))
  calls = []
  ours = pipe.preview(z, 7, lambda *call: calls.append(call))
  assert ours.shape == (7, 20, 16, 3) and ours.dtype == np.uint8
  assert calls == [('decoding', done, 3) for done in range(4)]

  twin = taesdv_twin.Twin(width=8, levels=1, blocks=2)
  params = naming.to_torch(pipe.networks['taesdv'].params)
  twin.load_state_dict({key: torch.tensor(x) for key, x in params.items()})
  with torch.no_grad():
    frames = twin.decode(torch.tensor(np.moveaxis(z[:7], -1, -3))[None])[0]
  expected = np.moveaxis(frames.clamp(0, 1).numpy(), -3, -1) * 255
  assert np.abs(ours - expected).max() < 0.51
  assert ours.std() > 1


def test_a_job_may_ask_for_a_preview(folder):
  pipe = Pipeline.load(folder)
  options = dict(face_box=tiny.FACE_BOX, seed=3)
  inputs = (tiny.portrait(), tiny.speech(), 'happy')
  frames, fps = pipe.generate(*inputs, preview=True, **options)
  assert frames.shape == (10, 20, 16, 3)
  assert fps == 12.5  # this model could double it
  whole, _ = pipe.generate(*inputs, interpolate=False, **options)
  assert (whole != frames).mean() > 0.5
  with pytest.raises(InputError, match='previews are not interpolated'):
    pipe.job(*inputs, preview=True, interpolate=True, **options)


def test_a_model_that_cannot_preview_says_so(folder, tmp_path, tmp_path_factory):
  def job(model):
    pipe = Pipeline.load(model)
    options = dict(face_box=tiny.FACE_BOX, preview=True)
    return pipe.job(tiny.portrait(), tiny.speech(), 'happy', **options)

  with pytest.raises(WeightsError, match='has no taesdv'):
    job(tiny.shared_model(tmp_path_factory))
  wider = tiny.CONFIGS | {'taesdv': SIZES | {'levels': 3}}
  tiny.save_model(tmp_path, wider)
  with pytest.raises(WeightsError, match='4 channels, 8 pixels wide.*2 pixels wide'):
    job(tmp_path)
