"""Files that cannot be converted: one sentence, exit code 2, nothing executed.

Nothing half-written is left behind either.
"""

import ctypes
import errno
import json
import os
import pathlib
import pickle
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from safetensors.torch import save_file
import torch

from convert import __main__ as command
from convert import published_layouts, torch_files
from dicetalk_jax import bundle, files
from dicetalk_jax.errors import InputError
from tests.convert import published_folders as folders
from tests.convert.commands import run_convert

ROOT = pathlib.Path(__file__).parents[2]
INTERRUPTED = 'interrupted; run the same command again\n'


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
  """Runs a command that must fail and leave nothing behind; returns what it says."""

  def refused(*args):
    before = sorted(tmp_path.iterdir())
    capsys.readouterr()
    assert run_convert(*args) == 2
    out, err = capsys.readouterr()
    assert 'wrote' not in out and 'Traceback' not in err
    assert sorted(tmp_path.iterdir()) == before
    return err

  return refused


def sentence(err: str) -> str:
  """Checks that an error is one line, and returns it."""
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
  torch.save(
    {'conv_in.weight': Exploit(tmp_path / 'pwned')},
    release / 'pose_guider.pth',
    _use_new_zipfile_serialization=not legacy,
  )
  assert 'asks to run code (posix.mkdir), which was not done' in sentence(
    refused('dicetalk', release, tmp_path / 'model')
  )
  refused('inspect', release)


@pytest.mark.parametrize('name', ['model.bin', 'pytorch_model.bin'])
def test_a_malicious_bare_pickle_executes_nothing(whisper, tmp_path, refused, name):
  (whisper / 'model.safetensors').unlink()
  (whisper / name).write_bytes(pickle.dumps(Exploit(tmp_path / 'pwned')))
  assert 'PyTorch weights' in sentence(refused('whisper', whisper, tmp_path / 'model'))


def test_a_malicious_pkl_or_npy_executes_nothing(release, tmp_path, refused):
  exploit = Exploit(tmp_path / 'pwned')
  (tmp_path / 'flownet.pkl').write_bytes(pickle.dumps({'module.x': exploit}))
  np.save(tmp_path / 'happy.npy', np.array({'mu': exploit}, object), allow_pickle=True)
  for option, name in (('--rife', 'flownet.pkl'), ('--priors', 'happy.npy')):
    assert f'{name} ' in sentence(
      refused('dicetalk', release, tmp_path / 'model', option, tmp_path / name)
    )
    refused('inspect', tmp_path / name)


def test_priors_of_another_shape(release, tmp_path, refused):
  np.save(tmp_path / 'happy.npy', np.zeros(9, np.float32))
  assert 'happy.npy has 9 numbers, the model wants 6' in sentence(
    refused('dicetalk', release, tmp_path / 'model', '--priors', tmp_path / 'happy.npy')
  )


def test_the_exploit_is_real(tmp_path):
  pickle.loads(pickle.dumps(Exploit(tmp_path / 'pwned')))
  assert (tmp_path / 'pwned').exists()


def test_all_bad_tensors_of_all_files_are_named_at_once(release, tmp_path, refused):
  audio, pose = folders.state_dict('audio_linear'), folders.state_dict('pose_guider')
  del audio['proj2.bias']
  audio |= {
    'extra.weight': torch.zeros(2),
    'proj1.bias': torch.zeros(9),
    'norm.bias': torch.arange(16),
  }
  audio['proj3.weight'][1, 2] = float('nan')
  audio['proj3.bias'] = audio['proj3.bias'].to(torch.float8_e4m3fn)
  pose['conv_in.bias'][0] = float('-inf')
  torch.save(audio, release / 'audio_linear.pth')
  torch.save(pose, release / 'pose_guider.pth')
  lines = refused('dicetalk', release, tmp_path / 'model').splitlines()
  assert '7 tensors do not fit, so nothing was written' in lines[0]
  assert {line.strip() for line in lines[1:]} == {
    'audio_linear: missing: proj2.bias',
    'audio_linear: left over: extra.weight',
    'audio_linear: type float8_e4m3fn instead of floating point of 16 to 64 bits: '
    'proj3.bias',
    'audio_linear: shape (9,) instead of (8,): proj1.bias',
    'audio_linear: type int64 instead of floating point of 16 to 64 bits: norm.bias',
    'audio_linear: values that are not finite: proj3.weight',
    'pose_guider: values that are not finite: conv_in.bias',
  }


