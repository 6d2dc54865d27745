"""The command of the demo, with a model of random parameters."""

import json

import pytest

from dicetalk_jax.errors import InputError, WeightsError
from examples.demo import __main__ as demo
from examples.demo.clips import EMOTIONS, first_people
from examples.demo_data import cases
from tests import tiny


def test_without_a_model_one_sentence_says_how_to_get_one(tmp_path):
  with pytest.raises(WeightsError, match='there is no model in .*make demo-train'):
    demo.main([f'--model={tmp_path / "nothing"}', f'--folder={tmp_path / "demo"}'])
  assert not (tmp_path / 'demo').exists()


@pytest.mark.parametrize('people', [0, 25])
def test_a_number_of_people_that_cannot_be_shown_is_refused(people):
  with pytest.raises(InputError, match='choose 1 to 24'):
    demo.main([f'--people={people}'])


def test_the_people_are_the_first_of_those_that_the_model_is_tested_on():
  people = first_people(2, size=16)
  tested = list(cases(24))
  assert [person.identity for person in people] == [
    case.identity for case in tested[:16:8]
  ]
  for person in people:
    assert [case.emotion for case in person.cases] == [*EMOTIONS]
    assert set(person.cases) <= set(tested)
    assert person.portrait.shape == (64, 64, 3)


def test_a_model_becomes_a_folder_with_a_page(tmp_path, capsys):
  priors = [f'{emotion}_3' for emotion in EMOTIONS]
  tiny.save_model(tmp_path / 'model', emotions=priors)
  folder = tmp_path / 'demo'
  demo.main([f'--model={tmp_path / "model"}', f'--folder={folder}', '--people=1'])

  report = json.loads((folder / 'report.json').read_text())
  assert report['emotions'] == sorted(priors)
  [person] = report['people']
  assert [clip['prior'] for clip in person['clips']] == priors
  for kind in ('generated', 'truth', 'autoencoded'):
    assert report['summary'][kind]['clips'] == 4
  # Noise moves no lips, and is nobody.
  summary = report['summary']
  assert summary['truth']['lip_sync'] > summary['generated']['lip_sync'] + 0.5
  assert summary['generated']['identities_right'] == 0

  names = {path.relative_to(folder).as_posix() for path in folder.rglob('*.*')}
  assert names >= {
    'index.html',
    'demo.webp',
    'portrait.png',
    'speech.wav',
    'sheets/1.jpg',
    'videos/1_happy_generated.mp4',
    'videos/1_happy_truth.mp4',
  }
  assert not [name for name in names if name.endswith('.part')]
  printed = capsys.readouterr().out
  assert (folder / 'index.html').as_uri() in printed
  assert '== generating: ' in printed
