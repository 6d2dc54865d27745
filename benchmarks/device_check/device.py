"""Part `device`: versions, and what this device can do at most."""

import importlib.metadata
import platform
import subprocess
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.device_check.floors import H200
from benchmarks.device_check.measure import GIB
from benchmarks.device_check.parts import Context
from benchmarks.timing import laps

PACKAGES = (
  'jax',
  'jaxlib',
  'flax',
  'numpy',
  'optax',
  'orbax-checkpoint',
  'torch',
  'diffusers',
)
CALLS = 10  # in a row, so that starting them costs nothing


def run(context: Context) -> dict[str, Any]:
  """Measures one product and one copy, on random data."""
  device = jax.local_devices()[0]
  on_cpu = device.platform == 'cpu'
  dtype = jnp.float32 if on_cpu else jnp.bfloat16  # CPUs compute bfloat16 in float32
  side, size = (1024, 2**26) if context.reduced else (8192, 2**32)

  facts = versions() | {
    'platform': device.platform,
    'kind': device.device_kind,
    'count': jax.device_count(),
    'memory_gib': memory_gib(device),
  }
  product = product_tflops(side, dtype)
  copy = copy_gbytes(size)
  return facts | {
    'product': f'{side} x {side} x {side}, {jnp.dtype(dtype).name}',
    'product_tflops': product,
    'copy': f'{size / 2**20:g} MiB read and written',
    'copy_gbytes': copy,
    'stated_h200': H200._asdict(),
    'summary': f'{device.device_kind} x {jax.device_count()}: {product:.3g} TFLOP/s '
    f'in products ({jnp.dtype(dtype).name}), {copy:.4g} GB/s in copies',
  }


def versions() -> dict[str, Any]:
  """Of Python, packages, and the driver, as far as they are known."""
  found = {
    d.name.lower(): d.version for d in importlib.metadata.distributions() if d.name
  }
  return {
    'python': platform.python_version(),
    'packages': {name: found[name] for name in PACKAGES if name in found},
    'nvidia_packages': {
      k: v for k, v in sorted(found.items()) if k.startswith('nvidia-')
    },
    'runtime': ' '.join(jax.local_devices()[0].client.platform_version.split()),
    'driver': driver(),
  }


def driver() -> str:
  """The first GPU as nvidia-smi describes it; empty where there is none."""
  command = [
    'nvidia-smi',
    '--query-gpu=name,driver_version,memory.total',
    '--format=csv,noheader',
  ]
  try:
    found = subprocess.run(
      command, capture_output=True, text=True, check=False, timeout=30
    )
  except (OSError, subprocess.TimeoutExpired):
    return ''
  return found.stdout.strip().partition('\n')[0] if found.returncode == 0 else ''


def memory_gib(device: jax.Device) -> float | None:
  """What JAX may use of the device's memory."""
  limit = (device.memory_stats() or {}).get('bytes_limit')
  return limit / GIB if limit else None


def product_tflops(side: int, dtype: Any) -> float:
  """1e12 operations per second in square products, each of the result of the last."""
  keys = jax.random.split(jax.random.key(0))
  x, weights = (jax.random.normal(key, (side, side), dtype) for key in keys)
  weights *= side**-0.5  # keeps the size of the numbers
  multiply = jax.jit(jnp.matmul)

  def call():
    y = x
    for _ in range(CALLS):
      y = multiply(y, weights)
    y.block_until_ready()

  call()
  return 2e-12 * side**3 * CALLS / laps(call, 5).median


def copy_gbytes(size: int) -> float:
  """1e9 bytes per second, read and written, in a pass over `size` bytes."""
  negate = jax.jit(jnp.negative, donate_argnums=0)
  held = [jnp.arange(size // 4, dtype=jnp.float32)]

  def call():
    for _ in range(CALLS):
      held[0] = negate(held[0])
    held[0].block_until_ready()

  call()
  return 2e-9 * size * CALLS / laps(call, 5).median
