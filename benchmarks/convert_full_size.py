"""Conversion at full size: `python -m benchmarks.convert_full_size`.

Writes random files with the published names and shapes into a temporary folder, converts and exports them by the
command line, checks that what comes back is equal to the bit, and prints the peak memory of each command against its
largest file. Takes about 20 GB of disk in float16, all of which is deleted at the end. Linux only.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

from safetensors.torch import save_file
import torch

from convert import layouts, published

ROOT = pathlib.Path(__file__).parents[1]
MANIFESTS = ROOT / 'tests' / 'manifests'
CONFIGS = {'unet': 'unet_config', 'vae': 'vae_config', 'image_encoder': 'image_encoder_config',
           'whisper': 'whisper_tiny_config'}
FOLDERS = {'unet': 'unet_svd_xt', 'vae': 'vae_temporal_decoder', 'image_encoder': 'clip_vision_h14'}
FILES = {'unet': 'unet_dicetalk', 'audio_linear': 'audio_linear', 'pose_guider': 'pose_guider',
         'emo_model': 'emo_model'}


def tensors(manifest: str, dtype: torch.dtype) -> published.StateDict:
  """Random values by published names."""
  shapes = {key: entry['shape'] for key, entry in json.loads((MANIFESTS / f'{manifest}.json').read_text()).items()}
  return {key: torch.empty(shape, dtype=dtype).uniform_(-1, 1) for key, shape in shapes.items()}


def write_downloads(folder: pathlib.Path, dtype: torch.dtype) -> None:
  """The published folders, one file after the other."""
  configs = json.loads((MANIFESTS / 'configs.json').read_text())
  variant = '.fp16' if dtype == torch.float16 else ''
  places = {f'svd/{name}': (name, manifest) for name, manifest in FOLDERS.items()}
  for place, (name, manifest) in (places | {'whisper': ('whisper', 'whisper_tiny')}).items():
    (folder / place).mkdir(parents=True)
    (folder / place / 'config.json').write_text(json.dumps(configs[CONFIGS[name]]['value']))
    save_file(tensors(manifest, dtype), folder / place / f'model{variant}.safetensors')
  (folder / 'svd' / layouts.SCHEDULER).parent.mkdir()
  (folder / 'svd' / layouts.SCHEDULER).write_text(json.dumps(configs['scheduler_config']['value']))
  (folder / 'dicetalk').mkdir()
  for name, manifest in FILES.items():
    torch.save(tensors(manifest, dtype), folder / 'dicetalk' / layouts.DICETALK[name])


def memory(pid: int) -> dict[str, int]:
  """What a process holds, in bytes: `RssAnon` is its own, `RssFile` are pages of files, which the system may drop."""
  lines = pathlib.Path(f'/proc/{pid}/status').read_text().splitlines()
  return {key: int(value.split()[0]) * 1024 for key, _, value in (line.partition(':') for line in lines)
          if key in ('RssAnon', 'RssFile', 'VmHWM')}


def measure(largest: pathlib.Path, *args) -> None:
  """Runs one command; prints its seconds and peaks."""
  start = time.perf_counter()
  process = subprocess.Popen([sys.executable, '-m', 'convert', *map(str, args)], cwd=ROOT)
  peak: dict[str, int] = {}

  def watch():
    while process.poll() is None:
      try:
        peak.update({key: max(value, peak.get(key, 0)) for key, value in memory(process.pid).items()})
      except OSError:      # it has just ended
        return
      time.sleep(0.05)
  watcher = threading.Thread(target=watch)
  watcher.start()
  process.wait()
  watcher.join()
  if process.returncode:
    sys.exit(process.returncode)
  size = largest.stat().st_size
  print(f'>>> {args[0]}: {time.perf_counter() - start:.0f} s; largest file {size / 1e9:.2f} GB; peak of own memory '
        f'{peak["RssAnon"] / 1e9:.2f} GB ({peak["RssAnon"] / size:.2f} of it), with pages of mapped files '
        f'{peak["VmHWM"] / 1e9:.2f} GB', flush=True)


def compare(first: pathlib.Path, second: pathlib.Path) -> None:
  """Raises AssertionError unless two files hold the same tensors."""
  a, b = published.load(first), published.load(second)
  assert a.keys() == b.keys(), (first, second)
  for key, value in a.items():
    assert value.dtype == b[key].dtype and torch.equal(value, b[key]), key
  print(f'{second.name}: {len(a)} tensors equal to the bit', flush=True)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--dtype', choices=('float16', 'float32'), default='float16', help='of the published files')
  parser.add_argument('--folder', help='where to put the temporary folder')
  args = parser.parse_args()
  with tempfile.TemporaryDirectory(dir=args.folder) as place:
    folder = pathlib.Path(place)
    write_downloads(folder, getattr(torch, args.dtype))
    unet, base = folder / 'dicetalk/unet.pth', published.weights_in(folder / 'svd/unet')
    measure(published.weights_in(folder / 'whisper'), 'whisper', folder / 'whisper', folder / 'model')
    measure(base, 'svd', folder / 'svd', folder / 'model', '--overwrite')
    measure(unet, 'dicetalk', folder / 'dicetalk', folder / 'model', '--overwrite', '--svd', folder / 'svd',
            '--whisper', folder / 'whisper')
    measure(unet, 'export', folder / 'model', folder / 'out')
    svd = folder / 'out/stable-video-diffusion-img2vid-xt'
    for file in layouts.DICETALK.values():
      compare(folder / 'dicetalk' / file, folder / 'out' / file)
    for name in ('vae', 'image_encoder'):
      compare(published.weights_in(folder / 'svd' / name), published.weights_in(svd / name))


if __name__ == '__main__':
  main()
