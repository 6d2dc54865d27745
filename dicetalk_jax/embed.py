"""Makes an emotion prior of one clip.

    python -m dicetalk_jax.embed --model=DIR --audio=speech.wav --save=NAME

A prior is made from the clip's speech, its facial expressions or both (paper section
3.1).
"""

import argparse
import pathlib
import re
from typing import NamedTuple

import numpy as np

from dicetalk_jax import bundle, cli, published_priors
from dicetalk_jax.bundle import ModelFolder
from dicetalk_jax.compiled import keep_programs
from dicetalk_jax.component import Component
from dicetalk_jax.data import face_crops, feature_extraction
from dicetalk_jax.data.clip_record import FPS, SAMPLES_PER_FRAME
from dicetalk_jax.data.expression_files import parse_columns, read_expression, resample
from dicetalk_jax.errors import InputError
from dicetalk_jax.media import audio, video_reader
from dicetalk_jax.media.video import fit_length
from dicetalk_jax.models.embedder import EmbedderConfig

NEAREST = 3  # emotions that are printed
TOLERANCE = 0.1  # by which the lengths of speech and expressions may differ


class Clip(NamedTuple):
  """The parts of a clip that an embedder may read; None for those not given.

  Attributes:
    seen: expression coefficients `[N, expr_dim]`, or face crops uint8 `[N, S, S, 3]`,
      at 25 frames per second.
    wave: float32 `[samples]`, 16 kHz mono.
  """

  seen: np.ndarray | None
  wave: np.ndarray | None


def _parser() -> argparse.ArgumentParser:
  parser = cli.OptionParser(
    prog='python -m dicetalk_jax.embed',
    description="Makes an emotion prior of one clip. Prints the prior's size, and the "
    'emotions of the model folder that are nearest to it.',
  )
  add = parser.add_argument
  add(
    '--model',
    required=True,
    metavar='DIR',
    help='model folder with embedder and, for speech, whisper',
  )
  add(
    '--audio',
    type=pathlib.Path,
    metavar='FILE',
    help='speech: wav, flac, mp3, m4a, or a video with audio',
  )
  add(
    '--video',
    type=pathlib.Path,
    metavar='FILE',
    help='a video: its audio and, if the embedder was trained on crops '
    "(visual='crops'), its largest face",
  )
  add(
    '--expression',
    type=pathlib.Path,
    metavar='FILE',
    help='what the face does, for embedders that read no images: expression '
    'coefficients as in training; .npy, .npz, .mat, .txt or .csv, see docs/data.md',
  )
  add(
    '--expression_key',
    default='',
    metavar='NAME',
    help='array in the file (default: one with a usual name, or the only one)',
  )
  add(
    '--expression_columns',
    type=_columns,
    metavar='FIRST:END',
    help='columns of the array (default: all)',
  )
  add(
    '--expression_fps',
    type=float,
    default=25.0,
    metavar='RATE',
    help='frames per second in the file',
  )
  add(
    '--save',
    metavar='NAME',
    help='keep the prior in the model folder, for generate --emotion=NAME',
  )
  add('--overwrite', action='store_true', help='replace the emotion of this name')
  add(
    '--output',
    type=pathlib.Path,
    metavar='FILE.npy',
    help='write the prior as the reference implementation reads it',
  )
  return parser


def _columns(text: str) -> tuple[int, int]:
  try:
    return parse_columns(text)
  except ValueError:
    raise argparse.ArgumentTypeError(
      f'{text!r} is not understood; write FIRST:END'
    ) from None


def _flags(argv: list[str]) -> argparse.Namespace:
  """Raises ConfigError for flags that do not go together or have no meaning."""
  parser = _parser()
  flags = parser.parse_args(argv)
  if flags.audio and flags.video:
    parser.error('give --audio or --video, not both')
  if not (flags.audio or flags.video or flags.expression):
    parser.error('there is nothing to embed; give --audio, --video or --expression')
  if not flags.expression_fps > 0:
    parser.error(f'--expression_fps must be positive, got {flags.expression_fps:g}')
  if flags.save is not None and not re.fullmatch(r'[A-Za-z0-9][\w-]*', flags.save):
    parser.error(
      f'--save={flags.save!r} is not a valid name; use letters, digits, - and _'
    )
  if flags.output and flags.output.suffix != '.npy':
    parser.error(
      f'{flags.output}: priors are written as .npy files; end the name in .npy'
    )
  return flags


