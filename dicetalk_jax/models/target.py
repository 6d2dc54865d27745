"""The platform that a program is compiled for.

Layers choose their kernels by it, and never by the host that traces: that host may
compile for devices which it does not have.
"""

from collections.abc import Iterator
import contextlib
import dataclasses

import jax

PLATFORMS = ('cpu', 'cuda', 'rocm', 'tpu')
# Hopper: what is assumed of an NVIDIA GPU that is not there.
CURRENT = 9.0


@dataclasses.dataclass(frozen=True)
class Target:
  """The devices that a kernel is chosen for.

  Attributes:
    platform: one of `PLATFORMS`.
    capability: compute capability of an NVIDIA GPU; without meaning elsewhere.
  """

  platform: str
  capability: float = CURRENT


# Part of the key of jax's caches: another target traces the same function again.
_chosen = jax.make_user_context(None)


@contextlib.contextmanager
def compiling_for(platform: str, capability: float = CURRENT) -> Iterator[None]:
  """Within it, programs are traced for `platform`, whatever devices there are.

  Raises:
    ValueError: the platform is unknown.
  """
  if platform not in PLATFORMS:
    known = ', '.join(PLATFORMS)
    raise ValueError(f'platform must be one of {known}, not {platform!r}')
  with _chosen(Target(platform, capability)):
    yield


def current() -> Target:
  """The target of `compiling_for`, else of the mesh, else of the default device."""
  if _chosen.value is not None:
    return _chosen.value
  device = jax.sharding.get_abstract_mesh().abstract_device
  if device is None:
    device = jax.config.jax_default_device
  if device is None:
    device = jax.default_backend()
  return _target(device if isinstance(device, str) else device.platform)


def _target(platform: str) -> Target:
  """Of devices by jax's name of their platform: 'gpu' does not tell whose."""
  if platform not in ('gpu', 'cuda', 'rocm'):
    return Target(platform)
  try:
    gpu = jax.local_devices(backend='gpu')[0]
  except RuntimeError:  # there is none
    return Target('rocm' if platform == 'rocm' else 'cuda')
  if 'cuda' not in gpu.client.platform_version:
    return Target('rocm')
  return Target('cuda', float(gpu.compute_capability))
