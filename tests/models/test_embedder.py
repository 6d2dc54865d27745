"""The embedder: a PyTorch twin with gradients, and the invariances of the prior."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from convert import naming
from dicetalk_jax.errors import ConfigError
from dicetalk_jax.models import parameters
from dicetalk_jax.models.embedder import Embedder, EmbedderConfig, positions
from tests.models import parity

TINY = EmbedderConfig(
  expr_dim=6,
  whisper_dim=5,
  whisper_states=3,
  width=16,
  heads=4,
  mlp_dim=24,
  visual_layers=1,
  audio_layers=1,
  fusion_layers=1,
  dropout=0.3,
  max_len=12,
)
B, N = 5, 9


def changed(**fields):
  return EmbedderConfig.from_json(TINY.to_json() | fields)


@functools.cache
def make(config=TINY):
  """Parameters, and `f(params, method, *args)`.

  It compiles one program per method and shape.
  """
  graphdef, target = parity.abstract(config, Embedder)
  params = parameters.numpy_params(target)
  return params, parity.jit(
    lambda params, method, *args: method(parameters.merge(graphdef, params), *args),
    static_argnums=1,
  )


def forward(model, *args):
  return model(*args)


def clips(seed=0, frames=N):
  """A batch of clips of 4 to `frames` frames; clip 0 is the longest."""
  rng = np.random.default_rng(seed)
  lengths = np.concatenate([[frames], rng.integers(4, frames, B - 1)])

  def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)

  return (
    normal(B, frames, 6),
    normal(B, 2 * frames, 3, 5),
    np.arange(frames) < lengths[:, None],
    np.ones(B, bool),
    np.ones(B, bool),
  )


@pytest.fixture(autouse=True)
def exact_products():
  with jax.default_matmul_precision('highest'):
    yield


def test_size():
  _, target = parity.abstract(EmbedderConfig(), Embedder)
  assert sum(np.prod(x.shape) for x in target.values()) == pytest.approx(
    8.1e6, rel=0.01
  )


def test_positions_are_interleaved():
  n, i = np.arange(7)[:, None], np.arange(4)
  angle = n / 10000 ** (2 * i / 8)
  expected = np.stack([np.sin(angle), np.cos(angle)], axis=-1).reshape(7, 8)
  np.testing.assert_allclose(positions(7, 8), expected, atol=1e-6)


class Twin(nn.Module):
  """The embedder from PyTorch's own transformer layers."""

  def __init__(self, config):
    super().__init__()
    sizes = dict(
      d_model=config.width,
      nhead=config.heads,
      dim_feedforward=config.mlp_dim,
      dropout=0.0,
      activation='relu',
      batch_first=True,
      norm_first=False,
    )

    def stack(kind, count):
      return nn.ModuleList(kind(**sizes) for _ in range(count))

    self.expr_in = nn.Linear(config.expr_dim, config.width)
    self.audio_in = nn.Linear(2 * config.whisper_dim, config.width)
    self.states = nn.Parameter(torch.zeros(config.whisper_states))
    self.visual = stack(nn.TransformerEncoderLayer, config.visual_layers)
    self.audio = stack(nn.TransformerEncoderLayer, config.audio_layers)
    self.fusion = stack(nn.TransformerDecoderLayer, config.fusion_layers)
    self.pool = nn.Linear(config.width, 1, bias=False)
    self.register_buffer(
      'table', torch.tensor(np.asarray(positions(N, config.width), np.float64))
    )

  def load(self, params):
    """Copies the parameters of an `Embedder`."""
    weights = {
      k: torch.tensor(np.float64(v)) for k, v in naming.to_torch(params).items()
    }

    def copy(module, name, parts=('weight', 'bias')):
      for part in parts:
        getattr(module, part).data = weights[f'{name}.{part}']

    def attention(module, name):
      for part in ('weight', 'bias'):
        packed = torch.cat([weights[f'{name}.{x}_proj.{part}'] for x in 'qkv'])
        getattr(module, f'in_proj_{part}').data = packed
      copy(module.out_proj, f'{name}.out_proj')

    self.states.data = weights['state_weights']
    copy(self.expr_in, 'visual.linear_in')
    copy(self.audio_in, 'audio.linear_in')
    copy(self.pool, 'pool', ['weight'])
    for prefix, layers in (
      ('visual.layers', self.visual),
      ('audio.layers', self.audio),
      ('fusion', self.fusion),
    ):
      for i, layer in enumerate(layers):
        name, norms = f'{prefix}.{i}', ['self_norm', 'mlp_norm']
        attention(layer.self_attn, f'{name}.self_attn')
        if prefix == 'fusion':
          attention(layer.multihead_attn, f'{name}.cross_attn')
          norms.insert(1, 'cross_norm')
        for norm, ours in zip(
          (getattr(layer, f'norm{j + 1}') for j in range(len(norms))),
          norms,
          strict=True,
        ):
          copy(norm, f'{name}.{ours}')
        copy(layer.linear1, f'{name}.linear1')
        copy(layer.linear2, f'{name}.linear2')

  def forward(self, expr, whisper, mask, has_video, has_audio):
    speech = (
      (whisper * self.states.softmax(0)[:, None])
      .sum(2)
      .unflatten(1, (-1, 2))
      .flatten(2)
    )
    visual, x = (
      linear(y * has[:, None, None] * mask[..., None]) + self.table
      for linear, y, has in (
        (self.expr_in, expr, has_video),
        (self.audio_in, speech, has_audio),
      )
    )
    for layer in self.visual:
      visual = layer(visual, src_key_padding_mask=~mask)
    for layer in self.audio:
      x = layer(x, src_key_padding_mask=~mask)
    for layer in self.fusion:
      x = layer(x, visual, tgt_key_padding_mask=~mask, memory_key_padding_mask=~mask)
    w = self.pool(x)[..., 0].masked_fill(~mask, -torch.inf).softmax(1)[..., None]
    mu = (w * x).sum(1)
    return mu, (w * (x - mu[:, None]) ** 2).sum(1)


