"""The log of a run: terminal lines, `metrics.jsonl`, images, videos, TensorBoard files,
and curves at the end.

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
Picture = np.ndarray | Video  # an image uint8 [H,W,3], or a video with audio


class DivergedError(UserError):
  """The loss or its gradient is no longer a number."""


class Writer(Protocol):
  """The part of `clu.metric_writers.MetricWriter` that the log uses."""

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None: ...

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None: ...

  def flush(self) -> None: ...


class JsonLinesWriter:
  """Writes one JSON object per call: `{"step": 50, "train/loss": 0.5, ...}`.

  Numbers survive to the bit.
  """

  def __init__(self, path: epath.Path):
    self.path = epath.Path(path)

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    with self.path.open('a') as f:
      f.write(json.dumps({'step': step, **scalars}) + '\n')

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    """Does nothing: `RunLog.evaluation` writes images as files."""

  def flush(self) -> None:
    """Does nothing: every line is written at once."""

  def cut(self, step: int) -> None:
    """Drops what a killed run wrote after `step`, its last checkpoint."""
    rows = read_json_lines(self.path)
    kept = [json.dumps(row) + '\n' for row in rows if row['step'] <= step]
    temporary = self.path.with_name(self.path.name + '.tmp')
    temporary.write_text(''.join(kept))
    temporary.replace(self.path)


def read_json_lines(path: epath.Path | pathlib.Path) -> list[dict[str, Any]]:
  """Reads the rows of a `metrics.jsonl`, except for half a line at its end, which a
  killed process may leave.
  """
  path = epath.Path(path)
  if not path.exists():
    return []
  *lines, _ = path.read_text().split('\n')
  return [json.loads(line) for line in lines]


class Meter:
  """Means of the metrics of the steps between two lines of the log; see
  `metric_means.aggregate`.

  Values are fetched one step late, so the host prepares the next step while the device
  works on this one, and never runs further ahead than that.
  """

  def __init__(self):
    self._values: list[Metrics] = []
    self._pending: tuple[int, Metrics] | None = None
    self._last = 0  # step of the last of the values
    self._since: float | None = None  # the first step compiles and is not timed
    self._timed = 0  # steps since then

  def add(self, step: int, metrics: Metrics) -> None:
    """Takes the metrics of a step, which may still be running.

    Raises:
      DivergedError: the loss or gradient of the step before, or of the very first
        step, is not a number.
    """
    self._fetch()
    self._pending = step, metrics
    if self._since is None:
      self._fetch()

  def means(self) -> tuple[dict[str, float], float | None]:
    """Returns means and steps per second (or None) since the last call.

    Raises:
      DivergedError: the loss or gradient of the last step is not a number.
    """
    self._fetch()
    means = metric_means.aggregate(self._values)
    self._values = []
    steps_per_second = None
    if self._since is not None and self._timed:
      steps_per_second = self._timed / (time.monotonic() - self._since)
    return means, steps_per_second

  def left(self) -> tuple[int, dict[str, float]] | None:
    """Returns the last step and the means of the good steps since the last call of
    `means`, for a run that breaks off; None if there are none.
    """
    if not self._values:
      return None
    return self._last, metric_means.aggregate(self._values)

  def restart_clock(self) -> None:
    """Leaves out of steps per second what happened since the last step."""
    self._since = time.monotonic()
    self._timed = 0

  def _fetch(self) -> None:
    if self._pending is None:
      return
    step, metrics = self._pending
    self._pending = None
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


class RunLog:
  """Writes on process 0 only; on the others every call does nothing."""

  def __init__(
    self,
    workdir: epath.Path,
    make_writer: Callable[[epath.Path], Writer] | None,
    steps_done: int,
    total_steps: int,
  ):
    """Opens the log of a run that has made `steps_done` of `total_steps`."""
    self._active = jax.process_index() == 0
    self._workdir = workdir
    self._total = total_steps
    self._writers: list[Writer] = []
    if self._active:
      lines = JsonLinesWriter(workdir / 'metrics.jsonl')
      lines.cut(steps_done)
      self._writers.append(lines)
      if make_writer is not None:
        self._writers.append(make_writer(workdir))

  def say(self, text: str) -> None:
    """Prints a line on the terminal."""
    if self._active:
      print(text, flush=True)

  def train(
    self, step: int, means: dict[str, float], steps_per_second: float | None
  ) -> None:
    """Prints one line, and writes the same as scalars `train/...`.

    Args:
      step: the last one of those that the means are of.
      means: of the metrics, by name.
      steps_per_second: None if no step was timed.
    """
    if not self._active:
      return
    words = [self._line(step, means)]
    scalars = {f'train/{name}': value for name, value in means.items()}
    if steps_per_second:
      seconds_left = (self._total - step) / steps_per_second
      words.append(f'{steps_per_second:.3g} steps/s')
      words.append(f'{_duration(seconds_left)} left')
      scalars['train/steps_per_second'] = steps_per_second
    self.say('  '.join(words))
    self._write_scalars(step, scalars)

  def evaluation(
    self, step: int, metrics: dict[str, float], pictures: Mapping[str, Picture]
  ) -> None:
    """Writes scalars `eval/...`, images as `pictures/NAME_STEP.png` and videos as
    `.mp4` next to them.
    """
    if not self._active:
      return
    self.say(self._line(step, metrics, 'evaluation'))
    scalars = {f'eval/{name}': float(value) for name, value in metrics.items()}
    self._write_scalars(step, scalars)
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
    """Draws `curves.png` from `metrics.jsonl` and flushes the writers."""
    if self._active:
      draw_curves(self._workdir)
      for writer in self._writers:
        writer.flush()

  def _line(self, step: int, values: dict[str, float], *words: str) -> str:
    width = len(str(self._total))
    numbers = [f'{name} {x:.4g}' for name, x in values.items() if '/' not in name]
    return '  '.join([f'step {step:{width}}/{self._total}', *words, *numbers])

  def _write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    for writer in self._writers:
      writer.write_scalars(step, scalars)


def draw_curves(workdir: epath.Path) -> None:
  """Draws `curves.png`: one panel per metric, with its details; nothing if there are no
  metrics yet.

  A panel whose name contains "loss" gets a logarithmic axis if all values are positive.
  """
  rows = read_json_lines(workdir / 'metrics.jsonl')

  # Which metrics share a panel: 'train/denoise' and 'train/denoise/sigma_1_3'.
  panels: dict[str, list[str]] = {}
  for row in rows:
    for name in row:
      panel = '/'.join(name.split('/')[:2])
      names = panels.setdefault(panel, [])
      if name not in names:
        names.append(name)
  panels.pop('step', None)
  if not panels:
    return

  # The figure.
  columns = min(len(panels), 4)
  height = math.ceil(len(panels) / columns)
  figure = Figure(figsize=(4 * columns, 3 * height))
  figure.subplots_adjust(
    left=0.16 / columns,
    bottom=0.1 / height,
    right=1 - 0.08 / columns,
    top=1 - 0.12 / height,
    wspace=0.25,
    hspace=0.3,
  )

  # Its panels.
  for i, (panel, names) in enumerate(panels.items(), 1):
    axes = figure.add_subplot(height, columns, i, title=panel)
    positive = True
    for name in names:
      steps = [row['step'] for row in rows if name in row]
      values = [row[name] for row in rows if name in row]
      marker = '.' if len(values) < 20 else ''
      label = name.removeprefix(panel).removeprefix('/') or 'all'
      axes.plot(steps, values, marker=marker, label=label)
      positive = positive and all(x > 0 for x in values)
    axes.grid(alpha=0.3)
    if len(names) > 1:
      axes.legend(fontsize='x-small')
    if 'loss' in panel and positive:
      axes.set_yscale('log')
  with (workdir / 'curves.png').open('wb') as f:
    figure.savefig(f, format='png', dpi=100)


def _write_video(path: epath.Path, video: Video) -> None:
  """Writes through a local file, since the work directory may be remote."""
  with tempfile.TemporaryDirectory() as folder:
    local = pathlib.Path(folder) / path.name
    write_video(local, *video)
    path.write_bytes(local.read_bytes())


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f'{hours} h {minutes:02d} min'
  if minutes:
    return f'{minutes} min {seconds:02d} s'
  return f'{seconds} s'
