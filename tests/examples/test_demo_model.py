"""The model that comes with the checkout."""

import json
import pathlib

import numpy as np
import pytest

from dicetalk_jax import bundle
from dicetalk_jax.data.clip_record import EMOTIONS, LEVELS
from dicetalk_jax.metrics.clip_scores import score_clip
from dicetalk_jax.metrics.judges import Judges
from dicetalk_jax.pipeline import Pipeline
from examples import demo_data
from examples.train_demo_model import settings

MODEL = pathlib.Path(__file__).parents[2] / 'examples/demo_model'
MEGABYTE = 10**6
# Settings that are younger than the model, as it was trained.
LATER = {'diffusion': {'fused_kernels': False}}


def test_the_model_is_small_enough_for_a_repository():
  sizes = [path.stat().st_size for path in MODEL.rglob('*') if path.is_file()]
  assert sum(sizes) <= 25 * MEGABYTE
  assert max(sizes) <= 16 * MEGABYTE


def test_the_model_is_what_the_settings_describe():
  components = bundle.components(MODEL)
  for name, get_config in settings.CONFIGS.items():
    config = json.loads(json.dumps(get_config().to_dict()))
    recorded = json.loads((MODEL / 'training' / name / 'config.json').read_text())
    for key in ('model', 'data'):  # folders
      del config[key], recorded[key]
    assert recorded | LATER.get(name, {}) == config, name
  widths = settings.diffusion_config().unet.block_out_channels
  assert components['unet']['config']['block_out_channels'] == list(widths)


def test_the_model_has_every_emotion_at_every_level():
  known = set(bundle.emotions(MODEL))
  assert set(EMOTIONS) <= known
  for emotion in set(EMOTIONS) - {'neutral'}:
    assert {f'{emotion}_{level}' for level in LEVELS} <= known


def test_the_records_of_training_name_no_place_outside_the_repository():
  for path in MODEL.rglob('*.json'):
    assert '"/' not in path.read_text(), path


def test_the_scores_are_those_of_this_model_and_these_judges():
  scores = json.loads((MODEL / 'scores.json').read_text())
  components = bundle.components(MODEL)
  made_with = scores['made_with']
  assert made_with['judges'] == Judges.load().fingerprint
  for name in ('unet', 'vae', 'whisper'):
    assert components[name]['fingerprint'] in json.dumps(made_with), name


@pytest.mark.slow
def test_an_unseen_person_speaks_with_the_emotion_that_was_asked_for():
  case = next(case for case in demo_data.cases(1) if case.emotion == 'surprised')
  truth = case.truth()
  portrait, box = case.portrait()
  left, top, right, bottom = box * len(portrait)
  pipe = Pipeline.load(MODEL)
  frames, fps = pipe.generate(
    portrait,
    truth.audio,
    case.prior,
    face_box=(left, top, right - left, bottom - top),
    seed=1,
    interpolate=False,
  )

  judges = Judges.load()
  reading = judges.read(frames, truth.bbox)
  people = [judges.read(portrait[None], box).embedding]
  for other in list(demo_data.cases(8))[8::8]:
    image, outline = other.portrait()
    people.append(judges.read(image[None], outline).embedding)
  scores = score_clip(
    reading,
    asked=case.emotion,
    opening=truth.opening[::2][: len(frames)],
    fps=fps,
    gallery=np.stack(people),
    person=0,
  )
  assert scores.emotion_right
  assert scores.in_sync
  assert scores.sync.correlation > 0.8
  assert scores.identity_right
