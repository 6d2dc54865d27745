"""Records what the reference implementation computes, for `python -m convert accept`.

    cd CHECKOUT_OF_THE_ORIGINAL
    python PATH/TO/tools/dump_reference.py --output=dump SCRIPT [ARGUMENTS ...]

SCRIPT is the original's own program, ARGUMENTS are its own. It runs unchanged in this
process. Hooks on its modules, and on the step of its scheduler, copy what goes in and
comes out. The modules are recognised by names of their parameters, which are those of
the published weight files.

This file needs PyTorch 2 and safetensors, and nothing of dicetalk_jax: copy it to where
the original runs.
"""

from __future__ import annotations  # the original may run on an older Python

import argparse
import functools
import gc
import importlib
import json
import math
import os
import runpy
import sys

from safetensors.torch import save_file
import torch
from torch import nn

FORMAT = 1
TENSORS = 'tensors.safetensors'
SETTINGS = 'settings.json'

# Hook points: parameters that only the hooked module has, or its owner, if the hook is
# on a `child` of the module that has them.
POINTS = {
  'vae_encoder': (('quant_conv.weight', 'decoder.time_conv_out.weight'), 'encoder'),
  'vae_moments': (('quant_conv.weight', 'decoder.time_conv_out.weight'), 'quant_conv'),
  'vae_decoder': (('quant_conv.weight', 'decoder.time_conv_out.weight'), 'decoder'),
  'image_encoder': (
    ('visual_projection.weight', 'vision_model.embeddings.patch_embedding.weight'),
    '',
  ),
  'whisper': (('conv1.weight', 'embed_positions.weight', 'layer_norm.weight'), ''),
  'audio_linear': (('proj1.weight', 'proj2.weight', 'proj3.weight', 'norm.weight'), ''),
  'emo_model': (
    ('emo_linear.proj1.weight', 'codebook.codebook.weight', 'attention.fc_q.weight'),
    '',
  ),
  'pose_guider': (('conv_in.weight', 'blocks.0.weight', 'conv_out.weight'), ''),
  'unet': (('add_embedding.linear_1.weight', 'conv_in.weight'), ''),
}
SCHEDULER = 'diffusers:EulerDiscreteScheduler'

EXAMPLE = """example:
  python ../dicetalk_jax/tools/dump_reference.py --output=../dump \\
      SCRIPT_OF_THE_ORIGINAL ITS_ARGUMENTS

Give the original a short recording (two seconds), and let it compute in float32 if its
settings allow: the comparison is sharp then. --overlap, --shift and the guidance must
be what the original runs with; the defaults are as published."""


class DumpError(Exception):
  """The run cannot be recorded; the message says why, and what to do."""


