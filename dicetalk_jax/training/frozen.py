"""Frozen networks: restored from the model folder, run once over a data set, their outputs kept beside the data.

They take no part in the training step and stay on one device, outside its mesh.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from data_pipelines import record as clip_record
from data_pipelines.features import Feature, FeatureStore
from data_pipelines.source import ClipSource
from dicetalk_jax import bundle
from dicetalk_jax.errors import WeightsError
from dicetalk_jax.media import audio, image
from dicetalk_jax.models import core, registry
from dicetalk_jax.network import Network

BATCH = 64  # rows per call; the last batch of a clip is padded, so that one program serves all


def ensure(folder, name: str, random: Mapping[str, Any] | None, seed: int) -> Network:
  """The component of the model folder; where it has none, a random one of configuration `random` is put there.

  Random towers serve the tiny synthetic models only: no published weights exist at that size.

  Raises:
    WeightsError: the folder has no such component and `random` is None.
  """
  if name not in bundle.components(folder):
    if random is None:
      raise WeightsError(f'{folder} has no {name}; convert the published weights into it with python -m convert, '
                         'or name another model folder with --config.model')
    config = registry.config_of(name, random).to_json()
    params = core.init_params(registry.builder(name, config), jax.random.key(seed))
    bundle.save_component(folder, name, config, params, {'source': f'random, seed {seed}'})
  return Network.load(folder, name)


def latents(vae: Network, source: ClipSource, store: FeatureStore) -> Feature:
  """Posterior means, unscaled: per clip `[N,h,w,c]` float32."""
  encode = vae.stage(_mean)
  def one(record):
    return _batched(encode, clip_record.decode_frames(record).astype(np.float32) / 127.5 - 1)
  return _computed('latents', vae, source, store, one)


def image_tokens(tower: Network, source: ClipSource, store: FeatureStore, stride: int) -> Feature:
  """CLIP tokens of every `stride`-th frame, which may serve as references: per clip `[ceil(N/stride),1024]` float32."""
  embed = tower.stage(_output)
  def one(record):
    frames = clip_record.decode_frames(record, np.arange(0, int(record['num_frames']), stride))
    return _batched(embed, np.stack([image.clip_pixels(frame, tower.config.image_size) for frame in frames]))
  return _computed(f'clip_embed_{stride}', tower, source, store, one)


def whisper_states(whisper: Network, source: ClipSource, store: FeatureStore) -> Feature:
  """Whisper states at 50 Hz: per clip `[2N,states,width]` float32."""
  one = lambda record: speech_states(whisper, clip_record.decode_audio(record), int(record['num_frames']))
  return _computed('whisper', whisper, source, store, one)


def speech_states(whisper: Network, wave: np.ndarray, frames: int) -> np.ndarray:
  """Whisper states of a recording, 16 kHz `[samples]`, two for each of its frames at 25 Hz: `[2N,states,width]`."""
  states = np.asarray(whisper.stage(_output)(audio.log_mel(wave)))
  return states.reshape(-1, *states.shape[2:])[:2 * frames]


def statistics(embedder: Network, whisper: Feature, source: ClipSource, store: FeatureStore) -> Feature:
  """Emotion prior of each clip from what it has of both modalities: `[1,2,256]` float32; see `gaussian`."""
  one = lambda index, record: gaussian(embedder, record['expression'], whisper(index))[None]
  return store.write('prior', embedder.fingerprint, ((i, one(i, r)) for i, r in _clips(source, 'prior')))


def gaussian(embedder: Network, expression: np.ndarray, states: np.ndarray) -> np.ndarray:
  """Emotion prior of one clip (paper equations 2 to 6).

  A clip longer than `max_len` is embedded in windows of equal length, and their Gaussians averaged.

  Args:
    embedder: the component.
    expression: `[N,expr_dim]` at 25 frames per second; N = 0 where it is missing.
    states: `[2N,states,width]` from `speech_states`; none where there is no sound.

  Returns:
    float32 `[2,256]`: mean and standard deviation.
  """
  length, frames = embedder.config.max_len, len(expression) or len(states) // 2
  pad = lambda x, rows: np.pad(x, ((0, rows - len(x)), *[(0, 0)] * (x.ndim - 1)))[None]
  has = [np.full(1, bool(len(x))) for x in (expression, states)]
  embed, windows = embedder.stage(_gaussian), []
  for rows in np.array_split(np.arange(frames), -(-frames // length)):
    first, last = rows[0], rows[-1] + 1
    windows.append(embed(pad(expression[first:last], length), pad(states[2 * first:2 * last], 2 * length),
                         np.arange(length)[None] < len(rows), *has))
  return np.mean(windows, axis=0)[0]


def _output(model, x):
  return model(x)


def _mean(model, x):
  return model.encode(x)[0]


def _gaussian(model, *batch):
  mu, var = model(*batch)
  return jnp.stack([mu, jnp.sqrt(var)], axis=1)


def _computed(name: str, network: Network, source: ClipSource, store: FeatureStore, one) -> Feature:
  return store.write(name, network.fingerprint, ((i, np.asarray(one(r))) for i, r in _clips(source, name)))


def _clips(source: ClipSource, name: str) -> Iterator[tuple[int, Any]]:
  for i in tqdm(range(len(source)), desc=f'computing {name} ({source.split})', unit='clip', mininterval=1):
    yield i, source[i]


def _batched(apply, x: np.ndarray) -> np.ndarray:
  parts = []
  for i in range(0, len(x), BATCH):
    rows = x[i:i + BATCH]
    out = np.asarray(apply(np.pad(rows, ((0, BATCH - len(rows)), *[(0, 0)] * (x.ndim - 1)))))
    parts.append(out[:len(rows)])
  return np.concatenate(parts)
