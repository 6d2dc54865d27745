"""Prepares the clips of a corpus: in this process, in a pool, or on a Beam worker.

This module does not import TFDS, so that worker processes start fast.
"""

import collections
from collections.abc import Iterator, Sequence
import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import os
from typing import Any

from data_pipelines import preprocess
from data_pipelines.clip_cache import ClipCache, Outcome
from data_pipelines.corpora.clip_file import ClipFile, Skipped
from data_pipelines.corpora.file_tree import Tree
from data_pipelines.preprocess import CorpusConfig
from dicetalk_jax import interrupt
from dicetalk_jax.errors import InputError, shorten_notes


@dataclasses.dataclass(frozen=True)
class Worker:
  """Prepares one clip after another, with the settings that all of them share."""

  config: CorpusConfig
  tree: Tree
  expressions: Tree | None
  cache: ClipCache

  def name(self, clip: ClipFile) -> str:
    """Names everything that the result depends on.

    A file whose size changes counts as another clip.
    """
    parts = [
      dataclasses.asdict(self.config),
      dataclasses.asdict(clip),
      sizes(clip, self.tree, self.expressions),
    ]
    return json.dumps(parts, sort_keys=True)

  def __call__(self, clip: ClipFile) -> Outcome:
    """Prepares a clip, or finds it done."""
    name = self.name(clip)
    outcome = self.cache.outcome(name)
    if outcome and outcome.final:
      return outcome
    detector = _detector(self.config.detector)
    records = preprocess.records(
      clip, self.config, self.tree, self.expressions, detector
    )
    return self.cache.store(name, records)

  def give_up(self, clip: ClipFile) -> Outcome:
    """Records that a clip ended its process."""
    skipped = Skipped(clip.clip_id, 'the process that read it died')
    return self.cache.store(self.name(clip), [skipped])

  def examples(self, clip: ClipFile) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (key, record) of a clip that was prepared.

    Whatever the report lists as left out is not tried again.
    """
    name = self.name(clip)
    outcome = self.cache.outcome(name)
    yield from self.cache.records(name, outcome or self(clip))


def sizes(clip: ClipFile, tree: Tree, expressions: Tree | None) -> list[int]:
  """Gives the bytes of the files of a clip; a file counts as changed if they change."""
  return [
    _size(tree, clip.video),
    _size(tree, clip.audio),
    _size(expressions, clip.expression),
  ]


def _size(tree: Tree | None, path: str) -> int:
  try:
    return tree.size(path) if tree and path else 0
  except FileNotFoundError:
    return -1


@functools.lru_cache(maxsize=1)
def _detector(name: str) -> preprocess.Detector:
  return preprocess.make_detector(name)


def prepare_clips(
  worker: Worker, clips: Sequence[ClipFile], processes: int | None
) -> Iterator[tuple[ClipFile, Outcome]]:
  """Prepares clips in any order.

  A clip whose process dies (its decoder crashes, or memory runs out) is tried once more
  alone, and then left out. The other clips continue.

  Args:
    worker: how to prepare a clip.
    clips: the clips.
    processes: number of worker processes, all cores by default. 1 means this process,
      which then dies with its clip.
  """
  if processes == 1:
    for clip in clips:
      yield clip, worker(clip)
    return
  if not clips:
    return
  deadly = []
  processes = min(processes or os.cpu_count() or 1, len(clips))
  for clip, outcome in _in_pool(worker, clips, processes):
    if outcome:
      yield clip, outcome
    else:
      deadly.append(clip)
  for clip, outcome in _in_pool(worker, deadly, processes=1):
    yield clip, outcome or worker.give_up(clip)


def _in_pool(
  worker: Worker, clips: Sequence[ClipFile], processes: int
) -> Iterator[tuple[ClipFile, Outcome | None]]:
  """Prepares clips in processes; the outcome is None if a clip ended its process."""
  try:
    import pebble
  except ImportError as error:
    raise InputError(
      'several workers need pebble, which is missing; pip install '
      "'dicetalk-jax[train]' adds it, or set --workers=1"
    ) from error
  waiting = collections.deque(clips)
  running: dict[concurrent.futures.Future[Outcome], ClipFile] = {}
  # spawn, since forking a process that runs JAX's threads may hang
  context = multiprocessing.get_context('spawn')
  pool = pebble.ProcessPool(processes, initializer=_start_process, context=context)
  try:
    while waiting or running:
      while waiting and len(running) < 2 * processes:
        clip = waiting.popleft()
        with interrupt.shielded():  # the first call starts the processes
          running[pool.schedule(worker, (clip,))] = clip
      done, _ = concurrent.futures.wait(
        running, return_when=concurrent.futures.FIRST_COMPLETED
      )
      for future in done:
        clip = running.pop(future)
        try:
          outcome = future.result()
        except pebble.ProcessExpired:
          outcome = None
        yield clip, outcome
  finally:
    pool.stop()
    # One that is still starting would find nothing to start with, and say so at length.
    for process in multiprocessing.active_children():
      process.kill()
    pool.join()


def _start_process() -> None:
  """Prepares a worker process.

  Its threads must not compete with the other processes for cores, and it must not take
  an accelerator for itself.
  """
  import cv2
  import jax

  shorten_notes()
  cv2.setNumThreads(1)
  jax.config.update('jax_platforms', 'cpu')
  flags = os.environ.get('XLA_FLAGS', '')
  os.environ['XLA_FLAGS'] = f'--xla_cpu_multi_thread_eigen=false {flags}'
