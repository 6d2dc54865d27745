"""Accelerators that need not be there: their facts, and meshes to compile for.

`configure` comes before anything of JAX is imported.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
from typing import Any

from dicetalk_jax.errors import ConfigError

FOLDER = pathlib.Path(__file__).parent.parent / 'targets'


@dataclasses.dataclass(frozen=True)
class Device:
  """What predictions are made of.

  Attributes:
    name: such as 'h200'.
    platform: 'cuda' or 'tpu'.
    tflops: 1e12 operations per second of bfloat16 products.
    gbytes: 1e9 bytes per second of copies.
    memory_gb: 1e9 bytes.
    link_gbytes: 1e9 bytes per second from device to device.
    source: of these figures.
    ghz: clock of a TPU.
    file: description of a GPU for its compiler.
    topology, grids: names for the compiler for TPU, by number of devices.
  """

  name: str
  platform: str
  tflops: float
  gbytes: float
  memory_gb: float
  link_gbytes: float
  source: str
  ghz: float = 0.0
  file: str = ''
  topology: str = ''
  grids: dict[str, str] = dataclasses.field(default_factory=dict)


@functools.cache
def known() -> dict[str, Device]:
  """All devices by name."""
  facts = json.loads((FOLDER / 'devices.json').read_text())
  return {name: Device(name, **values) for name, values in facts.items()}


def configure(device: Device) -> None:
  """Sets the environment of this process for the compiler of a device.

  Raises:
    ConfigError: the compiler is not installed.
  """
  os.environ['JAX_PLATFORMS'] = 'cpu'
  if device.platform == 'tpu':
    _require('libtpu', device)
    os.environ['TPU_SKIP_MDS_QUERY'] = '1'
    return
  _require('jax_plugins.xla_cuda13', device)
  packages = pathlib.Path(
    importlib.util.find_spec('jax_plugins').submodule_search_locations[0]
  )
  tools = packages.parent / 'nvidia' / 'cu13'
  # Without a GPU nothing can be timed, so nothing is tuned.
  flags = f'--xla_gpu_autotune_level=0 --xla_gpu_cuda_data_dir={tools}'
  os.environ['XLA_FLAGS'] = f'{flags} {os.environ.get("XLA_FLAGS", "")}'
  os.environ['PATH'] = f'{tools / "bin"}:{os.environ["PATH"]}'


def _require(module: str, device: Device) -> None:
  try:
    found = importlib.util.find_spec(module)
  except ModuleNotFoundError:
    found = None
  if found is None:
    kind = {'cuda': 'gpu', 'tpu': 'tpu'}[device.platform]
    raise ConfigError(
      f'this environment has no compiler for {device.name}; run '
      f'`make compiler-{kind}`, then use .compiler-{kind}/bin/python'
    )


def topology(device: Device, count: int) -> list[Any]:
  """Devices to compile for, `count` of them.

  Raises:
    ConfigError: the compiler does not know so many.
  """
  from jax.experimental import topologies

  if device.platform == 'cuda':
    _assume_cudnn()
    return list(
      topologies.get_topology_desc(
        platform='cuda',
        topology_name=device.name,
        target_config=(FOLDER / device.file).read_text(),
        topology=f'1x1x{count}',
      ).devices
    )
  if str(count) not in device.grids:
    raise ConfigError(f'--devices={count}: choose one of {", ".join(device.grids)}')
  name = f'{device.topology}:{device.grids[str(count)]}'
  found = topologies.get_topology_desc(platform='tpu', topology_name=name).devices
  return list(found)[:count]


def _assume_cudnn() -> None:
  """Fused attention asks for the version of a library that is not loaded here."""
  from jax._src.cudnn import fused_attention_stablehlo

  fused_attention_stablehlo.check_cudnn_version = lambda: 91000
