r"""The disentangled emotion embedder (paper section 3.1).

  python -m dicetalk_jax.main --config=configs/embedder.py:tiny \
      --config.model=runs/vae/model --workdir=runs/embedder
  python -m dicetalk_jax.main --config=configs/embedder.py:paper_strict \
      --config.model=MODEL --config.data.dataset=MEAD,HDTF --workdir=runs/embedder

Presets are combined with commas: configs/embedder.py:tiny,crops
"""

import ml_collections

from configs import common

# What the paper states, with its section, table or equation. Nothing here departs from
# it. 'open' names what it leaves open: there the default stands.
PAPER: common.Variant = {
  'data.corpora': ('mead', 'hdtf'),  # section 4.1
  'trainable': ('all',),  # section 3.1
  'lora.rank': 0,
  'optim.name': 'adam',  # section 4.1
  'embedder.visual': 'expression',  # section 3.1: coefficients of a 3DMM, as StyleTalk
  'embedder.modalities': 'both',  # section 3.1
  'embedder.pool': 'linear',  # equation 4
  'loss.similarity': 'cosine',  # equations 7 and 8
  'loss.use_sample': True,  # equation 6
  'loss.level_aware': False,  # section 3.1: same identity and emotion
  'loss.other_people': 'negative',  # section 3.1
  # open: init_from; batch_size, total_steps; all of optim but its name
  # open: data.identities, data.emotions, data.clips, data.videos: how pairs are drawn
  # open: data.min_len, data.max_len
  # open: drop.video, drop.audio: how often; only that it is never both
  # open: loss.tau; loss.sim_offset, which cancels in equation 8
  # open: embedder.lambda_ca, embedder.lambda_learnable: equation 3 has a lambda
  # open: embedder.expr_dim, embedder.expr_norm, embedder.crop_size,
  # open: embedder.crop_channels
  # open: embedder.whisper_dim, embedder.whisper_states, which are those of Whisper-Tiny
  # open: embedder.whisper_layers, embedder.pack
  # open: embedder.width, which the release has as 256; embedder.heads,
  # open: embedder.mlp_dim, embedder.visual_layers, embedder.audio_layers,
  # open: embedder.fusion_layers, embedder.dropout, embedder.max_len
  # open: embedder.var_eps, embedder.missing_token
}
VARIANTS: dict[str, common.Variant] = {
  common.PAPER: PAPER,
  # The paper's rule pushes all identities apart, so that the prior shows who speaks;
  # this one gives it no reason to.
  'identity_free': {
    'loss.other_people': 'ignored',
  },
  # The style extractor of arXiv 2409.03270.
  'svp': {
    'loss.similarity': 'inv_dist',
  },
  # Blendshapes instead of 3DMM fits.
  'mediapipe': {
    'embedder.expr_dim': 51,
    'embedder.expr_norm': 'zscore',
  },
  # Images instead of 3DMM fits.
  'crops': {
    'embedder.visual': 'crops',
  },
  # Paper table 5.
  'video_only': {
    'embedder.modalities': 'video',
    'drop.video': 0.0,
    'drop.audio': 0.0,
  },
  'audio_only': {
    'embedder.modalities': 'audio',
    'drop.video': 0.0,
    'drop.audio': 0.0,
  },
}


def get_config(arg: str = 'default') -> ml_collections.ConfigDict:
  tiny, changes = common.presets(arg, VARIANTS)
  config = common.training('embedder')
  config.init_from = 'random'  # all of it is trained (paper section 3.1)
  config.total_steps = 20_000
  config.batch_size = 192  # identities * emotions * clips + videos * clips
  config.optim.lr = 1e-4
  config.optim.schedule = 'cosine'
  config.optim.end_lr = 1e-6
  config.optim.ema = 0.0

  # Data.
  config.data.identities = 8  # I
  config.data.emotions = 4  # E, of each identity
  config.data.clips = 4  # K, of each emotion of an identity, and windows of each video
  config.data.videos = 16  # V, unlabelled
  config.data.min_len = 32  # of a window, in frames
  config.data.max_len = 256

  # Model; see models.embedder.EmbedderConfig.
  config.embedder = dict(
    visual='expression',  # 'expression' | 'crops'
    expr_dim=64,
    crop_size=64,
    crop_channels=(32, 64, 128, 256, 256),
    whisper_dim=384,
    whisper_states=5,
    whisper_layers='weighted',  # 'weighted' | 'last'
    pack='concat',  # 'concat' | 'mean'
    width=256,
    heads=8,
    mlp_dim=1024,
    visual_layers=3,
    audio_layers=3,
    fusion_layers=3,
    dropout=0.1,
    max_len=256,
    lambda_ca=1.0,
    lambda_learnable=False,
    pool='linear',  # 'linear' | 'mlp_mish'
    var_eps=1e-6,
    missing_token=False,
    modalities='both',  # 'both' | 'video' | 'audio'
    expr_norm='none',  # 'none' | 'zscore'
  )

  # Modality dropout: probabilities, never both.
  config.drop = dict(
    video=0.2,
    audio=0.2,
  )

  # Loss.
  config.loss = dict(
    similarity='cosine',  # 'cosine' | 'inv_dist'
    tau=0.1,
    sim_offset=1.0,  # the paper's c; it cancels
    level_aware=False,  # True: only clips of one level attract each other
    # Clips of one emotion but different identities; the paper has 'negative'.
    other_people='negative',  # 'negative' | 'ignored' | 'positive'
    use_sample=True,  # False: compare means instead of samples
  )

  if tiny:
    common.tiny(config)
    config.total_steps = 250
    config.batch_size = 32
    config.optim.name = 'adam'
    config.optim.lr = 1e-3
    config.optim.end_lr = 0.0
    config.data.identities = 4
    config.data.emotions = 4
    config.data.clips = 2
    config.data.videos = 0
    config.data.min_len = 25
    config.data.max_len = 50
    config.embedder.update(
      crop_size=32,
      crop_channels=(16, 32, 64),
      whisper_dim=64,
      whisper_states=2,
      width=64,
      heads=4,
      mlp_dim=128,
      visual_layers=1,
      audio_layers=1,
      fusion_layers=1,
      dropout=0.0,
      max_len=50,
    )
    config.log_every = 50
    config.eval_every = 125
    config.checkpoint_every = 125
    changes.pop('embedder.expr_dim', None)  # the synthetic faces have 64 coefficients
    changes.pop('data.corpora', None)  # and stand in for the corpora
  common.change(config, changes)
  return config
