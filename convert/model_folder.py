"""Parts to a model folder: checks all of them, then writes one after the other."""

import argparse
from collections.abc import Mapping, Sequence
import pathlib
from typing import Any

from tqdm import tqdm

from convert import component_check, summary, torch_files
from convert import priors as priors_
from convert.component_check import DTYPES, KEEP, OUT_OF_RANGE, Checked, Part
from dicetalk_jax import bundle
from dicetalk_jax.errors import WeightsError
from dicetalk_jax.files import atomic_folder, refuse_existing, require_room


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments of every command that makes a model folder."""
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
    help='dtype of the stored parameters (default: the dtype of the files)',
  )
  parser.add_argument(
    '--overwrite', action='store_true', help='replace an existing model folder'
  )


def refuse(args: argparse.Namespace) -> None:
  """Raises InputError if the destination exists; call it before reading anything."""
  refuse_existing(args.destination, args.overwrite, bundle.INDEX)


def model_folder(
  args: argparse.Namespace,
  parts: Sequence[Part],
  settings: Mapping[str, Any] | None = None,
  priors: priors_.Found | None = None,
  notes: Sequence[str] = (),
  learned_on: str = bundle.RELEASED,
) -> None:
  """Checks the parts, writes the folder `args.destination`, prints the summary.

  Args:
    args: of the command, with the arguments of `add_arguments`.
    parts: the components.
    settings: of the model.
    priors: emotion priors to add.
    notes: further lines for the summary.
    learned_on: fingerprint of the embedder whose priors the emotion model learned on.
      Files of priors that do not name their embedder are assigned to it, too.

  Raises:
    WeightsError: names everything that is wrong with all parts. Nothing is written.
    InputError: the folder cannot be written.
  """
  # 1. Refuse what cannot become a model
  checked_parts = _check(parts, args.dtype)
  require_room(args.destination, sum(_size(x, args.dtype) for x in checked_parts))
  sources = {part.name: torch_files.sha256(part.files) for part in parts}

  # 2. Write one component after the other
  rows = []
  with atomic_folder(args.destination) as folder:
    bar = tqdm(checked_parts, desc='writing', unit='component', disable=None)
    for checked in bar:
      name = checked.part.name
      bar.set_postfix_str(name)
      params = component_check.save(
        folder, checked, args.dtype, sources[name], learned_on
      )
      read = len(checked.part.tensors) + len(checked.part.ignored)
      rows.append(summary.row(name, read, params))
      del params
    bundle.save_settings(folder, settings or {})
    if priors:
      priors_.save(folder, priors, default_embedder=learned_on)
      rows.append(priors.row())

  # 3. Say what was written and what was not
  digests: dict[str, str] = {}
  for files in sources.values():
    digests |= files
  if priors:
    digests |= torch_files.sha256(priors.files)
  part_notes = [note for part in parts for note in part.notes]
  ignored = [
    f'{x.part.name}: unknown to the model and ignored: {", ".join(x.left_over)}'
    for x in checked_parts
    if x.left_over
  ]
  summary.show(rows, digests, [*part_notes, *ignored, *notes])
  print(f'wrote {args.destination}')


def _check(parts: Sequence[Part], dtype: str) -> list[Checked]:
  """Checks all parts, and raises one WeightsError for all their problems."""
  total = sum(len(part.tensors) for part in parts)
  with tqdm(total=total, desc='checking', unit='tensor', disable=None) as bar:
    checked_parts = [component_check.check(part, dtype, bar.update) for part in parts]
  problems = [line for checked in checked_parts for line in checked.problems]
  if not problems:
    return checked_parts
  if all(OUT_OF_RANGE in line for line in problems):
    remedy = 'choose another --dtype'
  else:
    remedy = 'use whole files of one release'
  if len(problems) == 1:
    count = 'one tensor does'
    details = f' {problems[0]}'
  else:
    count = f'{len(problems)} tensors do'
    details = ''.join(f'\n  {line}' for line in problems)
  raise WeightsError(f'{count} not fit, so nothing was written; {remedy}:{details}')


def _size(checked: Checked, dtype: str) -> int:
  """Bytes that the component takes on disk, at most."""
  tensors = [checked.part.tensors[key] for key in checked.keys.values()]
  return sum(
    x.numel() * component_check.stored_dtype(x, dtype).itemsize for x in tensors
  )
