r"""The diffusion model (paper sections 3.2 and 3.3).

  python -m dicetalk_jax.main --config=configs/diffusion.py:tiny \
      --config.model=runs/embedder/model --workdir=runs/diffusion
  python -m dicetalk_jax.main --config=configs/diffusion.py:paper_strict \
      --config.model=runs/embedder/model --config.init_from=models/svd \
      --config.data.dataset=MEAD,HDTF,VOXCELEB2 --workdir=runs/diffusion

Presets are combined with commas: configs/diffusion.py:tiny,abl_no_bank
"""

import ml_collections

from configs import common

DIRECT: common.Variant = {
  'emo_model.mode': 'direct',
  'emotion.p_whole_bank': 0.0,
}
# What the paper states, with its section, table or equation. Nothing here departs from
# it. 'open' names what it leaves open: there the default stands.
#
# It starts from SVD-XT-1.1 (section 4.1), which config.init_from must name. Emotional
# and regular clips are mixed 1 : 1 (section 4.1), as data sets without weights are.
PAPER: common.Variant = {
  'optim.name': 'adam',  # section 4.1
  # Equation 14: adapters for audio and emotion.
  'unet.adapters': 2,
  # Equations 9 to 13: training retrieves the nearest code, sampling sees the whole bank
  # (12 and 13).
  'emo_model.mode': 'bank',
  'emo_model.distance': 'l2',
  'emotion.p_whole_bank': 0.0,
  # Equation 17.
  'emo_model.codebook_update': 'grad',
  'emo_model.stop_fc_grad': False,
  'emo_model.commitment': 0.25,
  'emotion.sample': True,  # equation 6, section 4.5
  # Section 4.1: four cases of 5 % each.
  'drop.audio': 0.05,
  'drop.image': 0.05,
  'drop.emotion': 0.05,
  'drop.all': 0.05,
  'drop.audio_emotion': 0.0,
  # Equation 15: plain errors; equation 16: of the latents at each step.
  'loss.lambda_vq': 1.0,
  'loss.face_weight': 0.0,
  'loss.mouth_weight': 0.0,
  'sample.num_steps': 25,  # section 4.1, Euler steps
  # Open, and as in the release: it has a whole UNet, so more than adapters was trained;
  # and it draws the codes uniformly and moves them by gradients alone.
  'trainable': ('all',),
  'lora.rank': 0,
  'emotion.bank_init': 'uniform',
  'emotion.restart': 0,
  # open: batch_size, total_steps; all of optim but its name
  # open: data.corpora: MEAD is emotional; which clips are regular besides HDTF
  # open: data.frames, data.step, data.size, as released
  # open: data.reference, data.clip_stride, data.buckets, data.area
  # open: all other sizes of unet, audio_linear, pose_guider and emo_model, as released
  # open: emo_model.null_kv, emo_model.dropout, as released
  # open: emotion.emo_ref, emotion.bank_decay
  # open: noise.p_mean, noise.p_std, noise.sigma_min, noise.sigma_max, noise.ref_aug
  # open: loss.lambda_cls, loss.cls_warmup, loss.cls_pool
  # open: all of sample but its number of steps, as released
}
VARIANTS: dict[str, common.Variant] = {
  common.PAPER: PAPER,
  'adapters': {
    'trainable': ('adapters',),
  },
  # Prior and injection of arXiv 2409.03270. Its guide, head keypoints, would need a
  # landmark tracker in preparation and in sampling; the face region serves instead.
  'svp': {
    **DIRECT,
    'loss.lambda_cls': 0.0,
  },
  # Paper table 4.
  'abl_no_bank': DIRECT,
  'abl_no_cls': {
    'loss.lambda_cls': 0.0,
  },
  'abl_learnable_ca': {
    'emo_model.mode': 'learnable',
    'emotion.p_whole_bank': 0.0,
  },
  'abl_no_prior': {
    'emotion.sample': False,
  },
  # DICE-Talk's predecessor: no emotion, no pose guider. Training measures the motion;
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


def get_config(arg: str = 'default') -> ml_collections.ConfigDict:
  tiny, changes = common.presets(arg, VARIANTS)
  config = common.training('diffusion')

  # Data.
  config.data.frames = 25  # of a window
  config.data.step = 2  # of the 25 fps source: the model's rate is 12.5 fps
  config.data.size = 512  # side of the images
  # The reference frame comes from the same clip, or from any clip of the identity.
  config.data.reference = 'clip'  # 'clip' | 'identity'
  # The image encoder (CLIP) has tokens of every fifth frame only; references are drawn
  # from those.
  config.data.clip_stride = 5
  # Amounts of motion: as measured in the clip, or fixed as in released sampling.
  config.data.buckets = 'measured'  # 'measured' | 'fixed'
  config.data.area = (1.0, 1.3)  # enlargement of the face box, drawn; 1.1 in evaluation

  # Model.
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
    adapters=2,  # audio and emotion; 1: audio alone
    down_block_types=(
      'CrossAttnDownBlockSpatioTemporal',
      'CrossAttnDownBlockSpatioTemporal',
      'CrossAttnDownBlockSpatioTemporal',
      'DownBlockSpatioTemporal',
    ),
    up_block_types=(
      'UpBlockSpatioTemporal',
      'CrossAttnUpBlockSpatioTemporal',
      'CrossAttnUpBlockSpatioTemporal',
      'CrossAttnUpBlockSpatioTemporal',
    ),
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
    conditioning_embedding_channels=320,
    block_out_channels=(16, 32, 96, 256),
  )
  # See models.emotion.EmotionConfig.
  config.emo_model = dict(
    prior_dim=256,
    dim=1024,
    intermediate_dim=1024,
    tokens=32,
    codebook_size=64,
    num_heads=8,
    commitment=0.25,
    mode='bank',  # 'bank' | 'direct' | 'learnable'
    classifier_in=1280,
    classifier_hidden=(512, 256),
    num_classes=22,
    dropout=0.1,
    distance='l2',  # 'l2' | 'cosine'
    codebook_update='grad',  # 'grad' | 'ema'
    stop_fc_grad=False,
    null_kv='released',  # 'released' | 'zeros' | 'bank'
  )
  # Recompute in the backward pass: nothing, every block, or all but matrix products.
  config.remat = 'block'  # 'none' | 'block' | 'dots'
  # Kernels of this project in half precision on NVIDIA GPUs, Ampere or later. They have
  # not been timed on a GPU yet.
  config.fused_kernels = False

  # Emotion in training.
  config.emotion = dict(
    sample=True,  # False: the mean of a prior instead of a draw
    p_whole_bank=0.0,  # how often a step attends to the whole bank, as sampling does
    # The prior of the clip itself, or of another one of same identity and label.
    emo_ref='same_clip',  # 'same_clip' | 'other_clip'
    # Initial codes. The release has 'uniform', where nearly all priors share one code.
    bank_init='kmeans',  # 'kmeans' | 'uniform'
    # Decay of the average use of codes, and of the codes if codebook_update='ema'.
    bank_decay=0.99,
    restart=0,  # period in steps, e.g. 100: rare codes move to a prior; 0: never
  )

  # Noise: the logarithm of its level is normal.
  config.noise = dict(
    p_mean=0.7,
    p_std=1.6,
    sigma_min=0.002,
    sigma_max=700.0,
    # Noise on the reference latents; its strength is exp(N(-3, 0.5)).
    ref_aug='none',  # 'none' | 'lognormal'
  )

  # Condition dropout: probabilities that exclude each other.
  config.drop = dict(
    audio=0.05,
    image=0.05,
    emotion=0.05,
    all=0.05,
    # Not in the paper: guidance subtracts a branch with the image alone, which the
    # other cases never train.
    audio_emotion=0.05,
  )

  # Loss (paper equation 15).
  config.loss = dict(
    lambda_cls=0.05,
    cls_warmup=1_000,  # steps
    lambda_vq=1.0,
    # Classify each frame, or the mean of a clip's features.
    cls_pool='frame',  # 'frame' | 'clip'
    face_weight=0.0,  # extra weight of the denoising error in the face
    mouth_weight=0.0,  # and in the mouth
  )

  # Sampling.
  config.sample = dict(
    num_steps=25,
    g_image=3.0,
    g_condition=6.0,
    overlap=0,
    shift=7,
    sigma_max=700.0,
    padding=True,  # a window of frames after each clip
  )

  if tiny:
    _tiny(config)
  common.change(config, changes)
  return config


