"""Trains the judges of rendered faces: `python -m examples.judges.train`.

It renders people whom no other data set shows, trains both networks, prints what they
achieve on further people, and writes the weights. The same flags give the same judges.
"""

from collections.abc import Callable
import functools
import json
import os
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy

from dicetalk_jax import cli
from dicetalk_jax.data.clip_record import EMOTIONS
from dicetalk_jax.files import atomic_file
from dicetalk_jax.metrics import judges
from dicetalk_jax.metrics.judges import Judges
from examples.judges import held_out, rendered_faces
from examples.judges.rendered_faces import Faces

SIZES = {
  'expression': (512, 128, len(EMOTIONS) + len(judges.MEASURES)),
  'identity': (384, 128, judges.IDENTITY),
}
BATCH = 512
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.02
DROPPED = {'input': 0.2, 'first': 0.4, 'second': 0.2}
SMOOTHING = 0.05  # of the emotions
MEASURE_WEIGHT = 2.0  # of the squared errors, in variances, beside the emotions
# Additive-margin softmax.
MARGIN = 0.2
COSINE_SCALE = 16.0

Params = dict[str, jax.Array]


def main() -> None:
  """Renders, trains, tests and writes."""
  parser = cli.OptionParser(
    prog='python -m examples.judges.train',
    description='Trains the judges of rendered faces and prints held-out scores.',
  )
  parser.add_argument(
    '--output',
    default=judges.WEIGHTS,
    type=pathlib.Path,
    metavar='FILE',
    help='where the weights go',
  )
  parser.add_argument('--people', default=96, type=int, help='to learn from')
  parser.add_argument('--tested', default=24, type=int, help='people to test on')
  parser.add_argument('--epochs', default=8, type=int, help='of each network')
  parser.add_argument('--seed', default=0, type=int, help='of weights and order')
  parser.add_argument(
    '--workers', default=os.cpu_count(), type=int, help='processes that render'
  )
  flags = parser.parse_args()

  started = time.monotonic()
  faces = rendered_faces.learned(flags.people, flags.workers)
  print(f'{len(faces.clip)} faces: {time.monotonic() - started:.0f} s', flush=True)
  params: dict[str, np.ndarray] = {}
  for name, loss in LOSSES.items():
    params |= train(name, faces, loss, flags.epochs, flags.seed)
  stored = {name: np.asarray(x, np.float16) for name, x in params.items()}
  print(f'trained: {time.monotonic() - started:.0f} s', flush=True)

  unseen = rendered_faces.tested(flags.tested, flags.workers)
  scores = held_out.held_out(Judges(stored), unseen)
  print(json.dumps(scores, indent=2))
  settings = {
    name: getattr(flags, name) for name in ('people', 'tested', 'epochs', 'seed')
  }
  metadata = {
    'fingerprint': judges.fingerprint(stored),
    'settings': json.dumps(settings),
    'held_out': json.dumps(scores),
  }
  with atomic_file(flags.output) as part:
    safetensors.numpy.save_file(stored, part, metadata)
  print(f'{flags.output}: {metadata["fingerprint"]}')
  print(f'{(time.monotonic() - started) / 60:.1f} minutes')


