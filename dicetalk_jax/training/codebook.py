"""The codes of the emotion bank: where they begin, how they are used, and what else
than gradients moves them.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.cluster.vq import kmeans2

from dicetalk_jax import parallel
from dicetalk_jax.data.mixture import DatasetPart
from dicetalk_jax.errors import ConfigError
from dicetalk_jax.models.parameters import Params
from dicetalk_jax.training.optimizer import clear_moments
from dicetalk_jax.training.state import TrainState

DRAWS = 2048
CODES = 'emo_model.codebook.codebook.embedding'
# a code is rare that is used less than this share of what equal use would give it
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
  drawn = []
  for part in parts:
    priors, share = (
      part.features['prior'],
      part.weight / sum(part.weight for part in parts),
    )
    clips = rng.choice(np.flatnonzero(priors.lengths >= 0), round(DRAWS * share))
    drawn += [priors(int(clip))[0] for clip in clips]
  mu, sigma = np.stack(drawn, axis=1).astype(np.float32)
  kernel, bias, codes = parallel.to_host(
    [
      params[f'codebook.{name}']
      for name in ('fc.kernel', 'fc.bias', 'codebook.embedding')
    ]
  )
  z = (mu + sigma * rng.standard_normal(mu.shape, np.float32)) @ kernel + bias
  centroids, _ = kmeans2(z, len(codes), minit='++', seed=rng)
  return {**params, 'codebook.codebook.embedding': centroids.astype(codes.dtype)}


def extra_state(params: Params, config: Any) -> Params:
  """Moving averages over batches (decay `config.emotion.bank_decay`) for a bank among
  the trained parameters.

  Returns:
    `{}` without a bank, or where it is held. Else `bank.usage` `[K]`, the share of
    priors that a code serves; `bank.labels` `[K,E]`, that share by emotion, of labelled
    priors; with `codebook_update='ema'` also `bank.sums`
    `[K,D]`, the projected priors that a code serves times that share.

  Raises:
    ConfigError: the codes should move without gradient, but are held.
  """
  emo_model = config.emo_model
  if emo_model.mode != 'bank':
    # the free table of 'learnable' has the bank's name, but nothing is looked up in it
    return {}
  if CODES not in params:
    if emo_model.codebook_update == 'ema' or config.emotion.restart:
      raise ConfigError(
        f'emo_model.codebook_update={emo_model.codebook_update!r} with '
        f'emotion.restart={config.emotion.restart} moves the emotion bank, but '
        f'config.trainable={config.trainable} holds it; train emo_model too'
      )
    return {}
  size = emo_model.codebook_size
  usage = jnp.full(size, 1 / size)
  extra = {
    'bank.usage': usage,
    'bank.labels': jnp.zeros((size, _emotion(emo_model.num_classes - 1) + 1)),
  }
  return extra | (
    {'bank.sums': params[CODES] / size} if emo_model.codebook_update == 'ema' else {}
  )


def after_update(
  state: TrainState, rows: dict[str, jax.Array], key: jax.Array, config: Any
) -> tuple[TrainState, dict[str, jax.Array]]:
  """Follows how codes are used; moves averaged codes to their priors, and rare ones to
  a prior of the batch.

  Args:
    state: after the optimizer's update.
    rows: `code` int `[B]`, `z` `[B,D]`, and `emotion_class` int `[B]`, -1 where
      unknown.
    key: chooses the priors that replace rare codes.
    config: `emo_model` and `emotion` of the whole.

  Returns:
    The state, and `bank_perplexity` (exponential of the entropy of the shares: how many
    codes are in equal use) and `bank_purity` (share of labelled priors that have their
    code's most frequent emotion).
  """
  if 'bank.usage' not in state.extra:
    return state, {}
  c, codes, z = config.emotion, state.params[CODES], rows['z']
  served = jax.nn.one_hot(rows['code'], len(codes))  # [B,K]
  label = rows['emotion_class']
  labels = jax.nn.one_hot(
    jnp.where(label < 0, -1, _emotion(label)), state.extra['bank.labels'].shape[1]
  )

  def mean(old, new):
    return c.bank_decay * old + (1 - c.bank_decay) * new / len(z)

  usage = mean(state.extra['bank.usage'], served.sum(0))
  extra = {
    'bank.usage': usage,
    'bank.labels': mean(state.extra['bank.labels'], served.T @ labels),
  }
  if sums := 'bank.sums' in state.extra:
    extra['bank.sums'] = mean(
      state.extra['bank.sums'], jnp.matmul(served.T, z, precision='highest')
    )
    # A code that serves nobody for long stays where it is.
    codes = jnp.where(
      usage[:, None] > 1e-6,
      extra['bank.sums'] / jnp.maximum(usage, 1e-6)[:, None],
      codes,
    )

  average, moments = state.ema, state.opt_state
  if c.restart:
    rare = (usage < RARE / len(codes)) & (state.step % c.restart == 0)
    fresh = z[jax.random.randint(key, len(codes), 0, len(z))]

    def put(old, new):
      return jnp.where(rare.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    codes = put(codes, fresh)
    average = average | {CODES: put(average[CODES], fresh)} if average else average
    moments = clear_moments(moments, state.params, CODES, rare)
    restarted = {
      'bank.usage': 1 / len(codes),
      'bank.labels': 0.0,
      'bank.sums': fresh / len(codes),
    }
    extra = {name: put(x, restarted[name]) for name, x in extra.items()}
  params = state.params | {CODES: codes} if sums or c.restart else state.params

  share = extra['bank.usage'] / extra['bank.usage'].sum()
  labelled = extra['bank.labels']
  metrics = {
    'bank_perplexity': jnp.exp(jax.scipy.special.entr(share).sum()),
    'bank_purity': labelled.max(1).sum() / jnp.maximum(labelled.sum(), 1e-6),
  }
  return state.replace(
    params=params, ema=average, opt_state=moments, extra=extra
  ), metrics


def _emotion(index: Any) -> Any:
  """The emotion of a class: levels of one emotion count alike
  (`dicetalk_jax.data.clip_record.emotion_class`).
  """
  return (index + 2) // 3