def with_twin(config, batch):
  """Parameters, compiled calls, the twin with the same weights, and its output."""
  params, call = make(config)
  twin = Twin(config).double()
  twin.load(params)
  return (
    params,
    call,
    twin,
    twin(*(torch.tensor(np.float64(x) if x.dtype == np.float32 else x) for x in batch)),
  )


def dropped_clips():
  """A batch with a clip without video and one without speech."""
  *features, mask, _, _ = clips()
  return *features, mask, np.arange(B) != 1, np.arange(B) != 2


def loss(model, weights, *batch):
  """A number that depends on everything, and the statistics."""
  mu, var = model(*batch)
  s = model.sample(mu, var, jax.random.key(0))
  return sum((w * x).sum() for w, x in zip(weights, (mu, var, s))), (mu, var)


@functools.cache
def gradient():
  graphdef, _ = parity.abstract(TINY, Embedder)
  return parity.jit(
    jax.grad(
      lambda params, *args: loss(parameters.merge(graphdef, params), *args),
      has_aux=True,
    )
  )


def test_forward_equals_pytorch():
  batch = dropped_clips()
  params, call, _, expected = with_twin(
    changed(visual_layers=2, fusion_layers=2), batch
  )
  for actual, wanted in zip(call(params, forward, *batch), expected, strict=True):
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(
      actual, wanted.detach(), rtol=0, atol=2e-5 * wanted.std().item()
    )


