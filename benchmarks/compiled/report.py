"""Predicted times of the kernels of a program, as a record and as a table."""

from collections.abc import Iterable
import dataclasses
from typing import Any

from benchmarks.compiled.devices import Device
from benchmarks.compiled.kernels import Kernel

# The share of the arithmetic of a plain product that other kernels reach. Those of
# products are measured with the device; the others are assumptions: what is published
# of cuDNN's attention and convolutions on Hopper, and of Pallas's products.
DERATED = {'attention': 0.55, 'convolution': 0.75, 'pallas': 0.75}
# Shorter kernels of a GPU take this long all the same, in ms.
LAUNCH = 0.002
LARGEST = 20


@dataclasses.dataclass(frozen=True)
class Cost:
  """Predicted ms of a kernel, all runs together.

  Attributes:
    ideal: the larger of arithmetic and memory, at the rates of the device.
    derated: with library and hand-written kernels at a share of the arithmetic, and the
      shortest time of a kernel.
  """

  ideal: float
  derated: float


def cost(kernel: Kernel, device: Device) -> Cost:
  """Predicts the time of a kernel."""
  arithmetic = kernel.flop / device.tflops / 1e9
  memory = kernel.nbytes / device.gbytes / 1e6
  if device.platform == 'tpu':
    if kernel.cycles is not None:
      estimate = kernel.count * kernel.cycles / device.ghz / 1e6
      return Cost(estimate, estimate)
    shortest = 0.0
  else:
    shortest = LAUNCH
  share = DERATED.get(kernel.kind, 1.0) if kernel.is_custom else 1.0
  return Cost(
    ideal=kernel.count * max(arithmetic, memory),
    derated=kernel.count * max(arithmetic / share, memory, shortest),
  )


def summary(
  kernels: Iterable[Kernel], device: Device, tflop: float | None = None
) -> dict[str, Any]:
  """Sums by kind, and the largest kernels.

  Args:
    kernels: of the program.
    device: that it is compiled for.
    tflop: the arithmetic of the program as it is traced; None: that of its kernels.
  """
  kernels = list(kernels)
  if tflop is None:
    tflop = sum(k.count * k.flop for k in kernels) / 1e12
  costs = [cost(kernel, device) for kernel in kernels]
  floor = tflop / device.tflops * 1e3
  ideal = sum(c.ideal for c in costs)
  derated = sum(c.derated for c in costs)
  custom = sum(c.derated for k, c in zip(kernels, costs) if k.is_custom)
  kinds: dict[str, dict[str, float]] = {}
  for kernel, c in zip(kernels, costs):
    row = kinds.setdefault(
      kernel.kind, {'kernels': 0, 'gbytes': 0, 'tflop': 0, 'ms': 0, 'derated_ms': 0}
    )
    row['kernels'] += kernel.count
    row['gbytes'] += kernel.count * kernel.nbytes / 1e9
    row['tflop'] += kernel.count * kernel.flop / 1e12
    row['ms'] += c.ideal
    row['derated_ms'] += c.derated
  order = sorted(zip(kernels, costs), key=lambda pair: -pair[1].ideal)
  return _rounded(
    {
      'kernels': sum(k.count for k in kernels),
      'gbytes': sum(k.count * k.nbytes for k in kernels) / 1e9,
      'tflop': tflop,
      'floor_ms': floor,
      'predicted_ms': ideal,
      'predicted_ms_derated': derated,
      'utilisation': _share(floor, ideal),
      'utilisation_derated': _share(floor, derated),
      'custom_share': _share(custom, derated),
      'kinds': dict(sorted(kinds.items())),
      'largest': [
        {
          'kernel': kernel.name,
          'kind': kernel.kind,
          'count': kernel.count,
          'ms': c.ideal,
          'source': kernel.source[-80:],
        }
        for kernel, c in order[:LARGEST]
      ],
    }
  )


def _share(part: float, whole: float) -> float:
  """A block may have nothing to do."""
  return part / whole if whole else 0.0


def _rounded(value: Any) -> Any:
  """Four significant digits: more would only look exact."""
  if isinstance(value, dict):
    return {key: _rounded(entry) for key, entry in value.items()}
  if isinstance(value, list):
    return [_rounded(entry) for entry in value]
  return float(f'{value:.4g}') if isinstance(value, float) else value


def table(record: dict[str, Any]) -> str:
  """The record as lines for a terminal."""
  lines = [
    f'{record["part"]} on {record["target"]}: predicted '
    f'{record["predicted_ms"]:.1f} ms, {record["utilisation"]:.0%} of peak; '
    f'derated {record["predicted_ms_derated"]:.1f} ms, '
    f'{record["utilisation_derated"]:.0%}; arithmetic {record["floor_ms"]:.1f} ms',
    f'{"kind":12} {"kernels":>8} {"GB":>8} {"TFLOP":>8} {"ms":>8} {"derated":>8}',
  ]
  for kind, row in record['kinds'].items():
    lines.append(
      f'{kind:12} {row["kernels"]:8.0f} {row["gbytes"]:8.1f} {row["tflop"]:8.1f} '
      f'{row["ms"]:8.1f} {row["derated_ms"]:8.1f}'
    )
  lines.append(
    f'{"together":12} {record["kernels"]:8.0f} {record["gbytes"]:8.1f} '
    f'{"":8} {record["predicted_ms"]:8.1f} {record["predicted_ms_derated"]:8.1f}'
  )
  for name, (count, nbytes) in record['collectives'].items():
    lines.append(f'{name}: {count} of {nbytes / 1e9:.2f} GB in all')
  memory = record.get('memory_gb')
  if memory:
    lines.append('GB: ' + ', '.join(f'{key} {size}' for key, size in memory.items()))
  return '\n'.join(lines)


def comparison(old: dict[str, Any], new: dict[str, Any]) -> str:
  """What changed from one record to another, kind by kind."""
  lines = [f'{"ms":12} {"before":>9} {"after":>9} {"change":>9}']
  for kind in sorted(old['kinds'].keys() | new['kinds'].keys()):
    before = old['kinds'].get(kind, {}).get('ms', 0.0)
    after = new['kinds'].get(kind, {}).get('ms', 0.0)
    lines.append(f'{kind:12} {before:9.1f} {after:9.1f} {after - before:+9.1f}')
  before, after = old['predicted_ms'], new['predicted_ms']
  lines.append(f'{"together":12} {before:9.1f} {after:9.1f} {after - before:+9.1f}')
  lines.append(f'kernels: {old["kernels"]} before, {new["kernels"]} after')
  return '\n'.join(lines)
