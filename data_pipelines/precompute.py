"""Computes the features that training reads.

    python -m data_pipelines.precompute --model=DIR --data=DIR

All local devices share each batch. Several processes share the clips: under
`--multihost` as jax counts them, or as `--process_id` and `--num_processes` say. The
latter need no connection but the disk (`--process_id=$SLURM_ARRAY_TASK_ID`). A killed
run resumes where it stopped. Training with `--config.model` and `--config.data.dir` of
the same folders finds everything done.

`--records=DIR` then writes the data sets again, with features instead of pixels, for
diffusion training elsewhere: with `--config.data.dir=DIR`, and the folder that is
printed as `--config.data.dataset`.
"""

import argparse
from collections.abc import Sequence
import itertools
import pathlib

import jax

from dicetalk_jax import bundle, cli, parallel
from dicetalk_jax.compiled import keep_programs
from dicetalk_jax.component import Component
from dicetalk_jax.data import face_crops, feature_extraction
from dicetalk_jax.data.clip_source import ClipSource, data_sets
from dicetalk_jax.data.feature_extraction import FeatureExtractor
from dicetalk_jax.errors import ConfigError, WeightsError


def _names(text: str) -> tuple[str, ...]:
  return tuple(text.split(','))


def _parser() -> argparse.ArgumentParser:
  parser = cli.OptionParser(
    prog='python -m data_pipelines.precompute',
    description='Computes features of prepared data sets.',
    allow_abbrev=False,
  )
  add = parser.add_argument
  add('--model', required=True, help='model folder with the networks')
  add(
    '--data',
    required=True,
    type=pathlib.Path,
    help='root of the data sets, config.data.dir; features go below',
  )
  add(
    '--datasets',
    type=_names,
    help='folders of prepared data sets; all below --data if not given',
  )
  add('--split', type=_names, default='train,val', help='splits')
  add(
    '--features',
    type=_names,
    default=','.join(feature_extraction.NETWORKS),
    help='which ones; also crops_64, or another size, for embedders with visual=crops',
  )
  add(
    '--clip_stride',
    type=int,
    default=feature_extraction.CLIP_STRIDE,
    help='frames per CLIP token, as config.data.clip_stride',
  )
  add(
    '--batch',
    type=int,
    default=feature_extraction.BATCH,
    help='frames, or windows of 30 s, per device and call',
  )
  add('--threads', type=int, default=4, help='clips read at a time')
  add(
    '--records',
    default='',
    metavar='DIR',
    help='also write the data sets again below DIR: features in the records, no pixels '
    '(see docs/data.md)',
  )
  add(
    '--multihost',
    action='store_true',
    help='this is one process of a TPU pod, Slurm, Kubernetes or MPI job',
  )
  add('--num_processes', type=int, default=1, help='processes that share the clips')
  add('--process_id', type=int, default=0, help='number of this process, from 0')
  return parser


def main(argv: Sequence[str]) -> None:
  """Computes what is missing, one feature after the other, and prints what is done."""
  # 1. Refuse what cannot work, before hours of work
  args = _parser().parse_args(argv)
  _check(args)
  keep_programs()
  if args.records:
    from data_pipelines.builders import tfds_writer

    tfds_writer.make_root(args.records)
  sources = [
    ClipSource(folder, split)
    for folder in args.datasets or data_sets(args.data)
    for split in args.split
  ]
  parallel.initialize(args.multihost)
  mesh = parallel.make_mesh(data=-1, fsdp=1, devices=jax.local_devices())
  shard = None if args.multihost else (args.process_id, args.num_processes)
  names = _features(args)
  networks = _networks(args.model, names, mesh)
  jobs = [
    FeatureExtractor(
      networks,
      source,
      args.data / 'features',
      args.clip_stride,
      shard,
      args.batch,
      args.threads,
    )
    for source in sources
  ]
  for job in jobs:
    for name in names:
      job.check(name)

  # 2. Compute
  for job in jobs:
    if args.multihost:  # a process that ends early would end the whole job
      job.load_or_compute(*names)
    for name in names:
      complete = job.compute_missing(name)
      source = job.source
      print(
        f'{name} of {source.folder} ({source.split}, {len(source)} clips): '
        f'{"complete" if complete else "done here, not yet by the other processes"}',
        flush=True,
      )

  # 3. Write records
  if args.records:
    _write_records(args.records, jobs, names)


