"""The face detector's file: TorchScript or not, fused or not, with a prefix, without
names.
"""

import io
import json
import pickle
import zipfile

import numpy as np
import pytest
import torch

from convert import face_detector, torchscript
from dicetalk_jax import bundle
from dicetalk_jax.detect.yolo_face import COMPONENT, YoloFaceDetector
from dicetalk_jax.errors import InputError, WeightsError
from tests.convert import published_folders
from tests.convert.commands import run_convert
from tests.models import yolo_twin
from tests.models.yolo_twin import TINY, Wrapped, grids, random_net

IMAGE = np.random.default_rng(0).random((1, 64, 96, 3), np.float32)


def rows_of(net) -> np.ndarray:
  with torch.no_grad():
    return net(torch.from_numpy(IMAGE).permute(0, 3, 1, 2), grids(64, 96)).numpy()


@pytest.fixture(scope='module')
def net():
  return random_net()


@pytest.fixture(scope='module')
def expected(net):
  """Folded weights by published key."""
  return face_detector.fold(net.state_dict())


def fused(net):
  """The same network with its batch norms folded."""
  twin = random_net(fused=True)
  twin.load_state_dict(face_detector.fold(net.state_dict()), strict=False)
  return twin


FORMS = {
  'unfused': lambda net: yolo_twin.trace(net),
  'fused': lambda net: yolo_twin.trace(fused(net)),
  'prefixed': lambda net: yolo_twin.trace(Wrapped(fused(net))),
  # Without names: weights are constants in the order of the program.
  'frozen': lambda net: torch.jit.freeze(yolo_twin.trace(fused(net))),
}


@pytest.mark.parametrize('form', FORMS)
def test_every_form_gives_the_same_weights(tmp_path, net, expected, form):
  path = tmp_path / 'yoloface_v5m.pt'
  FORMS[form](net).save(path)
  part = face_detector.part(path, TINY.to_json())
  assert (
    part.config['anchors']
    == [[[*map(float, pair)] for pair in level] for level in TINY.anchors]
    or form == 'frozen'
  )
  assert len(part.tensors) == len([k for k in expected if 'conv' in k or '.23.m' in k])
  for key, x in part.tensors.items():
    torch.testing.assert_close(x, expected[key], rtol=0, atol=0)
  assert any('by order' in note for note in part.notes) == (form == 'frozen')


def test_tensors_without_names_in_the_order_of_definition(tmp_path, net, expected):
  state = {f'x{i}': x for i, x in enumerate(net.state_dict().values())}
  torch.save(state, tmp_path / 'a.pt')
  part = face_detector.part(tmp_path / 'a.pt', TINY.to_json())
  for key, x in part.tensors.items():
    torch.testing.assert_close(x, expected[key], rtol=0, atol=0)


@pytest.fixture(scope='module')
def model(tmp_path_factory, net):
  """A converted model folder with the detector in it."""
  folder = tmp_path_factory.mktemp('released')
  release = published_folders.save_dicetalk(folder / 'DICE-Talk')
  own = json.loads((release / 'dicetalk.json').read_text())
  own['components'][COMPONENT] = TINY.to_json()
  (release / 'dicetalk.json').write_text(json.dumps(own))
  yolo_twin.trace(net).save(folder / face_detector.FILE)
  flags = ['--face_detector', folder]
  assert run_convert('dicetalk', release, folder / 'model', *flags) == 0
  return folder / 'model'


def test_the_model_folder_computes_what_the_file_does(model, net):
  detector = YoloFaceDetector.load(model)
  rows = detector._rows(IMAGE, np.array([[64, 96]]))
  np.testing.assert_allclose(rows, rows_of(net), rtol=2e-4, atol=2e-3)
  entry = bundle.components(model)[COMPONENT]
  assert 'GPL-3.0' in entry['provenance']['licence']


def test_export_and_back(model, tmp_path, capsys):
  assert run_convert('export', model, tmp_path / 'out') == 0
  capsys.readouterr()
  back = tmp_path / 'back'
  flags = ['--face_detector', tmp_path / 'out' / face_detector.FILE]
  assert run_convert('dicetalk', tmp_path / 'out', back, *flags) == 0
  one, other = bundle.components(model), bundle.components(back)
  assert one[COMPONENT]['fingerprint'] == other[COMPONENT]['fingerprint']
  assert '--face_detector' not in capsys.readouterr().out


def test_without_it_the_summary_says_so(tmp_path, capsys):
  release = published_folders.save_dicetalk(tmp_path / 'DICE-Talk')
  assert run_convert('dicetalk', release, tmp_path / 'model') == 0
  assert 'MTCNN finds faces instead): not converted; add --face_detector' in (
    capsys.readouterr().out
  )


class Call:
  """Pickles as a call of a function."""

  def __init__(self, function, *args):
    self.call = function, args

  def __reduce__(self):
    return self.call


def archive(path, data: bytes, constants: bytes = pickle.dumps(())):
  with zipfile.ZipFile(path, 'w') as file:
    file.writestr('a/data.pkl', data)
    file.writestr('a/constants.pkl', constants)
  return path


def test_no_code_is_run(tmp_path):
  path = archive(tmp_path / 'a.pt', pickle.dumps(Call(open, tmp_path / 'made', 'w')))
  with pytest.raises(WeightsError, match=r'asks to run code \(io.open\)'):
    face_detector.part(path, TINY.to_json())
  assert not (tmp_path / 'made').exists()


def test_damaged_files_are_refused(tmp_path, net):
  path = tmp_path / 'a.pt'
  yolo_twin.trace(net).save(path)
  content = path.read_bytes()
  path.write_bytes(content[: len(content) // 2])
  with pytest.raises(InputError, match='cannot be read'):
    face_detector.part(path, TINY.to_json())
  with pytest.raises(InputError, match='cannot be read as TorchScript'):
    face_detector.part(archive(tmp_path / 'b.pt', b'nothing'), TINY.to_json())
  with pytest.raises(InputError, match='cannot read'):
    face_detector.part(tmp_path / 'none.pt', TINY.to_json())


def test_a_tensor_beyond_its_storage_is_refused():
  storage = torch.zeros(4)
  for offset, shape, stride in ((0, (5,), (1,)), (2, (2, 2), (2, 1)), (-1, (1,), (1,))):
    with pytest.raises(ValueError):
      torchscript._tensor(storage, offset, shape, stride)


def test_another_network_is_refused(tmp_path):
  other = torch.jit.trace(torch.nn.Conv2d(3, 4, 3), torch.zeros(1, 3, 8, 8))
  other.save(tmp_path / 'a.pt')
  with pytest.raises(WeightsError, match='is not YOLOv5m-face'):
    face_detector.part(tmp_path / 'a.pt', TINY.to_json())
  buffer = io.BytesIO()
  torch.save({'x': torch.zeros(3)}, buffer)
  (tmp_path / 'b.pt').write_bytes(buffer.getvalue())
  with pytest.raises(WeightsError, match='is not YOLOv5m-face'):
    face_detector.part(tmp_path / 'b.pt', TINY.to_json())