def test_overflow_of_float16(release, tmp_path, refused):
  pose = folders.state_dict('pose_guider')
  pose['conv_out.bias'][3] = 1e5
  torch.save(pose, release / 'pose_guider.pth')
  assert sentence(
    refused('dicetalk', release, tmp_path / 'model', '--dtype', 'float16')
  ) == (
    'error: one tensor does not fit, so nothing was written; choose another --dtype: '
    'pose_guider: values beyond the range of float16: conv_out.bias\n'
  )


@pytest.mark.parametrize('name', ['unet', 'emo_model'])
def test_misshaped_tensors_are_refused_even_where_others_may_be_missing(
  release, tmp_path, refused, name
):
  state = folders.state_dict(name)
  key = sorted(state)[0]
  torch.save(
    {key: torch.zeros(1, 2, 3), sorted(state)[1]: state[sorted(state)[1]]},
    release / published_layouts.DICETALK[name],
  )
  assert f'{name}: shape (1, 2, 3) instead of' in refused(
    'dicetalk', release, tmp_path / 'model'
  )


def test_files_of_something_else(release, svd, tmp_path, refused):
  shutil.copy(release / 'pose_guider.pth', release / 'emo_model.pth')
  assert 'emo_model.pth has nothing of emo_model' in sentence(
    refused('dicetalk', release, tmp_path / 'model')
  )
  broken = pathlib.Path(shutil.copytree(svd, tmp_path / 'svd'))
  for name in ('vae', 'unet'):
    other = 'unet' if name == 'vae' else 'image_encoder'
    shutil.copy(
      torch_files.weights_in(svd / other), torch_files.weights_in(broken / name)
    )
    assert f'has nothing of {name}; use the published file' in sentence(
      refused('svd', broken, tmp_path / 'model')
    )
  torch.save([torch.zeros(1)], release / 'emo_model.pth')
  assert 'not a state dict (tensors by name)' in sentence(
    refused('dicetalk', release, tmp_path / 'model')
  )
  assert 'has no weights' in sentence(refused('whisper', svd, tmp_path / 'model'))


@pytest.mark.parametrize('content', [b'', b'junk', b'\x80\x02}q\x00', None])
def test_damaged_files(release, whisper, tmp_path, refused, content):
  for path, args in (
    (release / 'unet.pth', ['dicetalk', release]),
    (whisper / 'model.safetensors', ['whisper', whisper]),
  ):
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    err = sentence(refused(*args, tmp_path / 'model'))
    assert f'{path} cannot be read as' in err or 'not a state dict' in err


def test_missing_files(release, whisper, tmp_path, refused):
  (release / 'pose_guider.pth').unlink()
  assert 'pose_guider.pth: No such file' in sentence(
    refused('dicetalk', release, tmp_path / 'model')
  )
  (whisper / 'config.json').unlink()
  assert 'config.json does not exist' in sentence(
    refused('whisper', whisper, tmp_path / 'model')
  )
  for name in ('svd', 'whisper', 'dicetalk', 'sonic'):
    assert 'is not a folder' in sentence(
      refused(name, tmp_path / 'nowhere', tmp_path / 'model')
    )
  assert 'does not exist' in sentence(refused('inspect', tmp_path / 'nowhere'))
  assert 'is not a model folder' in sentence(
    refused('export', tmp_path / 'nowhere', tmp_path / 'out')
  )


@pytest.mark.parametrize(
  'config', ['{', '[]', '{"d_model": "wide"}', '{"d_model": -8}', '{"d_model": 0}']
)
def test_nonsense_in_a_configuration(whisper, tmp_path, refused, config):
  (whisper / 'config.json').write_text(config)
  assert 'config' in sentence(refused('whisper', whisper, tmp_path / 'model'))


@pytest.mark.parametrize(
  'content',
  ['{', '{"components": 3}', '{"components": {"unet": []}}', '{"settings": []}'],
)
def test_a_damaged_description_of_an_export(release, tmp_path, refused, content):
  (release / published_layouts.DICETALK_CONFIG).write_text(content)
  assert published_layouts.DICETALK_CONFIG in sentence(
    refused('dicetalk', release, tmp_path / 'model')
  )


def test_inspect_follows_linked_folders(release, tmp_path, capsys):
  (tmp_path / 'downloads').mkdir()
  (tmp_path / 'downloads' / 'DICE-Talk').symlink_to(release)
  assert run_convert('inspect', tmp_path / 'downloads') == 0
  assert 'pose_guider' in capsys.readouterr().out