def test_gradients_equal_pytorch():
  batch = dropped_clips()
  params, _, twin, (mu, var) = with_twin(TINY, batch)
  weights = np.random.default_rng(1).normal(size=(3, B, 16)).astype(np.float32)
  noise = torch.tensor(np.asarray(jax.random.normal(jax.random.key(0), (B, 16))))
  s = mu + (var + 1e-6).sqrt() * noise
  sum(
    (torch.tensor(w) * x).sum() for w, x in zip(weights, (mu, var, s), strict=True)
  ).backward()
  ours = Twin(TINY).double()
  ours.load(gradient()(params, weights, *batch)[0])
  for (name, theirs), grad in zip(
    twin.named_parameters(), ours.parameters(), strict=True
  ):
    # The gradients of keys' biases are zero but for rounding; they share a tensor with
    # those of queries and values.
    np.testing.assert_allclose(
      grad.data, theirs.grad, rtol=0, atol=5e-5 * theirs.grad.abs().max(), err_msg=name
    )


SWITCHED = changed(
  whisper_layers='last',
  pack='mean',
  pool='mlp_mish',
  lambda_learnable=True,
  lambda_ca=0.5,
)


@pytest.mark.parametrize('config', [TINY, SWITCHED])
def test_norm_of_the_prior(config):
  """With identity norms every frame has squared norm d_s, and so has the prior."""
  params, call = make(config)
  params = params | {
    k: jnp.full_like(v, k.endswith('scale')) for k, v in params.items() if '_norm.' in k
  }
  mu, var = call(params, forward, *clips())
  np.testing.assert_allclose(np.square(mu).sum(1) + var.sum(1), config.width, rtol=1e-4)
  assert (var.sum(1) > 1e-2).all()


def test_switches_change_the_parameters():
  params, switched = make()[0], make(SWITCHED)[0]
  assert switched.keys() - params.keys() == {
    'fusion.0.cross_weight',
    'pool_hidden.kernel',
    'pool_hidden.bias',
  }
  assert params.keys() - switched.keys() == {'state_weights'}
  # Half of what two packed positions need.
  assert switched['audio.linear_in.kernel'].shape == (5, 16)
  drawn = parameters.init_params(
    lambda rngs: Embedder(SWITCHED, rngs=rngs), jax.random.key(0)
  )
  assert drawn['fusion.0.cross_weight'] == 0.5
  with pytest.raises(ConfigError, match='pool=.* choose one of linear, mlp_mish'):
    changed(pool='max')


def test_padding_never_matters():
  params, call = make()
  expr, whisper, mask, *has = clips()
  mu, var = call(params, forward, expr, whisper, mask, *has)
  rng = np.random.default_rng(7)
  other_expr = np.where(
    mask[..., None], expr, 100 * rng.normal(size=expr.shape)
  ).astype(np.float32)
  tokens = mask.repeat(2, axis=1)[..., None, None]
  other_whisper = np.where(
    tokens, whisper, 100 * rng.normal(size=whisper.shape)
  ).astype(np.float32)
  np.testing.assert_array_equal(
    call(params, forward, other_expr, other_whisper, mask, *has)[0], mu
  )
  more = [
    np.pad(x, ((0, 0), (0, k), *[(0, 0)] * (x.ndim - 2)), constant_values=c)
    for x, k, c in ((other_expr, 4, 50), (other_whisper, 8, 50), (mask, 4, False))
  ]
  longer = call(params, forward, *more, *has)
  for actual, expected in zip(longer, (mu, var)):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_missing_modalities():
  """Missing inputs do not matter, and a prior from one modality has a variance."""
  params, call = make()
  expr, whisper, mask, yes, _ = clips()
  base = {}
  for name, has in {
    'both': (yes, yes),
    'video': (yes, ~yes),
    'audio': (~yes, yes),
  }.items():
    mu, var = base[name] = call(params, forward, expr, whisper, mask, *has)
    assert (var.sum(1) > 1e-3).all(), name
    changed_expr = call(params, forward, expr + 1, whisper, mask, *has)[0]
    changed_whisper = call(
      params, forward, expr, whisper + np.float32([1, 2, 3, 4, 5]), mask, *has
    )[0]
    assert np.allclose(changed_expr, mu) == (name == 'audio')
    assert np.allclose(changed_whisper, mu) == (name == 'video')
  assert not np.allclose(base['video'][0], base['audio'][0], atol=0.1)


