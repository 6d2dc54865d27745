"""YOLOv5m-face in PyTorch, written from the specification, at any size."""

import torch
from torch import nn
from torch.nn import functional

from dicetalk_jax.models.yolo_face import STRIDES, YoloFaceConfig

EPSILON = 1e-3
TINY = YoloFaceConfig(widths=(4, 6, 8, 12, 16), depths=(1, 2, 2, 1))


class Conv(nn.Module):
  """Convolution, batch norm unless it is folded, SiLU."""

  def __init__(self, cin, cout, kernel=1, stride=1, fused=False):
    super().__init__()
    self.conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, bias=fused)
    self.bn = nn.Identity() if fused else nn.BatchNorm2d(cout, eps=EPSILON)

  def forward(self, x):
    return functional.silu(self.bn(self.conv(x)))


class Stem(nn.Module):
  def __init__(self, width, fused):
    super().__init__()
    self.stem_1 = Conv(3, width, 3, 2, fused)
    self.stem_2a = Conv(width, width // 2, fused=fused)
    self.stem_2b = Conv(width // 2, width, 3, 2, fused)
    self.stem_3 = Conv(2 * width, width, fused=fused)

  def forward(self, x):
    x = self.stem_1(x)
    pooled = functional.max_pool2d(x, 2, 2, ceil_mode=True)
    return self.stem_3(torch.cat([self.stem_2b(self.stem_2a(x)), pooled], 1))


class Bottleneck(nn.Module):
  def __init__(self, width, shortcut, fused):
    super().__init__()
    self.cv1 = Conv(width, width, fused=fused)
    self.cv2 = Conv(width, width, 3, fused=fused)
    self.shortcut = shortcut

  def forward(self, x):
    out = self.cv2(self.cv1(x))
    return x + out if self.shortcut else out


class C3(nn.Module):
  def __init__(self, cin, cout, depth, shortcut, fused):
    super().__init__()
    half = cout // 2
    self.cv1 = Conv(cin, half, fused=fused)
    self.cv2 = Conv(cin, half, fused=fused)
    self.cv3 = Conv(2 * half, cout, fused=fused)
    self.m = nn.Sequential(*(Bottleneck(half, shortcut, fused) for _ in range(depth)))

  def forward(self, x):
    return self.cv3(torch.cat([self.m(self.cv1(x)), self.cv2(x)], 1))


class SPP(nn.Module):
  def __init__(self, width, fused):
    super().__init__()
    self.cv1 = Conv(width, width // 2, fused=fused)
    self.cv2 = Conv(2 * width, width, fused=fused)

  def forward(self, x):
    x = self.cv1(x)
    pools = [functional.max_pool2d(x, k, 1, k // 2) for k in (3, 5, 7)]
    return self.cv2(torch.cat([x, *pools], 1))


class Detect(nn.Module):
  def __init__(self, widths, anchors):
    super().__init__()
    self.m = nn.ModuleList(nn.Conv2d(width, 48, 1) for width in widths)
    grid = torch.tensor(anchors).float().reshape(3, 1, 3, 1, 1, 2)
    self.register_buffer('anchor_grid', grid)
    strides = torch.tensor(STRIDES).reshape(3, 1, 1)
    self.register_buffer('anchors', grid.reshape(3, 3, 2) / strides)

  def forward(self, levels, grids):
    rows = []
    for i, x in enumerate(levels):
      x = self.m[i](x)
      count, _, height, width = x.shape
      x = x.view(count, 3, 16, height, width).permute(0, 1, 3, 4, 2)
      s = x.sigmoid()
      anchor = self.anchor_grid[i]
      xy = (2 * s[..., :2] - 0.5 + grids[i]) * STRIDES[i]
      wh = (2 * s[..., 2:4]) ** 2 * anchor
      points = [
        x[..., 5 + 2 * k : 7 + 2 * k] * anchor + grids[i] * STRIDES[i] for k in range(5)
      ]
      decoded = torch.cat([xy, wh, s[..., 4:5], *points, s[..., 15:]], -1)
      rows.append(decoded.reshape(count, -1, 16))
    return torch.cat(rows, 1)


class Net(nn.Module):
  """Call it with an image `[B,3,H,W]` and the grids of `grids`."""

  def __init__(self, config=TINY, fused=False):
    super().__init__()
    stem, w4, w8, w16, w32 = config.widths
    d4, d8, d16, d32 = config.depths

    def conv(*args):
      return Conv(*args, fused=fused)

    def c3(cin, cout, depth, shortcut=False):
      return C3(cin, cout, depth, shortcut, fused)

    self.model = nn.ModuleList(
      [
        Stem(stem, fused),
        c3(stem, w4, d4, True),
        conv(w4, w8, 3, 2),
        c3(w8, w8, d8, True),
        conv(w8, w16, 3, 2),
        c3(w16, w16, d16, True),
        conv(w16, w32, 3, 2),
        SPP(w32, fused),
        c3(w32, w32, d32),
        conv(w32, w16),
        nn.Upsample(scale_factor=2),
        nn.Identity(),
        c3(2 * w16, w16, d32),
        conv(w16, w8),
        nn.Upsample(scale_factor=2),
        nn.Identity(),
        c3(2 * w8, w8, d32),
        conv(w8, w8, 3, 2),
        nn.Identity(),
        c3(2 * w8, w16, d32),
        conv(w16, w16, 3, 2),
        nn.Identity(),
        c3(2 * w16, w32, d32),
        Detect((w8, w16, w32), config.anchors),
      ]
    )

  def forward(self, x, grids: list[torch.Tensor]):
    m = self.model
    x = m[2](m[1](m[0](x)))
    stride_8 = m[3](x)
    stride_16 = m[5](m[4](stride_8))
    top = m[9](m[8](m[7](m[6](stride_16))))
    x = m[12](torch.cat([m[10](top), stride_16], 1))
    middle = m[13](x)
    small = m[16](torch.cat([m[14](middle), stride_8], 1))
    medium = m[19](torch.cat([m[17](small), middle], 1))
    large = m[22](torch.cat([m[20](medium), top], 1))
    return m[23]([small, medium, large], grids)


class Wrapped(nn.Module):
  """The network as a part of another: its names get a prefix."""

  def __init__(self, net):
    super().__init__()
    self.detector = net

  def forward(self, x, grids: list[torch.Tensor]):
    return self.detector(x, grids)


def grids(height: int, width: int) -> list[torch.Tensor]:
  """Cell indices (x, y) of the three levels, `[1,1,ny,nx,2]`."""
  made = []
  for stride in STRIDES:
    y, x = torch.meshgrid(
      torch.arange(height // stride), torch.arange(width // stride), indexing='ij'
    )
    made.append(torch.stack([x, y], -1).float()[None, None])
  return made


def random_net(fused=False, seed=0) -> Net:
  """A network in evaluation mode in which nothing is zero or one."""
  torch.manual_seed(seed)
  net = Net(fused=fused).eval()
  with torch.no_grad():
    for x in net.parameters():
      x.add_(0.2 * torch.randn(x.shape))
    for name, x in net.named_buffers():
      if 'running' in name:
        x.add_(0.3 * torch.rand(x.shape))
  return net


def trace(net, height=64, width=96):
  """TorchScript of a network."""
  example = torch.rand(1, 3, height, width), grids(height, width)
  return torch.jit.trace(net, example)
