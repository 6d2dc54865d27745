"""One run of each task, for all tests that read what training leaves."""

import json
import pathlib

import pytest

from tests import shared
from tests.training import micro


@pytest.fixture(scope='session')
def trained(tmp_path_factory) -> pathlib.Path:
  """Work directories of the three tasks, each with the model of the one before; what
  they read is in inputs.json. Not to be changed: tests that write take a copy.
  """
  return shared.made_once(tmp_path_factory, 'trained', train)


def train(folder: pathlib.Path) -> None:
  """The three tasks, one after the other."""
  micro.run('autoencoder', folder / 'autoencoder')
  micro.run('embedder', folder / 'embedder', model=folder / 'autoencoder/model')
  inputs = {
    task: micro.digests(folder / task / 'model') for task in ('autoencoder', 'embedder')
  }
  micro.run('diffusion', folder / 'diffusion', model=folder / 'embedder/model')
  (folder / 'inputs.json').write_text(json.dumps(inputs))