def test_broken_shards(svd, tmp_path, refused):
  copy = pathlib.Path(shutil.copytree(svd, tmp_path / 'svd'))
  vae = copy / 'vae'
  state = torch_files.load(vae / 'diffusion_pytorch_model.safetensors')
  index = vae / 'diffusion_pytorch_model.safetensors.index.json'
  save_file(dict(list(state.items())[1:]), vae / 'part-1.safetensors')
  (vae / 'diffusion_pytorch_model.safetensors').unlink()

  def write(second):
    """Writes an index in which one tensor lies in the file `second`."""
    weight_map = dict.fromkeys(state, 'part-1.safetensors')
    weight_map[next(iter(state))] = second
    index.write_text(json.dumps({'weight_map': weight_map}))

  write('part-2.safetensors')
  assert 'part-2.safetensors: No such file' in sentence(
    refused('svd', copy, tmp_path / 'model')
  )
  write('part-1.safetensors')
  assert f'vae: missing: {next(iter(state))}' in refused(
    'svd', copy, tmp_path / 'model'
  )
  write('../unet/diffusion_pytorch_model.safetensors')
  assert 'not an index of weight files in its folder' in sentence(
    refused('svd', copy, tmp_path / 'model')
  )
  index.write_text('{"weight_map": 3}')
  assert 'not an index of weight files' in sentence(
    refused('svd', copy, tmp_path / 'model')
  )


def test_another_scheduler(svd, tmp_path, refused):
  copy = pathlib.Path(shutil.copytree(svd, tmp_path / 'svd'))
  path = copy / published_layouts.SCHEDULER
  path.write_text(
    json.dumps(json.loads(path.read_text()) | dict(prediction_type='epsilon'))
  )
  assert "{'prediction_type': 'epsilon'} where the sampler wants" in sentence(
    refused('svd', copy, tmp_path / 'model')
  )


def test_an_existing_destination(svd, whisper, tmp_path, refused):
  (tmp_path / 'precious').mkdir()
  (tmp_path / 'precious' / 'thesis.txt').write_text('x')
  assert 'exists; choose another place, or add --overwrite' in sentence(
    refused('svd', svd, tmp_path / 'precious')
  )
  assert 'is not what would replace it' in sentence(
    refused('svd', svd, tmp_path / 'precious', '--overwrite')
  )
  assert (tmp_path / 'precious' / 'thesis.txt').exists()
  assert run_convert('whisper', whisper, tmp_path / 'model') == 0
  assert 'is not what would replace it' in sentence(
    refused('export', tmp_path / 'model', tmp_path / 'model', '--overwrite')
  )
  assert 'whisper' in bundle.components(tmp_path / 'model')


def fail(error):
  def save(*args, **kwargs):
    pathlib.Path(args[0], 'unet.0').mkdir(parents=True)
    raise error

  return save


@pytest.mark.parametrize(
  'error',
  [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    ValueError("RESOURCE_EXHAUSTED: ...: No space left [os_error_code='28']"),
  ],
)
def test_a_disk_that_fills_up(whisper, tmp_path, refused, monkeypatch, error):
  monkeypatch.setattr(bundle, 'save_component', fail(error))
  assert 'No space left on device; choose another place or make room' in sentence(
    refused('whisper', whisper, tmp_path / 'model')
  )


def test_a_disk_that_is_full(svd, tmp_path, refused, monkeypatch):
  monkeypatch.setattr(
    files.shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(9, 9, 0)
  )
  assert 'GB left; make room' in sentence(refused('svd', svd, tmp_path / 'model'))


def test_a_write_that_the_system_stops_midway(svd, tmp_path):
  """A real process whose files must not grow beyond 64 kB: Orbax fails while it writes.

  All of its threads fail, and one line says so.
  """
  script = (
    'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))\n'
    'from convert import __main__ as command; command.main()'
  )
  process = subprocess.run(
    [sys.executable, '-c', script, 'svd', svd, tmp_path / 'model'],
    text=True,
    capture_output=True,
    cwd=ROOT,
  )
  assert process.returncode == 2 and not process.stdout
  (line,) = process.stderr.splitlines()
  assert 'File too large; choose another place or make room' in line
  assert not (tmp_path / 'model').exists()


@pytest.fixture
def without_privileges():
  """Makes permissions hold for root as well: drops this thread's right to override."""
  if os.geteuid() != 0:
    yield
    return
  libc = ctypes.CDLL(None)
  header = (ctypes.c_uint32 * 2)(0x20080522, 0)
  held = (ctypes.c_uint32 * 6)()
  assert libc.capget(header, held) == 0
  fewer = (ctypes.c_uint32 * 6)(*held)
  # The effective ones, without CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
  fewer[0] &= ~0b110
  assert libc.capset(header, fewer) == 0
  yield
  assert libc.capset(header, held) == 0


def test_a_folder_without_permission(whisper, tmp_path, refused, without_privileges):
  (tmp_path / 'locked').mkdir(mode=0o500)
  assert 'Permission denied' in sentence(
    refused('whisper', whisper, tmp_path / 'locked' / 'model')
  )
  assert not list((tmp_path / 'locked').iterdir())


