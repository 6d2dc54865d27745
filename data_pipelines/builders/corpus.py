"""TFDS builders of the real corpora: one builder, a walker for each corpus.

Clips are prepared first, by many processes, into a cache of finished clips; then their
records are written. With a Beam runner each of the two is a pipeline, of the same
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

from data_pipelines.builders import corpus_workers, tfds_writer
from data_pipelines.builders.corpus_plan import Plan
from data_pipelines.builders.corpus_report import Report
from data_pipelines.builders.corpus_workers import Worker
from data_pipelines.clip_cache import ClipCache, Outcome
from data_pipelines.corpora.clip_file import ClipFile, reasons
from data_pipelines.preprocess import NO_ROOM, CorpusConfig
from dicetalk_jax.errors import ConfigError, DataError, InputError


@dataclasses.dataclass(eq=False, repr=False)
class BuilderConfig(tfds.core.BuilderConfig):
  """Carries the settings; a data set's folder is named after them and the clips."""

  settings: CorpusConfig | None = None

  def __repr__(self) -> str:
    return self.name


class _Writer(ExampleWriter):
  """ArrayRecord's writer knows disks only: shards for other places are written on
  one and copied.
  """

  def write(self, path, examples):
    if '://' not in os.fspath(path):
      return super().write(path, examples)
    with tempfile.TemporaryDirectory() as folder:
      shard = epath.Path(folder) / 'shard'
      super().write(shard, examples)
      shard.copy(path, overwrite=True)
      return None