def test_embedder_of_one_modality_never_sees_the_other():
  """It equals the full embedder without the other modality, even if that is given."""
  params, call = make()
  expr, whisper, mask, yes, _ = clips()
  for name, has in (('video', (yes, ~yes)), ('audio', (~yes, yes))):
    mu, _ = make(changed(modalities=name))[1](
      params, forward, expr, whisper, mask, yes, yes
    )
    np.testing.assert_allclose(
      mu, call(params, forward, expr, whisper, mask, *has)[0], atol=1e-6
    )


def test_standardised_expressions():
  params, call = make(changed(expr_norm='zscore'))
  assert params.keys() - make()[0].keys() == {'expr_mean', 'expr_std'}
  expr, *rest = clips()
  mean, std = np.float32(np.arange(6)), np.float32(np.arange(6) + 0.5)
  mu = call(
    params | {'expr_mean': mean, 'expr_std': std}, forward, expr * std + mean, *rest
  )[0]
  np.testing.assert_allclose(
    mu, make()[1](make()[0], forward, expr, *rest)[0], atol=1e-5
  )


def test_learned_token_for_a_missing_modality():
  params, call = make(changed(missing_token=True))
  extra = params.keys() - make()[0].keys()
  assert extra == {'visual.missing', 'audio.missing'}
  batch = dropped_clips()
  base = call(params, forward, *batch)[0]
  for name, clip in (('visual.missing', 1), ('audio.missing', 2)):
    change = call(params | {name: params[name] + 1}, forward, *batch)[0] - base
    assert change[clip].any()
    assert not np.delete(change, clip, axis=0).any()


def test_clip_without_frames():
  """It gives zeros, without any NaN in the result or the gradient."""
  expr, whisper, mask, *has = clips()
  mask = mask & (np.arange(B) != 3)[:, None]
  grads, (mu, var) = gradient()(
    make()[0], np.ones((3, B, 16), np.float32), expr, whisper, mask, *has
  )
  assert not mu[3].any() and not var[3].any()
  assert mu[2].any()
  assert all(np.isfinite(g).all() for g in grads.values())


def test_sample():
  params, call = make()
  mu, var = (
    np.full((2, 4000), 3, np.float32),
    np.array([[0.0], [4.0]], np.float32).repeat(4000, 1),
  )
  s = call(params, lambda model, *args: model.sample(*args), mu, var, jax.random.key(0))
  assert np.abs(s[0] - 3).max() < 6e-3  # the floor of the variance, 1e-6
  assert s[1].mean() == pytest.approx(3, abs=0.15)
  assert s[1].std() == pytest.approx(2, rel=0.05)


def test_lambda_weighs_the_expressions():
  """With lambda 0 the expressions are never seen."""
  params, call = make(SWITCHED)
  params = params | {'fusion.0.cross_weight': jnp.zeros(())}
  expr, *rest = clips()
  np.testing.assert_array_equal(
    call(params, forward, expr, *rest)[0], call(params, forward, 2 * expr, *rest)[0]
  )


def test_dropout_is_by_key():
  params, call = make()
  batch = clips()
  quiet, first, again, second = (
    call(params, forward, *batch, key)[0]
    for key in (None, *map(jax.random.key, (0, 0, 1)))
  )
  np.testing.assert_array_equal(quiet, call(params, forward, *batch)[0])
  np.testing.assert_array_equal(first, again)
  assert not np.allclose(first, quiet) and not np.allclose(first, second)


def test_bfloat16_returns_float32():
  graphdef, target = parity.abstract(TINY, Embedder, dtype=jnp.bfloat16)
  params = parameters.numpy_params(target)
  batch = clips()
  run = parity.jit(lambda params, *batch: parameters.merge(graphdef, params)(*batch))
  mu, var = run(params, *batch)
  assert mu.dtype == var.dtype == jnp.float32
  exact, _ = make()[1](params, forward, *batch)
  np.testing.assert_allclose(mu, exact, atol=0.1)