class Recorder:
  """Copies what goes through the hook points.

  Attributes:
    seen: by name, the tensors of every call, on the CPU.
    steps: one per step of the scheduler: the time step, and the windows (before, after,
      each [1,F,C,h,w]).
    num_steps: how many steps the scheduler was set up for.
  """

  def __init__(self, classes):
    """`classes` are names of classes, by hook point, that replace its parameters."""
    self.classes = classes
    self.seen = {}
    self.steps = []
    self.num_steps = 0
    # Modules by identity: outermost ones that were called, and hooked ones.
    self._known = {}
    self._hooked = {}
    self._depth = 0

  # Attaching hooks. Modules may be made at any time, so every outermost call of a
  # module that was not called before looks for hook points anew.

  def __enter__(self):
    hooks = torch.nn.modules.module
    try:  # also after a call that failed
      leaving = hooks.register_module_forward_hook(self._leaving, always_call=True)
    except TypeError:  # PyTorch 2.0
      leaving = hooks.register_module_forward_hook(self._leaving)
    entering = hooks.register_module_forward_pre_hook(self._entering)
    self._handles = [entering, leaving]
    return self

  def __exit__(self, *_):
    for handle in self._handles:
      handle.remove()

  def _entering(self, module, args):
    self._depth += 1
    if self._depth == 1 and id(module) not in self._known:
      self._known[id(module)] = module
      self.attach()

  def _leaving(self, module, args, output):
    self._depth -= 1

  def attach(self):
    """Hooks every module that is a hook point and has no hook yet."""
    modules = [x for x in gc.get_objects() if issubclass(type(x), nn.Module)]
    owners = {
      name: [module for module in modules if self._owns(module, name)]
      for name in POINTS
    }
    # The emotion model has two modules of the kind of `audio_linear` inside.
    inside = {
      id(part)
      for owner in owners['emo_model']
      for part in owner.modules()
      if part is not owner
    }
    for name, found in owners.items():
      for owner in found:
        target = _attribute(owner, POINTS[name][1])
        if (name, id(target)) in self._hooked or id(owner) in inside:
          continue
        self._hooked[name, id(target)] = target
        receive = functools.partial(self._receive, name)
        self._handles.append(target.register_forward_hook(receive, with_kwargs=True))

  def _owns(self, module, name):
    """Whether a module has the parameters, or the class, of a hook point."""
    parameters, child = POINTS[name]
    if name in self.classes:
      named = any(base.__name__ == self.classes[name] for base in type(module).__mro__)
      return named and isinstance(_attribute(module, child), nn.Module)
    return all(
      isinstance(_attribute(module, path), nn.Parameter) for path in parameters
    )

  # Recording.

  def keep(self, name, *tensors, once=False):
    """Copies tensors; `once` keeps those of the first call only."""
    calls = self.seen.setdefault(name, [])
    if not (once and calls):
      calls.append(tuple(x.detach().cpu().clone() for x in tensors))

  def _receive(self, name, module, args, kwargs, output):
    given = _first_tensor([*args, *kwargs.values()])
    if name in ('vae_encoder', 'vae_moments', 'image_encoder'):
      self.keep(name, given, _first_tensor(output, 'image_embeds'), once=True)
    elif name == 'pose_guider':  # all frames have the same mask
      self.keep(name, given[:1, :, :1], _first_tensor(output)[:1, :, :1], once=True)
    elif name == 'whisper':
      states = getattr(output, 'hidden_states', None)
      if states is None and isinstance(output, tuple):
        states = next((x for x in output if isinstance(x, tuple)), None)
      if states is not None:
        self.keep(name, given, torch.stack(states, dim=2))
    elif name == 'unet':
      ids = kwargs.get('added_time_ids')
      if ids is None:
        found = [x for x in args if torch.is_tensor(x) and x.shape[1:] == (3,)]
        ids = found[0] if found else None
      if ids is not None:
        self.keep(name, ids, once=True)
    elif name == 'emo_model':
      self.keep(name, given, _first_tensor(output))
    else:
      self.keep(name, given, _first_tensor(output))

  def wrap_scheduler(self, scheduler):
    """Makes a class of schedulers record its steps and the noise that it adds."""
    original_step = scheduler.step
    original_add_noise = scheduler.add_noise

    @functools.wraps(original_step)
    def step(this, model_output, timestep, sample, *args, **kwargs):
      output = original_step(this, model_output, timestep, sample, *args, **kwargs)
      after = output[0] if isinstance(output, tuple) else output.prev_sample
      self.num_steps = len(this.timesteps)
      time = float(timestep)
      if not self.steps or self.steps[-1][0] != time:
        self.steps.append((time, []))
      window = (sample.detach().cpu().clone(), after.detach().cpu().clone())
      self.steps[-1][1].append(window)
      return output

    @functools.wraps(original_add_noise)
    def add_noise(this, original_samples, noise, *args, **kwargs):
      self.keep('noise', noise, once=True)
      return original_add_noise(this, original_samples, noise, *args, **kwargs)

    scheduler.step = step
    scheduler.add_noise = add_noise

    def restore():
      scheduler.step = original_step
      scheduler.add_noise = original_add_noise

    return restore


def _attribute(module, path):
  """The attribute at a dotted path; None if there is none, itself for ''."""
  for name in filter(None, path.split('.')):
    module = getattr(module, name, None)
  return module


def _first_tensor(values, attribute=''):
  """The first tensor of an output or of arguments; a named one if there is one."""
  if torch.is_tensor(values):
    return values
  if attribute and torch.is_tensor(getattr(values, attribute, None)):
    return getattr(values, attribute)
  items = values.values() if hasattr(values, 'values') else values
  return next(x for x in items if torch.is_tensor(x))


# From what was seen to one tensor per name.


