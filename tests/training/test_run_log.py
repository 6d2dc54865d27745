"""The log of a run: means, the line in the terminal, files, curves, profiles."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from dicetalk_jax import parallel
from dicetalk_jax.errors import ConfigError
from dicetalk_jax.media.video import Video, read_video
from dicetalk_jax.training import metric_means
from dicetalk_jax.training.loop import train
from dicetalk_jax.training.profile import parse_span
from dicetalk_jax.training.run_log import Meter, RunLog, draw_curves, read_json_lines
from tests.training import toy

METRICS = {'loss': 0.5, 'denoise': 0.4, 'denoise/sigma_1_3': 0.3, 'lr': 1e-3}


def test_scalars_are_averaged_and_pairs_by_weight():
  rows = [
    {'cls': 1.0, 'loss': 3.0, 'part': np.float32([6, 2]), 'none': np.zeros(2)},
    {'cls': 2.0, 'loss': 5.0, 'part': np.float32([1, 3]), 'none': np.zeros(2)},
  ]
  assert list(metric_means.aggregate(rows).items()) == [
    ('loss', 4.0),
    ('cls', 1.5),
    ('part', 7 / 5),
  ]


def test_noise_ranges_average_to_the_mean_of_their_clips():
  """However clips fall into batches; a range without a clip says nothing, and no
  value is NaN.
  """
  rng = np.random.default_rng(0)
  sigma, values, counted = (
    np.exp(rng.normal(0.7, 1.6, 64)),
    rng.random(64),
    rng.random(64) < 0.7,
  )
  sigma[sigma < 0.3] = 1.0
  rows = [
    jax.device_get(
      metric_means.split_by_sigma(
        'cls', *(jnp.asarray(x[i : i + 4]) for x in (values, sigma, counted))
      )
    )
    for i in range(0, 64, 4)
  ]
  assert all(np.isfinite(pair).all() for row in rows for pair in row.values())
  means = metric_means.aggregate(rows)
  edges = (0, *metric_means.SIGMA_EDGES, math.inf)
  for low, high in zip(edges, edges[1:]):
    inside = counted & (sigma >= low) & (sigma < high)
    name = f'cls/sigma_{low:g}_{high:g}'
    assert (name in means) == inside.any()
    if inside.any():
      assert means[name] == pytest.approx(values[inside].mean(), rel=1e-5)
  assert 'cls/sigma_0_0.3' not in means and len(means) == 4


def test_meter_weighs_steps():
  meter = Meter()
  for step, pair in enumerate(([2.0, 1.0], [0.0, 0.0], [12.0, 3.0]), 1):
    meter.add(
      step,
      {
        'loss': jnp.float32(step),
        'grad_norm': jnp.float32(1),
        'd/part': jnp.array(pair),
      },
    )
  means, rate = meter.means()
  assert means == {'loss': 2.0, 'd/part': 3.5, 'grad_norm': 1.0} and rate > 0


def test_one_line_per_log_step(tmp_path, capsys):
  """Step, loss parts, rate and time left; details go to the file only."""
  log = RunLog(tmp_path, None, 0, 1000)
  log.train(50, METRICS, 2.0)
  log.train(100, METRICS, None)
  assert capsys.readouterr().out.splitlines() == [
    'step   50/1000  loss 0.5  denoise 0.4  lr 0.001  2 steps/s  7 min 55 s left',
    'step  100/1000  loss 0.5  denoise 0.4  lr 0.001',
  ]
  assert read_json_lines(tmp_path / 'metrics.jsonl')[0] == {
    'step': 50,
    **{f'train/{name}': value for name, value in METRICS.items()},
    'train/steps_per_second': 2.0,
  }


class Recorder:
  """Stands for the TensorBoard writer."""

  def __init__(self, folder):
    self.scalars, self.images = {}, []

  def write_scalars(self, step, scalars):
    self.scalars |= scalars

  def write_images(self, step, images):
    self.images += [(step, name, image.shape) for name, image in images.items()]

  def flush(self):
    pass


def test_pictures_and_videos_with_sound(tmp_path, capsys):
  recorder = Recorder(tmp_path)
  log = RunLog(tmp_path, lambda folder: recorder, 0, 10)
  frames = np.zeros((5, 16, 24, 3), np.uint8)
  log.evaluation(
    5,
    {'psnr': 20.0, 'denoise/sigma_1_3': 1.0},
    {
      'face': frames[0],
      'sample_0': Video(frames, 12.5, np.sin(np.arange(6400, dtype=np.float32))),
    },
  )
  assert capsys.readouterr().out == 'step  5/10  evaluation  psnr 20\n'
  assert recorder.images == [(5, 'face', (1, 16, 24, 3))]
  assert recorder.scalars == {'eval/psnr': 20.0, 'eval/denoise/sigma_1_3': 1.0}
  assert sorted(path.name for path in (tmp_path / 'pictures').iterdir()) == [
    'face_0000005.png',
    'sample_0_0000005.mp4',
  ]
  video = read_video(tmp_path / 'pictures' / 'sample_0_0000005.mp4')
  assert video.frames.shape == (5, 16, 24, 3) and video.fps == 12.5
  assert len(video.audio) == 6400 and np.abs(video.audio).max() > 0.3


def test_details_share_the_panel_of_their_metric(tmp_path):
  """The width shows the number of panels."""
  rows = [
    {
      'step': step,
      'train/loss': 1 / step,
      'train/denoise': 1.0,
      'train/denoise/sigma_1_3': 0.5,
    }
    for step in (1, 2)
  ]
  (tmp_path / 'metrics.jsonl').write_text(
    ''.join(json.dumps(row) + '\n' for row in rows)
  )
  draw_curves(tmp_path)
  assert Image.open(tmp_path / 'curves.png').size == (800, 300)


def test_profile_of_some_steps(tmp_path, capsys):
  one = parallel.make_mesh(devices=jax.devices()[:1])
  config = toy.get_config(total_steps=3, accum=1, log_every=10)
  train(toy.ToyTask, config, tmp_path / 'run', mesh=one, profile=parse_span('2:1'))
  assert [
    path.stat().st_size > 0
    for path in (tmp_path / 'run' / 'profile').rglob('*.xplane.pb')
  ] == [True]
  assert (
    f'step 2: profile written to {tmp_path / "run" / "profile"}'
    in capsys.readouterr().out
  )
  with pytest.raises(
    ConfigError, match='steps 3 to 4 cannot be profiled: this run makes steps 1 to 3'
  ):
    train(toy.ToyTask, config, tmp_path / 'other', mesh=one, profile=parse_span('3:2'))
  assert not (tmp_path / 'other').exists()


def test_a_run_that_goes_on_behind_its_profile(tmp_path, capsys):
  """The same command resumes it."""
  one = parallel.make_mesh(devices=jax.devices()[:1])
  for total in (2, 4):
    config = toy.get_config(total_steps=total, accum=1, log_every=1)
    state = train(
      toy.ToyTask, config, tmp_path / 'run', mesh=one, profile=parse_span('2:1')
    )
    assert int(state.step) == total
  first, second = capsys.readouterr().out.split('from step 2 to 4\n')
  assert 'profile written' in first and 'no profile of' not in first
  assert (
    second.startswith('no profile of steps 2 to 2: the run resumes after')
    and 'profile written' not in second
  )


@pytest.mark.parametrize('text', ['5', '0:3', '3:0', 'a:b', '3:', '-1:2', '1:2:3'])
def test_wrong_profiles_are_named(text):
  with pytest.raises(ConfigError, match=f'--profile={text} does not name any steps'):
    parse_span(text)


def test_no_profile_by_default():
  assert parse_span('') is None
