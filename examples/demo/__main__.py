"""The command: a model folder becomes a folder of videos with a page."""

import json
import pathlib
import sys
import time
from typing import Any

from dicetalk_jax import bundle, cli
from dicetalk_jax.bundle import ModelFolder
from dicetalk_jax.compiled import keep_programs
from dicetalk_jax.errors import InputError, WeightsError
from dicetalk_jax.metrics.clip_scores import ClipScores
from dicetalk_jax.metrics.judges import Judges
from dicetalk_jax.pipeline import Pipeline
from examples.demo import files, page
from examples.demo.clips import Clip, Person, first_people, make_clip
from examples.demo.scores import COMPARED, Gallery, judge, summarise, told
from examples.stages import stage

MODEL = pathlib.Path(__file__).parents[1] / 'demo_model'
MOST_PEOPLE = COMPARED


def main(argv: list[str]) -> None:
  """Generates, judges and shows."""
  flags = parser().parse_args(argv)
  if not 1 <= flags.people <= MOST_PEOPLE:
    raise InputError(
      f'--people={flags.people} cannot be shown; choose 1 to {MOST_PEOPLE}'
    )
  started = time.monotonic()
  seconds: dict[str, float] = {}
  keep_programs()

  with stage('loading the model and the judges', seconds):
    pipe = load(flags.model)
    judges = Judges.load()
    gallery = Gallery.of_unseen(judges)

  with stage('generating', seconds):
    people = first_people(flags.people, pipe.settings.image_size)
    clips = [generate(pipe, i + 1, person) for i, person in enumerate(people)]

  with stage('judging', seconds):
    scores = [[judge(judges, gallery, clip) for clip in said] for said in clips]

  with stage('writing videos', seconds):
    shown = [
      describe(flags.folder, str(i + 1), people[i], clips[i], scores[i])
      for i in range(len(people))
    ]
    files.write_inputs(flags.folder, people[0], clips[0][0])
    files.write_moving_picture(flags.folder / 'demo.webp', clips)

  report = {
    'model': shown_path(flags.model),
    'folder': shown_path(flags.folder),
    'image_size': pipe.settings.image_size,
    'parameters': count_parameters(pipe),
    'emotions': bundle.emotions(pipe.folder),
    'judges': judges.fingerprint,
    'people_compared': COMPARED,
    'seconds': seconds,
    'total_seconds': round(time.monotonic() - started, 1),
    'summary': {
      kind: summarise([by_kind[kind] for said in scores for by_kind in said])
      for kind in page.KINDS
    },
    'people': shown,
  }
  text = json.dumps(report, indent=2) + '\n'
  (flags.folder / 'report.json').write_text(text)
  index = page.write(flags.folder, report)
  print_summary(report, index)


def parser() -> cli.OptionParser:
  """The flags."""
  parser = cli.OptionParser(
    prog='python -m examples.demo',
    description='People whom the model has never seen talk in four emotions, on a page '
    'with the truth beside them and the scores.',
  )
  parser.add_argument(
    '--model',
    default=MODEL,
    type=pathlib.Path,
    metavar='DIR',
    help='model folder, trained on the synthetic data (default: the one in examples)',
  )
  parser.add_argument(
    '--folder',
    default='demo',
    type=pathlib.Path,
    metavar='DIR',
    help='everything is written here',
  )
  parser.add_argument(
    '--people',
    default=4,
    type=int,
    metavar='N',
    help='how many people, each in four emotions',
  )
  return parser


def load(folder: pathlib.Path) -> Pipeline:
  """Reads the model.

  Raises:
    WeightsError: there is none, or it is damaged.
  """
  if not (folder / bundle.INDEX).is_file():
    raise WeightsError(
      f'there is no model in {shown_path(folder)}; train one with make demo-train, or '
      'name one with --model=DIR'
    )
  return Pipeline.load(ModelFolder.open(folder))


def generate(pipe: Pipeline, number: int, person: Person) -> list[Clip]:
  """All clips of a person, with a line for each."""
  clips = []
  for case in person.cases:
    started = time.monotonic()
    clips.append(make_clip(pipe, person, case))
    duration = time.monotonic() - started
    print(f'   person {number}, {case.emotion}: {duration:.1f} s', flush=True)
  return clips


def describe(
  folder: pathlib.Path,
  name: str,
  person: Person,
  clips: list[Clip],
  scores: list[dict[str, ClipScores]],
) -> dict[str, Any]:
  """Writes the files of a person, and says for the report what they are."""
  return {
    'name': f'Person {name}',
    'identity': person.identity,
    'portrait': files.write_person(folder, name, person),
    'sheet': files.write_sheet(folder, name, clips),
    'clips': [
      {
        'emotion': clip.case.emotion,
        'prior': clip.case.prior,
        'sentence': clip.text,
        'files': files.write_clip(folder, f'{name}_{clip.case.emotion}', clip),
        'scores': {kind: told(score) for kind, score in by_kind.items()},
      }
      for clip, by_kind in zip(clips, scores)
    ],
  }


def count_parameters(pipe: Pipeline) -> int:
  """Of all networks together."""
  return sum(
    array.size
    for network in pipe.networks.values()
    for array in network.params.values()
  )


def shown_path(path: pathlib.Path) -> str:
  """As one would type it: relative where it lies below the current folder."""
  path = path.absolute()
  here = pathlib.Path.cwd()
  return str(path.relative_to(here) if path.is_relative_to(here) else path)


def print_summary(report: dict[str, Any], index: pathlib.Path) -> None:
  """Prints the scores, and where the page is."""
  print(f'\n{"":30}{"emotion":>10}{"lip-sync":>10}{"person":>10}')
  for kind, scores in report['summary'].items():
    clips = scores['clips']
    emotions = scores['emotions_right']
    people, counted = scores['identities_right'], scores['identities_counted']
    print(
      f'  {page.KINDS[kind]:28}{f"{emotions}/{clips}":>10}'
      f'{scores["lip_sync"]:>10.2f}{f"{people}/{counted}":>10}'
    )
  print(f'\n{report["total_seconds"]:.0f} seconds in all. Open it in a browser:')
  print(f'  {index.absolute().as_uri()}')


if __name__ == '__main__':
  with cli.console():
    main(sys.argv[1:])
