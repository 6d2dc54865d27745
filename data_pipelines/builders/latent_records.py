"""TFDS builder of data sets without pixels, for training elsewhere.

They have the clips of a data set with pixels, and instead of the pixels the outputs of
the frozen networks. So a data set of content `latents` can only be made from one of
content `full`, whose features are computed.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any

import tensorflow_datasets as tfds
import tqdm

from data_pipelines.builders import tfds_writer
from dicetalk_jax.data import clip_record
from dicetalk_jax.data.clip_record import RecordSpec
from dicetalk_jax.data.clip_source import ClipSource
from dicetalk_jax.data.feature_extraction import FeatureExtractor
from dicetalk_jax.data.feature_store import Feature, FeatureStore
from dicetalk_jax.data.mixture import DatasetPart

BLOCKS = ('latents', 'clip_embed', 'whisper')  # features that move into the records


@dataclasses.dataclass(eq=False, repr=False)
class BuilderConfig(tfds.core.BuilderConfig):
  """Sizes of the blocks, the networks that made them (`ClipSource.made_by`), and what
  else is known of the clips (`ClipSource.metadata`).
  """

  spec: RecordSpec = RecordSpec('latents')
  made_by: Mapping[str, str] = dataclasses.field(default_factory=dict)
  metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __repr__(self) -> str:
    return self.name


class Packed(  # type: ignore[call-arg]  # mypy does not see the parameter of TFDS
  tfds.core.GeneratorBasedBuilder, skip_registration=True
):
  """Makes records `talking_clip` without pixels; set `parts` before it is prepared."""

  VERSION = tfds.core.Version('1.0.0')
  parts: Mapping[str, DatasetPart]  # by split

  def _info(self) -> tfds.core.DatasetInfo:
    config = self.builder_config
    metadata = dict(config.metadata) | {'made_by': dict(config.made_by)}
    return tfds.core.DatasetInfo(
      builder=self,
      features=config.spec.features(),
      metadata=tfds.core.MetadataDict(metadata),
    )

  def _split_generators(
    self, dl_manager
  ) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
    del dl_manager  # nothing is downloaded
    return {split: self._generate_examples(part) for split, part in self.parts.items()}

  def _generate_examples(
    self, part: DatasetPart
  ) -> Iterator[tuple[str, dict[str, Any]]]:
    source = part.source
    for clip, record in enumerate(
      tqdm.tqdm(source, desc=f'records ({source.split})', unit='clip', mininterval=1)
    ):
      # TFDS orders clips by key, so the order is that of the data set with pixels.
      yield (
        clip_record.decode_text(record, 'clip_id'),
        {
          name: part.rows(name, clip, record, slice(None))
          if name in BLOCKS
          else record[name]
          for name in self.info.features
        },
      )


def prepare_packed(
  root: str | os.PathLike,
  jobs: Sequence[FeatureExtractor],
  names: Sequence[str] = BLOCKS,
) -> pathlib.Path:
  """Writes the clips of a data set with features instead of pixels, unless they exist.

  Training on the result reads the same batches as on the data set with pixels. Missing
  features are computed first.

  Args:
    root: of the new data sets, on a disk. Like any root of data sets, it also holds
      their feature files.
    jobs: the splits of one data set, with the same networks; in one process.
    names: further features: 'prior', 'crops_64'. They stay outside of the records,
      since another embedder gives other priors and needs other crops.

  Returns:
    The folder of the data set, for `ClipSource`. It appears when it is whole.

  Raises:
    InputError: `root` cannot be written.
    DataError: there are no pixels to compute from, or a clip lacks something that
      diffusion training reads.
  """
  root = pathlib.Path(tfds_writer.make_root(root))
  parts = {
    job.source.split: DatasetPart(
      job.source, job.load_or_compute(*dict.fromkeys((*BLOCKS, *names)))
    )
    for job in jobs
  }
  for job in jobs:
    frames = job.source.table.num_frames
    lengths = {
      'latents': frames,
      'clip_embed': -(-frames // job.clip_stride),
      'whisper': 2 * frames,
    }
    for name in BLOCKS:
      parts[job.source.split].check_feature(name, lengths[name])
  made_by = {name: jobs[0].fingerprint(name) for name in BLOCKS}
  clips = {job.source.split: job.source.fingerprint for job in jobs}
  content = json.dumps([clips, made_by], sort_keys=True)
  digest = hashlib.sha256(content.encode()).hexdigest()[:8]
  name = f'{tfds.builder_from_directory(jobs[0].source.folder).name}_{digest}'
  config = BuilderConfig(
    name=name,
    spec=_spec(next(iter(parts.values()))),
    made_by=made_by,
    metadata=jobs[0].source.metadata,
  )
  builder = Packed(data_dir=root, config=config, file_format='array_record')
  builder.parts = parts
  folder = pathlib.Path(tfds_writer.write(builder, parts))
  for split, part in parts.items():
    for name in set(part.features) - set(BLOCKS):
      _copy(part.features[name], part.source, root, ClipSource(folder, split))
  return folder


def _spec(part: DatasetPart) -> RecordSpec:
  first = part.source[0]
  shapes = {name: part.rows(name, 0, first, slice(None)).shape[1:] for name in BLOCKS}
  return RecordSpec(
    'latents',
    expression_dim=first['expression'].shape[1],
    latent_shape=shapes['latents'],
    clip_dim=shapes['clip_embed'][0],
    whisper_shape=shapes['whisper'],
    prior_dim=len(first['emo_mu']),
  )


def _copy(feature: Feature, source: ClipSource, root: pathlib.Path, packed: ClipSource):
  """Copies a stored feature of `source` to `packed`, below `root`.

  Clips are matched by name, so their order does not matter.
  """
  position = {clip_id: i for i, clip_id in enumerate(source.table.clip_id.tolist())}
  name, _, made_by = feature.folder.name.rpartition('-')
  values = (
    (i, feature(position[clip_id]))
    for i, clip_id in enumerate(packed.table.clip_id.tolist())
  )
  FeatureStore(root / 'features', packed.fingerprint).write(name, made_by, values)
