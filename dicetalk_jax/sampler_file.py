"""A sampler in a file, traced and lowered ahead of time: a service that reads it starts
without tracing.

A file is for one platform, one device and one shape of the noise. Parameters are not in
it: they stay arguments. It is a ZIP archive (so a damaged one is noticed) of

    facts.json      what the sampler was made for, see `Facts`
    sampler.bin     the program, as `jax.export` writes it
"""

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import inspect
import json
import os
from typing import Any
import zipfile

import jax
from jax import export
from jax._src.cudnn import fused_attention_stablehlo
import jax.numpy as jnp

from dicetalk_jax import bundle
from dicetalk_jax.bundle import Folder
from dicetalk_jax.diffusion.sampler import Conditions, SamplerConfig, make_sampler
from dicetalk_jax.errors import ConfigError, InputError, WeightsError
from dicetalk_jax.files import atomic_file
from dicetalk_jax.models import parameters, target

SUFFIX = '.sampler'
FORMAT = 1
_FACTS = 'facts.json'
_PROGRAM = 'sampler.bin'
# JAX gives no guarantee for the kernels of cuDNN: a later version may read them no
# more. The versions that it does guarantee are checked when a file is read.
_CUDNN_ATTENTION = '__cudnn$fmhaSoftmax'
# Assumed of a machine for which programs are made, where cuDNN is not installed.
_CUDNN_VERSION = 91000


@dataclasses.dataclass(frozen=True)
class Facts:
  """What a sampler was made for. It serves nothing else.

  Attributes:
    unet: fingerprint of the network in the model folder.
    settings: the JSON form of the `SamplerConfig`.
    platform: one of `models.target.PLATFORMS`.
    dtype: of the network's parameters.
    shape: of the noise, `(B, T, h, w, C)`; T = bucket + padding frames.
    calling_convention: of `jax.export`.
  """

  unet: str
  settings: dict[str, Any]
  platform: str
  dtype: str
  shape: tuple[int, ...]
  calling_convention: int = 0


class ExportedSampler:
  """Called like the `sample` of `diffusion.sampler.make_sampler`.

  Attributes:
    facts: what it was made for.
  """

  def __init__(self, facts: Facts, program: export.Exported):
    self.facts = facts
    self._program = program
    options = target.compiler_options()
    self._call = jax.jit(program.call, compiler_options=options)
    self._steps = SamplerConfig.from_json(facts.settings).steps_run

  def __call__(
    self,
    params: parameters.Params,
    x: jax.typing.ArrayLike,
    conditions: Conditions,
    lengths: jax.typing.ArrayLike,
    first: jax.typing.ArrayLike = 0,
    last: jax.typing.ArrayLike | None = None,
  ) -> jax.Array:
    """Samples; see `make_sampler`."""
    latents: jax.Array = self._call(
      params,
      x,
      _as_dict(conditions),
      jnp.asarray(lengths, jnp.int32),
      jnp.int32(first),
      jnp.int32(self._steps if last is None else last),
    )
    return latents

  def fits(self, noise: jax.typing.ArrayLike) -> bool:
    """Whether it was made for noise `[B, T, h, w, C]` of this shape."""
    return jnp.shape(noise) == self.facts.shape

  def save(self, path: str | os.PathLike) -> None:
    """Writes the file.

    Raises:
      InputError: the place cannot be written to.
    """
    facts = dataclasses.asdict(self.facts) | {'format': FORMAT}
    with atomic_file(path) as part, zipfile.ZipFile(part, 'w') as archive:
      archive.writestr(_FACTS, json.dumps(facts, indent=2))
      archive.writestr(_PROGRAM, bytes(self._program.serialize()))

  @classmethod
  def load(cls, path: str | os.PathLike) -> 'ExportedSampler':
    """Reads a file.

    Raises:
      InputError: it is missing or damaged, or another version of this program or of JAX
        wrote it.
    """
    try:
      with zipfile.ZipFile(path) as archive:
        facts = json.loads(archive.read(_FACTS))
        program = archive.read(_PROGRAM)
    except OSError as error:
      raise InputError(
        f'cannot read {path}: {error.strerror}; check the path, or make the file with '
        'python -m dicetalk_jax.export_sampler'
      ) from error
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError) as error:
      raise InputError(
        f'{path} is damaged or no exported sampler; export it again'
      ) from error
    convention = facts.get('calling_convention', 0)
    oldest = export.minimum_supported_calling_convention_version
    newest = export.maximum_supported_calling_convention_version
    if facts.pop('format', 0) != FORMAT or not oldest <= convention <= newest:
      raise InputError(
        f'{path} was written by another version of this program or of JAX; export it '
        'again'
      )
    facts['shape'] = tuple(facts['shape'])
    return cls(Facts(**facts), export.deserialize(bytearray(program)))

  def check(
    self, path: str | os.PathLike, folder: Folder, settings: SamplerConfig, dtype: str
  ) -> None:
    """Refuses a sampler that was made for something else.

    Args:
      path: of the file, for the sentence.
      folder: the model folder.
      settings: that are to be sampled with.
      dtype: that the network's parameters are to have.

    Raises:
      WeightsError: it was made for another network.
      ConfigError: it was made for other settings, another type or another platform.
    """
    if self.facts.unet != fingerprint(folder):
      raise WeightsError(
        f'{path} was exported from another unet than that of {folder}; export it again'
      )
    mine = _json_form(settings)
    for name in mine.keys() | self.facts.settings.keys():
      wanted, found = mine.get(name), self.facts.settings.get(name)
      if wanted != found:
        raise ConfigError(
          f'{path} was exported with {name}={found}, but {name}={wanted} is wanted; '
          'export it again, or change the setting'
        )
    if self.facts.dtype != dtype:
      raise ConfigError(
        f'{path} was exported for parameters in {self.facts.dtype}, these are in '
        f'{dtype}; export it again, or load the model in the other type'
      )
    platform = target.current().platform
    if self.facts.platform != platform:
      raise ConfigError(
        f'{path} was exported for {self.facts.platform}, this is {platform}; export it '
        f'with --platforms={platform}'
      )


