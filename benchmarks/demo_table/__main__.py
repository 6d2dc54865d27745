"""Measures the demo model on unseen people.

    python -m benchmarks.demo_table --model=examples/demo_model --output=runs/table

After an interruption, the same command resumes where it stopped. Everything that was
read stays in the folder, so a finished table is written again in seconds.
"""

import argparse
import ast
import dataclasses
import hashlib
import pathlib
import time
from typing import Any

import jax

from benchmarks.demo_table import pictures, report, work
from benchmarks.demo_table.journal import Facts, Journal
from benchmarks.demo_table.rows import ROWS, Scorer
from benchmarks.demo_table.work import Work
from dicetalk_jax import bundle, cli, parallel
from dicetalk_jax.bundle import ModelFolder
from dicetalk_jax.data.clip_record import LEVELS
from dicetalk_jax.diffusion.sampler import SamplerConfig
from dicetalk_jax.errors import ConfigError
from dicetalk_jax.files import atomic_file, lock_folder
from dicetalk_jax.metrics.judges import Judges
from dicetalk_jax.pipeline import Pipeline
from dicetalk_jax.settings import Settings
from examples.cores import share_cores
from examples.demo_data import SECONDS, SHARD, Case, cases

PREFIX = 'sample.'  # of sampling settings, as in the configuration of training


def _parser() -> argparse.ArgumentParser:
  parser = cli.OptionParser(
    prog='python -m benchmarks.demo_table',
    description='Measures the demo model on unseen people, beside truth and spoiled '
    'truth.',
  )
  add = parser.add_argument
  add('--model', required=True, metavar='DIR', help='model folder')
  add(
    '--output',
    required=True,
    type=pathlib.Path,
    metavar='DIR',
    help='the table, pictures, and everything that was read',
  )
  add('--people', type=int, default=24, help='unseen people; more may be added later')
  add('--levels', default='2,3', help='intensities of the emotions, in turn')
  add(
    '--only',
    metavar='ROW,ROW',
    help='these rows alone, and the truth: '
    + ', '.join(name.replace(' ', '_') for name in ROWS),
  )
  add(
    '--set',
    action='append',
    default=[],
    metavar='sample.NAME=VALUE',
    help='another sampling setting, such as sample.num_steps=25; may be repeated',
  )
  add('--batch', type=int, default=8, help='clips that are sampled together')
  add('--seed', type=int, default=0, help='of the noise')
  return parser


def main(argv: list[str]) -> None:
  """Makes the table, or resumes it."""
  flags = _parser().parse_args(argv)
  started = time.monotonic()

  # 1. Check everything that can be wrong.
  rows = chosen_rows(flags.only)
  sampling = parse_settings(flags.set)
  listed = [*cases(_people(flags.people), parse_levels(flags.levels))]
  if flags.batch < 1:
    raise ConfigError(f'--batch={flags.batch} holds no clip; give at least 1')
  model = ModelFolder.open(flags.model)
  settings = Settings.of(model, **sampling)
  model.require(*settings.components)
  share_cores()  # before anything computes
  judges = Judges.load()

  # 2. Render, generate and read.
  made_with = conditions_of(model, settings, judges, flags.levels, flags.seed)
  with lock_folder(flags.output, f'waiting for another run in {flags.output}'):
    journal = Journal.open(flags.output, made_with)

    def load() -> Pipeline:
      mesh = parallel.make_mesh(data=-1, fsdp=1) if jax.device_count() > 1 else None
      return Pipeline.load(model, mesh, **sampling)

    table = Work(listed, journal, judges, settings, load)
    table.render()
    if work.GENERATED in rows:
      table.generate(flags.batch, flags.seed)
    if work.AUTOENCODED in rows:
      table.autoencode()
    for row in work.SPOILT:
      if row in rows:
        table.spoil(row)

    # 3. Score, and write.
    scorer = Scorer(listed, journal, judges, settings.fps)
    write(flags.output, {name: scorer.row(name) for name in rows}, listed, journal)
  print(f'{(time.monotonic() - started) / 60:.1f} minutes; {flags.output}/table.md')


