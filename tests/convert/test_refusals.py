"""What cannot be converted: one clear sentence, exit code 2, nothing executed, nothing half-written."""

import errno
import json
import os
import pathlib
import pickle
import shutil
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import save_file
import torch

from convert import __main__ as command
from convert import aside, layouts, published
from dicetalk_jax import bundle
from tests.convert import published_folders as folders


@pytest.fixture(scope='module')
def svd(tmp_path_factory):
  return folders.save_svd(tmp_path_factory.mktemp('downloads') / 'svd')


@pytest.fixture
def release(tmp_path):
  return folders.save_dicetalk(tmp_path / 'release')


@pytest.fixture
def whisper(tmp_path):
  return folders.save_whisper(tmp_path / 'whisper')


@pytest.fixture
def refused(tmp_path, capsys):
  """Runs a command that must fail, and returns what it says; checks that it leaves nothing behind."""
  def refused(*args, code=2):
    before = sorted(tmp_path.iterdir())
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
      command.run([*map(str, args)])
    out, err = capsys.readouterr()
    assert stop.value.code == code and 'wrote' not in out and 'Traceback' not in err
    assert sorted(tmp_path.iterdir()) == before
    return err
  return refused


def sentence(err: str) -> str:
  """Errors about files are one line."""
  assert err.startswith('error: ') and err.count('\n') == 1, err
  return err


