"""Helpers of parity tests: goldens, layouts, errors, gradients of a PyTorch twin."""

from collections.abc import Callable, Mapping
import functools
import json
import pathlib

import jax
import numpy as np
from safetensors.numpy import load_file

from convert.naming import from_torch, to_torch
from dicetalk_jax.models import parameters

# Tests compile for longer than they run.
jit = functools.partial(
  jax.jit,
  compiler_options={
    'xla_backend_optimization_level': 0,
    'xla_llvm_disable_expensive_passes': True,
  },
)

MANIFESTS = pathlib.Path(__file__).parents[1] / 'manifests'


def golden(folder: pathlib.Path):
  """config, weights, inputs and outputs of one recorded component."""
  tensors = (
    load_file(folder / f'{part}.safetensors')
    for part in ('weights', 'inputs', 'outputs')
  )
  return json.loads((folder / 'config.json').read_text()), *tensors


def abstract(config: parameters.ModelConfig, model: type, dtype=None):
  return parameters.abstract(functools.partial(model, config, dtype=dtype))


def converted(
  config: parameters.ModelConfig, model: type, state_dict: Mapping[str, np.ndarray]
):
  """Structure and parameters of our model with published weights."""
  graphdef, target = abstract(config, model)
  return graphdef, from_torch(target, state_dict)


def channels_last(x: np.ndarray) -> np.ndarray:
  return np.moveaxis(x, -3, -1)


def channels_first(x) -> np.ndarray:
  return np.moveaxis(np.asarray(x), -1, -3)


def error(actual, expected) -> float:
  """Largest difference over the standard deviation of what is expected."""
  actual, expected = np.asarray(actual), np.asarray(expected)
  assert actual.shape == expected.shape
  return float(np.abs(actual - expected).max() / expected.std())


def lively(module) -> dict[str, np.ndarray]:
  """Adds noise to every parameter of a PyTorch module, so that nothing stays zero or
  one; returns its state dict.
  """
  import torch

  generator = torch.Generator().manual_seed(1)
  with torch.no_grad():
    for parameter in module.parameters():
      parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
  return {key: value.numpy() for key, value in module.state_dict().items()}


def jax_gradients(loss: Callable, params, *inputs):
  """Outputs of the model, gradients under published names, gradients of the inputs.

  `loss(params, *inputs)` returns a scalar and the outputs from which it was made.
  """
  grad = jit(jax.grad(loss, argnums=tuple(range(1 + len(inputs))), has_aux=True))
  (of_params, *of_inputs), outputs = grad(params, *inputs)
  return outputs, to_torch(of_params), of_inputs


def gradient_error(actual: Mapping[str, np.ndarray], module) -> float:
  """Worst difference over the parameters of `module` after backward, relative to the
  size of each gradient.

  Gradients that vanish mathematically (a bias before a norm, or of attention keys) are
  rounding noise on both sides: sizes below a tenth of the overall one are replaced by
  that.
  """
  expected = {
    key: p.grad.numpy() for key, p in module.named_parameters() if p.grad is not None
  }
  assert expected.keys() == actual.keys()

  def size(*gradients):
    return np.sqrt(np.mean([np.mean(g**2) for g in gradients]))

  floor = 0.1 * size(*expected.values())
  return max(
    float(np.abs(actual[k] - g).max() / max(size(g), floor))
    for k, g in expected.items()
  )
