"""Our UNet in PyTorch: the stock class of diffusers, with the adapters put into it.

Nothing is left out. Keys and values of the adapters come from outside, as in our step;
the pose guide is added after the first convolution.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import diffusers
import jax
import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from benchmarks.denoising_step import Step
from convert import naming, torch_files
from dicetalk_jax.models.unet import UNetConfig

OURS = ('adapters', 'norm_num_groups')  # the stock class has no such arguments


def tensor(x: Any, where: Mapping[str, Any]) -> torch.Tensor:
  """A contiguous copy of an array, of device and type `where`."""
  return torch_files.to_torch(np.array(x, order='C')).to(**where)


class AdaptedAttention:
  """Attention processor of one `attn2`: the image token, and a sum over the adapters.

  All queries of a row share the keys in temporal blocks and of the emotion, so that
  these are never copied per pixel.
  """

  def __init__(
    self, pairs: list[tuple[torch.Tensor, torch.Tensor]], mask: torch.Tensor | None
  ):
    """`pairs`: keys and values `[groups,S,C]`; `mask`: `[rows,tokens]`, or None."""
    self.pairs, self.mask = pairs, mask

  def __call__(
    self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_
  ):
    x = hidden_states
    q = attn.to_q(x)
    image = attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
    out = attend(q, *image, attn.heads)
    for k, v in self.pairs:
      y = attend(q, k, v, attn.heads)
      if self.mask is not None:
        rows = self.mask.shape[0]
        weights = self.mask[:, None, :, None]
        y = (y.reshape(rows, -1, *y.shape[1:]) * weights).reshape(y.shape)
      out = out + y
    return attn.to_out[1](attn.to_out[0](out))


def attend(
  q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int
) -> torch.Tensor:
  """q `[n,T,C]`, k and v `[groups,S,C]` where `groups` divides n; returns `[n,T,C]`."""
  groups, _, channels = k.shape

  def split(x):
    return x.reshape(groups, -1, heads, channels // heads).transpose(1, 2)

  return sdpa(split(q), split(k), split(v)).transpose(1, 2).reshape(q.shape)


class Twin:
  """The network with our parameters, and its inputs; call it without arguments."""

  def __init__(self, config: UNetConfig, step: Step, device: str, dtype: torch.dtype):
    where = {'device': device, 'dtype': dtype}
    sample, timestep, kv, time_ids, spatial, masks = step.inputs
    rows, frames = sample.shape[:2]

    # Weights
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in OURS}
    with torch.device('meta'):
      self.unet = diffusers.UNetSpatioTemporalConditionModel(**settings)
    stock = {k: x for k, x in step.params.items() if '.processor.' not in k}
    state = {
      naming.torch_name(k): tensor(naming.value_to_torch(k, np.asarray(x)), where)
      for k, x in stock.items()
    }
    self.unet.load_state_dict(state, assign=True)
    self.unet.eval()

    # Adapters: `kv` has [rows, frames or 1, S, C] of image, audio and emotion.
    masks = {x.shape[1]: tensor(x, where) for x in masks}
    levels = levels_of(config, sample.shape[2])
    processors = dict(self.unet.attn_processors)
    for name, (_, *adapters) in kv.items():
      temporal = 'temporal_transformer_blocks' in name
      pairs = [tuple(shared(x, temporal, where) for x in pair) for pair in adapters]
      mask = None if temporal else masks[levels[name.partition('.attentions')[0]]]
      processors[f'{name}.processor'] = AdaptedAttention(pairs, mask)
    self.unet.set_attn_processor(processors)

    # Pose guide
    guide = (
      tensor(spatial, where).movedim(-1, 2).expand(-1, frames, -1, -1, -1).flatten(0, 1)
    )
    self.unet.conv_in.register_forward_hook(lambda module, args, out: out + guide)

    self.inputs = (
      tensor(sample, where).movedim(-1, 2).contiguous(),
      torch.tensor(float(timestep), **where),
      tensor(step.image, where).reshape(rows, 1, -1),
      tensor(time_ids, where),
    )

  def __call__(self) -> torch.Tensor:
    """The prediction `[rows,frames,C,h,w]`; may return before it is computed."""
    with torch.inference_mode():
      return self.unet(*self.inputs, return_dict=False)[0]

  def prediction(self) -> np.ndarray:
    """In our layout, float32."""
    return self().float().movedim(2, -1).cpu().numpy()


def shared(x: jax.Array, temporal: bool, where: Mapping[str, Any]) -> torch.Tensor:
  """Keys or values `[rows,frames or 1,S,C]` for groups of queries that share them."""
  x = tensor(x, where)
  return x.mean(1) if temporal else x.flatten(0, 1)


def levels_of(config: UNetConfig, side: int) -> dict[str, int]:
  """Tokens per frame of each stage, by its name."""
  last = config.levels - 1
  tokens = {f'down_blocks.{i}': (side >> i) ** 2 for i in range(config.levels)}
  tokens |= {f'up_blocks.{i}': (side >> (last - i)) ** 2 for i in range(config.levels)}
  return tokens | {'mid_block': (side >> last) ** 2}
