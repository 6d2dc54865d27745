"""What the three training configurations share.

Kept free of jax: a config file only states values.

Tuples, never lists, so that every value can be overridden on the command line.
"""

from typing import Any

import ml_collections

EMOTIONS = (
  'angry',
  'contempt',
  'disgusted',
  'fear',
  'happy',
  'neutral',
  'sad',
  'surprised',
)


# Dotted key -> value; None removes a whole section.
Variant = dict[str, Any]


def presets(arg: str, variants: dict[str, Variant]) -> tuple[bool, Variant]:
  """Reads what follows the colon of `--config=file.py:tiny,name,name`.

  Args:
    arg: 'default', or names that are combined, separated by commas. 'tiny' is applied
      first wherever it stands.
    variants: what the other names change.

  Returns:
    Whether 'tiny' is among the names, and all changes of the others together.

  Raises:
    ValueError: an unknown name, one given twice, or two that contradict each other.
  """
  names, known = arg.split(','), ('default', 'tiny', *variants)
  if unknown := [name for name in names if name not in known]:
    raise ValueError(
      f"unknown preset '{unknown[0]}'; this file has: {', '.join(known)}"
    )
  if len(set(names)) < len(names) or ('default' in names and len(names) > 1):
    raise ValueError(f"presets '{arg}': give each name once, and 'default' alone")
  changes: dict[str, tuple[Any, str]] = {}
  for name in names:
    for key, value in variants.get(name, {}).items():
      for other, (theirs, by) in changes.items():
        inside = key.startswith(f'{other}.') or other.startswith(f'{key}.')
        if inside or (key == other and value != theirs):
          raise ValueError(
            f"presets '{by}' and '{name}' contradict each other in "
            f'config.{max(key, other, key=len)}'
          )
      changes[key] = value, name
  return 'tiny' in names, {key: value for key, (value, _) in changes.items()}


def change(
  config: ml_collections.ConfigDict, changes: Variant
) -> ml_collections.ConfigDict:
  """Applies what `presets` returned."""
  with config.unlocked():
    for key in [key for key, value in changes.items() if value is None]:
      del config[key]
  config.update_from_flattened_dict(
    {key: value for key, value in changes.items() if value is not None}
  )
  return config


def training(task: str) -> ml_collections.ConfigDict:
  """Everything that the loop reads, with the defaults of a full-size run."""
  return ml_collections.ConfigDict(
    dict(
      task=task,
      seed=0,
      total_steps=30_000,
      batch_size=32,  # global, over all devices and processes
      accum=1,  # micro-batches per step; the embedder needs whole batches
      mesh=dict(
        data=1, fsdp=-1, sequence=1
      ),  # one may be -1: all remaining devices; see docs/scale.md
      multihost=False,  # True on pods and clusters: jax.distributed.initialize()
      dtype='bfloat16',  # compute type; parameters stay float32
      # Sets ('all'; diffusion: 'adapters', 'adapters_temporal'), or regular expressions
      # on dotted parameter names.
      trainable=('all',),
      # Low-rank factors of kernels that a target is found in, where these are not
      # trained themselves; rank 0 = none.
      lora=dict(rank=0, alpha=8.0, targets=(r'attn[12]\.to_(q|k|v|out\.0)\.kernel$',)),
      optim=dict(
        name='adam',
        lr=1e-5,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        clip=1.0,
        warmup=500,
        schedule='constant',
        end_lr=0.0,
        ema=0.9999,
        new_module_lr_mult=1.0,
      ),
      log_every=50,
      eval_every=1_000,
      checkpoint_every=1_000,
      keep=2,
      model='',  # model folder with frozen components; results go to <workdir>/model
      init_from='',  # model folder with initial weights; '' draws them at random
      data=dict(
        dir='',  # default <workdir>/../data
        # the one below `dir`; or the folder of a prepared data set, or several:
        # A=0.5,B=0.25,C=0.25
        dataset='synthetic',
        workers=0,
      ),  # processes that read; 0 = threads of this one
    )
  )


def tiny(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """Changes a full-size configuration to the synthetic data set and the tiny frozen
  models of `make demo`.
  """
  config.dtype = 'float32'
  config.optim.name, config.optim.warmup = 'muon', 50  # from nothing, in few steps
  config.mesh.data, config.mesh.fsdp = -1, 1
  # No published weights at this size: frozen random towers, honest about it in
  # bundle.json.
  config.frozen = ml_collections.ConfigDict(
    dict(
      whisper=dict(
        d_model=64, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=64
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
  )
  return config
