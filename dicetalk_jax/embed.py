"""The emotion prior of one clip, from its speech, its facial expressions or both (paper
section 3.1).

python -m dicetalk_jax.embed --model=DIR --audio=speech.wav --save=NAME
"""

import argparse
import pathlib
import re

import numpy as np

from dicetalk_jax import bundle, cli, published_priors
from dicetalk_jax.component import Component
from dicetalk_jax.data import face_crops, feature_extraction
from dicetalk_jax.data.clip_record import FPS, SAMPLES_PER_FRAME
from dicetalk_jax.data.expression_files import parse_columns, read_expression, resample
from dicetalk_jax.errors import InputError
from dicetalk_jax.media import audio, video_reader
from dicetalk_jax.media.video import fit_length
from dicetalk_jax.models import registry
from dicetalk_jax.models.embedder import EmbedderConfig

USAGE = """\
usage: python -m dicetalk_jax.embed --model=DIR [--audio=FILE | --video=FILE] [--expression=FILE]
                                    [--save=NAME [--overwrite]] [--output=FILE.npy]
  --model       model folder with embedder and, for speech, whisper
  --audio       speech: wav, flac, mp3, m4a, or a video with sound
  --video       a video: its sound and, if the embedder was trained on crops (visual='crops'), its largest face
  --expression  expression features of the clip as the embedder was trained on: .npy, .npz, .mat, .txt or .csv;
                what the face does, for embedders that read no pictures
  --expression_key, --expression_columns=FIRST:END, --expression_fps
                which array, which columns, and their rate (default 25); see docs/data.md
  --save        name under which the model folder keeps the prior, for generate --emotion=NAME
  --overwrite   replace the emotion that has this name
  --output      file for the prior, as the original program reads it
Prints the prior's size and the emotions of the model folder that are nearest to it.
"""
NEAREST = 3
TOLERANCE = 0.1  # by which the lengths of speech and expressions may differ


def main(argv: list[str]) -> None:
  """Embeds one clip.

  Everything that can be wrong is checked before anything is written.
  """
  flags = _flags(argv)
  known = bundle.require(
    flags.model, 'embedder', *['whisper'] * bool(flags.audio or flags.video)
  )
  if flags.save in bundle.emotions(flags.model) and not flags.overwrite:
    raise InputError(
      f'{flags.model} has {flags.save} already; choose another name, or add '
      '--overwrite to replace it'
    )
  config = registry.config_of('embedder', known['embedder']['config'])
  looks = flags.video and not flags.expression and config.visual == 'crops'
  seen, wave = of_use((look if looks else load)(flags, config), config, flags.model)
  frames = common_frames(
    None if seen is None else len(seen),
    None if wave is None else audio.audio_len(len(wave)),
  )

  embedder = Component.load(flags.model, 'embedder')
  if flags.save:
    bundle.check_replaceable(flags.model, [flags.save], embedder.fingerprint)
  states = np.zeros((0, config.whisper_states, config.whisper_dim), np.float32)
  if wave is not None:
    states = feature_extraction.speech_states(
      Component.load(flags.model, 'whisper'), wave, frames
    )
  parts = ' and '.join(
    [
      *['expressions' if config.visual == 'expression' else 'pictures']
      * (seen is not None),
      *['speech'] * (wave is not None),
    ]
  )
  seen = (
    np.zeros((0, *config.visual_shape), np.float32) if seen is None else seen[:frames]
  )
  mu, sigma = feature_extraction.gaussian(embedder, seen, states)
  print(
    f'prior of {frames / 25:.1f} s of {parts}: mean of norm {np.linalg.norm(mu):.2f}, '
    f'deviation {sigma.mean():.3f} on average'
  )
  if near := nearest(mu, bundle.load_priors(flags.model, embedder.fingerprint)):
    print(
      'nearest emotions: '
      + ', '.join(f'{name} {cosine:+.2f}' for name, cosine in near[:NEAREST])
    )
  if flags.output:
    published_priors.write(flags.output, (mu, sigma), embedder.fingerprint)
    print(f'wrote {flags.output}')
  if flags.save:
    bundle.save_priors(flags.model, {flags.save: (mu, sigma)}, embedder.fingerprint)
    if bundle.readable(embedder.fingerprint, bundle.learned_priors(flags.model)):
      print(
        f'saved in {flags.model}; use it with python -m dicetalk_jax.generate '
        f'--emotion={flags.save}'
      )
    else:
      print(
        f'saved in {flags.model}, whose emotion model learned on priors of another '
        'embedder: train the diffusion model with this one before you generate'
      )


Modalities = tuple[
  np.ndarray | None, np.ndarray | None
]  # seen and heard; None where it is not given


def load(flags: argparse.Namespace, config: EmbedderConfig) -> Modalities:
  """Expressions `[N,expr_dim]` at 25 frames per second, and the sound of a recording or
  video at 16 kHz.

  Raises:
    DataError, InputError: a file cannot be read, or the embedder has no use for it.
  """
  if flags.expression and config.visual == 'crops':
    raise InputError(
      f'the embedder of {flags.model} was trained on face crops and reads no '
      'expression coefficients; leave out --expression, and give a --video'
    )
  if flags.video and not flags.expression and config.modalities != 'video':
    print(
      f'only the sound of {flags.video} is used: the embedder reads expression '
      'coefficients, not pictures; give them with --expression'
    )
  sound = flags.audio or flags.video
  return (
    load_expression(flags, config.expr_dim) if flags.expression else None,
    audio.load_audio(sound) if sound else None,
  )


