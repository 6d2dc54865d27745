"""TFDS builders of the real corpora: one builder for all, and a walker for each.

First, many processes prepare clips into a cache of finished clips. Then their records
are written. With a Beam runner each of the two steps is a pipeline of the same
functions.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import copy
import dataclasses
import functools
import json
import os
import shlex
import tempfile
from typing import Any

from etils import epath
import tensorflow_datasets as tfds
from tensorflow_datasets.core.writer import ExampleWriter
import tqdm

from data_pipelines.builders import corpus_plan, corpus_workers, tfds_writer
from data_pipelines.builders.corpus_plan import Plan
from data_pipelines.builders.corpus_report import Report
from data_pipelines.builders.corpus_workers import Worker
from data_pipelines.clip_cache import ClipCache, Outcome
from data_pipelines.corpora import hdtf
from data_pipelines.corpora.clip_file import ClipFile, reasons
from data_pipelines.preprocess import NO_ROOM, CorpusConfig
from dicetalk_jax.errors import ConfigError, DataError, InputError


@dataclasses.dataclass(eq=False, repr=False)
class BuilderConfig(tfds.core.BuilderConfig):
  """Carries the settings; a data set's folder is named after them and the clips.

  `youtube` gives the YouTube video by `video_id`, see `ClipSource.youtube_ids`.
  """

  settings: CorpusConfig | None = None
  youtube: Mapping[str, str] | None = None

  def __repr__(self) -> str:
    return self.name


class _Writer(ExampleWriter):
  """Writes shards for other places than disks to a disk, and copies them.

  ArrayRecord's own writer knows disks only.
  """

  def write(self, path, examples):
    if '://' not in os.fspath(path):
      return super().write(path, examples)
    with tempfile.TemporaryDirectory() as folder:
      shard = epath.Path(folder) / 'shard'
      super().write(shard, examples)
      shard.copy(path, overwrite=True)
      return None


class Corpus(  # type: ignore[call-arg]  # mypy does not see the parameter of TFDS
  tfds.core.GeneratorBasedBuilder, skip_registration=True
):
  """Makes the records `talking_clip` of a real corpus.

  The attributes are set before it is prepared.

  Attributes:
    worker: prepares clips.
    clips: by split.
    counts: number of records by split, for the bar.
    manifests: lists of clips by split, if a Beam pipeline writes the records.
  """

  VERSION = tfds.core.Version('1.0.0')
  worker: Worker
  clips: Mapping[str, list[ClipFile]]
  counts: Mapping[str, int]
  manifests: Mapping[str, str] | None = None

  @property
  def settings(self) -> CorpusConfig:
    return self.builder_config.settings

  def _info(self) -> tfds.core.DatasetInfo:
    metadata = {'settings': dataclasses.asdict(self.settings)}
    if self.builder_config.youtube is not None:
      metadata['youtube'] = dict(self.builder_config.youtube)
    return tfds.core.DatasetInfo(
      builder=self,
      features=self.settings.spec.features(),
      metadata=tfds.core.MetadataDict(metadata),
    )

  def _example_writer(self) -> ExampleWriter:
    return _Writer(self.info.file_format)

  def _split_generators(self, dl_manager) -> dict[str, Any]:
    del dl_manager  # nothing is downloaded
    return {split: self._generate_examples(split) for split in self.clips}

  def _generate_examples(self, split: str) -> Any:
    """Yields (key, record) of all clips of a split.

    With Beam the result is a transform that makes them.
    """
    if self.manifests:
      import apache_beam as beam

      return _clips(self.manifests[split]) | beam.FlatMap(self.worker.examples)
    records = (
      example for clip in self.clips[split] for example in self.worker.examples(clip)
    )
    return tqdm.tqdm(
      records, f'records of {split}', self.counts[split], unit='clip', mininterval=1
    )


class Mead(Corpus):
  """MEAD: eight emotions at three levels, acted."""


class Hdtf(Corpus):
  """HDTF: speeches in high resolution."""


class Voxceleb2(Corpus):
  """VoxCeleb2: speech of thousands of people."""


class Folder(Corpus):
  """A user's own clips."""


BUILDERS: dict[str, type[Corpus]] = {
  'mead': Mead,
  'hdtf': Hdtf,
  'voxceleb2': Voxceleb2,
  'folder': Folder,
}


