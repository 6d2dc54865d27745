"""Compiles one part for a device and describes the result."""

import dataclasses
import pathlib
import time
from typing import Any

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from benchmarks import arithmetic
from benchmarks.abstract_programs import Program
from benchmarks.compiled import blocks as block_programs
from benchmarks.compiled import hlo, kernels, programs, report
from benchmarks.compiled.devices import Device, topology
from benchmarks.memory_table import parse_mesh
from dicetalk_jax.models import fused, target


def compile_part(
  device: Device,
  part: str,
  count: int,
  mesh_text: str,
  *,
  blocks: bool = False,
  hlo_file: pathlib.Path | None = None,
) -> dict[str, Any]:
  """Compiles a part, and predicts its time kernel by kernel.

  Args:
    device: to compile for.
    part: a name in `programs.PARTS`.
    count: number of devices.
    mesh_text: as `--mesh`; empty for the usual one.
    blocks: compile each distinct block once.
    hlo_file: where the compiled text goes.

  Returns:
    A record for `report.table`.
  """
  default = 'fsdp=-1' if part == 'train' else 'data=-1,fsdp=1'
  mesh = parse_mesh(mesh_text or default, topology(device, count))
  program = programs.PARTS[part](device.platform, mesh)
  # The steps of the sampler are data: what is compiled is counted, one step of it.
  tflop = None if part == 'sample' else _arithmetic(program, device, mesh)

  start = time.perf_counter()
  if blocks:
    plain = program
    if part == 'train':
      # Equal blocks that are computed again are traced only once.
      plain = programs.train(device.platform, mesh, remat='none')
    record = _by_blocks(plain, device, part == 'train', tflop)
  else:
    text, memory = compiled_text(program, device)
    if hlo_file:
      hlo_file.write_text(text)
    module = hlo.parse(text)
    record = report.summary(kernels.kernels(module), device, tflop) | {
      'collectives': kernels.collective_bytes(module),
      'memory_gb': memory,
    }
  seconds = round(time.perf_counter() - start)
  return record | {'compile_seconds': seconds, 'jax': jax.__version__}


def _by_blocks(
  program: Program, device: Device, training: bool, tflop: float | None
) -> dict[str, Any]:
  """Compiles each distinct block; the record of all of them together."""
  found: list[kernels.Kernel] = []
  rows = []
  # Sharding comes with the whole program only: a block is that of one device.
  mesh = parse_mesh('fsdp=1', program.mesh.devices.flat[:1].tolist())
  counted = block_programs.count_blocks(program, device.platform)
  for block, count in tqdm(counted, unit='block', leave=False):
    with target.compiling_for(device.platform):
      alone = block_programs.block_program(block, mesh, training=training)
    text, memory = compiled_text(alone, device)
    listed = kernels.kernels(hlo.parse(text))
    own_tflop = _arithmetic(alone, device, mesh)
    own = report.summary(listed, device, own_tflop)
    shown = ('predicted_ms', 'floor_ms', 'utilisation', 'custom_share', 'kernels')
    rows.append(
      {'block': block.name, 'input': list(jax.tree.leaves(block.args)[0].shape)}
      | {'count': count}
      | {key: own[key] for key in shown}
      | {'temporaries_gb': memory['temporaries']}
    )
    found += [dataclasses.replace(k, count=k.count * count) for k in listed]
  return report.summary(found, device, tflop) | {'collectives': {}, 'blocks': rows}


def compiled_text(program: Program, device: Device) -> tuple[str, dict[str, float]]:
  """Compiles a program; its text, and its memory in 1e9 bytes."""
  with program.context(), target.compiling_for(device.platform):
    compiled = program.run.trace(*program.args).lower().compile()
  stats = compiled.memory_analysis()
  outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
  memory = {
    'arguments': round(stats.argument_size_in_bytes / 1e9, 2),
    'temporaries': round((stats.temp_size_in_bytes + outputs) / 1e9, 2),
  }
  return compiled.as_text(), memory


def _arithmetic(program: Program, device: Device, mesh: Mesh) -> float:
  """Operations of one device, in 1e12.

  Hand-written kernels cannot be counted in a trace. So they are switched off, and for
  TPUs the form for CPUs is counted.
  """
  platform = 'cuda' if device.platform == 'cuda' else 'cpu'
  with program.context(), target.compiling_for(platform), fused.kernels(False):
    return arithmetic.tflop(program.run, *program.args) / mesh.size
