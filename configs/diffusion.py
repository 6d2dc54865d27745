"""The diffusion model (paper sections 3.2 and 3.3):
`--config=configs/diffusion.py[:PRESET,PRESET]`.
"""

from configs import common

DIRECT = {'emo_model.mode': 'direct', 'emotion.p_whole_bank': 0.0}
VARIANTS = {
  'paper_strict': {'drop.audio_emotion': 0.0, 'emotion.bank_init': 'uniform'},
  'adapters': {'trainable': ('adapters',)},
  # Prior and injection of arXiv 2409.03270. Its guide, head keypoints, would need a
  # landmark tracker in preparation and in sampling; the face region serves instead.
  'svp': DIRECT | {'loss.lambda_cls': 0.0},
  # Paper table 4.
  'abl_no_bank': DIRECT,
  'abl_no_cls': {'loss.lambda_cls': 0.0},
  'abl_learnable_ca': {'emo_model.mode': 'learnable', 'emotion.p_whole_bank': 0.0},
  'abl_no_prior': {'emotion.sample': False},
  # DICE-Talk's predecessor: no emotion, no pose guider. Motion is told in training;
  # sampling predicts it with the audio2bucket of the release, which is not trained here
  # and must be in the model folder.
  'sonic': {
    'emo_model': None,
    'emotion': None,
    'pose_guider': None,
    'unet.adapters': 1,
    'loss.lambda_cls': 0.0,
    'drop.emotion': 0.0,
    'drop.audio_emotion': 0.0,
    'data.buckets': 'measured',
    'sample.g_image': 2.0,
    'sample.g_condition': 7.5,
    'sample.padding': False,
  },
}


def get_config(arg: str = 'default'):
  tiny, changes = common.presets(arg, VARIANTS)
  config = common.training('diffusion')
  config.data.frames, config.data.step, config.data.size = 25, 2, 512
  config.data.reference = (
    'clip'  # reference frame of the same 'clip', or of any clip of the 'identity'
  )
  config.data.clip_stride = (
    5  # every fifth frame has a CLIP token and may be a reference
  )
  # motion amounts: as measured in the clip, or 'fixed' as in released sampling
  config.data.buckets = 'measured'
  config.data.area = (
    1.0,
    1.3,
  )  # face box enlargement, drawn per clip; 1.1 in evaluation
  config.unet = dict(
    in_channels=8,
    out_channels=4,
    block_out_channels=(320, 640, 1280, 1280),
    layers_per_block=2,
    num_attention_heads=(5, 10, 20, 20),
    cross_attention_dim=1024,
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=768,
    num_frames=25,
    norm_num_groups=32,
    adapters=2,
    down_block_types=('CrossAttnDownBlockSpatioTemporal',) * 3
    + ('DownBlockSpatioTemporal',),
    up_block_types=('UpBlockSpatioTemporal',) + ('CrossAttnUpBlockSpatioTemporal',) * 3,
  )
  config.audio_linear = dict(
    seq_len=10,
    blocks=5,
    channels=384,
    intermediate_dim=1024,
    output_dim=1024,
    context_tokens=32,
  )
  config.pose_guider = dict(
    conditioning_embedding_channels=320, block_out_channels=(16, 32, 96, 256)
  )
  config.emo_model = dict(
    prior_dim=256,
    dim=1024,
    intermediate_dim=1024,
    tokens=32,
    codebook_size=64,
    num_heads=8,
    commitment=0.25,
    mode='bank',
    classifier_in=1280,
    classifier_hidden=(512, 256),
    num_classes=22,
    dropout=0.1,
    distance='l2',
    codebook_update='grad',
    stop_fc_grad=False,
    null_kv='released',
  )  # see models.emotion.EmotionConfig
  config.emotion = dict(
    sample=True,
    p_whole_bank=0.0,
    # prior of the clip itself, or an 'other_clip' of same person and label
    emo_ref='same_clip',
    bank_init='kmeans',  # or 'uniform', as released
    # of the average use of codes, and of the codes where codebook_update='ema'
    bank_decay=0.99,
    restart=0,
  )  # every so many steps (100) hardly used codes move to a prior; 0 = never
  config.noise = dict(
    p_mean=0.7, p_std=1.6, sigma_min=0.002, sigma_max=700.0, ref_aug='none'
  )  # 'lognormal': noise of strength exp(N(-3, 0.5)) on the reference latents
  config.drop = dict(audio=0.05, image=0.05, emotion=0.05, all=0.05, audio_emotion=0.05)
  config.loss = dict(
    lambda_cls=0.05,
    cls_warmup=1_000,
    lambda_vq=1.0,
    cls_pool='frame',  # or 'clip': classify the mean of a clip's features
    face_weight=0.0,
    mouth_weight=0.0,
  )  # extra weight of the denoising error in face and mouth
  # recompute every block in the backward pass; or 'dots', 'none': models.unet
  config.remat = 'block'
  config.sample = dict(
    num_steps=25,
    g_image=3.0,
    g_condition=6.0,
    overlap=0,
    shift=7,
    sigma_max=700.0,
    padding=True,
  )  # a window of frames behind each clip
  if tiny:
    common.tiny(config)
    config.batch_size = (
      8  # many people and noise levels per step rather than many frames
    )
    config.data.frames, config.data.size = 4, 64
    config.data.buckets = 'fixed'
    # one that shows the emotion would let little training ignore the tokens
    config.data.reference = 'identity'
    config.total_steps = 570
    config.optim.lr, config.optim.schedule, config.optim.ema = 2.5e-3, 'cosine', 0.99
    # Transformers at the middle level only: at the top one they would take most of the
    # time of two CPU cores.
    config.unet.update(
      in_channels=8,
      out_channels=4,
      block_out_channels=(32, 64, 64),
      layers_per_block=1,
      num_attention_heads=(1, 2, 2),
      cross_attention_dim=64,
      addition_time_embed_dim=32,
      projection_class_embeddings_input_dim=96,
      num_frames=4,
      norm_num_groups=2,
      down_block_types=(
        'DownBlockSpatioTemporal',
        'CrossAttnDownBlockSpatioTemporal',
        'DownBlockSpatioTemporal',
      ),
      up_block_types=(
        'UpBlockSpatioTemporal',
        'CrossAttnUpBlockSpatioTemporal',
        'UpBlockSpatioTemporal',
      ),
    )
    config.audio_linear.update(
      blocks=2, channels=64, intermediate_dim=256, output_dim=64, context_tokens=4
    )
    config.pose_guider.update(
      conditioning_embedding_channels=32, block_out_channels=(8, 8, 16)
    )
    config.emo_model.update(
      prior_dim=64,
      dim=64,
      intermediate_dim=128,
      tokens=4,
      codebook_size=16,
      num_heads=4,
      classifier_in=64,
      classifier_hidden=(64, 32),
      dropout=0.0,
    )
    config.emotion.p_whole_bank = 0.5
    # What moves is a hundredth of the latents' variance: no more noise than hides it,
    # and weight where it is.
    config.noise.update(p_mean=0.3, p_std=1.0, sigma_max=5.0)
    config.loss.update(
      lambda_cls=0.01, cls_warmup=100, face_weight=3.0, mouth_weight=15.0
    )
    config.drop.update(audio=0.02, image=0.02, all=0.02)
    config.remat = 'none'
    config.sample.update(
      num_steps=12, g_image=1.0, g_condition=3.5, shift=1, sigma_max=5.0
    )
    config.log_every, config.eval_every, config.checkpoint_every = 50, 570, 285
  return common.change(config, changes)
