"""Trains the demo model from nothing: `make demo-train`, or

    python -m examples.train_demo_model --folder=runs/demo

Renders the training set and trains four networks, one after the other, on two CPU
cores. Everything is resumable: stop it whenever you like, and run the same command
again. With --minutes=5 it stops by itself.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import os
import pathlib
import shutil
import signal
import sys
import threading
import time

import ml_collections

from data_pipelines.builders.synthetic import prepare_synthetic
from dicetalk_jax import bundle, cli, model_references
from dicetalk_jax.main import task_class
from dicetalk_jax.training import loop
from examples import demo_data
from examples.cores import share_cores
from examples.stages import stage
from examples.train_demo_model import settings
from examples.train_demo_model.speech import SpeechTask

RECORDS = ('config.json', 'metrics.jsonl', 'curves.png')  # of each run


def _parser() -> cli.OptionParser:
  parser = cli.OptionParser(
    prog='python -m examples.train_demo_model',
    description='Trains the demo model from nothing; resumable at any time.',
  )
  parser.add_argument(
    '--folder',
    default='runs/demo',
    type=pathlib.Path,
    metavar='DIR',
    help='data, runs and the finished model are written here',
  )
  parser.add_argument(
    '--minutes',
    type=float,
    metavar='N',
    help='stop after about so many minutes; the same command continues later',
  )
  parser.add_argument(
    '--smallest',
    action='store_true',
    help='a few steps only: checks that all parts run',
  )
  return parser


def main(argv: list[str]) -> None:
  """Runs all parts that are not finished yet."""
  flags = _parser().parse_args(argv)
  folder = flags.folder
  folder.mkdir(parents=True, exist_ok=True)
  deadline = time.monotonic() + 60 * flags.minutes if flags.minutes else None
  shards = 1 if flags.smallest else max(settings.SHARDS.values())
  share_cores()
  if not flags.smallest:
    total = sum(settings.EXPECTED_MINUTES.values())
    print(f'about {total} minutes on two cores, if nothing else runs', flush=True)

  # 1. Data.
  data = []
  for seed in range(shards):
    _stop_if_late(deadline)
    with stage(f'data, shard {seed + 1} of {shards}'):
      data.append(str(prepare_synthetic(folder / 'data', shard(seed, flags.smallest))))

  # 2. Networks.
  model = ''
  for name, get_config in settings.CONFIGS.items():
    workdir = folder / name
    if settings.COMPONENTS[name] not in bundle.components(workdir / 'model'):
      _stop_if_late(deadline)
      config = get_config()
      if flags.smallest:
        shorten(config)
      config.data.dataset = ','.join(data[: settings.SHARDS[name]])
      config.model = model
      with stage(f'{name}, {config.total_steps} steps'):
        train(name, config, workdir, deadline)
    model = str(workdir / 'model')

  # 3. The model folder.
  pack(folder, model)
  print(f'finished: {folder / "model"}; python -m examples.demo --model={folder}/model')


def train(
  name: str,
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  deadline: float | None,
) -> None:
  """Begins or resumes a part; ends the program if there is no time left for all of it.

  Args:
    name: of the part.
    config: its configuration.
    workdir: of its run.
    deadline: of `time.monotonic()`, or None.
  """
  task = SpeechTask if name == 'speech' else task_class(name)
  with stopped_at(deadline):
    state = loop.train(task, config, workdir)
  if int(state.step) < config.total_steps:
    _stop()


def shard(seed: int, small: bool) -> demo_data.SyntheticConfig:
  """The settings of one part of the training set."""
  settings_of_all = demo_data.SHARD
  if small:
    settings_of_all = dataclasses.replace(settings_of_all, train=8, clips=16)
  return dataclasses.replace(settings_of_all, seed=seed)


def pack(folder: pathlib.Path, model: str) -> None:
  """Copies the finished model into one folder, with the record of its training."""
  destination = folder / 'model'
  model_references.pack(model, destination, overwrite=True, half=True)
  for name in settings.CONFIGS:
    records = destination / 'training' / name
    records.mkdir(parents=True, exist_ok=True)
    for file in RECORDS:
      shutil.copy(folder / name / file, records / file)


def shorten(config: ml_collections.ConfigDict) -> None:
  """Cuts a configuration down to what shows that everything runs.

  What the model then generates looks like noise.
  """
  steps = 20 if config.task == 'embedder' else 10
  config.total_steps = steps
  config.eval_every = steps
  config.checkpoint_every = steps
  config.log_every = 5
  config.optim.name = 'adam'  # Muon compiles for minutes
  config.optim.warmup = 2


@contextlib.contextmanager
def stopped_at(deadline: float | None) -> Iterator[None]:
  """Asks a training run to save and stop at a time, as the system would."""
  if deadline is None:
    yield
    return
  left = max(0.0, deadline - time.monotonic())
  timer = threading.Timer(left, os.kill, (os.getpid(), signal.SIGTERM))
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


def _stop_if_late(deadline: float | None) -> None:
  if deadline is not None and time.monotonic() > deadline:
    _stop()


def _stop() -> None:
  """Ends the program between two parts."""
  print('stopped; run the same command again to continue')
  sys.exit(0)


if __name__ == '__main__':
  with cli.console():
    main(sys.argv[1:])