def test_unreadable_sources(whisper, tmp_path, refused, without_privileges):
  (whisper / 'model.safetensors').chmod(0)
  assert 'model.safetensors: Permission denied' in sentence(
    refused('whisper', whisper, tmp_path / 'model')
  )
  whisper.chmod(0)
  assert 'Permission denied' in sentence(
    refused('whisper', whisper, tmp_path / 'model')
  )
  whisper.chmod(0o700)


def test_a_place_that_is_a_file(whisper, tmp_path, refused):
  (tmp_path / 'file').touch()
  assert 'choose another place' in sentence(
    refused('whisper', whisper, tmp_path / 'file' / 'model')
  )


def test_an_interrupted_run_leaves_nothing_and_the_old_model_whole(
  whisper, tmp_path, monkeypatch
):
  convert = ['whisper', str(whisper), str(tmp_path / 'model')]
  with monkeypatch.context() as patch:
    patch.setattr(bundle, 'save_component', fail(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
      command.run_command(convert)
  assert [path.name for path in tmp_path.iterdir()] == ['whisper']
  assert run_convert(*convert) == 0
  with monkeypatch.context() as patch:
    patch.setattr(bundle, 'save_component', fail(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
      command.run_command([*convert, '--overwrite'])
  assert sorted(path.name for path in tmp_path.iterdir()) == ['model', 'whisper']
  assert 'whisper' in bundle.components(tmp_path / 'model')


@pytest.fixture
def waiting(whisper, tmp_path):
  """A real process that waits inside the conversion for a signal."""
  script = (
    'import time\n'
    'from convert import __main__ as command\n'
    'from dicetalk_jax import bundle\n'
    'def save(*args, **kwargs):\n'
    '  print("writing", flush=True)\n'
    '  time.sleep(600)\n'
    'bundle.save_component = save\n'
    'command.main()'
  )
  process = subprocess.Popen(
    [sys.executable, '-c', script, 'whisper', whisper, tmp_path / 'model'],
    text=True,
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )
  assert process.stdout.readline() == 'writing\n'
  yield process
  process.kill()
  process.communicate()


def test_ctrl_c_ends_a_process_with_one_line(waiting, whisper, tmp_path):
  waiting.send_signal(signal.SIGINT)
  assert waiting.communicate(timeout=500) == ('', INTERRUPTED)
  assert waiting.returncode == 130
  assert [path.name for path in tmp_path.iterdir()] == ['whisper']
  assert run_convert('whisper', whisper, tmp_path / 'model') == 0
  assert sorted(path.name for path in tmp_path.iterdir()) == ['model', 'whisper']


def test_what_a_killed_process_leaves_is_cleared_up(
  waiting, whisper, tmp_path, refused
):
  (part,) = tmp_path.glob('.model.*.part')
  refused('whisper', tmp_path / 'nowhere', tmp_path / 'model')
  assert part.exists()  # because another process works there
  waiting.kill()
  waiting.wait()
  assert run_convert('whisper', whisper, tmp_path / 'model') == 0
  assert sorted(path.name for path in tmp_path.iterdir()) == ['model', 'whisper']


def test_the_model_that_a_killed_process_was_replacing_comes_back(
  whisper, tmp_path, refused
):
  (tmp_path / 'precious').mkdir()
  (tmp_path / 'part').mkdir()
  (tmp_path / 'precious').rename(tmp_path / 'part' / 'old')
  (tmp_path / 'part' / 'new').mkdir()
  (tmp_path / 'part').rename(tmp_path / '.precious.0a1b2c3_.part')
  with pytest.raises(InputError, match='exists'):
    files.refuse_existing(tmp_path / 'precious', False, '')
  assert sorted(path.name for path in tmp_path.iterdir()) == ['precious', 'whisper']


@pytest.mark.parametrize(
  'args',
  [
    [],
    ['svd'],
    ['svd', 'a'],
    ['magic', 'a', 'b'],
    ['svd', 'a', 'b', '--dtype', 'int8'],
    ['export', 'a', 'b', '--nonsense'],
  ],
)
def test_mistakes_on_the_command_line(refused, args):
  assert 'see python -m convert' in sentence(refused(*args))


@pytest.mark.parametrize(
  'name',
  [
    'accept',
    'svd',
    'whisper',
    'dicetalk',
    'sonic',
    'priors',
    'export',
    'inspect',
    'verify',
  ],
)
def test_help_has_an_example(capsys, name):
  assert run_convert(name, '--help') == 0
  assert f'python -m convert {name}' in capsys.readouterr().out
