"""A small reference implementation in PyTorch, from its description, as a program.

    python twin_program.py CHECKPOINTS [--half] [FAULT ...]

It reads files in the published layout, as `published_folders` makes them. Inputs are
random numbers in the place of pixels, log-mel and prior. A FAULT is `face`,
`no_emotion`, `guidance`, `time_context` or `decoder`. --half computes in the types of
the release: float16, but for the encoder and for what makes tokens.
"""

import argparse
import json
import math
import pathlib

import diffusers
import torch
from torch import nn
from torch.nn import functional as F
import transformers

from dicetalk_jax.models.emotion import EmotionConfig
from tests.convert import published_folders
from tests.models import emotion_twin

FRAMES = 3  # of the clip
WINDOW = 3
STEPS = 3
SHIFT = 2
CHUNK = 2
HEIGHT, WIDTH = 32, 48


class Context:
  """What the adapters of all layers share.

  Attributes:
    tokens: of audio and emotion, each [B,F,K,D].
    mask: of the face [H,W].
    first_frame: a fault: temporal layers see the first frame instead of the mean.
  """

  tokens: tuple[torch.Tensor, torch.Tensor]
  mask: torch.Tensor
  first_frame = False


class Adapters(nn.Module):
  """Decoupled cross-attention to the image, to audio and to emotion."""

  def __init__(self, context, attention, temporal):
    super().__init__()
    inner, width = attention.to_k.weight.shape

    def projections():
      return nn.ModuleList([nn.Linear(width, inner, bias=False) for _ in range(2)])

    self.to_k_ip = projections()
    self.to_v_ip = projections()
    self.context = context
    self.temporal = temporal

  def forward(self, attn, hidden_states, encoder_hidden_states, **_):
    def heads(x):
      return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

    def attend(key, value):
      y = F.scaled_dot_product_attention(query, heads(key), heads(value))
      return y.transpose(1, 2).flatten(2)

    query = heads(attn.to_q(hidden_states))
    image = encoder_hidden_states
    out = attend(attn.to_k(image), attn.to_v(image))
    for i, tokens in enumerate(self.context.tokens):
      if self.temporal:
        tokens = tokens[:, 0] if self.context.first_frame else tokens.mean(1)
        tokens = tokens.repeat_interleave(len(hidden_states) // len(tokens), dim=0)
      else:
        tokens = tokens.flatten(0, 1)
      y = attend(self.to_k_ip[i](tokens), self.to_v_ip[i](tokens))
      if not self.temporal:
        y = y * self.mask(y.shape[1])[None, :, None]
      out = out + y
    return attn.to_out[0](out)

  def mask(self, tokens):
    """The face mask on a grid of so many tokens."""
    height, width = self.context.mask.shape
    rows = math.floor(math.sqrt(tokens / (width / height)))
    rows += tokens % rows != 0
    mask = self.context.mask[None, None]
    grid = F.interpolate(mask, (rows, tokens // rows), mode='bicubic')
    return grid.flatten().to(self.to_k_ip[0].weight.dtype)


def add_adapters(unet, context):
  for name, attention in unet.named_modules():
    if name.endswith('attn2'):
      temporal = 'temporal_transformer_blocks' in name
      attention.set_processor(Adapters(context, attention, temporal))


class PoseGuider(nn.Module):
  def __init__(self, conditioning_embedding_channels, block_out_channels):
    super().__init__()
    self.conv_in = nn.Conv2d(3, block_out_channels[0], 3, padding=1)
    self.blocks = nn.ModuleList()
    for before, after in zip(block_out_channels, block_out_channels[1:]):
      self.blocks.append(nn.Conv2d(before, before, 3, padding=1))
      self.blocks.append(nn.Conv2d(before, after, 3, padding=1, stride=2))
    last = block_out_channels[-1]
    self.conv_out = nn.Conv2d(last, conditioning_embedding_channels, 3, padding=1)
    self.act = F.silu

  def forward(self, mask):
    """[B,3,F,H,W] to [B,C,F,h,w]."""
    x = self.act(self.conv_in(mask.transpose(1, 2).flatten(0, 1)))
    for block in self.blocks:
      x = self.act(block(x))
    return self.conv_out(x).unflatten(0, (len(mask), -1)).transpose(1, 2)


class AudioLinear(nn.Module):
  def __init__(self, seq_len, blocks, channels, dim, output_dim, tokens):
    super().__init__()
    self.proj1 = nn.Linear(seq_len * blocks * channels, dim)
    self.proj2 = nn.Linear(dim, dim)
    self.proj3 = nn.Linear(dim, tokens * output_dim)
    self.norm = nn.LayerNorm(output_dim)

  def forward(self, windows):
    """[B,F,positions,layers,channels] to [B,F,K,D]."""
    x = F.relu(self.proj2(F.relu(self.proj1(windows.flatten(2)))))
    x = self.proj3(x)
    return self.norm(x.unflatten(-1, (-1, len(self.norm.weight))))


class EmotionModel(emotion_twin.Twin):
  """Takes and gives one axis per frame, as the original."""

  fault = False

  def forward(self, prior):
    zero_code = self.fault and not prior.any()
    drop = torch.tensor([zero_code])
    tokens, loss = super().forward(prior.reshape(1, -1), zero_code, drop)
    return tokens[:, None], loss


class Original:
  """The networks, with the weights of a folder, and the pipeline."""

  def __init__(self, folder, faults, dtype):
    sizes = published_folders.DICETALK
    audio = sizes['audio_linear']
    dicetalk = folder / 'DICE-Talk'
    svd = folder / 'svd'

    def load(module, name):
      module.load_state_dict(torch.load(dicetalk / f'{name}.pth'))
      return module.eval()

    self.context = Context()
    self.context.first_frame = 'time_context' in faults
    unet = diffusers.UNetSpatioTemporalConditionModel(**published_folders.UNET)
    add_adapters(unet, self.context)
    self.unet = load(unet, 'unet')
    self.unet.conv_in.register_forward_hook(lambda *call: call[2] + self.spatial)
    self.vae = diffusers.AutoencoderKLTemporalDecoder.from_pretrained(svd / 'vae')
    self.image_encoder = transformers.CLIPVisionModelWithProjection.from_pretrained(
      svd / 'image_encoder'
    )
    config = json.loads((svd / 'scheduler' / 'scheduler_config.json').read_text())
    self.scheduler = diffusers.EulerDiscreteScheduler.from_config(config)
    self.whisper = transformers.WhisperModel.from_pretrained(folder / 'whisper').encoder
    self.audio_linear = load(
      AudioLinear(
        10,
        audio['blocks'],
        audio['channels'],
        audio['intermediate_dim'],
        audio['output_dim'],
        audio['context_tokens'],
      ),
      'audio_linear',
    )
    emotion = EmotionModel(EmotionConfig.from_json(sizes['emo_model']))
    self.emo_model = load(emotion, 'emo_model')
    self.emo_model.fault = 'no_emotion' in faults
    self.pose_guider = load(PoseGuider(**sizes['pose_guider']), 'pose_guider')
    if 'face' in faults:
      self.pose_guider.act = F.relu
    if 'decoder' in faults:
      with torch.no_grad():
        self.vae.decoder.time_conv_out.bias += 0.05
    self.dtype = dtype
    for module in (self.unet, self.image_encoder, self.pose_guider):
      module.to(dtype)
    self.guidance = (6.0, 3.0) if 'guidance' in faults else (3.0, 6.0)

  @torch.no_grad()
  def run(self):
    """Makes a clip of random inputs, as the description says, in the naive order."""
    torch.manual_seed(0)

    # 1. Conditions
    states = self.whisper(torch.randn(1, 80, 3000), output_hidden_states=True)
    states = torch.stack(states.hidden_states, dim=2)[:, : 4 * FRAMES + 2]
    padded = F.pad(states, (0, 0, 0, 0, 4, 6))
    prior = torch.randn(
      1, 1, 1, 1, published_folders.DICETALK['emo_model']['prior_dim']
    )
    audio, emotion = [], []
    for i in range(FRAMES):
      window = padded[:, None, 4 * i : 4 * i + 10]
      audio.append(self.audio_linear(window))
      no_audio = self.audio_linear(torch.zeros_like(window))
      emotion.append(self.emo_model(prior)[0])
      no_emotion = self.emo_model(torch.zeros_like(prior))[0]
    audio, no_audio = self._rows(audio, no_audio)
    emotion, no_emotion = self._rows(emotion, no_emotion)
    clip_image = torch.randn(1, 3, 28, 28)
    embeds = self.image_encoder(clip_image.to(self.dtype)).image_embeds
    image = torch.rand(1, 3, HEIGHT, WIDTH) * 2 - 1
    portrait = self.vae.encode(image).latent_dist.mode()
    reference = self.vae.encode(image).latent_dist.mode().to(self.dtype)
    self.vae.to(self.dtype)
    self.context.mask = torch.zeros(HEIGHT, WIDTH)
    self.context.mask[6:22, 10:30] = 1
    total = FRAMES + WINDOW
    mask = self.context.mask.expand(1, 3, total, -1, -1)
    spatial = self.pose_guider(mask.to(self.dtype))[0, :, 0]
    self.spatial = spatial.expand(3 * WINDOW, -1, -1, -1)

    # 2. Sampling
    self.scheduler.set_timesteps(STEPS)
    times = self.scheduler.timesteps
    noise = torch.randn(1, total, *portrait.shape[1:]).to(self.dtype)
    scaled = self.vae.config.scaling_factor * portrait[:, None].expand_as(noise)
    latents = self.scheduler.add_noise(scaled.to(self.dtype), noise, times[:1])
    for step, time in enumerate(times):
      latents = self._step(latents, step, time, embeds, reference, audio, emotion)

    # 3. Decoding
    z = latents[0] / self.vae.config.scaling_factor
    return torch.cat([self.vae.decode(x, len(x)).sample for x in z.split(CHUNK)])

  def _rows(self, tokens, null):
    """Tokens [3,T,K,D] of the guidance rows; padding frames have none."""
    null = null.expand(1, FRAMES + WINDOW, -1, -1)
    own = torch.cat([*tokens, null[:, FRAMES:]], dim=1)
    return torch.cat([null, null, own]).to(self.dtype), null

  def _step(self, latents, step, time, embeds, reference, audio, emotion):
    total = latents.shape[1]
    sums = torch.zeros_like(latents)
    counts = torch.zeros(total, 1, 1, 1, dtype=self.dtype)
    has_image = torch.tensor([0.0, 1, 1], dtype=self.dtype)
    for start in range(0, total, WINDOW):
      index = (start - step * SHIFT % WINDOW + torch.arange(WINDOW)) % total
      x = latents[:, index]
      self.scheduler._step_index = step
      noisy = self.scheduler.scale_model_input(x, time).expand(3, -1, -1, -1, -1)
      image = has_image[:, None, None, None, None] * reference.expand_as(x)
      self.context.tokens = audio[:, index], emotion[:, index]
      v_none, v_image, v_all = self.unet(
        torch.cat([noisy, image], dim=2),
        time,
        has_image[:, None, None] * embeds[:, None],
        added_time_ids=torch.tensor([[12.5, 8, 16]]).expand(3, -1),
      ).sample
      g_image, g_condition = self.guidance
      v = v_none + g_image * (v_image - v_none) + g_condition * (v_all - v_image)
      self.scheduler._step_index = step
      sums[:, index] += self.scheduler.step(v[None], time, x).prev_sample
      counts[index] += 1
    return sums / counts


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('checkpoints', type=pathlib.Path)
  parser.add_argument('faults', nargs='*')
  parser.add_argument('--half', action='store_true')
  flags = parser.parse_args()
  dtype = torch.float16 if flags.half else torch.float32
  Original(flags.checkpoints, flags.faults, dtype).run()


if __name__ == '__main__':
  main()