class Corpus(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Records `talking_clip` of a real corpus.

  `worker`, `clips` and `counts` are set before it is prepared.
  """

  VERSION = tfds.core.Version('1.0.0')
  worker: Worker
  clips: Mapping[str, list[ClipFile]]  # by split
  counts: Mapping[str, int]  # of records by split, for the bar
  manifests: Mapping[str, str] | None = (
    None  # by split, where a Beam pipeline writes the records
  )

  @property
  def settings(self) -> CorpusConfig:
    return self.builder_config.settings

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      features=self.settings.spec.features(),
      metadata=tfds.core.MetadataDict(settings=dataclasses.asdict(self.settings)),
    )

  def _example_writer(self) -> ExampleWriter:
    return _Writer(self.info.file_format)

  def _split_generators(self, dl_manager) -> dict[str, Any]:
    del dl_manager  # nothing is downloaded
    return {split: self._generate_examples(split) for split in self.clips}

  def _generate_examples(self, split: str) -> Any:
    """(key, record) of all clips of a split: a generator, or a Beam transform that
    makes them.
    """
    if not self.manifests:
      records = (
        example for clip in self.clips[split] for example in self.worker.examples(clip)
      )
      return tqdm.tqdm(
        records, f'records of {split}', self.counts[split], unit='clip', mininterval=1
      )
    import apache_beam as beam

    return _clips(self.manifests[split]) | beam.FlatMap(self.worker.examples)


class Mead(Corpus):
  """MEAD: eight emotions at three levels, acted."""


class Hdtf(Corpus):
  """HDTF: speeches in high resolution."""


class Voxceleb2(Corpus):
  """VoxCeleb2: speech of thousands of people."""


class Folder(Corpus):
  """A user's own clips."""


BUILDERS = {'mead': Mead, 'hdtf': Hdtf, 'voxceleb2': Voxceleb2, 'folder': Folder}


def _manifest(cache: ClipCache, name: str, clips: Sequence[ClipFile]) -> str:
  """Writes one JSON line per clip, since a pipeline has no room for a million clips;
  returns the path.
  """
  return cache.write_text(
    f'{name}.jsonl',
    ''.join(f'{json.dumps(dataclasses.asdict(clip))}\n' for clip in clips),
  )


def _read_clip(line: str) -> ClipFile:
  fields = json.loads(line)
  return ClipFile(**fields | {'crop': fields['crop'] and tuple(fields['crop'])})


def _clips(manifest: str) -> Any:
  """A Beam transform: the clips of a manifest."""
  import apache_beam as beam

  return (
    beam.io.ReadFromText(manifest) | beam.Map(_read_clip) | beam.Reshuffle()
  )  # one clip may go to one worker, whatever the size of the list


def prepare_corpus(
  plan: Plan,
  data_dir: str | os.PathLike,
  *,
  workers: int | None = None,
  beam_runner: str = '',
  beam_options: str = '',
  keep_work: bool = False,
) -> tuple[epath.Path, Report]:
  """Prepares a corpus as ArrayRecord files, or finds it where it has been prepared
  before.

  A killed run resumes: clips that are done lie in `<data_dir>/<corpus>/work` until the
  data set is whole.

  Args:
    plan: which clips, and how.
    data_dir: root of all data sets. For Beam, a place that all workers reach.
    workers: processes, all cores by default; they start anew, so a script must call
      this under `if __name__ == '__main__'`. 1 works in the process that calls. The
      records do not depend on it.
    beam_runner: such as 'DirectRunner'; '' works without Beam.
    beam_options: flags of the Beam pipeline in one string.
    keep_work: leaves the finished clips for another preparation with the same settings.

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
  builder = BUILDERS[corpus](
    data_dir=data_dir,
    config=BuilderConfig(name=plan.name, settings=plan.config),
    file_format='array_record',
  )
  folder = epath.Path(builder.data_dir)
  if (folder / 'dataset_info.json').exists() and (folder / 'report.json').exists():
    report = Report.load(folder)
    return folder, dataclasses.replace(
      report,
      notes=(
        *report.notes,
        'this data set was prepared before; files that changed and kept their sizes '
        f'are not noticed: to prepare it anew, delete {folder}',
      ),
    )
  with (
    _room(data_dir),
    tfds_writer.alone(
      f'{data_dir}/{corpus}', f'{plan.name}/incomplete.*_{builder.version}'
    ),
  ):
    return folder, _prepare(
      builder, plan, data_dir, workers, beam_runner, beam_options, keep_work
    )


def _prepare(
  builder: Corpus,
  plan: Plan,
  data_dir: str,
  workers: int | None,
  beam_runner: str,
  beam_options: str,
  keep_work: bool,
) -> Report:
  corpus, folder = plan.config.corpus, epath.Path(builder.data_dir)
  cache = ClipCache(f'{data_dir}/{corpus}/work/{plan.work_name}')
  worker = builder.worker = Worker(plan.config, plan.tree, plan.expressions, cache)
  config = _beam_config(beam_runner, beam_options) if beam_runner else {}
  run = (
    functools.partial(_run_in_beam, **config)
    if config
    else functools.partial(corpus_workers.run, processes=workers)
  )
  outcomes = dict(_work(worker, plan, run))
  report = Report.of(plan, outcomes)
  if 'train' not in report.splits:
    path = cache.write_text('skipped.csv', report.csv())
    raise DataError(
      f'no clip of {corpus} could be prepared for training '
      f'({reasons(report.skipped)}); see {path}'
    )
  builder.clips = {
    split: [clip for clip in plan.clips[split] if outcomes[clip.clip_id].keys]
    for split in report.splits
  }
  builder.counts = {split: part['clips'] for split, part in report.splits.items()}
  if config:
    builder.manifests = {
      split: _manifest(cache, split, clips) for split, clips in builder.clips.items()
    }
  tfds_writer.write(builder, builder.clips, **config)
  report.save(folder)
  if not keep_work:
    cache.remove()
  return report


@contextlib.contextmanager
def _room(data_dir: str) -> Iterator[None]:
  """A full disk ends the work in one sentence, wherever it was noticed."""
  try:
    yield
  except OSError as error:
    if error.errno not in NO_ROOM:
      raise
    raise InputError(
      f'there is no room left in {data_dir} or {tempfile.gettempdir()} ({error}); make '
      'room, and the same command goes on'
    ) from error


_Run = Callable[[Worker, Sequence[ClipFile]], Iterator[tuple[ClipFile, Outcome]]]


def _work(worker: Worker, plan: Plan, run: _Run) -> Iterator[tuple[str, Outcome]]:
  """All clips, with a bar; those done in an earlier run are not given to `run`.

  Clips that met an unexpected error are tried again after all others, since a network
  or a disk may have failed for some minutes.
  """
  clips = [clip for clips in plan.clips.values() for clip in clips]
  with tqdm.tqdm(
    total=len(clips), desc=plan.config.corpus, unit='clip', mininterval=1
  ) as bar:
    left = []
    for clip, outcome in zip(
      clips, worker.cache.outcomes([worker.name(clip) for clip in clips])
    ):
      if outcome and outcome.final:
        bar.update()
        yield clip.clip_id, outcome
      else:
        left.append(clip)
    again = []
    for clip, outcome in run(worker, left):
      if not outcome.final:
        again.append(clip)
        continue
      bar.update()
      yield clip.clip_id, outcome
    for clip, outcome in run(worker, again):
      bar.update()
      yield clip.clip_id, outcome


def _beam_config(runner: str, options: str) -> dict[str, Any]:
  try:
    from apache_beam.options.pipeline_options import PipelineOptions
  except ImportError as error:
    raise ConfigError(
      '--beam_runner needs Apache Beam, in an environment of its own: '
      'pip install -r requirements/beam.txt'
    ) from error
  return {'beam_runner': runner, 'beam_options': PipelineOptions(shlex.split(options))}


def _run_in_beam(
  worker: Worker, clips: Sequence[ClipFile], beam_runner: str, beam_options: Any
) -> Iterator[tuple[ClipFile, Outcome]]:
  """Prepares clips in a pipeline, which ends before the first is given."""
  if not clips:
    return
  import apache_beam as beam

  with beam.Pipeline(beam_runner, copy.deepcopy(beam_options)) as pipeline:
    _ = (
      pipeline
      | _clips(_manifest(worker.cache, 'work', clips))
      | 'Prepare' >> beam.Map(worker.__call__)
    )
  for clip, outcome in zip(
    clips, worker.cache.outcomes([worker.name(clip) for clip in clips])
  ):
    yield clip, outcome or worker(clip)
