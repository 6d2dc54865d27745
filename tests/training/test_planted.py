"""Emotion planted in expressions, audio and images is learned: the embedder's
prior, the denoiser, the classifier.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import diffusion, embedder
from dicetalk_jax.metrics import clustering
from dicetalk_jax.models import parameters, registry
from dicetalk_jax.training import contrastive
from dicetalk_jax.training.diffusion_loss import DiffusionLoss
from tests import tiny

PEOPLE, EMOTIONS, CLIPS, N, SIDE = 6, 4, 2, 12, 8
DIRECTION = (
  np.random.default_rng(0).normal(size=(2, EMOTIONS, 8)).astype(np.float32)
)  # of expressions and of sound


@pytest.fixture(scope='module', autouse=True)
def quick_compilation():
  with tiny.quick_compilation():
    yield


def clips(seed):
  """Every emotion of every person: in both modalities emotion, person and noise add up,
  and what is said and how loud, which differs from clip to clip and hides the emotion
  in three of eight dimensions.
  """
  rng = np.random.default_rng(seed)
  person, emotion = (x.ravel() for x in np.mgrid[:PEOPLE, :EMOTIONS, :CLIPS][:2])
  spread = np.array([6] * 3 + [0] * 5)

  def make(direction, count, *shape):
    return np.float32(
      direction[emotion][:, None]
      + rng.normal(size=(PEOPLE, 8))[person][:, None]
      + spread * rng.normal(size=(len(person), 1, 8))
      + 0.5 * rng.normal(size=(len(person), count, 8))
    ).reshape(len(person), count, *shape)

  return (
    person,
    emotion,
    (
      make(DIRECTION[0], N, 8),
      make(DIRECTION[1], 2 * N, 2, 4),
      np.ones((len(person), N), bool),
    ),
  )


def silent_pictures(seed):
  """Seen only: an emotion is the direction of stripes; their colour is that of the
  person and of the light, which differs from clip to clip, as do phase, contrast and
  noise."""
  rng = np.random.default_rng(seed)
  person, emotion, (_, sound, mask) = clips(seed)

  def draw(low, high, *shape):
    return rng.uniform(low, high, (*shape, 1, 1, 1))

  y, x = np.mgrid[:SIDE, :SIDE]
  place = np.array([x, y, x + y, x - y])[emotion][:, None, ..., None] * np.pi / 2
  stripes = draw(30, 60, len(person), 1) * np.sin(
    place + draw(0, 2 * np.pi, len(person), N)
  )
  colour = 20 * rng.normal(size=(PEOPLE, 3))[person] + 20 * rng.normal(
    size=(len(person), 3)
  )
  pictures = (
    128
    + colour[:, None, None, None]
    + stripes
    + 10 * rng.normal(size=(len(person), N, SIDE, SIDE, 3))
  )
  return (
    person,
    emotion,
    (
      np.uint8(np.clip(pictures, 0, 255)),
      np.float32(rng.normal(size=sound.shape)),
      mask,
    ),
  )


@functools.cache
def train_embedder(clips, visual):
  """Trains on some people, and embeds others.

  Returns:
    Clustering strength before and after; the emotion of each of their clips; mean and
    deviation of its prior.
  """
  config = embedder.get_config('tiny').embedder.to_dict() | dict(
    visual=visual,
    crop_size=SIDE,
    crop_channels=(16, 16),
    expr_dim=8,
    whisper_dim=4,
    width=16,
    heads=2,
    mlp_dim=16,
    max_len=N,
  )
  build = registry.builder('embedder', config)
  graphdef, target = parameters.abstract(build)
  params, tx = parameters.numpy_params(target), optax.adam(3e-3)
  person, emotion, _ = clips(0)
  pairs = contrastive.make_pairs(person, emotion, np.arange(len(person)))

  def loss(params, batch, key):
    model = parameters.merge(graphdef, params)
    present = contrastive.modality_dropout(key, *np.ones((2, len(person)), bool))
    return contrastive.info_nce(model.sample(*model(*batch, *present), key), pairs)

  @jax.jit
  def step(params, state, batch, key):
    updates, state = tx.update(jax.grad(loss)(params, batch, key), state)
    return optax.apply_updates(params, updates), state

  @jax.jit
  def priors(params, *batch):
    return parameters.merge(graphdef, params)(*batch, *jnp.ones((2, len(person)), bool))

  person, emotion, unseen = clips(1000)

  def strength(params):
    return clustering.summary(np.asarray(priors(params, *unseen)[0]), person, emotion)[
      'clustering'
    ]

  before, state = strength(params), tx.init(params)
  for i in range(80):
    params, state = step(params, state, clips(i)[2], jax.random.key(i))
  mu, var = map(np.asarray, priors(params, *unseen))
  return (before, strength(params)), emotion, (mu, np.sqrt(var))


@pytest.mark.parametrize(
  ('clips', 'visual'), [(clips, 'expression'), (silent_pictures, 'crops')]
)
def test_embedder_clusters_unseen_people_by_emotion(clips, visual):
  (before, after), *_ = train_embedder(clips, visual)
  assert before < 2 < after


def test_diffusion_loss_and_classification_fall():
  """The real UNet at its smallest learns an emotion that only the prior reveals.

  The mean of an image is its emotion. The prior is that of the trained embedder, from
  expressions and audio of people that it never saw.
  """
  _, planted, gaussians = train_embedder(clips, 'expression')
  config = diffusion.get_config('tiny')
  config.unet.update(tiny.CONFIGS['unet'] | dict(in_channels=4, out_channels=2))
  config.audio_linear.update(tiny.CONFIGS['audio_linear'])
  config.pose_guider.update(tiny.CONFIGS['pose_guider'])
  config.emo_model.update(
    tiny.CONFIGS['emo_model'] | dict(num_classes=22, prior_dim=gaussians[0].shape[-1])
  )
  config.emotion.p_whole_bank = 0.0
  config.loss.update(cls_warmup=0, lambda_cls=0.1)
  builds = {
    name: registry.builder(name, config[name].to_dict())
    for name in ('unet', 'audio_linear', 'pose_guider', 'emo_model')
  }
  abstract = {name: parameters.abstract(build) for name, build in builds.items()}
  loss = DiffusionLoss(
    config, {name: graph for name, (graph, _) in abstract.items()}, scaling_factor=1.0
  )
  params = parameters.numpy_params(
    {
      f'{name}.{k}': x
      for name, (_, target) in abstract.items()
      for k, x in target.items()
    }
  )
  tx, rows, frames, size = optax.adam(5e-3), 16, 2, 4

  def batch(seed):
    rng = np.random.default_rng(seed)
    clip = rng.integers(len(planted), size=rows)
    emotion, (mu, sigma) = planted[clip], (x[clip] for x in gaussians)

    def normal(*shape):
      return np.float32(rng.normal(size=shape))

    level = np.float32(np.linspace(-1.5, 1.5, EMOTIONS))[emotion][
      :, None, None, None, None
    ]
    return {
      'latents': level + 0.1 * normal(rows, frames, size, size, 2),
      'reference': normal(rows, size, size, 2),
      'image_token': normal(rows, 1, 8),
      'audio': normal(rows, frames, 10, 2, 8),
      'mu': mu,
      'sigma': sigma,
      'mask': np.ones((rows, 2 * size, 2 * size), np.float32),
      'emotion_class': np.int32(1 + 3 * emotion),
      'buckets': np.ones((rows, 2), np.float32),
      'drop': np.float32(rng.random(rows)),
    }

  @jax.jit
  def step(params, state, batch, key):
    (_, parts), grads = jax.value_and_grad(loss, has_aux=True)(
      params, batch, key, jnp.int32(0)
    )
    updates, state = tx.update(grads, state)
    return (
      optax.apply_updates(params, updates),
      state,
      {k: parts[k] for k in ('denoise', 'cls', 'vq')},
    )

  state, history = tx.init(params), []
  for i in range(150):
    params, state, parts = step(params, state, batch(i), jax.random.key(i))
    history.append([float(parts[k]) for k in ('denoise', 'cls', 'vq')])
  first, last = np.mean(history[:15], 0), np.mean(history[-15:], 0)
  assert last[0] < 0.6 * first[0] and last[1] < 0.6 * first[1], (first, last)
  data = batch(1000)
  others = data | {
    name: np.roll(data[name], 1, 0) for name in ('mu', 'sigma')
  }  # the prior is what tells
  own, wrong = (
    float(step(params, state, x, jax.random.key(1000))[2]['cls'])
    for x in (data, others)
  )
  assert own < 0.3 * wrong, (own, wrong)
