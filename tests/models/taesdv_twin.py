"""TAESDV in PyTorch, frame after frame: its published form, written anew."""

import torch
from torch import nn


def conv(cin, cout, stride=1, bias=True):
  return nn.Conv2d(cin, cout, 3, stride, 1, bias=bias)


class Residual(nn.Module):
  """Three convolutions of the input, joined with a memory if `remembers`."""

  def __init__(self, width, remembers):
    super().__init__()
    self.remembers = remembers
    cin = 2 * width if remembers else width
    layers = []
    for first in (cin, width, width):
      layers += [conv(first, width), nn.ReLU()]
    self.conv = nn.Sequential(*layers[:-1])

  def forward(self, x, memory=None):
    seen = torch.cat([x, memory], dim=1) if self.remembers else x
    return torch.relu(self.conv(seen) + x)


class Twin(nn.Module):
  """The layers of the published file, by its names."""

  def __init__(self, latents=4, width=64, levels=3, blocks=3):
    super().__init__()
    encoder = [conv(3, width), Residual(width, False)]
    for _ in range(levels):
      encoder += [conv(width, width, stride=2, bias=False)]
      encoder += [Residual(width, False) for _ in range(blocks)]
    self.encoder = nn.Sequential(*encoder, conv(width, latents))
    decoder = [nn.Identity(), conv(latents, width), nn.ReLU()]
    for _ in range(levels):
      decoder += [Residual(width, True) for _ in range(blocks)]
      decoder += [nn.Upsample(scale_factor=2), conv(width, width, bias=False)]
    self.decoder = nn.Sequential(*decoder, Residual(width, True), conv(width, 3))

  def decode(self, z):
    """`[B, F, 4, h, w]` to `[B, F, 3, H, W]`, one frame at a time."""
    memory = {}
    frames = []
    for latent in z.unbind(1):
      x = 3 * torch.tanh(latent / 3)
      for number, layer in enumerate(self.decoder):
        if isinstance(layer, Residual):
          before = memory.get(number, torch.zeros_like(x))
          memory[number] = x
          x = layer(x, before)
        else:
          x = layer(x)
      frames.append(x)
    return torch.stack(frames, 1)