def collect(recorder, overlap, shift):
  """The tensors of a dump, in PyTorch's layouts, and the settings that were observed.

  Raises:
    DumpError: a hook point was never reached, or the windows do not fit.
  """
  seen = recorder.seen
  missing = [name for name in POINTS if name not in seen and name != 'unet']
  if missing:
    raise DumpError(
      f'nothing went through {", ".join(missing)}; name its class with --hook '
      f'{missing[0]}=CLASS'
    )
  if not recorder.steps:
    raise DumpError(
      'the scheduler made no step; name its class with --scheduler MODULE:CLASS'
    )
  tensors = {}

  # 1. The portrait
  tensors['image'] = seen['vae_encoder'][0][0][:1]
  moments = seen['vae_moments'][0][1][:1]
  tensors['reference_latents'] = moments.chunk(2, dim=1)[0]
  tensors['clip_image'], tensors['image_embeds'] = seen['image_encoder'][0]
  mask, features = seen['pose_guider'][0]
  tensors['mask'] = mask[0, 0, 0]
  tensors['face_features'] = features[0, :, 0]

  # 2. The recording: a frame of zeros stands for silence
  tensors['log_mel'] = torch.cat([given for given, _ in seen['whisper']])
  tensors['speech_states'] = torch.cat([states for _, states in seen['whisper']])
  windows, tokens = _rows(seen['audio_linear'], 3)
  silent = ~windows.flatten(1).any(1)
  _need(silent.any() and not silent.all(), 'audio_linear')
  tensors['audio_windows'] = windows[~silent]
  tensors['audio_tokens'] = tokens[~silent]
  tensors['null_audio'] = tokens[silent][0]

  # 3. The emotion: a prior of zeros stands for none
  priors, tokens = _rows(seen['emo_model'], 1)
  none = ~priors.any(1)
  _need(none.any() and not none.all(), 'emo_model')
  tensors['prior'] = priors[~none][0]
  tensors['emotion_tokens'] = tokens[~none][0]
  tensors['null_emotion'] = tokens[none][0]

  # 4. Sampling and decoding
  length = len(tensors['audio_windows'])
  frames = recorder.steps[0][1][0][0].shape[1]
  total = length + frames
  if 'noise' in seen:
    tensors['noise'] = seen['noise'][0][0][0]
    total = len(tensors['noise'])
  if 'unet' in seen:
    tensors['time_ids'] = seen['unet'][0][0][0]
  tensors['latents'] = join_windows(recorder.steps, total, overlap, shift)
  tensors['frames'] = torch.cat([out for _, out in seen['vae_decoder']])[:length]
  settings = {
    'num_steps': recorder.num_steps,
    'steps_run': len(recorder.steps),
    'frames': frames,
    'overlap': overlap,
    'shift': shift,
    'length': length,
    'decode_chunk': len(seen['vae_decoder'][0][1]),
  }
  return {name: x.contiguous() for name, x in tensors.items()}, settings


def _rows(calls, axes):
  """Inputs and outputs of all calls, one row per frame; inputs have `axes` per row."""
  given = [x.reshape(-1, *x.shape[-axes:]) for x, _ in calls]
  out = [y.reshape(-1, *y.shape[-2:]) for _, y in calls]
  return torch.cat(given), torch.cat(out)


def _need(fits, name):
  if not fits:
    raise DumpError(
      f'{name} was not called both with zeros and with something else, as the original '
      f'is described; name its class with --hook {name}=CLASS'
    )


def join_windows(steps, total, overlap, shift):
  """Latents [steps + 1, total, C, h, w] before the first step and after every step.

  Windows of a step do not depend on each other; frames that several of them visit are
  averaged.

  Raises:
    DumpError: the windows of a step are not those of the step before.
  """
  first = steps[0][1][0][0]
  frames = first.shape[1]
  count = math.ceil(total / (frames - overlap))
  latents = torch.zeros(len(steps) + 1, total, *first.shape[2:], dtype=first.dtype)
  for i, (_, windows) in enumerate(steps):
    if len(windows) != count:
      raise DumpError(
        f'step {i + 1} has {len(windows)} windows instead of {count}; give --overlap '
        'as the original has it'
      )
    total_of_windows = torch.zeros_like(latents[0])
    visits = torch.zeros(total, *[1] * (first.ndim - 2), dtype=first.dtype)
    for k, (before, after) in enumerate(windows):
      offset = i * shift % frames
      index = (torch.arange(frames) + k * (frames - overlap) - offset) % total
      if i == 0:
        latents[0][index] = before[0]
      elif not _alike(before[0], latents[i][index]):
        raise DumpError(
          f'the windows of step {i + 1} do not continue those of step {i}; give '
          '--overlap and --shift as the original has them'
        )
      total_of_windows[index] += after[0]
      visits[index] += 1
    latents[i + 1] = total_of_windows / visits
  return latents