def _features(args: argparse.Namespace) -> list[str]:
  """Lists the features to compute: first crops, then those of networks, in their order.

  The prior is made from crops and Whisper's states, so these come before it.
  """
  wanted = set(args.features)
  if 'prior' in wanted:
    wanted.add('whisper')
  if args.records:
    from data_pipelines.builders import latent_records

    wanted |= set(latent_records.BLOCKS)
  crops = [name for name in args.features if face_crops.parse_name(name)]
  return crops + [name for name in feature_extraction.NETWORKS if name in wanted]


def _write_records(
  root: str, jobs: Sequence[FeatureExtractor], names: Sequence[str]
) -> None:
  """Writes every data set below `root`, and prints its folder."""
  from data_pipelines.builders import latent_records

  for _, splits in itertools.groupby(jobs, lambda job: job.source.folder):
    print(latent_records.prepare_packed(root, [*splits], names))


def _check(args: argparse.Namespace) -> None:
  """Raises ConfigError for flags that contradict each other or make no sense."""
  unknown = sorted(
    name
    for name in set(args.features) - set(feature_extraction.NETWORKS)
    if not face_crops.parse_name(name)
  )
  if unknown:
    raise ConfigError(
      f'--features={",".join(unknown)} is not known; choose some of '
      f'{",".join(feature_extraction.NETWORKS)}, or crops_64'
    )
  for name in ('batch', 'threads', 'clip_stride', 'num_processes'):
    value = getattr(args, name)
    if value < 1:
      raise ConfigError(f'--{name} must be at least 1, got {value}')
  if not 0 <= args.process_id < args.num_processes:
    raise ConfigError(
      f'--process_id={args.process_id} must be from 0 to {args.num_processes - 1}, '
      f'because --num_processes={args.num_processes}'
    )
  if args.multihost and args.num_processes > 1:
    raise ConfigError(
      '--multihost counts the processes itself; leave out --num_processes and '
      '--process_id'
    )
  if args.records:
    _check_records(args)


def _check_records(args: argparse.Namespace) -> None:
  if args.multihost or args.num_processes > 1:
    raise ConfigError(
      '--records needs a single process; let all processes compute without it, then '
      'run once more with --records and without --multihost, --num_processes and '
      '--process_id'
    )
  if '://' in args.records:
    raise ConfigError(
      f'--records={args.records} must be on a disk; copy the folder to other places '
      'afterwards'
    )
  records = pathlib.Path(args.records).resolve()
  if args.data.resolve() in (records, *records.parents):
    raise ConfigError(
      f'--records={args.records} lies in --data={args.data}, where its clips would '
      'count twice; name a folder outside'
    )


def _networks(
  folder: str, names: Sequence[str], mesh: jax.sharding.Mesh
) -> dict[str, Component]:
  """Loads the networks of features.

  Raises:
    WeightsError: the model folder lacks one of them.
  """
  feature_of = {
    feature_extraction.NETWORKS[name]: name
    for name in names
    if not face_crops.parse_name(name)
  }
  known = bundle.require(folder)
  missing = [component for component in feature_of if component not in known]
  if missing:
    features = [feature_of[component] for component in missing]
    raise WeightsError(
      f'{folder} has no {" and no ".join(missing)}; put it there with python -m '
      f'convert or by training, or leave out {",".join(features)} from --features'
    )
  networks = {}
  for component in feature_of:
    # Embedders are trained here, and saved in float32.
    load = Component.load if component == 'embedder' else Component.load_frozen
    networks[component] = load(folder, component, mesh)
  return networks


def run() -> None:
  """Console entry."""
  cli.run(main, _parser())


if __name__ == '__main__':
  run()
