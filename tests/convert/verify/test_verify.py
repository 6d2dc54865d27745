"""`python -m convert verify` passes on golden folders and notices small errors."""

import itertools
import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert.verify import comparison, registry
from tests.convert.commands import run_convert

FOLDERS = {
  'audio_proj': 3,
  'emotion_model': 16,
  'mask_downsample': 9,
  'clip_vision': 15,
  'pose_guider': 2,
  'whisper/encoder': 6,
  'whisper/features': 8,
  'rife': 8,
  'scheduler': 27,
  'preprocess': 78,
  'fullsize_seeded/pose_guider': 1,
  'fullsize_seeded/rife': 2,
  'face_detector/yoloface_wrapper': 10,
}
# Minutes and gigabytes: `make verify` checks them, with all the others.
LARGE = (
  'unet',
  'vae',
  'pipeline',
  'end_to_end',
  'face_detector/yolov5m_face',
  'face_detector/yolov5m_face_fused',
  *(
    f'fullsize_seeded/{name}'
    for name in ('audio_linear', 'emo_model', 'vae', 'whisper_encoder', 'clip_vision')
  ),
)


@pytest.mark.parametrize('folder, cases', FOLDERS.items())
def test_goldens_pass(goldens, capsys, folder, cases):
  assert run_convert('verify', goldens / folder) == 0
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == cases + 2
  assert all(line.endswith('pass') for line in lines[1:-1])
  assert lines[-1] == f'{cases} of {cases} cases pass'


def test_the_unet_with_adapters(goldens):
  """The cases of its first program; `make verify` checks the others."""
  results = [*itertools.islice(comparison.compare_all([goldens / 'unet']), 6)]
  assert results[0].case == 'main/out' and results[-1].case == 'main_nomask/out'
  assert all(result.passed for result in results), results


def test_every_kind_is_covered(goldens):
  """Every description in the repository has a kind, and every kind a description."""
  here = {registry.load(path)[0] for path in registry.descriptions(goldens)}
  assert here == registry.KINDS.keys()
  listed = [
    path
    for folder in (*FOLDERS, *LARGE)
    for path in registry.descriptions(goldens / folder)
  ]
  assert sorted(listed) == registry.descriptions(goldens)


def test_ways_to_name_golden_files(goldens):
  features = goldens / 'whisper' / 'features.json'
  assert (
    registry.descriptions(features)
    == registry.descriptions(features.with_suffix(''))
    == [features]
  )
  assert registry.descriptions(goldens / 'whisper') == [
    goldens / 'whisper' / 'encoder' / 'config.json',
    features,
  ]


@pytest.fixture
def copy(goldens, tmp_path):
  """A copy of the audio projection's folder, under another name."""
  return pathlib.Path(shutil.copytree(goldens / 'audio_proj', tmp_path / 'some_folder'))


@pytest.mark.parametrize(
  'tensor', ['proj1.weight', 'proj2.bias', 'proj3.weight', 'norm.weight']
)
def test_slightly_wrong_weights_fail(copy, capsys, tensor):
  weights = load_file(copy / 'weights.safetensors')
  weights[tensor] *= 1 + 1e-3
  save_file(weights, copy / 'weights.safetensors')
  assert run_convert('verify', copy) == 1
  assert 'FAIL' in capsys.readouterr().out


def test_one_failure_among_many_fails(goldens, copy, capsys):
  outputs = load_file(copy / 'outputs.safetensors')
  outputs['context_tokens_zero'][0, 0, 0, 0] = np.nan
  save_file(outputs, copy / 'outputs.safetensors')
  assert run_convert('verify', goldens / 'mask_downsample', copy) == 1
  lines = capsys.readouterr().out.splitlines()
  assert [line.split()[1] for line in lines if line.endswith('FAIL')] == [
    'context_tokens_zero'
  ]
  assert lines[-1] == '11 of 12 cases pass'


def refused(capsys, *folders) -> str:
  """Returns the sentence that a command ends with."""
  assert run_convert('verify', *folders) == 2
  out, err = capsys.readouterr()
  assert err.startswith('error: ') and err.count('\n') == 1
  assert 'pass' not in out
  return err


def test_unusable_folders_are_refused(copy, tmp_path, capsys):
  assert f'{tmp_path}/nothing is not a folder' in refused(capsys, tmp_path / 'nothing')
  (tmp_path / 'empty').mkdir()
  assert 'has no config.json' in refused(capsys, tmp_path / 'empty')
  (copy / 'weights.safetensors').unlink()
  assert 'weights.safetensors does not exist' in refused(capsys, copy)
  (copy / 'weights.safetensors').write_bytes(b'damaged')
  assert 'weights.safetensors cannot be read' in refused(capsys, copy)
  (copy / 'config.json').write_text('{')
  assert 'config.json cannot be read as JSON' in refused(capsys, copy)
  (copy / 'config.json').write_text('{"constructor": {"width": 3}}')
  assert 'unknown kind; known are audio_proj, pose_guider' in refused(capsys, copy)
  (copy / 'config.json').write_text('["a list"]')
  assert 'config.json is not a configuration' in refused(capsys, copy)


def test_a_bad_folder_stops_before_anything_runs(goldens, tmp_path, capsys):
  assert 'is not a folder' in refused(
    capsys, goldens / 'mask_downsample', tmp_path / 'nothing'
  )


def test_absent_tensor_is_named(copy, capsys):
  outputs = load_file(copy / 'outputs.safetensors')
  del outputs['context_tokens']
  save_file(outputs, copy / 'outputs.safetensors')
  assert 'outputs.safetensors has no tensor context_tokens;' in refused(capsys, copy)


def test_weights_that_do_not_fit_are_named(copy, capsys):
  config = json.loads((copy / 'config.json').read_text())
  config['constructor']['output_dim'] += 1
  (copy / 'config.json').write_text(json.dumps(config))
  assert run_convert('verify', copy) == 2
  err = capsys.readouterr().err
  assert all(
    key in err for key in ('proj3.weight', 'proj3.bias', 'norm.weight', 'norm.bias')
  )


def test_compare():
  expected = np.float32([1, 3])
  result = comparison.compare('a', 'b', expected + np.float32([0, 0.5]), expected, 0.5)
  assert (result.error, result.relative, result.passed) == (0.5, 0.5, True)
  assert (
    comparison.compare('a', 'b', np.float32([2]), np.float32([4]), 0.6).relative == 0.5
  )  # no deviation: its size
  assert comparison.compare('a', 'b', np.float32([0]), np.float32([0]), 0).passed
  assert not comparison.compare('a', 'b', np.zeros(3), np.zeros((3, 1)), 1).passed


def test_from_the_shell(tmp_path):
  """One sentence and no traceback; help with an example."""
  done = subprocess.run(
    [sys.executable, '-m', 'convert', 'verify', str(tmp_path)],
    cwd=pathlib.Path(__file__).parents[3],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2
  assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1


@pytest.mark.parametrize('args', [['--help'], ['verify', '--help']])
def test_help_has_an_example(capsys, args):
  assert run_convert(*args) == 0
  assert 'python -m convert verify tests/goldens/' in capsys.readouterr().out
