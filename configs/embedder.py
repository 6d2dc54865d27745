"""The disentangled emotion embedder (paper section 3.1):
`--config=configs/embedder.py[:PRESET,PRESET]`.
"""

from configs import common

VARIANTS = {
  # The published rule pushes all people apart, so that the prior tells who speaks; this
  # one has no reason to.
  'identity_free': {'loss.other_people': 'ignored'},
  'svp': {'loss.similarity': 'inv_dist'},  # the style extractor of arXiv 2409.03270
  'mediapipe': {
    'embedder.expr_dim': 51,
    'embedder.expr_norm': 'zscore',
  },  # blendshapes instead of 3DMM fits
  'crops': {'embedder.visual': 'crops'},  # pictures instead of 3DMM fits
  'video_only': {
    'embedder.modalities': 'video',
    'drop.video': 0.0,
    'drop.audio': 0.0,
  },  # paper table 5
  'audio_only': {'embedder.modalities': 'audio', 'drop.video': 0.0, 'drop.audio': 0.0},
}


def get_config(arg: str = 'default'):
  tiny, changes = common.presets(arg, VARIANTS)
  config = common.training('embedder')
  config.total_steps = 20_000
  config.optim.lr, config.optim.schedule, config.optim.end_lr, config.optim.ema = (
    1e-4,
    'cosine',
    1e-6,
    0.0,
  )
  config.embedder = dict(
    visual='expression',
    expr_dim=64,
    crop_size=64,
    crop_channels=(32, 64, 128, 256, 256),
    whisper_dim=384,
    whisper_states=5,
    whisper_layers='weighted',
    pack='concat',
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
    pool='linear',
    var_eps=1e-6,
    missing_token=False,
    modalities='both',
    expr_norm='none',
  )
  (
    config.data.identities,
    config.data.emotions,
    config.data.clips,
    config.data.videos,
  ) = 8, 4, 4, 16  # I, E, K, V
  config.data.min_len, config.data.max_len = 32, 256
  config.drop = dict(video=0.2, audio=0.2)
  config.loss = dict(
    similarity='cosine',
    tau=0.1,
    sim_offset=1.0,
    level_aware=False,
    # pairs of one emotion: as published; or 'ignored', 'positive'
    other_people='negative',
    use_sample=True,
  )  # False: compare means instead of samples
  config.batch_size = 192  # I * E * K + V * K
  if tiny:
    common.tiny(config)
    config.total_steps = 250
    config.optim.name = 'adam'
    config.optim.lr, config.optim.end_lr = 1e-3, 0.0
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
    changes.pop('embedder.expr_dim', None)  # the synthetic faces have 64 coefficients
    (
      config.data.identities,
      config.data.emotions,
      config.data.clips,
      config.data.videos,
    ) = 4, 4, 2, 0
    config.data.min_len, config.data.max_len = 25, 50
    config.batch_size = 32
    config.log_every, config.eval_every, config.checkpoint_every = 50, 125, 125
  return common.change(config, changes)
