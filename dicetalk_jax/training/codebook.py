"""The codes of the emotion bank: their initial values, statistics of their use, and
updates that do not come from gradients.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.cluster.vq import kmeans2

from dicetalk_jax import parallel
from dicetalk_jax.data import mixture
from dicetalk_jax.data.clip_record import CLASSES, EMOTIONS
from dicetalk_jax.data.mixture import DatasetPart
from dicetalk_jax.errors import ConfigError
from dicetalk_jax.models.parameters import Params
from dicetalk_jax.training.optimizer import clear_moments
from dicetalk_jax.training.state import TrainState

DRAWS = 2048
CODES = 'emo_model.codebook.codebook.embedding'
# A code is rare if it is used less than this share of what equal use would give it.
RARE = 0.1


def fit_codes(params: Params, parts: Sequence[DatasetPart], seed: int) -> Params:
  """Puts the codes where the priors are: k-means on projected draws.

  From a uniform initial table nearly all priors share one code, or the commitment term
  shrinks the projection.

  Args:
    params: flat parameters of an emotion model with a bank.
    parts: data sets with the feature 'prior', mean and standard deviation `[1,2,d_s]`
      of each clip; drawn by weight.
    seed: of the draws and of k-means.

  Returns:
    The same parameters with another `codebook`.
  """
  rng = np.random.default_rng(seed)

  # 1. Draw clips, and a prior from the Gaussian of each
  weights = mixture.weights(parts)
  gaussians = []
  for part, weight in zip(parts, weights):
    priors = part.features['prior']
    count = round(DRAWS * (weight / sum(weights)))
    known = np.flatnonzero(priors.lengths >= 0)
    clips = rng.choice(known[~np.isin(known, list(part.left_out))], count)
    gaussians += [priors(int(clip))[0] for clip in clips]
  mu, sigma = np.stack(gaussians, axis=1).astype(np.float32)
  draws = mu + sigma * rng.standard_normal(mu.shape, np.float32)

  # 2. Project them into the space of the codes
  kernel, bias, codes = parallel.to_host(
    [
      params['codebook.fc.kernel'],
      params['codebook.fc.bias'],
      params['codebook.codebook.embedding'],
    ]
  )
  z = draws @ kernel + bias

  # 3. Cluster
  centroids, _ = kmeans2(z, len(codes), minit='++', seed=rng)
  return {**params, 'codebook.codebook.embedding': centroids.astype(codes.dtype)}


def extra_state(params: Params, config: Any) -> Params:
  """Makes the moving averages over batches (decay `config.emotion.bank_decay`) for a
  bank among the trained parameters.

  Returns:
    `{}` if there is no bank, or if it is frozen. Otherwise:
      `bank.usage` `[K]`: the share of priors that each code serves.
      `bank.labels` `[K,E]`: that share by emotion, of labelled priors.
      `bank.sums` `[K,D]`, with `codebook_update='ema'` only: the sum of the projected
        priors that a code serves, times that share.

  Raises:
    ConfigError: the codes would have to move without gradients, but are frozen.
  """
  emo_model = config.emo_model
  if emo_model.mode != 'bank':
    # Mode 'learnable' has a table of the same name, but never looks anything up.
    return {}
  if CODES not in params:
    if emo_model.codebook_update == 'ema' or config.emotion.restart:
      raise ConfigError(
        f'emo_model.codebook_update={emo_model.codebook_update!r} with '
        f'emotion.restart={config.emotion.restart} moves the emotion bank, but '
        f'config.trainable={config.trainable} freezes it; train emo_model too'
      )
    return {}
  size = emo_model.codebook_size
  emotions = len(EMOTIONS)
  extra = {
    'bank.usage': jnp.full(size, 1 / size),
    'bank.labels': jnp.zeros((size, emotions)),
  }
  if emo_model.codebook_update == 'ema':
    extra['bank.sums'] = params[CODES] / size
  return extra


def after_update(
  state: TrainState, rows: dict[str, jax.Array], key: jax.Array, config: Any
) -> tuple[TrainState, dict[str, jax.Array]]:
  """Follows the use of the codes. Moves averaged codes to their priors, and rare ones
  to a prior of the batch.

  Args:
    state: after the optimizer's update.
    rows: `code` int `[B]`, `z` `[B,D]`, and `emotion_class` int `[B]`, -1 where
      unknown.
    key: chooses the priors that replace rare codes.
    config: the whole configuration; `emo_model` and `emotion` are read.

  Returns:
    The state, and metrics:
      `bank_perplexity`: exponential of the entropy of the shares, that is how many
        codes are in equal use.
      `bank_purity`: share of labelled priors that have their code's most frequent
        emotion.
  """
  if 'bank.usage' not in state.extra:
    return state, {}

  # 1. Average who uses which code
  extra = _averaged_use(state.extra, rows, config.emotion.bank_decay)
  state = dataclasses.replace(state, extra=extra)

  # 2. Move codes to the mean of the priors that they serve
  if 'bank.sums' in extra:
    usage = extra['bank.usage'][:, None]
    means = extra['bank.sums'] / jnp.maximum(usage, 1e-6)
    # A code that serves no prior for long stays where it is.
    codes = jnp.where(usage > 1e-6, means, state.params[CODES])
    state = dataclasses.replace(state, params=state.params | {CODES: codes})

  # 3. Restart rare codes at a prior of the batch
  if config.emotion.restart:
    state = _restart_rare(state, rows['z'], key, config.emotion.restart)

  # 4. Metrics
  shares = state.extra['bank.usage'] / state.extra['bank.usage'].sum()
  labels = state.extra['bank.labels']
  metrics = {
    'bank_perplexity': jnp.exp(jax.scipy.special.entr(shares).sum()),
    'bank_purity': labels.max(1).sum() / jnp.maximum(labels.sum(), 1e-6),
  }
  return state, metrics


def _averaged_use(extra: Params, rows: dict[str, jax.Array], decay: float) -> Params:
  """Moves the averages of `extra_state` towards the batch."""
  codes, emotions = extra['bank.labels'].shape
  z = rows['z']
  label = rows['emotion_class']
  served = jax.nn.one_hot(rows['code'], codes)  # [B,K]
  emotion = jnp.where(label < 0, -1, _emotion(label))  # -1 becomes a row of zeros
  sums = {
    'bank.usage': served.sum(0),
    'bank.labels': served.T @ jax.nn.one_hot(emotion, emotions),
  }
  if 'bank.sums' in extra:
    sums['bank.sums'] = jnp.matmul(served.T, z, precision='highest')
  return {
    name: decay * extra[name] + (1 - decay) * total / len(z)
    for name, total in sums.items()
  }


def _restart_rare(
  state: TrainState, z: jax.Array, key: jax.Array, every: int
) -> TrainState:
  """Replaces codes that are rarely used by projected priors z `[B,D]`, every so many
  steps, as if they had never been trained and had equal use.
  """
  codes = state.params[CODES]
  count = len(codes)
  rare = (state.extra['bank.usage'] < RARE / count) & (state.step % every == 0)
  fresh = z[jax.random.randint(key, (count,), 0, len(z))]

  def put(new, old):
    return jnp.where(rare.reshape(-1, *[1] * (old.ndim - 1)), new, old)

  ema = state.ema
  if ema:
    ema = ema | {CODES: put(fresh, ema[CODES])}
  restarted = {
    'bank.usage': 1 / count,
    'bank.labels': 0.0,
    'bank.sums': fresh / count,
  }
  return dataclasses.replace(
    state,
    params=state.params | {CODES: put(fresh, codes)},
    ema=ema,
    opt_state=clear_moments(state.opt_state, state.params, CODES, rare),
    extra={name: put(restarted[name], x) for name, x in state.extra.items()},
  )


def _emotion(index: Any) -> Any:
  """Maps a label of `clip_record.emotion_class` to its emotion: levels of one emotion
  count alike, and so does an unknown one.
  """
  at_unknown_level = index >= CLASSES
  return jnp.where(at_unknown_level, index - CLASSES + 1, (index + 2) // 3)
