"""Components put together: portrait, speech and emotion become conditions, latents,
frames.

    pipe = Pipeline.load('model')
    frames, fps = pipe.generate(load_image('face.jpg'), load_audio('speech.wav'),
    emotion='happy')

Each stage is one compiled function of fixed shape; clip lengths are rounded up to
buckets, so that clip after clip compiles nothing new. Frames come at the model's own
rate, 12.5 per second as published, or, where the model folder has a `flownet`, at twice
that. A folder of Sonic, DICE-Talk's predecessor, is used the same way, but without an
emotion.
"""

from collections.abc import Callable
import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from dicetalk_jax import bundle, parallel
from dicetalk_jax.component import Component
from dicetalk_jax.diffusion import sampler
from dicetalk_jax.diffusion.face_mask import mask_pyramid
from dicetalk_jax.diffusion.sampler import Conditions, SamplerConfig, draw_noise
from dicetalk_jax.errors import ConfigError, InputError, WeightsError
from dicetalk_jax.media import audio
from dicetalk_jax.media.face import find_face
from dicetalk_jax.media.image import Box, prepare_portrait
from dicetalk_jax.models import parameters, registry, rife

COMPONENTS = (
  'unet',
  'vae',
  'image_encoder',
  'whisper',
  'audio_linear',
  'pose_guider',
  'emo_model',
)
KINDS = {
  'dicetalk': COMPONENTS,
  'sonic': ('unet', 'vae', 'image_encoder', 'whisper', 'audio_linear', 'audio2bucket'),
}
INTERPOLATION = 'flownet'  # the one component that a model folder may lack
MASK_CHANNELS = 3

Progress = Callable[[str, int, int], None]  # (stage, done, total)


def _silent(stage: str, done: int, total: int) -> None:
  """Nobody watches."""


@dataclasses.dataclass(frozen=True)
class Settings(parameters.ModelConfig):
  """What belongs to a model but to none of its components; read from `bundle.json`,
  defaults as published.

  Attributes:
    kind: of model, see `KINDS`.
    image_size: shorter side of the video in pixels.
    multiple: both sides are multiples of this, because of the downsampling in
      autoencoder and UNet.
    area: growth of the face box for the mask.
    frame_step: units of 1/25 s per frame.
    time_ids: frame rate and two motion amounts, as the network was told in training.
      Sonic predicts the amounts.
    decode_chunk: frames that are decoded together.
    upcast_vae: encode the portrait in float32 whatever the compute type.
    retrieval: look the emotion up in the bank, instead of attending to all of it.
    sampler: see `SamplerConfig`; its scaling factor is the autoencoder's.
  """

  kind: str = 'dicetalk'
  image_size: int = 512
  multiple: int = 64
  area: float = 1.1
  frame_step: int = 2
  time_ids: tuple[float, float, float] = (12.5, 8.0, 16.0)
  decode_chunk: int = 10
  upcast_vae: bool = True
  retrieval: bool = False
  sampler: SamplerConfig = SamplerConfig(windows_per_call=1)

  def __post_init__(self):
    if self.kind not in KINDS:
      raise ConfigError(
        f'the model folder is of kind {self.kind!r}, but only {", ".join(KINDS)} are '
        'known here; update the program'
      )

  @property
  def components(self) -> tuple[str, ...]:
    """What the model folder must hold."""
    return KINDS[self.kind]

  @property
  def fps(self) -> float:
    """Frames per second of what is generated."""
    return 25 / self.frame_step

  @classmethod
  def of(cls, folder, scaling_factor: float = 0.18215, **changes) -> 'Settings':
    """The settings of a model folder; `changes` are those of the sampler."""
    values = bundle.settings(folder)
    stored = SamplerConfig.from_json(
      dict(windows_per_call=1) | values.get('sampler', {})
    )
    return dataclasses.replace(
      cls.from_json(values),
      sampler=dataclasses.replace(stored, scaling_factor=scaling_factor, **changes),
    )

  def frames_of(self, wave: np.ndarray) -> int:
    """How many frames a recording fills, `[samples]` at 16 kHz.

    Raises:
      InputError: not even one.
    """
    frames = audio.audio_len(len(wave)) // self.frame_step
    if not frames:
      raise InputError(
        f'the recording lasts {len(wave) / audio.RATE:.2f} s, less than one frame; '
        f'give at least {1 / self.fps:.2f} s'
      )
    return frames

  def check_emotion(self, given: bool) -> None:
    """Raises InputError where an emotion is given to a model that has none, or none
    to one that needs it.
    """
    if given and 'emo_model' not in self.components:
      raise InputError('a Sonic model knows no emotions; leave --emotion out')
    if not given and 'emo_model' in self.components:
      raise InputError(
        "a DICE-Talk model needs an emotion; name one of the model's with --emotion"
      )


