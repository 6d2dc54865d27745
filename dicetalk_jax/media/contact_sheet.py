"""Contact sheets and comparison videos, to judge results by eye."""

from collections.abc import Sequence
import os
import pathlib
from typing import cast

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dicetalk_jax.errors import InputError
from dicetalk_jax.files import atomic_file

Row = tuple[str, Sequence[np.ndarray | None]]

_PAPER = (255, 255, 255)
_INK = (20, 20, 20)
_GAP = 4


def contact_sheet(
  rows: Sequence[Row],
  headings: Sequence[str] = (),
  *,
  scale: float = 1.0,
  path: str | os.PathLike | None = None,
) -> np.ndarray:
  """Lays frames out as a table, such as emotions downwards and time to the right.

  Args:
    rows: (label, frames) each; frames uint8 [h,w,3] of one size, None for an empty
      cell.
    headings: one per column, or none.
    scale: size of a cell relative to its frame.
    path: where to save it too, `.png` or `.jpg`; missing folders are made.

  Returns:
    The sheet, uint8 [H,W,3].

  Raises:
    InputError: the path cannot be written.
  """
  first = next(frame for _, frames in rows for frame in frames if frame is not None)
  height = max(1, round(first.shape[0] * scale))
  width = max(1, round(first.shape[1] * scale))
  columns = max(len(frames) for _, frames in rows)
  label_font = _font([label for label, _ in rows], 2 * width, height / 3)
  heading_font = _font(headings, width, height / 4)
  left = max(round(label_font.getlength(label)) for label, _ in rows) + 2 * _GAP
  top = round(1.5 * heading_font.size) if headings else 0

  size = left + columns * (width + _GAP), top + len(rows) * (height + _GAP)
  sheet = Image.new('RGB', size, _PAPER)
  draw = ImageDraw.Draw(sheet)
  for column, heading in enumerate(headings):
    middle = left + column * (width + _GAP) + width / 2, top / 2
    draw.text(middle, heading, _INK, heading_font, anchor='mm')
  for row, (label, frames) in enumerate(rows):
    y = top + row * (height + _GAP)
    draw.text((left - _GAP, y + height / 2), label, _INK, label_font, anchor='rm')
    for column, frame in enumerate(frames):
      if frame is not None:
        cell = Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS)
        sheet.paste(cell, (left + column * (width + _GAP), y))
  if path is not None:
    save_image(path, np.asarray(sheet))
  return np.asarray(sheet)


def grid(rows: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
  """Lays images of equal size edge to edge.

  Args:
    rows: of float [H,W,3] in [-1,1].

  Returns:
    uint8 [rows * H, columns * W, 3].
  """
  pixels = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
  return np.round((np.clip(pixels, -1, 1) + 1) * 127.5).astype(np.uint8)


def side_by_side(videos: Sequence[np.ndarray], labels: Sequence[str]) -> np.ndarray:
  """Puts videos next to each other; shorter ones repeat their last frame.

  Args:
    videos: uint8 [N_i,H,W_i,3] each, of one height.
    labels: one per video, shown above it.

  Returns:
    uint8 [max N_i, H + strip, sum W_i, 3].
  """
  widths = [video.shape[2] for video in videos]
  font = _font(labels, min(widths), videos[0].shape[1] / 8)
  strip = Image.new('RGB', (sum(widths), round(1.6 * font.size)), _PAPER)
  draw = ImageDraw.Draw(strip)
  left = 0
  for width, label in zip(widths, labels, strict=True):
    middle = left + width / 2, strip.height / 2
    draw.text(middle, label, _INK, font, anchor='mm')
    left += width

  length = max(len(video) for video in videos)
  extended = [video[np.minimum(np.arange(length), len(video) - 1)] for video in videos]
  pixels = np.asarray(strip)
  strips = np.broadcast_to(pixels, (length, *pixels.shape))
  return np.concatenate([strips, np.concatenate(extended, axis=2)], axis=1)


def save_image(path: str | os.PathLike, pixels: np.ndarray) -> None:
  """Writes uint8 [H,W,3] as PNG or JPEG; the file appears only when it is whole."""
  kinds = {'.png': 'PNG', '.jpg': 'JPEG', '.jpeg': 'JPEG'}
  kind = kinds.get(pathlib.Path(path).suffix.lower())
  if kind is None:
    raise InputError(
      f'{path}: images are written as PNG or JPEG; end the name in .png or .jpg'
    )
  with atomic_file(path) as part:
    Image.fromarray(pixels).save(part, kind, quality=93)


def _font(texts: Sequence[str], width: float, height: float) -> ImageFont.FreeTypeFont:
  """The largest font, 9 to 28 pixels, in which every text fits; 9 if none does."""
  size = int(np.clip(height, 9, 28))
  while size > 9 and any(_scalable(size).getlength(text) > width for text in texts):
    size -= 1
  return _scalable(size)


def _scalable(size: int) -> ImageFont.FreeTypeFont:
  """Pillow's font; its type allows for builds without FreeType."""
  return cast(ImageFont.FreeTypeFont, ImageFont.load_default(size=size))
