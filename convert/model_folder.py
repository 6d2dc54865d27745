"""Parts to a model folder: check all of them, then write one after the other, then
report.
"""

import argparse
from collections.abc import Mapping, Sequence
import pathlib
from typing import Any

from tqdm import tqdm

from convert import component_check, summary, torch_files
from convert import priors as priors_
from convert.component_check import BEYOND, DTYPES, KEEP, Checked, Part
from dicetalk_jax import bundle
from dicetalk_jax.errors import WeightsError
from dicetalk_jax.files import atomic_folder, refuse_existing, require_room


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """What every command that makes a model folder takes."""
  parser.add_argument(
    'source', metavar='SRC', type=pathlib.Path, help='the downloaded folder'
  )
  parser.add_argument(
    'destination', metavar='DST', type=pathlib.Path, help='the model folder to make'
  )
  parser.add_argument(
    '--dtype',
    choices=(KEEP, *DTYPES),
    default=KEEP,
    help='type of the stored parameters (default: that of the files)',
  )
  parser.add_argument(
    '--overwrite',
    action='store_true',
    help='replace a model folder that is there already',
  )


def refuse(args: argparse.Namespace) -> None:
  """Raises InputError if the destination is taken; call it before reading anything."""
  refuse_existing(args.destination, args.overwrite, bundle.INDEX)


def model_folder(
  args: argparse.Namespace,
  parts: Sequence[Part],
  settings: Mapping[str, Any] | None = None,
  priors: priors_.Found | None = None,
  notes: Sequence[str] = (),
  learned_on: str = bundle.RELEASED,
) -> None:
  """Checks the parts, writes the folder `args.destination`, prints the report.

  `learned_on` is the fingerprint of the embedder whose priors the emotion model learned
  on; files of priors that do not name their embedder are taken for priors of that one.

  Raises:
    WeightsError: names all that is wrong with all parts; nothing is written then.
    InputError: the folder cannot be written.
  """
  ready = _check(parts, args.dtype)
  require_room(args.destination, sum(_size(checked, args.dtype) for checked in ready))
  sources = {part.name: torch_files.sha256(part.files) for part in parts}
  rows = []
  with atomic_folder(args.destination) as folder:
    for checked in (bar := tqdm(ready, desc='writing', unit='component', disable=None)):
      bar.set_postfix_str(name := checked.part.name)
      params = component_check.save(
        folder, checked, args.dtype, sources[name], learned_on
      )
      rows.append(
        summary.row(name, len(checked.part.tensors) + len(checked.part.aside), params)
      )
      del params
    bundle.save_settings(folder, settings or {})
    if priors:
      priors_.save(folder, priors, untold=learned_on)
      rows.append(priors.row())
  surplus = [
    f'{x.part.name}: not known to the model and left aside: {", ".join(x.left_over)}'
    for x in ready
    if x.left_over
  ]
  digests = {
    name: digest for files in sources.values() for name, digest in files.items()
  }
  digests |= torch_files.sha256(priors.files) if priors else {}
  summary.show(
    rows, digests, [*(note for part in parts for note in part.notes), *surplus, *notes]
  )
  print(f'wrote {args.destination}')


def _check(parts: Sequence[Part], dtype: str) -> list[Checked]:
  with tqdm(
    total=sum(len(part.tensors) for part in parts),
    desc='checking',
    unit='tensor',
    disable=None,
  ) as bar:
    ready = [component_check.check(part, dtype, bar.update) for part in parts]
  if problems := [line for checked in ready for line in checked.problems]:
    count, lines = (
      ('one tensor does', problems)
      if len(problems) == 1
      else (f'{len(problems)} tensors do', [f'\n  {line}' for line in problems])
    )
    remedy = (
      'choose another --dtype'
      if all(BEYOND in x for x in problems)
      else 'use whole files of one release'
    )
    raise WeightsError(
      f'{count} not fit, so nothing was written; {remedy}: {"".join(lines)}'
    )
  return ready


def _size(checked: Checked, dtype: str) -> int:
  """Bytes that the component will take on disk, at most."""
  tensors = [checked.part.tensors[key] for key in checked.keys.values()]
  return sum(
    x.numel() * component_check.stored_dtype(x, dtype).itemsize for x in tensors
  )
