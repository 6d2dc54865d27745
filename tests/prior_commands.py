"""Runs the commands that make emotion priors, and writes what they read."""

import contextlib
import io
import sys
from unittest import mock

import numpy as np
import pytest

from dicetalk_jax import bundle
from dicetalk_jax.media.video import write_video
from tests import tiny

FRAMES = 20  # of the clip


def save_model(folder, embedder=tiny.EMBEDDER):
  """Writes a model folder with all that embedding needs, and two emotions."""
  configs = {'embedder': embedder, 'whisper': tiny.CONFIGS['whisper']}
  tiny.save_components(folder, configs)
  rng = np.random.default_rng(0)
  priors = {name: (5 + rng.normal(size=6), np.ones(6)) for name in tiny.EMOTIONS}
  bundle.save_priors(folder, priors)
  return folder


def write_clip(folder):
  """Writes the speech, the expressions and the video of one clip.

  The expressions are a frame longer, and the video shows no face.
  """
  tiny.write_speech(folder / 'speech.wav')
  black = np.zeros((FRAMES, 16, 16, 3), np.uint8)
  write_video(folder / 'clip.mp4', black, 25, tiny.speech())
  expression = np.random.default_rng(3).normal(size=(FRAMES + 1, 64))
  np.save(folder / 'expression.npy', expression)
  return folder


def output_of(module, **flags) -> str:
  """Runs a command and returns what it prints."""
  with contextlib.redirect_stdout(io.StringIO()) as printed:
    _run(module, flags)
  return printed.getvalue()


def assert_refused(sentence, module, **flags) -> None:
  """A command explains in one line what is wrong, and exits with code 2."""
  code, message = _failure(module, flags)
  assert code == 2
  assert message.startswith('error: ')
  assert message.count('\n') == 1
  assert sentence in message


def assert_help_without_arguments(module) -> None:
  code, message = _failure(module, {})
  assert code == 2
  assert f'usage: python -m {module.__name__}' in message
  assert '--model' in message
  assert '(default: ' in message


def _failure(module, flags):
  """Exit code and message of a command that fails."""
  with (
    contextlib.redirect_stderr(io.StringIO()) as printed,
    pytest.raises(SystemExit) as stop,
  ):
    _run(module, flags)
  return stop.value.code, printed.getvalue()


def _run(module, flags):
  argv = [module.__name__]
  for name, value in flags.items():
    argv.append(f'--{name}' if value is True else f'--{name}={value}')
  with mock.patch.object(sys, 'argv', argv):
    module.run()
