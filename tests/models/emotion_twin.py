"""The emotion model in PyTorch, from its description."""

import torch
from torch import nn
from torch.nn import functional as F


class Tokens(nn.Module):
  def __init__(self, width, config):
    super().__init__()
    self.proj1 = nn.Linear(width, config.intermediate_dim)
    self.proj2 = nn.Linear(config.intermediate_dim, config.intermediate_dim)
    self.proj3 = nn.Linear(config.intermediate_dim, config.tokens * config.dim)
    self.norm = nn.LayerNorm(config.dim)

  def forward(self, x):
    x = self.proj3(F.relu(self.proj2(F.relu(self.proj1(x)))))
    return self.norm(x.unflatten(-1, (-1, len(self.norm.weight))))


class Twin(nn.Module):
  """The same mathematics; parameters have their published names."""

  def __init__(self, config):
    super().__init__()

    def linear():
      return nn.Linear(config.dim, config.dim)

    self.config = config
    self.emo_linear = Tokens(config.prior_dim, config)
    self.kv_tokens_linear = Tokens(config.dim, config)
    self.codebook = nn.ModuleDict(
      {
        'fc': nn.Linear(config.prior_dim, config.dim),
        'codebook': nn.Embedding(config.codebook_size, config.dim),
      }
    )
    self.attention = nn.ModuleDict(
      {'fc_q': linear(), 'fc_k': linear(), 'fc_v': linear()}
    )
    widths = (config.classifier_in, *config.classifier_hidden, config.num_classes)
    self.classifier = nn.ModuleDict(
      {f'fc{i + 1}': nn.Linear(*widths[i : i + 2]) for i in range(3)}
    )

  def forward(self, prior, retrieval, drop):
    z, table = self.codebook['fc'](prior), self.codebook['codebook'].weight
    nearest = table[torch.cdist(z, table).argmin(1)]
    loss = F.mse_loss(nearest, z.detach()) + self.config.commitment * F.mse_loss(
      z, nearest.detach()
    )
    code = z + (nearest - z).detach()
    keep = (~drop).float()[:, None]
    q = self.attention['fc_q'](self.emo_linear(prior * keep))
    context = (
      self.kv_tokens_linear(code * keep)
      if retrieval
      else self.kv_tokens_linear(table).flatten(0, 1)[None]
    )

    def heads(y):
      return y.unflatten(-1, (self.config.num_heads, -1)).transpose(1, 2)

    y = F.scaled_dot_product_attention(
      heads(q),
      *(
        heads(self.attention[name](context)).expand(len(q), -1, -1, -1)
        for name in ('fc_k', 'fc_v')
      ),
    )
    return y.transpose(1, 2).flatten(2), loss

  def classify(self, features):
    x = F.adaptive_avg_pool2d(features, 1).flatten(1)
    x = F.relu(self.classifier['fc2'](F.relu(self.classifier['fc1'](x))))
    return self.classifier['fc3'](x)
