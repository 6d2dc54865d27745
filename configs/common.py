"""Defaults and presets that the three training configurations share.

A configuration file only states values: it imports nothing but ml_collections. Where a
value is one of several names, the comment lists them: 'this' | 'that'.

Sequences are tuples, never lists, so that every value can be overridden on the command
line: --config.optim.betas=0.9,0.99
"""

from typing import Any

import ml_collections

# Dotted key -> value; None removes a whole section.
Variant = dict[str, Any]

PAPER = 'paper_strict'  # what the paper states; other presets may change it again


def training(task: str) -> ml_collections.ConfigDict:
  """Returns everything that the loop reads, with the defaults of a full-size run."""
  config = ml_collections.ConfigDict()
  config.task = task
  config.seed = 0

  # Length and batches.
  config.total_steps = 30_000
  config.batch_size = 32  # global, over all devices and processes
  config.accum = 1  # micro-batches per step; the embedder needs whole batches

  # Devices; see docs/scale.md. One size may be -1: all devices that the others leave.
  config.mesh = dict(
    data=1,  # copies of the parameters
    fsdp=-1,  # devices that share a copy
    sequence=1,  # devices that split the image height of every frame
  )
  config.multihost = False  # True on pods and clusters: jax.distributed.initialize()
  # Of the computation; parameters stay float32.
  config.dtype = 'bfloat16'  # 'bfloat16' | 'float32' | 'float16'

  # What is trained: sets ('all'; diffusion also 'adapters', 'adapters_temporal'), or
  # regular expressions on dotted parameter names.
  config.trainable = ('all',)

  # Low-rank factors of frozen kernels.
  config.lora = dict(
    rank=0,  # 0: no factors
    alpha=8.0,
    targets=(r'attn[12]\.to_(q|k|v|out\.0)\.kernel$',),  # found in names of kernels
  )

  # Optimizer.
  config.optim = dict(
    name='adam',  # 'adam' | 'adamw' | 'muon'
    lr=1e-5,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,  # not with 'adam'
    clip=1.0,  # global norm of the gradient; 0: no clipping
    warmup=500,  # updates
    schedule='constant',  # 'constant' | 'cosine'
    end_lr=0.0,  # where the cosine ends
    ema=0.9999,  # final decay; 0: no EMA
    new_module_lr_mult=1.0,  # rate of modules that no pretrained model has
  )

  # How often, in steps.
  config.log_every = 50
  config.eval_every = 1_000
  config.checkpoint_every = 1_000
  config.keep = 2  # the latest checkpoints

  # Model folders.
  config.model = ''  # with the frozen components; the run writes to <workdir>/model
  # With initial weights, such as converted SVD-XT-1.1. Random ones must be asked for by
  # name, as 'random'; '' is refused.
  config.init_from = ''

  # Data.
  config.data = dict(
    dir='',  # '': <workdir>/../data
    # 'synthetic' is the data set of that name below `dir`. Otherwise the folder of a
    # prepared data set, or several: A,B,C or with weights A=0.5,B=0.4,C=0.1
    # Without weights, data sets with and without emotion labels get half of the
    # examples each, as in the paper (section 4.1).
    dataset='synthetic',
    corpora=(),  # that the data sets must come from, such as ('mead', 'hdtf'); (): any
    workers=0,  # processes that read; 0: threads of this one
  )
  return config


def tiny(config: ml_collections.ConfigDict) -> None:
  """Changes a full-size configuration to synthetic data and tiny frozen models."""
  config.dtype = 'float32'
  config.optim.name = 'muon'  # from scratch, in few steps
  config.optim.warmup = 50
  config.mesh.data = -1
  config.mesh.fsdp = 1
  # There are no published weights at this size: all networks begin at random, the
  # frozen ones too, and bundle.json says so.
  config.init_from = 'random'
  config.frozen = dict(
    whisper=dict(
      d_model=64,
      encoder_layers=1,
      encoder_attention_heads=2,
      encoder_ffn_dim=64,
    ),
    image_encoder=dict(
      hidden_size=32,
      intermediate_size=64,
      projection_dim=64,
      num_hidden_layers=1,
      num_attention_heads=2,
      image_size=56,
      patch_size=14,
    ),
  )


def presets(arg: str, variants: dict[str, Variant]) -> tuple[bool, Variant]:
  """Reads what follows the colon of `--config=file.py:tiny,name,name`.

  Args:
    arg: 'default', or names that are combined, separated by commas. Wherever they
      stand, 'tiny' is applied first, then 'paper_strict', then what changes the paper's
      model, such as its ablations.
    variants: what the other names change.

  Returns:
    Whether 'tiny' is among the names, and all changes of the others together.

  Raises:
    ValueError: an unknown name, one given twice, or two that contradict each other.
  """
  names = arg.split(',')
  known = ('default', 'tiny', *variants)
  for name in names:
    if name not in known:
      raise ValueError(f"unknown preset '{name}'; this file has: {', '.join(known)}")
  if len(set(names)) < len(names) or ('default' in names and len(names) > 1):
    raise ValueError(f"presets '{arg}': give each name once, and 'default' alone")

  changes: Variant = {}
  set_by: dict[str, str] = {}  # preset by key
  for name in sorted(names, key=lambda name: name != PAPER):
    for key, value in variants.get(name, {}).items():
      for other in changes:
        is_inside = key.startswith(f'{other}.') or other.startswith(f'{key}.')
        differs = key == other and value != changes[other]
        if is_inside or (differs and set_by[other] != PAPER):
          raise ValueError(
            f"presets '{set_by[other]}' and '{name}' contradict each other in "
            f'config.{max(key, other, key=len)}'
          )
      changes[key] = value
      set_by[key] = name
  return 'tiny' in names, changes


def change(config: ml_collections.ConfigDict, changes: Variant) -> None:
  """Applies the changes that `presets` returned."""
  with config.unlocked():
    for key, value in changes.items():
      if value is None:
        del config[key]
  values = {key: value for key, value in changes.items() if value is not None}
  config.update_from_flattened_dict(values)
