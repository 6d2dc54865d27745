"""TFDS builder of the synthetic talking faces, rendered on all cores."""

from collections.abc import Iterator
import dataclasses
import multiprocessing
import os
import pathlib
from typing import Any

import tensorflow_datasets as tfds
import tqdm

from data_pipelines.builders import synthetic_clips, tfds_writer
from data_pipelines.builders.synthetic_clips import SyntheticConfig
from dicetalk_jax import interrupt


@dataclasses.dataclass(eq=False, repr=False)
class BuilderConfig(tfds.core.BuilderConfig):
  """Carries the settings; a data set's folder is named after them."""

  settings: SyntheticConfig = dataclasses.field(default_factory=SyntheticConfig)

  def __repr__(self) -> str:
    return self.name


class Synthetic(tfds.core.GeneratorBasedBuilder):
  """Makes records `talking_clip` with the exact truth of every frame.

  Splits share neither people nor sentences.

  Attributes:
    workers: processes that render; the records do not depend on it.
  """

  VERSION = tfds.core.Version('1.0.0')
  workers: int = 1

  @property
  def settings(self) -> SyntheticConfig:
    return self.builder_config.settings

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      features=self.settings.spec.features(),
      metadata=tfds.core.MetadataDict(settings=dataclasses.asdict(self.settings)),
    )

  def _split_generators(
    self, dl_manager
  ) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
    del dl_manager  # nothing is downloaded
    return {split: self._generate_examples(split) for split in self.settings.splits}

  def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    jobs = synthetic_clips.jobs(self.settings, split)
    bar = tqdm.tqdm(
      total=len(jobs), desc=f'synthetic {split}', unit='clip', mininterval=1
    )
    workers = min(self.workers, len(jobs))
    with bar:
      if workers == 1:
        for job in jobs:
          yield synthetic_clips.render(job)
          bar.update()
        return
      chunk = max(1, min(8, len(jobs) // (4 * workers)))
      # spawn, since forking a process that runs JAX's threads may hang
      with interrupt.shielded():
        pool = multiprocessing.get_context('spawn').Pool(workers)
      with pool:
        for example in pool.imap(synthetic_clips.render, jobs, chunk):
          bar.update()
          yield example


def prepare_synthetic(
  data_dir: str | os.PathLike,
  config: SyntheticConfig | None = None,
  *,
  workers: int | None = None,
) -> pathlib.Path:
  """Generates a synthetic data set as ArrayRecord files, unless it exists already.

  Args:
    data_dir: root of all data sets.
    config: what to generate; 24 people of 24 clips of 2.4 s by default.
    workers: processes that render, all cores by default. They are spawned, so a script
      that wants more than one must call this under `if __name__ == '__main__'`. The
      records do not depend on it.

  Returns:
    The folder of the data set, for `ClipSource`. It appears when it is whole: a killed
    run leaves only a folder that is marked as incomplete.

  Raises:
    InputError: `data_dir` cannot be written.
  """
  config = config or SyntheticConfig()
  tfds_writer.make_root(data_dir)
  builder = Synthetic(
    data_dir=data_dir,
    config=BuilderConfig(name=config.name, settings=config),
    file_format='array_record',
  )
  builder.workers = workers or os.cpu_count() or 1
  return pathlib.Path(tfds_writer.write(builder, config.splits))
