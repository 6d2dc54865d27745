"""CLIP: live parity with transformers, precision; the recorded numbers are in
`tests/convert/test_verify.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dicetalk_jax.models.clip import CLIPVision, CLIPVisionConfig
from dicetalk_jax.models.parameters import merge
from tests.models import parity


@pytest.mark.parametrize('hidden_act', ['gelu', 'quick_gelu'])
def test_twin(hidden_act):
  """Forward and all gradients against transformers, with another patch size and
  image size than the golden.
  """
  import torch
  import transformers

  sizes = dict(
    hidden_size=24,
    intermediate_size=40,
    projection_dim=20,
    num_hidden_layers=2,
    num_attention_heads=3,
    image_size=24,
    patch_size=8,
    hidden_act=hidden_act,
  )
  torch.manual_seed(0)
  theirs = transformers.CLIPVisionModelWithProjection(
    transformers.CLIPVisionConfig(**sizes)
  ).eval()
  graphdef, params = parity.converted(
    CLIPVisionConfig(**sizes), CLIPVision, parity.lively(theirs)
  )
  rng = np.random.default_rng(0)
  pixels = rng.normal(size=(2, 24, 24, 3)).astype(np.float32)
  cotangent = rng.normal(size=(2, 20)).astype(np.float32)

  x = torch.tensor(np.moveaxis(pixels, -1, 1), requires_grad=True)
  expected = theirs(x).image_embeds
  expected.mul(torch.tensor(cotangent)).sum().backward()

  def weighed(params, pixels):
    image_embeds = merge(graphdef, params)(pixels)
    return jnp.vdot(image_embeds, cotangent), image_embeds

  with jax.default_matmul_precision('highest'):
    image_embeds, grads, (of_input,) = parity.jax_gradients(weighed, params, pixels)
  assert parity.error(image_embeds, expected.detach()) < 2e-5
  assert parity.error(parity.channels_first(of_input), x.grad) < 2e-5
  assert parity.gradient_error(grads, theirs) < 2e-5


def test_full_size():
  graphdef, params = parity.abstract(CLIPVisionConfig(), CLIPVision)
  out = jax.eval_shape(
    lambda p, x: merge(graphdef, p)(x),
    params,
    jax.ShapeDtypeStruct((2, 224, 224, 3), 'float32'),
  )
  assert out.shape == (2, 1024)


def test_compute_dtype():
  config = CLIPVisionConfig(
    hidden_size=8,
    intermediate_size=8,
    projection_dim=4,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=8,
    patch_size=4,
  )
  graphdef, target = parity.abstract(config, CLIPVision, dtype=jnp.bfloat16)
  x = jax.ShapeDtypeStruct((1, 8, 8, 3), 'float32')
  assert (
    jax.eval_shape(lambda p, x: merge(graphdef, p)(x), target, x).dtype == jnp.bfloat16
  )