def _manifest(cache: ClipCache, name: str, clips: Sequence[ClipFile]) -> str:
  """Writes one JSON line per clip, and returns the path.

  The description of a Beam pipeline itself must not hold a million clips.
  """
  lines = [f'{json.dumps(dataclasses.asdict(clip))}\n' for clip in clips]
  return cache.write_text(f'{name}.jsonl', ''.join(lines))


def _read_clip(line: str) -> ClipFile:
  fields = json.loads(line)
  if fields['crop']:
    fields['crop'] = tuple(fields['crop'])
  return ClipFile(**fields)


def _clips(manifest: str) -> Any:
  """Makes a Beam transform that reads the clips of a manifest."""
  import apache_beam as beam

  # Reshuffled, so that any worker may take any clip, however short the list is
  return beam.io.ReadFromText(manifest) | beam.Map(_read_clip) | beam.Reshuffle()


def prepare_corpus(
  plan: Plan,
  data_dir: str | os.PathLike,
  *,
  workers: int | None = None,
  beam_runner: str = '',
  beam_options: str = '',
  keep_work: bool = False,
) -> tuple[epath.Path, Report]:
  """Prepares a corpus as ArrayRecord files, unless it has been prepared before.

  A killed run resumes: clips that are done lie in `<data_dir>/<corpus>/work` until the
  data set is whole. While another process prepares the corpus with the same settings,
  this one waits, and finds what is done.

  Args:
    plan: which clips, and how.
    data_dir: root of all data sets. For Beam, a place that all workers reach.
    workers: processes, all cores by default. They are spawned, so a script must call
      this under `if __name__ == '__main__'`. 1 means the calling process. The records
      do not depend on it.
    beam_runner: such as 'DirectRunner'; '' works without Beam.
    beam_options: flags of the Beam pipeline in one string.
    keep_work: keeps the finished clips for another preparation with the same settings.

  Returns:
    The folder of the data set, for `ClipSource`, with `report.json` and `skipped.csv`;
    and the report.

  Raises:
    InputError: `data_dir` cannot be written, or a disk is full.
    DataError: no training clip could be prepared.
    ConfigError: Beam is asked for and not installed.
  """
  data_dir = tfds_writer.make_root(data_dir)
  corpus = plan.config.corpus
  youtube = hdtf.youtube_ids(plan.tree) if corpus == 'hdtf' else None
  builder = BUILDERS[corpus](
    data_dir=data_dir,
    config=BuilderConfig(name=plan.name, settings=plan.config, youtube=youtube),
    file_format='array_record',
  )
  folder = epath.Path(builder.data_dir)
  work = f'{data_dir}/{corpus}/work/{plan.work_name}'
  prepared = _prepared(folder)
  if prepared:
    return folder, prepared
  described = f'{corpus} with these settings in {data_dir}'
  with _refuse_full_disk(data_dir), tfds_writer.locked(work, described):
    prepared = _prepared(folder)  # by another process meanwhile
    if prepared:
      with contextlib.suppress(OSError):
        os.rmdir(work)  # it is empty, if it was made for the lock
      return folder, prepared
    cache = ClipCache(work)
    return folder, _prepare(
      builder, plan, cache, workers, beam_runner, beam_options, keep_work
    )


def _prepared(folder: epath.Path) -> Report | None:
  """The report of a data set that is whole; None if it is not."""
  if not all((folder / name).exists() for name in ('dataset_info.json', 'report.json')):
    return None
  report = Report.load(folder)
  note = (
    'this data set was prepared before; files that changed without changing their '
    f'size are not noticed: to prepare it again, delete {folder}'
  )
  return dataclasses.replace(report, notes=(*report.notes, note))


