"""The work on clips of a corpus, one after another in any process: here, in a pool, or
on a Beam worker.

No import of TFDS, so that working processes start fast.
"""

import collections
from collections.abc import Iterator, Sequence
import concurrent.futures
from concurrent.futures.process import BrokenProcessPool
import dataclasses
import functools
import json
import multiprocessing
import os
import signal
from typing import Any

from data_pipelines import preprocess
from data_pipelines.clip_cache import ClipCache, Outcome
from data_pipelines.corpora.clip_file import ClipFile, Skipped
from data_pipelines.corpora.file_tree import Tree
from data_pipelines.preprocess import CorpusConfig

_Executor = concurrent.futures.ProcessPoolExecutor


@dataclasses.dataclass(frozen=True)
class Worker:
  """What is the same for all clips of a preparation."""

  config: CorpusConfig
  tree: Tree
  expressions: Tree | None
  cache: ClipCache

  def name(self, clip: ClipFile) -> str:
    """Everything that the result depends on; another file of another size is another
    clip.
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
    if (outcome := self.cache.outcome(name)) and outcome.final:
      return outcome
    return self.cache.store(
      name,
      preprocess.records(
        clip, self.config, self.tree, self.expressions, _detector(self.config.detector)
      ),
    )

  def give_up(self, clip: ClipFile) -> Outcome:
    """Notes that a clip ended its process."""
    return self.cache.store(
      self.name(clip), [Skipped(clip.clip_id, 'the process that read it died')]
    )

  def examples(self, clip: ClipFile) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, record) of a clip, as the report tells it: what is left out is not tried
    again.
    """
    name = self.name(clip)
    yield from self.cache.records(name, self.cache.outcome(name) or self(clip))


def sizes(clip: ClipFile, tree: Tree, expressions: Tree | None) -> list[int]:
  """Bytes of the files of a clip: a file counts as changed where its size has."""
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


def _start():
  """In a working process: the processes share the cores already, and Ctrl-C is for
  the one that started them.
  """
  import cv2

  cv2.setNumThreads(1)
  signal.signal(signal.SIGINT, signal.SIG_IGN)


def run(
  worker: Worker, clips: Sequence[ClipFile], processes: int | None
) -> Iterator[tuple[ClipFile, Outcome]]:
  """Prepares clips in any order.

  A clip whose process dies (a decoder that crashes, or no memory left) is tried once
  more alone and then left out; the others go on.

  Args:
    worker: how.
    clips: which.
    processes: how many work, all cores by default; 1 works in this one, which then dies
      with its clip.
  """
  if processes == 1:
    for clip in clips:
      yield clip, worker(clip)
    return
  if not clips:
    return
  processes = min(processes or os.cpu_count() or 1, len(clips))
  waiting, running = collections.deque(clips), {}
  pool = _pool(processes)
  try:
    while waiting or running:
      broken = False
      while waiting and len(running) < 2 * processes and not broken:
        clip = waiting.popleft()
        try:
          running[pool.submit(worker, clip)] = clip
        except BrokenProcessPool:
          waiting.appendleft(clip)
          broken = True
      done, _ = concurrent.futures.wait(
        running, return_when=concurrent.futures.FIRST_COMPLETED
      )
      if broken or any(
        isinstance(future.exception(), BrokenProcessPool) for future in done
      ):
        pool = _replaced(pool, processes)
        suspects, running = list(running.values()), {}
        for clip in suspects:
          yield clip, _alone(worker, clip)
        continue
      for future in done:
        yield running.pop(future), future.result()
  finally:
    pool.shutdown(wait=True, cancel_futures=True)


def _pool(processes: int) -> _Executor:
  # spawn, since forking a process that runs JAX's threads may hang
  return _Executor(
    processes, mp_context=multiprocessing.get_context('spawn'), initializer=_start
  )


def _replaced(pool: _Executor, processes: int) -> _Executor:
  pool.shutdown(wait=True, cancel_futures=True)
  return _pool(processes)


def _alone(worker: Worker, clip: ClipFile) -> Outcome:
  if (outcome := worker.cache.outcome(worker.name(clip))) and outcome.final:
    return outcome
  with _pool(1) as pool:
    try:
      return pool.submit(worker, clip).result()
    except BrokenProcessPool:
      return worker.give_up(clip)