class Exploit:
  """Unpickling it makes a file."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (str(self.path),)


@pytest.mark.parametrize('legacy', [False, True])
def test_a_malicious_pth_executes_nothing(release, tmp_path, refused, legacy):
  torch.save({'conv_in.weight': Exploit(tmp_path / 'pwned')}, release / 'pose_guider.pth',
             _use_new_zipfile_serialization=not legacy)
  assert 'asks to run code (posix.mkdir), which was not done' in sentence(
      refused('dicetalk', release, tmp_path / 'model'))
  refused('inspect', release)


@pytest.mark.parametrize('name', ['model.bin', 'pytorch_model.bin'])
def test_a_malicious_bare_pickle_executes_nothing(whisper, tmp_path, refused, name):
  (whisper / 'model.safetensors').unlink()
  (whisper / name).write_bytes(pickle.dumps(Exploit(tmp_path / 'pwned')))
  assert 'PyTorch weights' in sentence(refused('whisper', whisper, tmp_path / 'model'))


def test_the_exploit_is_real(tmp_path):
  pickle.loads(pickle.dumps(Exploit(tmp_path / 'pwned')))
  assert (tmp_path / 'pwned').exists()


def test_all_bad_tensors_of_all_files_are_named_at_once(release, tmp_path, refused):
  audio, pose = folders.state_dict('audio_linear'), folders.state_dict('pose_guider')
  del audio['proj2.bias']
  audio |= {'extra.weight': torch.zeros(2), 'proj1.bias': torch.zeros(9), 'norm.bias': torch.arange(16)}
  audio['proj3.weight'][1, 2] = float('nan')
  audio['proj3.bias'] = audio['proj3.bias'].to(torch.float8_e4m3fn)
  pose['conv_in.bias'][0] = float('-inf')
  torch.save(audio, release / 'audio_linear.pth')
  torch.save(pose, release / 'pose_guider.pth')
  lines = refused('dicetalk', release, tmp_path / 'model').splitlines()
  assert '7 tensors do not fit, so nothing was written' in lines[0]
  assert {line.strip() for line in lines[1:]} == {
      'audio_linear: missing: proj2.bias', 'audio_linear: left over: extra.weight',
      'audio_linear: type float8_e4m3fn instead of floating point of 16 to 64 bits: proj3.bias',
      'audio_linear: shape (9,) instead of (8,): proj1.bias',
      'audio_linear: type int64 instead of floating point of 16 to 64 bits: norm.bias',
      'audio_linear: values that are not finite: proj3.weight', 'pose_guider: values that are not finite: conv_in.bias'}


def test_overflow_of_float16(release, tmp_path, refused):
  pose = folders.state_dict('pose_guider')
  pose['conv_out.bias'][3] = 1e5
  torch.save(pose, release / 'pose_guider.pth')
  err = refused('dicetalk', release, tmp_path / 'model', '--dtype', 'float16')
  assert 'pose_guider: values beyond the range of float16: conv_out.bias' in err


@pytest.mark.parametrize('name', ['unet', 'emo_model'])
def test_misshaped_tensors_are_refused_even_where_others_may_be_missing(release, tmp_path, refused, name):
  state = folders.state_dict(name)
  key = sorted(state)[0]
  torch.save({key: torch.zeros(1, 2, 3), sorted(state)[1]: state[sorted(state)[1]]}, release / layouts.DICETALK[name])
  assert f'{name}: shape (1, 2, 3) instead of' in refused('dicetalk', release, tmp_path / 'model')


def test_files_of_something_else(release, svd, tmp_path, refused):
  shutil.copy(release / 'pose_guider.pth', release / 'emo_model.pth')
  assert 'emo_model.pth has nothing of emo_model' in sentence(refused('dicetalk', release, tmp_path / 'model'))
  torch.save([torch.zeros(1)], release / 'emo_model.pth')
  assert 'no state dict (tensors by name)' in sentence(refused('dicetalk', release, tmp_path / 'model'))
  assert 'has no weights' in sentence(refused('whisper', svd, tmp_path / 'model'))


@pytest.mark.parametrize('content', [b'', b'junk', b'\x80\x02}q\x00', None])
def test_damaged_files(release, whisper, tmp_path, refused, content):
  for path, args in ((release / 'unet.pth', ['dicetalk', release]),
                     (whisper / 'model.safetensors', ['whisper', whisper])):
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2] if content is None else content)
    err = sentence(refused(*args, tmp_path / 'model'))
    assert f'{path} cannot be read as' in err or 'no state dict' in err


def test_missing_files(release, whisper, tmp_path, refused):
  (release / 'pose_guider.pth').unlink()
  assert 'pose_guider.pth: No such file' in sentence(refused('dicetalk', release, tmp_path / 'model'))
  (whisper / 'config.json').unlink()
  assert 'config.json does not exist' in sentence(refused('whisper', whisper, tmp_path / 'model'))
  for name in ('svd', 'whisper', 'dicetalk', 'sonic'):
    assert 'is not a folder' in sentence(refused(name, tmp_path / 'nowhere', tmp_path / 'model'))
  assert 'does not exist' in sentence(refused('inspect', tmp_path / 'nowhere'))
  assert 'is no model folder' in sentence(refused('export', tmp_path / 'nowhere', tmp_path / 'out'))


@pytest.mark.parametrize('config', ['{', '[]', '{"d_model": "wide"}', '{"d_model": -8}', '{"d_model": 0}'])
def test_nonsense_in_a_configuration(whisper, tmp_path, refused, config):
  (whisper / 'config.json').write_text(config)
  assert 'config' in sentence(refused('whisper', whisper, tmp_path / 'model'))


@pytest.mark.parametrize('content', ['{', '{"components": 3}', '{"components": {"unet": []}}', '{"settings": []}'])
def test_a_damaged_description_of_an_export(release, tmp_path, refused, content):
  (release / layouts.DICETALK_CONFIG).write_text(content)
  assert layouts.DICETALK_CONFIG in sentence(refused('dicetalk', release, tmp_path / 'model'))


def test_broken_shards(svd, tmp_path, refused):
  copy = pathlib.Path(shutil.copytree(svd, tmp_path / 'svd'))
  vae = copy / 'vae'
  state = published.load(vae / 'diffusion_pytorch_model.safetensors')
  index = vae / 'diffusion_pytorch_model.safetensors.index.json'
  save_file(dict(list(state.items())[1:]), vae / 'part-1.safetensors')
  (vae / 'diffusion_pytorch_model.safetensors').unlink()
  write = lambda second: index.write_text(json.dumps(
      dict(weight_map=dict.fromkeys(state, 'part-1.safetensors') | {next(iter(state)): second})))
  write('part-2.safetensors')
  assert 'part-2.safetensors: No such file' in sentence(refused('svd', copy, tmp_path / 'model'))
  write('part-1.safetensors')
  assert f'vae: missing: {next(iter(state))}' in refused('svd', copy, tmp_path / 'model')
  write('../unet/diffusion_pytorch_model.safetensors')
  assert 'no index of weight files in its folder' in sentence(refused('svd', copy, tmp_path / 'model'))
  index.write_text('{"weight_map": 3}')
  assert 'no index of weight files' in sentence(refused('svd', copy, tmp_path / 'model'))


def test_another_scheduler(svd, tmp_path, refused):
  copy = pathlib.Path(shutil.copytree(svd, tmp_path / 'svd'))
  path = copy / layouts.SCHEDULER
  path.write_text(json.dumps(json.loads(path.read_text()) | dict(prediction_type='epsilon')))
  assert "{'prediction_type': 'epsilon'} where the sampler wants" in sentence(
      refused('svd', copy, tmp_path / 'model'))


def test_an_existing_destination(svd, whisper, tmp_path, refused):
  (tmp_path / 'precious').mkdir()
  (tmp_path / 'precious' / 'thesis.txt').write_text('x')
  assert 'exists; choose another place, or add --overwrite' in sentence(refused('svd', svd, tmp_path / 'precious'))
  assert 'is not what would replace it' in sentence(refused('svd', svd, tmp_path / 'precious', '--overwrite'))
  assert (tmp_path / 'precious' / 'thesis.txt').exists()
  with pytest.raises(SystemExit):
    command.run(['whisper', str(whisper), str(tmp_path / 'model')])
  assert 'is not what would replace it' in sentence(
      refused('export', tmp_path / 'model', tmp_path / 'model', '--overwrite'))
  assert 'whisper' in bundle.components(tmp_path / 'model')


def fail(error):
  def save(*args):
    pathlib.Path(args[0], 'unet.0').mkdir(parents=True)
    raise error
  return save


@pytest.mark.parametrize('error', [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
                                   ValueError('RESOURCE_EXHAUSTED: ...: No space left on device [os_error_code: 28]')])
def test_a_disk_that_fills_up(whisper, tmp_path, refused, monkeypatch, error):
  monkeypatch.setattr(bundle, 'save_component', fail(error))
  assert 'No space left on device; choose another place or make room' in sentence(
      refused('whisper', whisper, tmp_path / 'model'))


def test_a_disk_that_is_full(svd, tmp_path, refused, monkeypatch):
  monkeypatch.setattr(aside.shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(9, 9, 0))
  assert 'GB left; make room' in sentence(refused('svd', svd, tmp_path / 'model'))


@pytest.mark.skipif(os.geteuid() == 0, reason='the system refuses root nothing')
def test_a_folder_without_permission(whisper, tmp_path, refused):
  (tmp_path / 'locked').mkdir(mode=0o500)
  assert 'Permission denied' in sentence(refused('whisper', whisper, tmp_path / 'locked' / 'model'))


@pytest.mark.skipif(os.geteuid() == 0, reason='the system refuses root nothing')
def test_unreadable_sources(whisper, tmp_path, refused):
  (whisper / 'model.safetensors').chmod(0)
  assert 'model.safetensors: Permission denied' in sentence(refused('whisper', whisper, tmp_path / 'model'))
  whisper.chmod(0)
  assert 'Permission denied' in sentence(refused('whisper', whisper, tmp_path / 'model'))
  whisper.chmod(0o700)


def test_a_place_that_is_a_file(whisper, tmp_path, refused):
  (tmp_path / 'file').touch()
  assert 'choose another place' in sentence(refused('whisper', whisper, tmp_path / 'file' / 'model'))


def test_interruption(whisper, tmp_path, refused, monkeypatch):
  with monkeypatch.context() as patch:
    patch.setattr(bundle, 'save_component', fail(KeyboardInterrupt()))
    assert refused('whisper', whisper, tmp_path / 'model', code=130) == 'interrupted; nothing was written\n'
  with pytest.raises(SystemExit):
    command.run(['whisper', str(whisper), str(tmp_path / 'model')])
  with monkeypatch.context() as patch:
    patch.setattr(bundle, 'save_component', fail(KeyboardInterrupt()))
    refused('whisper', whisper, tmp_path / 'model', '--overwrite', code=130)
  assert 'whisper' in bundle.components(tmp_path / 'model')      # the old one is whole


def test_a_terminated_process_leaves_nothing(whisper, tmp_path):
  """In a real process, which waits inside the conversion for the signal."""
  script = ('import sys, time; from convert import __main__ as command; from dicetalk_jax import bundle\n'
            'def save(*args): print("writing", flush=True); time.sleep(60)\n'
            'bundle.save_component = save; command.run(sys.argv[1:])')
  process = subprocess.Popen([sys.executable, '-c', script, 'whisper', whisper, tmp_path / 'model'], text=True,
                             cwd=pathlib.Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  assert process.stdout.readline() == 'writing\n'
  time.sleep(0.1)
  process.send_signal(signal.SIGTERM)
  _, err = process.communicate(timeout=30)
  assert process.returncode == 130 and err.endswith('interrupted; nothing was written\n')
  assert [path.name for path in tmp_path.iterdir()] == ['whisper']


@pytest.mark.parametrize('args', [[], ['svd'], ['svd', 'a'], ['magic', 'a', 'b'], ['svd', 'a', 'b', '--dtype', 'int8'],
                                  ['export', 'a', 'b', '--nonsense']])
def test_mistakes_on_the_command_line(refused, args):
  assert '--help shows how it is used' in sentence(refused(*args))


@pytest.mark.parametrize('name', ['svd', 'whisper', 'dicetalk', 'sonic', 'priors', 'export', 'inspect', 'verify'])
def test_help_has_an_example(capsys, name):
  with pytest.raises(SystemExit) as stop:
    command.run([name, '--help'])
  assert stop.value.code == 0 and f'python -m convert {name}' in capsys.readouterr().out