def _prepare(
  builder: Corpus,
  plan: Plan,
  cache: ClipCache,
  workers: int | None,
  beam_runner: str,
  beam_options: str,
  keep_work: bool,
) -> Report:
  corpus = plan.config.corpus
  worker = Worker(plan.config, plan.tree, plan.expressions, cache)

  # 1. Prepare the clips
  beam_config = _beam_config(beam_runner, beam_options) if beam_runner else {}
  prepare_clips: _PrepareClips
  if beam_config:
    prepare_clips = functools.partial(_prepare_in_beam, **beam_config)
  else:
    prepare_clips = functools.partial(corpus_workers.prepare_clips, processes=workers)
  outcomes = dict(_prepare_all(worker, plan, prepare_clips))
  usable = {clip_id for clip_id, outcome in outcomes.items() if outcome.keys}
  by_split, notes = corpus_plan.prepared_splits(plan, usable)
  report = Report.of(plan, outcomes, by_split, notes)
  if 'train' not in report.splits:
    path = cache.write_text('skipped.csv', report.csv())
    raise DataError(
      f'no clip of {corpus} could be prepared for training '
      f'({reasons(report.skipped)}); see {path}'
    )

  # 2. Write their records
  builder.worker = worker
  builder.clips = by_split
  builder.counts = {split: counts['clips'] for split, counts in report.splits.items()}
  if beam_config:
    builder.manifests = {
      split: _manifest(cache, split, clips) for split, clips in builder.clips.items()
    }
  tfds_writer.write(builder, builder.clips, **beam_config)
  report.save(epath.Path(builder.data_dir))
  if not keep_work:
    cache.remove()
  return report


@contextlib.contextmanager
def _refuse_full_disk(data_dir: str) -> Iterator[None]:
  """Raises one InputError for a full disk, wherever it was noticed."""
  try:
    yield
  except OSError as error:
    if error.errno not in NO_ROOM:
      raise
    raise InputError(
      f'no space is left in {data_dir} or {tempfile.gettempdir()} ({error}); make '
      'room, and resume with the same command'
    ) from error


_PrepareClips = Callable[
  [Worker, Sequence[ClipFile]], Iterator[tuple[ClipFile, Outcome]]
]


def _prepare_all(
  worker: Worker, plan: Plan, prepare_clips: _PrepareClips
) -> Iterator[tuple[str, Outcome]]:
  """Yields the id and outcome of every clip of a plan, with a bar.

  Clips that met an unexpected error are tried again after all others, since a network
  or a disk may have failed for some minutes.

  Args:
    worker: finds clips that are done.
    plan: the clips.
    prepare_clips: prepares those that are not done.
  """
  clips = [clip for clips in plan.clips.values() for clip in clips]
  with tqdm.tqdm(
    total=len(clips), desc=plan.config.corpus, unit='clip', mininterval=1
  ) as bar:
    # 1. Those that an earlier run has done
    left = []
    for clip, known in zip(clips, _known_outcomes(worker, clips)):
      if known and known.final:
        bar.update()
        yield clip.clip_id, known
      else:
        left.append(clip)

    # 2. All others
    failed = []
    for clip, outcome in prepare_clips(worker, left):
      if not outcome.final:
        failed.append(clip)
        continue
      bar.update()
      yield clip.clip_id, outcome

    # 3. Those that failed, once more
    for clip, outcome in prepare_clips(worker, failed):
      bar.update()
      yield clip.clip_id, outcome


def _known_outcomes(
  worker: Worker, clips: Sequence[ClipFile]
) -> Iterator[Outcome | None]:
  """Reads the outcomes of clips from the cache; None for those that are not done."""
  return worker.cache.outcomes([worker.name(clip) for clip in clips])


def _beam_config(runner: str, options: str) -> dict[str, Any]:
  try:
    from apache_beam.options.pipeline_options import PipelineOptions
  except ImportError as error:
    raise ConfigError(
      '--beam_runner needs Apache Beam, in an environment of its own: '
      'pip install -r requirements/beam.txt'
    ) from error
  return {'beam_runner': runner, 'beam_options': PipelineOptions(shlex.split(options))}


def _prepare_in_beam(
  worker: Worker, clips: Sequence[ClipFile], beam_runner: str, beam_options: Any
) -> Iterator[tuple[ClipFile, Outcome]]:
  """Prepares clips in a pipeline, which ends before the first is yielded."""
  if not clips:
    return
  import apache_beam as beam

  with beam.Pipeline(beam_runner, copy.deepcopy(beam_options)) as pipeline:
    _ = (
      pipeline
      | _clips(_manifest(worker.cache, 'work', clips))
      | 'Prepare' >> beam.Map(worker.__call__)
    )
  for clip, outcome in zip(clips, _known_outcomes(worker, clips)):
    yield clip, outcome or worker(clip)
