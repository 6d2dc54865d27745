"""The acceptance kit on a small reference implementation in PyTorch: it passes a
faithful one, and names the stage that departs in others.
"""

import json
import pathlib
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
import torch

from convert.accept import command, stages
from convert.accept.dump import SETTINGS, TENSORS, Dump
from convert.accept.stages import Stage
from tests import tiny
from tests.convert import published_folders
from tests.convert.accept import twin_program
from tests.convert.commands import run_convert
from tools import dump_reference

PROGRAM = pathlib.Path(twin_program.__file__)


@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory):
  """Random weights in the published layout."""
  folder = tmp_path_factory.mktemp('checkpoints')
  published_folders.save_dicetalk(folder / 'DICE-Talk')
  published_folders.save_svd(folder / 'svd')
  published_folders.save_whisper(folder / 'whisper')
  return folder


@pytest.fixture(scope='module')
def model(checkpoints, tmp_path_factory):
  folder = tmp_path_factory.mktemp('models') / 'dicetalk'
  others = ('--svd', checkpoints / 'svd', '--whisper', checkpoints / 'whisper')
  assert run_convert('dicetalk', checkpoints / 'DICE-Talk', folder, *others) == 0
  return folder


def flags_for(output, *arguments):
  """Flags of the dump script, for the twin unless arguments name another program."""
  shift = f'--shift={twin_program.SHIFT}'
  return dump_reference.make_parser().parse_args(
    [f'--output={output}', shift, *map(str, arguments)]
  )


@pytest.fixture(scope='module')
def recorder(checkpoints):
  """What was recorded of the faithful twin."""
  return dump_reference.watch(flags_for('nowhere', PROGRAM, checkpoints))


@pytest.fixture(scope='module')
def dump(recorder, tmp_path_factory):
  folder = tmp_path_factory.mktemp('dumps') / 'faithful'
  dump_reference.write(recorder, flags_for(folder, PROGRAM))
  return folder


@pytest.fixture(scope='module')
def computed(dump, model):
  return stages.Stages(Dump.read(dump), model)


@pytest.fixture
def accept(computed, model, monkeypatch, capsys):
  """Runs the command; its programs are compiled once for all dumps.

  Returns the exit code and the lines that it prints.
  """

  def shared(dump, folder):
    assert folder == model
    computed.dump = dump
    return computed

  def run(folder):
    monkeypatch.setattr(command, 'Stages', shared)
    capsys.readouterr()
    code = run_convert('accept', folder, model)
    return code, capsys.readouterr().out.splitlines()

  return run


def departing(lines):
  return [line[:26].rstrip() for line in lines if line.endswith('DEPARTS')]


STEPS = [f'latents after step {i + 1}' for i in range(twin_program.STEPS)]


def test_a_faithful_run_is_reproduced(dump, accept):
  code, (head, *rows, verdict) = accept(dump)
  assert code == 0
  assert head.split() == ['stage', 'largest', 'mean', 'relative', 'limit', 'PSNR']
  assert [row[:26].rstrip() for row in rows] == [
    'reference latents',
    'CLIP token',
    'face mask features',
    'speech states',
    'audio windows',
    'audio tokens',
    'audio tokens of silence',
    'emotion tokens',
    'tokens of no emotion',
    'time ids',
    'initial latents',
    *STEPS,
    'final latents',
    'frames',
    'frames, end to end',
  ]
  assert all(row.endswith('pass') for row in rows)
  assert verdict == 'this program reproduces the run: 17 of 17 stages pass'
  relative = [float(row[26:].split()[2]) for row in rows]
  assert max(relative) < 1e-4  # rounding; it was 2.4e-5


@pytest.mark.parametrize(
  'faults, stages',
  [
    (
      ['face', 'no_emotion', 'decoder'],
      ['face mask features', 'tokens of no emotion', 'frames', 'frames, end to end'],
    ),
    pytest.param(
      ['time_context'],
      [*STEPS, 'final latents', 'frames, end to end'],
      marks=pytest.mark.slow,  # see tests/durations.md
    ),
  ],
)
def test_the_stages_that_depart_are_named(
  checkpoints, accept, tmp_path, faults, stages
):
  """And none behind them that is as it should be: each has the dump's own inputs."""
  flags = flags_for(tmp_path, PROGRAM, checkpoints, *faults)
  dump_reference.write(dump_reference.watch(flags), flags)
  code, lines = accept(tmp_path)
  assert code == 1
  assert departing(lines) == stages
  assert lines[-1] == (
    f'this program departs from the run, first at: {stages[0]} '
    f'({len(stages)} of 17 stages depart)'
  )