class Pipeline:
  """A model in memory, ready to generate. Make it with `Pipeline.load`."""

  def __init__(
    self,
    folder,
    networks: dict[str, Component],
    settings: Settings,
    mesh: Mesh | None = None,
    dtype: jax.typing.DTypeLike | None = None,
  ):
    self.folder = folder
    self.networks = networks
    self.settings = settings
    self.mesh = mesh
    vae, scale = networks['vae'], settings.sampler.scaling_factor
    decoder = dataclasses.replace(
      vae,
      graphdef=parameters.abstract(
        registry.builder('vae', vae.config.to_json(), dtype)
      )[0],
    )
    self._encode = (vae if settings.upcast_vae else decoder).stage(
      lambda model, x: model.encode(x)[0]
    )
    self._decode = decoder.stage(
      lambda model, z: _unit_range(model.decode(self._spread(z / scale)))
    )
    self._pixels = jax.jit(_pixels)

    def stage(name, function):
      """None where the model lacks the component."""
      return networks[name].stage(function) if name in networks else None

    self._double = stage(
      INTERPOLATION,
      lambda model, previous, frames: rife.double(
        model, jnp.concatenate([previous, frames]), len(frames), self._spread
      ),
    )
    self._image_token = stage('image_encoder', lambda model, x: model(x)[:, None])
    self._states = stage('whisper', lambda model, mel: model(mel))
    self._audio_tokens = stage(
      'audio_linear',
      lambda model, x: (model(x), model(jnp.zeros_like(x[:1, :1]))[0, 0]),
    )
    self._motion = stage(
      'audio2bucket',
      lambda model, x, image_token: 16 * model(x, image_token[:, 0]) + 16,
    )
    self._emotion_tokens = stage(
      'emo_model',
      lambda model, prior: (
        model(prior, settings.retrieval)[0],
        model.null_tokens(settings.retrieval),
      ),
    )
    self._guide = stage(
      'pose_guider',
      lambda model, mask: model(
        jnp.repeat(mask[:, None, ..., None], MASK_CHANNELS, -1)
      )[:, 0],
    )
    self._place = (
      NamedSharding(mesh, PartitionSpec()) if mesh else jax.local_devices()[0]
    )
    self._draw = jax.jit(draw_noise, static_argnums=2)
    self._sample = functools.partial(
      sampler.make_sampler(networks['unet'].graphdef, settings.sampler, mesh),
      networks['unet'].params,
    )

  @classmethod
  def load(
    cls,
    folder,
    mesh: Mesh | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    *,
    progress: Progress = _silent,
    **sampling,
  ) -> 'Pipeline':
    """Reads a model folder.

    Args:
      folder: see `bundle`.
      mesh: from `parallel.make_mesh`: the windows of a clip and its chunks are spread
        over it.
      dtype: compute type of UNet, decoder, image encoder and pose guider, such as
        bfloat16 on accelerators; None for float32. Speech, emotion and interpolation
        are always computed in float32, and as DICE-Talk has it the portrait's encoding
        (`Settings.upcast_vae`).
      progress: called after every component.
      **sampling: changes to the folder's `SamplerConfig`.

    Raises:
      ConfigError: the folder is of an unknown kind, or the sampler cannot work as
        asked.
      WeightsError: a component is missing or damaged.
    """
    wanted = Settings.of(folder).components
    known = bundle.require(folder, *wanted)
    halved = {
      name: dict(dtype=dtype, param_dtype=dtype)
      for name in ('unet', 'image_encoder', 'pose_guider')
    }
    names = [*wanted, *{INTERPOLATION} & known.keys()]
    networks = {}
    for done, name in enumerate(names):
      progress('loading', done, len(names))
      networks[name] = Component.load(folder, name, mesh, **halved.get(name, {}))
    progress('loading', len(names), len(names))
    settings = Settings.of(folder, networks['vae'].config.scaling_factor, **sampling)
    return cls(folder, networks, settings, mesh, dtype)

  def prior(self, emotion: str) -> np.ndarray:
    """Mean of an emotion of the model folder; raises WeightsError with the names it
    has, InputError for Sonic.
    """
    self.settings.check_emotion(given=True)
    return bundle.load_prior(self.folder, emotion)[0]

  def conditions(
    self,
    image: np.ndarray,
    wave: np.ndarray,
    prior: np.ndarray | None,
    face_box: Box | None = None,
  ) -> tuple[Conditions, int]:
    """Everything that steers one clip, as a batch of one.

    Args:
      image: uint8 RGB `[H0, W0, 3]`.
      wave: float32 `[samples]`, 16 kHz mono.
      prior: an emotion, `[256]`; None for a model without emotions.
      face_box: (left, top, width, height) in pixels of `image`; None to look for the
        face.

    Returns:
      The conditions, padded to the clip's bucket, and the number of frames.

    Raises:
      InputError: no face was found, the recording is shorter than one frame, or the
        model wants an emotion or none.
      WeightsError: the prior does not fit the model.
    """
    length = self.settings.frames_of(wave)
    self.settings.check_emotion(prior is not None)
    if prior is not None:
      prior = np.float32(prior).reshape(1, -1)
      if prior.shape[1] != (width := self.networks['emo_model'].config.prior_dim):
        raise WeightsError(
          f'the emotion prior has {prior.shape[1]} numbers, the model wants {width}; '
          'use priors made by the same embedder'
        )
    portrait = prepare_portrait(
      image,
      face_box or find_face(image),
      image_size=self.settings.image_size,
      area=self.settings.area,
      multiple=self.settings.multiple,
      clip_size=self.networks['image_encoder'].config.image_size,
    )
    with self._on_mesh():
      latents = self._encode(portrait.ref_img[None])
      masks = mask_pyramid(
        portrait.mask[None], latents.shape[1:3], self.networks['unet'].config.levels
      )
      image_token = self._image_token(portrait.clip_image[None])
      states = np.concatenate([self._states(mel[None]) for mel in audio.log_mel(wave)])
      audio_tokens, null_audio = self._audio_tokens(
        self._audio_windows(states, wave, length)
      )
      emotion_tokens, null_emotion = (
        (None, None) if prior is None else self._emotion_tokens(prior)
      )
      return Conditions(
        reference_latents=latents,
        image_token=image_token,
        audio_tokens=audio_tokens,
        null_audio=null_audio,
        emotion_tokens=emotion_tokens,
        null_emotion=null_emotion,
        masks=masks,
        spatial=self._guide(portrait.mask[None]) if self._guide else None,
        added_time_ids=self._time_ids(states, wave, length, image_token),
      ), length

  def sample(
    self, conditions: Conditions, lengths, keys: jax.Array, progress: Progress = _silent
  ) -> jax.Array:
    """Latents `[B, N + padding_frames, h, w, C]` of a batch of clips, float32; see
    `make_sampler`.

    Args:
      conditions: one or several clips, padded to the same bucket.
      lengths: int `[B]`, frames of each clip.
      keys: `[B]`, one random key per clip: a clip's result does not depend on its
        neighbours.
      progress: called after every step.
    """
    with self._on_mesh():
      noise = self._draw(keys, conditions, self.settings.sampler.padding_frames)
    return self.denoise(noise, conditions, lengths, progress)

  def denoise(
    self, noise, conditions: Conditions, lengths, progress: Progress = _silent
  ) -> jax.Array:
    """Like `sample`, from noise `[B, N + padding_frames, h, w, C]`."""
    with self._on_mesh():
      # Committed to its place, like the result of a step: one program for the first
      # step and the others.
      x = jax.device_put(noise, self._place)
      lengths = jnp.asarray(lengths)
      steps = self.settings.sampler.steps_run
      spans = (
        [(0, steps)] if progress is _silent else [(i, i + 1) for i in range(steps)]
      )  # one program for both
      progress('sampling', 0, steps)
      for first, last in spans:
        x = jax.block_until_ready(self._sample(x, conditions, lengths, first, last))
        progress('sampling', last, steps)
      return x

  def decode(
    self,
    latents: jax.Array,
    length: int,
    progress: Progress = _silent,
    *,
    interpolate: bool = False,
    rounded: bool = True,
  ) -> np.ndarray:
    """Frames of one clip.

    Chunks do not see each other. The last frames share theirs with padding frames,
    which therefore are decoded too; without padding the last chunk is shorter, and one
    more program for each such length.

    Args:
      latents: `[T, h, w, C]` from `sample`, T at least `length`.
      length: frames to decode.
      progress: called after every call of the decoder.
      interpolate: put a frame between every two; the model must have a `flownet`.
      rounded: to pixels, `255 x` truncated as published.

    Returns:
      uint8, or if not rounded float32 in [0, 1]: `[length, H, W, 3]` or, interpolated,
      `[2 length - 1, H, W, 3]`.
    """
    chunk = self.settings.decode_chunk
    wanted = min(
      len(latents),
      length + self.settings.sampler.padding_frames,
      -(-length // chunk) * chunk,
    )
    whole = wanted - wanted % chunk
    group = chunk * (parallel.batch_devices(self.mesh) if self.mesh else 1)
    parts = [(i, min(i + group, whole), group) for i in range(0, whole, group)]
    parts += [(whole, wanted, wanted - whole)] if wanted > whole else []
    latents, frames, previous = np.asarray(latents), [], None
    for done, (first, last, size) in enumerate(parts):
      progress('decoding', done, len(parts))
      z = np.pad(latents[first:last], ((0, size - (last - first)), *[(0, 0)] * 3))
      with self._on_mesh():
        decoded = self._decode(z.reshape(-1, min(chunk, size), *z.shape[1:]))
        decoded = decoded.reshape(-1, *decoded.shape[2:])
        kept = slice(last - first)
        if interpolate:
          # Each frame follows the one between it and its predecessor; the very first
          # takes itself for that.
          before = decoded[:1] if previous is None else previous
          previous, kept = (
            decoded[last - first - 1 : last - first],
            slice(1, 2 * (last - first) + 1),
          )
          decoded = self._double(before, decoded)
        frames.append(np.asarray(self._pixels(decoded) if rounded else decoded)[kept])
    progress('decoding', len(parts), len(parts))
    return np.concatenate(frames)[
      slice(1, 2 * length) if interpolate else slice(length)
    ]

  def generate(
    self,
    image: np.ndarray,
    wave: np.ndarray,
    emotion: str | None = None,
    *,
    prior: np.ndarray | None = None,
    face_box: Box | None = None,
    seed: int = 0,
    noise: np.ndarray | None = None,
    interpolate: bool | None = None,
    progress: Progress = _silent,
  ) -> tuple[np.ndarray, float]:
    """A talking portrait.

    Args:
      image, wave, face_box: see `conditions`.
      emotion: one of the model folder's, unless `prior` is given. Sonic takes neither.
      prior: an emotion as a vector, `[256]`.
      seed: the same seed gives the same video.
      noise: in place of the seed, `[N + padding_frames, h, w, C]`, standard normal: the
        published program's own noise gives its own video.
      interpolate: double the frame rate; None: if the model has what it takes.
      progress: called with (stage, done, total) while sampling and decoding.

    Returns:
      uint8 `[N, H, W, 3]` and frames per second: as published 25, or 12.5 without
      interpolation.

    Raises:
      InputError, WeightsError: see `conditions` and `prior`; or the model cannot
        interpolate.
    """
    if emotion is not None and prior is not None:
      raise ValueError('give either the name of an emotion or a prior')
    if interpolate is None:
      interpolate = self._double is not None
    elif interpolate:
      bundle.require(self.folder, INTERPOLATION)
    prior = prior if emotion is None else self.prior(emotion)
    conditions, length = self.conditions(image, wave, prior, face_box)
    if noise is None:
      latents = self.sample(conditions, [length], jax.random.key(seed)[None], progress)
    else:
      latents = self.denoise(
        self._start(noise, conditions, length), conditions, [length], progress
      )
    frames = self.decode(latents[0], length, progress, interpolate=interpolate)
    return frames, self.settings.fps * (2 if interpolate else 1)

  def _start(
    self, noise: np.ndarray, conditions: Conditions, length: int
  ) -> np.ndarray:
    """Given noise of one clip, checked and padded to its bucket, with a batch axis."""
    wanted = (
      length + self.settings.sampler.padding_frames,
      *conditions.reference_latents.shape[1:],
    )
    if noise.shape != wanted:
      raise InputError(
        f'the noise has the shape {noise.shape}, this clip needs {wanted} (frames with '
        'padding, height, width, channels); use that of the same picture, recording '
        'and settings'
      )
    unused = conditions.audio_tokens.shape[1] - length
    return np.pad(np.float32(noise), ((0, unused), *[(0, 0)] * 3))[None]

  def reconstruct(self, frames: np.ndarray) -> np.ndarray:
    """Frames through the autoencoder and back, uint8 `[N, H, W, 3]`: the best that
    the model could draw.
    """
    with self._on_mesh():
      latents = np.concatenate(
        [self._encode(frame[None] / np.float32(127.5) - 1) for frame in frames]
      )
    return self.decode(latents * self.settings.sampler.scaling_factor, len(frames))

  def _audio_windows(
    self, states: np.ndarray, wave: np.ndarray, length: int, clip: int = audio.CLIP
  ) -> np.ndarray:
    """Whisper's states `[windows, 1500, S, D]` around each frame, `[1, bucket, clip,
    S, D]`, zero beyond `length`.
    """
    padded = audio.pad_states(states, audio.audio_len(len(wave)), clip)
    windows = audio.audio_windows(
      padded, step=self.settings.frame_step, frames=length, clip=clip
    )
    return np.pad(windows, ((0, self._bucket(length) - length), *[(0, 0)] * 3))[None]

  def _time_ids(
    self, states: np.ndarray, wave: np.ndarray, length: int, image_token: jax.Array
  ) -> jax.Array:
    """Frame rate and two motion amounts: `[1, 3]`, or where they are predicted `[1,
    bucket, 3]`.
    """
    fixed = jnp.float32([self.settings.time_ids])
    if self._motion is None:
      return fixed
    clip = self.networks['audio2bucket'].config.seq_len
    motion = self._motion(
      self._audio_windows(states[:, :, -1:], wave, length, clip), image_token
    )
    fps = jnp.broadcast_to(fixed[:, None, :1], (*motion.shape[:2], 1))
    return jnp.concatenate([fps, motion], axis=-1)

  def _bucket(self, length: int) -> int:
    """A window, two, four, eight, ...: few programs serve all lengths, and windows
    beyond a clip are not computed.
    """
    windows = -(-length // self.settings.sampler.frames)
    return self.settings.sampler.frames * 2 ** (windows - 1).bit_length()

  def _on_mesh(self):
    return jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext()

  def _spread(self, x: jax.Array) -> jax.Array:
    """Lays chunks out over the mesh, if there is one for each device."""
    if self.mesh is None or len(x) % parallel.batch_devices(self.mesh):
      return x
    return jax.lax.with_sharding_constraint(x, parallel.batch_sharding(self.mesh))


def _unit_range(x: jax.Array) -> jax.Array:
  """[-1, 1] to float32 in [0, 1]."""
  return jnp.clip(x.astype(jnp.float32) * 0.5 + 0.5, 0, 1)


def _pixels(x: jax.Array) -> jax.Array:
  """[0, 1] to uint8, truncating as published."""
  return (255 * x).astype(jnp.uint8)
