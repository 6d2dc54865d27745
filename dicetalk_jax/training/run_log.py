"""What a run tells: terminal lines, `metrics.jsonl`, pictures, videos, TensorBoard, and
curves at the end.

A metric whose name has a slash, such as `denoise/sigma_1_3`, is a detail of the one
before the slash: it is written and drawn, but left out of the terminal's line.
"""

from collections.abc import Callable, Mapping
import json
import math
import pathlib
import tempfile
import time
from typing import Any, Protocol

from etils import epath
import jax
from matplotlib.figure import Figure
import numpy as np
from PIL import Image

from dicetalk_jax.errors import UserError
from dicetalk_jax.media.video import Video, write_video
from dicetalk_jax.training import metric_means

Metrics = Mapping[str, Any]
Picture = np.ndarray | Video  # uint8 [H,W,3], or moving with sound


class DivergedError(UserError):
  """The loss or its gradient is no longer a number."""


class Writer(Protocol):
  """The part of `clu.metric_writers.MetricWriter` that the loop uses."""

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None: ...

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None: ...

  def flush(self) -> None: ...


class JsonLinesWriter:
  """One JSON object per call: `{"step": 50, "train/loss": 0.5, ...}`.

  Numbers survive to the bit.
  """

  def __init__(self, path: epath.Path):
    self.path = epath.Path(path)

  def write_scalars(self, step, scalars):
    with self.path.open('a') as f:
      f.write(json.dumps({'step': step, **scalars}) + '\n')

  def write_images(self, step, images):
    """Pictures are files of their own: `Report.evaluation` writes them."""

  def flush(self):
    """Every line is written when it is made."""

  def cut(self, step: int) -> None:
    """Drops what a killed run wrote after `step`, its last checkpoint."""
    kept = [row for row in read_json_lines(self.path) if row['step'] <= step]
    aside = self.path.with_name(self.path.name + '.tmp')
    aside.write_text(''.join(json.dumps(row) + '\n' for row in kept))
    aside.replace(self.path)


def read_json_lines(path: epath.Path) -> list[dict[str, Any]]:
  """The rows of a `metrics.jsonl`, without the half line that a killed process may
  leave at the end.
  """
  path = epath.Path(path)
  lines = path.read_text().split('\n')[:-1] if path.exists() else []
  return [json.loads(line) for line in lines]


class Meter:
  """Means of the step metrics between two reports; see `averages.mean`.

  Values are fetched one step late, so the host prepares the next step while the device
  works on this one, and never runs further ahead than that.
  """

  def __init__(self):
    self._values: list[Metrics] = []
    self._pending: tuple[int, Metrics] | None = None
    self._last = 0  # step of the last of the values
    self._since: float | None = None  # the first step compiles and is not timed
    self._timed = 0

  def add(self, step: int, metrics: Metrics) -> None:
    self._fetch()
    self._pending = step, metrics
    if self._since is None:
      self._fetch()

  def means(self) -> tuple[dict[str, float], float | None]:
    """(means, steps per second or None) since the last call.

    Raises DivergedError, naming the step.
    """
    self._fetch()
    values, self._values = self._values, []
    return metric_means.aggregate(values), self._timed / (
      time.monotonic() - self._since
    ) if self._timed else None

  def left(self) -> tuple[int, dict[str, float]] | None:
    """(last step, means) of the good steps since the last call of `means`, where the
    run breaks off; or None.
    """
    return (self._last, metric_means.aggregate(self._values)) if self._values else None

  def restart_clock(self) -> None:
    """Leaves out of the rate what happened since the last step."""
    self._since, self._timed = time.monotonic(), 0

  def _fetch(self) -> None:
    if self._pending is None:
      return
    (step, metrics), self._pending = self._pending, None
    values = jax.device_get(metrics)
    if not (math.isfinite(values['loss']) and math.isfinite(values['grad_norm'])):
      raise DivergedError(
        f'training diverged at step {step} (loss {values["loss"]:g}, gradient norm '
        f'{values["grad_norm"]:g}); the last checkpoint before it is kept: lower '
        'optim.lr, or look for bad data'
      )
    self._values.append(values)
    self._last = step
    if self._since is None:
      self.restart_clock()
    else:
      self._timed += 1


