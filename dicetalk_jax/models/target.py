"""The platform that a program is compiled for.

Layers choose their kernels by it, never by the host that traces: that host may compile
for devices that it does not have.
"""

from collections.abc import Iterator
import contextlib
import dataclasses

import jax

PLATFORMS = ('cpu', 'cuda', 'rocm', 'tpu')
# Hopper: what is assumed of an NVIDIA GPU that is not attached.
CURRENT = 9.0


@dataclasses.dataclass(frozen=True)
class Target:
  """The devices that a kernel is chosen for.

  Attributes:
    platform: one of `PLATFORMS`.
    capability: compute capability of an NVIDIA GPU; meaningless elsewhere.
  """

  platform: str
  capability: float = CURRENT


# Part of the key of JAX's caches: another target traces the same function again.
_chosen = jax.make_user_context(None)


@contextlib.contextmanager
def compiling_for(platform: str, capability: float = CURRENT) -> Iterator[None]:
  """Traces programs for `platform` in its block, whatever devices are attached.

  Raises:
    ValueError: the platform is unknown.
  """
  if platform not in PLATFORMS:
    known = ', '.join(PLATFORMS)
    raise ValueError(f'unknown platform {platform!r}; choose one of {known}')
  with _chosen(Target(platform, capability)):
    yield


def current() -> Target:
  """The target of `compiling_for`, else of the mesh, else of the default device."""
  chosen: Target | None = _chosen.value
  if chosen is not None:
    return chosen
  device = jax.sharding.get_abstract_mesh().abstract_device
  if device is None:
    device = jax.config.jax_default_device  # type: ignore[attr-defined]  # set at run time
  if device is None:
    device = jax.default_backend()
  return _target(device if isinstance(device, str) else device.platform)


def shared_axes() -> dict[str, int]:
  """The sizes of the mesh axes over which the visible arrays are spread.

  Inside `shard_map` arrays are local.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return {
    axis: size for axis, size in mesh.shape.items() if axis not in mesh.manual_axes
  }


def compiler_options() -> dict[str, bool] | None:
  """Options of `jax.jit` for large programs on the current target, or None.

  A function with options cannot be called inside another jitted one.
  """
  if current().platform == 'cuda':
    # Leave products to cuBLAS: it adds biases and residuals on the way, which XLA's own
    # products do not.
    return {'xla_gpu_enable_triton_gemm': False}
  return None


def _target(platform: str) -> Target:
  """The target by JAX's name of a platform, in which 'gpu' may be of any vendor."""
  if platform not in ('gpu', 'cuda', 'rocm'):
    return Target(platform)
  try:
    gpu = jax.local_devices(backend='gpu')[0]
  except RuntimeError:  # no GPU is attached
    return Target('rocm' if platform == 'rocm' else 'cuda')
  if 'cuda' not in gpu.client.platform_version:
    return Target('rocm')
  return Target('cuda', float(gpu.compute_capability))