def train(
  name: str, faces: Faces, loss: Callable, epochs: int, seed: int
) -> dict[str, np.ndarray]:
  """Trains one network on standardised features, and folds the standardisation in.

  Args:
    name: of the network, and of its features in `faces`.
    faces: what it learns from.
    loss: of (params, features, labels of the batch, key).
    epochs: how often each face is seen.
    seed: of weights, order and dropout.

  Returns:
    Kernels and biases for plain features.
  """
  features = getattr(faces, name)
  center = features.mean(0, dtype=np.float64).astype(np.float32)
  scale = features.std(0, dtype=np.float64).astype(np.float32) + 0.02
  targets = faces.measures.mean(0), faces.measures.std(0)
  labels = {
    'emotion': faces.emotion,
    'measures': (faces.measures - targets[0]) / targets[1],
    'person': faces.person - faces.person.min(),
  }

  # 1. Train.
  key = jax.random.key(seed)
  people = int(labels['person'].max()) + 1
  params = initial(name, features.shape[1], people, key)
  steps = epochs * (len(features) // BATCH)
  schedule = optax.warmup_cosine_decay_schedule(0, LEARNING_RATE, steps // 20, steps)
  optimizer = optax.adamw(schedule, weight_decay=WEIGHT_DECAY)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, state, x, batch, number):
    x = (x.astype(jnp.float32) - center) / scale
    noise = jax.random.fold_in(key, number)
    value, grads = jax.value_and_grad(loss)(params, x, batch, noise)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value

  state = optimizer.init(params)
  rng = np.random.default_rng(seed)
  number = 0
  for epoch in range(epochs):
    order = rng.permutation(len(features))
    values = []
    for rows in np.split(order[: len(order) // BATCH * BATCH], len(order) // BATCH):
      batch = {label: x[rows] for label, x in labels.items()}
      params, state, value = step(params, state, features[rows], batch, number)
      values.append(value)
      number += 1
    mean = float(jnp.stack(values).mean())
    print(f'{name}: epoch {epoch + 1}, loss {mean:.3f}', flush=True)

  # 2. Fold the standardisation of features into the first layer, and that of the
  # measures into the last.
  folded = {
    label: np.asarray(x, np.float64) for label, x in params.items() if '.' in label
  }
  folded[f'{name}.first.kernel'] /= scale[:, None]
  folded[f'{name}.first.bias'] -= center @ folded[f'{name}.first.kernel']
  if name == 'expression':
    folded[f'{name}.last.kernel'][:, len(EMOTIONS) :] *= targets[1]
    bias = folded[f'{name}.last.bias'][len(EMOTIONS) :]
    bias[:] = bias * targets[1] + targets[0]
  return folded


def initial(name: str, features: int, people: int, key: jax.Array) -> Params:
  """Random kernels, biases of zero, and a random direction of each person."""
  params = {}
  rows = features
  for layer, columns in zip(judges.LAYERS, SIZES[name]):
    key, own = jax.random.split(key)
    kernel = jax.random.normal(own, (rows, columns)) / np.sqrt(rows)
    params[f'{name}.{layer}.kernel'] = kernel
    params[f'{name}.{layer}.bias'] = jnp.zeros(columns)
    rows = columns
  if name == 'identity':
    params['people'] = jax.random.normal(key, (people, rows))
  return params


def dropped(x: jax.Array, layer: str, key: jax.Array) -> jax.Array:
  """Dropout, with the rate of the layer."""
  rate = DROPPED[layer]
  own = jax.random.fold_in(key, list(DROPPED).index(layer))
  return jnp.where(jax.random.bernoulli(own, 1 - rate, x.shape), x / (1 - rate), 0)


def expression_loss(params: Params, x: jax.Array, batch: dict, key: jax.Array):
  """Cross-entropy of emotions and squared errors of measures."""
  drop = functools.partial(dropped, key=key)
  _, scores = judges.network(params, 'expression', drop(x, 'input'), drop)
  one_hot = jax.nn.one_hot(batch['emotion'], len(EMOTIONS))
  smooth = optax.smooth_labels(one_hot, SMOOTHING)
  emotion = optax.softmax_cross_entropy(scores[:, : len(EMOTIONS)], smooth).mean()
  errors = scores[:, len(EMOTIONS) :] - batch['measures']
  return emotion + MEASURE_WEIGHT * (errors**2).mean()


def identity_loss(params: Params, x: jax.Array, batch: dict, key: jax.Array):
  """Additive-margin softmax (Wang et al., 2018) over the people."""
  drop = functools.partial(dropped, key=key)
  _, direction = judges.network(params, 'identity', drop(x, 'input'), drop)
  cosines = judges.unit(direction) @ judges.unit(params['people']).T
  one_hot = jax.nn.one_hot(batch['person'], cosines.shape[1])
  scores = COSINE_SCALE * (cosines - MARGIN * one_hot)
  return optax.softmax_cross_entropy(scores, one_hot).mean()


LOSSES = {'expression': expression_loss, 'identity': identity_loss}

if __name__ == '__main__':
  with cli.console():
    main()
