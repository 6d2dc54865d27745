"""Stand-ins for cuDNN's attention: tests have neither cuDNN nor a GPU."""

import jax
from jax._src.cudnn import fused_attention_stablehlo as fused
from jax._src.interpreters import mlir
import jax.numpy as jnp
import pytest


def detect(patch: pytest.MonkeyPatch) -> None:
  """Lets programs with cuDNN's attention be lowered."""
  patch.setattr(fused, 'check_cudnn_version', lambda: 91000)


def stand_in(patch: pytest.MonkeyPatch) -> None:
  """Lets these programs run on CPUs: plain attention in place of the kernel.

  Everything around the kernel stays that of JAX: what it refuses, and how it spreads
  the kernel over a mesh.
  """
  detect(patch)
  rules = mlir._platform_specific_lowerings['cpu']
  for primitive, function in (
    (fused._dot_product_attention_fwd_p, _forward),
    (fused._dot_product_attention_bwd_p, _backward),
  ):
    lower = mlir.lower_fun(function, multiple_results=True)
    patch.setitem(rules, primitive, mlir.LoweringRuleEntry(lower, False))


def _plain(q, k, v, scale):
  logits = jnp.einsum('btnh,bsnh->bnts', q, k, preferred_element_type=jnp.float32)
  weights = jax.nn.softmax(scale * logits, axis=-1)
  return jnp.einsum('bnts,bsnh->btnh', weights.astype(q.dtype), v)


def _forward(q, k, v, *_, scale, is_training, **kwargs):
  out = _plain(q, k, v, scale)
  # Only cuDNN's backward kernel needs the second result.
  statistics = jnp.zeros((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)
  return [out, statistics] if is_training else [out]


def _backward(q, k, v, *rest, scale, **kwargs):
  gradient = rest[-1]
  _, pull = jax.vjp(lambda q, k, v: _plain(q, k, v, scale), q, k, v)
  return list(pull(gradient))