def main(argv: list[str]) -> None:
  """Embeds one clip."""
  flags = _flags(argv)
  keep_programs()

  # 1. Check everything that can be wrong, before anything is written.
  model = ModelFolder.open(flags.model)
  model.require('embedder')
  if flags.audio or flags.video:
    model.require('whisper')
  if flags.save in bundle.emotions(model) and not flags.overwrite:
    raise InputError(
      f'{model} has {flags.save} already; choose another name, or add --overwrite to '
      'replace it'
    )
  config = EmbedderConfig.from_json(model.components['embedder']['config'])
  if flags.video and not flags.expression and config.visual == 'crops':
    clip = read_face(flags.video, config.crop_size)
  else:
    clip = read_files(flags, config)
  clip = keep_usable(clip, config, model)
  frames = common_frames(clip)
  embedder = Component.load(model, 'embedder')
  if flags.save:
    bundle.check_replaceable(model, [flags.save], embedder.fingerprint)

  # 2. Embed the clip.
  parts = []
  kind = np.uint8 if config.visual == 'crops' else np.float32
  seen = np.zeros((0, *config.visual_shape), kind)
  if clip.seen is not None:
    seen = clip.seen[:frames]
    parts.append('expressions' if config.visual == 'expression' else 'images')
  states = np.zeros((0, config.whisper_states, config.whisper_dim), np.float32)
  if clip.wave is not None:
    whisper = Component.load_frozen(model, 'whisper')
    states = feature_extraction.speech_states(whisper, clip.wave, frames)
    parts.append('speech')
  mu, sigma = feature_extraction.gaussian(embedder, seen, states)

  # 3. Describe it.
  print(
    f'prior of {frames / FPS:.1f} s of {" and ".join(parts)}: mean of norm '
    f'{np.linalg.norm(mu):.2f}, deviation {sigma.mean():.3f} on average'
  )
  near = nearest(mu, bundle.load_priors(model, embedder.fingerprint))[:NEAREST]
  if near:
    cosines = [f'{name} {cosine:+.2f}' for name, cosine in near]
    print(f'nearest emotions: {", ".join(cosines)}')

  # 4. Write it.
  if flags.output:
    published_priors.write(flags.output, (mu, sigma), embedder.fingerprint)
    print(f'wrote {flags.output}')
  if flags.save:
    bundle.save_priors(model, {flags.save: (mu, sigma)}, embedder.fingerprint)
    if bundle.readable(embedder.fingerprint, bundle.learned_priors(model)):
      print(
        f'saved in {model}; use it with python -m dicetalk_jax.generate '
        f'--emotion={flags.save}'
      )
    else:
      print(
        f'saved in {model}, whose emotion model learned on priors of another '
        'embedder: train the diffusion model with this one before you generate'
      )


def read_files(flags: argparse.Namespace, config: EmbedderConfig) -> Clip:
  """Expressions, and the audio of a recording or video.

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
      f'only the audio of {flags.video} is used: the embedder reads expression '
      'coefficients, not images; give them with --expression'
    )
  seen = wave = None
  if flags.expression:
    seen = read_expressions(flags, config.expr_dim)
  if flags.audio or flags.video:
    wave = audio.load_audio(flags.audio or flags.video)
  return Clip(seen, wave)


def read_expressions(flags: argparse.Namespace, width: int) -> np.ndarray:
  """The expression coefficients that the flags name, float32 `[N, width]`.

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


def read_face(video: pathlib.Path, crop_size: int) -> Clip:
  """The face that a video shows longest, and the audio of that time.

  Raises:
    InputError: the video cannot be read, shows no face, or is silent.
  """
  seen, first = face_crops.of_video(video, crop_size)
  start, end = first / FPS, (first + len(seen)) / FPS
  print(f'the face is seen from {start:.2f} s to {end:.2f} s of {video}')
  delay = video_reader.probe(video).sound_delay
  if delay is None:
    return Clip(seen, None)
  wave = audio.begin_at(audio.load_audio(video), start - delay)
  return Clip(seen, fit_length(wave, len(seen) * SAMPLES_PER_FRAME))


def keep_usable(clip: Clip, config: EmbedderConfig, model: ModelFolder) -> Clip:
  """Drops the modality that this embedder was trained to ignore.

  Raises:
    InputError: nothing is left.
  """
  if config.modalities == 'video':
    if clip.seen is None:
      if config.visual == 'expression':
        what, flag = 'expressions', '--expression'
      else:
        what, flag = 'images', 'a --video'
      raise InputError(
        f'the embedder of {model} was trained on {what} alone and reads no audio; give '
        f'{flag}'
      )
    return Clip(clip.seen, None)
  if config.modalities == 'audio':
    if clip.wave is None:
      raise InputError(
        f'the embedder of {model} was trained on speech alone and reads nothing else; '
        'give --audio or --video'
      )
    return Clip(None, clip.wave)
  return clip


def common_frames(clip: Clip) -> int:
  """Frames at 25 per second that all given modalities have.

  Raises:
    InputError: none, or the two are so different that they belong to different clips or
      rates.
  """
  lengths = []
  if clip.seen is not None:
    lengths.append(len(clip.seen))
  if clip.wave is not None:
    lengths.append(audio.audio_len(len(clip.wave)))
  shortest, longest = min(lengths), max(lengths)
  if longest - shortest > max(2, TOLERANCE * longest):
    seen, heard = lengths
    raise InputError(
      f'the expressions last {seen / FPS:.2f} s at their rate, the audio '
      f'{heard / FPS:.2f} s; give both of the same clip, and --expression_fps'
    )
  if not shortest:
    raise InputError('the recording is shorter than a frame, 0.04 s; give a longer one')
  return shortest


def nearest(mu: np.ndarray, priors: dict[str, bundle.Prior]) -> list[tuple[str, float]]:
  """Emotions by cosine, best first.

  What all priors share is most of each of them, and is taken away first.

  Args:
    mu: `[D]`.
    priors: of the model folder; those of another width are left out. Of fewer than two
      nothing can be said.
  """
  means = {name: mean for name, (mean, _) in priors.items() if mean.shape == mu.shape}
  if len(means) < 2:
    return []
  shared = np.mean(list(means.values()), axis=0)
  cosines = [
    (name, _cosine(mu - shared, mean - shared)) for name, mean in means.items()
  ]
  return sorted(cosines, key=lambda pair: -pair[1])


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
  norms = max(float(np.linalg.norm(a)), 1e-12) * max(float(np.linalg.norm(b)), 1e-12)
  return float(a @ b) / norms


def run() -> None:
  """Console entry."""
  cli.run(main, _parser())


if __name__ == '__main__':
  run()