def look(flags: argparse.Namespace, config: EmbedderConfig) -> Modalities:
  """The face that a video shows longest, uint8 `[N,S,S,3]` at 25 frames per second, and
  what is heard meanwhile.

  Raises:
    InputError: the video cannot be read, shows no face, or is silent.
  """
  seen, first = face_crops.of_video(flags.video, config.crop_size)
  print(
    f'the face is seen from {first / FPS:.2f} s to {(first + len(seen)) / FPS:.2f} s '
    f'of {flags.video}'
  )
  if (delay := video_reader.probe(flags.video).sound_delay) is None:
    return seen, None
  wave = audio.begin_at(audio.load_audio(flags.video), first / FPS - delay)
  return seen, fit_length(wave, len(seen) * SAMPLES_PER_FRAME)


def of_use(
  given: Modalities, config: EmbedderConfig, model: pathlib.Path
) -> Modalities:
  """What is given, without what the embedder was trained never to notice: the prior
  does not depend on that.

  Raises:
    InputError: nothing is left.
  """
  seen, heard = given
  if config.modalities == 'video':
    heard = None
    if seen is None:
      what, flag = (
        ('expressions', '--expression')
        if config.visual == 'expression'
        else ('pictures', 'a --video')
      )
      raise InputError(
        f'the embedder of {model} was trained on {what} alone and hears nothing; give '
        f'{flag}'
      )
  if config.modalities == 'audio':
    seen = None
    if heard is None:
      raise InputError(
        f'the embedder of {model} was trained on speech alone and sees nothing; give '
        '--audio or --video'
      )
  return seen, heard


def load_expression(flags: argparse.Namespace, width: int) -> np.ndarray:
  """Expression features that the flags name, float32 `[N,width]` at 25 frames per
  second.

  Raises:
    DataError: see `dicetalk_jax.data.expression_files`.
    InputError: they have another width.
  """
  rows = read_expression(
    flags.expression, flags.expression_key, flags.expression_columns
  )
  if rows.shape[1] != width:
    raise InputError(
      f'{flags.expression} has {rows.shape[1]} columns, the embedder wants the {width} '
      'that it was trained on; choose them with --expression_columns=FIRST:END'
    )
  return resample(rows, flags.expression_fps)


def common_frames(expression: int | None, speech: int | None) -> int:
  """Frames at 25 per second that both modalities have; None for one that is not given.

  Raises:
    InputError: none, or the two are so different that they belong to different clips or
      rates.
  """
  lengths = [n for n in (expression, speech) if n is not None]
  if max(lengths) - min(lengths) > max(2, TOLERANCE * max(lengths)):
    raise InputError(
      f'the expressions last {expression / 25:.2f} s at their rate, the sound '
      f'{speech / 25:.2f} s; give both of the same clip, and --expression_fps'
    )
  if not min(lengths):
    raise InputError('the recording is shorter than a frame, 0.04 s; give a longer one')
  return min(lengths)


def nearest(mu: np.ndarray, priors: dict[str, bundle.Prior]) -> list[tuple[str, float]]:
  """Emotions by cosine, best first, once what all priors share is removed: it is most
  of each of them.

  Args:
    mu: `[D]`.
    priors: of the model folder; those of another width are left out, and fewer than two
      tell nothing.
  """
  means = {name: mean for name, (mean, _) in priors.items() if mean.shape == mu.shape}
  if len(means) < 2:
    return []
  shared = np.mean(list(means.values()), axis=0)

  def unit(x):
    return (x - shared) / max(float(np.linalg.norm(x - shared)), 1e-12)

  return sorted(
    ((name, float(unit(mu) @ unit(mean))) for name, mean in means.items()),
    key=lambda pair: -pair[1],
  )


def _flags(argv: list[str]) -> argparse.Namespace:
  parser = cli.Parser('dicetalk_jax.embed', USAGE)
  parser.add_argument('--model', required=True)
  for name in ('audio', 'video', 'expression', 'output'):
    parser.add_argument(f'--{name}', type=pathlib.Path)
  parser.add_argument('--expression_key', default='')
  parser.add_argument('--expression_columns', type=parse_columns)
  parser.add_argument('--expression_fps', type=float, default=25.0)
  parser.add_argument('--save')
  parser.add_argument('--overwrite', action='store_true')
  flags = parser.parse_args(argv)
  if flags.audio and flags.video:
    parser.error('--audio and --video are both sound; give one')
  if not (flags.audio or flags.video or flags.expression):
    parser.error('there is nothing to embed; give --audio, --video or --expression')
  if not flags.expression_fps > 0:
    parser.error(
      f'--expression_fps={flags.expression_fps:g} is no rate; give frames per second'
    )
  if flags.save is not None and not re.fullmatch(r'[A-Za-z0-9][\w-]*', flags.save):
    parser.error(f'--save={flags.save!r} is no name; use letters, digits, - and _')
  if flags.output and flags.output.suffix != '.npy':
    parser.error(
      f'{flags.output}: priors are written as .npy files; end the name in .npy'
    )
  return flags


def run() -> None:
  """Console entry."""
  cli.run(main, USAGE)


if __name__ == '__main__':
  run()