def _tiny(config: ml_collections.ConfigDict) -> None:
  common.tiny(config)
  config.total_steps = 570
  config.batch_size = 8  # many identities and noise levels rather than many frames
  config.optim.lr = 2.5e-3
  config.optim.schedule = 'cosine'
  config.optim.ema = 0.99
  config.data.frames = 4
  config.data.size = 64
  config.data.buckets = 'fixed'
  # A reference that shows the emotion would let so little training ignore the tokens.
  config.data.reference = 'identity'
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
    blocks=2,
    channels=64,
    intermediate_dim=256,
    output_dim=64,
    context_tokens=4,
  )
  config.pose_guider.update(
    conditioning_embedding_channels=32,
    block_out_channels=(8, 8, 16),
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
  config.remat = 'none'
  config.emotion.p_whole_bank = 0.5
  # What moves is a hundredth of the latents' variance: no more noise than hides it, and
  # weight where it is.
  config.noise.update(
    p_mean=0.3,
    p_std=1.0,
    sigma_max=5.0,
  )
  config.loss.update(
    lambda_cls=0.01,
    cls_warmup=100,
    face_weight=3.0,
    mouth_weight=15.0,
  )
  config.drop.update(
    audio=0.02,
    image=0.02,
    all=0.02,
  )
  config.sample.update(
    num_steps=12,
    g_image=1.0,
    g_condition=3.5,
    shift=1,
    sigma_max=5.0,
  )
  config.log_every = 50
  config.eval_every = 570
  config.checkpoint_every = 285
