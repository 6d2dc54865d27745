"""The sound of a generated video: the recording itself, at its full quality."""

from collections.abc import Iterator, Mapping
import itertools
import os
from typing import NamedTuple

import av
import numpy as np

from dicetalk_jax.media.audio_blocks import Block, open_recording, read_blocks
from dicetalk_jax.media.mixdown import Mixdown

# Rates and layouts that AAC has (7.1 too, but PyAV's frames have at most 7 channels).
_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200)
_HIGHEST = 96000
_LAYOUTS = {1: 'mono', 2: 'stereo', 3: '3.0', 4: '4.0', 5: '5.0', 6: '5.1'}


class Soundtrack:
  """A recording at its own rate and with its own channels, read while it is written.

  Of a recording that changes them (joined files), the first ones count. Rates that AAC
  lacks become the next higher one, at most 96 kHz; more than six channels become one.

  Attributes:
    rate: samples per second, one that AAC has.
    layout: of the channels, by FFmpeg's name.
  """

  def __init__(self, path: str | os.PathLike, loudest: Mapping[int, int] | None = None):
    """Opens a recording. The file stays open, so that nobody can take it away.

    Args:
      path: see `load_audio`.
      loudest: the only channel that is used, by number of channels, see `Recording`.

    Raises:
      InputError: the file is missing, or its audio cannot be decoded.
    """
    self._path = path
    self._file = open_recording(path)
    self._mixdown = Mixdown(loudest)
    first = next(self._blocks(), Block(np.zeros((0, 1), np.float32), _HIGHEST))
    self.rate = next((rate for rate in _RATES if rate >= first.rate), _HIGHEST)
    self.layout = _LAYOUTS[first.samples.shape[1]]

  def chunks(self) -> Iterator[np.ndarray]:
    """The sound from its beginning, float32 `[channels,n]` at `rate`.

    Raises:
      InputError: see `read_blocks`.
    """
    for (rate, channels), group in itertools.groupby(self._blocks(), _format):
      convert = av.AudioResampler('fltp', self.layout, self.rate)
      for block in group:
        planes = np.ascontiguousarray(block.samples.T)
        frame = av.AudioFrame.from_ndarray(planes, 'fltp', _LAYOUTS[channels])
        frame.sample_rate = rate
        for out in convert.resample(frame):
          yield out.to_ndarray()
      for out in convert.resample(None):  # the rest
        yield out.to_ndarray()

  def _blocks(self) -> Iterator[Block]:
    """The recording; one channel where there are more than six, or they cancel."""
    for samples, rate in read_blocks(self._file, self._path):
      channels = samples.shape[1]
      if channels not in _LAYOUTS or channels in self._mixdown.chosen:
        samples = self._mixdown(samples)[:, None]
      yield Block(samples, rate)


class _Format(NamedTuple):
  rate: int
  channels: int


def _format(block: Block) -> _Format:
  return _Format(block.rate, block.samples.shape[1])
