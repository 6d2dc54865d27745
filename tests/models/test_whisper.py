import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dicetalk_jax.media import audio
from dicetalk_jax.models.parameters import ParamKeys, merge
from dicetalk_jax.models.whisper import WhisperConfig, WhisperEncoder
from tests.models import parity


@pytest.fixture(scope='module')
def recorded(goldens):
  """Our encoder with the recorded weights, jitted, and the recorded tensors."""
  settings, weights, inputs, outputs = parity.golden(goldens / 'whisper' / 'encoder')
  graphdef, params = parity.converted(
    WhisperConfig.from_json(settings['constructor']), WhisperEncoder, weights
  )

  @parity.jit
  def encode(log_mel):
    with jax.default_matmul_precision('highest'):
      return merge(graphdef, params)(log_mel)

  return encode, inputs, outputs


def test_golden_states_and_clips(recorded):
  encode, inputs, expected = recorded
  head, fill = inputs['log_mel_head'], inputs['log_mel_fill']
  log_mel = np.concatenate(
    [head, fill.repeat(3000 - head.shape[-1], axis=-1)], axis=-1
  ).swapaxes(1, 2)
  states = np.asarray(encode(log_mel))
  assert parity.error(states[:, ::25], expected['hidden_states_stacked_every25']) < 2e-5
  assert (
    parity.error(states[:, -100::5], expected['hidden_states_last100_every5']) < 2e-5
  )

  padded = audio.pad_states(states, audio_len=82)
  assert parity.error(padded[None], expected['audio_prompts']) < 2e-5
  clips = audio.audio_windows(padded)
  assert parity.error(clips[0], expected['clips_first']) < 2e-5
  assert parity.error(clips[-1], expected['clips_last']) < 2e-5
  assert parity.error(clips.sum(axis=(1, 2, 3)), expected['clips_sum']) < 2e-5


def test_twin():
  """Forward and all gradients against transformers, other sizes than the golden."""
  import torch
  import transformers

  sizes = dict(
    d_model=24,
    encoder_layers=3,
    encoder_attention_heads=3,
    encoder_ffn_dim=40,
    num_mel_bins=16,
    max_source_positions=30,
  )
  torch.manual_seed(0)
  theirs = (
    transformers.WhisperModel(
      transformers.WhisperConfig(
        **sizes,
        decoder_layers=1,
        decoder_attention_heads=1,
        decoder_ffn_dim=4,
        vocab_size=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
      )
    )
    .eval()
    .encoder
  )
  graphdef, params = parity.converted(
    WhisperConfig(**sizes),
    WhisperEncoder,
    {f'encoder.{k}': v for k, v in parity.lively(theirs).items()},
  )
  rng = np.random.default_rng(0)
  log_mel = rng.normal(size=(2, 60, 16)).astype(np.float32)
  cotangent = rng.normal(size=(2, 30, 4, 24)).astype(np.float32)

  x = torch.tensor(log_mel.swapaxes(1, 2), requires_grad=True)
  theirs.embed_positions.weight.requires_grad_(True)
  expected = torch.stack(theirs(x, output_hidden_states=True).hidden_states, dim=2)
  expected.mul(torch.tensor(cotangent)).sum().backward()

  def weighed(params, log_mel):
    states = merge(graphdef, params)(log_mel)
    return jnp.vdot(states, cotangent), states

  with jax.default_matmul_precision('highest'):
    states, grads, (of_input,) = parity.jax_gradients(weighed, params, log_mel)
  assert parity.error(states, expected.detach()) < 2e-5
  assert parity.error(of_input.swapaxes(1, 2), x.grad) < 2e-5
  assert (
    parity.gradient_error(
      {k.removeprefix('encoder.'): v for k, v in grads.items()}, theirs
    )
    < 2e-5
  )


def test_positions_at_construction_are_whispers():
  import transformers

  config = WhisperConfig(d_model=16, encoder_layers=0, encoder_attention_heads=1)
  encoder = WhisperEncoder(config, rngs=ParamKeys(jax.random.key(0))).encoder
  theirs = transformers.models.whisper.modeling_whisper.sinusoids(1500, 16).numpy()
  # Angles reach 1500: one unit in their last place is 1.2e-4.
  np.testing.assert_allclose(encoder.embed_positions.embedding[...], theirs, atol=2e-4)


def test_full_size():
  graphdef, params = parity.abstract(WhisperConfig(), WhisperEncoder)
  out = jax.eval_shape(
    lambda p, x: merge(graphdef, p)(x),
    params,
    jax.ShapeDtypeStruct((2, 3000, 80), 'float32'),
  )
  assert out.shape == (2, 1500, 5, 384)


def test_compute_dtype():
  config = WhisperConfig(
    d_model=8,
    encoder_layers=1,
    encoder_attention_heads=2,
    encoder_ffn_dim=8,
    num_mel_bins=4,
    max_source_positions=10,
  )
  graphdef, target = parity.abstract(config, WhisperEncoder, dtype=jnp.bfloat16)
  x = jax.ShapeDtypeStruct((1, 20, 4), 'float32')
  assert (
    jax.eval_shape(lambda p, x: merge(graphdef, p)(x), target, x).dtype == jnp.bfloat16
  )
