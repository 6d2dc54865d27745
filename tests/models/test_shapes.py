"""The shapes in annotations are checked in tests, and only there."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

from dicetalk_jax.diffusion import guidance
from dicetalk_jax.models import parameters
from dicetalk_jax.models.attention import SelfAttention, attend


def test_axes_of_one_name_must_have_one_size():
  q = jnp.zeros((1, 3, 2, 8))
  attend(q, q, q)
  with pytest.raises(jaxtyping.TypeCheckError, match='attend'):
    attend(q, q, jnp.zeros((1, 4, 2, 8)))


def test_modules_are_checked_while_they_are_traced():
  graphdef, target = parameters.abstract(lambda rngs: SelfAttention(8, 2, rngs=rngs))

  def call(params, x):
    return parameters.merge(graphdef, params)(x)

  jax.eval_shape(call, target, jax.ShapeDtypeStruct((3, 8), jnp.float32))
  with pytest.raises(jaxtyping.TypeCheckError, match='SelfAttention.__call__'):
    jax.eval_shape(call, target, jax.ShapeDtypeStruct((8,), jnp.float32))


def test_types_are_checked():
  with pytest.raises(jaxtyping.TypeCheckError, match='combine'):
    guidance.combine(jnp.zeros((3, 2), jnp.int32), 1.0, 1.0)


def test_users_pay_for_no_checks():
  program = (
    'from dicetalk_jax.diffusion import edm\n'
    'assert not hasattr(edm.c_in, "__wrapped__")\n'
  )
  subprocess.run([sys.executable, '-c', program], check=True)
