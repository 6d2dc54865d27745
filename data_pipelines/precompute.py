"""Computes the features that training reads: `python -m data_pipelines.precompute
--model=DIR --data=DIR`.

All local devices share each batch. Several processes share the clips: under
`--multihost` as jax counts them, or as `--process_id` and `--num_processes` say, which
need no connection but the disk (`--process_id=$SLURM_ARRAY_TASK_ID`). A killed run goes
on where it stopped. Training with `--config.model` and `--config.data.dir` of the same
folders finds everything done.

`--records=DIR` then writes the data sets anew, with features instead of pixels, for
diffusion training elsewhere: `--config.data.dir=DIR`, and `--config.data.dataset` is
the folder that is printed.
"""

import argparse
from collections.abc import Sequence
import itertools
import pathlib
import sys

import jax

from dicetalk_jax import bundle, cli, parallel
from dicetalk_jax.component import Component
from dicetalk_jax.data import face_crops, feature_extraction
from dicetalk_jax.data.clip_source import ClipSource, data_sets
from dicetalk_jax.errors import ConfigError, WeightsError, one_sentence


def _names(text: str) -> tuple[str, ...]:
  return tuple(text.split(','))


def _parser() -> argparse.ArgumentParser:
  parser = cli.OptionParser(
    prog='python -m data_pipelines.precompute',
    description='Computes features of prepared data sets.',
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
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
    help='folders of prepared data sets, all below --data if not given',
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
    help='also writes the data sets anew below DIR: features in the records, no pixels '
    '(see docs/data.md)',
  )
  add(
    '--multihost',
    action='store_true',
    help='one process of a TPU pod, Slurm, Kubernetes or MPI job',
  )
  add('--num_processes', type=int, default=1, help='how many processes share the clips')
  add('--process_id', type=int, default=0, help='which one this is, from 0')
  return parser


def main(argv: Sequence[str]) -> None:
  """Computes what is missing, one feature after the other, and says what is
  complete.
  """
  args = _parser().parse_args(argv)
  _check(args)
  if args.records:
    from data_pipelines.builders import latent_records, tfds_writer

    tfds_writer.make_root(args.records)
  sources = [
    ClipSource(folder, split)
    for folder in args.datasets or data_sets(args.data)
    for split in args.split
  ]
  parallel.initialize(args.multihost)
  mesh = parallel.make_mesh(data=-1, fsdp=1, devices=jax.local_devices())
  shard = None if args.multihost else (args.process_id, args.num_processes)
  names = [
    *filter(
      face_crops.parse_name, args.features
    ),  # in this order: the prior is made from crops and Whisper's states
    *[
      name
      for name in feature_extraction.NETWORKS
      if name in args.features
      or (name == 'whisper' and 'prior' in args.features)
      or (args.records and name in latent_records.BLOCKS)
    ],
  ]
  networks = _networks(args.model, names, mesh)
  jobs = [
    feature_extraction.FeatureExtractor(
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
  for features, name in itertools.product(jobs, names):  # before hours of work
    features.check(name)
  for features in jobs:
    source = features.source
    if args.multihost:  # leaving early would end the job
      features.load_or_compute(*names)
    for name in names:
      state = (
        'complete'
        if features.compute_missing(name)
        else 'done here, not yet by the other processes'
      )
      print(
        f'{name} of {source.folder} ({source.split}, {len(source)} clips): {state}',
        flush=True,
      )
  if args.records:
    for _, splits in itertools.groupby(jobs, lambda features: features.source.folder):
      print(latent_records.prepare_packed(args.records, [*splits], names))


def _check(args: argparse.Namespace) -> None:
  if unknown := sorted(
    name
    for name in set(args.features) - set(feature_extraction.NETWORKS)
    if not face_crops.parse_name(name)
  ):
    raise ConfigError(
      f'--features={",".join(unknown)} is not known; choose some of '
      f'{",".join(feature_extraction.NETWORKS)}, or crops_64'
    )
  for name in ('batch', 'threads', 'clip_stride', 'num_processes'):
    if getattr(args, name) < 1:
      raise ConfigError(f'--{name}={getattr(args, name)} must be at least 1')
  if not 0 <= args.process_id < args.num_processes:
    raise ConfigError(
      f'--process_id={args.process_id} does not exist among '
      f'--num_processes={args.num_processes}; they count from 0'
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
      '--records is for one process; let all compute without it, then run once more '
      'with --records and without --multihost, --num_processes and --process_id'
    )
  if '://' in args.records:
    raise ConfigError(
      f'--records={args.records} must be on a disk; copy the folder to other places '
      'afterwards'
    )
  if args.data.resolve() in (
    where := pathlib.Path(args.records).resolve(),
    *where.parents,
  ):
    raise ConfigError(
      f'--records={args.records} lies in --data={args.data}, where its clips would '
      'count twice; name a folder outside'
    )


def _networks(
  folder: str, names: Sequence[str], mesh: jax.sharding.Mesh
) -> dict[str, Component]:
  known, wanted = (
    bundle.require(folder),
    {
      feature_extraction.NETWORKS[name]: name
      for name in names
      if not face_crops.parse_name(name)
    },
  )
  missing = {
    component: name for component, name in wanted.items() if component not in known
  }
  if missing:
    raise WeightsError(
      f'{folder} has no {" and no ".join(missing)}; put it there with python -m '
      f'convert or by training, or leave out {",".join(missing.values())} from '
      '--features'
    )
  return {component: Component.load(folder, component, mesh) for component in wanted}


if __name__ == '__main__':
  with one_sentence():
    main(sys.argv[1:])
