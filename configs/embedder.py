"""The disentangled emotion embedder (paper section 3.1): `--config=configs/embedder.py[:tiny]`."""

from configs import common

PRESETS = ('default', 'tiny')


def get_config(arg: str = 'default'):
  name = common.preset(arg, PRESETS)
  config = common.training('embedder')
  config.total_steps = 20_000
  config.optim.lr, config.optim.schedule, config.optim.end_lr, config.optim.ema = 1e-4, 'cosine', 1e-6, 0.0
  config.embedder = dict(
      expr_dim=64, whisper_dim=384, whisper_states=5, whisper_layers='weighted', pack='concat', width=256, heads=8,
      mlp_dim=1024, visual_layers=3, audio_layers=3, fusion_layers=3, dropout=0.1, max_len=256)
  config.data.identities, config.data.emotions, config.data.clips, config.data.videos = 8, 4, 4, 16   # I, E, K, V
  config.data.min_len, config.data.max_len = 32, 256
  config.drop = dict(video=0.2, audio=0.2)
  config.loss = dict(similarity='cosine', tau=0.1, sim_offset=1.0, level_aware=False)
  config.batch_size = 192                  # I * E * K + V * K
  if name == 'tiny':
    common.tiny(config)
    config.total_steps = 250
    config.optim.name = 'adam'
    config.optim.lr, config.optim.end_lr = 1e-3, 0.0
    config.embedder = dict(
        expr_dim=64, whisper_dim=64, whisper_states=2, whisper_layers='weighted', pack='concat', width=64, heads=4,
        mlp_dim=128, visual_layers=1, audio_layers=1, fusion_layers=1, dropout=0.0, max_len=50)
    config.data.identities, config.data.emotions, config.data.clips, config.data.videos = 4, 4, 2, 0
    config.data.min_len, config.data.max_len = 25, 50
    config.batch_size = 32
    config.log_every, config.eval_every, config.checkpoint_every = 50, 125, 125
  return config