class Report:
  """Writes on process 0 only; on the others every call does nothing."""

  def __init__(
    self,
    workdir: epath.Path,
    make_writer: Callable[[epath.Path], Writer] | None,
    first_step: int,
    total_steps: int,
  ):
    self._active = jax.process_index() == 0
    self._workdir, self._total = workdir, total_steps
    if self._active:
      lines = JsonLinesWriter(workdir / 'metrics.jsonl')
      lines.cut(first_step)
      self._writers = (lines, *([make_writer(workdir)] if make_writer else []))

  def say(self, text: str) -> None:
    if self._active:
      print(text, flush=True)

  def train(self, step: int, means: dict[str, float], rate: float | None) -> None:
    """One line on the terminal, and the same as scalars `train/...`."""
    if not self._active:
      return
    parts = [self._line(step, means)]
    scalars = {f'train/{k}': v for k, v in means.items()}
    if rate:
      parts += [f'{rate:.3g} steps/s', f'{_duration((self._total - step) / rate)} left']
      scalars['train/steps_per_second'] = rate
    self.say('  '.join(parts))
    self._write(step, scalars)

  def evaluation(
    self, step: int, metrics: dict[str, float], pictures: Mapping[str, Picture]
  ) -> None:
    """Scalars `eval/...`; pictures go to the writer and to `pictures/NAME_STEP.png`,
    videos to `.mp4` beside them.
    """
    if not self._active:
      return
    self.say(self._line(step, metrics, 'evaluation'))
    self._write(step, {f'eval/{k}': float(v) for k, v in metrics.items()})
    folder = self._workdir / 'pictures'
    folder.mkdir(exist_ok=True)
    for name, picture in pictures.items():
      if isinstance(picture, Video):
        _write_video(folder / f'{name}_{step:07d}.mp4', picture)
        continue
      with (folder / f'{name}_{step:07d}.png').open('wb') as f:
        Image.fromarray(picture).save(f, format='PNG')
      for writer in self._writers:
        writer.write_images(step, {name: picture[None]})

  def close(self) -> None:
    """Draws `curves.png` from `metrics.jsonl` and flushes the writer."""
    if self._active:
      draw_curves(self._workdir)
      for writer in self._writers:
        writer.flush()

  def _line(self, step: int, values: dict[str, float], *words: str) -> str:
    return '  '.join(
      [
        f'step {step:{len(str(self._total))}}/{self._total}',
        *words,
        *(f'{name} {value:.4g}' for name, value in values.items() if '/' not in name),
      ]
    )

  def _write(self, step, scalars):
    for writer in self._writers:
      writer.write_scalars(step, scalars)


def draw_curves(workdir: epath.Path) -> None:
  """`curves.png` with one panel per metric, its details in the same one; nothing if
  there is no metric yet.
  """
  rows = read_json_lines(workdir / 'metrics.jsonl')
  panels: dict[str, list[str]] = {}
  for name in dict.fromkeys(name for row in rows for name in row if name != 'step'):
    panels.setdefault('/'.join(name.split('/')[:2]), []).append(name)
  if not panels:
    return
  columns = min(len(panels), 4)
  height = -(-len(panels) // columns)
  figure = Figure(figsize=(4 * columns, 3 * height))
  figure.subplots_adjust(
    0.16 / columns,
    0.1 / height,
    1 - 0.08 / columns,
    1 - 0.12 / height,
    wspace=0.25,
    hspace=0.3,
  )
  for i, (panel, names) in enumerate(panels.items(), 1):
    axes = figure.add_subplot(height, columns, i, title=panel)
    for name in names:
      points = [(row['step'], row[name]) for row in rows if name in row]
      axes.plot(
        *zip(*points),
        marker='.' if len(points) < 20 else '',
        label=name.removeprefix(panel)[1:] or 'all',
      )
    axes.grid(alpha=0.3)
    if len(names) > 1:
      axes.legend(fontsize='x-small')
    if 'loss' in panel and all(value > 0 for _, value in points):
      axes.set_yscale('log')
  with (workdir / 'curves.png').open('wb') as f:
    figure.savefig(f, format='png', dpi=100)


def _write_video(path: epath.Path, video: Video) -> None:
  """Through a local file, since the work directory may be remote."""
  with tempfile.TemporaryDirectory() as folder:
    local = pathlib.Path(folder) / path.name
    write_video(local, *video)
    path.write_bytes(local.read_bytes())


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return (
    f'{hours} h {minutes:02d} min'
    if hours
    else f'{minutes} min {seconds:02d} s'
    if minutes
    else f'{seconds} s'
  )