def write(
  folder: pathlib.Path, table: report.Table, listed: list[Case], journal: Journal
) -> None:
  """Prints the table, and writes it with its pictures."""
  print(report.text(table), flush=True)
  for name, content in {
    'table.json': report.as_json(table, listed, journal.made_with),
    'table.md': report.markdown(table, listed, journal.made_with),
  }.items():
    with atomic_file(folder / name) as part:
      part.write_text(content)
  pictures.draw_confusion(table, folder / 'confusion.png')
  pictures.draw_lip_sync(table, folder / 'lip_sync.png')
  pictures.draw_sheets(listed, journal, folder / 'sheets')


def conditions_of(
  model: ModelFolder, settings: Settings, judges: Judges, levels: str, seed: int
) -> Facts:
  """Everything that the readings depend on, but the number of people."""
  priors = hashlib.sha256()
  for name, arrays in sorted(bundle.load_priors(model).items()):
    priors.update(name.encode() + b''.join(x.tobytes() for x in arrays))
  values = dataclasses.asdict(settings)
  sampler = values.pop('sampler')
  return {
    **{
      f'model.{name}': entry.get('fingerprint', entry['checkpoint'])
      for name, entry in sorted(model.components.items())
      if name in settings.components
    },
    'model.priors': priors.hexdigest()[:16],
    'judges': judges.fingerprint,
    **{f'{PREFIX}{name}': value for name, value in sampler.items()},
    **{f'settings.{name}': value for name, value in values.items()},
    **{
      f'data.{name}': getattr(SHARD, name)
      for name in ('motion', 'articulation', 'zoom')
    },
    'data.seconds': SECONDS,
    'levels': levels,
    'seed': seed,
  }


def parse_settings(given: list[str]) -> dict[str, Any]:
  """Reads `sample.NAME=VALUE`, each a change to the model's `SamplerConfig`.

  Raises:
    ConfigError: there is no such setting, or the value is of another kind.
  """
  defaults = dataclasses.asdict(SamplerConfig())
  changes = {}
  for text in given:
    key, _, value = text.partition('=')
    name = key.removeprefix(PREFIX)
    if not key.startswith(PREFIX) or name not in defaults:
      raise ConfigError(
        f'--set={text} names no sampling setting; there are: '
        + ', '.join(PREFIX + known for known in defaults)
      )
    try:
      changes[name] = ast.literal_eval(value)
    except (ValueError, SyntaxError) as error:
      raise ConfigError(
        f'--set={text}: {value!r} cannot be read; give a number, True, None or a pair '
        'such as (1.0,2.0)'
      ) from error
    whole = type(defaults[name]) is int
    if whole and type(changes[name]) is not int:
      raise ConfigError(f'--set={text}: {key} must be a whole number')
  return changes


def parse_levels(text: str) -> tuple[int, ...]:
  """Reads intensities such as `2,3`.

  Raises:
    ConfigError: one is unknown.
  """
  known = [str(level) for level in LEVELS]
  levels = text.split(',')
  if not set(levels) <= set(known):
    raise ConfigError(f'--levels={text} must be some of {",".join(known)}')
  return tuple(int(level) for level in levels)


def chosen_rows(only: str | None) -> list[str]:
  """Reads the names of rows; the truth is always among them.

  Raises:
    ConfigError: one is unknown.
  """
  if only is None:
    return [*ROWS]
  names = {name.replace(' ', '_'): name for name in ROWS}
  asked = only.split(',')
  if unknown := [name for name in asked if name not in names]:
    raise ConfigError(
      f'--only={only}: there is no row {unknown[0]}; there are: {", ".join(names)}'
    )
  return [name for key, name in names.items() if key in asked or name == work.TRUTH]


def _people(count: int) -> int:
  if count < 2:
    raise ConfigError(
      f'--people={count} leaves nobody to be mistaken for; give at least 2'
    )
  return count


if __name__ == '__main__':
  cli.run(main, _parser())
