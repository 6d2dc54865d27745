"""Part `device`: versions, and what this device can do at most."""

import importlib.metadata
import platform
import subprocess
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.device_check.floors import H200
from benchmarks.device_check.measure import GIB
from benchmarks.device_check.parts import Context, Result
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
REPEATS = 5


def measure_device(context: Context) -> Result:
  """Measures one product and one copy, on random data."""
  device = jax.local_devices()[0]
  # CPUs compute bfloat16 in float32.
  dtype = jnp.dtype(jnp.float32 if device.platform == 'cpu' else jnp.bfloat16)
  side = 1024 if context.reduced else 8192
  copied_bytes = 2**26 if context.reduced else 2**32

  facts = versions() | {
    'platform': device.platform,
    'kind': device.device_kind,
    'count': jax.device_count(),
    'memory_gib': memory_gib(device),
  }
  product = product_tflops(side, dtype)
  copy = copy_gbytes(copied_bytes)
  return facts | {
    'product': f'{side} x {side} x {side}, {dtype.name}',
    'product_tflops': product,
    'copy': f'{copied_bytes / 2**20:g} MiB read and written',
    'copy_gbytes': copy,
    'stated_h200': H200._asdict(),
    'summary': f'{device.device_kind} x {jax.device_count()}: {product:.3g} TFLOP/s '
    f'in products ({dtype.name}), {copy:.4g} GB/s in copies',
  }


def versions() -> dict[str, Any]:
  """Of Python, packages, and the driver, as far as they are known."""
  installed = {
    distribution.name.lower(): distribution.version
    for distribution in importlib.metadata.distributions()
    if distribution.name
  }
  nvidia = sorted(name for name in installed if name.startswith('nvidia-'))
  return {
    'python': platform.python_version(),
    'packages': {name: installed[name] for name in PACKAGES if name in installed},
    'nvidia_packages': {name: installed[name] for name in nvidia},
    'runtime': ' '.join(jax.local_devices()[0].client.platform_version.split()),
    'driver': driver(),
  }


def driver() -> str:
  """The first GPU as nvidia-smi describes it; empty if there is none."""
  command = [
    'nvidia-smi',
    '--query-gpu=name,driver_version,memory.total',
    '--format=csv,noheader',
  ]
  try:
    process = subprocess.run(
      command, capture_output=True, text=True, check=False, timeout=30
    )
  except (OSError, subprocess.TimeoutExpired):
    return ''
  if process.returncode != 0:
    return ''
  return process.stdout.strip().partition('\n')[0]


def memory_gib(device: jax.Device) -> float | None:
  """The memory of the device that JAX may use."""
  limit = (device.memory_stats() or {}).get('bytes_limit')
  return limit / GIB if limit else None


def product_tflops(side: int, dtype: jnp.dtype) -> float:
  """1e12 operations per second in square products, each of the result of the last."""
  keys = jax.random.split(jax.random.key(0))
  x = jax.random.normal(keys[0], (side, side), dtype)
  weights = jax.random.normal(keys[1], (side, side), dtype)
  weights *= side**-0.5  # keeps the size of the numbers
  multiply = jax.jit(jnp.matmul)

  def call():
    y = x
    for _ in range(CALLS):
      y = multiply(y, weights)
    y.block_until_ready()

  call()
  return 2e-12 * side**3 * CALLS / laps(call, REPEATS).median


def copy_gbytes(size: int) -> float:
  """1e9 bytes per second, read and written, in a pass over `size` bytes."""
  negate = jax.jit(jnp.negative, donate_argnums=0)
  x = jnp.arange(size // 4, dtype=jnp.float32)

  def call():
    nonlocal x
    for _ in range(CALLS):
      x = negate(x)
    x.block_until_ready()

  call()
  return 2e-9 * size * CALLS / laps(call, REPEATS).median
