"""Checks of types and shapes in annotations; `tests/conftest.py` switches them on."""

from collections.abc import Callable, Mapping
from typing import Any, Self

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook
from ml_collections import ConfigDict

# An int may stand for a float, as for mypy.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def install() -> None:
  """Checks every later call of functions of models and diffusion.

  Packages that were imported before are not checked.
  """
  # Sections of a configuration are mappings in all but name.
  Mapping.register(ConfigDict)
  packages = ['dicetalk_jax.models', 'dicetalk_jax.diffusion']
  install_import_hook(packages, 'tests.shape_checks.checked')


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
  """Checks the arguments and the result of a function at every call."""
  # Beartype understands Self only if it decorates the whole class.
  if Self in function.__annotations__.values():
    return function
  return check(function)