@pytest.mark.slow  # see tests/durations.md
def test_a_run_in_16_bits_without_noise(checkpoints, accept, tmp_path):
  """Tensors of float32 keep their limits; frames are judged by their PSNR.

  The noise follows from the first latents.
  """
  flags = flags_for(tmp_path, PROGRAM, checkpoints, '--half')
  dump_reference.write(dump_reference.watch(flags), flags)
  tensors = load_file(tmp_path / TENSORS)
  assert tensors['latents'].dtype == tensors['frames'].dtype == np.float16
  assert tensors['reference_latents'].dtype == np.float32
  del tensors['noise'], tensors['time_ids']
  save_file(tensors, tmp_path / TENSORS)
  code, lines = accept(tmp_path)
  assert code == 0, lines
  assert lines[-1] == 'this program reproduces the run: 15 of 15 stages pass'
  limits = {line[:26].rstrip(): line[56:66].strip() for line in lines}
  assert limits['CLIP token'] == '5e-02' and limits['audio tokens'] == '2e-04'
  assert limits['latents after step 1'] == '1e-01'
  assert limits['frames'] == '35 dB' and limits['frames, end to end'] == '25 dB'


def test_differences_of_a_stage():
  reference = np.float32([[-1, 1], [1, -1]])  # of deviation 1
  ours = reference + np.float32([[0, 0.2], [0, 0]])
  limit = stages.Limit(0.1, 0.3, psnr=20)

  def compare(ours, half, is_image):
    return command.compare(Stage('a', ours, reference, limit, half, is_image))

  row = compare(ours, half=False, is_image=False)
  measured = [row.largest, row.mean, row.relative]
  np.testing.assert_allclose(measured, [0.2, 0.05, 0.2], rtol=1e-5)
  assert row.psnr is None and not row.passed
  assert compare(ours, half=True, is_image=True).psnr == pytest.approx(26.02, abs=0.01)
  assert compare(ours, half=True, is_image=True).passed
  assert not compare(-ours, half=True, is_image=True).passed
  assert not compare(ours * np.nan, half=True, is_image=True).passed
  assert not compare(ours * np.nan, half=False, is_image=False).passed
  assert not compare(ours[:1], half=False, is_image=False).passed
  assert compare(reference, half=False, is_image=False).passed


def settings_of(folder, **changes):
  """A dump's settings, after changes."""
  path = folder / SETTINGS
  settings = json.loads(path.read_text()) | changes
  kept = {name: x for name, x in settings.items() if x is not None}
  path.write_text(json.dumps(kept))
  return kept


def test_what_a_dump_holds(dump):
  settings = settings_of(dump)
  assert settings['length'] == twin_program.FRAMES
  assert settings['frames'] == twin_program.WINDOW
  assert settings['num_steps'] == settings['steps_run'] == twin_program.STEPS
  assert settings['decode_chunk'] == twin_program.CHUNK
  tensors = load_file(dump / TENSORS)
  assert tensors['latents'].shape == (4, 6, 4, 16, 24)
  assert tensors['noise'].shape == (6, 4, 16, 24)
  assert tensors['frames'].shape == (3, 3, 32, 48)
  assert tensors['audio_windows'].shape == (3, 10, 3, 8)
  assert tensors['speech_states'].shape == (1, 1500, 3, 8)


def test_dumps_that_cannot_be_used_are_refused(dump, model, tmp_path, capsys):
  def refused(*args):
    assert run_convert('accept', *args) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and error.count('\n') == 1
    return error

  assert 'is not a whole dump; make one with' in refused(tmp_path, model)
  copy = shutil.copytree(dump, tmp_path / 'copy')
  settings_of(copy, format=9)
  assert 'has the format 9, but only 1 is known' in refused(copy, model)
  settings_of(copy, format=1, shift=None)
  assert 'lacks shift; make the dump again' in refused(copy, model)
  settings_of(copy, shift=2)
  (copy / TENSORS).write_bytes(b'')
  assert 'cannot be read as safetensors' in refused(copy, model)
  assert 'is not a model folder' in refused(dump, tmp_path)


