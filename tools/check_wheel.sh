#!/usr/bin/env bash
# Checks that the wheel works alone.
#
#   make lint && make demo && tools/check_wheel.sh demo
#
# Builds the wheel, installs it into a fresh environment outside the checkout, and there
# generates a video, trains the tiny presets on prepared data, and generates with the
# trained model. The first model is the one in examples/, the portrait and the recording
# come from the folder of a demo; it only reads them.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
demo=$(cd "${1:?give the folder of a demo: tools/check_wheel.sh demo}" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export JAX_PLATFORMS=cpu
unset PYTHONPATH

# 1. Build it from a source distribution, so that nothing of an older build gets in.
if ! "$root/.venv/bin/python" -m build --outdir "$work/dist" "$root" \
  > "$work/build.log" 2>&1; then
  tail -n 20 "$work/build.log"
  exit 1
fi

# 2. Install it: the library alone.
cd "$work"
"$root/.venv/bin/python" -m venv env
env/bin/python -m pip install --quiet --upgrade pip
env/bin/python -m pip install --quiet --constraint "$root/requirements/dev.lock" \
  dist/*.whl
env/bin/python - << 'PYTHON'
import importlib.util
import pathlib

import dicetalk_jax

package = pathlib.Path(dicetalk_jax.__file__).parent
assert 'site-packages' in package.parts, package
assert (package / 'py.typed').exists()
for name in ('configs', 'convert', 'data_pipelines', 'benchmarks', 'examples'):
  assert importlib.util.find_spec(name) is None, name
PYTHON

# 3. Generate.
generate() {
  env/bin/dicetalk-generate --model="$1" --image="$demo/portrait.png" \
    --audio="$demo/speech.wav" --emotion=happy --output="$2"
  env/bin/python - "$2" << 'PYTHON'
import sys

import av

with av.open(sys.argv[1]) as video:
  assert video.streams.audio, 'no audio'
  frames = sum(1 for _ in video.decode(video=0))
assert frames > 1, frames
print(f'{sys.argv[1]}: {frames} frames, with audio')
PYTHON
}
generate "$root/examples/demo_model" given.mp4

# 4. Train, each task with the model of the one before, from copied configurations.
cp -r "$root/configs" .
(cd "$root" && .venv/bin/python -m data_pipelines.prepare synthetic --tiny \
  --train=4 --val=2 --test=0 --clips=16 --data_dir="$work/data")
model=
for task in autoencoder embedder diffusion; do
  env/bin/dicetalk-train --config="configs/$task.py:tiny" \
    --workdir="$task" --notensorboard --config.model="$model" \
    --config.data.dir=data --config.total_steps=4 \
    --config.optim.name=adam --config.optim.warmup=2
  model=$task/model
done

# 5. Pack the result and generate with it.
env/bin/dicetalk-pack --model="$model" --output=packed
env/bin/dicetalk-embed --model=packed --audio="$demo/speech.wav" --save=mine
generate packed trained.mp4
echo "the wheel generates and trains: $(basename dist/*.whl)"
