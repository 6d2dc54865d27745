"""Our UNet in PyTorch: the stock class of diffusers, with the adapters put into it.

Nothing is left out. Keys and values of the adapters come from outside, as in our step;
the pose guide is added after the first convolution.
"""

import dataclasses
from typing import Any

import diffusers
import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.denoising_step import Step
from convert import naming, torch_files
from dicetalk_jax.models.unet import UNetConfig

OURS = ('adapters', 'norm_num_groups')  # the stock class has no such arguments

KeysAndValues = tuple[torch.Tensor, torch.Tensor]  # [groups, S, C] each


class AdaptedAttention:
  """Attention processor of one `attn2`: the image token, and a sum over the adapters.

  All queries of a row share the keys in temporal blocks and of the emotion, so that
  these are never copied per pixel.
  """

  def __init__(self, adapters: list[KeysAndValues], mask: torch.Tensor | None):
    """Takes the keys and values of each adapter.

    Args:
      adapters: keys and values.
      mask: weights of the adapters' outputs `[rows, tokens]`; None for no weighting.
    """
    self.adapters = adapters
    self.mask = mask

  def __call__(
    self,
    attn: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    **_: Any,
  ) -> torch.Tensor:
    """The signature is that of diffusers: `attn` is the layer that calls this."""
    query = attn.to_q(hidden_states)
    key = attn.to_k(encoder_hidden_states)
    value = attn.to_v(encoder_hidden_states)
    out = attend(query, key, value, attn.heads)
    for key, value in self.adapters:
      out = out + self._masked(attend(query, key, value, attn.heads))
    project, dropout = attn.to_out
    return dropout(project(out))

  def _masked(self, x: torch.Tensor) -> torch.Tensor:
    """Weights `[rows * frames, tokens, C]` by the mask, the same in all frames."""
    if self.mask is None:
      return x
    rows = self.mask.shape[0]
    by_row = x.reshape(rows, -1, *x.shape[1:])
    return (by_row * self.mask[:, None, :, None]).reshape(x.shape)


def attend(
  query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int
) -> torch.Tensor:
  """Attention of queries that share keys and values in groups.

  Args:
    query: `[n, T, C]`.
    key, value: `[groups, S, C]`, where `groups` divides n.
    heads: number of them, which divides C.

  Returns:
    `[n, T, C]`.
  """
  groups, _, channels = key.shape

  def split(x):
    return x.reshape(groups, -1, heads, channels // heads).transpose(1, 2)

  out = scaled_dot_product_attention(split(query), split(key), split(value))
  return out.transpose(1, 2).reshape(query.shape)


class Twin:
  """The network with our parameters, and its inputs; call it without arguments."""

  def __init__(self, config: UNetConfig, step: Step, device: str, dtype: torch.dtype):
    self.device = device
    self.dtype = dtype
    self.unet = self._build(config, step)
    self._add_adapters(config, step)
    self._add_pose_guide(step)

    inputs = step.inputs
    self.inputs = (
      self._tensor(inputs.sample).movedim(-1, 2).contiguous(),
      torch.tensor(float(inputs.timestep), device=device, dtype=dtype),
      self._tensor(step.image).reshape(len(inputs.sample), 1, -1),
      self._tensor(inputs.time_ids),
    )

  def __call__(self) -> torch.Tensor:
    """The prediction `[rows, frames, C, h, w]`; may return before it is computed."""
    with torch.inference_mode():
      (prediction,) = self.unet(*self.inputs, return_dict=False)
      return prediction

  def prediction(self) -> np.ndarray:
    """In our layout, float32."""
    return self().float().movedim(2, -1).cpu().numpy()

  def _tensor(self, x: Any) -> torch.Tensor:
    """A contiguous copy of an array."""
    copy = torch_files.to_torch(np.array(x, order='C'))
    return copy.to(device=self.device, dtype=self.dtype)

  def _build(self, config: UNetConfig, step: Step) -> Any:
    """The stock class with our parameters, all but those of the adapters."""
    settings = dataclasses.asdict(config)
    for name in OURS:
      del settings[name]
    with torch.device('meta'):
      unet: Any = diffusers.UNetSpatioTemporalConditionModel(**settings)
    state = {
      naming.torch_name(name): self._tensor(naming.value_to_torch(name, np.asarray(x)))
      for name, x in step.params.items()
      if '.processor.' not in name
    }
    unet.load_state_dict(state, assign=True)
    return unet.eval()

  def _add_adapters(self, config: UNetConfig, step: Step) -> None:
    """Replaces the attention processors that have keys and values from outside."""
    masks = {mask.shape[1]: self._tensor(mask) for mask in step.inputs.masks}
    side = step.inputs.sample.shape[2]
    tokens = tokens_per_stage(config, side)
    processors = dict(self.unet.attn_processors)
    for name, (_, *adapters) in step.inputs.kv.items():  # image, audio, emotion
      temporal = 'temporal_transformer_blocks' in name
      stage = name.partition('.attentions')[0]
      processors[f'{name}.processor'] = AdaptedAttention(
        [(self._shared(k, temporal), self._shared(v, temporal)) for k, v in adapters],
        None if temporal else masks[tokens[stage]],
      )
    self.unet.set_attn_processor(processors)

  def _shared(self, x: Any, temporal: bool) -> torch.Tensor:
    """Keys or values `[rows, frames or 1, S, C]` as groups of queries share them.

    In temporal blocks all queries of a row share the mean of its frames.
    """
    values = self._tensor(x)
    return values.mean(1) if temporal else values.flatten(0, 1)

  def _add_pose_guide(self, step: Step) -> None:
    """Adds the output of the pose guide to that of the first convolution."""
    frames = step.inputs.sample.shape[1]
    guide = self._tensor(step.inputs.spatial).movedim(-1, 2)
    guide = guide.expand(-1, frames, -1, -1, -1).flatten(0, 1)
    self.unet.conv_in.register_forward_hook(lambda module, args, out: out + guide)


def tokens_per_stage(config: UNetConfig, side: int) -> dict[str, int]:
  """Tokens per frame of each stage, by its name."""
  last = config.levels - 1
  level_of = {'mid_block': last}
  for i in range(config.levels):
    level_of[f'down_blocks.{i}'] = i
    level_of[f'up_blocks.{i}'] = last - i
  return {stage: (side >> level) ** 2 for stage, level in level_of.items()}