def test_a_model_of_sonic_is_refused(dump, tmp_path_factory, capsys):
  sonic = tiny.shared_sonic(tmp_path_factory)
  assert run_convert('accept', dump, sonic) == 2
  assert 'is a model of sonic, but the dump is one of DICE-Talk' in (
    capsys.readouterr().err
  )


def test_windows_are_joined():
  """Frames that two windows visit are averaged; wrong windows are refused."""
  latents = torch.randn(3, 5, 1, 2, 2)
  index = [[[0, 1, 2], [2, 3, 4], [4, 0, 1]], [[4, 0, 1], [1, 2, 3], [3, 4, 0]]]
  steps = [
    (float(i), [(latents[i][None, j], latents[i + 1][None, j]) for j in index[i]])
    for i in range(2)
  ]
  joined = dump_reference.join_windows(steps, 5, overlap=1, shift=4)
  torch.testing.assert_close(joined, latents)
  steps[1][1][0][1][0, 1] += 2  # one of the two visits to frame 0
  joined = dump_reference.join_windows(steps, 5, overlap=1, shift=4)
  torch.testing.assert_close(joined[2, 0], latents[2, 0] + 1)
  for overlap, shift, sentence in (
    (0, 4, 'step 1 has 3 windows instead of 2; give --overlap'),
    (1, 2, 'the windows of step 2 do not continue those of step 1; give --overlap'),
  ):
    with pytest.raises(dump_reference.DumpError, match=sentence):
      dump_reference.join_windows(steps, 5, overlap, shift)


def test_runs_that_lack_something_are_refused(recorder):
  def refused(seen, steps):
    changed = dump_reference.Recorder({})
    changed.seen, changed.steps = seen, steps
    with pytest.raises(dump_reference.DumpError) as info:
      dump_reference.collect(changed, overlap=0, shift=twin_program.SHIFT)
    return str(info.value)

  seen = recorder.seen
  assert 'name its class with --scheduler' in refused(seen, [])
  without = {name: x for name, x in seen.items() if name != 'pose_guider'}
  assert 'nothing went through pose_guider' in refused(without, recorder.steps)
  spoken = [call for call in seen['audio_linear'] if call[0].any()]
  silence = seen | {'audio_linear': spoken}
  assert '--hook audio_linear=CLASS' in refused(silence, recorder.steps)


def test_a_hook_point_by_its_class():
  """For a module whose parameters have other names than the published ones."""

  class Renamed(twin_program.PoseGuider):
    def __init__(self):
      super().__init__(8, [4, 4])
      self.first = self.conv_in
      del self.conv_in

    def forward(self, mask):
      return mask[:, :1]

  for classes in ({}, {'pose_guider': 'Renamed'}):
    with dump_reference.Recorder(classes) as recorder:
      Renamed()(torch.ones(1, 3, 2, 4, 4))
    assert ('pose_guider' in recorder.seen) == bool(classes)
  given, out = recorder.seen['pose_guider'][0]
  assert given.shape == (1, 3, 1, 4, 4) and out.shape == (1, 1, 1, 4, 4)


@pytest.mark.parametrize(
  'flags, program, sentence',
  [
    ([], "raise SystemExit('no weights')", 'ended with no weights; make it run by'),
    ([], '', 'nothing went through vae_encoder, vae_moments'),
    ([], None, 'program.py does not exist; name the program of the original'),
    (['--hook=pose=Guider'], '', 'give POINT=CLASS with one of vae_encoder'),
    (['--scheduler=diffusers:Nobody'], '', 'is not found'),
    (['--scheduler=nothing'], '', 'is not found'),
  ],
)
def test_programs_that_cannot_be_recorded(tmp_path, capsys, flags, program, sentence):
  path = tmp_path / 'program.py'
  if program is not None:
    path.write_text(program)
  output = tmp_path / 'dump'
  assert dump_reference.main([f'--output={output}', *flags, str(path)]) == 2
  error = capsys.readouterr().err
  assert error.startswith('error: ') and error.count('\n') == 1
  assert sentence in error
  assert not output.exists()