def _alike(x, y):
  """Equal up to the rounding of an average."""
  return bool((x - y).abs().max() <= 1e-2 * y.float().std())


def make_parser():
  parser = argparse.ArgumentParser(
    prog='dump_reference.py',
    description='Records a run of the reference implementation.',
    epilog=EXAMPLE,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add('--output', required=True, metavar='DIR', help='the dump')
  add('--overlap', type=int, default=0, help='frames that windows share')
  add('--shift', type=int, default=7, help='growth of the shift from step to step')
  add('--guidance_image', type=float, default=3.0, help='its reference scale')
  add('--guidance_condition', type=float, default=6.0, help='its emotion scale')
  add(
    '--hook',
    action='append',
    default=[],
    metavar='POINT=CLASS',
    help=f'a hook point by the name of its class; points: {", ".join(POINTS)}',
  )
  add('--scheduler', default=SCHEDULER, metavar='MODULE:CLASS', help='see --hook')
  add('--tf32', action='store_true', help='leave TF32 on, which rounds to 10 bits')
  add('script', help='the program of the original')
  add('arguments', nargs=argparse.REMAINDER, help='its arguments')
  return parser


def watch(flags):
  """Runs the original, and returns the recorder of the run."""
  classes = {}
  for text in flags.hook:
    name, _, class_name = text.partition('=')
    if name not in POINTS or not class_name:
      raise DumpError(
        f'--hook {text} is not understood; give POINT=CLASS with one of '
        f'{", ".join(POINTS)}'
      )
    classes[name] = class_name
  if not os.path.isfile(flags.script):
    raise DumpError(f'{flags.script} does not exist; name the program of the original')
  module, _, name = flags.scheduler.partition(':')
  try:
    scheduler = getattr(importlib.import_module(module), name)
  except (ImportError, AttributeError, ValueError) as error:
    raise DumpError(
      f'--scheduler {flags.scheduler} is not found ({error}); give MODULE:CLASS'
    ) from error
  if not flags.tf32:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False

  recorder = Recorder(classes)
  restore = recorder.wrap_scheduler(scheduler)
  argv, path = sys.argv, list(sys.path)
  try:
    sys.argv = [flags.script, *flags.arguments]
    sys.path.insert(0, os.path.dirname(os.path.abspath(flags.script)))
    with recorder:
      runpy.run_path(flags.script, run_name='__main__')
  except SystemExit as stop:
    if stop.code:
      raise DumpError(
        f'{flags.script} ended with {stop.code}; make it run by itself first'
      ) from stop
  finally:
    sys.argv, sys.path[:] = argv, path
    restore()
  return recorder


def write(recorder, flags):
  """Writes what was recorded; the settings come last, so who sees them has it all."""
  tensors, settings = collect(recorder, flags.overlap, flags.shift)
  settings.update(
    format=FORMAT,
    g_image=flags.guidance_image,
    g_condition=flags.guidance_condition,
    script=[os.path.basename(flags.script), *flags.arguments],
    torch=torch.__version__,
    tf32=flags.tf32,
  )
  os.makedirs(flags.output, exist_ok=True)
  settings_path = os.path.join(flags.output, SETTINGS)
  if os.path.exists(settings_path):
    os.remove(settings_path)
  save_file(tensors, os.path.join(flags.output, TENSORS))
  with open(settings_path, 'w') as file:
    json.dump(settings, file, indent=1)
  size = sum(x.numel() * x.element_size() for x in tensors.values())
  print(
    f'{flags.output}: {settings["length"]} frames, {settings["steps_run"]} steps, '
    f'{size / 1e6:.0f} MB'
  )


def main(argv=None):
  flags = make_parser().parse_args(argv)
  try:
    write(watch(flags), flags)
  except DumpError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  sys.exit(main())