def export_sampler(
  graphdef: Any,
  params: Mapping[str, Any],
  settings: SamplerConfig,
  conditions: Conditions,
  platform: str,
  unet: str,
) -> ExportedSampler:
  """Traces and lowers a sampler, for whatever devices.

  Args:
    graphdef, params: structure and shapes of the network.
    settings: to sample with.
    conditions: shapes of a batch of clips, in place of arrays.
    platform: one of `models.target.PLATFORMS`.
    unet: fingerprint of the network.
  """
  # Options of the compiler have no place in a file: whoever reads it compiles.
  sample = inspect.unwrap(make_sampler(graphdef, settings))

  def call(params, x, conditions, lengths, first, last):
    return sample(params, x, Conditions(**conditions), lengths, first, last)

  batch, frames = conditions.audio_tokens.shape[:2]
  latent = conditions.reference_latents.shape[1:]
  shape = (batch, frames + settings.padding_frames, *latent)
  number = jax.ShapeDtypeStruct((), jnp.int32)
  with target.compiling_for(platform), _some_cudnn():
    program = export.export(
      jax.jit(call),
      platforms=[platform],
      disabled_checks=[export.DisabledSafetyCheck.custom_call(_CUDNN_ATTENTION)],
    )(
      params,
      jax.ShapeDtypeStruct(shape, jnp.float32),
      _as_dict(conditions),
      jax.ShapeDtypeStruct((batch,), jnp.int32),
      number,
      number,
    )
  facts = Facts(
    unet,
    _json_form(settings),
    platform,
    params_dtype(params),
    shape,
    program.calling_convention_version,
  )
  return ExportedSampler(facts, program)


def fingerprint(folder: Folder) -> str:
  """That of the network in a model folder.

  Raises:
    WeightsError: there is none, or the folder is older than fingerprints.
  """
  place, entry = bundle.holder(folder, 'unet')
  if 'fingerprint' not in entry:
    raise WeightsError(
      f'{place} has no fingerprints, as it was made by an older version; convert or '
      'train the model again'
    )
  return str(entry['fingerprint'])


def params_dtype(params: Mapping[str, Any]) -> str:
  """The type that all of the network's parameters have."""
  return str(next(iter(params.values())).dtype)


def _json_form(settings: SamplerConfig) -> dict[str, Any]:
  """The settings as they come back from a JSON file."""
  form: dict[str, Any] = json.loads(json.dumps(settings.to_json()))
  return form


def _as_dict(conditions: Conditions) -> dict[str, Any]:
  """By field: files of `jax.export` know no classes of ours."""
  return {
    field.name: getattr(conditions, field.name)
    for field in dataclasses.fields(conditions)
  }


@contextlib.contextmanager
def _some_cudnn() -> Iterator[None]:
  """Lets JAX trace the attention of cuDNN where none is installed.

  It asks for the version, and has no other way of being told.
  """
  installed = fused_attention_stablehlo.check_cudnn_version

  def version() -> int:
    try:
      return int(installed())
    except RuntimeError:
      return _CUDNN_VERSION

  fused_attention_stablehlo.check_cudnn_version = version
  try:
    yield
  finally:
    fused_attention_stablehlo.check_cudnn_version = installed
